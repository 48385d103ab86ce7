"""One task on its node: its command, and then what its results are."""

import errno
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from hpc_bridge.child import Child
from hpc_bridge.heartbeat import Assignment, Digest, Status, TaskReport, TaskState
from hpc_bridge.status_file import StatusFile

_log = logging.getLogger(__name__)

CHUNK = 2**20
"""Bytes read at once."""

PIPE = 2**16
"""Bytes that a pipe holds."""

TAIL = 4096
"""Bytes of a command's output that are kept: who wants all of it finds it in the output of the job."""


class TaskRun:
    """A task that runs, or is over.

    To be begun while no other one of this process runs: see `hpc_bridge.child`.

    Parameters
    ----------
    given
        What is to be run.
    name
        Of the pilot.
    folder
        For the file where the command tells how it is.
    grace
        How long (s) it may take to end once it is stopped.

    Attributes
    ----------
    report
        What came of it so far.
    status
        What the command tells of itself.
    """

    def __init__(self, given: Assignment, *, name: str, folder: Path, grace: float) -> None:
        self.report = TaskReport(task=given.task, attempt=given.attempt, state=TaskState.RUNNING)
        self.status = Status()
        self._given, self._grace = given, grace
        status = folder / "status.json"
        status.unlink(missing_ok=True)
        self._file = StatusFile(status)
        words = [word.replace("{status}", str(status)).replace("{name}", name) for word in given.command]
        self._output = _Output()
        try:
            self._child = Child(words, self._output.theirs)
        finally:
            self._output.begun()
        self._digests: _Digests | None = None
        self._kill_at: float | None = None
        self._why = ""

    @property
    def is_over(self) -> bool:
        """Whether it is, and nothing of it is left."""
        return self.report.state is not TaskState.RUNNING

    def is_for(self, given: Assignment | None) -> bool:
        """Say whether this is what is to be run."""
        return given is not None and (given.task, given.attempt) == (self.report.task, self.report.attempt)

    def look(self) -> None:
        """See how far it is."""
        self._output.take()
        if self.is_over:
            return
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self.kill()
            return
        if self._digests is not None:
            self._take_digests(self._digests)
            return
        code = self._child.exit_code()
        if code is None:
            self._look_at_status()
            return
        self._output.take()
        if self._kill_at is not None:
            self._end(TaskState.STOPPED, code, self._why)
        elif code == 0:
            self._digests = _Digests(self._given.results)
        else:
            self._end(TaskState.FAILED, code, self._child.why or self._output.last_line())

    def stop(self, why: str) -> None:
        """Tell it to stop, once; it has its time for it."""
        if self._kill_at is None and not self.is_over:
            self._kill_at, self._why = time.monotonic() + self._grace, why
            self._child.stop()

    def kill(self) -> None:
        """Leave nothing of it."""
        self._child.kill()
        if self._digests is not None:
            self._digests.stop()
        self._output.close()
        if not self.is_over:
            self._end(TaskState.STOPPED, None, self._why)

    def _look_at_status(self) -> None:
        status = self._file.look()
        if status is not None:
            self.status = status
            self.report = _told(self.report, TaskState.RUNNING, None, status.message)

    def _take_digests(self, digests: "_Digests") -> None:
        if digests.is_alive():
            return
        if len(digests.found) < len(self._given.results):
            self._end(TaskState.FAILED, 0, digests.why)
        else:
            self._end(TaskState.DONE, 0, "", tuple(digests.found))

    def _end(self, state: TaskState, code: int | None, message: str, digests: tuple[Digest, ...] = ()) -> None:
        self._output.close()
        self.status = Status()
        self.report = _told(self.report, state, code, message, digests)


def _told(
    before: TaskReport, state: TaskState, code: int | None, message: str, digests: tuple[Digest, ...] = ()
) -> TaskReport:
    return TaskReport(
        task=before.task, attempt=before.attempt, state=state, exit_code=code, message=message, digests=digests
    )


class _Output:
    """What a command writes: it goes where ours goes, and its end is kept."""

    def __init__(self) -> None:
        self._ours, self.theirs = os.pipe()
        os.set_blocking(self._ours, False)
        self._tail = b""
        self._is_open = True

    def begun(self) -> None:
        """Leave the other end to the command."""
        os.close(self.theirs)

    def take(self) -> None:
        """Take what there is; never waits."""
        for _ in range(16):  # what writes without end shall not keep us from all else
            try:
                found = os.read(self._ours, PIPE) if self._is_open else b""
            except BlockingIOError:
                return
            if not found:
                return
            with suppress(OSError):  # a disk that is full is no reason to go
                sys.stderr.buffer.write(found)
                sys.stderr.buffer.flush()
            self._tail = (self._tail + found)[-TAIL:]

    def last_line(self) -> str:
        """Return the last one in which there is something."""
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")

    def close(self) -> None:
        """Take no more."""
        if self._is_open:
            self._is_open = False
            os.close(self._ours)


class _Digests(Thread):
    """Reads files, however large they are, beside all else."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(name="digests", daemon=True)  # a file system that hangs shall not keep us
        self.found: list[Digest] = []
        self.why = ""
        """There are not all of them."""
        self._paths = paths
        self._enough = Event()
        self.start()

    def run(self) -> None:
        for path in self._paths:
            try:
                self.found.append(self._digest(path))
            except OSError as error:
                self.why = f"result {path}: {error.strerror or error}"
                return
            if self._enough.is_set():
                return

    def stop(self) -> None:
        """Read no further."""
        self._enough.set()
        self.join(1.0)

    def _digest(self, path: str) -> Digest:
        # A pipe that nobody writes to would never open.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            sha256, size = hashlib.sha256(), 0
            while (chunk := os.read(file, CHUNK)) and not self._enough.is_set():
                sha256.update(chunk)
                size += len(chunk)
        finally:
            os.close(file)
        return Digest(path=path, size=size, sha256=sha256.hexdigest())
