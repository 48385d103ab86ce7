"""A result file whose frames did not all come, computed anew from the file of its run."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import h5py
import numpy as np

from stream import checkpoint
from stream.backfill import Nowhere, OfRun, Say
from stream.backfill_file import RunFile
from stream.correlators import Make
from stream.errors import ConfigError
from stream.ingest.hdf5 import Hdf5Source
from stream.merger import FILE
from stream.messages import Output, Result, RunStop
from stream.pipeline import Pipeline
from stream.protocols import Sink


def received_of(result: Path) -> tuple[int, int, bool] | None:
    """Return how many frames a result file is of, how many of them came from a file, and whether regions are missing.

    None if there is no such file.

    Raises
    ------
    ConfigError
        It cannot be read, or has none.
    """
    if not result.exists():
        return None
    try:
        with h5py.File(result, "r") as file:
            ledger = file["xpcs/ledger"]
            from_file = int(ledger["from_file"][()]) if "from_file" in ledger else 0
            lacks_regions = "missing_regions" in ledger and bool(ledger["missing_regions"].size)
            return int(ledger["received"][()]), from_file, lacks_regions
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{result}: its ledger cannot be read: {error}") from None


class Late:
    """Tells a sink that the frames of results came late, by a file. A `Sink`; closed by who opened the other.

    Parameters
    ----------
    received
        Frames that came in the stream.
    """

    def __init__(self, sink: Sink, received: int) -> None:
        self._sink, self._before = sink, received

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing."""

    def write(self, output: Output) -> None:
        """Take one output."""
        if isinstance(output, Result) and output.operator == "ledger":
            how = {
                "missing_regions": np.empty(0, np.int64),
                "repaired_regions": np.zeros(1, np.int64),
                "from_file": np.array(max(0, int(output.arrays["received"]) - self._before), np.int64),
                "plane": np.array(FILE, np.int64),
                "awaits_file": np.array(0, np.int64),
                "lag": np.array(np.nan),
            }
            output = replace(output, arrays={**output.arrays, **how})
        self._sink.write(output)

    def flush(self) -> None:
        """Return once the sink has everything."""
        self._sink.flush()


def recompute(
    run: str,
    file: RunFile,
    result: Path,
    make: Make,
    sinks: Sequence[Sink],
    *,
    saved: Path | None,
    checkpoint_every: float,
    publish_every: float,
    say: Say,
    stop: threading.Event,
) -> bool:
    """Compute a run from its file if that has more frames than its result; return whether that is done.

    Raises
    ------
    ConfigError, SourceError, SinkError, CheckpointError
        The result, the file, a sink or the checkpoint fails.
    """
    before = received_of(result)
    received, from_file, lacks_regions = before or (0, 0, True)
    store = checkpoint.File(saved) if saved is not None else Nowhere()
    left = store.load()
    if saved is not None and left is not None and left.running is None:
        saved.unlink()  # of one that was killed at its very end
    # One that was left goes on, though its result is there: some sinks may not have it yet.
    is_left = left is not None and left.running is not None
    if file.received <= received and not lacks_regions and not is_left:
        say(f"{result}: nothing to repair: {file.path} has no more frames")
        return True
    start = replace(file.start, run=run)
    end = _End()
    with Hdf5Source(file.path, give="photons") as source:
        Pipeline(
            OfRun(source, start, file.n_frames, say),
            make,
            [*(Late(sink, received - from_file) for sink in sinks), end],
            publish_every=publish_every,
            checkpoints=store,
            checkpoint_every=checkpoint_every,
            runs=1,
            stop=stop,
        ).run()
    if not end.came:
        return False
    if saved is not None:
        saved.unlink(missing_ok=True)
    say(f"{result}: {received:,} frames before, {file.received:,} of {file.n_frames:,} now")
    return True


class _End:
    """A `Sink` that knows whether the run has ended."""

    came = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing."""

    def write(self, output: Output) -> None:
        self.came = self.came or isinstance(output, RunStop)

    def flush(self) -> None:
        """Do nothing."""
