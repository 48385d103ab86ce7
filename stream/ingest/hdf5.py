"""Frames from HDF5 files: NeXus (`/entry/data/data`), DECTRIS EIGER master files, APS 8-ID raw and metadata files."""

import logging
import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby, product
from pathlib import Path
from typing import Any, Self

import h5py
import hdf5plugin  # noqa: F401  (importing it registers the filters)
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, DecodeError, SourceError
from stream.ingest import nexus
from stream.ingest.dectris_messages import Pixels
from stream.ingest.packed import Packed, is_packable
from stream.ingest.photons import Photons, is_dim
from stream.ingest.position import frame_at, place_of
from stream.messages import Chunks, ExitStatus, FrameBatch, Frames, Give, Message, Position, Rejected, RunStop
from stream.wire import MAX_FRAME_BYTES, MAX_LENGTH

logger = logging.getLogger(__name__)

MAX_READ_BYTES = 2**30
"""No more frames are read at once than fit into this, however large the chunks of the file are."""

BITSHUFFLE, LZ4 = 32008, 2
"""The filter's number at the HDF Group, and its compression parameter."""

_UNREADABLE = (OSError, RuntimeError, ValueError, DecodeError)

_Stretch = tuple[int, Frames | str]
"""How many frames that follow each other, and they, or what is wrong with them."""


class Hdf5Source:
    """The frames of one file, as a `stream.protocols.Source` that can seek.

    Parameters
    ----------
    path
        The file: NeXus, EIGER master, APS raw.
    metadata
        An APS metadata file, whose entries win over those of `path`. None: ``<stem>_metadata.hdf`` beside `path`, if
        there is one.
    dataset
        Where the frames are, (n, rows, columns). None: ``/entry/data/data_000001`` and following, which EIGER master
        files link, else ``/entry/data/data``.
    batch
        Frames per `FrameBatch`, rounded to whole chunks of the file so that each is decompressed once.
    frame_time
        Start to start of frames (s). None: as the file says.
    give
        What becomes of frames stored one by one with bitshuffle and LZ4, as EIGERs do. "photons" lets batches of which
        the first is dim come as `stream.messages.Events`, see `stream.ingest.photons`. For operators only: others of a
        batch do not tell again which pixels are masked or overflown in its first frame. "chunks" lets batches of which
        all are well-formed come as `stream.messages.Chunks`, where no mask is left to us to apply.

    Raises
    ------
    ConfigError
        The frames, or frame_time, are not to be found.
    SourceError
        The file is not there, is damaged or no HDF5 file, or does not hold frames of integers of 8, 16 or 32 bit.

    Notes
    -----
    Signed counts are taken as unsigned ones of the same size, with the largest signed value as `saturation_value`: what
    was negative (a gap or a bad pixel, as PILATUS marks them) is then masked.

    Frames of an EIGER master file are as in the detector's stream (`stream.ingest.dectris`): pixels that are masked or
    overflown have the largest value of the dtype, also where the detector left it to us to apply its mask.

    Frames that cannot be read, or were never written (HDF5 would fill in zeros), are `Rejected`, so they show as lost.

    A master file names every data file that was planned. Files missing at its end are taken for those of an aborted
    run: it is read as far as it goes, and ends with "abort". A missing file with others after it is a SourceError: it
    exists somewhere, and a result without it would look like a good one.

    `FrameBatch.timestamp_ns` follows from ``start_time`` (local time if it names no zone) and frame_time, else from the
    file's modification time.
    """

    def __init__(
        self,
        path: Path,
        *,
        metadata: Path | None = None,
        dataset: str | None = None,
        batch: int = 64,
        frame_time: float | None = None,
        give: Give = "frames",
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch is {batch}, must be at least 1")
        try:
            with ExitStack() as files:
                file = files.enter_context(_open(path))
                datasets, self._is_complete = _datasets(file, path, dataset)
                said = nexus.describe(file)
                beside = metadata or path.with_name(f"{path.stem}_metadata.hdf")
                if metadata or beside.exists():
                    with _open(beside) as other:
                        said |= nexus.describe(other)
                self._blocks = [_Block(d) for d in datasets]
                self._offsets: list[int] = np.cumsum([0, *(len(d) for d in datasets)]).tolist()
                self._n_frames = self._offsets[-1]
                shape, dtype = datasets[0].shape[1:], datasets[0].dtype
                self._start = nexus.run_start(path, said, shape, dtype, self._n_frames, frame_time)
                self._start_ns = nexus.start_ns(path, said)
                self._masked = nexus.masked_pixels(file, shape)
                self._files = files.pop_all()
        except (OSError, RuntimeError, KeyError, ValueError) as error:  # as h5py finds the file damaged
            raise SourceError(f"{path} is damaged: {error}") from error
        self._batch = min(batch, MAX_LENGTH) if give == "chunks" else batch
        self._give = give
        limit = self._start.saturation_value
        self._limit = np.iinfo(self._start.dtype).max if limit is None else limit
        self._was_dim = True
        self._next = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    def __iter__(self) -> Iterator[Message]:
        """Yield RunStart, FrameBatches (and Rejected), RunStop."""
        if self._next < 0:
            self._next = 0
            yield self._start
        while self._next < self._n_frames:
            yield from self._read()
        if self._next == self._n_frames:
            self._next += 1
            exit_status: ExitStatus = "success" if self._is_complete else "abort"
            yield RunStop(run=self._start.run, n_frames=self._n_frames, exit_status=exit_status)

    def position(self) -> Position:
        """Return the run and its next frame: -1 before the RunStart, one more than it has after the RunStop."""
        return {place_of(self._start.run): self._next}

    def seek(self, position: Position) -> None:
        """Go to a `position`; an empty one is the beginning.

        Raises
        ------
        SourceError
            It is that of another source, or the file has no such frame.
        """
        self._next = frame_at(position, self._start.run, self._n_frames)

    def _read(self) -> Iterator[Message]:
        """Read to the end of a batch and yield the good frames, and one Rejected for each stretch of bad ones."""
        begin = self._next
        which = bisect_right(self._offsets, begin) - 1
        block, row = self._blocks[which], begin - self._offsets[which]
        step = block.step(self._batch)
        n = min(step - row % step, block.n_frames - row)
        for size, frames in self._stretches(block, row, n):
            first, self._next = self._next, self._next + size
            if isinstance(frames, str):
                yield Rejected(reason=f"{block.name}: frames {first} to {self._next - 1}: {frames}")
            else:
                timestamp_ns = self._start_ns + round(first * self._start.frame_time * 1e9)
                yield FrameBatch(run=self._start.run, first=first, frames=frames, timestamp_ns=timestamp_ns)

    def _stretches(self, block: "_Block", row: int, n: int) -> Iterator[_Stretch]:
        if (packed := self._packed(block, row, n)) is not None:
            yield n, packed
        elif (photons := self._dim(block, row)) is not None:
            yield from self._photons(block, row, n, photons)
        else:
            yield from self._rows(block, row, n)

    def _packed(self, block: "_Block", row: int, n: int) -> Chunks | None:
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

    def _rows(self, block: "_Block", row: int, n: int) -> Iterator[_Stretch]:
        frames = block.room(n)
        problems = block.read(row, frames)
        counts = frames.view(self._start.dtype)
        counts.reshape(n, -1)[:, self._masked] = np.iinfo(counts.dtype).max
        counts.flags.writeable = False
        end = 0
        for problem, stretch in groupby(problems):
            begin, end = end, end + len(list(stretch))
            yield end - begin, counts[begin:end] if problem is None else problem

    def _dim(self, block: "_Block", row: int) -> Photons | None:
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

    def _photons(self, block: "_Block", row: int, n: int, photons: Photons) -> Iterator[_Stretch]:
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


class _Block:
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


def _open(path: Path) -> h5py.File:
    try:
        # A reader's lock could make the detector's own writer fail.
        return h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read as HDF5: {error}") from error


def _datasets(file: h5py.File, path: Path, name: str | None) -> tuple[list[h5py.Dataset], bool]:
    """Return the datasets that hold the frames, in order, and whether they are all that the file names."""
    data = file.get("/entry/data")
    linked = [k for k in data if re.fullmatch(r"data_\d+", k)] if isinstance(data, h5py.Group) else []
    linked.sort(key=lambda k: int(k.removeprefix("data_")))
    names = [name] if name else [f"/entry/data/{k}" for k in linked] or ["/entry/data/data"]
    absent = [_absent_file(file, path, n) for n in names]
    present = [n for n, absent_file in zip(names, absent, strict=True) if absent_file is None]
    if not present or present != names[: len(present)]:
        raise SourceError(f"{path} needs {next(filter(None, absent))}, which is not there")
    if len(present) < len(names):
        logger.warning("%s: an aborted run? Its data files from %s on are not there", path, absent[len(present)])
    datasets = [_dataset(file, path, n) for n in present]
    frame = (datasets[0].shape[1:], datasets[0].dtype)
    for dataset, n in zip(datasets, present, strict=True):
        if (dataset.shape[1:], dataset.dtype) != frame:
            raise SourceError(f"{path}: frames of {n} are {dataset.shape[1:]} {dataset.dtype}, those before {frame}")
    return datasets, present == names


def _absent_file(file: h5py.File, path: Path, name: str) -> str | None:
    """Return the file that the external link `name` leads to, if it is not there."""
    link = file.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink) and not (path.parent / link.filename).exists():
        return str(link.filename)
    return None


def _dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
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
