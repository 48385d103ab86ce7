"""What the records on disk have in common: SQLite files with one writer."""

import fcntl
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from hpc_bridge.errors import RecordError


def lock(path: Path, writer: str) -> int:
    """Become the one writer of a record; return the descriptor of the lock, which ends with it.

    Raises
    ------
    RecordError
        There is another one, a `writer` as we are: names its process.
    """
    try:
        held = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(held, 20).decode("ascii", "replace")
        os.close(held)
        raise RecordError(f"{path}: another {writer} has it: process {pid}") from None
    os.ftruncate(held, 0)
    os.write(held, str(os.getpid()).encode())
    return held


def row(cursor: sqlite3.Cursor, values: tuple[Any, ...]) -> dict[str, Any]:
    """Return a row by the names of its columns, for `sqlite3.Connection.row_factory`."""
    return {column[0]: value for column, value in zip(cursor.description, values, strict=True)}


class Record:
    """A record of one version, open. Every method may raise RecordError; what was written is on disk."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self._lock = lock
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            self._unlock()
            raise RecordError(f"{path}: {error}") from None
        self._connection.row_factory = row

    @classmethod
    def open(cls, path: Path, tables: str, schema: int, *, writer: str, what: str) -> Self:
        """Open a record to write it, or begin one.

        Parameters
        ----------
        tables
            Statements that make them.
        schema
            Number by which this record is told from others, and from other versions of it.
        what
            It is a record of.

        Raises
        ------
        RecordError
            Another `writer` has it, or it is something else.
        """
        record = cls(path, lock(path, writer))
        try:
            record._prepare(tables, schema)
            record._check(schema, what)
        except RecordError:
            record.close()
            raise
        return record

    @classmethod
    def look(cls, path: Path, schema: int, *, what: str) -> Self:
        """Open a record to read it, whether somebody writes it or not."""
        if not path.is_file():
            raise RecordError(f"{path}: there is no such record")
        record = cls(path, None)
        try:
            record.do("PRAGMA query_only = ON")
            record._check(schema, what)
        except RecordError:
            record.close()
            raise
        return record

    def close(self) -> None:
        """Let others have it."""
        self._connection.close()
        self._unlock()

    def do(self, statement: str, values: Sequence[object] | Mapping[str, object] = ()) -> list[dict[str, Any]]:
        """Carry out a statement, and return its rows."""
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise RecordError(f"{self.path}: {error}") from None

    def _prepare(self, tables: str, schema: int) -> None:
        self.do("PRAGMA journal_mode = WAL")
        self.do("PRAGMA synchronous = FULL")
        if not self.do("SELECT 1 FROM sqlite_master") and self._schema() == 0:
            try:
                self._connection.executescript(f"BEGIN IMMEDIATE; {tables} PRAGMA user_version = {schema}; COMMIT;")
            except sqlite3.Error as error:
                raise RecordError(f"{self.path}: {error}") from None

    def _check(self, schema: int, what: str) -> None:
        if self._schema() != schema:
            raise RecordError(f"{self.path}: it is no record of {what} that this hpc-bridge knows")

    def _schema(self) -> int:
        [[schema]] = [row.values() for row in self.do("PRAGMA user_version")]
        return int(schema)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
