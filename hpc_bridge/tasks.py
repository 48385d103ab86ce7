"""The record of tasks: commands that pilots of kind "files" run on their nodes, on disk before a pilot is told.

Who wants something computed, in the manager's process::

    task = tasks.add("8ID/run-17/g2", beamline="8ID", site="polaris", command=("xpcs-stream", "correlate", ...),
                     results=("/eagle/8ID/run-17.h5",), priority=5, now=time.time())  # as often as one likes
    task = tasks.get("8ID/run-17/g2")
    match task.state:
        case State.DONE: task.digests  # of its results, in their order
        case State.FAILED: task.why

Who runs it is `hpc_bridge.dispatch`'s matter. A command may be begun more than once, and a pilot that was not heard of
may still run it while another one does: it has to write its results under another name and rename them at its end.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hpc_bridge.errors import ConfigError, RecordError
from hpc_bridge.heartbeat import MAX_COMMAND, MAX_PATH, MAX_RESULTS, MAX_WORDS, Digest
from hpc_bridge.record import Record

SCHEMA = 75
"""Unlike those of leases and of moves, whose files it is not."""

_TABLES = """
CREATE TABLE tasks (
    task TEXT PRIMARY KEY, beamline TEXT NOT NULL, site TEXT NOT NULL, command TEXT NOT NULL, results TEXT NOT NULL,
    priority INTEGER NOT NULL, created REAL NOT NULL, state TEXT NOT NULL, attempt INTEGER NOT NULL,
    failures INTEGER NOT NULL, lease TEXT, exit_code INTEGER, digests TEXT NOT NULL, why TEXT NOT NULL,
    began REAL, ended REAL, not_before REAL NOT NULL DEFAULT 0
);
CREATE INDEX open_tasks ON tasks (beamline) WHERE ended IS NULL;
"""

_ID = re.compile(r"[\w.:/+-]{1,128}", re.ASCII)


class State(StrEnum):
    """What a task does."""

    WAITING = "waiting"
    """For a pilot; once more, if one was lost or the command failed."""
    RUNNING = "running"
    """A pilot has it, or will be told of it in the answer to its next heartbeat."""
    DONE = "done"
    """The command ended with 0, and all results are there."""
    FAILED = "failed"
    """It was tried often enough, or canceled: nobody tries it again without being asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A command, what came of it, and of which files size and sha256 are wanted. Times in s of the Unix epoch."""

    task: str
    """Its id."""
    beamline: str
    site: str
    """Where its files are: only pilots there run it."""
    command: tuple[str, ...]
    """Program and arguments; ``{status}`` in them stands for a file where it may tell how far it is, ``{name}`` for
    the pilot's lease."""
    results: tuple[str, ...]
    """Absolute paths on the node, of regular files that are there once the command ended with 0."""
    priority: int
    """The highest goes first; among equals the oldest."""
    created: float
    state: State
    attempt: int
    """From 1; one more each time that it waits again."""
    failures: int
    """How many attempts ended by themselves and not well."""
    lease: str | None
    """Of the pilot that has it, or had it last."""
    exit_code: int | None
    """Of the last attempt that ended by itself; 128 + N after signal N."""
    digests: tuple[Digest, ...]
    """Of all results, in their order, when it is done; else none."""
    why: str
    """It failed, or waits again, in words for people."""
    began: float | None
    """This attempt was handed out."""
    ended: float | None
    """It is done or failed."""
    not_before: float
    """While it waits, no pilot gets it until then."""


class Tasks:
    """The record of one manager, on a disk of its machine (not NFS).

    Every method may raise RecordError; each that writes has written to disk when it returns.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._do = record.do

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the record to write it, or begin one.

        Raises
        ------
        RecordError
            Another manager has it, or it is something else.
        """
        return cls(Record.open(path, _TABLES, SCHEMA, writer="manager", what="tasks"))

    @classmethod
    def look(cls, path: Path) -> Self:
        """Open the record to read it, whether a manager has it or not."""
        return cls(Record.look(path, SCHEMA, what="tasks"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have it."""
        self._record.close()

    def add(
        self,
        task: str,
        *,
        beamline: str,
        site: str,
        command: Sequence[str],
        results: Sequence[str] = (),
        priority: int = 0,
        now: float,
    ) -> Task:
        """Write down a task, and return it as it is on record.

        One that is there already stays as it is, also if it is over; while it waits it gets the priority that it has
        now. To have a task that is over run once more ask for it `again`.

        Parameters
        ----------
        task
            Its id, the same each time that the same is wanted: 1 to 128 of letters, digits and ``_ . : / + -``.
        results
            64 at most.

        Raises
        ------
        ConfigError
            It cannot be told to a pilot (the id, a relative path of a result, a command that is too long), or another
            command or other results are on record under the id.
        """
        _see_that_it_can_be_told(task, command, results)
        self._do(
            "INSERT INTO tasks (task, beamline, site, command, results, priority, created, state, attempt, failures,"
            " digests, why) VALUES (:task, :beamline, :site, :command, :results, :priority, :now, 'waiting', 1, 0,"
            " '[]', '') ON CONFLICT DO UPDATE SET priority = excluded.priority WHERE state = 'waiting'",
            {
                "task": task,
                "beamline": beamline,
                "site": site,
                "command": json.dumps(list(command)),
                "results": json.dumps(list(results)),
                "priority": priority,
                "now": now,
            },
        )
        found = self._of(task)
        if (found.beamline, found.site, found.command, found.results) != (
            beamline, site, tuple(command), tuple(results),
        ):  # fmt: skip
            raise ConfigError(f"task {task}: it is on record as another one, at {found.site}: {found.command}")
        return found

    def get(self, task: str) -> Task | None:
        """Return a task; None if it is not on record."""
        return next(iter(self._tasks("task = ?", (task,))), None)

    def of(self, beamline: str, since: float = 0) -> list[Task]:
        """Return those that are not over or ended after `since`, in the order in which they are handed out."""
        return self._tasks("beamline = ? AND (ended IS NULL OR ended > ?)", (beamline, since))

    def open_tasks(self, beamline: str) -> list[Task]:
        """Return those that wait or run, in the order in which they are handed out."""
        return self._tasks("beamline = ? AND ended IS NULL", (beamline,))

    def running(self, beamline: str) -> list[Task]:
        """Return those that pilots have."""
        return self._tasks("beamline = ? AND ended IS NULL AND state = 'running'", (beamline,))

    def had_by(self, beamline: str, lease: str) -> Task | None:
        """Return the task that the pilot of a lease has."""
        where = "beamline = ? AND ended IS NULL AND state = 'running' AND lease = ?"
        return next(iter(self._tasks(where, (beamline, lease))), None)

    def next(self, beamline: str, site: str, now: float) -> Task | None:
        """Return the one that goes next to a pilot at a site."""
        where = "beamline = ? AND ended IS NULL AND state = 'waiting' AND site = ? AND not_before <= ?"
        return next(iter(self._tasks(where, (beamline, site, now), most=1)), None)

    def asked(self, beamline: str, sites: Collection[str], n: int, now: float) -> list[str]:
        """Return the site of each task that runs, and then of those that wait at these sites; of the first `n`.

        Those that may not be handed out yet come last: their nodes are kept for them, where nobody else wants nodes.
        """
        is_there = f"site IN ({', '.join('?' * len(sites))})"
        rows = self._do(
            f"SELECT site FROM tasks WHERE beamline = ? AND ended IS NULL AND (state = 'running' OR {is_there})"  # noqa: S608
            " ORDER BY state = 'running' DESC, not_before > ?, priority DESC, created, rowid LIMIT ?",
            (beamline, *sites, now, n),
        )
        return [row["site"] for row in rows]

    def count(self, beamline: str) -> dict[State, int]:
        """Return how many there are, by what they do."""
        rows = self._do("SELECT state, COUNT(*) AS n FROM tasks WHERE beamline = ? GROUP BY state", (beamline,))
        return {State(row["state"]): int(row["n"]) for row in rows}

    def cancel(self, task: str, why: str, now: float) -> Task:
        """Write down that a task is no more wanted: it has failed, `why` says for what reason.

        The pilot that runs it is told to stop it. One that is over stays as it is.
        """
        return self._set(task, "state = 'failed', why = :why, ended = :now", why=why, now=now)

    def again(self, task: str, why: str, now: float) -> Task:
        """Write down that a task that is over is wanted once more, as new: its results were lost or turned out wrong.

        One that is not over stays as it is.
        """
        self._do(
            "UPDATE tasks SET state = 'waiting', attempt = attempt + 1, failures = 0, lease = NULL, exit_code = NULL,"
            " digests = '[]', why = :why, began = NULL, ended = NULL, not_before = 0, created = :now"
            " WHERE task = :task AND ended IS NOT NULL",
            {"task": task, "why": why, "now": now},
        )
        return self._of(task)

    def handed(self, task: str, lease: str, now: float) -> Task:
        """Write down to which pilot a task goes that waits, before that is told."""
        return self._set(
            task, "state = 'running', lease = :lease, began = :now, exit_code = NULL, why = ''", lease=lease, now=now
        )

    def done(self, task: str, digests: Iterable[Digest], now: float) -> Task:
        """Write down that a command ended with 0, and what its results are."""
        return self._set(
            task,
            "state = 'done', exit_code = 0, digests = :digests, why = '', ended = :now",
            digests=json.dumps([[each.path, each.size, each.sha256] for each in digests]),
            now=now,
        )

    def waits(self, task: str, why: str, not_before: float = 0.0) -> Task:
        """Write down that its pilot has it no more: it is nobody's fault, and begins anew."""
        return self._set(
            task,
            "state = 'waiting', attempt = attempt + 1, lease = NULL, why = :why, not_before = :not_before",
            why=why,
            not_before=not_before,
        )

    def fell(
        self, task: str, exit_code: int | None, why: str, *, attempts: int, not_before: float = 0.0, now: float
    ) -> Task:
        """Write down that an attempt ended by itself, and not well; after so many `attempts` the task has failed.

        Parameters
        ----------
        not_before
            If it is tried again.
        """
        return self._set(
            task,
            "exit_code = :exit_code, why = :why, failures = failures + 1, not_before = :not_before,"
            " state = CASE WHEN failures + 1 < :attempts THEN 'waiting' ELSE 'failed' END,"
            " attempt = attempt + (failures + 1 < :attempts),"
            " lease = CASE WHEN failures + 1 < :attempts THEN NULL ELSE lease END,"
            " ended = CASE WHEN failures + 1 < :attempts THEN NULL ELSE :now END",
            exit_code=exit_code,
            why=why,
            attempts=attempts,
            not_before=not_before,
            now=now,
        )

    def prune(self, before: float) -> None:
        """Forget those that ended before that."""
        self._do("DELETE FROM tasks WHERE ended < ?", (before,))

    def _tasks(self, where: str, values: tuple[object, ...], most: int = -1) -> list[Task]:
        rows = self._do(
            f"SELECT * FROM tasks WHERE {where} ORDER BY priority DESC, created, rowid LIMIT ?",  # noqa: S608
            (*values, most),
        )
        return [_task(row) for row in rows]

    def _set(self, task: str, changes: str, **values: object) -> Task:
        self._do(f"UPDATE tasks SET {changes} WHERE task = :task AND ended IS NULL", {"task": task, **values})  # noqa: S608
        return self._of(task)

    def _of(self, task: str) -> Task:
        found = self.get(task)
        if found is None:
            raise RecordError(f"{self._record.path}: task {task} is not in it")
        return found


def _task(row: dict[str, Any]) -> Task:
    told = {
        "command": tuple(json.loads(row["command"])),
        "results": tuple(json.loads(row["results"])),
        "digests": tuple(Digest(path=path, size=size, sha256=sha) for path, size, sha in json.loads(row["digests"])),
        "state": State(row["state"]),
    }
    return Task(**{**row, **told})


def _see_that_it_can_be_told(task: str, command: Sequence[str], results: Sequence[str]) -> None:
    if not _ID.fullmatch(task):
        raise ConfigError(f"task {task!r:.150}: an id is 1 to 128 of letters, digits and _ . : / + -")
    try:
        size = len("".join(command).encode())
    except UnicodeEncodeError as error:
        raise ConfigError(f"task {task}: its command cannot be told: {error}") from None
    if not 1 <= len(command) <= MAX_WORDS or size > MAX_COMMAND:
        raise ConfigError(f"task {task}: a command is 1 to {MAX_WORDS} words of {MAX_COMMAND:,} bytes in all")
    if len(results) > MAX_RESULTS:
        raise ConfigError(f"task {task}: {len(results)} results are more than {MAX_RESULTS}")
    for path in results:
        if not path.startswith("/") or not path.isprintable() or len(path.encode()) > MAX_PATH:
            raise ConfigError(f"task {task}: result {path!r:.200} is no absolute path of {MAX_PATH} bytes at most")
    if any("\0" in word for word in command):
        raise ConfigError(f"task {task}: a word of its command has a zero byte")
