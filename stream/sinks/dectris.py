"""A detector's end of a Dectris stream: for simulated runs, for replays, for tests."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

import zmq

from stream.errors import SinkError
from stream.messages import FrameBatch, Output, RunStart, RunStop
from stream.sinks import dectris_v1, dectris_v2
from stream.sinks.dectris_image import CompressedImage, Compression, Compressor
from stream.sinks.delivery import close, deliver
from stream.sinks.faults import Faults
from stream.wire import Buffer

SEND_HWM = 64


class DectrisSink:
    """Send runs as a detector does: a message for the start, for each frame and for the end, to one receiver at a time.

    Nobody tells whether a frame has arrived: `flush` returns at once, and what is still under way when the sink is
    closed has `timeout` seconds.

    Parameters
    ----------
    address
        Where receivers connect, e.g. ``tcp://127.0.0.1:31001``; ``tcp://127.0.0.1:*`` finds a free port, see `address`.
    version
        1: JSON and binary parts; the run is told as a series number, counted from 1. 2: CBOR.
    compression
        As the detector's setting.
    faults
        What to do to image messages on the way.
    timeout
        How long to wait for a receiver to take anything (s).
    stop
        Once it is set, a wait for a receiver that takes nothing ends with SinkError.

    Raises
    ------
    SinkError
        The address cannot be bound.
    """

    def __init__(
        self,
        address: str,
        *,
        version: Literal[1, 2] = 2,
        compression: Compression = "bslz4",
        faults: Faults | None = None,
        timeout: float = 60.0,
        stop: threading.Event | None = None,
    ) -> None:
        self._version = version
        self._compression: Compression = compression
        self._compressor = Compressor(compression, framed=version == 2)
        self._faults = Faults() if faults is None else faults
        self._timeout = timeout
        self._stop = stop
        self._series = 0
        self._start: RunStart | None = None
        self._series_ns: int | None = None
        self._context = zmq.Context()  # not the shared one: that is not waited for when the process ends
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set(zmq.SNDHWM, SEND_HWM)
        self._socket.set(zmq.LINGER, round(1000 * timeout))
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            raise SinkError(f"{address}: {error}") from None
        self.address: str = self._socket.get_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close(self._socket, self._stop)
        self._context.term()  # waits for what is not yet sent
        self._compressor.close()

    def write(self, output: Output) -> None:
        """Send a start, frames or a stop; results are no business of a detector.

        Raises
        ------
        SinkError
            Nobody took anything for `timeout` or until `stop`, or frames came that belong to no run.
        """
        match output:
            case RunStart():
                self._arm(output)
            case FrameBatch():
                self._expose(output)
            case RunStop():
                self._disarm(output)

    def flush(self) -> None:
        """Return: a detector is never told what arrived."""

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send one message as it is, e.g. a recorded one.

        Raises
        ------
        SinkError
            Nobody took anything for `timeout`, or until `stop`.
        """
        deliver(self._socket, parts, address=self.address, timeout=self._timeout, stop=self._stop, copy=False)

    def _arm(self, start: RunStart) -> None:
        self._series += 1
        self._start, self._series_ns = start, None
        try:
            message = (
                dectris_v1.encode_start(start, series=self._series, compression=self._compression)
                if self._version == 1
                else dectris_v2.encode_start(start, series=self._series)
            )
        except (ValueError, TypeError) as error:
            raise SinkError(f"{self.address}: run {start.run}: metadata: {error}") from None
        self.send(message)

    def _expose(self, batch: FrameBatch) -> None:
        start = self._running(batch)
        frame_ns = start.frame_time * 1e9
        if self._series_ns is None:
            self._series_ns = batch.timestamp_ns - round(batch.first * frame_ns)
        for i, frame in enumerate(batch.unpacked):
            image = CompressedImage(
                number=batch.first + i,
                timestamp_ns=batch.timestamp_ns + round(i * frame_ns),
                series_ns=self._series_ns,
                count_time=start.count_time,
                shape=(frame.shape[0], frame.shape[1]),
                dtype=frame.dtype.str,
                compression=self._compression,
                data=self._compressor.compress(frame),
            )
            parts = (
                dectris_v1.encode_image(image, series=self._series)
                if self._version == 1
                else dectris_v2.encode_image(image, run=batch.run, series=self._series)
            )
            for message in self._faults.apply(parts):
                self.send(message)

    def _disarm(self, stop: RunStop) -> None:
        self._running(stop)
        for message in self._faults.flush():
            self.send(message)
        if self._version == 1:
            self.send(dectris_v1.encode_end(series=self._series))
        else:
            self.send(dectris_v2.encode_end(run=stop.run, series=self._series))
        self._start = None

    def _running(self, output: FrameBatch | RunStop) -> RunStart:
        if self._start is None or self._start.run != output.run:
            raise SinkError(f"{self.address}: run {output.run} was not started")
        return self._start
