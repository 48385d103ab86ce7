"""Sums over equal spans of frames, in bounded memory, for runs of unknown length."""

from collections.abc import Iterator
from typing import Self

import numpy as np
from numpy.typing import NDArray


class Segments:
    """Between half of `capacity` and `capacity` segments of `length` frames each, from frame 0 on.

    When they are full, neighbours are added up and the length doubles. What is in them depends on the frames alone, not
    on how they were pushed.
    """

    def __init__(self, capacity: int, width: int) -> None:
        self.length = 1
        self.sums: NDArray[np.int64] = np.zeros((capacity, width), np.int64)

    def reach(self, n_frames: int) -> None:
        """Make room for n_frames."""
        capacity = len(self.sums)
        while self.n(n_frames) > capacity:
            merged = self.sums.reshape(capacity // 2, 2, -1).sum(axis=1)
            self.sums = np.concatenate([merged, np.zeros_like(merged)])
            self.length *= 2

    def over(self, first: int, n: int) -> Iterator[tuple[int, slice]]:
        """Make room for frames first..first+n-1; yield each segment they fall into, and which of the n do."""
        self.reach(first + n)
        begin = first
        while begin < first + n:
            segment = begin // self.length
            end = min(first + n, (segment + 1) * self.length)
            yield segment, slice(begin - first, end - first)
            begin = end

    def add(self, other: Self, n_frames: int) -> None:
        """Add sums over the same n_frames, of which either may have missed the last."""
        self.reach(n_frames)
        other.reach(n_frames)
        self.sums = self.sums + other.sums

    def n(self, n_frames: int) -> int:
        """Return how many segments n_frames reach into."""
        return -(-n_frames // self.length)
