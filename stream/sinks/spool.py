"""The raw frames of every run, in files beside streaming: what is left of a run whose stream was lost."""

import fcntl
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from stream.errors import SinkError
from stream.ledger import Ledger
from stream.messages import Chunks, Events, FrameBatch, Frames, Message, Output, Position, RunStart, RunStop
from stream.protocols import Source
from stream.sinks.dectris_image import Compressor
from stream.sinks.spool_room import Room, runs
from stream.sinks.spool_run import SpooledRun, unfinished
from stream.wire import Buffer

logger = logging.getLogger(__name__)

QUEUE_BYTES = 2**30
"""Frames that wait for the disk at most."""

FRAME_BYTES = 64
"""What HDF5 writes of each frame besides its chunk."""

POLL_SECONDS = 0.2
"""How often is looked whether a part is to be completed, where no frames come."""

EXIT_SECONDS = 60.0
"""How long the end waits for the disk."""

MOST_RUNS = 100
"""Of which it is known where they are."""

_Entry = tuple[RunStart | FrameBatch | RunStop, Ledger | None, int]
"""What came, the ledger of a run that stopped, and bytes."""

_FAULTS = (OSError, RuntimeError, ValueError)
"""Of the disk; the others are how h5py tells of it."""


class Spool:
    """Write the frames of every run to files of its own, as their detector compressed them; see `SpooledRun`.

    A `stream.protocols.Sink` that never holds up who writes to it, and never raises: a thread writes to the disk. What
    it cannot write, because the disk is slow, full or gone, is counted as `lost` and logged.

    Runs are removed, the oldest first, where room is needed for another, and never one that has no file "safe" in its
    directory: who made that one has proven that its frames are safe elsewhere.

    `Chunks` are written as they are. Other frames, which their detector sent in another way or left to us to mask, are
    compressed once (0.6 GB/s per core): the spool has room for several times as many then.

    It lasts when the process is killed, not when the machine loses power.

    Parameters
    ----------
    directory
        Where; made if it is not there. No other process may spool there.
    keep_bytes
        Of all runs together, at most.
    queue_bytes
        Of frames that wait for the disk, at most.

    Attributes
    ----------
    directory, keep_bytes
        The same.
    written
        Bytes that were written so far.

    Raises
    ------
    SinkError
        Nothing can be written there, or another process spools there.
    """

    def __init__(self, directory: Path, *, keep_bytes: int, queue_bytes: int = QUEUE_BYTES) -> None:
        self.directory = directory
        self.keep_bytes, self._queue_bytes = keep_bytes, queue_bytes
        self.written = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SinkError(f"spool {directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in (path for run in runs(directory) for path in unfinished(run)):
                leftover.unlink()
            self._room = Room(directory, keep_bytes)
        except BlockingIOError:
            os.close(self._lock)
            raise SinkError(f"spool {directory}: another process spools there") from None
        except OSError as error:
            os.close(self._lock)
            raise SinkError(f"spool {directory}: {error}") from error
        self._compressor = Compressor("bslz4", framed=False)

        # Of the thread that writes to us.
        self._start: RunStart | None = None
        self._ledger = Ledger()
        self._n_put = 0
        self._left_out = _Loss(directory)

        # Of the thread that writes to the disk.
        self._begun: RunStart | None = None
        self._run: SpooledRun | None = None
        self._n_taken = 0
        self._not_written = _Loss(directory)
        self._begun_at: deque[tuple[RunStart, Path]] = deque(maxlen=MOST_RUNS)

        self._queue: queue.SimpleQueue[_Entry | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="spool", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what waits, as long as the disk takes it."""
        self._queue.put(None)
        self._thread.join(EXIT_SECONDS)
        if self._thread.is_alive():
            logger.warning("spool %s: the disk is too slow: the last frames are not in it", self.directory)
            return
        self._compressor.close()
        os.close(self._lock)

    @property
    def lost(self) -> int:
        """Frames that came and are not in a file, nor wait for it. Grows only."""
        return self._left_out.n + self._not_written.n

    @property
    def running(self) -> Path | None:
        """The directory of the run that is being written; None between runs. The files of others do not change."""
        run = self._run
        return run.path if run is not None else None

    def path_of(self, start: RunStart) -> Path | None:
        """Return the directory of a run that began with this very message; None if it has none yet, or long ago."""
        return next((path for begun, path in list(self._begun_at) if begun is start), None)

    def write(self, output: Output) -> None:
        """Take what a detector sent. Results are ignored."""
        match output:
            case RunStart():
                self._start, self._ledger = output, Ledger()
                self._put(output, None, 0)
            case FrameBatch():
                self._take(output)
            case RunStop(run=run) if self._start is not None and self._start.run == run:
                self._ledger.close(max(output.n_frames, self._ledger.next_frame))
                self._put(output, self._ledger, 0)
                self._start = None

    def flush(self) -> None:
        """Return once what was written so far can be read, or is lost."""
        done = threading.Event()
        self._queue.put(done)
        while not done.wait(0.1):
            if not self._thread.is_alive():
                raise SinkError(f"spool {self.directory}: its thread is dead")

    def _take(self, batch: FrameBatch) -> None:
        n, start = len(batch.frames), self._start
        if start is None or start.run != batch.run:
            self._left_out.lose(batch.run, n, "the start of the run was not seen")
            return
        past = self._ledger.admit(batch.first, n)
        if past == n:
            return
        batch = replace(batch, first=batch.first + past, frames=batch.frames[past:])
        size = n_bytes(batch.frames)
        room = self._queue_bytes - (self._n_put - self._n_taken)
        if size > room or (self._left_out.goes_on and 2 * room < self._queue_bytes):
            self._left_out.lose(batch.run, n - past, f"{self._queue_bytes / 1e9:g} GB wait for the disk")
        elif not self._thread.is_alive():
            self._left_out.lose(batch.run, n - past, "its thread is dead")
        else:
            self._left_out.end()
            self._put(batch, None, size)

    def _put(self, output: RunStart | FrameBatch | RunStop, ledger: Ledger | None, size: int) -> None:
        self._n_put += size
        self._queue.put((output, ledger, size))

    def _write_all(self) -> None:
        while True:
            try:
                entry = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._settle(only_if_due=True)
                continue
            match entry:
                case None:
                    self._settle()
                    return
                case threading.Event():
                    self._settle()
                    entry.set()
                case (output, ledger, size):
                    self._write(output, ledger)
                    self._n_taken += size
                    self._settle(only_if_due=True)

    def _write(self, output: RunStart | FrameBatch | RunStop, ledger: Ledger | None) -> None:
        match output:
            case RunStart():
                self._settle()
                self._begun, self._run = output, None
            case FrameBatch() if self._begun is not None:
                self._write_batch(output, self._begun)
            case RunStop() if self._begun is not None and ledger is not None:
                try:
                    self._running(self._begun).close(output.exit_status, ledger)
                except _FAULTS as error:
                    self._give_up(error)
                self._begun = self._run = None

    def _write_batch(self, batch: FrameBatch, start: RunStart) -> None:
        n, frames = len(batch.frames), batch.frames
        said = (start.shape, start.dtype)
        if (kind := (frames.shape[1:], frames.dtype.str)) != said or (isinstance(frames, Chunks) and frames.skip):
            self._not_written.lose(batch.run, n, f"frames are {kind}, not {said} as was told")
            return
        try:
            chunks = self._chunks(frames)
            size = sum(map(len, chunks)) + n * FRAME_BYTES
            if not self._room.make(size, self._run.path if self._run is not None else None):
                self._not_written.lose(batch.run, n, "no room, and no run in it is proven safe")
                return
            self._running(start).write(batch.first, chunks)
        except _FAULTS as error:
            self._give_up(error, batch)
            return
        self._room.take(size)
        self.written += size
        self._not_written.end()

    def _running(self, start: RunStart) -> SpooledRun:
        if self._run is None:
            self._run = SpooledRun(self.directory, start)
            self._begun_at.append((start, self._run.path))
        return self._run

    def _chunks(self, frames: Frames) -> Sequence[Buffer]:
        if isinstance(frames, Chunks):
            return frames.chunks
        return [self._compressor.compress(frame) for frame in frames]

    def _settle(self, *, only_if_due: bool = False) -> None:
        if self._run is None or (only_if_due and not self._run.is_due):
            return
        try:
            self._run.settle()
        except _FAULTS as error:
            self._give_up(error)

    def _give_up(self, error: Exception, batch: FrameBatch | None = None) -> None:
        """Go on without the part that could not be written, which the batch was to become part of."""
        n = 0 if batch is None else len(batch.frames)
        run = ""
        if self._run is not None:
            run = self._run.path.name
            n += self._run.n_unsettled
            with suppress(*_FAULTS):
                self._run.discard()
        self._not_written.lose(run, n, str(error))
        with suppress(OSError):
            self._room.count()


class Spooled:
    """A `Source` of which everything is spooled as it goes by.

    Parameters
    ----------
    source
        Closed by who opened it, as the spool is.
    """

    def __init__(self, source: Source, spool: Spool) -> None:
        self._source, self._spool = source, spool

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Do nothing."""

    def __iter__(self) -> Iterator[Message | None]:
        """Yield what the source yields."""
        for message in self._source:
            if isinstance(message, RunStart | FrameBatch | RunStop):
                self._spool.write(message)
            yield message

    def position(self) -> Position:
        """Return that of the source."""
        return self._source.position()

    def seek(self, position: Position) -> None:
        """Let the source go there."""
        self._source.seek(position)


class _Loss:
    """Frames that are not spooled; those that follow each other are logged once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.n = 0
        self.goes_on = False
        self._before = 0

    def lose(self, run: str, n: int, why: str) -> None:
        if not self.goes_on:
            self.goes_on, self._before = True, self.n
            logger.warning("spool %s: run %s streams on without this fallback: %s", self._directory, run, why)
        self.n += n

    def end(self) -> None:
        if self.goes_on:
            self.goes_on = False
            logger.warning("spool %s: goes on; %d frames are not in it", self._directory, self.n - self._before)


def n_bytes(frames: Frames) -> int:
    """Return what frames hold of memory, about."""
    match frames:
        case Chunks(chunks=chunks):
            return sum(map(len, chunks))
        case Events(pixels=pixels, counts=counts):
            return pixels.nbytes + counts.nbytes
        case _:
            return frames.nbytes
