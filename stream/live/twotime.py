"""Two-time correlation as the page shows it: maps small enough for browsers, and their cuts at ages.

Of the whole run, and of its newest frames where those are known at a finer resolution (see `stream.operators.twotime`).

A *map* is c2(t1, t2) of a q bin, symmetric, its upper half sent row by row; where it is too large, means of blocks of
what is known. The diagonal holds the shot noise: what stands there is the mean of its neighbours.

A *cut* is g2(tau) at an age (t1 + t2) / 2: the mean of what is known of c2, as it was measured, over the pairs of a
band of ages and a group of delays. Bands are equally wide, and cover all ages; delays are grouped as in multi-tau: one
by one up to 8, then four groups of 2, of 4, of 8, ...
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.live.picture import block_mean
from stream.messages import Arrays

MAP_BYTES = 3 * 2**19
"""Of all maps of a section."""

CUT_BYTES = 2**19
"""Of all cuts of a section, but of one age each at least."""

MOST_AGES = 25

SINGLE, EACH = 8, 4
"""Delays that are no group, and groups of a width."""

UNKNOWN = 2**16 - 1
"""Stands for NaN in a map."""


def two_time(arrays: Arrays, frame_time: float) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """Return the section of a result of `stream.operators.twotime.TwoTime`, before it is packed; None if it is empty.

    Returns
    -------
    facts
        bins, from 1, and of each window its n times of `step` seconds from `first` on, of avg_frame frames each; in the
        map `block` times are one.
    arrays
        Of window i: map_i (n_bin, m * (m + 1) / 2), from 0 to `UNKNOWN`; scale_i (n_bin, 4): value at 0, value of a
        step, and the values from where to where colours go; age_i (n_age,), tau_i (n_tau,), s; cut_i (n_bin, n_age,
        n_tau).

    Raises
    ------
    KeyError, IndexError, TypeError, ValueError
        They are not what the operator makes.
    """
    c2, bins = arrays["c2"], arrays["bins"]
    n_level, n_bin, n_time, _ = c2.shape
    for name in ("n_times", "avg_frame", "first"):
        if arrays[name].dtype.kind not in "iu":
            raise ValueError(f"{name} are {arrays[name].dtype}, which does not count")
    n_times = [int(n) for n in arrays["n_times"]]
    if c2.shape[3] != n_time or bins.shape != (n_bin,) or len(n_times) != n_level or max(n_times, default=0) > n_time:
        raise ValueError(f"c2 is {c2.shape}, of {bins.shape} bins and {n_times} times")
    if not n_level or not n_bin or n_times[-1] < 2:
        return None
    if n_times[0] < 2:
        raise ValueError(f"{n_times[0]} of the newest times")
    levels = sorted({n_level - 1, 0}, reverse=True)  # the whole run, and its end
    windows: list[dict[str, Any]] = []
    found: dict[str, NDArray[Any]] = {}
    for i, level in enumerate(levels):
        n = n_times[level]
        avg_frame, first = int(arrays["avg_frame"][level]), int(arrays["first"][level])
        step = avg_frame * frame_time
        whole = np.asarray(c2[level, :, :n, :n], np.float64)
        block = _block(n, n_bin * len(levels))
        ages, taus, cuts = age_cuts(whole, _n_ages(n, n_bin * len(levels)))
        found |= {f"{name}_{i}": array for name, array in _maps(whole, block).items()}
        found |= {
            f"age_{i}": first * frame_time + ages * step,
            f"tau_{i}": taus * step,
            f"cut_{i}": cuts.astype("<f4"),
        }
        windows.append({"avg_frame": avg_frame, "first": first * frame_time, "step": step, "n": n, "block": block})
    return {"bins": bins.tolist(), "windows": windows}, found


def age_cuts(
    c2: NDArray[np.float64], n_age: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return ages (n_age,), delays (n_tau,), both in times, and the cuts (n_bin, n_age, n_tau) of c2 (n_bin, n, n)."""
    n_bin, n, _ = c2.shape
    groups = list(_groups(n))
    sums = np.zeros((n_bin, n_age, len(groups)))
    counts = np.zeros_like(sums)
    band = np.arange(2 * n - 1) * n_age // (2 * n - 1)
    for group, delays in enumerate(groups):
        for delay in delays:
            values = np.diagonal(c2, delay, 1, 2)
            known = np.isfinite(values)
            # t1 + t2 grows along a diagonal, and so do bands.
            bands, begin = np.unique(band[delay : 2 * n - delay : 2], return_index=True)
            sums[:, bands, group] += np.add.reduceat(np.where(known, values, 0), begin, axis=1)
            counts[:, bands, group] += np.add.reduceat(known, begin, axis=1, dtype=np.int64)
    cuts = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    ages = np.bincount(band, np.arange(2 * n - 1) / 2, n_age) / np.bincount(band, minlength=n_age)
    return ages, np.array([np.mean(delays) for delays in groups]), cuts


def _groups(n: int) -> Iterator[range]:
    """Yield groups of the delays 1 to n - 1."""
    begin, width = 1, 1
    while begin < n:
        for _ in range(SINGLE if width == 1 else EACH):
            if begin < n:
                yield range(begin, min(begin + width, n))
                begin += width
        width *= 2


def _n_ages(n: int, n_maps: int) -> int:
    """Return how many ages are cut at: a few antidiagonals each, so that there are pairs of any delay."""
    room = CUT_BYTES // (4 * n_maps * sum(1 for _ in _groups(n)))
    return max(1, min(MOST_AGES, (2 * n - 1) // 4, room))


def _block(n: int, n_maps: int) -> int:
    """Return how many times are one in maps of n times."""
    largest = max(1, int(np.sqrt(MAP_BYTES / n_maps)))  # two bytes each, of one half
    return -(-n // largest)


def _maps(c2: NDArray[np.float64], block: int) -> dict[str, NDArray[Any]]:
    n = c2.shape[1]
    size = -(-n // block)
    upper = np.triu_indices(size)
    maps = np.full((len(c2), len(upper[0])), UNKNOWN, "<u2")
    scales = np.zeros((len(c2), 4), "<f8")
    for bin_, values in enumerate(c2):
        without = np.where(np.eye(n, dtype=np.bool_), np.nan, values)
        if not np.isfinite(without).any():
            scales[bin_] = 1, 0, 1, 2
            continue
        shown = _with_diagonal(block_mean(without, block).astype(np.float64))[upper]
        known = np.isfinite(shown)
        low, high = shown[known].min(), shown[known].max()
        step = (high - low) / (UNKNOWN - 1) or 1.0
        maps[bin_, known] = np.rint((shown[known] - low) / step)
        scales[bin_] = low, step, *_limits(shown[known])
    return {"map": maps, "scale": scales}


def _with_diagonal(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Put on the diagonal, where it is not known, the mean of what is next to it."""
    beside = np.full((2, len(values)), np.nan)
    beside[0, 1:] = beside[1, :-1] = np.diagonal(values, 1)
    known = np.isfinite(beside)
    n = known.sum(axis=0)
    mean = np.divide(np.where(known, beside, 0).sum(axis=0), n, out=np.full(len(values), np.nan), where=n > 0)
    diagonal = np.diagonal(values)
    values[np.diag_indices(len(values))] = np.where(np.isfinite(diagonal), diagonal, mean)
    return values


def _limits(known: NDArray[np.float64]) -> tuple[float, float]:
    """Return where colours begin and end: the baseline 1 is among them, single values far off are not."""
    low, high = np.percentile(known, [1, 99])
    low, high = min(float(low), 1.0), max(float(high), 1.0)
    return low, high if high > low else low + 1e-3
