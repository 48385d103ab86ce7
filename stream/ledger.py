"""What became of every frame of a run and region."""

from bisect import bisect_right

import numpy as np

from stream.messages import Arrays

MAX_SPANS = 1 << 16
"""Runs of lost frames remembered one by one; after that the last one grows to cover what follows."""

_COUNTS = ("sent", "received", "lost", "late", "duplicate", "undecodable", "stray")


class Ledger:
    """Counts frames, and messages that could not be used.

    sent = received + lost, once the detector has said how many it sent (-1 before). ``late`` counts arrivals of frames
    after a later one, which are among the lost. ``duplicate`` frames came again. ``undecodable`` and ``stray`` are
    messages: the first could not be read, the others belong to another run.
    """

    def __init__(self) -> None:
        self.next_frame = 0
        self.sent = -1
        self.received = 0
        self.lost = 0
        self.late = 0
        self.duplicate = 0
        self.undecodable = 0
        self.stray = 0
        self.lag = np.nan
        self._spans: list[tuple[int, int]] = []

    def admit(self, first: int, n: int) -> int:
        """Count frames first..first+n-1; return how many of them, the leading ones, are too late to be used."""
        self._lose(first)
        past = max(0, min(n, self.next_frame - first))
        late = self._lost_between(first, first + past)
        self.late += late
        self.duplicate += past - late
        self.received += n - past
        self.next_frame = max(self.next_frame, first + n)
        return past

    def close(self, n_frames: int) -> None:
        """Take the detector's own count, at least `next_frame`."""
        self.sent = n_frames
        self._lose(n_frames)

    def _lose(self, stop: int) -> None:
        start = self.next_frame
        if stop <= start:
            return
        self.lost += stop - start
        self.next_frame = stop
        if len(self._spans) < MAX_SPANS:
            self._spans.append((start, stop))
        else:
            self._spans[-1] = (self._spans[-1][0], stop)

    def _lost_between(self, start: int, stop: int) -> int:
        n = 0
        for i in range(max(0, bisect_right(self._spans, (start, start)) - 1), len(self._spans)):
            span_start, span_stop = self._spans[i]
            if span_start >= stop:
                break
            n += max(0, min(stop, span_stop) - max(start, span_start))
        return n

    def arrays(self) -> Arrays:
        """Return the counts as 0-d int64, ``lost_spans`` (n, 2) half-open ranges of frames, and ``lag`` (s)."""
        return {
            **{name: np.array(getattr(self, name), np.int64) for name in _COUNTS},
            "next_frame": np.array(self.next_frame, np.int64),
            "lost_spans": np.array(self._spans, np.int64).reshape(-1, 2),
            "lag": np.array(self.lag),
        }

    def restore(self, arrays: Arrays) -> None:
        """Take over what `arrays` returned."""
        for name in (*_COUNTS, "next_frame"):
            setattr(self, name, int(arrays[name]))
        self.lag = float(arrays["lag"])
        self._spans = [(int(start), int(stop)) for start, stop in arrays["lost_spans"]]
