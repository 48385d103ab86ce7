"""Incremental multi-tau correlation: g2(q, tau) from frames as they come, with lost frames left out.

Over the pairs (i, i+k) of coarse frames of a level that both exist, with c the counts of a pixel and w the number of
frames that came in each coarse frame, pooled over the pixels of a static bin:

    G2 = sum c(i) c(i+k) / N     IP = sum c(i) w(i+k) / N     IF = sum w(i) c(i+k) / N     N = sum w(i) w(i+k)

g2 of a static bin is G2 / (IP IF), g2 of a dynamic bin the mean over its static bins. With nothing lost this is the
symmetric normalisation of boost_corr and xpcs-eigen. All four sums are exact integers (see `kernels.wide`).

A pixel that reads more than the saturation value leaves for the rest of the run: pairs that were complete before stay,
none is formed afterwards.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.messages import Arrays, Events, FrameBatch, RunStart
from stream.operators.g2 import delays, mean_and_error, ratio
from stream.operators.history import COUNT_BITS, empty_planes, restore_planes, saved_planes
from stream.operators.kernels import multitau as kernel
from stream.operators.kernels import wide
from stream.operators.kernels.layout import BLOCK, CHUNK, LANES, TILE, Block, History, Sums, aligned, slots
from stream.operators.kernels.space import State, work_space
from stream.operators.roimap import RoiMap
from stream.operators.stability import Stability, Totals, affordable
from stream.operators.state import Copying, check_identity, identity, static_bins
from stream.operators.tiles import Threads, Tiles

Error = Literal["static", "pixel"]

LAYOUT = 3
"""Of a snapshot; those of another one cannot be restored."""

EVENT_BLOCK = 2**14
"""Frames of few photons that are folded in together at most."""

HELD_BYTES = 2**29
"""Frames of so many bytes are folded in even if they do not make a block."""

HELD_EVENTS = 2**25
"""As many events are folded in even if they do not make a block."""


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
    segments
        Successive parts of the run, at most, of which g2 is told too (`stream.operators.stability`); 0 or 1: of none.
        They take 64 bytes per static bin and delay each. Fewer if the map has more than some 400 static bins, none from
        some 1700 on (of 4 * 17 delays), and none with error "pixel": to add up the pixels at their ends takes long.
    threads
        Kernel threads; None = all cores this process may use. The result does not depend on it.

    Raises
    ------
    RoiMapError
        The map was made for another detector.
    ValueError
        An option is out of range.
    ConfigError
        By whatever folds in held frames (`push`, `result`, `snapshot`, `merge`): a pixel of one frame holds
        2**49 / 2**levels counts or more, which only uint32 with more than 17 levels can. Mask it, or take fewer levels.
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
        segments: int = 8,
        threads: int | None = None,
    ) -> None:
        if not 1 <= delays_per_level <= 32:
            raise ValueError(f"delays_per_level: {delays_per_level} is not in 1..32")
        if not 1 <= levels <= 28:
            raise ValueError(f"levels: {levels} is not in 1..28")
        if not 0 <= segments <= 64:
            raise ValueError(f"segments: {segments} is not in 0..64")
        self.n_frames = 0
        self._start = start
        self._roimap = roimap
        self._d = delays_per_level
        self._levels = levels
        self._error = error
        self._segments = segments
        capacity = 0 if error == "pixel" else affordable(segments, (levels + 1) * self._d, roimap.n_static)
        self._stability = Stability(capacity, roimap.n_static)
        self._threads = Threads(threads)
        self._merged = False

        self._tiles = Tiles.of(static_bins(start, roimap))
        self._bins = self._tiles.bins.ravel()
        self._static_of_bin: NDArray[np.integer[Any]] = np.arange(roimap.n_static)
        parts = self._threads.n
        if error == "pixel":
            # Each pixel is its own bin, and threads never share one.
            inside = self._bins >= 0
            self._static_of_bin = self._bins[inside]
            self._pixel_of_bin = self._pixels()[inside]
            self._bins = np.where(inside, np.cumsum(inside) - 1, -1).astype(np.int32)
            parts = 1
        n_bin = len(self._static_of_bin)
        self._region = self._tiles.region(self._bins.reshape(-1, TILE))
        self._alive = np.bincount(self._bins[self._bins >= 0], minlength=n_bin)
        self._history = History(*empty_planes(len(self._bins) // LANES, self._d, levels))
        n_slot = (levels + 1) * slots(self._d)
        self._sums = [
            Sums(aligned(n_bin * n_slot, np.int64), np.zeros((2, n_bin, n_slot), np.int64)) for _ in range(parts)
        ]
        self._spaces = [work_space(self._d, levels) for _ in range(self._threads.n)]
        self._bound = 0.0
        self._last_weights = np.zeros((levels, 2 * self._d), np.int64)
        self._pairs = np.zeros((levels, 2 * self._d), np.int64)
        # Pairs of pixels that left, (2, n_delay, n_bin).
        self._N_left = np.zeros((2, (levels + 1) * self._d, n_bin), np.int64)

        # Frames pushed and not yet folded in: those of them that came, where each begins, and how many they are.
        self._held: dict[int, NDArray[np.unsignedinteger]] = {}
        self._held_bytes = 0
        self._held_events: list[Events] = []
        self._held_photons = 0
        self._addresses = np.zeros(BLOCK, np.int64)
        self._n_held = 0
        self._copier = ThreadPoolExecutor(1, "snapshot")
        self._copy: Future[Arrays] | None = None
        self._unbroken = 0
        """The first frame since the last that was missing."""

    def _pixels(self) -> NDArray[np.int64]:
        """Return the flat index on the whole detector of the pixel of each column."""
        row, column = np.divmod(self._tiles.pixels(), self._start.shape[1])
        return (row + self._start.origin[0]) * self._roimap.shape[1] + column + self._start.origin[1]

    def push(self, batch: FrameBatch) -> None:
        """Take frames, and fold them in when a block is full; see `stream.protocols.Operator`."""
        if self._merged:
            raise ValueError("multitau: a merged operator takes no frames")
        if batch.first < self.n_frames:
            raise ValueError(f"multitau: frame {batch.first} came after {self.n_frames} were pushed")
        if batch.frames.shape[1:] != self._start.shape or batch.frames.dtype != self._start.dtype:
            # The kernels read where the run says that there are frames.
            raise ValueError(f"multitau: frames {batch.frames.shape} {batch.frames.dtype} are not those of the run")
        self.miss(batch.first)
        frames = batch.unpacked
        if isinstance(frames, Events):
            self._hold_events(frames)
        else:
            self._hold(_rows(frames))

    def _hold(self, frames: NDArray[np.unsignedinteger]) -> None:
        if self._held_events:
            self._fold()
        begin = 0
        while begin < len(frames):
            segment_end = self._stability.end_after(self.n_frames)
            n = min(len(frames) - begin, BLOCK - self._n_held, segment_end - self.n_frames)
            places = frames.ctypes.data + np.arange(begin, begin + n) * frames.strides[0]
            self._addresses[self._n_held : self._n_held + n] = places
            self._hold_memory(frames)
            self._n_held += n
            self.n_frames += n
            begin += n
            if self._n_held == BLOCK or self._held_bytes >= HELD_BYTES or self.n_frames == segment_end:
                self._fold()

    def _hold_memory(self, frames: NDArray[np.unsignedinteger]) -> None:
        """Keep the memory of frames, which may be part of a larger piece; `self._held_bytes` is what all hold on to."""
        whole = frames.base if isinstance(frames.base, np.ndarray) else frames
        if id(whole) not in self._held:
            self._held[id(whole)] = whole
            self._held_bytes += whole.nbytes

    def _hold_events(self, frames: Events) -> None:
        if self._n_held and not self._held_events:
            self._fold()
        begin = 0
        while begin < len(frames):
            # Blocks end where many coarse frames do. While old frames are missing, photons are taken row by row: so
            # they become longer with the distance from the last one.
            known = self.n_frames - self._n_held - self._unbroken
            room = HELD_EVENTS * len(frames) // (len(frames.pixels) + 1)
            length = max(BLOCK, min(EVENT_BLOCK, *(1 << max(each.bit_length() - 1, 0) for each in (known, room))))
            end = min((self.n_frames // length + 1) * length, self._stability.end_after(self.n_frames))
            n = min(len(frames) - begin, end - self.n_frames)
            held = frames[begin : begin + n]
            self._held_events.append(held)
            self._held_photons += len(held.pixels)
            self._n_held += n
            self.n_frames += n
            begin += n
            if self.n_frames == end or self._held_photons >= HELD_EVENTS:
                self._fold()

    def miss(self, n_frames: int) -> None:
        """Go on to n_frames without those not pushed; see `stream.protocols.Operator`."""
        missing = n_frames - self.n_frames
        if missing == 0:
            return
        if self._held_events or self._n_held + missing > BLOCK:
            self._fold()
        self._unbroken = n_frames
        while self.n_frames < n_frames:
            segment_end = self._stability.end_after(self.n_frames)
            missing = min(n_frames, segment_end) - self.n_frames
            self.n_frames += missing
            if missing > BLOCK:
                self._correlate(self.n_frames - missing, missing, np.zeros(2 * self._d, np.int64))
            else:
                self._addresses[self._n_held : self._n_held + missing] = 0
                self._n_held += missing
                if self.n_frames == segment_end:
                    self._fold()

    def _fold(self) -> None:
        """Fold in what is held."""
        if self._n_held:
            n, events = self._n_held, self._held_events
            addresses = np.ones(n, np.int64) if events else self._addresses[:n]
            try:
                self._correlate(self.n_frames - n, n, addresses, events)
            finally:
                self._let_go()

    def _let_go(self) -> None:
        """Hold nothing."""
        self._n_held, self._held, self._held_bytes = 0, {}, 0
        self._held_events, self._held_photons = [], 0

    def _correlate(self, first: int, span: int, addresses: NDArray[np.int64], events: Sequence[Events] = ()) -> None:
        """Fold in `span` frames from `first` on."""
        self._let_copy()
        came = addresses != 0
        before = self._last_weights.copy(), self._pairs.copy()
        weights, pairs, full = kernel.weigh(came, first, span, self._last_weights, self._pairs)
        itemsize = np.dtype(self._start.dtype).itemsize
        largest = 2 ** (8 * itemsize) - 1
        limit = self._start.saturation_value
        block = Block(
            first=first,
            span=span,
            addresses=addresses,
            **_places(events),
            itemsize=itemsize,
            limit=largest if limit is None else min(limit, largest),
            weights=weights,
            pairs=pairs,
            full=full,
            delays_per_level=self._d,
        )

        correlate = kernel.correlate_events if events else kernel.correlate

        def run(thread: int, begin: int, end: int) -> tuple[int, int, float]:
            sums = self._sums[thread % len(self._sums)]
            state = State(self._region, self._history, sums, self._spaces[thread])
            return correlate(block, state, begin, end)  # type: ignore[no-any-return]

        done = self._threads.run(run, len(self._region.first))
        top = max((bits for bits, _, _ in done), default=0)
        if top << self._levels - 1 >> COUNT_BITS:
            raise ConfigError(
                f"multitau: {2 ** (COUNT_BITS + 1 - self._levels)} or more in a pixel, so many counts in one bin and "
                f"frame are too many for {self._levels} levels"
            )
        if any(n_left for _, n_left, _ in done):
            self._bury(first, came, *before)
        self._bound += sum(bound for _, _, bound in done) * LANES
        if self._bound >= 2.0**wide.BITS:
            for sums in self._sums:
                kernel.settle(*sums)
            self._bound = 0
        if self._stability.reach(first + span):
            self._stability.end(self._so_far(first + span))

    def _bury(self, first: int, came: NDArray[np.bool_], weights: NDArray[np.int64], pairs: NDArray[np.int64]) -> None:
        """Count the pairs that were complete when pixels left in a block, from the weights and pairs before it."""
        columns = np.flatnonzero(self._region.left)
        frame = self._region.left[columns].astype(np.int64) - 1
        self._region.left[columns] = 0
        begin = 0
        for t in np.unique(frame):
            kernel.weigh(came[begin:t], first + begin, t - begin, weights, pairs)
            gone = np.bincount(self._bins[columns[frame == t]], minlength=len(self._alive))
            self._alive -= gone
            kernel.outer(_by_delay(pairs, self._d), gone, self._N_left)
            begin = t

    def _n_pairs(self, n_delay: int | None) -> wide.Wide:
        """Return the pairs of the first delays, times the pixels that had them."""
        left = self._N_left[:, :n_delay]
        here = np.zeros_like(left)
        kernel.outer(_by_delay(self._pairs, self._d)[:n_delay], self._alive, here)
        return wide.total(np.stack([left, here], axis=1), 1)

    def _so_far(self, n_frames: int) -> Totals:
        """Return the sums of the static bins at the delays that n_frames have."""
        n_delay = len(delays(n_frames, self._d, self._levels)[0])
        sums = self._totals(n_delay)
        if self._error == "pixel":
            sums = [_pool(each, self._static_of_bin, self._roimap.n_static) for each in sums]
        return Totals(n_frames, np.stack(sums, axis=1), _by_delay(self._pairs, self._d)[:n_delay])

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
        g2_segments, g2_err_segments : (n_segment, n_delay, n_dynamic) float64
            The same of successive parts of the run; NaN also at delays as long as a part, or longer.
        n_pairs_segments : (n_segment, n_delay) float64
        segment_start, segment_stop : (n_segment,) int64
            The frames of each part.
        """
        self._fold()
        level, delay = delays(self.n_frames, self._d, self._levels)
        roimap, so_far = self._roimap, self._so_far(self.n_frames)
        G2, IP, IF, N = wide.to_float(so_far.sums)
        g2_static = ratio(G2 * N, IP * IF)
        g2, g2_err = mean_and_error(g2_static, roimap.dynamic_of_static, roimap.n_dynamic)
        if self._error == "pixel":
            g2_err = self._error_per_pixel(len(delay))
        return {
            "delay": delay,
            "tau": delay * self._start.frame_time,
            "g2": g2,
            "g2_err": g2_err,
            "n_pairs": np.ldexp(so_far.pairs.astype(np.float64), -2 * level),
            "G2": ratio(G2, N),
            "IP": ratio(IP, N),
            "IF": ratio(IF, N),
            **self._stability.result(so_far, delay, level, roimap.dynamic_of_static, roimap.n_dynamic),
        }

    def _error_per_pixel(self, n_delay: int) -> NDArray[np.float64]:
        # In the order of pixels on the detector, so that merged regions round like the whole.
        order = np.argsort(self._pixel_of_bin)
        G2, IP, IF, N = (wide.to_float(each[:, :, order]) for each in self._totals(n_delay))
        group = self._roimap.dynamic_of_static[self._static_of_bin[order]]
        return mean_and_error(ratio(G2 * N, IP * IF), group, self._roimap.n_dynamic)[1]

    def merge(self, other: Self) -> None:
        """Add another region of the same frames; see `stream.protocols.Operator`."""
        mine_is, theirs_is = (
            (each._d, each._levels, each._error, each._segments, each._roimap.digest) for each in (self, other)
        )
        if mine_is != theirs_is:
            raise ValueError(f"multitau: regions correlated as {theirs_is} and as {mine_is} cannot be merged")
        n_frames = max(self.n_frames, other.n_frames)
        if any(each._merged and each.n_frames < n_frames for each in (self, other)):
            raise ValueError(f"multitau: what is merged ends before {n_frames}: merge the longest region first")
        self._let_copy()
        for each in (self, other):
            each.miss(n_frames)
            each._fold()
        self._stability = self._stability.merged(other._stability, self._so_far(n_frames), other._so_far(n_frames))
        mine, theirs = self._totals(), other._totals()
        if self._error == "pixel":
            self._static_of_bin = np.concatenate([self._static_of_bin, other._static_of_bin])
            self._pixel_of_bin = np.concatenate([self._pixel_of_bin, other._pixel_of_bin])
            both = [np.concatenate(pair, axis=2) for pair in zip(mine, theirs, strict=True)]
        else:
            both = [wide.total(np.stack(pair, axis=1), 1) for pair in zip(mine, theirs, strict=True)]
        self._take(both)
        # Regions may have lost different frames: what is said of the pairs is true of the poorer one.
        self._pairs = np.minimum(self._pairs, other._pairs)
        self._alive = np.zeros(len(self._static_of_bin), np.int64)
        self._merged = True

    def _totals(self, n_delay: int | None = None) -> list[wide.Wide]:
        """Return G2, IP, IF and N, (2, n_delay, n_bin) each, of all threads; None: at all delays."""
        slot = _slots(self._d, self._levels)[:n_delay]
        totals = []
        for name in range(3):
            at = slot + name * CHUNK
            parts = []
            for sums in self._sums:
                narrow = sums.narrow.reshape(-1, sums.wide.shape[2])[:, at]
                parts += [sums.wide[:, :, at], np.stack([narrow >> wide.BITS, narrow & wide.MASK])]
            totals.append(wide.total(np.stack(parts, axis=1), 1).swapaxes(1, 2))
        return [*totals, self._n_pairs(n_delay)]

    def _take(self, totals: list[wide.Wide]) -> None:
        """Put such totals in the place of what there is."""
        self._let_copy()
        *sums, self._N_left = totals
        n_slot = (self._levels + 1) * slots(self._d)
        n_bin = self._N_left.shape[2]
        whole = np.zeros((2, n_bin, n_slot), np.int64)
        for name, total in enumerate(sums):
            whole[:, :, _slots(self._d, self._levels) + name * CHUNK] = total.swapaxes(1, 2)
        rest = [np.zeros_like(whole) for _ in self._sums[1:]]
        self._sums = [Sums(aligned(n_bin * n_slot, np.int64), each) for each in (whole, *rest)]
        self._bound = 0.0

    def snapshot(self) -> Arrays:
        """Return the state; see `stream.protocols.Operator`. It is copied while frames are pushed, up to a block."""
        self._fold()
        self._let_copy()
        self._copy = self._copier.submit(self._state, self.n_frames)
        return Copying(self._copy)

    def _let_copy(self) -> None:
        """Return once the state may change."""
        if self._copy is not None:
            self._copy.result()
            self._copy = None

    def _state(self, n_frames: int) -> Arrays:
        n_level = min(self._levels, n_frames.bit_length())
        return {
            **self._sums_alone(n_frames),
            **self._stability.state(len(delays(n_frames, self._d, self._levels)[0])),
            "live": self._region.live.copy(),
            **saved_planes(self._history, self._d, n_level),
        }

    def _sums_alone(self, n_frames: int) -> Arrays:
        n_level = min(self._levels, n_frames.bit_length())
        n_delay = (n_level + 1) * self._d if n_level else 0
        totals = zip(("G2", "IP", "IF", "N"), self._totals(), strict=True)
        return {
            **self._identity(),
            "n_frames": np.array(n_frames),
            "weights": self._last_weights[:n_level].copy(),
            "pairs": self._pairs[:n_level].copy(),
            **{name: total[:, :n_delay].copy() for name, total in totals},
        }

    def partial(self) -> Arrays:
        """Return the sums alone; see `stream.protocols.Operator`."""
        self._fold()
        delay = delays(self.n_frames, self._d, self._levels)[1]
        return {**self._sums_alone(self.n_frames), **self._stability.partial(delay)}

    def restore(self, state: Arrays) -> None:
        """Take over a state; see `stream.protocols.Operator`."""
        check_identity(self.name, state, self._identity())
        self._let_copy()
        self.n_frames = self._unbroken = int(state["n_frames"])
        self._let_go()
        n_level = len(state["weights"])
        self._last_weights[:] = 0
        self._last_weights[:n_level] = state["weights"]
        self._pairs[:] = 0
        self._pairs[:n_level] = state["pairs"]
        totals = []
        for name in ("G2", "IP", "IF", "N"):
            whole = np.zeros(self._N_left.shape, np.int64)
            whole[:, : state[name].shape[1]] = state[name]
            totals.append(whole)
        self._merged = "live" not in state
        self._alive = np.zeros(len(self._static_of_bin), np.int64)
        if not self._merged:
            self._region.live[:] = state["live"]
            self._alive = np.bincount(self._bins[self._region.live > 0], minlength=len(self._alive))
            restore_planes(self._history, self._d, state)
        # The pairs that live pixels have are counted anew from their number.
        here = np.zeros_like(totals[3])
        kernel.outer(_by_delay(self._pairs, self._d), self._alive, here)
        totals[3] = wide.difference(totals[3], here)
        self._take(totals)
        n_delay = len(delays(self.n_frames, self._d, self._levels)[0])
        self._stability = self._stability.restored(state, self.n_frames, n_delay)

    def _identity(self) -> Arrays:
        parameters = self._d, self._levels, self._error == "pixel", self._segments, LAYOUT
        return identity(self._start, self._roimap, *parameters)


def _slots(d: int, levels: int) -> NDArray[np.int64]:
    """Return the slot of G2 of every delay, see `layout.Sums`; those of IP and IF are CHUNK and 2 CHUNK further."""
    group, j = np.divmod(np.arange((levels + 1) * d), d)
    slot: NDArray[np.int64] = group * slots(d) + j // CHUNK * LANES + j % CHUNK
    return slot


def _by_delay(values: NDArray[np.int64], d: int) -> NDArray[np.int64]:
    """Return values (n_level, 2 d) of all levels and delays in the order of delays, without those that do not count."""
    return np.concatenate([values[0, :d], values[:, d:].ravel()])


def _rows(frames: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Return frames (n, rows, cols) as contiguous (n, n_pixel), with dark pixels to fill a tile if there are fewer."""
    rows = np.ascontiguousarray(frames).reshape(len(frames), -1)
    return rows if rows.shape[1] >= TILE else np.pad(rows, ((0, 0), (0, TILE - rows.shape[1])))


def _places(events: Sequence[Events]) -> dict[str, NDArray[np.int64]]:
    """Return where the events of each frame lie, as in `layout.Block`."""
    of_none = [np.zeros(0, np.int64)]
    return {
        "lengths": np.concatenate(of_none + [np.diff(each.offsets) for each in events]),
        "pixels": np.concatenate(of_none + [_places_in(each.pixels, each.offsets) for each in events]),
        "counts": np.concatenate(of_none + [_places_in(each.counts, each.offsets) for each in events]),
    }


def _places_in(values: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    return values.ctypes.data + values.itemsize * offsets[:-1]


def _pool(sums: wide.Wide, static_of_bin: NDArray[np.integer[Any]], n_static: int) -> wide.Wide:
    pooled = np.zeros((2, sums.shape[1], n_static), np.int64)
    kernel.pool(np.ascontiguousarray(sums), static_of_bin, pooled)
    return pooled
