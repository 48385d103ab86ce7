"""Mean counts of the mapped pixels against time: what the beam did."""

from typing import Self

import numpy as np

from stream.messages import Arrays, Events, FrameBatch, RunStart
from stream.operators.kernels import totals
from stream.operators.roimap import RoiMap
from stream.operators.segments import Segments
from stream.operators.state import check_identity, identity, static_bins
from stream.operators.tiles import Threads, flat

MAX_INTERVALS = 1 << 16


class Intensity:
    """Counts per pixel and frame of one region, for each frame or, in long runs, each of 2**15 to 2**16 intervals.

    Parameters
    ----------
    start, roimap
        The run, and the map of the whole detector.
    threads
        Kernel threads; None = all cores this process may use.
    """

    name = "intensity"

    def __init__(self, start: RunStart, roimap: RoiMap, *, threads: int | None = None) -> None:
        self.n_frames = 0
        self._start = start
        self._roimap = roimap
        self._threads = Threads(threads)
        self._limit = totals.limit(start.dtype, start.saturation_value)
        inside = static_bins(start, roimap) > 0
        self._alive = inside.ravel().astype(np.uint8)
        self._n_alive = int(np.count_nonzero(self._alive))
        self._intervals = Segments(MAX_INTERVALS, 2)

    def push(self, batch: FrameBatch) -> None:
        """Fold in frames; see `stream.protocols.Operator`."""
        frames = batch.unpacked if isinstance(batch.unpacked, Events) else flat(batch.unpacked)
        per_frame = np.zeros((self._threads.n, 2, len(frames)), np.int64)

        def add(part: int, begin: int, end: int) -> None:
            state = (self._limit, self._alive, per_frame[part, 0], per_frame[part, 1])
            if isinstance(frames, Events):
                totals.over_pixels_of_events(frames.offsets, frames.pixels, frames.counts, *state, begin, end)
            else:
                totals.over_pixels(frames, *state, begin, end)

        self._threads.run(add, self._alive.size)
        counts, left = per_frame.sum(axis=0)
        n_alive = self._n_alive - np.cumsum(left)
        self._intervals.reach(batch.first + len(frames))
        interval = np.arange(batch.first, batch.first + len(frames)) // self._intervals.length
        np.add.at(self._intervals.sums, interval, np.column_stack([counts, n_alive]))
        self._n_alive = int(n_alive[-1])
        self.n_frames = batch.first + len(frames)

    def result(self) -> Arrays:
        """Return the intensity so far.

        Returns
        -------
        frame : (n,) int64
            First frame of each interval; intervals in which no frame came are left out.
        intensity : (n,) float64
            Counts per pixel and frame.
        """
        counts, pixel_frames = self._intervals.sums[: self._intervals.n(self.n_frames)].T
        known = np.flatnonzero(pixel_frames)
        return {"frame": known * self._intervals.length, "intensity": counts[known] / pixel_frames[known]}

    def merge(self, other: Self) -> None:
        """Add another region of the same frames; see `stream.protocols.Operator`."""
        self.n_frames = max(self.n_frames, other.n_frames)
        self._intervals.add(other._intervals, self.n_frames)

    def snapshot(self) -> Arrays:
        """Return the state; see `stream.protocols.Operator`."""
        return {
            **identity(self._start, self._roimap),
            "n_frames": np.array([self.n_frames, self._intervals.length]),
            "alive": self._alive.copy(),
            "intervals": self._intervals.sums.copy(),
        }

    def miss(self, n_frames: int) -> None:
        """Go on to n_frames without those not pushed; see `stream.protocols.Operator`."""
        self._intervals.reach(n_frames)
        self.n_frames = n_frames

    def partial(self) -> Arrays:
        """Return the state; see `stream.protocols.Operator`."""
        return self.snapshot()

    def restore(self, state: Arrays) -> None:
        """Take over a state; see `stream.protocols.Operator`."""
        check_identity(self.name, state, identity(self._start, self._roimap))
        self.n_frames, self._intervals.length = (int(n) for n in state["n_frames"])
        self._alive = state["alive"].copy()
        self._n_alive = int(np.count_nonzero(self._alive))
        self._intervals.sums = state["intervals"].copy()
