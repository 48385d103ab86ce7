"""Tasks that this process carries out itself, for people without Globus."""

import json
import uuid
from collections.abc import Mapping, Sequence
from threading import Event, Lock, Semaphore, Thread
from types import TracebackType
from typing import Any, Protocol, Self

from hpc_bridge.errors import BridgeError
from hpc_bridge.transfer import Progress, Request, State, UnknownTask

REMEMBERED = 1000
"""Tasks, of those that are over."""

_STOPS_WITHIN = 5.0


class TaskFailed(Exception):
    """A task came to nothing; why."""


class TaskCanceled(Exception):
    """A task was told to end."""


class Task:
    """How far a task is, for the thread that carries it out and for those who ask."""

    def __init__(self) -> None:
        self.canceled = Event()
        self.state = State.QUEUED
        self.message = ""
        self.bytes = 0
        self.files = 0
        self.faults = 0

    def go_on(self) -> None:
        """Raise TaskCanceled if it is to end."""
        if self.canceled.is_set():
            raise TaskCanceled


class Way(Protocol):
    """How files get somewhere."""

    def check(self, request: Request) -> None:
        """Raise TransferRefused if this is no way between its places."""

    def carry(self, request: Request, task: Task) -> None:
        """Bring the files of a request to where they are to be. What is there already need not be brought.

        Raises
        ------
        TaskFailed
            They are not all there; what is may be used when it is tried again.
        TaskCanceled
        """

    def missing(self, request: Request) -> Sequence[str]:
        """Return what is not at the destination with its size and sha256, and why."""


class Here:
    """Tasks in threads of this process; they are gone with it, and begin again where they were."""

    def __init__(self, way: Way, most_active: int = 3) -> None:
        self.most_active = most_active
        self._way = way
        self._tasks: dict[str, Task] = {}
        self._threads: dict[str, Thread] = {}
        self._turns = Semaphore(most_active)
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            task.canceled.set()
        for thread in self._threads.values():
            thread.join(_STOPS_WITHIN)

    def prepare(self, request: Request, name: str) -> str:
        """Return the document of a task."""
        self._way.check(request)
        return json.dumps({"task": uuid.uuid4().hex, "label": name, "request": request.model_dump(mode="json")})

    def submit(self, document: str) -> str:
        """Begin a task, if there is none of this document."""
        read: Mapping[str, Any] = json.loads(document)
        task = str(read["task"])
        with self._lock:
            if task not in self._tasks:
                self._forget()
                self._tasks[task] = Task()
                arguments = self._tasks[task], Request.model_validate(read["request"])
                self._threads[task] = Thread(target=self._carry, args=arguments, name=str(read["label"]), daemon=True)
                self._threads[task].start()
        return task

    def find(self, document: str) -> str | None:
        """Return the task of a document."""
        task = str(json.loads(document)["task"])
        return task if task in self._tasks else None

    def progress(self, task: str) -> Progress:
        """Return how far a task is."""
        known = self._tasks.get(task)
        if known is None:
            raise UnknownTask(f"task {task} is not one of this process")
        return Progress(
            state=known.state, bytes=known.bytes, files=known.files, faults=known.faults, message=known.message
        )

    def cancel(self, task: str) -> None:
        """Tell a task to end."""
        if task in self._tasks:
            self._tasks[task].canceled.set()

    def missing(self, request: Request) -> Sequence[str]:
        """Return what is not at the destination."""
        return self._way.missing(request)

    def _carry(self, task: Task, request: Request) -> None:
        with self._turns:
            try:
                task.go_on()
                task.state = State.ACTIVE
                self._way.carry(request, task)
            except TaskCanceled:
                task.state = State.CANCELED
            except (TaskFailed, BridgeError, OSError) as error:
                task.message = str(error)
                task.state = State.FAILED
            else:
                task.state = State.DONE
            finally:
                if not task.state.is_final:  # a defect of ours, which the thread reports
                    task.message = "it broke down: see the log"
                    task.state = State.FAILED

    def _forget(self) -> None:
        over = [name for name, task in self._tasks.items() if task.state.is_final]
        for name in over[: max(0, len(over) - REMEMBERED)]:
            del self._tasks[name]
            del self._threads[name]
