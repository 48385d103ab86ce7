"""How frames stand in a dataset of an HDF5 file, and how they are taken out. No file is named here by itself."""

import math
from collections.abc import Iterator
from itertools import groupby, product
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  (importing it registers the filters)
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, DecodeError, SourceError
from stream.ingest.dectris_messages import Pixels
from stream.ingest.packed import Packed, is_packable
from stream.ingest.photons import Photons, is_dim
from stream.messages import Chunks, Frames, Give, RunStart
from stream.wire import MAX_FRAME_BYTES

MAX_READ_BYTES = 2**30
"""No more frames are read at once than fit into this, however large the chunks of the file are."""

BITSHUFFLE, LZ4 = 32008, 2
"""The filter's number at the HDF Group, and its compression parameter."""

_UNREADABLE = (OSError, RuntimeError, ValueError, DecodeError)

Stretch = tuple[int, Frames | str]
"""How many frames that follow each other, and they, or what is wrong with them."""


class Unpacking:
    """Takes frames out of the blocks of one run, as NDArrays, `Events` or `Chunks`.

    Parameters
    ----------
    start
        Of the run.
    masked
        Flat indices of the pixels that the detector left to us to mask.
    give
        See `stream.ingest.hdf5.Hdf5Source`.
    """

    def __init__(self, start: RunStart, masked: NDArray[np.intp], give: Give) -> None:
        self._dtype, self._masked, self._give = start.dtype, masked, give
        limit = start.saturation_value
        self._limit = np.iinfo(start.dtype).max if limit is None else limit
        self._was_dim = True

    def stretches(self, block: "Block", row: int, n: int) -> Iterator[Stretch]:
        """Yield frames `row` and on of a block: the good ones, and a text for each stretch of bad ones."""
        if (packed := self._packed(block, row, n)) is not None:
            yield n, packed
        elif (photons := self._dim(block, row)) is not None:
            yield from self._photons(block, row, n, photons)
        else:
            yield from self._rows(block, row, n)

    def _packed(self, block: "Block", row: int, n: int) -> Chunks | None:
        """Return n frames as they are stored, if they can be taken on so."""
        if not (self._give == "chunks" and block.is_bslz4 and not self._masked.size):
            return None
        try:
            images = [block.image(i) for i in range(row, row + n)]
        except _UNREADABLE:
            return None
        if not is_packable(images[0]):
            return None
        packed = Packed(images[0])
        for image in images[1:]:
            if not packed.fits(image):
                return None
            packed.append(image)
        return packed.frames()

    def _rows(self, block: "Block", row: int, n: int) -> Iterator[Stretch]:
        frames = block.room(n)
        problems = block.read(row, frames)
        counts = frames.view(self._dtype)
        counts.reshape(n, -1)[:, self._masked] = np.iinfo(counts.dtype).max
        counts.flags.writeable = False
        end = 0
        for problem, stretch in groupby(problems):
            begin, end = end, end + len(list(stretch))
            yield end - begin, counts[begin:end] if problem is None else problem

    def _dim(self, block: "Block", row: int) -> Photons | None:
        """Return frame `row` as the first of a batch of photons, if that pays."""
        if not (self._give == "photons" and block.is_bslz4):
            return None
        try:
            image = block.image(row)
            counts = self._decompress(image)
        except _UNREADABLE:
            return None
        self._was_dim = is_dim(image, counts, self._limit, before=self._was_dim)
        return Photons(counts, self._limit) if self._was_dim else None

    def _photons(self, block: "Block", row: int, n: int, photons: Photons) -> Iterator[Stretch]:
        found: list[Photons | str] = [photons]
        for i in range(row + 1, row + n):
            last = found[-1]
            try:
                image = block.image(i)
                if isinstance(last, Photons) and last.fits(image):
                    last.append(image)
                    found.append(last)
                else:
                    found.append(Photons(self._decompress(image), self._limit))
            except _UNREADABLE as error:
                found.append(str(error))
        for one, stretch in groupby(found):
            yield len(list(stretch)), one if isinstance(one, str) else one.frames()

    def _decompress(self, image: Pixels) -> NDArray[np.unsignedinteger[Any]]:
        counts = image.decompress().copy()
        counts.reshape(-1)[self._masked] = np.iinfo(counts.dtype).max
        return counts


class Block:
    """Frames that follow each other in one dataset, read chunk by chunk."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.name = f"{dataset.file.filename} {dataset.name}"
        self.n_frames, self._rows, self._columns = dataset.shape
        self._dataset = dataset
        self._chunks = dataset.chunks or dataset.shape
        self._has_gaps = dataset.chunks is not None and dataset.id.get_num_chunks() < _n_chunks(dataset)
        self.is_bslz4 = _is_bslz4_by_frame(dataset)

    def step(self, batch: int) -> int:
        """Return `batch`, rounded to whole chunks, or fewer frames if they are large."""
        chunk = self._chunks[0] if self._dataset.chunks else 1
        frame_bytes = self._dataset.dtype.itemsize * self._rows * self._columns
        return int(min(chunk * max(1, batch // chunk), max(1, MAX_READ_BYTES // frame_bytes)))

    def room(self, n: int) -> NDArray[np.integer[Any]]:
        """Return room for n frames."""
        return np.empty((n, self._rows, self._columns), self._dataset.dtype.newbyteorder("<"))

    def read(self, first: int, frames: NDArray[np.integer[Any]]) -> list[str | None]:
        """Fill `frames` from frame `first` on, and return for each what is wrong with it."""
        problems: list[str | None] = []
        while (begin := len(problems)) < len(frames):
            row = first + begin
            end = min(len(frames), begin + self._chunks[0] - row % self._chunks[0])
            problems += [self._read_chunk(row, frames[begin:end])] * (end - begin)
        return problems

    def image(self, row: int) -> Pixels:
        """Return a frame as it is stored, where `is_bslz4`."""
        self._check_written(row)
        filter_mask, chunk = self._dataset.id.read_direct_chunk((row, 0, 0))
        return Pixels(
            shape=(self._rows, self._columns),
            dtype=self._dataset.dtype.str.replace("i", "u"),
            codec="none" if filter_mask else "bslz4",
            data=chunk,
        )

    def never_written(self) -> NDArray[np.bool_]:
        """Return for each frame whether there is nothing of it, or of a part of it."""
        missing = np.zeros(self.n_frames, np.bool_)
        if self._has_gaps:
            depth, *tile = self._chunks
            per_row = math.prod(-(-n // c) for n, c in zip((self._rows, self._columns), tile, strict=True))
            written = np.zeros(-(-self.n_frames // depth), np.int64)

            def count(chunk: Any) -> None:
                written[chunk.chunk_offset[0] // depth] += 1

            self._dataset.id.chunk_iter(count)
            missing = np.repeat(written < per_row, depth)[: self.n_frames]
        return missing

    def _read_chunk(self, row: int, frames: NDArray[np.integer[Any]]) -> str | None:
        try:
            if self.is_bslz4:
                frames[0] = self.image(row).decompress()
            else:
                self._check_written(row)
                self._dataset.read_direct(frames, np.s_[row : row + len(frames)])
        except _UNREADABLE as error:
            return str(error)
        return None

    def _check_written(self, row: int) -> None:
        if not self._has_gaps:
            return
        depth, *tile = self._chunks
        corners = product(*(range(0, n, c) for n, c in zip((self._rows, self._columns), tile, strict=True)))
        chunks = (self._dataset.id.get_chunk_info_by_coord((row - row % depth, *corner)) for corner in corners)
        if any(chunk.byte_offset is None for chunk in chunks):
            raise DecodeError("never written")


def _n_chunks(dataset: h5py.Dataset) -> int:
    return math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))


def _is_bslz4_by_frame(dataset: h5py.Dataset) -> bool:
    """Tell whether chunks are frames of bslz4, which `dectris.compression` decodes twice as fast as the filter."""
    if dataset.chunks != (1, *dataset.shape[1:]):
        return False
    filters = dataset.id.get_create_plist()
    if filters.get_nfilters() != 1:
        return False
    code, _, values, _ = filters.get_filter(0)
    return bool(code == BITSHUFFLE and values[4:5] == (LZ4,))


def open_file(path: Path, *, grows: bool = False) -> h5py.File:
    """Open a file to read, one that `grows` as far as its writer lets us see it.

    Raises
    ------
    SourceError
        It is not there, or no HDF5 file.
    """
    try:
        # A reader's lock could make the detector's own writer fail.
        return h5py.File(path, "r", locking=False, swmr=grows)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read as HDF5: {error}") from error


def dataset_of(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    """Return a dataset of frames.

    Raises
    ------
    ConfigError
        There is none of that name.
    SourceError
        It does not hold frames that can be read.
    """
    try:
        dataset = file[name]
    except (KeyError, OSError) as error:
        raise ConfigError(
            f"{path}: no frames at {name}; say where they are with source.dataset in the configuration file ({error})"
        ) from error
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 3:
        raise SourceError(f"{path}: {name} is not a dataset of (n, rows, columns): {dataset}")
    if dataset.dtype.kind not in "ui" or dataset.dtype.itemsize > 4:
        raise SourceError(f"{path}: {name} is {dataset.dtype}; counts are integers of 8, 16 or 32 bit")
    if not 0 < dataset.dtype.itemsize * math.prod(dataset.shape[1:]) <= MAX_FRAME_BYTES:
        raise SourceError(f"{path}: frames of {name} are {dataset.shape[1:]}; at most {MAX_FRAME_BYTES} bytes each")
    for source in dataset.virtual_sources() if dataset.is_virtual else ():
        # HDF5 would fill in zeros without a word. "." is the file itself; "%b" counts up in a series of files.
        if not (source.file_name == "." or "%" in source.file_name or (path.parent / source.file_name).exists()):
            raise SourceError(f"{path}: {name} needs {source.file_name}, which is not there")
    return dataset
