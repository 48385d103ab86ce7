"""The record of requests to move files: on disk before anything is asked of anybody. One SQLite file, one writer."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hpc_bridge.errors import RecordError
from hpc_bridge.record import Record
from hpc_bridge.transfer import Progress, Request, State

SCHEMA = 74
"""Unlike that of leases, whose file it is not."""

_TABLES = """
CREATE TABLE moves (
    move TEXT PRIMARY KEY, request TEXT NOT NULL, priority INTEGER NOT NULL, created REAL NOT NULL,
    state TEXT NOT NULL, message TEXT NOT NULL, attempt INTEGER NOT NULL, document TEXT, task TEXT,
    bytes INTEGER NOT NULL, files INTEGER NOT NULL, faults INTEGER NOT NULL, nice_status TEXT NOT NULL,
    stalled_since REAL, ending TEXT, begun REAL, ended REAL
);
CREATE INDEX open_moves ON moves (ended) WHERE ended IS NULL;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A request and what came of it. Times in seconds of the Unix epoch."""

    move: str
    """12 hex digits, of what is to be moved and where to."""
    request: Request
    priority: int
    """The highest goes first."""
    created: float
    state: State
    message: str
    attempt: int
    """From 1."""
    document: str | None
    """Of the task of this attempt: written down before it is submitted."""
    task: str | None
    """Its id, once the service has told it."""
    bytes: int
    files: int
    faults: int
    nice_status: str
    stalled_since: float | None
    ending: str | None
    """Why it is to be canceled."""
    begun: float | None
    """The task of this attempt was submitted."""
    ended: float | None

    @property
    def may_release(self) -> bool:
        """The source may go: all that was asked for has arrived, with its size and sha256."""
        return self.state is State.DONE

    @property
    def name(self) -> str:
        """Of the task of this attempt."""
        return f"xs-{self.move}-{self.attempt}"


class Moves:
    """The record of one mover, on a disk of its machine (not NFS).

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
            Another mover has it, or it is something else.
        """
        return cls(Record.open(path, _TABLES, SCHEMA, writer="mover", what="requests to move files"))

    @classmethod
    def look(cls, path: Path) -> Self:
        """Open the record to read it, whether a mover has it or not."""
        return cls(Record.look(path, SCHEMA, what="requests to move files"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have it."""
        self._record.close()

    def add(self, request: Request, priority: int, now: float, since: float | None = None) -> Move:
        """Write down a request.

        One that is on record already is not begun twice: it gets the priority and the deadline that it has now, and if
        it had failed or was canceled it begins again.

        Parameters
        ----------
        since
            If given, it begins again if it ended before that, well or not, and not if it ended later.
        """
        move = move_of(request)
        over = "ended < :since" if since is not None else "state IN ('failed', 'canceled')"
        self._do(
            "INSERT INTO moves (move, request, priority, created, state, message, attempt, bytes, files, faults,"  # noqa: S608
            " nice_status) VALUES (:move, :request, :priority, :now, 'queued', '', 1, 0, 0, 0, '')"
            " ON CONFLICT DO UPDATE SET request = excluded.request, priority = excluded.priority,"
            f" attempt = attempt + COALESCE({over}, 0),"
            f" ending = CASE WHEN {over} THEN NULL ELSE ending END,"
            f" document = CASE WHEN {over} THEN NULL ELSE document END,"
            f" task = CASE WHEN {over} THEN NULL ELSE task END,"
            f" message = CASE WHEN {over} THEN '' ELSE message END,"
            f" begun = CASE WHEN {over} THEN NULL ELSE begun END,"
            f" state = CASE WHEN {over} THEN 'queued' ELSE state END,"
            f" ended = CASE WHEN {over} THEN NULL ELSE ended END",
            {"move": move, "request": request.model_dump_json(), "priority": priority, "now": now, "since": since},
        )
        return self._of(move)

    def prepared(self, move: str, document: str) -> Move:
        """Write down the document of a task, before it is submitted."""
        return self._set(move, "document = :document, task = NULL", document=document)

    def submitted(self, move: str, task: str, now: float) -> Move:
        """Write down the task of a document."""
        return self._set(
            move,
            "task = :task, state = 'queued', message = '', stalled_since = NULL, begun = COALESCE(begun, :now)",
            task=task,
            now=now,
        )

    def seen(self, move: str, progress: Progress, now: float) -> Move:
        """Write down how far a task is, which is not over."""
        return self._set(
            move,
            "state = :state, message = :message, bytes = :bytes, files = :files, faults = :faults,"
            " nice_status = :nice_status,"
            " stalled_since = CASE :state WHEN 'stalled' THEN COALESCE(stalled_since, :now) END",
            state=progress.state,
            message=progress.message,
            bytes=progress.bytes,
            files=progress.files,
            faults=progress.faults,
            nice_status=progress.nice_status,
            now=now,
        )

    def waits(self, move: str, state: State, message: str, now: float) -> Move:
        """Write down why nothing is done for it at present."""
        return self._set(
            move,
            "state = :state, message = :message,"
            " stalled_since = CASE :state WHEN 'stalled' THEN COALESCE(stalled_since, :now) END",
            state=state,
            message=message,
            now=now,
        )

    def again(self, move: str, message: str) -> Move:
        """Write down that its task came to nothing, and it needs a new one."""
        return self._set(
            move,
            "attempt = attempt + 1, document = NULL, task = NULL, begun = NULL, state = 'queued', stalled_since = NULL,"
            " message = :message",
            message=message,
        )

    def ending(self, move: str, why: str) -> Move:
        """Write down that it is to be canceled; what was said first holds."""
        return self._set(move, "ending = COALESCE(ending, :why)", why=why)

    def ended(self, move: str, state: State, message: str, now: float) -> Move:
        """Write down that it is over."""
        return self._set(
            move,
            "state = :state, message = :message, document = NULL, stalled_since = NULL, ended = :now",
            state=state,
            message=message,
            now=now,
        )

    def get(self, move: str) -> Move | None:
        """Return a request; None if it is not on record."""
        return next(iter(self._moves("move = ?", (move,))), None)

    def open_moves(self) -> list[Move]:
        """Return those that are not over, oldest first."""
        return self._moves("ended IS NULL", ())

    def all(self, since: float = 0) -> list[Move]:
        """Return those that are not over or ended after `since`, oldest first."""
        return self._moves("ended IS NULL OR ended > ?", (since,))

    def prune(self, before: float) -> None:
        """Forget those that ended before that."""
        self._do("DELETE FROM moves WHERE ended < ?", (before,))

    def _moves(self, where: str, values: tuple[object, ...]) -> list[Move]:
        rows = self._do(f"SELECT * FROM moves WHERE {where} ORDER BY created, rowid", values)  # noqa: S608
        return [
            Move(**{**row, "request": Request.model_validate_json(row["request"]), "state": State(row["state"])})
            for row in rows
        ]

    def _set(self, move: str, changes: str, **values: object) -> Move:
        self._do(f"UPDATE moves SET {changes} WHERE move = :move AND ended IS NULL", {"move": move, **values})  # noqa: S608
        return self._of(move)

    def _of(self, move: str) -> Move:
        found = self.get(move)
        if found is None:
            raise RecordError(f"{self._record.path}: request {move} is not in it")
        return found


def move_of(request: Request) -> str:
    """Return the name of a request: the same for the same files, from and to the same places."""
    return hashlib.sha256(request.model_dump_json(exclude={"deadline"}).encode()).hexdigest()[:12]
