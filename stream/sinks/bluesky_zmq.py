"""Bluesky documents to a Proxy of bluesky.callbacks.zmq."""

import threading
import time
from collections.abc import Mapping
from typing import Any, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from stream.curve import ClientKeys, Handshakes
from stream.documents import frame
from stream.errors import SinkError

POLL = 0.1
"""How often a wait looks whether it was stopped (s)."""

LINGER = 2.0
"""How long closing waits for what is not yet sent (s)."""


class ZmqDocuments:
    """To a Proxy of bluesky.callbacks.zmq, in MessagePack: never pickles. A `stream.sinks.bluesky.Publisher`.

    Its RemoteDispatchers must be told ``deserializer=stream.documents.read``. ZeroMQ does not tell what they have: what
    is flushed is on its way to a Proxy that was there.

    Parameters
    ----------
    address
        ``tcp://host:port``, the Proxy's in-port.
    prefix
        Where several publish to one Proxy, which one this is.
    keys
        Of CURVE, as bluesky's ClientCurve.
    timeout
        How long nobody may be there before a document that must not be lost is an error (s).
    stop
        Once it is set, nothing is waited for.

    Raises
    ------
    SinkError
        The address cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        prefix: bytes = b"",
        keys: ClientKeys | None = None,
        timeout: float = 10.0,
        stop: threading.Event | None = None,
    ) -> None:
        self._where, self._prefix, self._timeout, self._stop = address, prefix, timeout, stop
        self._subscribed: set[bytes] = set()
        self._context = zmq.Context()
        # A PUB that also tells who subscribes: before that, what is sent is lost.
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.linger = round(1000 * LINGER)
        self._socket.maxmsgsize = 4096  # nothing but subscriptions comes in
        self._socket.xpub_nodrop = True
        self._socket.immediate = True  # a Proxy that is gone has no subscriptions, and nothing waits for it
        self._socket.reconnect_ivl_max = 1000  # ms
        self._monitor = self._socket.get_monitor_socket(Handshakes.EVENTS)
        self._handshakes = Handshakes(keys)
        try:
            if keys is not None:
                keys.use(self._socket)
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.__exit__(None, None, None)
            raise SinkError(f"{address}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def publish(self, run: str, name: str, document: Mapping[str, Any], *, may_be_lost: bool) -> None:
        """Take a document; see `stream.sinks.bluesky.Publisher`."""
        what = f"{name} of run {run}"
        try:
            message = frame(name, document, self._prefix)
        except ValueError as error:
            raise SinkError(f"{self._where}: {what}: {error}") from error
        deadline = time.monotonic() + (0.0 if may_be_lost else self._timeout)
        while not self._sent(message):
            left = deadline - time.monotonic()
            if left <= 0 or (self._stop is not None and self._stop.is_set()):
                raise SinkError(f"{self._where}: nobody took {what}")
            self._socket.poll(round(1000 * min(POLL, left)) + 1, zmq.POLLIN)

    def flush(self) -> None:
        """Return at once: what was published is on its way."""

    def _sent(self, message: bytes) -> bool:
        try:
            while self._monitor.poll(0):
                self._handshakes.take(recv_monitor_message(self._monitor)["event"])
            if self._handshakes.refusal:
                raise SinkError(f"{self._where}: the Proxy {self._handshakes.refusal}")
            while self._socket.poll(0, zmq.POLLIN):
                told = self._socket.recv(zmq.NOBLOCK)
                (self._subscribed.add if told[:1] == b"\x01" else self._subscribed.discard)(told[1:])
            if not self._subscribed:
                return False
            self._socket.send(message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise SinkError(f"{self._where}: {error}") from error
        return True
