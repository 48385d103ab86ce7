"""A Dectris detector's stream, V1 or V2, told apart by the bytes of each message."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import zmq
from numpy.typing import NDArray

from stream.errors import DecodeError, NotSeekable, SourceError
from stream.ingest import dectris_v1, dectris_v2
from stream.ingest.dectris_messages import End, Image, Pixels, Start
from stream.ingest.packed import Packed, is_packable
from stream.ingest.photons import Photons, is_dim
from stream.messages import FrameBatch, Give, Message, Position, Rejected, RunStart, RunStop
from stream.wire import MAX_LENGTH, MAX_MESSAGE_BYTES, Buffer, one_line

logger = logging.getLogger(__name__)

POLL_MS = 50
LATENCY = 0.1
"""Seconds that a frame waits at most for its batch to fill."""
RECEIVE_HWM = 64
MAX_BATCH_BYTES = 2**28


@dataclass(slots=True)
class _Series:
    """What is known of the series that is running."""

    run: str
    start: Start | None = None
    """None: this process came later than the start message."""
    announced: tuple[int, ...] | None = None
    """The shape of images that its RunStart told."""
    last: int = -1
    masked: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))
    """Flat indices of the pixels that the detector left to us to mask."""


class _Rows:
    """Images that follow each other, pixel by pixel."""

    def __init__(self, first: NDArray[np.unsignedinteger[Any]], masked: NDArray[np.intp], room: int) -> None:
        self._buffer = np.empty((room, *first.shape), first.dtype)
        self._masked = masked
        self._n = 0
        self._put(first)

    def __len__(self) -> int:
        return self._n

    def fits(self, image: Pixels) -> bool:
        return (image.shape, image.dtype) == (self._buffer.shape[1:], self._buffer.dtype.str)

    def append(self, image: Pixels) -> None:
        self._put(image.decompress())

    def frames(self) -> NDArray[np.unsignedinteger[Any]]:
        frames = self._buffer[: self._n]
        frames.flags.writeable = False
        return frames

    def _put(self, counts: NDArray[np.unsignedinteger[Any]]) -> None:
        frame = self._buffer[self._n]
        frame[...] = counts
        frame.reshape(-1)[self._masked] = np.iinfo(frame.dtype).max
        self._n += 1


@dataclass(slots=True)
class _OpenBatch:
    run: str
    first: int
    timestamp_ns: int
    images: _Rows | Photons | Packed
    room: int

    def goes_on_with(self, image: Image, pixels: Pixels) -> bool:
        follows = (image.run, image.number) == (self.run, self.first + len(self.images))
        return follows and self.images.fits(pixels)


class DectrisDecoder:
    """Make our messages of a detector's: `feed` one after the other, call `idle` when nothing came.

    A RunStart is told with the first image of its series, since only images know their shape and type; a series without
    images is not told at all. After a restart within a series there is no RunStart, and the RunStop has ``n_frames`` 0
    and "success": only the start message told how many frames were planned. Images of another series than the one
    running (left over from an abort) become batches of their own run. Pixels that are masked or overflown have
    the largest value of the dtype, also where the detector left it to us to apply its mask.

    Times of V2 are the detector's. V1 gives none that is absolute: its frames are timed by the detector's clock, from
    the moment of arming, or from the arrival of the first one if that is not known.

    Parameters
    ----------
    channel
        Which one of a detector with several energy thresholds (``threshold_1``, ``difference``, ...). None: the first
        that it sends, which is the first of its start message's `channels`.
    batch
        Frames in a FrameBatch, at most; fewer where they would be more than `MAX_BATCH_BYTES`.
    give
        "photons" lets batches whose first image is dim come as `stream.messages.Events`, see `stream.ingest.photons`.
        For operators only: others of a batch do not tell again which pixels are masked or overflown in its first image.
        "chunks" lets batches come as `stream.messages.Chunks`, where the detector did not leave it to us to apply its
        mask.
    """

    def __init__(self, *, channel: str | None = None, batch: int = 64, give: Give = "frames") -> None:
        self._channel = channel
        self._batch = min(batch, MAX_LENGTH) if give == "chunks" else batch
        self._give = give
        self._series: _Series | None = None
        self._clock: tuple[str, int] | None = None
        self._open: _OpenBatch | None = None
        self._was_dim = True

    def feed(self, parts: Sequence[Buffer]) -> Iterator[Message]:
        """Take one ZeroMQ message. One that cannot be read becomes a Rejected."""
        try:
            match decode(parts):
                case Start() as start:
                    yield from self.idle()
                    self._series = _Series(start.run, start)
                case Image() as image:
                    yield from self._take(image)
                case End(run=run):
                    yield from self.idle()
                    yield from self._stop(run)
        except DecodeError as error:
            yield from self.idle()
            yield Rejected(reason=one_line(str(error)))

    def idle(self) -> Iterator[Message]:
        """Close the open batch: nothing came for a while."""
        if self._open is not None:
            closed, self._open = self._open, None
            frames = closed.images.frames()
            yield FrameBatch(run=closed.run, first=closed.first, frames=frames, timestamp_ns=closed.timestamp_ns)

    def _take(self, image: Image) -> Iterator[Message]:
        pixels = self._select(image)
        timestamp_ns = self._timestamp(image)
        batch = self._open if self._open is not None and self._open.goes_on_with(image, pixels) else None
        is_packed = batch is None and self._stays_packed(image.run, pixels)
        try:
            if batch is not None:
                batch.images.append(pixels)
            elif not is_packed:
                counts = pixels.decompress()
        except DecodeError as error:
            raise DecodeError(f"image {image.number} of {image.run}: {error}") from None
        if self._series is None or (self._series.start is None and self._series.run != image.run):
            self._series = _Series(image.run)
        series = self._series if self._series.run == image.run else _Series(image.run)
        if batch is None:
            yield from self.idle()
            yield from self._announce(series, pixels)
            masked = series.masked if series.announced == pixels.shape else series.masked[:0]
            room = min(self._batch, max(1, MAX_BATCH_BYTES // pixels.nbytes))
            images = Packed(pixels) if is_packed else self._begin(pixels, counts, masked, room)
            batch = self._open = _OpenBatch(image.run, image.number, timestamp_ns, images, room)
        series.last = max(series.last, image.number)
        if len(batch.images) == batch.room:
            yield from self.idle()

    def _begin(
        self, pixels: Pixels, counts: NDArray[np.unsignedinteger[Any]], masked: NDArray[np.intp], room: int
    ) -> _Rows | Photons:
        """Return the images of a batch, of which there is the first."""
        limit = np.iinfo(counts.dtype).max - 1
        self._was_dim = self._give == "photons" and is_dim(pixels, counts, limit, before=self._was_dim)
        if not self._was_dim:
            return _Rows(counts, masked, room)
        return Photons(_Rows(counts, masked, 1).frames()[0], limit)

    def _select(self, image: Image) -> Pixels:
        channel = next(iter(image.channels), None) if self._channel is None else self._channel
        if channel is None or channel not in image.channels:
            there = ", ".join(f"{name:.80}" for name in image.channels) or "none"
            raise DecodeError(f"image {image.number} of {image.run} has no channel {channel}; there are: {there}")
        return image.channels[channel]

    def _stays_packed(self, run: str, pixels: Pixels) -> bool:
        if self._give != "chunks" or not is_packable(pixels):
            return False
        start = self._series.start if self._series is not None and self._series.run == run else None
        return start is None or not start.masks

    def _announce(self, series: _Series, pixels: Pixels) -> Iterator[RunStart]:
        start = series.start
        if start is None or series.announced is not None:
            return
        series.announced = pixels.shape
        largest = int(np.iinfo(pixels.dtype).max)
        mask = start.masks.get(self._channel or next(iter(start.masks), ""))
        if mask is not None and mask.shape == pixels.shape:
            series.masked = np.flatnonzero(mask)
        elif mask is not None:
            logger.warning("%s: pixel mask %s does not fit images %s: not applied", start.run, mask.shape, pixels.shape)
        if start.count_time > start.frame_time:
            logger.warning(
                "%s: count_time %g s is longer than frame_time, %g s, which is taken",
                start.run,
                start.count_time,
                start.frame_time,
            )
        yield RunStart(
            run=start.run,
            shape=pixels.shape,
            dtype=pixels.dtype,
            saturation_value=largest - 1,
            frame_time=start.frame_time,
            count_time=min(start.count_time, start.frame_time),
            metadata=start.metadata,
        )

    def _stop(self, run: str) -> Iterator[RunStop]:
        series = self._series if self._series is not None and self._series.run == run else _Series(run)
        if series.start is not None and series.announced is None:
            logger.info("%s ended without an image", run)
        else:
            planned = 0 if series.start is None else series.start.n_frames
            complete = series.start is None or series.last + 1 == planned
            yield RunStop(run=run, n_frames=planned, exit_status="success" if complete else "abort")
        if series is self._series:
            self._series = None

    def _timestamp(self, image: Image) -> int:
        """Return when the image was begun, ns since the Unix epoch."""
        zero = image.clock_ns
        if zero is None:
            if self._clock is None or self._clock[0] != image.run:
                self._clock = (image.run, self._begun(image) - image.start_ns)
            zero = self._clock[1]
        timestamp_ns = zero + image.start_ns
        if not 0 <= timestamp_ns < 2**63:
            raise DecodeError(f"image {image.number} of {image.run} begun at {timestamp_ns} ns, not within 2**63 ns")
        return timestamp_ns

    def _begun(self, image: Image) -> int:
        start = self._series.start if self._series is not None and self._series.run == image.run else None
        if start is None or start.armed_ns is None:
            return time.time_ns()
        return start.armed_ns + round(image.number * start.frame_time * 1e9)


class DectrisSource:
    """The stream of a detector, or of anything that speaks like one: a `Source` that never ends.

    It is connected at once, so make it before the detector is armed: Dectris sends the start message of a series to one
    receiver only, and once.

    Parameters
    ----------
    address
        ``tcp://host:9999`` (V1) or ``tcp://host:31001`` (V2).
    channel, batch, give
        See `DectrisDecoder`.

    Raises
    ------
    SourceError
        The address cannot be one.
    """

    def __init__(self, address: str, *, channel: str | None = None, batch: int = 64, give: Give = "frames") -> None:
        self._address = address
        self._decoder = DectrisDecoder(channel=channel, batch=batch, give=give)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, RECEIVE_HWM)
        self._socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.set(zmq.LINGER, 0)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise SourceError(f"{address}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def __iter__(self) -> Iterator[Message | None]:
        """Yield what the detector sends, at most `LATENCY` late; None when nothing came for `POLL_MS`."""
        flushed = time.monotonic()
        while True:
            try:
                parts = self._socket.recv_multipart() if self._socket.poll(POLL_MS) else None
            except zmq.ZMQError as error:
                raise SourceError(f"{self._address}: {error}") from None
            if parts is None:
                yield from self._decoder.idle()
                yield None
            else:
                yield from self._decoder.feed(parts)
                if time.monotonic() - flushed > LATENCY:
                    yield from self._decoder.idle()
                    flushed = time.monotonic()

    def position(self) -> Position:
        """Return {}: a detector sends once."""
        return {}

    def seek(self, position: Position) -> None:
        """Refuse any position but {}."""
        if position:
            raise NotSeekable(f"{self._address}: a detector sends once; it cannot go back to {dict(position)}")


def decode(parts: Sequence[Buffer]) -> Start | Image | End:
    """Read one message of either version.

    Raises
    ------
    DecodeError
        Names what is wrong and its value.
    """
    if not parts:
        raise DecodeError("a message of no parts")
    # V1 opens with a JSON map; no CBOR map begins with this byte
    return dectris_v1.decode(parts) if bytes(parts[0][:1]) == b"{" else dectris_v2.decode(parts)
