"""Frames of few photons as events, straight from the bytes of bitshuffle and LZ4: dark pixels never reach memory.

The Bitshuffle filter of HDF5, and "bslz4" of Dectris, cut a frame into blocks of 8192 bytes and the blocks into bit
planes, of which all but the lowest are dark where photons are few. `bslz4_to_sparse` finds the pixels in the planes.
"""

import struct
from typing import Any

import numpy as np
from bslz4_to_sparse import CODEC_LZ4, block_starts, chunk2sparse
from numpy.typing import NDArray

from stream.ingest.dectris_messages import Pixels
from stream.messages import Events

DTYPES = ("<u2", "<u4")
"""Of bytes, the dense way is the faster one however few the photons are."""

BLOCK = 8192
"""Bytes of a block, as every writer leaves it to be; other frames are decompressed as ever."""

LIT = 1 / 40
"""Of the pixels, where both ways to correlate take as long."""

BORDER = 0.8
"""Below so much of this, bright frames have become dim: operators would suffer if ways changed all the time."""


def is_dim(image: Pixels, counts: NDArray[np.unsignedinteger[Any]], limit: int, *, before: bool) -> bool:
    """Tell whether `Photons` is the faster way to correlate frames like this one.

    Parameters
    ----------
    image, counts
        The frame, compressed and not.
    limit
        The largest value that is a count.
    before
        What the last ones were; True of none.
    """
    most = LIT * counts.size * (1 if before else BORDER)
    return _is_legible(image) and bool(np.count_nonzero((counts > 0) & (counts <= limit)) <= most)


class Photons:
    """Frames that follow each other, as events.

    Pixels that are masked or overflown in the first frame are events of that one only: there they leave the run, and
    in every frame they would be most of its events.

    Parameters
    ----------
    first
        The first frame, (rows, columns), of one of `DTYPES`.
    limit
        The largest value that is a count.
    """

    def __init__(self, first: NDArray[np.unsignedinteger[Any]], limit: int) -> None:
        self._shape, self._dtype = first.shape, first.dtype
        self._live = (first <= limit).view(np.uint8)
        self._collect = chunk2sparse(self._live, first.dtype, codec=CODEC_LZ4)
        self._frames = [_lit(first)]

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._frames)

    def fits(self, image: Pixels) -> bool:
        """Tell whether `append` can take it: a frame of the same shape and dtype, in blocks of bitshuffle and LZ4."""
        return (image.shape, image.dtype) == (self._shape, self._dtype.str) and _is_legible(image)

    def append(self, image: Pixels) -> None:
        """Take the next frame, which `fits`.

        Raises
        ------
        DecodeError
            The compressed bytes are damaged; nothing has changed.
        """
        try:
            block_starts([image.data], self._dtype)  # else bytes too many at the end are taken for pixels
            n, (counts, pixels) = self._collect(image.data, 0)
            frame = pixels[:n].copy(), counts[:n].copy()
        except Exception as error:
            if type(error) is not Exception:  # what it raises of bytes that it refuses has no other name
                raise
            frame = _lit(image.decompress() * self._live)
        self._frames.append(frame)

    def frames(self) -> Events:
        """Return the frames."""
        pixels, counts = zip(*self._frames, strict=True)
        return Events(
            shape=(len(self), *self._shape),
            offsets=np.cumsum([0, *map(len, pixels)], dtype=np.int64),
            pixels=np.concatenate(pixels),
            counts=np.concatenate(counts),
        )


def _lit(frame: NDArray[np.unsignedinteger[Any]]) -> tuple[NDArray[np.uint32], NDArray[np.unsignedinteger[Any]]]:
    """Return the pixels that are not dark, and their counts."""
    flat = frame.reshape(-1)
    pixels = np.flatnonzero(flat != 0)
    return pixels.astype(np.uint32), flat[pixels]


def _is_legible(image: Pixels) -> bool:
    framed = struct.pack(">QI", image.nbytes, BLOCK)
    return image.codec == "bslz4" and image.dtype in DTYPES and bytes(image.data[: len(framed)]) == framed
