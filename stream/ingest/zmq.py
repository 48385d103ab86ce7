"""Our wire (`stream.wire`) over ZeroMQ, receiving end."""

from collections.abc import Iterator
from typing import Self

import zmq

from stream.errors import DecodeError, NotSeekable, SourceError
from stream.messages import FrameBatch, Message, Output, Position, Rejected, Result, RunStart, RunStop
from stream.wire import MAX_MESSAGE_BYTES, check_start, decode

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
        self._receiver = _Receiver(zmq.PULL, address, bind=bind)
        self.address = self._receiver.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._receiver.close()

    def __iter__(self) -> Iterator[Message | None]:
        """Yield messages as they come, `Rejected` for what is not one, None when nothing came for 0.05 s."""
        for message in self._receiver.messages():
            match message:
                case Result(operator=name):
                    yield Rejected(reason=f"{self.address}: a result of {name!r} came where frames are expected")
                case RunStart():
                    yield self._checked(message)
                case _:
                    yield message

    def position(self) -> Position:
        """Return {}: what was received is gone from the sender."""
        return {}

    def seek(self, position: Position) -> None:
        """Raise NotSeekable unless `position` is empty."""
        if position:
            raise NotSeekable(f"{self.address}: ZeroMQ cannot go back to {dict(position)}")

    def _checked(self, start: RunStart) -> RunStart | Rejected:
        try:
            check_start(start)
        except ValueError as error:
            return Rejected(reason=f"{self.address}: run {start.run!r}: {error}")
        return start


class ZmqResults:
    """Results published by a `stream.sinks.zmq.ZmqSink`, of all regions and operators; otherwise as `ZmqSource`.

    Starts with the newest of everything, however late it joins. Anything may come twice.
    """

    def __init__(self, address: str, *, bind: bool = False) -> None:
        self._receiver = _Receiver(zmq.SUB, address, bind=bind)
        self.address = self._receiver.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._receiver.close()

    def __iter__(self) -> Iterator[RunStart | RunStop | Result | Rejected | None]:
        """Yield messages as they come, `Rejected` for what is not one, None when nothing came for 0.05 s."""
        for message in self._receiver.messages():
            match message:
                case FrameBatch(run=run):
                    yield Rejected(reason=f"{self.address}: frames of run {run!r} came where results are expected")
                case _:
                    yield message


class _Receiver:
    """A socket of its own, and our wire on it."""

    def __init__(self, kind: int, address: str, *, bind: bool) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(kind)
        self._socket.rcvhwm = 8  # messages of many frames each; behind them the sender waits
        self._socket.maxmsgsize = MAX_MESSAGE_BYTES
        self._socket.linger = 0  # nothing is ever sent
        self._socket.reconnect_ivl_max = 1000  # ms
        self._socket.tcp_keepalive = 1  # notices a sender that vanished
        self._socket.tcp_keepalive_idle = 60  # s
        if kind == zmq.SUB:
            self._socket.subscribe(b"")
        try:
            if bind:
                self._socket.bind(address)
            else:
                self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise SourceError(f"{address}: {error}") from error
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)

    def messages(self) -> Iterator[Output | Rejected | None]:
        while True:
            try:
                parts = self._socket.recv_multipart(copy=False) if self._socket.poll(POLL_MS) else None
            except zmq.ZMQError as error:
                raise SourceError(f"{self.address}: {error}") from error
            message: Output | Rejected | None = None
            if parts is not None:
                try:
                    message = decode([part.buffer for part in parts])
                except DecodeError as error:
                    message = Rejected(reason=f"{self.address}: {error}")
            yield message

    def close(self) -> None:
        self._socket.close()
        self._context.term()
