"""How commands talk to the manager of a state directory: JSON over a socket in that directory."""

import json
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from hpc_bridge.errors import BridgeError, ConfigError

MAX_BYTES = 2**24
MAX_PATH = 107
"""Of the name of a socket, in bytes (unix(7))."""

LOOK = 1000
"""Milliseconds between looks whether a manager that does not answer is still there."""


class NoManager(BridgeError):
    """Nobody manages this state directory now."""


class Control:
    """The manager's end.

    Raises
    ------
    ConfigError
        The directory's name is too long for a socket in it, or it cannot be made.
    """

    def __init__(self, state: Path) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = MAX_BYTES
        try:
            self._socket.bind(_address(state))
        except zmq.ZMQError as error:
            self.__exit__(None, None, None)
            raise ConfigError(f"{state}: {error}") from None
        (state / "control").chmod(0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()

    def serve(self, answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        """Answer what was asked since the last time; never waits. A BridgeError becomes the answer's ``error``."""
        while True:
            try:
                who, _, asked = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                continue
            try:
                told = answer(_object(asked))
            except BridgeError as error:
                told = {"error": str(error)}
            self._socket.send_multipart([who, b"", json.dumps(told).encode()])


def ask(state: Path, asked: Mapping[str, Any], within: float = 10.0) -> Mapping[str, Any]:
    """Ask the manager; return what it says.

    Raises
    ------
    NoManager
        There is none.
    BridgeError
        It refuses, in its words; or does not answer.
    """
    address, deadline = _address(state), time.monotonic() + within
    _see_that_it_is_there(state, address)
    context = zmq.Context()
    asking = context.socket(zmq.REQ)
    asking.linger = 0
    try:
        asking.connect(address)
        asking.send(json.dumps(asked).encode())
        while not asking.poll(LOOK):
            _see_that_it_is_there(state, address)  # it may end before it answers
            if time.monotonic() > deadline:
                raise BridgeError(f"{state}: its manager did not answer within {within:g} s")
        told = _object(asking.recv())
    finally:
        asking.close()
        context.term()
    if "error" in told:
        raise BridgeError(str(told["error"]))
    return told


def _see_that_it_is_there(state: Path, address: str) -> None:
    # ZeroMQ would wait for somebody to come.
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address.removeprefix("ipc://"))
        except BlockingIOError:  # more ask than it has time for
            return
        except OSError:
            raise NoManager(f"{state}: no manager is there; hpc-bridge up begins one") from None


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        raise BridgeError("not JSON") from None
    if not isinstance(read, dict):
        raise BridgeError("not a JSON object")
    return read


def _address(state: Path) -> str:
    path = str((state / "control").absolute())
    if len(path.encode()) > MAX_PATH:
        raise ConfigError(f"{path}: longer than the {MAX_PATH} bytes that the name of a socket may have; use --state")
    return f"ipc://{path}"
