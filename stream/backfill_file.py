"""The file that a run is repaired from: where it is, and which frames it has."""

import logging
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.ingest.hdf5 import Hdf5Source
from stream.ledger import Ledger
from stream.messages import Arrays, RunStart

_log = logging.getLogger(__name__)

Spans = NDArray[np.int64]
"""(n, 2) half-open ranges of frames, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A file of one run."""

    path: Path
    start: RunStart
    n_frames: int
    """That the detector sent, as the file tells it."""
    lost: Spans
    """Frames that are not in it."""
    is_all: bool
    """Whether it has every frame that the detector's stream brought."""

    def ledger(self) -> Arrays:
        """Return the ledger of its frames, as `stream.ledger.Ledger.arrays` would."""
        ledger, begin = Ledger(), 0
        for lost, end in [*self.lost.tolist(), (self.n_frames, self.n_frames)]:
            if lost > begin:
                ledger.admit(begin, lost - begin)
            begin = end
        ledger.close(self.n_frames)
        return ledger.arrays()

    @property
    def received(self) -> int:
        """Frames that are in it."""
        return self.n_frames - int((self.lost[:, 1] - self.lost[:, 0]).sum())


def find(source: Path, run: str) -> Path:
    """Return the file of a run: `source` itself, or what is in that directory of a spool, or in the directory of a run.

    Raises
    ------
    ConfigError
        There is none, or more than one.
    """
    if not source.is_dir():
        if not source.exists():
            raise ConfigError(f"{source}: no such file")
        return source
    # One whose name begins with a dot is being written, or was when a gateway was killed.
    masters = sorted(source.glob("[!.]*_master.h5"))
    if len(masters) != 1:
        masters = [path for path in [*masters, *sorted(source.glob("*/[!.]*_master.h5"))] if _name(path) == run]
    if len(masters) != 1:
        found = ", ".join(map(str, masters)) or "there is none"
        raise ConfigError(f"{source}: one file of run {run} is needed: {found}")
    return masters[0]


def look(path: Path, run: str) -> RunFile:
    """Look at a file, without reading its frames.

    Raises
    ------
    ConfigError
        It is of another run.
    SourceError
        It cannot be read.
    """
    with Hdf5Source(path) as source:
        start = next(message for message in source if isinstance(message, RunStart))
        if start.run not in (run, path.stem):
            raise ConfigError(f"{path} is of run {start.run}, not of {run}")
        n_frames, lost, is_complete = int(start.metadata["n_frames"]), source.never_written(), source.is_complete
    ledger = _spooled(path)
    is_all = is_complete if ledger is None else ledger["received"] == ledger["spooled"]
    return RunFile(path=path, start=start, n_frames=n_frames, lost=lost, is_all=is_all)


def _name(path: Path) -> str | None:
    try:
        with h5py.File(path, "r", locking=False) as file:
            return str(file["entry/entry_identifier"].asstr()[()])
    except (OSError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s: %s", path, error)
        return None


def _spooled(path: Path) -> dict[str, int] | None:
    """Return how many frames the gateway received of the run and how many it spooled, where it closed the file."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return {name: int(file["entry/ledger"][name][()]) for name in ("received", "spooled")}
    except (OSError, KeyError, TypeError, ValueError):
        return None
