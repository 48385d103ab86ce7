"""A connection to the hub of a gateway: ZeroMQ's DEALER, which goes there and comes back by itself."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from types import TracebackType
from typing import Self

import zmq

from stream.curve import ClientKeys, Handshakes
from stream.errors import DecodeError, XpcsStreamError
from stream.hub_wire import MAX_BYTES, Refused, Said, pack, unpack
from stream.wire import Buffer

_log = logging.getLogger(__name__)

LINGER = 2.0
"""Seconds that closing waits for what was said last to leave."""

_EVENT = Struct("=hi")
"""What a monitor tells (zmq_socket_monitor(3)): pyzmq reads it, too, but imports asyncio, and workers start fast."""


@dataclass(frozen=True, slots=True)
class Hub:
    """Where a gateway is, and how it knows us."""

    address: str
    """``tcp://host:port``"""
    beamline: str
    keys: ClientKeys | None = None
    """None: neither encrypted nor authenticated."""

    def __str__(self) -> str:
        return f"{self.address.replace('tcp', 'zmq', 1)}/{self.beamline}"


class Dealer:
    """One connection. For one thread.

    Parameters
    ----------
    hub
        Where it goes.
    error
        Raised where the hub refuses us.

    Attributes
    ----------
    connections
        How many there were so far: what was said over one before the last may never have arrived.

    Raises
    ------
    XpcsStreamError
        `error`: the address cannot be used.
    """

    def __init__(self, hub: Hub, error: type[XpcsStreamError]) -> None:
        self._hub = hub
        self._error = error
        self.connections = 0
        self._refusal = ""
        self._handshakes = Handshakes(hub.keys)
        self._context = zmq.Context()
        socket = self._socket = self._context.socket(zmq.DEALER)
        socket.rcvhwm = socket.sndhwm = 0  # bounded by the windows that are told, and by who writes
        socket.maxmsgsize = MAX_BYTES
        socket.linger = round(1000 * LINGER)
        socket.reconnect_ivl = 100  # ms
        socket.reconnect_ivl_max = 1000  # ms
        socket.heartbeat_ivl = 1000  # ms; notices a hub that vanished without a word
        socket.heartbeat_timeout = (
            20_000  # ms; only whole parts count as a sign of life, and slow links take long for them
        )
        socket.immediate = True  # what is said while there is no connection is said again anyway
        self._monitor = socket.get_monitor_socket(Handshakes.EVENTS)
        try:
            if hub.keys is not None:
                hub.keys.use(socket)
            socket.connect(hub.address)
        except zmq.ZMQError as problem:
            self.close()
            raise error(f"{hub}: {problem}") from problem

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def say(self, said: Said, parts: Sequence[Buffer] = ()) -> bool:
        """Say something; return False if there is no connection just now."""
        try:
            self._socket.send_multipart([pack(said), *parts], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as problem:
            raise self._error(f"{self._hub}: {problem}") from problem
        return True

    def hear(self, within: float) -> tuple[Said | None, Sequence[Buffer]]:
        """Return what comes `within` seconds, and the parts behind it; None if nothing does.

        Raises
        ------
        XpcsStreamError
            `error`: the hub refuses us.
        """
        if self._refusal:
            raise self._error(f"{self._hub}: {self._refusal}")
        try:
            if not self._socket.poll(round(1000 * within)):
                self._check()
                return None, ()
            parts = [part.buffer for part in self._socket.recv_multipart(copy=False)]
        except zmq.ZMQError as problem:
            raise self._error(f"{self._hub}: {problem}") from problem
        try:
            said = unpack(parts)
        except DecodeError as problem:
            _log.warning("%s: %s", self._hub, problem)
            return None, ()
        if isinstance(said, Refused):
            self._refusal = said.reason
            raise self._error(f"{self._hub}: {self._refusal}")
        return said, parts[1:]

    def _check(self) -> None:
        """Count connections; raise `error` if there can be none, where ZeroMQ would go on trying."""
        while self._monitor.poll(0):
            event, _ = _EVENT.unpack(self._monitor.recv_multipart()[0])
            self.connections += event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._handshakes.take(event)
        if self._handshakes.refusal:
            raise self._error(f"{self._hub}: the gateway {self._handshakes.refusal}")
