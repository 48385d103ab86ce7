"""What the manager of a beamline decided: which way frames go. A small file that it replaces, and others look at.

``{"plane": "stream" | "stream+file" | "file", "why": str, "since": seconds of the Unix epoch}``
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

_log = logging.getLogger(__name__)

Way = Literal["stream", "stream+file", "file"]
"""Which way frames go: over the plane; over the plane, and their file goes, too; by file only."""

WAYS: tuple[Way, ...] = get_args(Way)

MAX_BYTES = 2**14

MAX_WORDS = 1000


@dataclass(frozen=True, slots=True)
class Told:
    """What the file says."""

    plane: Way = "stream"
    why: str = ""
    since: float = 0.0
    """Seconds of the Unix epoch."""


class PlaneFile:
    """A file that is replaced now and then, and may not be there: then frames are streamed.

    One that cannot be understood changes nothing, and is complained of once.

    Parameters
    ----------
    every
        It is looked at so often at most (s).
    """

    def __init__(self, path: Path, *, every: float = 0.2) -> None:
        self._path, self._every = path, every
        self._due = 0.0
        self._seen: tuple[int, int] | None = None
        self._told = Told()

    def look(self) -> Told:
        """Return what it says now."""
        now = time.monotonic()
        if now < self._due:
            return self._told
        self._due = now + self._every
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self._seen, self._told = None, Told()
            return self._told
        except OSError as error:
            self._complain(None, error.strerror)
            return self._told
        seen = found.st_ino, found.st_mtime_ns
        if seen != self._seen:
            try:
                self._told = _read(self._path)
                self._seen = seen
            except (OSError, ValueError, RecursionError) as error:
                self._complain(seen, str(error))
        return self._told

    def _complain(self, seen: tuple[int, int] | None, why: str | None) -> None:
        if self._seen != (seen or (0, 0)):
            _log.warning('%s: %s; frames still go by "%s"', self._path, why, self._told.plane)
        self._seen = seen or (0, 0)


def _read(path: Path) -> Told:
    if not path.is_file():
        raise ValueError("is not a file")
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    said = json.loads(text)
    if not isinstance(said, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004 - of a file
    plane, why, since = said.get("plane"), said.get("why", ""), said.get("since", 0.0)
    known = next((way for way in WAYS if way == plane), None)
    if known is None:
        raise ValueError(f"plane {str(plane)[:80]!r} is not one of {', '.join(WAYS)}")
    if not isinstance(why, str):
        raise ValueError(f"why {str(why)[:80]!r} is not text")  # noqa: TRY004 - of a file
    if isinstance(since, bool) or not isinstance(since, int | float) or not 0 <= since < 1e12:
        raise ValueError(f"since {str(since)[:80]!r} is not a time")
    return Told(known, " ".join(why.split())[:MAX_WORDS], float(since))
