"""What one thread works in, of the size of its caches rather than of the detector."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.operators.kernels.jit import kernel
from stream.operators.kernels.layout import BLOCK, CHUNK, LANES, MOST, PAD, STRIPS
from stream.operators.kernels.narrow import aligned


class Chunks(NamedTuple):
    """Sums per pixel of a strip that are not added to the bins yet; each bin is visited once for several of them."""

    sums: NDArray[np.int32]
    """(MOST * LANES * LANES,) of each chunk, pixel by pixel."""
    slot: NDArray[np.int64]
    """(MOST,) where they belong."""
    level: NDArray[np.int64]
    """(MOST,) by how much IP and IF are to be shifted."""
    shifts: NDArray[np.int32]
    """(n_level * LANES,) the same for each lane."""
    n: NDArray[np.int64]
    """(1,) how many there are."""


class WorkSpace(NamedTuple):
    """Of one thread."""

    taken: NDArray[np.uint16]
    """(STRIPS * BLOCK * LANES,) frames of a tile, strip by strip."""
    bits: NDArray[np.int32]
    """(STRIPS * LANES,) those of all frames."""
    fine: NDArray[np.int32]
    """Rows of the lowest level."""
    coarse: NDArray[np.int32]
    """Rows of the next level, in turn with `spare`."""
    spare: NDArray[np.int32]
    counts: NDArray[np.int64]
    """(3, row, LANES) rows of two levels, and sums, where 32 bits are not enough."""
    chunks: Chunks
    tally: NDArray[np.int64]
    """(2,) the bits of all counts; how many pixels left."""
    bound: NDArray[np.float64]
    """(1,) at most this was added to any of `Sums.narrow`."""


@kernel
def work_space(delays_per_level: int, n_level: int) -> Any:
    """Return the `WorkSpace` of one thread."""
    span = PAD + 2 * delays_per_level + BLOCK + 2
    shifts = aligned(n_level * LANES)
    for level in range(n_level):
        for lane in range(CHUNK, LANES):
            shifts[level * LANES + lane] = level
    slot, level_of, n = np.zeros(MOST, np.int64), np.zeros(MOST, np.int64), np.zeros(1, np.int64)
    return WorkSpace(
        np.empty(STRIPS * BLOCK * LANES, np.uint16),
        aligned(STRIPS * LANES),
        aligned(span * LANES),
        aligned(span * LANES),
        aligned(span * LANES),
        np.empty((3, span, LANES), np.int64),
        Chunks(aligned(MOST * LANES * LANES), slot, level_of, shifts, n),
        np.zeros(2, np.int64),
        np.zeros(1, np.float64),
    )
