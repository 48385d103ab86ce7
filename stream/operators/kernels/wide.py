"""Sums of products that never round: integers of two limbs, ``high * 2**62 + low`` with 0 <= low < 2**62.

Counts are integers, so every sum that makes g2 is one. Kept exactly, it does not depend on the order of addition: the
same bits for any batch size, any number of threads, any split into regions, and after any restart. The radix is 2**62
rather than 2**64 so that everything stays in signed 64-bit integers, which numba and numpy handle alike.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

BITS = 62
MASK = (1 << BITS) - 1
HALF = BITS // 2
HALF_MASK = (1 << HALF) - 1

Wide = NDArray[np.int64]
"""(2, ...): high limbs, low limbs."""


@njit(nogil=True, cache=True, inline="always")
def add(wide: Any, i: Any, j: Any, value: Any) -> None:
    """Add 0 <= value < 2**62 to the number at [:, i, j]."""
    low = wide[1, i, j] + value
    wide[0, i, j] += low >> BITS
    wide[1, i, j] = low & MASK


@njit(nogil=True, cache=True, inline="always")
def add_product(wide: Any, i: Any, j: Any, a: Any, b: Any) -> None:
    """Add a * b, both 0 <= x < 2**62, to the number at [:, i, j]."""
    a1, a0 = a >> HALF, a & HALF_MASK
    b1, b0 = b >> HALF, b & HALF_MASK
    middle = a1 * b0 + a0 * b1
    low = wide[1, i, j] + a0 * b0
    wide[0, i, j] += a1 * b1 + (middle >> HALF) + (low >> BITS)
    low = (low & MASK) + ((middle & HALF_MASK) << HALF)
    wide[0, i, j] += low >> BITS
    wide[1, i, j] = low & MASK


def total(wide: Wide, axis: int) -> Wide:
    """Sum along an axis (not the first; at most 2**31 terms): (2, ...) with that axis gone."""
    # Two halves of the low limbs are summed apart, since only two whole ones fit into 63 bits.
    low = (wide[1] & HALF_MASK).sum(axis - 1)
    middle = (wide[1] >> HALF).sum(axis - 1) + (low >> HALF)
    high = wide[0].sum(axis - 1) + (middle >> HALF)
    result: Wide = np.stack([high, ((middle & HALF_MASK) << HALF) | (low & HALF_MASK)])
    return result


def difference(wide: Wide, less: Wide) -> Wide:
    """Subtract one from another that is not smaller."""
    low = wide[1] - less[1]
    result: Wide = np.stack([wide[0] - less[0] + (low >> BITS), low & MASK])
    return result


def to_float(wide: Wide) -> NDArray[np.float64]:
    """Return the nearest doubles, within one rounding of each limb."""
    result: NDArray[np.float64] = np.ldexp(wide[0].astype(np.float64), BITS) + wide[1]
    return result
