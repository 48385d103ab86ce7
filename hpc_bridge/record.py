"""What the records on disk have in common: SQLite files with one writer."""

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Any

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
