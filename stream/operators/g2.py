"""What sums over pairs of frames are made into: delays, ratios, means and their errors."""

import numpy as np
from numpy.typing import NDArray


def delays(n_frames: int, d: int, levels: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return level and delay (frames) of every delay that a pair of n_frames can have, in order."""
    level = np.repeat(np.arange(levels), d)
    k = np.tile(np.arange(d + 1, 2 * d + 1), levels)
    level, k = np.concatenate([np.zeros(d, np.int64), level]), np.concatenate([np.arange(1, d + 1), k])
    known = k < n_frames >> level
    return level[known], (k << level)[known]


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide; NaN where the denominator is 0."""
    known = denominator > 0
    return np.where(known, numerator / np.where(known, denominator, 1), np.nan)


def mean_and_error(
    values: NDArray[np.float64], group: NDArray[np.int64], n_group: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over the finite members of each group 1..n_group and its standard error, (n_delay, n_group)."""
    mean = np.full((len(values), n_group), np.nan)
    error = np.full((len(values), n_group), np.nan)
    for g in range(n_group):
        members = values[:, group == g + 1]
        finite = np.isfinite(members)
        n = finite.sum(axis=1)
        mean[:, g] = ratio(np.where(finite, members, 0).sum(axis=1), n.astype(np.float64))
        squares = np.where(finite, members - mean[:, g, None], 0) ** 2
        error[:, g] = np.sqrt(ratio(squares.sum(axis=1), n * (n - 1.0)))
    return mean, error
