"""All that goes by file, for the manager: what is wanted of movers, disks and gateways, and what they say."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, model_validator

from hpc_bridge.bulk import Bulk, Noticed, Routes, Sight, Wanted
from hpc_bridge.bulk_carrier import Carrier
from hpc_bridge.bulk_config import Files
from hpc_bridge.bulk_disk import STILL, Disk, DropFolder, Dropped, Failed, Hashed, Released
from hpc_bridge.bulk_gateway import Gateway, Nodes, Watch
from hpc_bridge.bulk_pointed import PointedFiles
from hpc_bridge.bulk_record import Known, Origin, Run, Runs
from hpc_bridge.bulk_report import report_run
from hpc_bridge.bulk_ways import Way
from hpc_bridge.errors import ConfigError
from hpc_bridge.section import Name, Section
from hpc_bridge.tasks import Tasks
from hpc_bridge.transfer import MOST_FILES, File
from hpc_bridge.transfer_record import Move

MOST_RUNS = 10_000
"""That may be handed in at once."""

SHOWN = 20
"""Runs of a beamline that are over."""

AT_ONCE = 20
"""Answers and runs of each kind that are taken in one step."""

_T = TypeVar("_T")


class SubmittedFile(Section):
    """A file as who hands it in has seen it."""

    name: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^/]+$")]
    size: int = Field(ge=0)
    mtime_ns: int


class SubmittedRun(Section):
    """Files of a run, in one folder."""

    run: Annotated[str, Field(min_length=1, max_length=255)]
    folder: PurePosixPath
    files: Annotated[tuple[SubmittedFile, ...], Field(min_length=1, max_length=MOST_FILES)]

    @model_validator(mode="after")
    def _is_sound(self) -> "SubmittedRun":
        if not self.folder.is_absolute() or not str(self.folder).isprintable():
            raise ValueError(f"folder: {str(self.folder)!r} is no absolute path that can be asked for")
        for file in self.files:  # what will be asked for has to be one that can be
            File(name=file.name, size=file.size, sha256="0" * 64)
        return self


class Submission(Section):
    """Runs that are to go by file."""

    beamline: Name
    runs: Annotated[tuple[SubmittedRun, ...], Field(min_length=1, max_length=MOST_RUNS)]
    site: Name | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    is_named: bool = False


class Freight:
    """What goes by file at all beamlines of a state directory.

    Parameters
    ----------
    state
        The directory, for records.
    tasks
        What nodes are to do.

    Raises
    ------
    RecordError
        Another manager has a record.
    """

    def __init__(self, state: Path, tasks: Tasks) -> None:
        self._state = state
        self._held: dict[str, _Held] = {}
        self._carriers: dict[str, tuple[Way, Carrier]] = {}
        self._dropped: SimpleQueue[Dropped] = SimpleQueue()
        self._open = ExitStack()
        with ExitStack() as stack:
            self._bulk = Bulk(stack.enter_context(Runs.open(state / "bulk.sqlite")), tasks)
            self._disk = Disk()
            stack.callback(self._disk.close)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave everything to the next one."""
        for held in self._held.values():
            held.close()
        for _, carrier in self._carriers.values():
            carrier.stop()
        for _, carrier in self._carriers.values():
            carrier.close()
        self._open.close()

    def prepare(self, beamline: str, files: Files) -> Routes:
        """See that all that a beamline says of its files can be used, and begin to serve it.

        Raises
        ------
        ConfigError
            It cannot.
        """
        for name, held in self._held.items():
            for what in ("results", "drop", "gateway", "plane"):
                path = getattr(files, what)
                if name != beamline and path is not None and path == getattr(held.routes.files, what):
                    raise ConfigError(f"files: {what}: {path} is that of beamline {name}")
        ways = {site: Way(route) for site, route in files.sites.items()}
        for way in ways.values():
            known = self._carriers.get(way.identity)
            if known is None:
                transfer, closing = way.open()
                path = self._state / f"moves-{way.identity}.sqlite"
                self._carriers[way.identity] = way, Carrier(path, transfer, closing, poll=way.poll)
            elif known[0].settings != way.settings:
                raise ConfigError(f"{way.identity}: other beamlines say something else of it; let them name one file")
        roots = {site: way.root for site, way in ways.items()}
        return Routes(files=files, roots=roots, identities={site: way.identity for site, way in ways.items()})

    def hold(self, beamline: str, routes: Routes | None) -> None:
        """See to the files of a beamline from now on, as was prepared; None: no more."""
        before = self._held.pop(beamline, None)
        if before is not None:
            before.close(let_go=routes is None)
        if routes is not None:
            self._held[beamline] = _Held(beamline, routes, self._dropped, self._state)
        if routes is None or not routes.files.roots:
            with suppress(OSError):
                _pointed(self._state, beamline).unlink(missing_ok=True)

    def told(self, beamline: str, points: Iterable[tuple[str, str]], ended: Iterable[str], now: float) -> None:
        """Take what documents tell of runs: that data are in a file, by its URI, and then that a run is over.

        Raises
        ------
        RecordError
            It cannot be written down.
        """
        held = self._held.get(beamline)
        if held is not None and held.pointed is not None:
            for run, uri in points:
                held.pointed.points(run, uri)
            for run in ended:
                held.pointed.ended(run, now)
            held.pointed.keep()

    def leave(self) -> None:
        """Serve no more what no beamline names any more."""
        named = {identity for held in self._held.values() for identity in held.routes.identities.values()}
        for identity in self._carriers.keys() - named:
            self._carriers.pop(identity)[1].close()

    def step(self, nodes: Mapping[str, Nodes], unreachable: Mapping[str, float]) -> None:
        """See to everything.

        Raises
        ------
        RecordError
            A record cannot be written.
        """
        now = time.time()
        self._take_answers(now)
        for beamline, held in self._held.items():
            of_stream = nodes.get(beamline)
            if held.gateway is not None and of_stream is not None:
                held.gateway.see(now, of_stream)
                for noticed in _taken_from(held.gateway.noticed):
                    self._bulk.notice(noticed, held.routes.files, now)
            if held.pointed is not None:
                for noticed in held.pointed.look(now):
                    self._bulk.notice(noticed, held.routes.files, now)
                    held.pointed.taken(noticed.run)
                held.pointed.keep()
        beamlines = {name: held.routes for name, held in self._held.items()}
        for order in self._bulk.step(Sight(beamlines=beamlines, moves=self._moves(), unreachable=unreachable), now):
            self._disk.order(order)
        wanted: dict[str, dict[str, Wanted]] = defaultdict(dict)
        for identity, name, each in self._bulk.wanted(beamlines):
            wanted[identity][name] = each
        kept = self._bulk.moves
        for identity, (_, carrier) in self._carriers.items():
            carrier.wish(wanted[identity], kept)

    def submit(self, submission: Submission) -> list[Run]:
        """Take runs that people hand in.

        Raises
        ------
        ConfigError
            The beamline is not held, or says nothing of files; a site or a name that cannot be.
        """
        routes, now = self._routes(submission.beamline), time.time()
        noticed = (
            Noticed(
                beamline=submission.beamline,
                run=run.run,
                origin=Origin.SUBMITTED,
                folder=run.folder,
                files=tuple(Known(file.name, file.size, file.mtime_ns) for file in run.files),
                site=submission.site,
                priority=submission.priority,
                is_named=submission.is_named,
            )
            for run in submission.runs
        )
        return self._bulk.notice_all(noticed, routes.files, now)

    def cancel(self, beamline: str, names: Iterable[str]) -> None:
        """Let runs go.

        Raises
        ------
        ConfigError
            There is no such run.
        """
        for name in names:
            self._bulk.cancel(beamline, name, "canceled by hpc-bridge cancel", time.time())

    def runs(self, beamline: str, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return how runs are, over or not.

        Raises
        ------
        ConfigError
            There is no such run on record.
        """
        moves, now, found = self._moves(), time.time(), []
        for name in names:
            run = self._bulk.get(beamline, name)
            if run is None:
                raise ConfigError(f"{beamline}: no run {name} is on record")
            found.append(self._report(run, self._routes(beamline), moves, now))
        return found

    def report(self, beamline: str) -> dict[str, Any]:
        """Return how the runs of a beamline are, which way frames go, if that is decided, and why no file will be."""
        held = self._held.get(beamline)
        if held is None:
            return {"plane": None, "trouble": "", "runs": []}
        moves, now = self._moves(), time.time()
        runs = [run for run in self._bulk.open_runs if run.beamline == beamline] + self._bulk.last(beamline, SHOWN)
        plane = None
        if held.gateway is not None and held.routes.files.plane is not None:
            switch = held.gateway.gateway.switch
            plane = {"plane": switch.plane.value, "why": switch.why, "since": switch.since}
        trouble = held.gateway.gateway.trouble if held.gateway is not None else ""
        return {
            "plane": plane,
            "trouble": trouble,
            "runs": [self._report(run, held.routes, moves, now) for run in runs],
        }

    def count(self, beamline: str) -> dict[str, int]:
        """Return how many runs of a beamline are on record, by stage."""
        return self._bulk.count(beamline)

    def _report(self, run: Run, routes: Routes, moves: Mapping[str, Move], now: float) -> dict[str, Any]:
        move = None if run.move is None or run.ended is not None else moves.get(run.move)
        return report_run(
            run, move, read=self._disk.read.get(run.key, 0), results=PurePosixPath(routes.files.results), now=now
        )

    def _routes(self, beamline: str) -> Routes:
        held = self._held.get(beamline)
        if held is None:
            names = ", ".join(self._held) or "none"
            raise ConfigError(f"{beamline}: no such beamline is held with a section `files`; there are: {names}")
        return held.routes

    def _moves(self) -> dict[str, Move]:
        return {name: move for _, carrier in self._carriers.values() for name, move in carrier.seen.items()}

    def _take_answers(self, now: float) -> None:
        for answer in _taken_from(self._disk.answers):
            match answer:
                case Hashed(key=key, files=files, is_all=True):
                    self._bulk.hashed(key, files, now)
                case Hashed(key=key, files=files):
                    self._bulk.hashes(key, files)
                case Released(key):
                    self._bulk.released(key, now)
                case Failed(key, why):
                    self._bulk.failed(key, why, now)
        for dropped in _taken_from(self._dropped):
            if (held := self._held.get(dropped.beamline)) is not None:
                noticed = Noticed(
                    beamline=dropped.beamline,
                    run=dropped.run,
                    origin=Origin.DROPPED,
                    folder=PurePosixPath(dropped.folder),
                    files=dropped.files,
                )
                self._bulk.notice(noticed, held.routes.files, now)


def _taken_from(queue: "SimpleQueue[_T]") -> Iterator[_T]:
    """Give what is in a queue, but not so much that others wait for long: each is written to disk."""
    for _ in range(AT_ONCE):
        try:
            yield queue.get_nowait()
        except Empty:
            return


class _Held:
    """A beamline."""

    def __init__(self, beamline: str, routes: Routes, dropped: "SimpleQueue[Dropped]", state: Path) -> None:
        self.routes, files = routes, routes.files
        self.gateway = None
        if files.gateway is not None:
            self.gateway = Watch(Gateway(beamline, files.gateway, files.plane, files.switch, files.send), beamline)
        self._drop = None if files.drop is None else DropFolder(beamline, files.drop, dropped)
        self.pointed = None
        if files.roots:
            within, record = files.deadline.total_seconds(), _pointed(state, beamline)
            self.pointed = PointedFiles(beamline, files.roots, record, within=within, still=STILL)

    def close(self, *, let_go: bool = False) -> None:
        if self._drop is not None:
            self._drop.close()
        if self.gateway is not None:
            self.gateway.close(let_go=let_go)
        if self.pointed is not None:
            self.pointed.close()


def _pointed(state: Path, beamline: str) -> Path:
    """Return the record of runs of a beamline that point to files."""
    return state / f"files-of-runs-{beamline}.json"
