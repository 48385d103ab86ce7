"""How the gateway of a beamline is, by the file where it tells, and the file where it is told which way frames go."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from threading import Event, Thread
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from hpc_bridge.bulk import Noticed
from hpc_bridge.bulk_files import in_order, is_name
from hpc_bridge.bulk_record import Known, Origin
from hpc_bridge.switch import Measured, Plane, Switch, Switching, begin, decide

_log = logging.getLogger(__name__)

MAX_BYTES = 2**23

STALE = 10.0
"""What the gateway told so long ago (s) is not how it is."""

_PACE = 0.1
"""Between looks whether it is time for a look (s)."""

_Count = Annotated[int, Field(ge=0, le=2**53)]
_Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=1024)]


class _Spool(BaseModel):
    directory: Annotated[str, Field(max_length=4096)]
    lost: _Count
    full_in_s: _Seconds | None = None


class _Run(BaseModel):
    run: _Text
    path: Annotated[str, Field(max_length=4096)] | None = None
    files: Annotated[list[_Text], Field(max_length=10_000)] = []
    ended: bool = False
    exit_status: _Text | None = ""
    """None: it was told that there is none, as of a run whose gateway was killed."""
    lost: _Count | None = None
    unsent: _Count | None = None
    """Frames that went by file only."""
    planes: Annotated[list[_Text], Field(max_length=10)] = []
    unsafe: bool = False
    """Workers do not have all of it safe, which they may yet have."""
    safe: bool = False
    """Somebody has proven that the spool needs it no more."""


class Told(BaseModel):
    """What a gateway tells of itself, as far as it matters here."""

    ack_lag_s: _Seconds | None = None
    lost_in_all: _Count | None = None
    spool: _Spool | None = None
    runs: Annotated[list[_Run], Field(max_length=1000)] = []


class Gateway:
    """Of one beamline.

    Parameters
    ----------
    status
        The file of its ``--status``.
    plane
        The file of its ``--plane``; None: it decides itself.
    send
        Which ended runs go by file: those that did not all come through the stream, or all.
    """

    def __init__(
        self, beamline: str, status: Path, plane: Path | None, switching: Switching, send: Literal["lost", "always"]
    ) -> None:
        self._beamline, self._status, self._plane = beamline, status, plane
        self._settings, self._send = switching, send
        self._told: Told | None = None
        self._told_at = 0.0
        self._seen: tuple[int, int] | None = None
        self._lost: tuple[int | None, int | None] = None, None
        """On the way to the workers, and by the spool, at the last look."""
        self._taken: set[tuple[str, bool]] = set()
        """Runs that were told of, and whether frames of them were lost."""
        self._due = 0.0
        self._complained: dict[Path, str] = {}
        self._is_told = True
        """The plane file says what was decided."""
        self._waits_since: float | None = None
        self._spool_lost = 0
        self._spool_lost_at = -inf
        self.trouble = ""
        """Why no run can be relied on to be there as a file, for people; empty: all is well, or nothing is known."""
        self.switch = self._as_before(time.time())
        """Which way frames go."""

    def look(self, now: float, *, heard_at: float | None, is_wanted: bool) -> list[Noticed]:
        """Look how it is, decide which way frames go, and return the runs that are to go by file.

        Parameters
        ----------
        heard_at
            When the pilot that serves was heard of that was heard of last; None: none serves.
        is_wanted
            Whether one should serve.
        """
        if 0 < self._due - now <= self._settings.look.total_seconds():
            return []
        self._due = now + self._settings.look.total_seconds()
        self._read(now)
        self._look_at_spool(now)
        if self._plane is not None:
            self._decide(now, heard_at, is_wanted=is_wanted)
        return list(self._ended()) if self._told is not None else []

    def let_go(self) -> None:
        """Decide no more: frames are streamed then."""
        if self._plane is not None:
            try:
                self._plane.unlink(missing_ok=True)
            except OSError as error:
                self._complain(self._plane, str(error.strerror))

    def _read(self, now: float) -> None:
        try:
            found = self._status.stat()
            seen = found.st_ino, found.st_mtime_ns
            if seen == self._seen:
                return
            # What changes is new, by whatever clock; only of what lies there at first nothing else is known.
            at, self._seen = now if self._seen is not None else min(now, found.st_mtime), seen
            self._told = _told(self._status)
            self._told_at = at
            self._complain(self._status, "")
        except FileNotFoundError:
            self._told = self._seen = None
        except (OSError, ValueError) as error:
            self._complain(self._status, _line(error))

    def _look_at_spool(self, now: float) -> None:
        if self._told is None or now - self._told_at > STALE:
            return
        before, self.trouble = self.trouble, ""
        spool = self._told.spool
        if spool is None:
            self.trouble = "the gateway has no spool"
        else:
            if spool.lost > self._spool_lost:
                self._spool_lost_at = now
            self._spool_lost = spool.lost
            if now - self._spool_lost_at <= self._settings.apart.total_seconds():
                self.trouble = f"the spool loses frames: {spool.lost:,} are in no file"
            elif spool.full_in_s is not None and spool.full_in_s < self._settings.spool_low.total_seconds():
                self.trouble = f"the spool is full in {spool.full_in_s:.0f} s"
        if self.trouble and not before:
            _log.error("%s: there is no fallback: %s", self._beamline, self.trouble)
        elif before and not self.trouble:
            _log.warning("%s: there is a fallback again", self._beamline)

    def _decide(self, now: float, heard_at: float | None, *, is_wanted: bool) -> None:
        if heard_at is not None or not is_wanted:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        before = self.switch
        self.switch = decide(before, self._measured(now, heard_at), self._settings, now)
        if (self.switch.plane, self.switch.why) != (before.plane, before.why):
            why = f": {self.switch.why}" if self.switch.why else ""
            _log.warning('%s: frames go by "%s"%s', self._beamline, self.switch.plane, why)
            self._is_told = False
        if not self._is_told:
            self._tell()

    def _measured(self, now: float, heard_at: float | None) -> Measured:
        waits = 0.0 if self._waits_since is None else now - self._waits_since
        nodes = Measured(heartbeat_age=None if heard_at is None else max(0.0, now - heard_at), node_wait=waits)
        if self._told is None or now - self._told_at > STALE:
            return nodes
        lost_before, spooled_before = self._lost
        lost, spool = self._told.lost_in_all, self._told.spool
        self._lost = lost, None if spool is None else spool.lost
        loses = spool is not None and spooled_before is not None and spool.lost > spooled_before
        return replace(
            nodes,
            ack_lag=self._told.ack_lag_s,
            lost=None if lost is None or lost_before is None else max(0, lost - lost_before),
            spool="none" if spool is None else "loses" if loses else "takes",
            full_in=None if spool is None else spool.full_in_s,
        )

    def _ended(self) -> Iterator[Noticed]:
        assert self._told is not None  # noqa: S101 - of `look`
        spool = self._told.spool
        self._taken &= {(run.path or "", lost) for run in self._told.runs for lost in (False, True)}
        for run in self._told.runs:
            lost = self._is_lost(run)
            if spool is None or run.path is None or not run.ended or not run.files:
                continue
            if run.safe and not (lost and (run.path, False) in self._taken):  # unless it was us who said so too early
                continue
            if (run.path, lost) in self._taken or not (lost or self._send == "always"):
                continue
            self._taken.add((run.path, lost))
            path = PurePosixPath(run.path)
            if path.parent != PurePosixPath(spool.directory) or ".." in path.parts or not run.path.isprintable():
                self._complain(self._status, f"run {run.run!r:.100}: {run.path!r:.200} is not in {spool.directory}")
                continue
            if (bad := next((name for name in run.files if not is_name(name)), None)) is not None:
                self._complain(self._status, f"run {run.run!r:.100}: {bad!r:.200} is no name of a file of it")
                continue
            files = tuple(Known(name, 0, 0) for name in in_order(run.files))
            yield Noticed(
                beamline=self._beamline, run=run.run, origin=Origin.STREAM, folder=path, files=files, lost=lost
            )

    def _is_lost(self, run: _Run) -> bool:
        """Tell whether some of a run may not have come through the stream, and is to be taken from its files."""
        was_killed = run.exit_status is None
        is_late = run.unsafe and self.switch.plane is not Plane.STREAM
        # Where it is not known what workers lack, it is when they were heard of too little that tells.
        is_doubted = None in (run.lost, run.unsent) and any(plane != Plane.STREAM for plane in run.planes)
        return was_killed or is_late or bool(run.lost) or bool(run.unsent) or is_doubted

    def _as_before(self, now: float) -> Switch:
        """Return how a manager before us left it, so that nothing changes because there is a new one."""
        try:
            with (self._plane or Path("/dev/null")).open("rb") as file:
                told = json.loads(file.read(2**14) or b"{}")
            return replace(begin(now), plane=Plane(told.get("plane", "stream")), why=str(told.get("why", ""))[:1000])
        except (OSError, ValueError, AttributeError, RecursionError):
            return begin(now)

    def _tell(self) -> None:
        """Write the file of the plane.

        One that cannot be written is complained of, and written at the next look.
        """
        if self._plane is None:
            return
        told = {"plane": self.switch.plane.value, "why": self.switch.why[:1000], "since": self.switch.since}
        temporary = self._plane.with_name(f".{self._plane.name}.new")
        try:
            temporary.write_text(json.dumps(told))
            temporary.replace(self._plane)
            self._is_told = True
            self._complain(self._plane, "")
        except OSError as error:
            self._complain(self._plane, str(error.strerror))

    def _complain(self, file: Path, why: str) -> None:
        """Say what is wrong with a file, once; nothing is."""
        if why and why != self._complained.get(file):
            _log.error("%s: %s: %s", self._beamline, file, why)
        self._complained[file] = why


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """What matters here of the nodes for a beamline's stream."""

    heard_at: float | None
    """When the pilot that serves was heard of that was heard of last; None: none serves."""
    is_wanted: bool


class Watch:
    """Looks at a gateway in a thread of its own: its files may be on a disk that hangs.

    Attributes
    ----------
    gateway
        That is looked at.
    noticed
        Runs that are to go by file.
    """

    def __init__(self, gateway: Gateway, name: str) -> None:
        self.gateway = gateway
        self.noticed: SimpleQueue[Noticed] = SimpleQueue()
        self._known: tuple[float, Nodes] | None = None
        self._stop = Event()
        self._lets_go = False
        self._thread = Thread(target=self._watch, name=f"gateway {name}", daemon=True)
        self._thread.start()

    def see(self, now: float, nodes: Nodes) -> None:
        """Take how nodes are now."""
        self._known = now, nodes

    def close(self, *, let_go: bool) -> None:
        """Look no more, and decide no more if it is let go; a disk that hangs is left to itself."""
        self._lets_go = let_go
        self._stop.set()
        self._thread.join(2)

    def _watch(self) -> None:
        while not self._stop.wait(_PACE):
            if self._known is not None:
                # By the time of those who told: while they hear nobody, no pilot is silent.
                now, nodes = self._known
                for each in self.gateway.look(now, heard_at=nodes.heard_at, is_wanted=nodes.is_wanted):
                    self.noticed.put(each)
        if self._lets_go:
            self.gateway.let_go()


def _told(path: Path) -> Told:
    if not path.is_file():
        raise ValueError("is not a file")
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    return Told.model_validate_json(text)


def _line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split())[:300]
