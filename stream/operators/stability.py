"""g2 of successive parts of a run: whether the sample ages, or the beam damages it.

The sums of multi-tau only grow (`stream.operators.multitau`). What a part of the run, a *segment*, adds to them is
their difference between its ends, and as exact as they are. So a pair of coarse frames is of the segment in which the
later one ends, also if the earlier one is of the segment before. A segment has no delays as long as itself, so that no
pair reaches back further than that.

Segments are of equal length, a power of two and at least `SHORTEST` frames, from frame 0 on; the last has what there is
of it. When there would be more than `capacity` of them, neighbours are added up. What is in them depends on the frames
alone, not on how they were pushed. How many there are depends on the map of the whole detector and on the options, so
that regions, and what goes on after a stop, agree (`affordable`).
"""

from copy import copy
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from stream.errors import CheckpointError
from stream.messages import Arrays
from stream.operators.g2 import mean_and_error, ratio
from stream.operators.kernels import wide
from stream.operators.kernels.layout import BLOCK

SHORTEST = BLOCK
"""Frames of a segment at least: frames are folded in up to its end, and fewer at a time are slow."""

PARTIAL_BYTES = 7 * 2**20
"""Of segments in partial sums: records of a plane have room for 2**24 bytes, for these and the sums themselves."""

NEVER = 2**62


class Totals(NamedTuple):
    """What multi-tau knows from frame 0 on, of the delays that there are."""

    n_frames: int
    sums: wide.Wide
    """(2, 4, n_delay, n_static) G2, IP, IF and N."""
    pairs: NDArray[np.int64]
    """(n_delay,) Sums of products of the numbers of frames that came."""


def affordable(segments: int, n_delay: int, n_static: int) -> int:
    """Return how many of so many segments `PARTIAL_BYTES` have room for; 0 if not even for two."""
    capacity = min(segments, PARTIAL_BYTES // (32 * n_delay * n_static))
    return capacity if capacity > 1 else 0


class Stability:
    """What the segments of a run add to the sums of its static bins.

    Parameters
    ----------
    capacity
        Segments at most (`affordable`); 0: none are told apart.
    n_static
        Static bins.
    """

    def __init__(self, capacity: int, n_static: int) -> None:
        self.length = SHORTEST
        self._capacity = capacity
        # Of those that have ended. Not changed in place: copies and snapshots share them.
        self._sums = np.zeros((2, 0, 4, 0, n_static), np.int64)
        self._pairs = np.zeros((0, 0), np.int64)
        self._has_last = False
        """Whether the last, unfinished one is among them: that of merged sums."""

    def end_after(self, n_frames: int) -> int:
        """Return the first end of a segment after n_frames."""
        if not self._capacity:
            return NEVER
        length = self._length_at(n_frames + 1)
        return (n_frames // length + 1) * length

    def reach(self, n_frames: int) -> bool:
        """Make room for n_frames, no more than `end_after` said; return whether a segment ends there."""
        if not self._capacity:
            return False
        while self.length < self._length_at(n_frames):
            self._double()
        return n_frames % self.length == 0

    def end(self, totals: Totals) -> None:
        """End a segment."""
        sums, pairs = self._padded(len(totals.pairs))
        added = wide.difference(totals.sums, wide.total(sums, 1))
        self._sums = np.concatenate([sums, added[:, None]], axis=1)
        self._pairs = np.concatenate([pairs, (totals.pairs - pairs.sum(axis=0))[None]])

    def result(
        self,
        totals: Totals,
        delay: NDArray[np.int64],
        level: NDArray[np.int64],
        dynamic_of_static: NDArray[np.int64],
        n_dynamic: int,
    ) -> Arrays:
        """Return g2 of the segments: see `stream.operators.multitau.MultiTau.result`."""
        every = self._with_last(totals)
        n = len(every._pairs)
        within = min(int((delay < self.length).sum()), every._pairs.shape[1])
        G2, IP, IF, N = np.moveaxis(wide.to_float(every._sums[:, :, :, :within]), 1, 0)
        g2_static = ratio(G2 * N, IP * IF).reshape(n * within, len(dynamic_of_static))
        found = mean_and_error(g2_static, dynamic_of_static, n_dynamic)
        g2, g2_err = (np.full((n, len(delay), n_dynamic), np.nan) for _ in found)
        for values, known in zip((g2, g2_err), found, strict=True):
            values[:, :within] = known.reshape(n, within, n_dynamic)
        n_pairs = np.zeros((n, len(delay)))
        n_pairs[:, :within] = np.ldexp(every._pairs[:, :within].astype(np.float64), -2 * level[:within])
        start = np.arange(n) * self.length
        return {
            "g2_segments": g2,
            "g2_err_segments": g2_err,
            "n_pairs_segments": n_pairs,
            "segment_start": start,
            "segment_stop": np.minimum(start + self.length, totals.n_frames),
        }

    def merged(self, other: Self, mine: Totals, theirs: Totals) -> Self:
        """Return the segments of both, which are of the same frames and other pixels.

        Raises
        ------
        ValueError
            They are of other frames.
        """
        one, two = self._with_last(mine), other._with_last(theirs)
        if (one.length, len(one._pairs)) != (two.length, len(two._pairs)):
            raise ValueError(
                f"multitau: {len(one._pairs)} segments of {one.length} frames and {len(two._pairs)} of {two.length} "
                "cannot be merged"
            )
        n_delay = min(one._pairs.shape[1], two._pairs.shape[1])
        both = [each._sums[:, :, :, :n_delay] for each in (one, two)]
        one._sums = wide.total(np.stack(both, axis=1), 1)
        one._pairs = np.minimum(one._pairs[:, :n_delay], two._pairs[:, :n_delay])
        return one

    def state(self, n_delay: int) -> Arrays:
        """Return the segments that have ended, at as many delays as there are."""
        sums, pairs = self._padded(n_delay)
        # High limbs are rare: all of them are left out if they can be.
        return {
            "segment_length": np.array(self.length),
            "segment_pairs": pairs,
            "segment_sums": sums if sums[0].any() else sums[1:],
        }

    def partial(self, delay: NDArray[np.int64]) -> Arrays:
        """Return what `merged` needs, the delays of `result`: nothing will be added up into longer segments."""
        within = int((delay < self.length).sum())
        told = self.state(len(delay))
        return {
            **told,
            "segment_pairs": told["segment_pairs"][:, :within],
            "segment_sums": told["segment_sums"][:, :, :, :within],
        }

    def restored(self, state: Arrays, n_frames: int, n_delay: int) -> Self:
        """Return the segments of a `state` or a `partial` of n_frames, which have n_delay delays.

        Raises
        ------
        CheckpointError
            It is not of these sums.
        """
        length, pairs, sums = (state[f"segment_{name}"] for name in ("length", "pairs", "sums"))
        n_limb = len(sums) if sums.ndim == 5 else 0
        fits = pairs.ndim == 2 and sums.shape == (n_limb, len(pairs), 4, *pairs.shape[1:], self._sums.shape[-1])
        fits = fits and n_limb in (1, 2) and pairs.shape[1] <= n_delay
        right = self._length_at(n_frames)
        is_right = length.shape == () and length.dtype.kind in "iu" and int(length) == right
        # That of merged sums has the last, unfinished one too.
        ended = {n_frames // right, -(-n_frames // right)} if self._capacity else {0}
        integers = pairs.dtype.kind in "iu" and sums.dtype.kind in "iu"
        if not (fits and is_right and integers and len(pairs) in ended):
            raise CheckpointError(
                f"multitau: segments {sums.dtype} {sums.shape} of {length} frames do not fit {pairs.shape}, {n_frames}"
            )
        new = copy(self)
        new._has_last = False
        new.length = right
        new._pairs = pairs.astype(np.int64)
        new._sums = np.zeros((2, *sums.shape[1:]), np.int64)
        new._sums[-n_limb:] = sums
        return new

    def _length_at(self, n_frames: int) -> int:
        """Return the length of segments of n_frames."""
        length = SHORTEST
        while self._capacity and n_frames > self._capacity * length:
            length *= 2
        return length

    def _double(self) -> None:
        """Add up neighbours; what has no neighbour yet is not known as ended any more."""
        self.length *= 2
        n = len(self._pairs) // 2
        _, _, *shape = self._sums.shape
        self._sums = wide.total(self._sums[:, : 2 * n].reshape(2, n, 2, *shape), 2)
        self._pairs = self._pairs[: 2 * n].reshape(n, 2, self._pairs.shape[1]).sum(axis=1)

    def _padded(self, n_delay: int) -> tuple[wide.Wide, NDArray[np.int64]]:
        """Return sums and pairs, 0 at delays that there were not when they ended."""
        more = n_delay - self._pairs.shape[1]
        sums = np.pad(self._sums, ((0, 0), (0, 0), (0, 0), (0, more), (0, 0)))
        return sums, np.pad(self._pairs, ((0, 0), (0, more)))

    def _with_last(self, totals: Totals) -> Self:
        """Return all segments, also the last."""
        new = copy(self)
        if not new._has_last and self._capacity and totals.n_frames > len(new._pairs) * self.length:
            new.end(totals)
        new._has_last = True
        return new
