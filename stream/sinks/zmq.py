"""Our wire (`stream.wire`) over ZeroMQ, sending end."""

import threading
from types import TracebackType
from typing import Literal, Self

import zmq

from stream.errors import SinkError
from stream.messages import FrameBatch, Output, RunStop
from stream.sinks.delivery import close, deliver
from stream.sinks.faults import Faults
from stream.wire import Buffer, encode

PUBLISH_LINGER = 5.0
"""How long closing waits for subscribers that do not keep up (s)."""


class ZmqSink:
    """Sends everything to one receiver, or publishes results to many. A `stream.protocols.Sink`.

    ``push``: to a `stream.ingest.zmq.ZmqSource`, in order; waits while the receiver is busy.

    ``pub``: to any number of `stream.ingest.zmq.ZmqResults`; frames are left out. Never waits: a subscriber that does
    not keep up loses messages. One that joins late gets the newest run of every region, with the newest result of every
    operator; the others get these twice.

    ZeroMQ does not tell what the far side has. So `flush` returns at once, and closing waits for what is not yet sent:
    at most `timeout` for ``push``, 5 s for ``pub``.

    Parameters
    ----------
    address
        ``tcp://host:port``
    pattern
        ``push`` or ``pub``.
    bind
        Wait there for receivers, instead of going to one.
    faults
        Spoils messages of frames on purpose, in simulations.
    timeout
        How long nobody may take anything before a ``push`` fails (s).
    stop
        Once it is set, a ``push`` that nobody takes ends with SinkError.

    Attributes
    ----------
    address
        The same, with the port that was found where ``tcp://host:*`` was asked for.

    Raises
    ------
    SinkError
        The address cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        pattern: Literal["push", "pub"],
        bind: bool = True,
        faults: Faults | None = None,
        timeout: float = 60.0,
        stop: threading.Event | None = None,
    ) -> None:
        self._publishes = pattern == "pub"
        self._faults = faults or Faults()
        self._timeout = timeout
        self._stop = stop
        self._context = zmq.Context()
        socket = self._context.socket(zmq.XPUB if self._publishes else zmq.PUSH)
        socket.sndhwm = 64 if self._publishes else 8  # results are small, batches of frames are not
        socket.linger = int(1000 * (PUBLISH_LINGER if self._publishes else timeout))
        socket.maxmsgsize = 4096  # nothing but subscriptions comes in
        socket.reconnect_ivl_max = 1000  # ms
        socket.tcp_keepalive = 1  # notices a receiver that vanished
        socket.tcp_keepalive_idle = 60  # s
        if self._publishes:
            socket.xpub_verbose = True  # tells of every subscriber, not only of the first
        try:
            if bind:
                socket.bind(address)
            else:
                socket.connect(address)
        except zmq.ZMQError as error:
            socket.close()
            self._context.term()
            raise SinkError(f"{address}: {error}") from error
        self.address = socket.get_string(zmq.LAST_ENDPOINT)
        self._socket = socket
        if self._publishes:
            inbox, self._socket = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
            inbox.bind("inproc://publisher")
            self._socket.connect("inproc://publisher")
            self._publisher = threading.Thread(target=_publish, args=(inbox, socket), name="publisher", daemon=True)
            self._publisher.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._publishes:
            self._socket.send(b"")
            self._publisher.join()
        close(self._socket, self._stop)
        self._context.term()  # waits for what is not yet sent

    def write(self, output: Output) -> None:
        """Send one message.

        Raises
        ------
        SinkError
            It does not fit our wire, or nobody took anything for `timeout` or until `stop`.
        """
        if self._publishes and isinstance(output, FrameBatch):
            return
        try:
            parts = encode(output)
        except ValueError as error:
            raise SinkError(f"{self.address}: {error}") from error
        if isinstance(output, RunStop):
            for held in self._faults.flush():
                self._send(held)
        if isinstance(output, FrameBatch):
            for spoiled in self._faults.apply(parts):
                self._send(spoiled)
        else:
            self._send(parts)

    def flush(self) -> None:
        """Return at once: ZeroMQ does not tell what the far side has."""

    def _send(self, parts: list[Buffer]) -> None:
        # Copies: frames may be overwritten once write returns.
        deliver(self._socket, parts, address=self.address, timeout=self._timeout, stop=self._stop)


def _publish(inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
    """Publish what comes in until an empty message; give new subscribers the newest (zguide 5, Last Value Caching)."""
    newest: dict[bytes, list[bytes]] = {}
    with inbox, outbox:
        poller = zmq.Poller()
        poller.register(inbox, zmq.POLLIN)
        poller.register(outbox, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if outbox in ready and outbox.recv_multipart()[0].startswith(b"\x01"):  # somebody subscribed
                for message in newest.values():
                    outbox.send_multipart(message)
            if inbox in ready:
                message = inbox.recv_multipart()
                if message == [b""]:
                    return
                kind, *_, region = message[0].split(b"/")
                if kind == b"start":
                    newest = {route: old for route, old in newest.items() if not route.endswith(b"/" + region)}
                newest[message[0]] = message
                outbox.send_multipart(message)
