"""Our wire (`stream.wire`) over ZeroMQ, receiving end."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import zmq

from stream.errors import DecodeError, NotSeekable, SourceError
from stream.messages import FrameBatch, Message, Output, Position, Rejected, Result, RunStart, RunStop
from stream.wire import MAX_MESSAGE_BYTES, decode

POLL_MS = 50


class ZmqSource:
    """Frames pushed by a `stream.sinks.zmq.ZmqSink`. A `stream.protocols.Source` that cannot seek.

    A PUSH deals its messages out to all that pull, so each channel has exactly one ZmqSource.

    Parameters
    ----------
    address
        ``tcp://host:port``
    bind
        Wait there for the sender, instead of going to it.

    Attributes
    ----------
    address
        The same, with the port that was found where ``tcp://host:*`` was asked for.

    Raises
    ------
    SourceError
        The address cannot be used.
    """

    def __init__(self, address: str, *, bind: bool = False) -> None:
        self._socket = _open(zmq.PULL, address, bind=bind)
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _close(self._socket)

    def __iter__(self) -> Iterator[Message | None]:
        """Yield messages as they come, `Rejected` for what is not one, None when nothing came for 0.05 s."""
        for message in _receive(self._socket, self.address):
            if isinstance(message, Result):
                yield Rejected(
                    reason=f"{self.address}: a result of {message.operator!r} came where frames are expected"
                )
            else:
                yield message

    def position(self) -> Position:
        """Return {}: what was received is gone from the sender."""
        return {}

    def seek(self, position: Position) -> None:
        """Raise NotSeekable unless `position` is empty."""
        if position:
            raise NotSeekable(f"{self.address}: ZeroMQ cannot go back to {dict(position)}")


class ZmqResults:
    """Results published by a `stream.sinks.zmq.ZmqSink`, of all regions and operators.

    Starts with the newest of everything, however late it joins. Anything may come twice.

    Parameters
    ----------
    address
        ``tcp://host:port``
    bind
        Wait there for the publisher, instead of going to it.

    Attributes
    ----------
    address
        The same, with the port that was found where ``tcp://host:*`` was asked for.

    Raises
    ------
    SourceError
        The address cannot be used.
    """

    def __init__(self, address: str, *, bind: bool = False) -> None:
        self._socket = _open(zmq.SUB, address, bind=bind)
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _close(self._socket)

    def __iter__(self) -> Iterator[RunStart | RunStop | Result | Rejected | None]:
        """Yield messages as they come, `Rejected` for what is not one, None when nothing came for 0.05 s."""
        for message in _receive(self._socket, self.address):
            if isinstance(message, FrameBatch):
                yield Rejected(reason=f"{self.address}: frames of run {message.run!r} came where results are expected")
            else:
                yield message


def _open(kind: int, address: str, *, bind: bool) -> zmq.Socket[bytes]:
    socket = zmq.Context().socket(kind)
    socket.rcvhwm = 8  # messages of many frames each; behind them the sender waits
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.linger = 0  # nothing is ever sent
    socket.reconnect_ivl_max = 1000  # ms
    socket.tcp_keepalive = 1  # notices a sender that vanished
    socket.tcp_keepalive_idle = 60  # s
    if kind == zmq.SUB:
        socket.subscribe(b"")
    try:
        if bind:
            socket.bind(address)
        else:
            socket.connect(address)
    except zmq.ZMQError as error:
        _close(socket)
        raise SourceError(f"{address}: {error}") from error
    return socket


def _close(socket: zmq.Socket[bytes]) -> None:
    context = socket.context
    socket.close()
    context.term()


def _receive(socket: zmq.Socket[bytes], address: str) -> Iterator[Output | Rejected | None]:
    while True:
        try:
            parts = socket.recv_multipart(copy=False) if socket.poll(POLL_MS) else None
        except zmq.ZMQError as error:
            raise SourceError(f"{address}: {error}") from error
        if parts is None:
            yield None
            continue
        message: Output | Rejected
        try:
            message = decode([part.buffer for part in parts])
        except DecodeError as error:
            message = Rejected(reason=f"{address}: {error}")
        yield message
