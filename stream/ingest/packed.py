"""Frames as their detector compressed them, taken on without being decompressed."""

import numpy as np

from stream import blocks
from stream.ingest.dectris_messages import Pixels
from stream.messages import DTYPES, Chunks


def is_packable(image: Pixels) -> bool:
    """Tell whether an image can become part of `Chunks`, and its blocks add up."""
    if image.codec != "bslz4" or image.dtype not in DTYPES:
        return False
    try:
        chunks = _chunks([image])
        blocks.check(chunks)
        blocks.places(chunks)
    except ValueError:
        return False
    return True


class Packed:
    """Frames that follow each other.

    Parameters
    ----------
    first
        The first one, which `is_packable`.
    """

    def __init__(self, first: Pixels) -> None:
        self._images = [first]

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._images)

    def fits(self, image: Pixels) -> bool:
        """Tell whether `append` can take it: a frame of the same kind, in blocks of the same size."""
        return _kind(image) == _kind(self._images[0]) and is_packable(image)

    def append(self, image: Pixels) -> None:
        """Take the next frame, which `fits`."""
        self._images.append(image)

    def frames(self) -> Chunks:
        """Return the frames."""
        return _chunks(self._images)


def _chunks(images: list[Pixels]) -> Chunks:
    return Chunks(
        shape=(len(images), *images[0].shape),
        dtype=np.dtype(images[0].dtype),
        chunks=tuple(image.data for image in images),
    )


def _kind(image: Pixels) -> tuple[object, ...]:
    return image.shape, image.dtype, bytes(image.data[: blocks.HEADER.size])
