"""On a node: runs the tasks that the manager has, one after the other.

A pilot of kind "files". It goes for the same reasons as one of the stream, see `hpc_bridge.pilot`, except that nothing
that a command does ends it; a task that it has then is handed back.
"""

import logging
import socket
import tempfile
import time
from pathlib import Path

from hpc_bridge.curve import PilotKeys
from hpc_bridge.heartbeat import Assignment, Do, State, Status
from hpc_bridge.line import Line, Manager
from hpc_bridge.pilot import LOOK, Terms, has_to_go, say_farewell, signals_to_stop
from hpc_bridge.task_run import TaskRun

_log = logging.getLogger(__name__)


def run(*, lease: str, manager: Manager, terms: Terms, keys: PilotKeys | None = None) -> int:
    """Run tasks until it has to go; return what to exit with.

    To be called before there is another thread, and last: see `hpc_bridge.pilot.run`.

    Raises
    ------
    ConfigError
        The address cannot be used.
    """
    with (
        tempfile.TemporaryDirectory(prefix=f"xf-{lease}-") as folder,
        signals_to_stop() as signals,
        Line(manager, lease, keys) as line,
    ):
        pilot = _TaskPilot(lease, Path(folder), line, terms)
        try:
            return pilot.watch(signals)
        finally:
            pilot.kill()


class _TaskPilot:
    def __init__(self, lease: str, folder: Path, line: Line, terms: Terms) -> None:
        self._lease, self._folder, self._line, self._terms = lease, folder, line, terms
        self._state = State.SERVING
        self._task: TaskRun | None = None
        """The newest one, over or not, until another one or none is given."""
        self._code = 0
        self._why = ""
        self._due = 0.0
        self._newest = 0
        """Of our heartbeats that were answered."""

    def watch(self, signals: socket.socket) -> int:
        """Return once it has to go, and has no task that runs."""
        while self._state is State.SERVING or not self._is_free:
            now = time.monotonic()
            if now >= self._due and self._say():
                self._due = now + self._terms.every
            self._line.wait(LOOK, signals, to_speak=self._due <= time.monotonic())
            if has_to_go(signals):
                self._go("the scheduler takes the node", self._terms.requeue_code)
            self._heed()
            self._look()
            if time.monotonic() - self._line.heard_at > self._terms.alone:
                why = f": {self._line.trouble}" if self._line.trouble else ""
                self._go(f"{self._line} was not heard of for {self._terms.alone:g} s{why}", 0)
        self._state = State.ENDED
        say_farewell(self._line, self._say)
        return self._code

    def kill(self) -> None:
        """Leave no task behind."""
        if self._task is not None:
            self._task.kill()

    @property
    def _is_free(self) -> bool:
        return self._task is None or self._task.is_over

    def _say(self) -> bool:
        status = Status(ready=True, message=self._why)
        if self._task is not None and not self._why:
            status = self._task.status
        report = None if self._task is None else self._task.report
        code = self._code if self._state is State.ENDED else None
        return self._line.say(self._state, exit_code=code, status=status, task=report)

    def _heed(self) -> None:
        for answer in self._line.hear():
            if answer.do is not Do.GO_ON:
                self._go(f"the manager says: {answer.do}{answer.why and f', {answer.why}'}", 0)
            elif self._state is State.SERVING and answer.n >= self._newest:
                # A manager that is gone may have said more than came: the newest one counts.
                self._newest = answer.n
                self._take(answer.task)

    def _take(self, given: Assignment | None) -> None:
        if self._task is None or self._task.is_over:
            if self._task.is_for(given) if self._task is not None else given is None:
                return
            self._task, self._due = None, 0.0
            if given is not None:
                _log.info("task %s, attempt %d: %s", given.task, given.attempt, " ".join(given.command))
                self._task = TaskRun(given, name=self._lease, folder=self._folder, grace=self._terms.grace)
        elif not self._task.is_for(given):
            self._task.stop("the manager has it done by others")

    def _look(self) -> None:
        if self._task is None or self._task.is_over:
            return
        self._task.look()
        if self._task.is_over:
            told = self._task.report
            _log.info("task %s: %s%s", told.task, told.state, f", {told.message}" if told.message else "")
            self._due = 0.0

    def _go(self, why: str, code: int) -> None:
        if self._state is State.DRAINING:
            return
        _log.warning("%s", why)
        self._state, self._code, self._why, self._due = State.DRAINING, code, why, 0.0
        if self._task is not None:
            self._task.stop(why)
