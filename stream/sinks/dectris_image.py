"""One image as a Dectris detector compresses it."""

from dataclasses import dataclass
from typing import Any, Literal

import h5py
import hdf5plugin
import lz4.block
import numpy as np
from h5py import h5s
from numpy.typing import NDArray

from stream.messages import RunStart

Compression = Literal["bslz4", "lz4", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedImage:
    """What an image message says of one image."""

    number: int
    """Counted from 0."""
    timestamp_ns: int
    """Start of the exposure, ns since the Unix epoch."""
    series_ns: int
    """Start of the series, ns since the Unix epoch."""
    count_time: float
    shape: tuple[int, int]
    """Rows, columns."""
    dtype: str
    compression: Compression
    data: bytes


def planned(start: RunStart) -> int:
    """Return how many images a run will have, which a detector always announces."""
    n_frames = start.metadata.get("n_frames")
    if not isinstance(n_frames, int) or n_frames < 1:
        raise ValueError(f"n_frames = {n_frames!r} is not the number of frames planned")
    return n_frames


def saturation(start: RunStart) -> int:
    """Return the largest value that is a count: detectors keep the one above it for masked and overflown pixels."""
    return int(np.iinfo(start.dtype).max) - 1 if start.saturation_value is None else start.saturation_value


class Compressor:
    """Compress frames one by one.

    bslz4 is what the HDF5 filter bitshuffle (32008) makes of a chunk, which is what detectors send: HDF5 itself makes
    it here, in memory.

    Parameters
    ----------
    compression
        As the detector's setting.
    framed
        Whether lz4 is framed as by the HDF5 filter lz4 (32004), as in Stream V2, or is one bare block, as in V1.
    """

    def __init__(self, compression: Compression, *, framed: bool) -> None:
        self._compression = compression
        self._framed = framed
        # no chunk cache: a write passes the filter at once; the name must be one no other open file has
        self._file = h5py.File(f"compressor-{id(self)}", "w", driver="core", backing_store=False, rdcc_nbytes=0)

    def compress(self, frame: NDArray[np.unsignedinteger[Any]]) -> bytes:
        """Return the bytes of a frame, (rows, columns)."""
        match self._compression:
            case "bslz4":
                return self._bitshuffle(np.ascontiguousarray(frame))
            case "lz4":
                return self._lz4(frame.tobytes())
            case "none":
                return frame.tobytes()

    def _bitshuffle(self, frame: NDArray[np.unsignedinteger[Any]]) -> bytes:
        name = f"{frame.shape} {frame.dtype}"
        if name not in self._file:
            self._file.create_dataset(
                name, frame.shape, frame.dtype, chunks=frame.shape, compression=hdf5plugin.Bitshuffle()
            )
        dataset = self._file[name].id
        dataset.write(h5s.ALL, h5s.ALL, frame)
        _, chunk = dataset.read_direct_chunk((0, 0))
        return bytes(chunk)

    def _lz4(self, counts: bytes) -> bytes:
        block: bytes = lz4.block.compress(counts, store_size=False)
        if not self._framed:
            return block
        if len(block) >= len(counts):
            block = counts  # the filter's way to say "did not compress"
        size = len(counts)
        return size.to_bytes(8, "big") + size.to_bytes(4, "big") + len(block).to_bytes(4, "big") + block

    def close(self) -> None:
        """Free the memory."""
        self._file.close()
