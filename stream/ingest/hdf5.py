"""Frames from HDF5 files: NeXus (`/entry/data/data`), DECTRIS EIGER master files, APS 8-ID raw and metadata files."""

import logging
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import h5py
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, SourceError
from stream.ingest import nexus
from stream.ingest.hdf5_frames import Block, Unpacking, dataset_of, open_file
from stream.ingest.position import frame_at, place_of
from stream.messages import ExitStatus, FrameBatch, Give, Message, Position, Rejected, RunStop
from stream.wire import MAX_LENGTH

logger = logging.getLogger(__name__)


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

    Attributes
    ----------
    is_complete
        Whether all data files are there that the file names.

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
                file = files.enter_context(open_file(path))
                datasets, self._absent = _datasets(file, path, dataset)
                self.is_complete = self._absent is None
                said = nexus.describe(file)
                beside = metadata or path.with_name(f"{path.stem}_metadata.hdf")
                if metadata or beside.exists():
                    with open_file(beside) as other:
                        said |= nexus.describe(other)
                self._blocks = [Block(d) for d in datasets]
                self._offsets: list[int] = np.cumsum([0, *(len(d) for d in datasets)]).tolist()
                self._n_frames = self._offsets[-1]
                shape, dtype = datasets[0].shape[1:], datasets[0].dtype
                self._start = nexus.run_start(path, said, shape, dtype, self._n_frames, frame_time)
                self._start_ns = nexus.start_ns(path, said)
                self._frames = Unpacking(self._start, nexus.masked_pixels(file, shape), give)
                self._files = files.pop_all()
        except (OSError, RuntimeError, KeyError, ValueError) as error:  # as h5py finds the file damaged
            raise SourceError(f"{path} is damaged: {error}") from error
        self._batch = min(batch, MAX_LENGTH) if give == "chunks" else batch
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
            if not self.is_complete:
                logger.warning("an aborted run? Its data files from %s on are not there", self._absent)
            exit_status: ExitStatus = "success" if self.is_complete else "abort"
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

    def never_written(self) -> NDArray[np.int64]:
        """Return the half-open ranges of frames, (n, 2), that were never written; without reading any."""
        missing = np.concatenate([[False], *(block.never_written() for block in self._blocks), [False]])
        return np.flatnonzero(np.diff(missing)).reshape(-1, 2)

    def _read(self) -> Iterator[Message]:
        """Read to the end of a batch and yield the good frames, and one Rejected for each stretch of bad ones."""
        begin = self._next
        which = bisect_right(self._offsets, begin) - 1
        block, row = self._blocks[which], begin - self._offsets[which]
        step = block.step(self._batch)
        n = min(step - row % step, block.n_frames - row)
        for size, frames in self._frames.stretches(block, row, n):
            first, self._next = self._next, self._next + size
            if isinstance(frames, str):
                yield Rejected(reason=f"{block.name}: frames {first} to {self._next - 1}: {frames}")
            else:
                timestamp_ns = self._start_ns + round(first * self._start.frame_time * 1e9)
                yield FrameBatch(run=self._start.run, first=first, frames=frames, timestamp_ns=timestamp_ns)


def _datasets(file: h5py.File, path: Path, name: str | None) -> tuple[list[h5py.Dataset], str | None]:
    """Return the datasets that hold the frames, in order, and the first file that is named and not there."""
    data = file.get("/entry/data")
    linked = [k for k in data if re.fullmatch(r"data_\d+", k)] if isinstance(data, h5py.Group) else []
    linked.sort(key=lambda k: int(k.removeprefix("data_")))
    names = [name] if name else [f"/entry/data/{k}" for k in linked] or ["/entry/data/data"]
    absent = [_absent_file(file, path, n) for n in names]
    present = [n for n, absent_file in zip(names, absent, strict=True) if absent_file is None]
    if not present or present != names[: len(present)]:
        raise SourceError(f"{path} needs {next(filter(None, absent))}, which is not there")
    datasets = [dataset_of(file, path, n) for n in present]
    frame = (datasets[0].shape[1:], datasets[0].dtype)
    for dataset, n in zip(datasets, present, strict=True):
        if (dataset.shape[1:], dataset.dtype) != frame:
            raise SourceError(f"{path}: frames of {n} are {dataset.shape[1:]} {dataset.dtype}, those before {frame}")
    return datasets, None if present == names else absent[len(present)]


def _absent_file(file: h5py.File, path: Path, name: str) -> str | None:
    """Return the file that the external link `name` leads to, if it is not there."""
    link = file.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink) and not (path.parent / link.filename).exists():
        return str(link.filename)
    return None
