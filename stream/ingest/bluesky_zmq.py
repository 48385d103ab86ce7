"""Bluesky documents from a Proxy of bluesky.callbacks.zmq."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self

import zmq
from zmq.utils.monitor import parse_monitor_message

from stream.curve import ClientKeys, Handshakes
from stream.documents import MAX_BYTES, unframe
from stream.errors import DecodeError, NotSeekable, SourceError
from stream.messages import Position, Rejected

_log = logging.getLogger(__name__)

POLL = 0.05
"""How long one look for a document takes (s)."""

QUEUE_DOCUMENTS = 10_000
"""Held by libzmq. The Proxy drops what comes while they are not read, without a word."""

_AWAY = zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_DISCONNECTED


class ZmqDocuments:
    """From the out-port of a Proxy, in MessagePack: `stream.ingest.bluesky_messages.Documents`.

    bluesky's Publisher must be told ``serializer=msgpack.dumps``, or that of `stream.documents`. Its default is pickle,
    which runs whatever its sender wants: it is never read here, but `Rejected`.

    A Proxy that is away is waited for, and logged. What is sent before the connection is made is lost.

    Parameters
    ----------
    address
        ``tcp://host:port``.
    prefix
        Of the publisher that is wanted. Empty: all.
    keys
        Of CURVE, as bluesky's ClientCurve.
    wait
        How long to wait for a document before None is yielded (s).

    Raises
    ------
    SourceError
        The address cannot be one.
    """

    def __init__(
        self, address: str, *, prefix: bytes = b"", keys: ClientKeys | None = None, wait: float = POLL
    ) -> None:
        self._address, self._wait = address, wait
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.set(zmq.RCVHWM, QUEUE_DOCUMENTS)
        self._socket.set(zmq.MAXMSGSIZE, MAX_BYTES + 1024)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.set(zmq.SUBSCRIBE, prefix + b" " if prefix else b"")
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(Handshakes.EVENTS | _AWAY)
        self._handshakes = Handshakes(keys)
        self._is_away = False
        self._is_cut = False
        """The connection is gone, and libzmq did not make another one."""
        try:
            if keys is not None:
                keys.use(self._socket)
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.__exit__()
            raise SourceError(f"{address}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]] | Rejected | None]:
        """Yield name and document as they come, `Rejected` for what is none, None when nothing came for `wait`.

        Raises
        ------
        SourceError
            The Proxy does not let us in.
        """
        while True:
            self._look_around()
            try:
                message = self._socket.recv() if self._socket.poll(round(1000 * self._wait)) else None
            except zmq.ZMQError as error:
                raise SourceError(f"{self._address}: {error}") from None
            # Not while there is something to read: with a connection, libzmq throws away what came over it.
            if message is None and self._is_cut:
                self._is_cut = False
                self._connect_again()
            yield None if message is None else self._read(message)

    def position(self) -> Position:
        """Return {}: documents are sent once."""
        return {}

    def seek(self, position: Position) -> None:
        """Refuse any position but {}."""
        if position:
            raise NotSeekable(f"{self._address}: documents are sent once; it cannot go back to {dict(position)}")

    def _read(self, message: bytes) -> tuple[str, dict[str, Any]] | Rejected:
        try:
            _, name, document = unframe(message)
        except DecodeError as error:
            return Rejected(reason=f"{self._address}: {error}")
        return name, document

    def _look_around(self) -> None:
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            self._handshakes.take(event)
            if event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED):
                self._is_cut = event == zmq.EVENT_DISCONNECTED
            if event & _AWAY and not self._is_away:
                self._is_away = True
                _log.warning("%s is away; waiting for it", self._address)
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED and self._is_away:
                self._is_away = False
                _log.warning("%s is back", self._address)
        if self._handshakes.refusal:
            raise SourceError(f"{self._address}: the Proxy {self._handshakes.refusal}")

    def _connect_again(self) -> None:
        """Go to the Proxy again: after a message that is longer than any may be, libzmq does not do so by itself."""
        with suppress(zmq.ZMQError):  # it may have forgotten the address
            self._socket.disconnect(self._address)
        self._socket.connect(self._address)
