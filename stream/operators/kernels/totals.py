"""Sums of counts over frames and over pixels, in exact integers.

`alive` (n_pixel,) uint8 is 1 for pixels that count; one that reads more than `limit` leaves for good, that frame
included.
"""

from typing import Any

import numpy as np
from numba import njit

TILE = 256


@njit(nogil=True, cache=True)
def over_frames(frames: Any, limit: int, alive: Any, sums: Any, n: Any, begin: int, end: int) -> None:
    """Add frames (n, n_pixel) to sums (n_pixel,) int64, and the number of frames that counted to n (n_pixel,) int64."""
    for left in range(begin, end, TILE):
        right = min(left + TILE, end)
        alive_tile, sums_tile, n_tile = alive[left:right], sums[left:right], n[left:right]
        for t in range(frames.shape[0]):
            row = frames[t, left:right]
            for p in range(right - left):
                live = np.uint8(row[p] <= limit) & alive_tile[p]
                alive_tile[p] = live
                sums_tile[p] += row[p] * np.int64(live)
                n_tile[p] += live


@njit(nogil=True, cache=True)
def over_pixels(frames: Any, limit: int, alive: Any, sums: Any, n: Any, begin: int, end: int) -> None:
    """Add the pixels begin..end-1 of each frame to sums (n,) int64, and the number that counted to n (n,) int64."""
    for left in range(begin, end, TILE):
        right = min(left + TILE, end)
        alive_tile = alive[left:right]
        count = np.int64(alive_tile.sum())
        for t in range(frames.shape[0]):
            row = frames[t, left:right]
            above = np.uint8(0)
            for p in range(right - left):
                above |= np.uint8(row[p] > limit)
            if above:
                for p in range(right - left):
                    alive_tile[p] &= np.uint8(row[p] <= limit)
                count = np.int64(alive_tile.sum())
            value = np.int64(0)
            for p in range(right - left):
                value += np.int64(row[p]) * np.int64(alive_tile[p])
            sums[t] += value
            n[t] += count


@njit(nogil=True, cache=True)
def per_bin(values: Any, bins: Any, sums: Any) -> None:
    """Add values (n_pixel,) to sums (n_bin,) of their bins (n_pixel,) from 1; 0 is outside."""
    for p in range(len(values)):
        if bins[p] > 0:
            sums[bins[p] - 1] += values[p]
