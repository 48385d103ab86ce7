"""The file in which the command of a pilot tells how it is, as JSON: see `xpcs-stream worker --status`."""

import json
import logging
from pathlib import Path

from hpc_bridge.heartbeat import MAX_BYTES, Status, status

_log = logging.getLogger(__name__)


class StatusFile:
    """A file that is replaced again and again, and may not be there yet, or be cut short."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._has_complained = False

    def look(self) -> Status | None:
        """Return what it says if it changed since the last look and can be read; else None."""
        try:
            found = self._path.stat()
            if (found.st_ino, found.st_mtime_ns) == self._seen or not self._path.is_file():
                return None
            self._seen = found.st_ino, found.st_mtime_ns
            with self._path.open("rb") as file:
                return status(json.loads(file.read(MAX_BYTES)))
        except OSError:
            return None
        except (ValueError, RecursionError) as error:
            if not self._has_complained:
                _log.warning("%s: %s", self._path, " ".join(str(error).split())[:200])
            self._has_complained = True
            return None
