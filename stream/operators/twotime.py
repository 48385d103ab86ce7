"""Two-time correlation c2(q, t1, t2): how the dynamics of a sample age, live, in bounded memory.

As in Fluerasu et al., Phys. Rev. E 76, 010401 (2007), eq. 1, and NXxpcs, the average being over the pixels p of a bin:

    c2(t1, t2) = <I_p(t1) I_p(t2)> / (<I_p(t1)> <I_p(t2)>)

A *level* l has times of 2**l frames each, aligned at frame 0: I_p is the sum over the frames of such a time. The newest
N times of every level are kept and correlated with each other, so ages reach up to (N - 1) 2**l frames. Level 0 is the
newest N frames one by one; the first level of which N times reach back to frame 0 shows the whole run, and is the last
that there is. So the state grows with N times the number of levels, never with the length of the run.

*Lost frames are data.* With c the counts and w the frames that came in a time, c2 = G2 N / (IP IF), sums over pixels:

    G2 = sum c(t1) c(t2)     IP = sum c(t1) w(t2)     IF = sum w(t1) c(t2)     N = sum w(t1) w(t2)

as in `stream.operators.multitau`, of one pair each. A time of which no frame came has no pair: c2 is NaN there. Of one
of which some came it is that of their mean. With nothing lost this is the formula above. All sums are exact integers.

*Normalisation* is symmetric, each time by its own mean: c2(t1, t2) = c2(t2, t1). There are two, by what the mean is of:

"dynamic", if nothing is said: all pixels of the dynamic bin, c2 = G2 N / (IP IF) with the sums over all of them
(NXxpcs; pyCHX without `norm`; boost_corr with smooth = "dqmap").

"static", per bin: each static bin s in the dynamic bin, the sums over its pixels (boost_corr's default, smooth =
"sqmap"). Of the dynamic bin it is their mean, weighted with N, which is with their pixels where all lost the same
frames:

    c2 = sum N_s c2_s / sum N_s     c2_s = G2_s N_s / (IP_s IF_s)

That takes out intensity that varies within a dynamic bin, but needs photons in every static bin and frame: where there
are none, that bin is left out of both sums of that pair.

It is chosen by ``operators: {twotime: {normalisation: static}}``, or ``--two-time-normalisation static``. What pyCHX
calls `norm`, division of each pixel by its mean over the run, is not offered: the mean is not known before the end.

The diagonal, t1 = t2, holds the shot noise of the counts, as in boost_corr and pyCHX; it is no correlation.

A pixel that reads more than the saturation value leaves, also from what is kept: c2 is that of the pixels left.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from stream.errors import CheckpointError, ConfigError
from stream.messages import Arrays, Events, FrameBatch, RunStart
from stream.operators.kernels import twotime as kernel
from stream.operators.kernels.totals import limit
from stream.operators.roimap import RoiMap
from stream.operators.state import check_identity, identity, static_bins
from stream.operators.tiles import Threads, flat
from stream.operators.window import PairSums, Window, kind_of_counts

Normalisation = Literal["dynamic", "static"]

SEGMENTS = 5
"""Equal parts of the run whose g2 is told; as many as boost_corr has."""

MOST_COUNTS = 2**24 - 1
"""A pixel that reads more in one frame is no count, whatever the saturation value: none can be as bright."""

BLOCK_BYTES = 2**24
"""Of frames that are taken at once: memory that malloc has at hand, and need not ask the kernel for."""


HEAD_BYTES = 4096
"""More than what a partial sum says of the run, the map and the parameters."""


def partial_bytes(frames: int, levels: int, n_rows: int) -> int:
    """Return how many bytes `TwoTime.partial` takes at most, of n_rows bins that are normalised for themselves."""
    each = n_rows * (frames * (frames + 1) // 2 + frames) + frames
    return 8 * (levels * each + n_rows) + HEAD_BYTES


class TwoTime:
    """Two-time correlation of one region.

    Memory is n_times * n_pixel * 4 bytes a level (8 where counts may exceed 2**24), and n_times**2 * n_bin * 8.

    Parameters
    ----------
    start, roimap
        The run, and the map of the whole detector.
    frames
        N: times that are kept of every level, at least 2.
    levels
        Levels at most; the longest time that is looked back is N * 2**(levels - 1) frames.
    bins
        Dynamic bins to correlate, from 1; None = all.
    normalisation
        By the mean of the "dynamic" bin, or of each "static" bin in it.
    memory_gib
        GiB that this may take.
    threads
        That pick pixels from frames; None = all cores this process may use. Products are BLAS's, which has its own
        (OPENBLAS_NUM_THREADS). The result does not depend on them.

    Raises
    ------
    RoiMapError
        The map was made for another detector.
    ValueError
        An option is out of range.
    ConfigError
        It would take more memory; there is no such bin; sums could become too large. By `result` and `partial`: pixels
        are too bright to be counted exactly, which takes 2**30 counts of one at a time.
    """

    name = "twotime"

    def __init__(
        self,
        start: RunStart,
        roimap: RoiMap,
        *,
        frames: int = 256,
        levels: int = 8,
        bins: Sequence[int] | None = None,
        normalisation: Normalisation = "dynamic",
        memory_gib: float = 4.0,
        threads: int | None = None,
    ) -> None:
        if frames < 2:
            raise ValueError(f"frames: {frames} is fewer than 2")
        if not 1 <= levels <= 16:
            raise ValueError(f"levels: {levels} is not in 1..16")
        self.n_frames = 0
        self._start = start
        self._roimap = roimap
        self._threads = Threads(threads)
        self._limit = min(limit(start.dtype, start.saturation_value), MOST_COUNTS)
        self._bins = np.arange(1, roimap.n_dynamic + 1) if bins is None else np.array(sorted(set(bins)), np.int64)
        if wrong := [each for each in self._bins.tolist() if not 1 <= each <= roimap.n_dynamic]:
            raise ConfigError(f"twotime: bins: there is no dynamic bin {wrong[0]}, the map has {roimap.n_dynamic}")

        # What is normalised for itself is a row of sums: `_group` is the dynamic bin it belongs to.
        chosen = np.isin(roimap.dynamic_of_static, self._bins)
        if normalisation == "static":
            self._group = roimap.dynamic_of_static[chosen]
            row_of_static = np.where(chosen, np.cumsum(chosen) - 1, -1)
        else:
            self._group = self._bins
            row_of_static = np.where(chosen, np.searchsorted(self._bins, roimap.dynamic_of_static), -1)
        row_of_static = np.concatenate([[-1], row_of_static])
        row = row_of_static[static_bins(start, roimap)].ravel()
        inside = np.flatnonzero(row >= 0)
        self._pixels = inside[np.argsort(row[inside], kind="stable")]
        self._column_of = np.full(row.size, -1, np.int64)
        self._column_of[self._pixels] = np.arange(len(self._pixels))
        self._row_of_column = row[self._pixels]
        self._edges = np.searchsorted(self._row_of_column, np.arange(len(self._group) + 1))
        self._alive = np.ones(len(self._pixels), np.uint8)
        self._block = max(1, BLOCK_BYTES // (4 * len(self._pixels) + 1))
        self._parameters = frames, levels, int(normalisation == "static"), *self._bins.tolist()

        on_detector = row_of_static[roimap.static_roi_map]
        self._check_sums(int(np.bincount(on_detector[on_detector >= 0], minlength=1).max()), levels)
        self._check_memory(frames, levels, memory_gib)
        window: Window | None = None
        windows: list[Window] = []
        for level in reversed(range(levels)):
            window = Window(frames, self._edges, self._limit << level, window)
            windows.append(window)
        self._windows = windows[::-1]
        self._merged: list[PairSums] | None = None

    def _check_sums(self, widest: int, levels: int) -> None:
        """Refuse what may not be an exact integer: sums of counts in float64, and of their products with weights."""
        bound = widest * self._limit << levels - 1
        if bound >= kernel.DOUBLE or bound << levels - 1 >= 2**63:
            raise ConfigError(
                f"twotime: {levels} levels are too many for {widest} pixels in a bin with up to {self._limit} counts"
            )

    def _check_memory(self, frames: int, levels: int, memory_gib: float) -> None:
        itemsizes = [np.dtype(kind_of_counts(self._limit << level)).itemsize for level in range(levels)]
        of_pixels = frames * len(self._pixels) * sum(itemsizes) / 2**30
        of_products = frames**2 * len(self._group) * 8 * levels / 2**30
        if of_pixels + of_products > memory_gib:
            raise ConfigError(
                f"twotime: {frames} frames of {len(self._pixels)} pixels at {levels} levels take {of_pixels:.3g} GiB, "
                f"products of {len(self._group)} bins {of_products:.3g} GiB, more than memory_gib: {memory_gib:g}; "
                "take fewer frames, levels or bins"
            )

    def push(self, batch: FrameBatch) -> None:
        """Keep frames; see `stream.protocols.Operator`."""
        if self._merged is not None:
            raise ValueError("twotime: a merged operator takes no frames")
        if batch.first < self.n_frames:
            raise ValueError(f"twotime: frame {batch.first} came after {self.n_frames} were pushed")
        if batch.frames.shape[1:] != self._start.shape or batch.frames.dtype != self._start.dtype:
            # The kernels read where the run says that there are pixels.
            raise ValueError(f"twotime: frames {batch.frames.shape} {batch.frames.dtype} are not those of the run")
        self.miss(batch.first)
        frames = batch.unpacked
        for begin in range(0, len(frames), self._block):
            counts = self._gathered(frames[begin : begin + self._block])
            self._windows[0].take(counts, np.ones(len(counts), np.int64))
        self.n_frames += len(frames)

    def _gathered(self, frames: Events | NDArray[np.unsignedinteger[Any]]) -> NDArray[Any]:
        """Return the pixels of frames (n, n_column); those that leave are forgotten everywhere."""
        is_sparse = isinstance(frames, Events)
        counts = (np.zeros if is_sparse else np.empty)((len(frames), len(self._pixels)), np.float32)
        before = self._alive.copy()

        # Threads share `alive`: it only ever goes to 0, and the columns that do are set to 0 below.
        def gather(_: int, begin: int, end: int) -> None:
            part, state = frames[begin:end], (self._limit, self._alive, counts[begin:end])
            if isinstance(part, Events):
                kernel.gather_events(part.offsets, part.pixels, part.counts, self._column_of, *state)
            else:
                kernel.gather(flat(part), self._pixels, *state)

        self._threads.run(gather, len(frames))
        left = np.flatnonzero(before != self._alive)
        if len(left):
            counts[:, left] = 0
            for window in self._windows:
                window.drop(left)
        return counts

    def miss(self, n_frames: int) -> None:
        """Go on to n_frames without those not pushed; see `stream.protocols.Operator`."""
        if self._merged is not None and n_frames != self.n_frames:
            raise ValueError(f"twotime: what is merged ends before {n_frames}: merge the longest region first")
        if n_frames != self.n_frames:
            self._windows[0].miss(n_frames - self.n_frames)
            self.n_frames = n_frames

    def _n_levels(self) -> int:
        """Return how many levels there are: up to the first that reaches back to frame 0."""
        if self.n_frames == 0:
            return 0
        frames, levels, *_ = self._parameters
        return next((level + 1 for level in range(levels) if self.n_frames >> level <= frames), levels)

    def _left(self) -> NDArray[np.int64]:
        """Return how many pixels each bin has left."""
        return np.bincount(self._row_of_column[self._alive > 0], minlength=len(self._group))

    def _pair_sums(self) -> list[PairSums]:
        if self._merged is not None:
            return self._merged
        return [window.pair_sums(self._left()) for window in self._windows[: self._n_levels()]]

    def result(self) -> Arrays:
        """Return the correlation so far.

        The times of a level stand in the order of time, from index 0; there are n_times[level] of them, and behind them
        NaN or 0. All levels but the last are full.

        Returns
        -------
        bins : (n_bin,) int64
            The dynamic bins, from 1.
        avg_frame : (n_level,) int64
            Frames of a time of each level: 1, 2, 4, ...
        first : (n_level,) int64
            First frame of each level that is kept.
        n_times : (n_level,) int64
        n_came : (n_level, n_time) int64
            Frames that came in each time.
        c2 : (n_level, n_bin, n_time, n_time) float64
            Symmetric; NaN where unknown: no frame came, or no light. It is 1 where nothing is correlated.
        delay : (n_delay,) int64
            Frames between two times of the last level, from 0.
        tau : (n_delay,) float64
            s.
        g2 : (n_delay, n_bin) float64
            Mean of the last level along its diagonals.
        g2_segments : (n_delay // SEGMENTS, SEGMENTS, n_bin) float64
            The same of equal parts of its times, without a rest: how stable the sample is.
        """
        pairs = self._pair_sums()
        n_time = max((len(each.weights) for each in pairs), default=0)
        c2 = np.full((len(pairs), len(self._bins), n_time, n_time), np.nan)
        n_came = np.zeros((len(pairs), n_time), np.int64)
        for level, each in enumerate(pairs):
            n = len(each.weights)
            c2[level, :, :n, :n] = self._c2(each)
            n_came[level, :n] = each.weights
        n_times = np.array([len(each.weights) for each in pairs], np.int64)
        avg_frame = 1 << np.arange(len(pairs))
        last = c2[-1, :, : n_times[-1], : n_times[-1]] if pairs else np.zeros((len(self._bins), 0, 0))
        delay = np.arange(last.shape[1]) * (avg_frame[-1] if pairs else 1)
        return {
            "bins": self._bins.copy(),
            "avg_frame": avg_frame,
            "first": np.array([each.first for each in pairs], np.int64) * avg_frame,
            "n_times": n_times,
            "n_came": n_came,
            "c2": c2,
            "delay": delay,
            "tau": delay * self._start.frame_time,
            "g2": _along_diagonals(last),
            "g2_segments": _segments(last),
        }

    def _c2(self, pairs: PairSums) -> NDArray[np.float64]:
        """Return c2 (n_bin, n, n) of one level."""
        N, IP = pairs.N.astype(np.float64), pairs.IP.astype(np.float64)
        norm = IP * IP.swapaxes(1, 2)
        known = norm > 0
        c2 = np.where(known, pairs.G2 * N / np.where(known, norm, 1), np.nan)
        if not self._parameters[2]:
            return c2
        N[~known] = 0
        c2[~known] = 0
        mean = np.full((len(self._bins), *c2.shape[1:]), np.nan)
        for b, group in enumerate(self._bins):
            members = self._group == group
            n = N[members].sum(axis=0)
            np.divide((c2[members] * N[members]).sum(axis=0), n, out=mean[b], where=n > 0)
        return mean

    def merge(self, other: Self) -> None:
        """Add another region of the same frames; see `stream.protocols.Operator`.

        Sums that the other was given by `restore` are let go: they are large, and a merger has many regions.
        """
        mine_is, theirs_is = ((each._parameters, each._roimap.digest) for each in (self, other))
        if mine_is != theirs_is:
            raise ValueError(f"twotime: regions correlated as {theirs_is} and as {mine_is} cannot be merged")
        n_frames = max(self.n_frames, other.n_frames)
        for each in (self, other):
            each.miss(n_frames)
        self._merged = [mine + theirs for mine, theirs in zip(self._pair_sums(), other._pair_sums(), strict=True)]
        if other._merged is not None:
            other._merged = []

    def snapshot(self) -> Arrays:
        """Return the state: the frames that are kept; see `stream.protocols.Operator`."""
        if self._merged is not None:
            raise ValueError("twotime: a merged operator has no frames")
        state = dict(self._head())
        for level, window in enumerate(self._windows):
            state[f"counts_{level}"], state[f"weights_{level}"] = window.saved()
        return state | {"alive": self._alive.copy()}

    def partial(self) -> Arrays:
        """Return the sums alone; see `stream.protocols.Operator`."""
        if self._merged is not None:
            raise ValueError("twotime: a merged operator has no partial sums")
        state = dict(self._head())
        for level, window in enumerate(self._windows[: self._n_levels()]):
            G2, sums = window.sums()
            half = G2[:, *np.triu_indices(G2.shape[1])]
            half = half.astype(np.min_scalar_type(int(half.max(initial=0))))  # it travels, often
            state |= {f"G2_{level}": half, f"sums_{level}": sums, f"weights_{level}": window.weights()}
        return state | {"pixels": self._left()}

    def _head(self) -> Arrays:
        return {**identity(self._start, self._roimap, *self._parameters), "n_frames": np.array(self.n_frames)}

    def restore(self, state: Arrays) -> None:
        """Take over a state; see `stream.protocols.Operator`."""
        check_identity(self.name, state, identity(self._start, self._roimap, *self._parameters))
        self.n_frames = int(state["n_frames"])
        if "alive" in state:
            if state["alive"].shape != self._alive.shape:
                raise CheckpointError(f"twotime: {state['alive'].shape} pixels of {len(self._alive)}")
            self._merged = None
            self._alive = state["alive"].copy()
            for level, window in enumerate(self._windows):
                window.restore(self.n_frames >> level, state[f"counts_{level}"], state[f"weights_{level}"])
            return
        self._check_shapes(state)
        self._merged = []
        for level in range(self._n_levels()):
            weights = state[f"weights_{level}"]
            first = (self.n_frames >> level) - len(weights)
            G2 = _symmetric(state[f"G2_{level}"], len(weights))
            self._merged.append(PairSums.of(first, weights, G2, state[f"sums_{level}"], state["pixels"]))

    def _check_shapes(self, state: Arrays) -> None:
        """Refuse sums of other shapes than this region has, before there is room made for them."""
        shapes: dict[str, tuple[int, ...]] = {"pixels": (len(self._group),)}
        for level in range(self._n_levels()):
            n = min(self._parameters[0], self.n_frames >> level)
            shapes[f"G2_{level}"] = len(self._group), n * (n + 1) // 2
            shapes |= {f"sums_{level}": (len(self._group), n), f"weights_{level}": (n,)}
        for name, shape in shapes.items():
            if name not in state or state[name].shape != shape or state[name].dtype.kind not in "iu":
                raise CheckpointError(f"twotime: {name} is not the sums {shape} of {self.n_frames} frames")


def _symmetric(upper: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return the matrices (..., n, n) whose upper halves are given."""
    whole = np.zeros((len(upper), n, n), np.int64)
    row, column = np.triu_indices(n)
    whole[:, row, column] = whole[:, column, row] = upper
    return whole


def _along_diagonals(c2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of what is known on each diagonal of (n_bin, n, n) from the main one on, (n, n_bin)."""
    n_bin, n, _ = c2.shape
    means = np.full((n, n_bin), np.nan)
    for k in range(n):
        values = np.diagonal(c2, k, 1, 2)
        known = np.isfinite(values)
        count = known.sum(axis=1)
        np.divide(np.where(known, values, 0).sum(axis=1), count, out=means[k], where=count > 0)
    return means


def _segments(c2: NDArray[np.float64]) -> NDArray[np.float64]:
    length = c2.shape[1] // SEGMENTS
    parts = [slice(i * length, (i + 1) * length) for i in range(SEGMENTS)]
    return np.stack([_along_diagonals(c2[:, part, part]) for part in parts], axis=1)
