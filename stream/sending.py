"""Frames at their rate from a source to a sink, as a detector would send them."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from stream.messages import FrameBatch, Rejected, RunStart, RunStop
from stream.protocols import Sink, Source
from stream.wire import Buffer

_log = logging.getLogger(__name__)

BEHIND = 0.5
"""Seconds behind its schedule at which a sender says that it cannot keep up."""


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

    def timed(self, batch: "FrameBatch") -> "FrameBatch":
        """Return the frames as if they had been exposed when they were due."""
        if self._rate is None:
            return batch
        return replace(batch, timestamp_ns=self._start_ns + round(batch.first / self._rate * 1e9))

    def wait(self, n: int) -> bool:
        """Wait until `n` frames are complete; return whether to go on."""
        self._sent = n
        if self._rate is not None:
            left = self._start + n / self._rate - time.monotonic()
            if left > 0:
                self._stop.wait(left)
            elif left < -BEHIND and not self._is_behind:
                self._is_behind = True
                _log.warning("frame %d is %.1f s behind: %g frames/s cannot be kept up", n, -left, self._rate)
        return not self._stop.is_set()

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
                    sink.write(RunStop(run=message.run, n_frames=message.first, exit_status="abort"))
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
    """Send recorded messages as they are, `rate` of them per second, or without waiting if None."""
    schedule: Schedule | None = None
    for n, parts in enumerate(messages):
        if schedule is not None and not schedule.wait(n):
            break
        send(parts)
        schedule = schedule or Schedule(rate, stop)  # from when a receiver took the header
    return schedule
