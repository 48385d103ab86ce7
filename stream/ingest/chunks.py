"""What arrives in records of our wire, for pipelines and mergers; `Chunks` become frames again."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stream import blocks
from stream.errors import DecodeError
from stream.ingest.dectris_messages import Pixels
from stream.ingest.photons import Photons, is_dim
from stream.messages import Chunks, Events, FrameBatch, Message, Output, Position, Rejected, Result, RunStart, RunStop
from stream.wire import check_start


class Unpacking:
    """Unpacks the frames of one region, for operators: given its messages in order, yields those for a pipeline.

    Batches of which the first frame is dim come as `stream.messages.Events`, see `stream.ingest.photons`: others of a
    batch do not tell again which pixels are masked or overflown in its first frame. Which values are counts is known
    from the RunStart; until one came, all are.
    """

    def __init__(self) -> None:
        self._start: RunStart | None = None
        self._was_dim = True

    def begin(self, start: RunStart) -> None:
        """Take note of the run that frames are of, where its RunStart does not come again."""
        self._start = start

    def __call__(self, message: Message) -> Iterator[Message]:
        """Yield a message as it is, or frames for its `Chunks`: in several batches if some of them are `Rejected`."""
        match message:
            case FrameBatch(frames=Chunks() as packed):
                yield from self._unpack(message, packed)
            case RunStart():
                self._start = message
                yield message
            case _:
                yield message

    def _unpack(self, batch: FrameBatch, packed: Chunks) -> Iterator[FrameBatch | Rejected]:
        start = self._start
        if start is not None and (start.run, start.region) != (batch.run, batch.region):
            start = None
        limit = int(np.iinfo(packed.dtype).max)
        if start is not None and start.saturation_value is not None:
            limit = start.saturation_value
        frame_ns = start.frame_time * 1e9 if start is not None else 0
        i = 0
        for n, frames in self._stretches(packed, limit):
            if isinstance(frames, str):
                yield Rejected(reason=f"frame {batch.first + i} of run {batch.run}: {frames}")
            else:
                timestamp_ns = batch.timestamp_ns + round(i * frame_ns)
                yield replace(batch, first=batch.first + i, frames=frames, timestamp_ns=timestamp_ns)
            i += n

    def _stretches(
        self, packed: Chunks, limit: int
    ) -> Iterator[tuple[int, NDArray[np.unsignedinteger[Any]] | Events | str]]:
        """Yield how many frames follow each other, and they; or 1, and what is wrong with it."""
        size, _ = blocks.HEADER.unpack_from(packed.chunks[0])
        around = (1, size // packed.dtype.itemsize)
        _, *shape = packed.shape
        counts = np.empty(packed.shape, packed.dtype)
        found: list[NDArray[np.unsignedinteger[Any]] | Photons | str] = []
        dim: bool | None = None
        for chunk, frame in zip(packed.chunks, counts, strict=True):
            last = found[-1] if found else None
            try:
                image = Pixels(shape=around, dtype=packed.dtype.str, codec="bslz4", data=chunk)
                if isinstance(last, Photons):
                    last.append(image)
                    found.append(last)
                    continue
                whole = image.decompress()
            except DecodeError as error:
                found.append(str(error))
                continue
            frame.reshape(-1)[:] = whole[0, packed.skip : packed.skip + frame.size]
            if dim is None:
                dim = self._was_dim = is_dim(image, frame, limit, before=self._was_dim)
            found.append(Photons(whole, limit) if dim else counts)
        counts.flags.writeable = False
        end = 0
        for _, stretch in groupby(found, id):
            frames, *more = stretch
            begin, end = end, end + 1 + len(more)
            match frames:
                case Photons():
                    yield end - begin, frames.frames().band(packed.skip, (shape[0], shape[1]))
                case str():
                    yield 1, frames
                case _:
                    yield end - begin, counts[begin:end]


class Records(Iterable[tuple[str, Output | Rejected | None]], Protocol):
    """Messages of our wire, each with where it stands; None where nothing came for a while."""

    def position(self) -> Position:
        """Return where the record stands that comes next."""


def frames_of(records: Records, unpack: Unpacking) -> Iterator[tuple[Message | None, Position]]:
    """Yield what a pipeline takes of records, and where to go on after it.

    A record of which some frames are damaged becomes several messages: it is passed with the last one.
    """
    position = records.position()
    for where, message in records:
        *earlier, last = _messages(where, message, unpack)
        yield from ((each, position) for each in earlier)
        position = records.position()
        yield last, position


def results_of(records: Records) -> Iterator[RunStart | RunStop | Result | Rejected | None]:
    """Yield what a merger takes of records."""
    for where, message in records:
        match message:
            case FrameBatch(run=run):
                yield Rejected(reason=f"{where}: frames of run {run!r} stand where results are expected")
            case _:
                yield message


def _messages(where: str, message: Output | Rejected | None, unpack: Unpacking) -> Iterator[Message | None]:
    match message:
        case None:
            yield None
        case Result(operator=name):
            yield Rejected(reason=f"{where}: a result of {name!r} stands where frames are expected")
        case RunStart():
            try:
                check_start(message)
            except ValueError as error:
                yield Rejected(reason=f"{where}: run {message.run!r}: {error}")
            else:
                yield from unpack(message)
        case _:
            yield from unpack(message)
