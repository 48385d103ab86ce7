"""Incremental multi-tau correlation: g2(q, tau) from frames as they come, with lost frames left out.

Over the pairs (i, i+k) of coarse frames of a level that both exist, with c the counts of a pixel and w the number of
frames that came in each coarse frame, pooled over the pixels of a static bin:

    G2 = sum c(i) c(i+k) / N     IP = sum c(i) w(i+k) / N     IF = sum w(i) c(i+k) / N     N = sum w(i) w(i+k)

g2 of a static bin is G2 / (IP IF), g2 of a dynamic bin the mean over its static bins. With nothing lost this is the
symmetric normalisation of boost_corr and xpcs-eigen. All four sums are exact integers (see `kernels.wide`).

A pixel that reads more than the saturation value leaves for the rest of the run: pairs that were complete before stay,
none is formed afterwards.
"""

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.messages import Arrays, FrameBatch, RunStart
from stream.operators.kernels import multitau as kernel
from stream.operators.kernels import wide
from stream.operators.roimap import RoiMap
from stream.operators.state import check_identity, identity, static_bins
from stream.operators.tiles import Threads, Tiles, flat

Error = Literal["static", "pixel"]

PIXEL_BLOCK = 16
"""Frames pushed together with an accumulator per pixel: the counts per bin and frame then are whole frames of int64."""


class MultiTau:
    """Multi-tau correlation of one region.

    Parameters
    ----------
    start
        The run: region, shape, dtype, saturation value.
    roimap
        Map of the whole detector; the region is cut out here.
    delays_per_level
        d: level 0 has the delays 1..2d, level l >= 1 has (d+1..2d) * 2**l frames.
    levels
        Levels at most; the longest delay is 2 d * 2**(levels-1) frames. Memory is taken as the run grows.
    error
        What g2_err is: "static" = spread of g2 over the static bins of a dynamic bin over the square root of their
        number (NaN with fewer than two); "pixel" = the same over its pixels, as the APS does, at the cost of
        accumulators per pixel: 64 bytes per pixel and delay.
    threads
        Kernel threads; None = all cores this process may use. The result does not depend on it.

    Raises
    ------
    RoiMapError
        The map was made for another detector.
    ValueError
        An option is out of range.
    ConfigError
        By `push`: a bin of one frame holds 2**62 / 2**(levels-1) counts or more (1.4e14 with 16 levels), which cannot
        be summed exactly: mask the pixels, or take fewer levels.
    """

    name = "multitau"

    def __init__(
        self,
        start: RunStart,
        roimap: RoiMap,
        *,
        delays_per_level: int = 4,
        levels: int = 16,
        error: Error = "static",
        threads: int | None = None,
    ) -> None:
        if not 1 <= delays_per_level <= 32:
            raise ValueError(f"delays_per_level: {delays_per_level} is not in 1..32")
        if not 1 <= levels <= 28:
            raise ValueError(f"levels: {levels} is not in 1..28")
        itemsize = np.dtype(start.dtype).itemsize
        self.n_frames = 0
        self._start = start
        self._roimap = roimap
        self._d = delays_per_level
        self._levels = levels
        self._error = error
        self._threads = Threads(threads)
        self._merged = False

        self._tiles = Tiles.of(static_bins(start, roimap))
        self._live = self._tiles.live.copy()
        n_column = self._live.size
        self._static_of_bin = np.arange(roimap.n_static)
        self._parts = self._threads.n
        self._block = kernel.BLOCK
        self._bins = self._tiles.bins
        if error == "pixel":
            # Each pixel is its own bin, and threads never share one.
            self._static_of_bin = self._tiles.bins.ravel()
            self._pixel_of_bin = self._pixels(roimap.shape[1])
            self._parts = 1
            self._block = PIXEL_BLOCK
            self._bins = np.arange(n_column).reshape(self._tiles.bins.shape)
        n_bin = len(self._static_of_bin)
        self._alive = np.bincount(self._bins[self._live > 0], minlength=n_bin)

        # A coarse pixel holds 2**(levels-1) frames of counts up to the dtype's maximum.
        counts = np.int32 if 8 * itemsize + levels - 1 <= 31 else np.int64
        self._history = np.zeros((0, 2 * self._d, n_column), counts)
        self._bin_history = np.zeros((0, 2 * self._d, n_bin), np.int64)
        self._weights = np.zeros((0, 2 * self._d), np.int64)
        self._G2 = np.zeros((self._parts, 2, 0, n_bin), np.int64)
        self._IP, self._IF, self._N = (np.zeros((2, 0, n_bin), np.int64) for _ in range(3))
        self._pairs = np.zeros(0, np.int64)
        self._pairs_settled = np.zeros(0, np.int64)

    def _pixels(self, columns: int) -> NDArray[np.int64]:
        """Return the flat index on the whole detector of the pixel of each column, -1 where it is not in the map."""
        local = (self._tiles.first[:, None] + np.arange(kernel.TILE)).ravel()
        row, column = np.divmod(local, self._start.shape[1])
        pixel = (row + self._start.origin[0]) * columns + column + self._start.origin[1]
        return np.where(self._live.ravel() > 0, pixel, -1)

    def push(self, batch: FrameBatch) -> None:
        """Fold in frames; see `stream.protocols.Operator`."""
        if self._merged:
            raise ValueError("multitau: a merged operator takes no frames")
        if batch.first < self.n_frames:
            raise ValueError(f"multitau: frame {batch.first} came after {self.n_frames} were pushed")
        frames = flat(batch.frames)
        self._miss(batch.first)
        done = 0
        while done < len(frames):
            clean = self._first_saturated(frames[done:])
            for begin in range(done, done + clean, self._block):
                block = frames[begin : min(begin + self._block, done + clean)]
                self._advance(block, len(block))
            done += clean
            if done < len(frames):
                self._retire(frames[done])

    def _miss(self, n_frames: int) -> None:
        """Go on to n_frames without the frames before."""
        if n_frames > self.n_frames:
            nothing = np.empty((0, *self._start.shape), self._start.dtype)
            self._advance(flat(nothing), n_frames - self.n_frames)

    def _first_saturated(self, frames: NDArray[np.unsignedinteger]) -> int:
        limit = self._start.saturation_value
        if limit is None or limit >= np.iinfo(frames.dtype).max:
            return len(frames)
        tiles, live = self._tiles.first, self._live
        firsts = self._threads.run(
            lambda _, begin, end: int(kernel.first_above(frames, limit, tiles, live, begin, end)), len(tiles)
        )
        return min((first for first in firsts if first is not None), default=len(frames))

    def _advance(self, frames: NDArray[np.unsignedinteger], count: int) -> None:
        """Fold in a block of frames, or with none a gap of `count`."""
        self._grow((self.n_frames + count).bit_length())
        shift = np.arange(len(self._history))
        n_old = np.int64(self.n_frames) >> shift
        n_new = (np.int64(self.n_frames + count) >> shift) - n_old
        sums = np.zeros((self._parts, len(frames), len(self._alive)), np.int64)

        def correlate(part: int, begin: int, end: int) -> None:
            part %= self._parts
            kernel.correlate(
                frames, n_new, n_old, self._d, self._tiles.first, self._live, self._bins,
                self._history, self._G2[part], sums[part], begin, end,
            )  # fmt: skip

        self._threads.run(correlate, len(self._tiles.first))
        counts = sums.sum(axis=0) if self._parts > 1 else sums[0]
        if counts.max(initial=0) >> (wide.BITS - self._levels + 1):
            raise ConfigError(
                f"multitau: {counts.max()} counts in one bin and frame are too many for {self._levels} levels"
            )
        weights = kernel.weigh(len(frames), n_new, n_old, self._d, self._weights, self._pairs)

        def normalise(_: int, begin: int, end: int) -> None:
            kernel.normalise(
                counts, weights, n_new, n_old, self._d, self._bin_history, self._IP, self._IF, begin, end
            )  # fmt: skip

        self._threads.run(normalise, len(self._alive))
        self.n_frames += count

    def _grow(self, n_level: int) -> None:
        """Take memory for the levels on which a coarse frame is about to be complete."""
        n_level = min(n_level, self._levels)
        if n_level <= len(self._history):
            return
        n_delay = (n_level + 1) * self._d

        def grown(array: NDArray[np.int64], axis: int, size: int) -> NDArray[np.int64]:
            missing = list(array.shape)
            missing[axis] = size - array.shape[axis]
            return np.concatenate([array, np.zeros(missing, array.dtype)], axis)

        self._history = grown(self._history, 0, n_level)
        self._bin_history = grown(self._bin_history, 0, n_level)
        self._weights = grown(self._weights, 0, n_level)
        self._G2 = grown(self._G2, 2, n_delay)
        self._IP, self._IF, self._N = (grown(sums, 1, n_delay) for sums in (self._IP, self._IF, self._N))
        self._pairs, self._pairs_settled = (grown(pairs, 0, n_delay) for pairs in (self._pairs, self._pairs_settled))

    def _retire(self, frame: NDArray[np.unsignedinteger]) -> None:
        """Let go of the pixels that are saturated in the next frame (n_pixel,), with their part in unfinished pairs."""
        self._settle()
        padded = np.zeros(self._tiles.first.max() + kernel.TILE, frame.dtype)
        padded[: min(frame.size, padded.size)] = frame[: padded.size]
        values = padded[self._tiles.first[:, None] + np.arange(kernel.TILE)]
        leaving = (values > self._start.saturation_value) & (self._live > 0)
        self._live[leaving] = 0
        columns, bins = np.flatnonzero(leaving), self._bins[leaving]
        np.subtract.at(self._alive, bins, 1)
        for column, b in zip(columns, bins, strict=True):
            self._bin_history[:, :, b] -= self._history[:, :, column]
        self._history[:, :, columns] = 0

    def _settle(self) -> None:
        """Bring N up to date with the pairs formed since the number of live pixels changed last."""
        self._N = self._pixel_pairs()
        self._pairs_settled = self._pairs.copy()

    def _pixel_pairs(self) -> wide.Wide:
        fresh = np.zeros_like(self._N)
        kernel.outer(self._pairs - self._pairs_settled, self._alive, fresh)
        return wide.total(np.stack([self._N, fresh], axis=1), 1)

    def result(self) -> Arrays:
        """Return the correlation so far.

        Returns
        -------
        delay : (n_delay,) int64
            Frames; only those that a pair of frames sent so far can have.
        tau : (n_delay,) float64
            s.
        g2, g2_err : (n_delay, n_dynamic) float64
            NaN where unknown: no pair, no light, or (g2_err) fewer than two members.
        n_pairs : (n_delay,) float64
            Pairs of coarse frames, each counted with the share of its frames that came.
        G2, IP, IF : (n_delay, n_static) float64
            Means over pixels and pairs, counts**2 and counts, per frame.
        """
        level, delay = _delays(self.n_frames, self._d, self._levels)
        n_delay = len(delay)
        roimap = self._roimap
        sums = [each[:, :n_delay] for each in self._sums()]
        pooled = sums
        if self._error == "pixel":
            pooled = [_pool(each, self._static_of_bin, roimap.n_static) for each in sums]
        G2, IP, IF, N = (wide.to_float(each) for each in pooled)
        g2_static = _ratio(G2 * N, IP * IF)
        g2, g2_err = _mean_and_error(g2_static, roimap.dynamic_of_static, roimap.n_dynamic)
        if self._error == "pixel":
            # In the order of pixels on the detector, so that merged regions round like the whole.
            order = np.argsort(self._pixel_of_bin)[np.count_nonzero(self._pixel_of_bin < 0) :]
            G2_pixel, IP_pixel, IF_pixel, N_pixel = (wide.to_float(each[:, :, order]) for each in sums)
            g2_pixel = _ratio(G2_pixel * N_pixel, IP_pixel * IF_pixel)
            group = roimap.dynamic_of_static[self._static_of_bin[order]]
            _, g2_err = _mean_and_error(g2_pixel, group, roimap.n_dynamic)
        return {
            "delay": delay,
            "tau": delay * self._start.frame_time,
            "g2": g2,
            "g2_err": g2_err,
            "n_pairs": np.ldexp(self._pairs[:n_delay].astype(np.float64), -2 * level),
            "G2": _ratio(G2, N),
            "IP": _ratio(IP, N),
            "IF": _ratio(IF, N),
        }

    def merge(self, other: Self) -> None:
        """Add another region of the same frames; see `stream.protocols.Operator`."""
        mine_is, theirs_is = ((each._d, each._levels, each._error, each._roimap.digest) for each in (self, other))
        if mine_is != theirs_is:
            raise ValueError(f"multitau: regions correlated as {theirs_is} and as {mine_is} cannot be merged")
        n_frames = max(self.n_frames, other.n_frames)
        for each in (self, other):
            each._miss(n_frames)
        mine, theirs = self._sums(), other._sums()
        if self._error == "pixel":
            self._static_of_bin = np.concatenate([self._static_of_bin, other._static_of_bin])
            self._pixel_of_bin = np.concatenate([self._pixel_of_bin, other._pixel_of_bin])
            both = [np.concatenate(pair, axis=2) for pair in zip(mine, theirs, strict=True)]
        else:
            both = [wide.total(np.stack(pair, axis=1), 1) for pair in zip(mine, theirs, strict=True)]
        self._G2, (self._IP, self._IF, self._N) = both[0][None], both[1:]
        # Regions may have lost different frames: what is said of the pairs is true of the poorer one.
        self._pairs = np.minimum(self._pairs, other._pairs)
        self._pairs_settled = self._pairs.copy()
        self._alive = np.zeros(len(self._static_of_bin), np.int64)
        self._merged = True

    def _sums(self) -> list[wide.Wide]:
        return [wide.total(self._G2.swapaxes(0, 1), 1), self._IP, self._IF, self._pixel_pairs()]

    def snapshot(self) -> Arrays:
        """Return the state; see `stream.protocols.Operator`."""
        return {
            **self._identity(),
            "n_frames": np.array(self.n_frames),
            "live": self._live.copy(),
            "history": self._history.copy(),
            "bin_history": self._bin_history.copy(),
            "weights": self._weights.copy(),
            "pairs": self._pairs.copy(),
            **{name: sums.copy() for name, sums in zip(("G2", "IP", "IF", "N"), self._sums(), strict=True)},
        }

    def restore(self, state: Arrays) -> None:
        """Take over a state; see `stream.protocols.Operator`."""
        check_identity(self.name, state, self._identity())
        self.n_frames = int(state["n_frames"])
        self._live = state["live"].copy()
        self._alive = np.bincount(self._bins[self._live > 0], minlength=len(self._static_of_bin))
        self._history = state["history"].copy()
        self._bin_history = state["bin_history"].copy()
        self._weights = state["weights"].copy()
        self._pairs = state["pairs"].copy()
        self._pairs_settled = self._pairs.copy()
        self._G2 = np.zeros((self._parts, *state["G2"].shape), np.int64)
        self._G2[0] = state["G2"]
        self._IP, self._IF, self._N = (state[name].copy() for name in ("IP", "IF", "N"))

    def _identity(self) -> Arrays:
        return identity(self._start, self._roimap, self._d, self._levels, self._error == "pixel")


def _delays(n_frames: int, d: int, levels: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return level and delay (frames) of every delay that a pair of n_frames can have, in order."""
    level = np.repeat(np.arange(levels), d)
    k = np.tile(np.arange(d + 1, 2 * d + 1), levels)
    level, k = np.concatenate([np.zeros(d, np.int64), level]), np.concatenate([np.arange(1, d + 1), k])
    known = k < n_frames >> level
    return level[known], (k << level)[known]


def _pool(sums: wide.Wide, static_of_bin: NDArray[np.int64], n_static: int) -> wide.Wide:
    pooled = np.zeros((2, sums.shape[1], n_static), np.int64)
    kernel.pool(sums, static_of_bin, pooled)
    return pooled


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    known = denominator > 0
    return np.where(known, numerator / np.where(known, denominator, 1), np.nan)


def _mean_and_error(
    values: NDArray[np.float64], group: NDArray[np.int64], n_group: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over the finite members of each group 1..n_group and its standard error, (n_delay, n_group)."""
    mean = np.full((len(values), n_group), np.nan)
    error = np.full((len(values), n_group), np.nan)
    for g in range(n_group):
        members = values[:, group == g + 1]
        finite = np.isfinite(members)
        n = finite.sum(axis=1)
        mean[:, g] = _ratio(np.where(finite, members, 0).sum(axis=1), n.astype(np.float64))
        squares = np.where(finite, members - mean[:, g, None], 0) ** 2
        error[:, g] = np.sqrt(_ratio(squares.sum(axis=1), n * (n - 1.0)))
    return mean, error
