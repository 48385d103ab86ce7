"""How much a spool may write, and which of its runs make room for another."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stream.sinks.spool_run import SAFE, files_of, master_name

logger = logging.getLogger(__name__)

DISK_BYTES = 2**24
"""Left free on the disk, for what HDF5 writes of a part when it is completed."""

SHARE = 0.1
"""Of the time, in which a spool that is full is looked through: it may have thousands of files."""


class Room:
    """The room of a spool.

    Parameters
    ----------
    directory
        Of the spool.
    keep_bytes
        Of all runs together, at most.
    """

    def __init__(self, directory: Path, keep_bytes: int) -> None:
        self._directory, self._keep_bytes = directory, keep_bytes
        self._held = 0
        self._look_due = 0.0
        self.count()

    def count(self) -> None:
        """Look what there is: others may have taken runs away."""
        self._held = sum(_size(path) for run in runs(self._directory) for path in files_of(run))

    def take(self, size: int) -> None:
        """Note that so many bytes were written."""
        self._held += size

    def make(self, size: int, running: Path | None) -> bool:
        """Tell whether so many bytes can be written; remove runs for it, the oldest first, that are proven safe.

        Parameters
        ----------
        running
            A run that is not to be removed.

        Raises
        ------
        OSError
            The disk is gone, or a run cannot be removed.
        """
        if self._fits(size):
            return True
        begin = time.monotonic()
        if begin < self._look_due:
            return False
        self.count()
        proven = [run for run in runs(self._directory) if (run / SAFE).is_file() and run != running]
        for run in sorted(proven, key=_ended):
            if self._fits(size):
                break
            self._remove(run)
        if self._fits(size):
            return True
        end = time.monotonic()
        self._look_due = end + (end - begin) / SHARE
        return False

    def _fits(self, size: int) -> bool:
        free = shutil.disk_usage(self._directory).free
        return self._held + size <= self._keep_bytes and size + DISK_BYTES <= free

    def _remove(self, run: Path) -> None:
        for path in files_of(run):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # what others have put there stays
            run.rmdir()
        self.count()
        logger.info("spool %s: removed run %s, which is proven safe", self._directory, run.name)


def runs(directory: Path) -> Iterator[Path]:
    """Yield the directories of the runs in a spool."""
    return (path for path in directory.iterdir() if path.is_dir())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # taken away meanwhile
        return 0


def _ended(run: Path) -> float:
    """Return when the master was written last; 0 if the run was on the point of being removed before."""
    try:
        return (run / master_name(run)).stat().st_mtime
    except FileNotFoundError:
        return 0.0
