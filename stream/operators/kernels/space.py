"""What one thread works in, of the size of its caches rather than of the detector."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.operators.kernels.layout import (
    BLOCK,
    CHUNK,
    HIGHEST,
    LANES,
    MOST,
    PAD,
    ROOM,
    STRIPS,
    TILE,
    History,
    Region,
    Sums,
    aligned,
    slots,
)


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


class Photons(NamedTuple):
    """The photons of a tile in a span of frames, pixel by pixel in order of time; see `sparse`."""

    begin: NDArray[np.uint64]
    """(TILE + 1,) first photon of each pixel, and one past the last."""
    frame: NDArray[np.uint32]
    """(ROOM,) from the begin of the span."""
    counts: NDArray[np.uint32]
    """(ROOM,)"""
    total: NDArray[np.int32]
    """(TILE,) counts of each pixel."""
    place: NDArray[np.uint32]
    """(HIGHEST, 2d + 2) where in `Chunks.sums` the sum of a level and delay stands; that of no delay is never read."""
    level: NDArray[np.uint8]
    """(2, 2d * 2**HIGHEST) the lowest level with a delay for a distance in frames, and one past the highest."""


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
    photons: Photons
    tally: NDArray[np.int64]
    """(2,) the bits of all counts; how many pixels left."""
    bound: NDArray[np.float64]
    """(1,) at most this was added to any of `Sums.narrow`."""


class State(NamedTuple):
    """What a thread updates."""

    region: Region
    history: History
    sums: Sums
    space: WorkSpace


def work_space(delays_per_level: int, n_level: int) -> WorkSpace:
    """Return the `WorkSpace` of one thread."""
    span = PAD + 2 * delays_per_level + BLOCK + 2
    shifts = aligned(n_level * LANES, np.int32)
    shifts.reshape(n_level, LANES)[:, CHUNK:] = np.arange(n_level)[:, None]
    return WorkSpace(
        taken=np.empty(STRIPS * BLOCK * LANES, np.uint16),
        bits=aligned(STRIPS * LANES, np.int32),
        fine=aligned(span * LANES, np.int32),
        coarse=aligned(span * LANES, np.int32),
        spare=aligned(span * LANES, np.int32),
        counts=np.empty((3, span, LANES), np.int64),
        chunks=Chunks(
            sums=aligned(MOST * LANES * LANES, np.int32),
            slot=np.zeros(MOST, np.int64),
            level=np.zeros(MOST, np.int64),
            shifts=shifts,
            n=np.zeros(1, np.int64),
        ),
        photons=_photons(delays_per_level),
        tally=np.zeros(2, np.int64),
        bound=np.zeros(1),
    )


def _photons(d: int) -> Photons:
    # Products of no delay go to a spare sum.
    place = np.full((HIGHEST, 2 * d + 2), LANES - 1, np.uint32)
    for level in range(HIGHEST):
        for k in range(1 if level == 0 else d + 1, 2 * d + 1):
            group = 0 if level == 0 and k <= d else level + 1
            chunk, j = divmod((k - 1) % d, CHUNK)
            place[level, k] = (group * slots(d) // LANES + chunk) * LANES * LANES + j
    distance, levels = np.arange((2 * d + 1) << HIGHEST - 1), np.arange(HIGHEST)[:, None]
    lowest = (distance >> levels > 2 * d).sum(axis=0)
    end = (distance >= d << levels)[1:].sum(axis=0) + 1
    return Photons(
        begin=np.zeros(TILE + 1, np.uint64),
        frame=np.empty(ROOM, np.uint32),
        counts=np.empty(ROOM, np.uint32),
        total=aligned(TILE, np.int32),
        place=place,
        level=np.stack([lowest, np.maximum(lowest, end)]).astype(np.uint8),
    )
