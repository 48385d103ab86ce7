"""A pilot's connection to its manager: ZeroMQ's DEALER, which goes there, or waits for it."""

import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from hpc_bridge import heartbeat as wire
from hpc_bridge.curve import PilotKeys
from hpc_bridge.dialing import announce, announced
from hpc_bridge.errors import ConfigError
from hpc_bridge.heartbeat import Answer, Finding, Heartbeat, State, Status, TaskReport

_log = logging.getLogger(__name__)

ANEW = 5.0
"""Seconds without an answer after which another connection is made.

ZeroMQ makes one by itself where one breaks, but not where it is as good as broken, nor after the other end did not know
our key or spoke another language, as the far end of a tunnel does at times.
"""

HEARTBEAT = 2000
"""Milliseconds between ZeroMQ's own heartbeats where we are dialled: a manager that is gone gets nothing more."""

NOTHING = Status()

LOOPBACK = ("tcp://127.", "tcp://localhost", "tcp://[::1]")

_TROUBLES = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it does not know our key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "only one of us has keys",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it has another key than we were given for it, or is not there",
}


@dataclass(frozen=True, slots=True)
class Awaited:
    """A manager that comes to us."""

    listen: str
    """Interface, ``tcp://*``."""
    file: Path
    """Where we say at which address it finds us."""


Manager = str | Awaited
"""Where it listens, ``tcp://host:port``; or how it comes."""


class Line:
    """One connection after the other.

    Parameters
    ----------
    manager
        Where it is.
    lease
        In whose name we speak.
    keys
        None: neither encrypted nor authenticated.

    Attributes
    ----------
    n
        Of the heartbeat that was said last; -1 before the first.
    heard_at
        When the last answer came, or this was made; monotonic (s).
    trouble
        What kept us from being heard last, where it is known.

    Raises
    ------
    ConfigError
        The address cannot be used.
    """

    def __init__(self, manager: Manager, lease: str, keys: PilotKeys | None) -> None:
        self.n = -1
        self.heard_at = self._connected_at = time.monotonic()
        self.trouble = ""
        self._announced = ""
        self._manager = manager
        self._lease = lease
        self._keys = keys
        # Several nodes of Slurm may be one machine.
        self._node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._started = time.time()
        self._context = zmq.Context()
        try:
            self._connect()
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"{self}: {error}") from None
        except OSError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"{self}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._disconnect()
        self._context.term()
        if isinstance(self._manager, Awaited) and announced(self._manager.file) == self._announced:
            with suppress(OSError):  # then the manager removes it
                self._manager.file.unlink(missing_ok=True)

    def __str__(self) -> str:
        return self._manager if isinstance(self._manager, str) else f"the manager that reads {self._manager.file}"

    def say(
        self,
        state: State,
        *,
        exit_code: int | None = None,
        status: Status = NOTHING,
        findings: tuple[Finding, ...] = (),
        task: TaskReport | None = None,
    ) -> bool:
        """Say how we are; return False if there is no connection just now."""
        beat = Heartbeat(
            lease=self._lease,
            node=self._node,
            pid=os.getpid(),
            n=self.n + 1,
            state=state,
            started=self._started,
            now=time.time(),
            exit_code=exit_code,
            status=status,
            findings=findings,
            task=task,
        )
        try:
            self._socket.send(wire.pack(beat), zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.n = beat.n
        return True

    def wait(self, within: float, *others: socket.socket, to_speak: bool = False) -> None:
        """Return once there is something to hear, here or on `others`; with `to_speak` also once something can be said.

        `within` is in seconds.
        """
        poller = zmq.Poller()
        for other in others:
            poller.register(other, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN | zmq.POLLOUT if to_speak else zmq.POLLIN)
        poller.poll(max(0, round(1000 * within)))

    def hear(self) -> list[Answer]:
        """Return the answers that came; never waits."""
        answers = []
        while self._socket.poll(0):
            parts = self._socket.recv_multipart()
            try:
                answers.append(wire.answer(parts[0]))
            except ValueError as error:
                _log.warning("%s: %s", self, " ".join(str(error).split()))
        now = time.monotonic()
        if answers:
            self.heard_at, self.trouble = now, ""
        elif now - max(self.heard_at, self._connected_at) > ANEW:
            if isinstance(self._manager, Awaited):  # it is for the manager to dial anew
                self._see_what_troubles()
            else:
                self._disconnect()
                self._connect()
        return answers

    def _connect(self) -> None:
        self._connected_at = time.monotonic()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.maxmsgsize = wire.MAX_BYTES
        self._socket.linger = 0  # what has to be heard is waited for
        self._socket.immediate = True  # a heartbeat that waits for a connection is old when it comes
        self._socket.sndhwm = 4
        self._monitor = self._socket.get_monitor_socket(sum(_TROUBLES))
        if self._keys is not None:
            self._keys.use(self._socket)
        if isinstance(self._manager, str):
            self._socket.connect(self._manager)
        else:
            self._listen(self._manager)

    def _listen(self, manager: Awaited) -> None:
        if self._keys is None and not manager.listen.startswith(LOOPBACK):
            _log.warning("whoever reaches this node may claim to be the manager: see xpcs-stream keys")
        self._socket.heartbeat_ivl, self._socket.heartbeat_timeout = HEARTBEAT, 2 * HEARTBEAT
        self._socket.bind(f"{manager.listen}:*")
        found = self._socket.get_string(zmq.LAST_ENDPOINT)
        # Of all interfaces the manager knows one, that of the node's name.
        self._announced = found.replace("//0.0.0.0:", f"//{socket.gethostname()}:")
        announce(manager.file, self._announced)

    def _disconnect(self) -> None:
        self._see_what_troubles()
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    def _see_what_troubles(self) -> None:
        while self._monitor.poll(0):
            from zmq.utils.monitor import parse_monitor_message  # with it comes asyncio, and a pilot is to start fast

            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            self.trouble = _TROUBLES[zmq.Event(event)]
