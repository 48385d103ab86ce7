"""What is in a spool: runs, their files, and how much room there is yet."""

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import h5py

from stream.sinks.spool_room import DISK_BYTES, runs
from stream.sinks.spool_run import SAFE, files_of, master_name

SETTLED_NS = 2 * 10**9
"""A directory that was changed so long ago before it was looked at is only looked at again when that changes."""

MASTER_BYTES = 2**26
"""A master that is larger is none of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A run in a spool."""

    path: Path
    """Its directory."""
    run: str
    files: tuple[str, ...]
    """The parts and the master, last."""
    n_bytes: int
    written: float
    """When its master was written last, seconds of the Unix epoch."""
    exit_status: str | None
    """None: its gateway did not live to know."""
    frames: int | None
    """That came, and ..."""
    spooled: int | None
    """... that are in the files. None as above."""
    is_safe: bool


class Inventory:
    """Looks again and again what is in a spool; only at what changed.

    Parameters
    ----------
    directory
        Of the spool.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[Path, tuple[int, int, Found | None]] = {}
        """When it was changed, when it was looked at (ns), and what was found."""

    def look(self) -> list[Found]:
        """Return the runs, in the order in which they were written.

        Raises
        ------
        OSError
            The disk is gone.
        """
        known: dict[Path, tuple[int, int, Found | None]] = {}
        for path in runs(self._directory):
            try:
                before, changed, now = self._known.get(path), path.stat().st_mtime_ns, time.time_ns()
                # Of changes that follow close upon each other the second one may not be told.
                if before is None or changed != before[0] or before[1] - changed < SETTLED_NS:
                    known[path] = changed, now, _found(path)
                else:
                    known[path] = before
            except FileNotFoundError:  # removed meanwhile
                continue
        self._known = known
        return sorted((found for *_, found in known.values() if found is not None), key=lambda found: found.written)


def room(directory: Path, keep_bytes: int, found: Iterable[Found], running: Path | None) -> tuple[int, int]:
    """Return what all runs of a spool hold, and what may yet be written: free, or held by runs that are safe (bytes).

    Raises
    ------
    OSError
        The disk is gone.
    """
    held = removable = 0
    for run in found:
        held += run.n_bytes
        removable += run.n_bytes if run.is_safe and run.path != running else 0
    free = shutil.disk_usage(directory).free - DISK_BYTES
    return held, max(0, min(keep_bytes - held, free) + removable)


def _found(path: Path) -> Found | None:
    master = path / master_name(path)
    if not master.is_file():
        return None
    ours = files_of(path)
    exit_status, run, frames, spooled = None, path.name, None, None
    if master.stat().st_size <= MASTER_BYTES:
        # Of what is not as we write it nobody knows how it ended.
        wrong = OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError
        with suppress(*wrong), h5py.File(BytesIO(master.read_bytes()), "r") as file:
            run = str(file["entry/entry_identifier"].asstr()[()])
            if "entry/exit_status" in file:
                exit_status = str(file["entry/exit_status"].asstr()[()])
                frames = int(file["entry/ledger/received"][()])
                spooled = int(file["entry/ledger/spooled"][()])
    return Found(
        path=path,
        run=run,
        files=tuple(each.name for each in ours if each.suffix == ".h5" and not each.name.startswith(".")),
        n_bytes=sum(each.stat().st_size for each in ours),
        written=master.stat().st_mtime,
        exit_status=exit_status,
        frames=frames,
        spooled=spooled,
        is_safe=(path / SAFE).is_file(),
    )
