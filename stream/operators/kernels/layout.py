"""How the pixels of a region, a block of frames and the sums over them lie in memory: what the kernels agree on.

Pixels are read in tiles of `TILE` neighbours, which is kind to memory, and worked on in strips of `LANES`, which is
kind to the first cache. A row is what a strip holds of one frame or coarse frame: one vector. Rows follow in time:

            strip                        next strip
    row 0   p0 p1 ... p15        row 0   p16 p17 ... p31     ...
    row 1   p0 p1 ... p15        row 1   p16 p17 ... p31
    ...                          ...

The state of a level is its last coarse frames. Level 0 keeps 2d of them. The others keep d + 1, the oldest of their
last 2d: the newer ones are sums of two that the level below still keeps. A count is spread over three planes of 8, 8
and 32 bits, of which a strip only touches those that it needs; the operating system gives no memory for the others.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.operators.kernels.jit import kernel
from stream.operators.kernels.lanes import LANES as LANES

STRIPS = 16
"""Strips of a tile."""

TILE = STRIPS * LANES
"""Pixels read together: with `BLOCK` rows of 4 bytes they take a quarter of an L2 cache of 1 MiB."""

BLOCK = 256
"""Frames worked on together at most: as rows of a strip they take 16 of 32 KiB of L1."""

CHUNK = 4
"""Delays worked on together, three sums each: with as many spare ones they are the LANES rows of a transposition."""

PAD = CHUNK - 1
"""Rows before the first of a strip that may be read, for delays of a chunk beyond the last."""


MOST = 12
"""Chunks whose sums are kept before they are added to the bins: 4 delays per level make 10 of a full block."""

CACHE_LINE = 64
"""Bytes."""

HIGHEST = 9
"""The level up to which few photons are looked at one by one."""

ROOM = 1 << 16
"""Photons at most of a tile that are."""


def aligned(n: int, dtype: type[Any]) -> NDArray[Any]:
    """Return n zeros that begin where a vector may: one that straddles two cache lines takes twice as long."""
    itemsize = np.dtype(dtype).itemsize
    raw = np.zeros(n + CACHE_LINE // itemsize, dtype)
    begin = -raw.ctypes.data % CACHE_LINE // itemsize
    return raw[begin : begin + n]


class Region(NamedTuple):
    """The pixels."""

    first: NDArray[np.int64]
    """(n_tile,) first pixel of each tile."""
    tile: NDArray[np.int32]
    """(n,) the tile of each `TILE` pixels of a frame, also the incomplete ones at its end; -1 if they are in none."""
    live: NDArray[np.uint8]
    """(n_tile * TILE,) 1 where a pixel counts; updated when one leaves."""
    left: NDArray[np.uint16]
    """(n_tile * TILE,) one more than the frame of the block in which a pixel leaves; updated."""
    runs: NDArray[np.int64]
    """(n_strip + 1,) the runs of strip i are runs[i]..runs[i+1]-1. All pixels of a run are in one bin."""
    begin: NDArray[np.uint8]
    """(n_run,) first pixel of each run in its strip."""
    end: NDArray[np.uint8]
    """(n_run,) one past the last."""
    bin: NDArray[np.int32]
    """(n_run,)"""


class History(NamedTuple):
    """The last coarse frames of every level."""

    low: NDArray[np.uint8]
    """(see `place`) bits 0..7"""
    middle: NDArray[np.uint8]
    """The same shape: bits 8..15; undefined where kind < 1."""
    high: NDArray[np.uint32]
    """The same shape: bits 16..47; undefined where kind < 2."""
    kind: NDArray[np.uint8]
    """(n_level, n_strip) how many of the upper planes are in use."""


class Block(NamedTuple):
    """Frames first..first+span-1: those that came, or a gap."""

    first: int
    span: int
    addresses: NDArray[np.int64]
    """(n,) where each frame begins; 0 for one that is missing. A gap longer than `BLOCK` has 2d missing ones."""
    lengths: NDArray[np.int64]
    """(n,) events of each frame; (0,) if the frames are not `stream.messages.Events`."""
    pixels: NDArray[np.int64]
    """The same shape: where the pixels of its events begin, 4 bytes each, ascending."""
    counts: NDArray[np.int64]
    """The same shape: where their counts begin."""
    itemsize: int
    """Of the frames: 1, 2 or 4 bytes, unsigned."""
    limit: int
    """The largest value that is a count."""
    weights: NDArray[np.int64]
    """(n_level, row) how many frames came in the 2d coarse frames before the block and in those of it."""
    pairs: NDArray[np.int32]
    """(n_level, row) weight + 2**16 * the next weight."""
    full: NDArray[np.bool_]
    """(n_level,) whether all weights are those of coarse frames with nothing missing."""
    delays_per_level: int


class Sums(NamedTuple):
    """Sums over pixels and pairs, for each bin and slot; each thread has its own."""

    narrow: NDArray[np.int64]
    """(n_bin * n_slot,)"""
    wide: NDArray[np.int64]
    """(2, n_bin, n_slot) what did not fit; see `wide`."""


@kernel
def place(level: int, strip: int, n_strip: int, delays_per_level: int) -> Any:
    """Return where the rows of a strip begin in the planes of `History`; they are followed by those of the next."""
    if level == 0:
        return strip * 2 * delays_per_level * LANES
    rows = delays_per_level + 1
    return ((2 * delays_per_level + (level - 1) * rows) * n_strip + strip * rows) * LANES


@kernel
def slots(delays_per_level: int) -> Any:
    """Return the number of sums of a group: delays 1..d of level 0, or d+1..2d of any level; G2, IP, IF by chunks."""
    return (delays_per_level + CHUNK - 1) // CHUNK * LANES
