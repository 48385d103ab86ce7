"""Sending on a ZeroMQ socket whose far side may be busy or absent."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import zmq

from stream.errors import SinkError
from stream.wire import Buffer

POLL = 0.1
"""How often a wait looks whether it was stopped (s)."""

GRACE = 0.3
"""How long a receiver that is slow, but there, may still take something once the sender is stopped (s)."""

LINGER = 2.0
"""How long a stopped sender waits on closing for what is not yet taken (s)."""


def deliver(
    socket: zmq.Socket[Any],
    parts: Sequence[Buffer],
    *,
    address: str,
    timeout: float,
    stop: threading.Event | None,
    copy: bool = True,
) -> None:
    """Send one message, waiting while nobody takes it.

    Raises
    ------
    SinkError
        Nobody took it for `timeout` (s), or for `GRACE` after `stop` was set, or the socket failed.
    """
    began = time.monotonic()
    stopped: float | None = None
    try:
        while not _sent(socket, parts, copy=copy):
            now = time.monotonic()
            if now - began >= timeout:
                raise SinkError(f"{address}: nobody took anything for {timeout} s")
            if stop is not None and stop.is_set():
                stopped = now if stopped is None else stopped
                if now - stopped >= GRACE:
                    socket.linger = 0  # what is on its way to a receiver that takes nothing would hold up the exit
                    raise SinkError(f"{address}: stopped while nobody received")
            socket.poll(round(1000 * min(POLL, max(timeout - (now - began), 0.001))), zmq.POLLOUT)
    except zmq.ZMQError as error:
        raise SinkError(f"{address}: {error}") from error


def _sent(socket: zmq.Socket[Any], parts: Sequence[Buffer], *, copy: bool) -> bool:
    try:
        socket.send_multipart(parts, flags=zmq.NOBLOCK, copy=copy)
    except zmq.Again:
        return False
    return True


def close(socket: zmq.Socket[Any], stop: threading.Event | None) -> None:
    """Close a socket; once `stop` is set, a receiver that takes nothing holds that up for `LINGER` at most."""
    if stop is not None and stop.is_set():
        socket.linger = min(socket.linger, round(1000 * LINGER))
    socket.close()
