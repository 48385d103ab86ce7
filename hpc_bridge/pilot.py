"""On a node: runs a command, tells the manager that it lives, and sees to it that it goes when it has to.

The reasons to go, and what this process then ends with:

    the scheduler takes the node (SIGTERM)   the code with which the scheduler runs the job again
    the manager says so                      0
    the manager was not heard of for long    0: nothing is left behind that nobody knows of
    the command ended                        its own code
"""

import logging
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_bridge.child import Child
from hpc_bridge.curve import PilotKeys
from hpc_bridge.heartbeat import Do, State, Status
from hpc_bridge.line import Line, Manager
from hpc_bridge.status_file import StatusFile

_log = logging.getLogger(__name__)

LOOK = 0.1
"""Seconds between looks at the status file."""

FAREWELL = 1.0
"""Seconds in which the manager may hear that a pilot has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """When a pilot speaks, and when it goes (s)."""

    every: float = 1.0
    """Between heartbeats."""
    alone: float = 120.0
    """After which it goes if the manager is not heard of."""
    grace: float = 20.0
    """That the command may take to end before it is killed."""
    requeue_code: int = 85


def run(command: Sequence[str], *, lease: str, manager: Manager, terms: Terms, keys: PilotKeys | None = None) -> int:
    """Run a command until it ends or has to; return what to exit with.

    To be called before there is another thread, see `hpc_bridge.child`, and last: signals to stop are ignored then.

    Parameters
    ----------
    command
        Program and arguments; ``{status}`` in them stands for a file where it tells how it is, ``{name}`` for the
        lease. One that is not told of the file is ready once it runs.
    lease
        The manager's name for this pilot.
    manager
        Where it is.
    keys
        None: neither encrypted nor authenticated.

    Raises
    ------
    ConfigError
        The address cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix=f"xb-{lease}-") as folder, signals_to_stop() as signals:
        status = Path(folder) / "status.json"
        child = Child([word.replace("{status}", str(status)).replace("{name}", lease) for word in command])
        try:
            with Line(manager, lease, keys) as line:
                file = StatusFile(status) if any("{status}" in word for word in command) else None
                return _Pilot(child, file, line, terms).watch(signals)
        finally:
            child.kill()


class _Pilot:
    def __init__(self, child: Child, file: StatusFile | None, line: Line, terms: Terms) -> None:
        self._child = child
        self._file = file
        self._line = line
        self._terms = terms
        self._state = State.STARTING if file else State.SERVING
        self._status = Status(ready=file is None)
        self._code: int | None = None
        """To exit with, once we go; None: with that of the command."""
        self._why = ""
        """Why we go."""
        self._due = self._kill_at = 0.0

    def watch(self, signals: socket.socket) -> int:
        """Return once the command has ended, whatever for."""
        while (code := self._child.exit_code()) is None:
            self._beat()
            # What could not be said for want of a connection is said once there is one.
            self._line.wait(LOOK, signals, to_speak=self._due <= time.monotonic())
            if has_to_go(signals):
                self._go("the scheduler takes the node", self._terms.requeue_code)
            self._heed()
            self._look()
            self._keep_time()
        self._look()
        self._state, self._why = State.ENDED, self._why or self._child.why
        self._say_farewell(code)
        return code if self._code is None else self._code

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._due and self._line.say(self._state, status=self._told()):
            self._due = now + self._terms.every

    def _told(self) -> Status:
        return replace(self._status, message=self._why) if self._why else self._status

    def _heed(self) -> None:
        for answer in self._line.hear():
            if answer.do is not Do.GO_ON:
                self._go(f"the manager says: {answer.do}{answer.why and f', {answer.why}'}", 0)

    def _look(self) -> None:
        status = self._file.look() if self._file else None
        if status is None:
            return
        if status.ready and self._state is State.STARTING:
            self._state, self._due = State.SERVING, 0.0
        if status.regions != self._status.regions:
            self._due = 0.0
        self._status = status

    def _keep_time(self) -> None:
        now = time.monotonic()
        if now - self._line.heard_at > self._terms.alone:
            why = f": {self._line.trouble}" if self._line.trouble else ""
            self._go(f"{self._line} was not heard of for {self._terms.alone:g} s{why}", 0)
        if self._state is State.DRAINING and now > self._kill_at:
            _log.warning("the command has not ended in %g s: it is killed", self._terms.grace)
            self._child.kill()

    def _go(self, why: str, code: int) -> None:
        if self._state is State.DRAINING:
            return
        self._child.stop()
        _log.warning("%s", why)
        self._state, self._code, self._why = State.DRAINING, code, why
        self._due, self._kill_at = 0.0, time.monotonic() + self._terms.grace

    def _say_farewell(self, code: int) -> None:
        if self._child.why:
            _log.warning("%s", self._child.why)
        say_farewell(self._line, lambda: self._line.say(self._state, exit_code=code, status=self._told()))


def say_farewell(line: Line, say: Callable[[], bool]) -> None:
    """Say something last, and wait a while until the manager has heard it."""
    deadline = time.monotonic() + FAREWELL
    said: int | None = None
    while (left := deadline - time.monotonic()) > 0:
        if said is None and say():
            said = line.n
        line.wait(left, to_speak=said is None)
        if any(answer.n == said for answer in line.hear()):
            return


@contextmanager
def signals_to_stop() -> Iterator[socket.socket]:
    """Yield a socket that has a byte for every signal to stop, or of a child that ended."""
    heard, told = socket.socketpair()
    for end in (heard, told):
        end.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    for number in (*_STOP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    try:
        yield heard
    finally:
        for number in _STOP:
            signal.signal(number, signal.SIG_IGN)  # whoever repeats it does not change what we end with
        signal.set_wakeup_fd(-1)
        heard.close()
        told.close()


_STOP = (signal.SIGTERM, signal.SIGINT)


def has_to_go(signals: socket.socket) -> bool:
    """Say whether there was a signal to stop."""
    with suppress(BlockingIOError):
        return any(number in _STOP for number in signals.recv(4096))
    return False
