"""How a worker is, in a file for those who look after it: `xpcs-stream worker --status`."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from stream.messages import FrameBatch, Message, Position, RunStart
from stream.plane import Frames

_log = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two of them, where nothing changes."""

LONGEST_LAG = 3600.0
"""Seconds above which it is the clocks that differ, or frames that were measured long ago."""


class Watched:
    """Frames of a region, and how far their worker is with them. `stream.plane.Frames`, open.

    Attributes
    ----------
    n_frames
        That the worker is done with.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._start: RunStart | None = None
        self._at_work: int | None = None
        """When the frames at which the worker is ended, ns since the Unix epoch."""
        self._lag: float | None = None
        self.n_frames = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing: who opened the frames closes them."""

    def __iter__(self) -> Iterator[Message | None]:
        """Yield messages as they come."""
        for message in self._frames:
            match message:
                case RunStart():
                    self._start = message
                case FrameBatch():
                    self._at_work = self._end(message)
                case None if self._lag is not None:
                    self._lag = 0.0  # there is nothing that we do not have
            try:
                yield message
            finally:  # also of one who leaves after it
                if isinstance(message, FrameBatch):
                    self.n_frames += len(message.frames)
                    self._lag, self._at_work = self.lag(), None

    def position(self) -> Position:
        """Return where to go on; see `stream.protocols.Source`."""
        return self._frames.position()

    def seek(self, position: Position) -> None:
        """Go to a position; see `stream.protocols.Source`."""
        self._frames.seek(position)

    def begin(self, start: RunStart) -> None:
        """Tell which run the frames at a position are of."""
        self._start = start
        self._frames.begin(start)

    def acknowledge(self, position: Position) -> None:
        """Tell that nothing before a position will be asked for again."""
        self._frames.acknowledge(position)

    def lag(self) -> float | None:
        """Return how long ago the frames ended at which the worker is, or was last (s); 0 where none are left.

        None where there were none yet, or their times do not tell.
        """
        end = self._at_work
        lag = self._lag if end is None else (time.time_ns() - end) / 1e9
        return lag if lag is not None and abs(lag) < LONGEST_LAG else None

    def _end(self, batch: FrameBatch) -> int:
        if self._start is None:
            return batch.timestamp_ns
        seconds = (len(batch.frames) - 1) * self._start.frame_time + self._start.count_time
        return batch.timestamp_ns + round(1e9 * seconds)


class Status:
    """Tells how a worker is: every second, and at once when its regions change.

    At the end that it is not ready. The file is replaced, so that it is whole at any time:
    ``{"ready": bool, "regions": [int], "frames": int, "lag_s": number or null, "message": str}``.

    Parameters
    ----------
    path
        None: nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self._ready, self._message = False, ""
        self._watched: dict[int, Watched] = {}
        self._n_frames = 0
        """Of regions that were left."""
        self._lock = threading.Lock()
        self._has_changed = threading.Event()
        self._is_closing = self._has_failed = False
        self._thread: threading.Thread | None = None
        if path is not None:
            self._thread = threading.Thread(target=self._run, args=(path,), name="status", daemon=True)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.say("gone")
        self._is_closing = True  # only now: what is written last must say so
        self._has_changed.set()
        if self._thread is not None:
            self._thread.join()

    def say(self, message: str, *, ready: bool = False) -> None:
        """Tell what the worker does, and whether it takes part."""
        with self._lock:
            self._ready, self._message = ready, message
        self._has_changed.set()

    @contextmanager
    def watch(self, region: int, frames: Frames) -> Iterator[Frames]:
        """Yield the frames of a region, which is ours until then."""
        watched = Watched(frames)
        with self._lock:
            self._watched[region] = watched
        self._has_changed.set()
        try:
            yield watched
        finally:
            with self._lock:
                del self._watched[region]
                self._n_frames += watched.n_frames
            self._has_changed.set()

    def _run(self, path: Path) -> None:
        is_last = False
        while not is_last:
            self._has_changed.wait(EVERY)
            self._has_changed.clear()
            is_last = self._is_closing
            self._write(path)

    def _write(self, path: Path) -> None:
        with self._lock:
            lags = [lag for watched in self._watched.values() if (lag := watched.lag()) is not None]
            told = {
                "ready": self._ready,
                "regions": sorted(self._watched),
                "frames": self._n_frames + sum(watched.n_frames for watched in self._watched.values()),
                "lag_s": max(lags, default=None),
                "message": self._message,
            }
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_text(json.dumps(told))
            temporary.replace(path)
        except OSError as error:
            if not self._has_failed:
                _log.warning("%s: cannot be written: %s", path, error.strerror)
            self._has_failed = True
