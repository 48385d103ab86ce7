"""The pixels of a map taken out of frames, and sums of products of two of them, in exact integers.

Counts are held in floats, since matrix products of floats are what processors are best at (BLAS). As long as every sum
stays below 2**24 (float32) or 2**53 (float64) all of it are integers that floats hold exactly, in whatever order they
are added up.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.operators.kernels.jit import kernel

SINGLE, DOUBLE = 2**24, 2**53
"""Integers up to these are exact in float32 and float64."""

COLUMNS = 1 << 14
"""Pixels of one matrix product at most: what has to be converted for it stays small."""

FEWEST = 1 << 10
"""With fewer than so many pixels float32 is not worth it."""

HALF = 1 << 16
"""Counts from 2**26 on are taken in two parts."""


@kernel
def gather(frames: Any, pixels: Any, limit: int, alive: Any, counts: Any) -> None:
    """Copy pixels (n_column,) of frames (n, n_pixel) to counts (n, n_column), 0 where not alive.

    `alive` (n_column,) uint8 becomes 0 where a pixel reads more than `limit`.
    """
    for t in range(frames.shape[0]):
        for column in range(len(pixels)):
            count = frames[t, pixels[column]]
            if count > limit:
                alive[column] = 0
            counts[t, column] = count * alive[column]


@kernel
def gather_events(offsets: Any, pixels: Any, events: Any, column_of: Any, limit: int, alive: Any, counts: Any) -> None:
    """Do the same with the events of n frames (see `stream.messages.Events`), where counts are 0 at first.

    `column_of` (n_pixel,) is the column of each pixel, -1 where it is outside.
    """
    for t in range(len(offsets) - 1):
        for event in range(offsets[t], offsets[t + 1]):
            column = column_of[pixels[event]]
            if column >= 0:
                count = events[event]
                if count > limit:
                    alive[column] = 0
                counts[t, column] = count * alive[column]


def products(a: NDArray[Any], b: NDArray[Any], largest: float) -> NDArray[np.int64]:
    """Return the sums over pixels of the products of each row of a (k, n) with each of b (m, n), (k, m).

    Parameters
    ----------
    a, b
        Whole numbers from 0 to `largest`; all sums of them are below 2**62.
    """
    if largest >= 2**26:
        (a1, a0), (b1, b0) = np.divmod(a, HALF), np.divmod(b, HALF)
        most = max(largest // HALF, HALF - 1)
        mixed = products(a1, b0, most) + products(a0, b1, most)
        return (products(a1, b1, most) << 32) + (mixed << 16) + products(a0, b0, most)
    square = max(int(largest) ** 2, 1)
    kind, exact = (np.float32, SINGLE) if SINGLE // square >= FEWEST else (np.float64, DOUBLE)
    width = min(exact // square, COLUMNS)
    total = np.zeros((len(a), len(b)), np.int64)
    for begin in range(0, a.shape[1], width):
        of_a: NDArray[np.floating[Any]] = a[:, begin : begin + width].astype(kind, copy=False)
        of_b: NDArray[np.floating[Any]] = of_a if a is b else b[:, begin : begin + width].astype(kind, copy=False)
        total += (of_a @ of_b.T).astype(np.int64)
    return total
