"""The blocks of a chunk in bitshuffle and LZ4, by which frames are cut without being decompressed.

As the HDF5 filter 32008 writes them, and Dectris detectors send them as "bslz4"; numbers are big-endian::

    8 bytes   bytes of all counts
    4 bytes   bytes of the counts of a block
    blocks    4 bytes: how many follow; the block compressed. The last one is of the counts left, in whole eights
    the end   fewer than 8 counts, as they are

A block depends on no other. So rows need the blocks that they lie in; where they do not begin with one, counts before
them come along (`stream.messages.Chunks.skip`). The counts at the end belong to the last block here.

Source: https://github.com/kiyo-masui/bitshuffle (bshuf_h5filter.c, bitshuffle.c).
"""

import math
import struct
from collections.abc import Iterable, Iterator

import numpy as np
from bslz4_to_sparse import block_starts
from numpy.typing import NDArray

from stream.messages import DTYPES, Chunks

HEADER = struct.Struct(">QI")
"""Bytes of all counts, bytes of a block."""

MAX_BLOCK_BYTES = 2**20
"""Writers have 8 KiB."""

MOST = 255
"""How many times its size LZ4 makes of a chunk at most."""


def check(frames: Chunks) -> None:
    """Check that chunks are frames as far as their headers tell, so that they can be decompressed in bounded memory.

    Raises
    ------
    ValueError
        Names what is wrong and its value.
    """
    n, rows, columns = frames.shape
    itemsize = frames.dtype.itemsize
    if len(frames.chunks) != n or frames.dtype.str not in DTYPES:
        raise ValueError(f"{len(frames.chunks)} chunks of {frames.dtype.str} are not those of {n} frames")
    if not n:
        return
    headers = {bytes(chunk[: HEADER.size]) for chunk in frames.chunks}
    shortest = min(map(len, frames.chunks))
    if len(headers) != 1 or shortest < HEADER.size:
        raise ValueError(f"chunks with {len(headers)} kinds of header, the shortest of {shortest} bytes")
    size, block = HEADER.unpack(headers.pop())
    if not 0 < block <= MAX_BLOCK_BYTES or block % (8 * itemsize):
        raise ValueError(f"chunks of {frames.dtype.str} in blocks of {block} bytes")
    if not 0 <= frames.skip * itemsize < block:
        raise ValueError(f"skip = {frames.skip} counts in blocks of {block} bytes")
    end = (frames.skip + rows * columns) * itemsize
    if not end <= size <= math.ceil(end / block) * block or size % itemsize:
        raise ValueError(f"chunks of {size} bytes, where counts end at {end} in blocks of {block}")
    if size > MOST * shortest:
        raise ValueError(f"chunks of {size} bytes cannot be packed into {shortest}")


def bands(frames: Chunks, rows: Iterable[tuple[int, int]]) -> Iterator[Chunks]:
    """Yield the rows begin..end-1 of frames, for all (begin, end).

    Raises
    ------
    ValueError
        The blocks of a chunk do not add up to it.
    """
    size, block = HEADER.unpack_from(frames.chunks[0])
    n, _, columns = frames.shape
    itemsize = frames.dtype.itemsize
    borders = places(frames)
    for begin, end in rows:
        first = (frames.skip + begin * columns) * itemsize // block
        last = math.ceil((frames.skip + end * columns) * itemsize / block)
        header = HEADER.pack(min(last * block, size) - first * block, block)
        pieces = zip(frames.chunks, borders[:, first].tolist(), borders[:, last].tolist(), strict=True)
        yield Chunks(
            shape=(n, end - begin, columns),
            dtype=frames.dtype,
            skip=frames.skip + begin * columns - first * block // itemsize,
            chunks=tuple(b"".join((header, memoryview(chunk)[of:to])) for chunk, of, to in pieces),
        )


def places(frames: Chunks) -> NDArray[np.int64]:
    """Return where in each chunk its blocks begin and where the last one ends, (n, n_block + 1).

    Raises
    ------
    ValueError
        The blocks of a chunk do not add up to it.
    """
    size, block = HEADER.unpack_from(frames.chunks[0])
    lengths = np.fromiter(map(len, frames.chunks), np.int64)
    found = np.empty((len(frames), math.ceil(size / block) + 1), np.int64)
    try:
        starts = block_starts(frames.chunks, frames.dtype)
    except Exception as error:
        if type(error) is not Exception:  # what it raises of bytes that it refuses has no other name
            raise
        raise ValueError(f"blocks of {block} bytes do not add up to chunks of {lengths.tolist()[:5]} bytes") from None
    found[:, -2] = lengths - size % (8 * frames.dtype.itemsize)  # where there is nothing but the end
    found[:, : starts.shape[1]] = starts
    found[:, -1] = lengths
    sizes = np.minimum(block, size - block * np.arange(found.shape[1] - 1))
    if (MOST * np.diff(found) < sizes).any():
        raise ValueError(f"blocks of {block} bytes that cannot be packed into so few")
    return found
