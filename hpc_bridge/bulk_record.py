"""The record of runs that go by file: on disk before anything is done for them. One SQLite file, one writer."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from hpc_bridge.record import Record

SCHEMA = 73
"""Unlike those of other records, whose files it is not."""

_TABLES = """
CREATE TABLE runs (
    beamline TEXT NOT NULL, name TEXT NOT NULL, run TEXT NOT NULL, origin TEXT NOT NULL, lost INTEGER NOT NULL,
    folder TEXT NOT NULL, files TEXT NOT NULL, first TEXT NOT NULL, asked TEXT, priority INTEGER NOT NULL,
    created REAL NOT NULL, deadline REAL NOT NULL, stage TEXT NOT NULL, why TEXT NOT NULL,
    visit INTEGER NOT NULL, since REAL NOT NULL, site TEXT, refused TEXT NOT NULL, move TEXT, results TEXT NOT NULL,
    hashed REAL, moving REAL, arrived REAL, begun REAL, computed REAL, ended REAL,
    PRIMARY KEY (beamline, name)
);
CREATE INDEX open_runs ON runs (ended) WHERE ended IS NULL;
CREATE INDEX runs_of_files ON runs (beamline, folder, first);
"""


class Stage(StrEnum):
    """What is done for a run."""

    HASHING = "hashing"
    """Its files are read, so that what arrives can be held against them."""
    SENDING = "sending"
    COMPUTING = "computing"
    RETURNING = "returning"
    """Its result."""
    RELEASING = "releasing"
    """The spool is told that it may remove it."""
    DONE = "done"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_final(self) -> bool:
        """Nothing will be done any more."""
        return self in (Stage.DONE, Stage.FAILED, Stage.CANCELED)


class Origin(StrEnum):
    """Who wants a run to go by file."""

    SUBMITTED = "submitted"
    DROPPED = "dropped"
    STREAM = "stream"
    RUN_ENGINE = "run engine"
    """Whose documents point to its files."""


@dataclass(frozen=True, slots=True)
class Known:
    """A file as it was seen, and the sha256 that it had then, once that is known."""

    name: str
    """In its folder."""
    size: int
    mtime_ns: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A file that a node made."""

    name: str
    """In the folder of the run at the site, and in the one where results come back to."""
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that goes by file, and what came of it. Times in seconds of the Unix epoch."""

    beamline: str
    name: str
    """Of its folder at the site, and of its result; no other run of the beamline has it."""
    run: str
    """As others know it."""
    origin: Origin
    lost: bool
    """Its stream wants to be repaired."""
    folder: PurePosixPath
    """Where its files are, on this machine."""
    files: tuple[Known, ...]
    """The first is the one that is opened."""
    asked: str | None
    """The site that it has to go to; None: any."""
    priority: int
    created: float
    deadline: float
    stage: Stage
    why: str = ""
    """It failed, or does not get on."""
    visit: int = 1
    """Of a site, over all that were tried."""
    since: float
    """This visit began."""
    site: str | None = None
    refused: Mapping[str, str]
    """Sites that will not do, and why."""
    move: str | None = None
    """The request of `hpc_bridge.transfer_record` that it waits for, or waited for last."""
    results: tuple[Result, ...] = ()
    hashed: float | None = None
    moving: float | None = None
    """Its transfer began."""
    arrived: float | None = None
    begun: float | None = None
    """A node began with it."""
    computed: float | None = None
    ended: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """No other run has it."""
        return self.beamline, self.name

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def task(self) -> str:
        """The id of its task at the site that it visits; see `hpc_bridge.tasks`."""
        return f"{self.beamline}/{self.name}/{self.visit}"


_COLUMNS = [field.name for field in fields(Run)]
_PUT = (
    f"INSERT OR REPLACE INTO runs ({', '.join(_COLUMNS)}, first)"  # noqa: S608 - of our own names
    f" VALUES ({', '.join(f':{name}' for name in _COLUMNS)}, :first)"
)


class Runs:
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
        return cls(Record.open(path, _TABLES, SCHEMA, writer="manager", what="runs by file"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have it."""
        self._record.close()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Have all that is written down meanwhile on disk when it is over, or nothing of it."""
        self._do("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._do("ROLLBACK")
            raise
        self._do("COMMIT")

    def put(self, run: Run) -> Run:
        """Write down a run as it is now."""
        row = {
            **{name: getattr(run, name) for name in _COLUMNS},
            "folder": str(run.folder),
            "files": json.dumps([[file.name, file.size, file.mtime_ns, file.sha256] for file in run.files]),
            "refused": json.dumps(dict(run.refused)),
            "results": json.dumps([asdict(result) for result in run.results]),
            "first": run.files[0].name,
        }
        self._do(_PUT, row)
        return run

    def get(self, beamline: str, name: str) -> Run | None:
        """Return a run; None if it is not on record."""
        return next(self._runs("beamline = ? AND name = ?", (beamline, name)), None)

    def of_files(self, beamline: str, folder: PurePosixPath, first: str) -> list[Run]:
        """Return the runs that begin with this file, oldest first."""
        return list(self._runs("beamline = ? AND folder = ? AND first = ?", (beamline, str(folder), first)))

    def open_runs(self) -> list[Run]:
        """Return those that are not over, oldest first."""
        return list(self._runs("ended IS NULL", ()))

    def last(self, beamline: str, number: int) -> list[Run]:
        """Return those that ended last, the last one first."""
        rows = self._do(
            "SELECT * FROM runs WHERE beamline = ? AND ended IS NOT NULL ORDER BY ended DESC LIMIT ?",
            (beamline, number),
        )
        return [_run(row) for row in rows]

    def count(self, beamline: str) -> dict[str, int]:
        """Return how many there are, by stage."""
        rows = self._do("SELECT stage, COUNT(*) AS n FROM runs WHERE beamline = ? GROUP BY stage", (beamline,))
        return {row["stage"]: int(row["n"]) for row in rows}

    def prune(self, handed_in: float, others: float) -> None:
        """Forget runs that ended before these times: those that were handed in, and others."""
        self._do("DELETE FROM runs WHERE ended < CASE origin WHEN 'submitted' THEN ? ELSE ? END", (handed_in, others))

    def _runs(self, where: str, values: tuple[object, ...]) -> Iterator[Run]:
        rows = self._do(f"SELECT * FROM runs WHERE {where} ORDER BY created, rowid", values)  # noqa: S608
        return map(_run, rows)


def _run(row: dict[str, Any]) -> Run:
    told = {
        "origin": Origin(row["origin"]),
        "lost": bool(row["lost"]),
        "folder": PurePosixPath(row["folder"]),
        "files": tuple(Known(*each) for each in json.loads(row["files"])),
        "stage": Stage(row["stage"]),
        "refused": json.loads(row["refused"]),
        "results": tuple(Result(**each) for each in json.loads(row["results"])),
    }
    return Run(**{name: told.get(name, value) for name, value in row.items() if name != "first"})
