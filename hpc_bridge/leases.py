"""The record of leases: what was asked of schedulers, on disk before it is asked. One SQLite file, one writer."""

import os
import secrets
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hpc_bridge import record
from hpc_bridge.errors import RecordError

SCHEMA = 2

LONGEST_RUN = 24 * 3600.0
"""A run without a stop is taken for over after so long (s)."""

_TABLES = """
CREATE TABLE leases (
    lease TEXT PRIMARY KEY, beamline TEXT NOT NULL, site TEXT NOT NULL, queue TEXT NOT NULL, account TEXT NOT NULL,
    nodes INTEGER NOT NULL, walltime REAL NOT NULL, replaces TEXT, stage TEXT NOT NULL, reason TEXT NOT NULL,
    job_id TEXT, node TEXT NOT NULL,
    created REAL NOT NULL, submitted REAL, started REAL, serving_since REAL, leaving_since REAL, ended REAL,
    kind TEXT NOT NULL DEFAULT 'stream'
);
CREATE INDEX open_leases ON leases (ended) WHERE ended IS NULL;
CREATE INDEX leases_begun ON leases (site, created);
CREATE TABLE runs (
    beamline TEXT NOT NULL, run TEXT NOT NULL, began REAL NOT NULL, ended REAL, PRIMARY KEY (beamline, run)
);
"""

_PAUSES = """
CREATE TABLE pauses (
    beamline TEXT NOT NULL, kind TEXT NOT NULL, site TEXT NOT NULL, queue TEXT NOT NULL, until REAL NOT NULL,
    why TEXT NOT NULL, PRIMARY KEY (beamline, kind, site, queue)
);
"""

_FROM_1 = f"""
ALTER TABLE leases ADD COLUMN kind TEXT NOT NULL DEFAULT 'stream';
DROP TABLE pauses; {_PAUSES}
"""
"""Of pauses nothing is kept: they are over in minutes."""

_USED_UNTIL = "MIN(COALESCE(leases.ended, leases.started + leases.walltime), :now)"
"""A job whose end nobody saw was ended by its walltime."""


class Kind(StrEnum):
    """What pilots are for."""

    STREAM = "stream"
    """They run one command for as long as they are there."""
    FILES = "files"
    """They run tasks, one after the other, see `hpc_bridge.tasks`."""


class Stage(StrEnum):
    """How far a lease is, by what we did."""

    SUBMITTING = "submitting"
    """Asked for, or about to be: whether there is a job is not known."""
    SUBMITTED = "submitted"
    DRAINING = "draining"
    """Its pilot is told to hand over and go."""
    CANCELLING = "cancelling"
    """The scheduler is asked to end it."""
    OVER = "over"


PREFIXES = {Kind.STREAM: "xb-", Kind.FILES: "xf-"}
"""Of the names of all jobs of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One job of ours, from before it is asked for. Times in seconds of the Unix epoch."""

    lease: str
    """12 hex digits."""
    beamline: str
    site: str
    queue: str
    """The rung of the ladder."""
    account: str
    """Empty: the scheduler's default."""
    nodes: int
    walltime: float
    """Asked for (s)."""
    replaces: str | None
    """The lease whose pilot goes once the one of this serves."""
    stage: Stage
    reason: str
    """Why it leaves, or how it ended."""
    job_id: str | None
    node: str
    created: float
    submitted: float | None
    started: float | None
    serving_since: float | None
    leaving_since: float | None
    ended: float | None
    kind: Kind = Kind.STREAM

    @property
    def name(self) -> str:
        """Of the job."""
        return f"{PREFIXES[self.kind]}{self.beamline}-{self.lease}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of the run engine."""

    run: str
    began: float
    ended: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """A rung that is passed by for a while."""

    site: str
    queue: str
    until: float
    why: str
    kind: Kind = Kind.STREAM


class Leases:
    """The record of one manager, on a disk of its machine (not NFS).

    Every method may raise RecordError; each that writes has written to disk when it returns.

    Parameters
    ----------
    connection
        In autocommit mode.
    lock
        Descriptor of the lock, None when the record is only read.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int | None) -> None:
        self._path = path
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the record to write it, or begin one.

        Raises
        ------
        RecordError
            Another manager has it (names its process), it is of a newer version, or no such record.
        """
        lock = record.lock(path, "manager")
        try:
            return cls(path, _connect(path, _prepare), lock)
        except RecordError:
            os.close(lock)
            raise

    @classmethod
    def look(cls, path: Path) -> Self:
        """Open the record to read it, whether a manager has it or not; who goes on looking opens it each time."""
        if not path.is_file():
            raise RecordError(f"{path}: there is no such record")
        # Whoever may only read could not make the files that WAL needs; without them nobody writes.
        is_still = not path.with_name(f"{path.name}-wal").exists()
        uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if is_still else ''}"
        return cls(path, _connect(path, _check, uri), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have it."""
        self._connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(
        self,
        *,
        beamline: str,
        site: str,
        queue: str,
        account: str,
        walltime: float,
        now: float,
        nodes: int = 1,
        replaces: str | None = None,
        kind: Kind = Kind.STREAM,
    ) -> Lease:
        """Write down a new lease, before its job is submitted."""
        lease = secrets.token_hex(6)
        self._do(
            "INSERT INTO leases (lease, beamline, site, queue, account, nodes, walltime, replaces, stage, reason, node,"
            " created, kind) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, '', '', ?, ?)",
            (lease, beamline, site, queue, account, nodes, walltime, replaces, Stage.SUBMITTING, now, kind),
        )
        return self._of(lease)

    def submitted(self, lease: str, job_id: str, at: float) -> Lease:
        """Write down the job of a lease."""
        return self._set(
            lease,
            "job_id = :job_id, submitted = COALESCE(submitted, :at), "
            "stage = CASE stage WHEN 'submitting' THEN 'submitted' ELSE stage END",
            job_id=job_id,
            at=at,
        )

    def started(self, lease: str, at: float, node: str) -> Lease:
        """Write down since when it uses a node; what was said first holds."""
        return self._set(
            lease, "started = COALESCE(started, :at), node = COALESCE(NULLIF(node, ''), :node)", at=at, node=node
        )

    def serving(self, lease: str, at: float) -> Lease:
        """Write down since when its pilot serves; what was said first holds."""
        return self._set(lease, "serving_since = COALESCE(serving_since, :at)", at=at)

    def leaving(self, lease: str, stage: Stage, why: str, at: float) -> Lease:
        """Write down that its pilot is told to drain, or its job is cancelled."""
        return self._set(
            lease, "stage = :stage, reason = :why, leaving_since = COALESCE(leaving_since, :at)",
            stage=stage, why=why, at=at,
        )  # fmt: skip

    def ended(self, lease: str, at: float, reason: str) -> Lease:
        """Write down that it is over: nothing brings it back."""
        return self._set(
            lease,
            "stage = 'over', reason = COALESCE(NULLIF(reason, '') || '; ' || :reason, :reason),"
            " ended = MAX(:at, COALESCE(started, :at))",
            at=at,
            reason=reason,
        )

    def get(self, lease: str) -> Lease | None:
        """Return a lease; None if it is not ours."""
        return next(iter(self._leases("lease = ?", (lease,))), None)

    def beamlines(self) -> list[str]:
        """Return those that ever had a lease."""
        return [row["beamline"] for row in self._do("SELECT DISTINCT beamline FROM leases ORDER BY beamline", ())]

    def open_leases(self, beamline: str | None = None, kind: Kind | None = None) -> list[Lease]:
        """Return those that are not over, oldest first; None: of all beamlines, of all kinds."""
        found = self._leases("ended IS NULL AND beamline = COALESCE(?, beamline)", (beamline,))
        return [lease for lease in found if kind in (None, lease.kind)]

    def all(self, beamline: str, since: float) -> list[Lease]:
        """Return those that are not over or ended after `since`, oldest first."""
        return self._leases("beamline = ? AND (ended IS NULL OR ended > ?)", (beamline, since))

    def taken(self, besides: str) -> dict[tuple[str, str], int]:
        """Return how many leases of other beamlines than `besides` are not over, by site and rung."""
        rows = self._do(
            "SELECT site, queue, COUNT(*) AS n FROM leases WHERE ended IS NULL AND beamline != ? GROUP BY site, queue",
            (besides,),
        )
        return {(row["site"], row["queue"]): int(row["n"]) for row in rows}

    def begun(self, site: str, since: float) -> int:
        """Return how many leases began at a site after `since`."""
        [row] = self._do("SELECT COUNT(*) AS n FROM leases WHERE site = ? AND created > ?", (site, since))
        return int(row["n"])

    def cost(self, beamline: str, site: str, account: str, *, since: float, now: float) -> float:
        """Return the node-seconds that a beamline used of an account at a site from `since` to `now`."""
        [row] = self._do(
            f"SELECT TOTAL(nodes * MAX(0, {_USED_UNTIL} - MAX(started, :since))) AS cost FROM leases"  # noqa: S608
            " WHERE beamline = :beamline AND site = :site AND account = :account AND started IS NOT NULL",
            {"beamline": beamline, "site": site, "account": account, "since": since, "now": now},
        )
        return float(row["cost"])

    def cost_by_account(self, beamline: str, *, since: float, now: float) -> dict[tuple[str, str], float]:
        """Return the node-seconds that a beamline used from `since` to `now`, by site and account."""
        rows = self._do(
            f"SELECT site, account, TOTAL(nodes * MAX(0, {_USED_UNTIL} - MAX(started, :since))) AS cost FROM leases"  # noqa: S608
            " WHERE beamline = :beamline AND started IS NOT NULL AND (ended IS NULL OR ended > :since)"
            " GROUP BY site, account",
            {"beamline": beamline, "since": since, "now": now},
        )
        return {(row["site"], row["account"]): float(row["cost"]) for row in rows}

    def cost_by_run(self, beamline: str, *, since: float, now: float) -> dict[str, float]:
        """Return the node-seconds used while each run was on that ended after `since`, or did not end.

        What two runs used at the same time counts for both.
        """
        rows = self._do(
            f"SELECT run, TOTAL(nodes * MAX(0, MIN({_USED_UNTIL}, COALESCE(runs.ended, began + {LONGEST_RUN}))"  # noqa: S608
            " - MAX(started, began))) AS cost FROM runs"
            " LEFT JOIN leases ON leases.beamline = runs.beamline AND started IS NOT NULL"
            " WHERE runs.beamline = :beamline AND COALESCE(runs.ended, :now) > :since GROUP BY run ORDER BY began",
            {"beamline": beamline, "since": since, "now": now},
        )
        return {row["run"]: float(row["cost"]) for row in rows}

    def run_began(self, beamline: str, run: str, at: float) -> None:
        """Write down a run; one that is known stays as it is."""
        self._do("INSERT INTO runs (beamline, run, began) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (beamline, run, at))

    def run_ended(self, beamline: str, run: str, at: float) -> None:
        """Write down the end of a run; one that is not known, or ended, is no matter."""
        self._do("UPDATE runs SET ended = ? WHERE beamline = ? AND run = ? AND ended IS NULL", (at, beamline, run))

    def runs(self, beamline: str, since: float) -> list[Run]:
        """Return the runs that are on or ended after `since`, oldest first."""
        rows = self._do(
            "SELECT run, began, ended FROM runs WHERE beamline = ? AND (ended IS NULL OR ended > ?)"
            " ORDER BY began, rowid",
            (beamline, since),
        )
        return [Run(**row) for row in rows]

    def pause(self, beamline: str, pause: Pause) -> None:
        """Write down that a beamline passes a rung by."""
        self._do(
            "INSERT OR REPLACE INTO pauses (beamline, kind, site, queue, until, why) VALUES (?, ?, ?, ?, ?, ?)",
            (beamline, pause.kind, pause.site, pause.queue, pause.until, pause.why),
        )

    def pauses(self, beamline: str, now: float) -> list[Pause]:
        """Return which rungs a beamline passes by now."""
        rows = self._do(
            "SELECT kind, site, queue, until, why FROM pauses WHERE beamline = ? AND until > ?"
            " ORDER BY kind DESC, site, queue",
            (beamline, now),
        )
        return [Pause(**{**row, "kind": Kind(row["kind"])}) for row in rows]

    def _leases(self, where: str, values: tuple[object, ...]) -> list[Lease]:
        rows = self._do(f"SELECT * FROM leases WHERE {where} ORDER BY created, rowid", values)  # noqa: S608
        return [
            # One that is only read may be of the version before, in which nobody ran tasks.
            Lease(**{**row, "stage": Stage(row["stage"]), "kind": Kind(row.get("kind", Kind.STREAM))})
            for row in rows
        ]

    def _set(self, lease: str, changes: str, **values: object) -> Lease:
        self._do(f"UPDATE leases SET {changes} WHERE lease = :lease AND ended IS NULL", {"lease": lease, **values})  # noqa: S608
        return self._of(lease)

    def _of(self, lease: str) -> Lease:
        found = self.get(lease)
        if found is None:
            raise RecordError(f"{self._path}: lease {lease} is not in it")
        return found

    def _do(self, statement: str, values: tuple[object, ...] | Mapping[str, object]) -> list[dict[str, Any]]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise RecordError(f"{self._path}: {error}") from None


def _connect(path: Path, then: Callable[[sqlite3.Connection], None], uri: str | None = None) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(uri or path, isolation_level=None, uri=uri is not None)
    except sqlite3.Error as error:
        raise RecordError(f"{path}: {error}") from None
    try:
        connection.row_factory = record.row
        then(connection)
    except (sqlite3.Error, RecordError) as error:
        connection.close()
        raise RecordError(f"{path}: {error}") from None
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    [version] = connection.execute("PRAGMA user_version").fetchone().values()
    [[n_tables]] = [row.values() for row in connection.execute("SELECT COUNT(*) FROM sqlite_master")]
    if version == 0 and n_tables == 0:
        connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} {_PAUSES} PRAGMA user_version = {SCHEMA}; COMMIT;")
    _check(connection)
    if version == 1:
        connection.executescript(f"BEGIN IMMEDIATE; {_FROM_1} PRAGMA user_version = {SCHEMA}; COMMIT;")


def _check(connection: sqlite3.Connection) -> None:
    [version] = connection.execute("PRAGMA user_version").fetchone().values()
    if version > SCHEMA:
        raise RecordError(f"it is of version {version}; this hpc-bridge knows versions up to {SCHEMA}")
    if version < 1:
        raise RecordError("it is no record of leases")
