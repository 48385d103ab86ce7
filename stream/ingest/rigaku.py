"""Event files of Rigaku XSPA detectors: one word per pixel that is not dark.

A word is 64 bits, little-endian, words ordered by frame:

    63      40 39  37 36      16 15  12 11     0
    | frame   | unused| pixel   | unused| count |

The format is not published; this is how the APS reads it (boost_corr, `convert_sparse`, `RigakuDataset`,
`Rigaku3MDataset`): pixel = row * 1024 + column. Of a detector of six modules each writes a file of its own,
``.bin.000`` to ``.bin.005``, its pixels may count from 2**20 on, and the modules are put together as in `MODULES`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, SourceError
from stream.ingest import nexus
from stream.ingest.position import frame_at, place_of
from stream.messages import Events, FrameBatch, Message, Position, RunStop
from stream.wire import check_events

SHAPE = (512, 1024)
"""Rows and columns of a module."""
MODULES = ((5, 0), (4, 1), (3, 2))
"""The files of six modules as these stand, seen as in a frame."""
GAP = (70, 52)
"""Rows and columns between them."""

FRAME, PIXEL = 40, 16
"""First bits."""
COUNT_MASK = 2**12 - 1
PIXEL_MASK = 2**21 - 1
MODULE_OFFSET = 2**20

MAX_EVENTS = 2**24
"""Of frames that are handed on together: fewer than were asked for where they are bright."""

_Words = NDArray[np.uint64]


class RigakuSource:
    """The frames of a file, as a `stream.protocols.Source` that can seek.

    Parameters
    ----------
    path
        ``x.bin``, or ``x.bin.000`` for those of all six modules.
    metadata
        An APS metadata file. None: ``x_metadata.hdf`` beside `path`, if there is one.
    batch
        Frames per `FrameBatch`.
    frame_time
        Start to start of frames (s). None: as the metadata file says.

    Raises
    ------
    ConfigError
        frame_time is not to be found.
    SourceError
        A file is not there, or is none of whole words. Later: an event that cannot be, named with its number.

    Notes
    -----
    Frames in which no photon came have no word: they are frames. Those after the last photon are not known of. A count
    that fills its 12 bits may stand for more: 4094 is the `saturation_value`.
    """

    def __init__(
        self,
        path: Path,
        *,
        metadata: Path | None = None,
        batch: int = 256,
        frame_time: float | None = None,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch is {batch}, must be at least 1")
        name = path.name.partition(".bin")[0]
        shape, self._modules = _modules(path)
        self._n_frames = max(module.n_frames for module in self._modules)
        beside = metadata or path.with_name(f"{name}_metadata.hdf")
        described = _described(beside) if metadata or beside.exists() else {}
        said = {"entry_identifier": name} | described | {"saturation_value": COUNT_MASK - 1}
        self._start = nexus.run_start(path, said, shape, np.dtype("<u2"), self._n_frames, frame_time)
        self._start_ns = nexus.start_ns(path, said)
        self._batch = batch
        self._next = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._modules.clear()

    def __iter__(self) -> Iterator[Message]:
        """Yield RunStart, FrameBatches of `Events`, RunStop."""
        if self._next < 0:
            self._next = 0
            yield self._start
        while self._next < self._n_frames:
            first, events = self._next, self._read()
            self._next += len(events)
            timestamp_ns = self._start_ns + round(first * self._start.frame_time * 1e9)
            yield FrameBatch(run=self._start.run, first=first, frames=events, timestamp_ns=timestamp_ns)
        if self._next == self._n_frames:
            self._next += 1
            yield RunStop(run=self._start.run, n_frames=self._n_frames, exit_status="success")

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

    def _read(self) -> Events:
        n = min(self._batch, self._n_frames - self._next)
        while n > 1 and sum(module.n_events(self._next, n) for module in self._modules) > MAX_EVENTS:
            n //= 2
        words = np.concatenate([module.words(self._next, n, self._start.shape[1]) for module in self._modules])
        if (words[1:] < words[:-1]).any():  # modules one after the other, or pixels in another order
            words.sort()
        borders = np.arange(self._next, self._next + n + 1, dtype=np.uint64) << np.uint64(FRAME)
        events = Events(
            shape=(n, *self._start.shape),
            offsets=np.searchsorted(words, borders),
            pixels=(words >> np.uint64(PIXEL)).astype(np.uint32) & np.uint32(2 ** (FRAME - PIXEL) - 1),
            counts=words.astype(np.uint16) & np.uint16(COUNT_MASK),
        )
        try:
            check_events(events)
        except ValueError as error:
            raise SourceError(f"{self._start.run}: frames from {self._next} on: {error}") from None
        return events


class _Module:
    """The file of one module, with its first pixel at a row and column of the detector."""

    def __init__(self, path: Path, row: int, column: int) -> None:
        self._path, self._row, self._column = path, row, column
        try:
            size = path.stat().st_size
            if not size or size % 8:
                raise SourceError(f"{path}: its {size} bytes are no whole number of events of 8 bytes, at least one")
            self._words: _Words = np.memmap(path, "<u8", "r")
        except FileNotFoundError:
            raise SourceError(f"{path}: no such file") from None
        except OSError as error:
            raise SourceError(f"{path} cannot be opened: {error.strerror}") from error
        self.n_frames = int(self._words[-1] >> np.uint64(FRAME)) + 1
        first_pixel = int(self._words[0] >> np.uint64(PIXEL)) & PIXEL_MASK
        self._offset = MODULE_OFFSET if first_pixel >= MODULE_OFFSET else 0

    def n_events(self, first: int, n: int) -> int:
        begin, end = self._span(first, n)
        return end - begin

    def words(self, first: int, n: int, columns: int) -> _Words:
        """Return the words of frames first..first+n-1, with their pixels on a detector of so many columns.

        Raises
        ------
        SourceError
            Events are not in the order of frames, or beside the module; names the first.
        """
        begin, end = self._span(first, n)
        words = np.array(self._words[begin:end])
        frame = words >> np.uint64(FRAME)
        last = first + n - 1
        self._refuse(begin, frame, (frame < first) | (frame > last), f"of frame {{}} is among frames {first} to {last}")
        self._refuse(begin + 1, frame[1:], frame[1:] < frame[:-1], "of frame {} comes after one of a later frame")
        pixel = ((words >> np.uint64(PIXEL)) & np.uint64(PIXEL_MASK)) - np.uint64(self._offset)  # below 0 is far above
        self._refuse(begin, pixel, pixel >= SHAPE[0] * SHAPE[1], f"is at pixel {{}} of a module of {SHAPE}")
        self._refuse(begin, words, words & np.uint64(COUNT_MASK) == 0, "({:#018x}) has no counts")
        # Shorter rows become longer ones.
        pixel += pixel // np.uint64(SHAPE[1]) * np.uint64(columns - SHAPE[1])
        pixel += np.uint64(self._row * columns + self._column)
        moved: _Words = (frame << np.uint64(FRAME)) | (pixel << np.uint64(PIXEL)) | (words & np.uint64(COUNT_MASK))
        return moved

    def _span(self, first: int, n: int) -> tuple[int, int]:
        """Return where the events of frames begin and end.

        Where one span ends the next begins, also in a file in disorder: no event is left out unseen.
        """
        return self._begin(first), len(self._words) if first + n >= self.n_frames else self._begin(first + n)

    def _begin(self, frame: int) -> int:
        # One at a time: numpy begins the search for a second one where the first ended.
        return int(np.searchsorted(self._words, np.uint64(frame) << np.uint64(FRAME)))

    def _refuse(self, begin: int, values: _Words, wrong: NDArray[np.bool_], says: str) -> None:
        if wrong.any():
            at = int(wrong.argmax())
            raise SourceError(f"{self._path}: event {begin + at} {says.format(int(values[at]))}")


def _modules(path: Path) -> tuple[tuple[int, int], list[_Module]]:
    """Return the shape of the detector, and its modules."""
    if path.suffix != ".000":
        return SHAPE, [_Module(path, 0, 0)]
    rows, columns = (n * size + (n - 1) * gap for n, size, gap in zip((3, 2), SHAPE, GAP, strict=True))
    modules = [
        _Module(path.with_suffix(f".{file:03}"), i * (SHAPE[0] + GAP[0]), j * (SHAPE[1] + GAP[1]))
        for i, row in enumerate(MODULES)
        for j, file in enumerate(row)
    ]
    return (rows, columns), modules


def _described(path: Path) -> dict[str, Any]:
    try:
        with h5py.File(path, "r", locking=False) as file:
            return nexus.describe(file)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # as h5py finds the file damaged
        raise SourceError(f"{path} cannot be read as HDF5: {error}") from error
