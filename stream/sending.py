"""Frames at their rate from a source to a sink, as a detector would send them."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from stream.errors import DecodeError
from stream.ingest.dectris import decode
from stream.ingest.dectris_messages import End, Image, Start
from stream.messages import FrameBatch, Rejected, RunStart, RunStop
from stream.protocols import Sink, Source
from stream.wire import Buffer

_log = logging.getLogger(__name__)

BEHIND = 0.5
"""Seconds behind its schedule at which a sender says so."""


class Schedule:
    """When frames are due: `n` frames are complete n / rate after the start."""

    def __init__(self, rate: float | None, stop: threading.Event, *, n_ready: int = 0) -> None:
        self._rate = rate
        self._stop = stop
        passed = n_ready / rate if rate else 0.0
        self._start = time.monotonic() - passed
        self._start_ns = time.time_ns() - round(passed * 1e9)
        self._sent = 0
        self._is_behind = False

    def timed(self, batch: FrameBatch) -> FrameBatch:
        """Return the frames as if they had been exposed when they were due."""
        if self._rate is None:
            return batch
        return replace(batch, timestamp_ns=self._start_ns + round(batch.first / self._rate * 1e9))

    def wait(self, n: int) -> bool:
        """Wait until `n` frames are complete; return whether to go on."""
        if self._rate is not None:
            left = self._start + n / self._rate - time.monotonic()
            if left > 0:
                self._stop.wait(left)
            elif left < -BEHIND and not self._is_behind:
                self._is_behind = True
                _log.warning(
                    "frame %d is %.1f s late: the receiver takes frames more slowly than %g/s", n, -left, self._rate
                )
        if self._stop.is_set():
            return False
        self._sent = n
        return True

    def __str__(self) -> str:
        seconds = time.monotonic() - self._start
        return f"{self._sent:,} frames in {seconds:.1f} s ({self._sent / max(seconds, 1e-9):,.0f} frames/s)"


def send(source: Source, sink: Sink, stop: threading.Event, *, paced: bool, rate: float | None) -> Schedule | None:
    """Send all that a source gives: at `rate` frames per second, at its own if None, or without waiting if not paced.

    A set `stop` ends the run that is being sent. Returns what was sent of the last run.
    """
    schedule: Schedule | None = None
    pace: float | None = None
    for message in source:
        match message:
            case RunStart():
                sink.write(message)
                schedule, pace = None, (rate or 1 / message.frame_time) if paced else None
            case FrameBatch():
                n = message.first + len(message.frames)
                # The first frames may have taken long to make: what is due counts from when they are there.
                schedule = schedule or Schedule(pace, stop, n_ready=n)
                if not schedule.wait(n):
                    stopped = RunStop(
                        run=message.run, region=message.region, n_frames=message.first, exit_status="abort"
                    )
                    sink.write(stopped)
                    break
                sink.write(schedule.timed(message))
            case RunStop():
                sink.write(message)
            case Rejected():
                _log.warning("%s", message.reason)
    return schedule


def send_recorded(
    messages: Iterable[Sequence[Buffer]],
    send: Callable[[Sequence[Buffer]], None],
    stop: threading.Event,
    *,
    rate: float | None,
) -> Schedule | None:
    """Send recorded messages as they are, `rate` frames per second, or without waiting if None."""
    schedule: Schedule | None = None
    n, is_open = 0, False
    for parts in messages:
        match _read(parts):
            case Start():
                is_open = True
            case Image():
                n += 1
                if schedule is not None and not schedule.wait(n):
                    return schedule
            case End():
                is_open = False
        send(parts)
        schedule = schedule or Schedule(rate, stop)  # from when a receiver took the first
    if is_open:
        _log.warning("the recording has no end of its run: the receiver goes on waiting for more")
    return schedule


def _read(parts: Sequence[Buffer]) -> Start | Image | End | None:
    """Return what a message says; None if it cannot be read, and is sent all the same."""
    try:
        return decode(parts)
    except DecodeError:
        return None
