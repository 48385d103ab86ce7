"""Mean scattering: in two dimensions, per static bin, and per static bin in segments of time (radiation damage)."""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stream.messages import Arrays, Events, FrameBatch, RunStart
from stream.operators.kernels import totals
from stream.operators.roimap import RoiMap
from stream.operators.segments import Segments
from stream.operators.state import check_identity, identity, static_bins
from stream.operators.tiles import Threads, flat

MAX_SEGMENTS = 20


class Scattering:
    """Mean counts of one region.

    A pixel that reads more than the saturation value leaves for the rest of the run; in the image it is NaN.

    Parameters
    ----------
    start, roimap
        The run, and the map of the whole detector.
    threads
        Kernel threads; None = all cores this process may use.
    """

    name = "scattering"

    def __init__(self, start: RunStart, roimap: RoiMap, *, threads: int | None = None) -> None:
        self.n_frames = 0
        self._start = start
        self._roimap = roimap
        self._threads = Threads(threads)
        self._bins = static_bins(start, roimap).ravel()
        n_pixel = self._bins.size
        self._limit = totals.limit(start.dtype, start.saturation_value)
        self._alive = np.ones(n_pixel, np.uint8)
        self._n_alive = self._alive_per_bin()
        self._totals = np.zeros(n_pixel, np.int64)
        self._received = 0
        self._counts = Segments(MAX_SEGMENTS, roimap.n_static)
        self._pixel_frames = Segments(MAX_SEGMENTS, roimap.n_static)
        self._merged: dict[tuple[int, int], NDArray[np.float64]] = {}

    def push(self, batch: FrameBatch) -> None:
        """Fold in frames; see `stream.protocols.Operator`."""
        frames = batch.unpacked if isinstance(batch.unpacked, Events) else flat(batch.unpacked)
        spans = zip(
            self._counts.over(batch.first, len(frames)), self._pixel_frames.over(batch.first, len(frames)), strict=True
        )
        for (segment, part), _ in spans:
            counts, absent, left = self._add(frames[part])[:, 1:]
            self._counts.sums[segment] += counts
            self._pixel_frames.sums[segment] += self._n_alive * (part.stop - part.start) - absent
            self._n_alive -= left
        self._received += len(frames)
        self.n_frames = batch.first + len(frames)

    def _add(self, frames: Events | NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int64]:
        """Add up frames, and return their tally; see `stream.operators.kernels.totals`."""
        tallies = np.zeros((self._threads.n, 3, self._roimap.n_static + 1), np.int64)

        def add(part: int, begin: int, end: int) -> None:
            state = (self._limit, self._bins, self._alive, self._totals, tallies[part])
            if isinstance(frames, Events):
                totals.over_frames_of_events(frames.offsets, frames.pixels, frames.counts, *state, begin, end)
            else:
                totals.over_frames(frames, *state, totals.tile_of_sums(frames.dtype), begin, end)

        self._threads.run(add, self._bins.size)
        tally: NDArray[np.int64] = tallies.sum(axis=0)
        return tally

    def result(self) -> Arrays:
        """Return the means so far.

        Returns
        -------
        image : (rows, cols) float64
            Counts per frame; NaN where masked.
        origin : (2,) int64
            Its first row and column on the detector.
        scattering_1d : (n_static,) float64
            Counts per pixel and frame; NaN for bins without light-sensitive pixels.
        scattering_1d_segments : (n_segment, n_static) float64
        segment_start : (n_segment,) int64
            First frame of each segment.
        """
        counts, pixel_frames = self._counts.sums, self._pixel_frames.sums
        n_segment = self._counts.n(self.n_frames)
        images = {self._start.origin: self._image(), **self._merged}
        origin = np.min(list(images), axis=0)
        corners = [np.add(at, image.shape) for at, image in images.items()]
        whole = np.full(np.max(corners, axis=0) - origin, np.nan)
        for at, image in images.items():
            row, column = np.subtract(at, origin)
            whole[row : row + image.shape[0], column : column + image.shape[1]] = image
        return {
            "image": whole,
            "origin": origin.astype(np.int64),
            "scattering_1d": _mean(counts.sum(axis=0), pixel_frames.sum(axis=0)),
            "scattering_1d_segments": _mean(counts, pixel_frames)[:n_segment],
            "segment_start": np.arange(n_segment) * self._counts.length,
        }

    def _alive_per_bin(self) -> NDArray[np.int64]:
        return np.bincount(self._bins[self._alive > 0], minlength=self._roimap.n_static + 1)[1:]

    def _image(self) -> NDArray[np.float64]:
        n = np.where(self._alive > 0, self._received, 0)
        return _mean(self._totals, n).reshape(self._start.shape)

    def merge(self, other: Self) -> None:
        """Add another region of the same frames; see `stream.protocols.Operator`."""
        if self._roimap.digest != other._roimap.digest:
            raise ValueError("scattering: regions of different roi maps cannot be merged")
        self.n_frames = max(self.n_frames, other.n_frames)
        self._merged |= {other._start.origin: other._image(), **other._merged}
        self._counts.add(other._counts, self.n_frames)
        self._pixel_frames.add(other._pixel_frames, self.n_frames)

    def snapshot(self) -> Arrays:
        """Return the state; see `stream.protocols.Operator`."""
        return {
            **identity(self._start, self._roimap),
            "n_frames": np.array([self.n_frames, self._received, self._counts.length]),
            "alive": self._alive.copy(),
            "totals": self._totals.copy(),
            "counts": self._counts.sums.copy(),
            "pixel_frames": self._pixel_frames.sums.copy(),
        }

    def miss(self, n_frames: int) -> None:
        """Go on to n_frames without those not pushed; see `stream.protocols.Operator`."""
        for segments in (self._counts, self._pixel_frames):
            segments.reach(n_frames)
        self.n_frames = n_frames

    def partial(self) -> Arrays:
        """Return the state, which is hardly more than the mean image; see `stream.protocols.Operator`."""
        return self.snapshot()

    def restore(self, state: Arrays) -> None:
        """Take over a state; see `stream.protocols.Operator`."""
        check_identity(self.name, state, identity(self._start, self._roimap))
        self.n_frames, self._received, length = (int(n) for n in state["n_frames"])
        self._alive = state["alive"].copy()
        self._n_alive = self._alive_per_bin()
        self._totals = state["totals"].copy()
        self._merged = {}
        self._counts.length = self._pixel_frames.length = length
        self._counts.sums = state["counts"].copy()
        self._pixel_frames.sums = state["pixel_frames"].copy()


def _mean(sums: NDArray[np.int64], n: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(n > 0, sums / np.maximum(n, 1), np.nan)
