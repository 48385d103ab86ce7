"""The newest coarse frames of one level of two-time correlation, and the sums that it is made of."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.operators.kernels.twotime import SINGLE, products


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSums:
    """Sums over the pixels of each bin, for pairs of n coarse frames; they add up over regions. All exact integers."""

    first: int
    """Number of the first of the coarse frames."""
    weights: NDArray[np.int64]
    """(n,) frames that came in each."""
    G2: NDArray[np.int64]
    """(n_bin, n, n) c(i) c(j)"""
    IP: NDArray[np.int64]
    """(n_bin, n, n) c(i) w(j)"""
    N: NDArray[np.int64]
    """(n_bin, n, n) w(i) w(j)"""

    @classmethod
    def of(
        cls,
        first: int,
        weights: NDArray[np.int64],
        G2: NDArray[np.int64],
        sums: NDArray[np.int64],
        pixels: NDArray[np.int64],
    ) -> Self:
        """Make them of one region, whose pixels all have the same weights (n,): sums (n_bin, n), pixels (n_bin,)."""
        return cls(
            first=first,
            weights=weights,
            G2=G2,
            IP=sums[:, :, None] * weights,
            N=pixels[:, None, None] * np.outer(weights, weights),
        )

    def __add__(self, other: Self) -> "PairSums":
        """Add those of another region at the same times. Of the weights the poorer are kept."""
        return PairSums(
            first=self.first,
            weights=np.minimum(self.weights, other.weights),
            G2=self.G2 + other.G2,
            IP=self.IP + other.IP,
            N=self.N + other.N,
        )


class Window:
    """The newest `n_times` coarse frames of a level; two neighbours make one of the next level.

    Products are taken when they are asked for: of frames that have left by then there are none to be taken.

    Parameters
    ----------
    n_times
        Coarse frames that are kept, at least 2.
    edges
        (n_bin + 1,) first column (pixel) of each bin, and one past the last.
    largest
        The largest count of a pixel in a coarse frame.
    coarser
        The next level.
    """

    def __init__(self, n_times: int, edges: NDArray[np.int64], largest: int, coarser: "Window | None") -> None:
        n_bin = len(edges) - 1
        self.end = 0
        """Coarse frames so far."""
        self._edges = edges
        self._coarser = coarser
        # Coarse frame i stands in row i % n_times.
        self._counts: NDArray[Any] = np.zeros((n_times, edges[-1]), kind_of_counts(largest))
        self._weights = np.zeros(n_times, np.int64)
        self._known = np.zeros(n_times, np.bool_)
        self._products = np.zeros((n_bin, n_times, n_times), np.int64)
        self._sums = np.zeros((n_bin, n_times), np.int64)

    @property
    def n_times(self) -> int:
        """Coarse frames that are kept."""
        return len(self._weights)

    @property
    def first(self) -> int:
        """The oldest coarse frame that is kept."""
        return max(0, self.end - self.n_times)

    def take(self, counts: NDArray[Any], weights: NDArray[np.int64]) -> None:
        """Take the next coarse frames (n, n_column), and how many frames came in each."""
        if self._coarser is not None:
            if self.end % 2:
                last = (self.end - 1) % self.n_times
                paired = np.concatenate([self._counts[[last]], counts])
                paired_weights = np.concatenate([self._weights[[last]], weights])
            else:
                paired, paired_weights = counts, weights
            n = len(paired) // 2 * 2
            coarse = np.add(paired[0:n:2], paired[1:n:2], dtype=self._coarser._counts.dtype)
            if n:
                self._coarser.take(coarse, paired_weights[0:n:2] + paired_weights[1:n:2])
        rows = self._advance(len(counts))
        self._counts[rows] = counts[-len(rows) :]
        self._weights[rows] = weights[-len(rows) :]

    def miss(self, n: int) -> None:
        """Go on by n coarse frames of which nothing came."""
        if n == 0:
            return
        if self._coarser is not None:
            odd = self.end % 2
            if odd:
                last = [(self.end - 1) % self.n_times]
                self._coarser.take(self._counts[last], self._weights[last])
            self._coarser.miss((self.end + n) // 2 - self.end // 2 - odd)
        rows = self._advance(n)
        self._counts[rows] = 0
        self._weights[rows] = 0

    def _advance(self, n: int) -> NDArray[np.int64]:
        """Go on by n coarse frames, and return the rows of the newest of them."""
        rows = np.arange(max(self.end, self.end + n - self.n_times), self.end + n) % self.n_times
        self.end += n
        self._known[rows] = False
        return rows

    def drop(self, columns: NDArray[np.int64]) -> None:
        """Forget pixels, as if they had never been there."""
        self._counts[:, columns] = 0
        self._known[:] = False

    def pair_sums(self, pixels: NDArray[np.int64]) -> PairSums:
        """Return the sums over the pixels (n_bin,) that are left, for the times that are kept."""
        G2, sums = self.sums()
        return PairSums.of(self.first, self.weights(), G2, sums, pixels)

    def sums(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sums of products (n_bin, n, n) and of counts (n_bin, n) in the order of time.

        Raises
        ------
        ConfigError
            Pixels are so bright that they cannot be added up.
        """
        self._correlate()
        rows = self._rows()
        return self._products[:, rows[:, None], rows], self._sums[:, rows]

    def weights(self) -> NDArray[np.int64]:
        """Return how many frames came in each coarse frame that is kept, in the order of time."""
        return self._weights[self._rows()]

    def _rows(self) -> NDArray[np.int64]:
        return np.arange(self.first, self.end) % self.n_times

    def _correlate(self) -> None:
        """Take the products of coarse frames that came since the last time with all that are kept."""
        n = self.end - self.first
        new = np.flatnonzero(~self._known[:n])
        if not len(new):
            return
        for b, (begin, end) in enumerate(zip(self._edges[:-1], self._edges[1:], strict=True)):
            counts = self._counts[:n, begin:end]
            fresh = counts if len(new) == n else counts[new]
            largest = float(counts.max(initial=0))
            _check(fresh, largest)
            rows = products(fresh, counts, largest)
            self._products[b, new, :n] = rows
            self._products[b, :n, new] = rows
            self._sums[b, new] = fresh.sum(axis=1, dtype=np.float64)
        self._known[new] = True

    def saved(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return a copy of the coarse frames that are kept, in the order of time, and their weights."""
        counts = self._counts[self._rows()]
        return counts.astype(np.min_scalar_type(int(counts.max(initial=0)))), self.weights()

    def restore(self, end: int, counts: NDArray[Any], weights: NDArray[np.int64]) -> None:
        """Take over such a copy of a window that had seen `end` coarse frames."""
        self.end = end
        self._known[:] = False
        rows = self._rows()
        self._counts[rows], self._weights[rows] = counts, weights


def kind_of_counts(largest: int) -> type[np.float32 | np.float64]:
    """Return the type that holds counts up to the largest exactly."""
    return np.float32 if largest <= SINGLE else np.float64


def _check(counts: NDArray[Any], largest: float) -> None:
    if largest**2 * counts.shape[1] >= 2.0**62:
        squares = float(np.einsum("ip,ip->i", counts, counts, dtype=np.float64).max(initial=0))
        if squares >= 2.0**61:
            raise ConfigError(
                f"twotime: a pixel holds {largest:.0f} counts at a time, squares of a bin add up to {squares:.3g}: "
                "too many to be counted exactly; mask it, or take fewer levels"
            )
