"""Where pilots wait for a manager that dials: each writes its address to a file, named after its lease."""

import logging
import os
import re
import stat
import threading
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)

LOOK = 0.3
"""Seconds between looks at the files."""

MAX_BYTES = 300
"""Of a file."""

_ADDRESS = re.compile(r"tcp://(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\]):[1-9]\d{0,4}\n")


def file_of(directory: Path, lease: str) -> Path:
    """Return the file in which the pilot of a lease says where it listens."""
    return directory / f"{lease}.address"


def announce(file: Path, address: str) -> None:
    """Say where we listen, all at once."""
    new = file.with_suffix(f".{os.getpid()}.new")
    new.write_text(f"{address}\n")
    new.replace(file)


def announced(file: Path) -> str | None:
    """Return the address in a file; None: there is none, or nothing that could be one."""
    try:
        # What lies there may be anything: neither a link nor a pipe is opened.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with suppress(OSError, UnicodeDecodeError), os.fdopen(descriptor, "rb") as opened:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            text = opened.read(MAX_BYTES).decode("ascii")
            return text.strip() if _ADDRESS.fullmatch(text) else None
    return None


class Addresses:
    """The files of a site, read in a thread of its own: one who asks is never held up, whatever the file system does.

    Parameters
    ----------
    directory
        Where they lie.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: Mapping[str, str] = {}
        self._asked: AbstractSet[str] = frozenset()
        self._next = 0.0
        self._reading: threading.Thread | None = None

    def look(self, leases: AbstractSet[str]) -> Mapping[str, str]:
        """Return the addresses that are known of leases; files of leases that were asked for before are removed."""
        if time.monotonic() >= self._next and (self._reading is None or not self._reading.is_alive()):
            self._next = time.monotonic() + LOOK
            over, self._asked = self._asked - leases, leases
            self._reading = threading.Thread(target=self._read, args=(leases, over), daemon=True)
            self._reading.start()
        return {lease: address for lease, address in self._found.items() if lease in leases}

    def _read(self, leases: AbstractSet[str], over: AbstractSet[str]) -> None:
        for lease in over:
            try:
                file_of(self._directory, lease).unlink(missing_ok=True)
            except OSError as error:
                _log.debug("%s", error)
        addresses = {lease: announced(file_of(self._directory, lease)) for lease in leases}
        self._found = {lease: address for lease, address in addresses.items() if address is not None}
