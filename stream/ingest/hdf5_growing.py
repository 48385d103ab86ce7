"""Frames in an HDF5 file that is being written, as far as somebody tells that they are there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import h5py
import numpy as np

from stream.errors import SourceError
from stream.ingest import nexus
from stream.ingest.bluesky_facts import Facts, merged
from stream.ingest.hdf5_frames import Block, Stretch, Unpacking, dataset_of, open_file
from stream.messages import Give, RunStart


class GrowingFrames:
    """The frames of one run, in one file or more.

    A file is opened for every look: so it does not matter whether its writer lets it be read meanwhile (SWMR), or just
    flushes it.

    Attributes
    ----------
    start
        Of the run; ``n_frames`` is not in its metadata, since nobody knows it.
    start_ns
        When frame 0 began, ns since the Unix epoch.
    """

    def __init__(self, start: RunStart, start_ns: int, unpacking: Unpacking) -> None:
        self.start, self.start_ns, self._unpacking = start, start_ns, unpacking

    @classmethod
    def begin(cls, path: Path, name: str, facts: Facts, *, frame_time: float | None, give: Give) -> Self:
        """Read what the file says of a run.

        Parameters
        ----------
        path, name
            The file, and the dataset in it.
        facts
            What the documents say: where the file says the same otherwise, the file's counts.
        frame_time
            Start to start of frames (s), and wins. None: as the file says, else as the documents say.

        Raises
        ------
        SourceError
            The file or the frames are not there (yet), or are none that can be read.
        ConfigError
            Nobody tells the frame time, or it is none.
        """
        with _dataset(path, name) as dataset:
            said = nexus.describe(dataset.file)
            for fact, value in {"start_time": facts.others.get("start_time"), **facts.numbers}.items():
                if value is not None and fact in ("start_time", "frame_time", "count_time"):
                    said.setdefault(fact, value)
            shape, dtype = dataset.shape[1:], dataset.dtype
            start = nexus.run_start(path, said, shape, dtype, 0, frame_time)
            stated = {name: value for name, value in start.metadata.items() if name != "n_frames"}
            unpacking = Unpacking(start, nexus.masked_pixels(dataset.file, shape), give)
            return cls(merged(replace(start, metadata=stated), facts), nexus.start_ns(path, said), unpacking)

    def read(self, path: Path, name: str, row: int, n: int, batch: int) -> Iterator[Stretch]:
        """Yield n frames of a dataset, `row` and on, as far as they are there.

        Raises
        ------
        SourceError
            The file or the frames are not there (yet), or are not as those before.
        """
        with _dataset(path, name) as dataset:
            kind = (dataset.shape[1:], np.dtype(f"<u{dataset.dtype.itemsize}").str)
            if kind != (self.start.shape, self.start.dtype):
                raise SourceError(f"{path}: frames of {name} are {kind}, not {(self.start.shape, self.start.dtype)}")
            block = Block(dataset)
            step, end = block.step(batch), min(row + n, block.n_frames)
            while row < end:
                size = min(step - row % step, end - row)
                yield from self._unpacking.stretches(block, row, size)
                row += size


@contextmanager
def _dataset(path: Path, name: str) -> Iterator[h5py.Dataset]:
    try:
        with open_file(path, grows=True) as file:
            if name not in file:
                raise SourceError(f"{path}: no frames at {name}")
            yield dataset_of(file, path, name)
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # as h5py finds the file damaged, or half written
        raise SourceError(f"{path} cannot be read: {error}") from error
