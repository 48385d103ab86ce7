"""Sees to it that every run that goes by file comes to an end: hashed, sent, computed on a node, and its result back.

All is on record before it is done, and what is done is asked for again and again until it is seen: whoever does it has
to know it again. So the manager may be killed between any two steps. Nothing here waits, and nothing touches a disk but
the record's::

    bulk = Bulk(runs, tasks)
    bulk.notice(Noticed(...), files, now)
    for order in bulk.step(Sight(...), now):  # of the disk; each is answered, or given again by the next process
        ...
    bulk.wanted(...)  # what files are to be moved now
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import PurePosixPath

from hpc_bridge import tasks
from hpc_bridge.bulk_config import Files, words
from hpc_bridge.bulk_record import Known, Origin, Result, Run, Runs, Stage
from hpc_bridge.errors import ConfigError
from hpc_bridge.logs import bound
from hpc_bridge.tasks import Task, Tasks
from hpc_bridge.transfer import File, Place, Request, State
from hpc_bridge.transfer_mover import ARRIVED
from hpc_bridge.transfer_record import Move, move_of

_log = logging.getLogger(__name__)

MAX_NAME = 56
"""Of the name of a run, which may get a number behind it."""

DAY = 86400.0
KEPT, KEPT_SEEN = 30 * DAY, 365 * DAY
"""How long runs are remembered that are over (s): those that were handed in, and those that would be seen again."""

_AGAIN = 5.0
"""Before the disk is asked again for what it would not do (s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noticed:
    """Files that are to go."""

    beamline: str
    run: str
    origin: Origin
    folder: PurePosixPath
    files: tuple[Known, ...]
    """The first is the one that is opened."""
    lost: bool = False
    site: str | None = None
    priority: int | None = None
    """None: that of the beamline."""
    is_named: bool = False
    """Somebody chose the name of the run: it is refused rather than changed if other files have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """What a beamline says of its files, and where the paths of this machine begin at its sites' transfers."""

    files: Files
    roots: Mapping[str, PurePosixPath]
    """By site: the folder of this machine that is the root of its collection."""
    identities: Mapping[str, str]
    """By site: who moves files there; all requests of one identity have one mover."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """How everything is."""

    beamlines: Mapping[str, Routes]
    """Those that are held; the runs of others rest."""
    moves: Mapping[str, Move]
    unreachable: Mapping[str, float]
    """Sites whose scheduler does not answer, and since when."""


@dataclass(frozen=True, slots=True)
class Hash:
    """Find out what the files of a run are; answered by `Bulk.hashed` or `Bulk.failed`."""

    run: Run


@dataclass(frozen=True, slots=True)
class Release:
    """Tell the spool that a run is safe elsewhere; answered by `Bulk.released` or `Bulk.failed`."""

    run: Run


Order = Hash | Release


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request of a run, at the visit that began at `since`."""

    request: Request
    priority: int
    since: float


class Bulk:
    """The runs of all beamlines.

    Parameters
    ----------
    runs, tasks
        The records. Nobody else writes that of the runs.
    """

    def __init__(self, runs: Runs, tasks: Tasks) -> None:
        self._runs, self._tasks = runs, tasks
        self._open = {run.key: run for run in runs.open_runs()}
        self._ordered: set[tuple[str, str]] = set()
        """Of whose disk something is asked, and not answered."""
        self._not_before: dict[tuple[str, str], float] = {}
        self._requests: dict[tuple[tuple[str, str], int, Stage], Request] = {}
        self._flat: dict[tuple[str, str], tuple[object, float]] = {}
        """How far a transfer is, and since when."""
        self._routes: dict[str, Routes] = {}
        self._pruned = 0.0
        self._cleared: set[str] = set()
        """Beamlines of which no task is left that nobody wants."""

    @property
    def open_runs(self) -> list[Run]:
        """What is not over, in the order in which it is seen to."""
        return sorted(self._open.values(), key=lambda run: (-run.priority, run.created, run.key))

    @property
    def moves(self) -> set[str]:
        """The requests that runs wait for; nobody wants any other that is not over."""
        return {run.move for run in self._open.values() if run.move is not None}

    def get(self, beamline: str, name: str) -> Run | None:
        """Return a run, over or not."""
        return self._open.get((beamline, name)) or self._runs.get(beamline, name)

    def count(self, beamline: str) -> dict[str, int]:
        """Return how many there are on record, by stage."""
        return self._runs.count(beamline)

    def last(self, beamline: str, number: int) -> list[Run]:
        """Return those that ended last."""
        return self._runs.last(beamline, number)

    def notice(self, noticed: Noticed, files: Files, now: float) -> Run:
        """Take files; they are on record when this returns. The same again are no other run.

        A run that failed or was canceled begins again when it is handed in again.

        Raises
        ------
        ConfigError
            The beamline's files do not go to that site, or the name of the run is taken by other files.
        """
        if noticed.site is not None and noticed.site not in files.sites:
            raise ConfigError(f"files of {noticed.beamline} go to {', '.join(files.sites)}, not to {noticed.site}")
        known = next((run for run in self._known(noticed) if _is_same(run, noticed)), None)
        priority = files.priority if noticed.priority is None else noticed.priority
        deadline = now + files.deadline.total_seconds()
        if known is None:
            run = Run(
                beamline=noticed.beamline,
                name=self._name(noticed),
                run=noticed.run,
                origin=noticed.origin,
                lost=noticed.lost,
                folder=noticed.folder,
                files=noticed.files,
                asked=noticed.site,
                priority=priority,
                created=now,
                deadline=deadline,
                stage=Stage.HASHING,
                since=now,
                refused={},
            )
            with bound(beamline=run.beamline, run=run.run):
                _log.info("%s %s: %d files, %s", run.beamline, run.name, len(run.files), run.origin)
            return self._put(run)
        if noticed.lost and not known.lost and known.origin is Origin.STREAM:
            return self._lost(known, files, deadline, now)
        if noticed.origin is not Origin.SUBMITTED or known.stage is Stage.DONE:
            return known
        self._requests.clear()
        if known.ended is None:
            return self._put(replace(known, priority=priority, deadline=deadline))
        again = replace(
            known,
            asked=noticed.site,
            priority=priority,
            created=now,
            deadline=deadline,
            stage=Stage.HASHING,
            why="",
            refused={},
            results=(),
            hashed=None,
            ended=None,
        )
        return self._put(_visit(again, None, now))

    def notice_all(self, all_noticed: Iterable[Noticed], files: Files, now: float) -> list[Run]:
        """Take many runs, or none of them; see `notice`."""
        before = dict(self._open)
        try:
            with self._runs.at_once():
                return [self.notice(noticed, files, now) for noticed in all_noticed]
        except ConfigError:
            self._open = before
            raise

    def _lost(self, run: Run, files: Files, deadline: float, now: float) -> Run:
        """Have a run of the stream repaired that seemed complete, also where it is all there and nobody did more."""
        run = replace(run, lost=True)
        route = files.sites.get(run.site or "")
        if run.stage in (Stage.RELEASING, Stage.DONE) and route is not None and route.repair is not None:
            return self._put(replace(run, stage=Stage.COMPUTING, move=None, since=now, deadline=deadline, ended=None))
        return run if run.ended is not None else self._put(run)

    def cancel(self, beamline: str, name: str, why: str, now: float) -> None:
        """Let a run go; its files stay where they are.

        Raises
        ------
        ConfigError
            There is no such run that is not over.
        """
        run = self._open.get((beamline, name))
        if run is None:
            raise ConfigError(f"{beamline}: no run {name} goes by file")
        self._over(run, Stage.CANCELED, why, now)

    def step(self, sight: Sight, now: float) -> list[Order]:
        """See to every run, and return what is to be done with the disk."""
        if now - self._pruned > DAY:
            self._tasks.prune(now - KEPT)  # first: who has the name of a run that is forgotten has no task
            self._runs.prune(now - KEPT, now - KEPT_SEEN)
            self._pruned = now
        orders = []
        for beamline in sight.beamlines.keys() - self._cleared:
            self._clear(beamline, now)
        for beamline, routes in sight.beamlines.items():
            if self._routes.get(beamline) is not routes:
                self._routes[beamline] = routes
                self._follow(beamline, routes, now)
        for run in self.open_runs:
            if (held := sight.beamlines.get(run.beamline)) is not None:
                with bound(beamline=run.beamline, run=run.run):
                    self._see_to(run, held, sight, now)
            if (order := self._order(run.key, now)) is not None:
                self._ordered.add(run.key)
                orders.append(order)
        return orders

    def wanted(self, beamlines: Mapping[str, Routes]) -> Iterator[tuple[str, str, Wanted]]:
        """Give what is to be moved now: the identity that moves it, its name, and what it is."""
        for run in self.open_runs:
            held = beamlines.get(run.beamline)
            if held is not None and run.move is not None and run.site in held.files.sites:
                request = self._request(run, held)
                yield held.identities[run.site], run.move, Wanted(request, run.priority, run.since)

    def hashed(self, key: tuple[str, str], files: Sequence[Known], now: float) -> None:
        """Take what files are."""
        self._ordered.discard(key)
        run = self._open.get(key)
        if run is not None and run.stage is Stage.HASHING:
            self._put(replace(run, files=tuple(files), why="", hashed=now, stage=Stage.SENDING))

    def hashes(self, key: tuple[str, str], files: Sequence[Known]) -> None:
        """Take what is known of files so far, so that they need not be read again."""
        run = self._open.get(key)
        if run is not None and run.stage is Stage.HASHING:
            self._put(replace(run, files=tuple(files)))

    def released(self, key: tuple[str, str], now: float) -> None:
        """Take note that the spool knows."""
        self._ordered.discard(key)
        run = self._open.get(key)
        if run is not None and run.stage is Stage.RELEASING:
            self._over(run, Stage.DONE, "", now)

    def failed(self, key: tuple[str, str], why: str, now: float) -> None:
        """Take what the disk would not do: it is asked again in a while."""
        self._ordered.discard(key)
        self._not_before[key] = now + _AGAIN
        run = self._open.get(key)
        if run is not None and run.why != why:
            _log.warning("%s %s: %s", run.beamline, run.name, why)
            self._put(replace(run, why=why))

    def _clear(self, beamline: str, now: float) -> None:
        """Cancel the tasks that a process before us would have, had it lived."""
        wanted = {run.task for run in self._open.values() if run.stage is Stage.COMPUTING}
        for task in self._tasks.open_tasks(beamline):
            # Those of others are not called like runs of the beamline.
            if task.task.startswith(f"{beamline}/") and task.task not in wanted:
                self._tasks.cancel(task.task, "nobody wants it any more", now)
        self._cleared.add(beamline)

    def _follow(self, beamline: str, routes: Routes, now: float) -> None:
        """Take other routes: what is under way to other places is wanted no more."""
        self._requests.clear()
        for run in [run for run in self._open.values() if run.beamline == beamline and run.move is not None]:
            if run.site in routes.files.sites:
                self._go(run, run.site, routes, now)

    def _order(self, key: tuple[str, str], now: float) -> Order | None:
        run = self._open.get(key)
        if run is None or key in self._ordered or now < self._not_before.get(key, now):
            return None
        match run.stage:
            case Stage.HASHING:
                return Hash(run)
            case Stage.RELEASING:
                return Release(run)
            case _:
                return None

    def _see_to(self, run: Run, held: Routes, sight: Sight, now: float) -> None:
        if run.stage is Stage.RELEASING:  # all is done but to say so
            return
        if now > run.deadline:
            why = f"its deadline has passed while it was {run.stage}"
            at = f" at {run.site}" if run.site else ""
            self._over(run, Stage.FAILED, f"{why}{at}{f': {run.why}' if run.why else ''}", now)
            return
        if run.site is not None and run.site not in held.files.sites:
            self._lost_its_site(run, now)
            return
        match run.stage:
            case Stage.SENDING if run.site is None:
                self._choose(run, held, sight, now)
            case Stage.SENDING:
                self._send(run, held, sight, now)
            case Stage.COMPUTING:
                self._compute(run, held, sight, now)
            case Stage.RETURNING:
                self._return(run, held, sight, now)

    def _choose(self, run: Run, held: Routes, sight: Sight, now: float) -> None:
        """Go to the first site that will do: rather to one whose scheduler answers."""
        sites = _sites(run, held)
        if not sites:
            why = "; ".join(f"{site}: {why}" for site, why in run.refused.items()) or "no site is left"
            self._over(run, Stage.FAILED, why, now)
            return
        self._go(run, next((site for site in sites if site not in sight.unreachable), sites[0]), held, now)

    def _go(self, run: Run, site: str, held: Routes, now: float) -> None:
        """Have the files of a run moved to a site, or its results from there."""
        run = replace(run, site=site)
        try:
            moves = replace(run, move=move_of(self._request(run, held)))
        except ConfigError as error:
            if run.stage is Stage.RETURNING:
                self._over(run, Stage.FAILED, str(error), now)
            else:
                self._refuse(run, str(error), now)
            return
        if moves != self._open[run.key]:
            self._put(moves)

    def _lost_its_site(self, run: Run, now: float) -> None:
        if run.stage is Stage.RETURNING:
            self._over(run, Stage.FAILED, f"its result is at {run.site}, which is no more among its sites", now)
        else:
            old = run.task
            self._put(_visit(replace(run, stage=Stage.SENDING if run.hashed else Stage.HASHING), None, now))
            self._cancel_task(old, "its site is no more among the beamline's", now)

    def _send(self, run: Run, held: Routes, sight: Sight, now: float) -> None:
        move = sight.moves.get(run.move or "")
        if move is None or not _is_of(move, run):
            return
        if move.state is State.DONE:
            run = replace(run, moving=move.begun, arrived=move.ended, why="")
            self._after(run, Stage.COMPUTING if self._command(run, held) else Stage.DONE, held, now)
        elif move.state is State.CANCELED and move.ending is not None:  # by us, at a visit before
            self._go(_visit(run, None, now), run.site or "", held, now)
        elif move.state.is_final:
            self._refuse(run, move.message or f"its transfer was {move.state}", now)
        elif (why := self._stuck(run, move, held, now)) and (others := self._elsewhere(run, held, sight)):
            _log.warning("%s %s: %s: %s; now to %s", run.beamline, run.name, run.site, why, others[0])
            self._go(_visit(run, None, now), others[0], held, now)

    def _compute(self, run: Run, held: Routes, sight: Sight, now: float) -> None:
        task = self._tasks.get(run.task)
        if task is None:
            try:
                self._tasks.add(
                    run.task,
                    beamline=run.beamline,
                    site=run.site or "",
                    command=self._words(run, held),
                    results=self._results(run, held),
                    priority=run.priority,
                    now=now,
                )
            except ConfigError as error:
                self._over(run, Stage.FAILED, str(error), now)
            return
        match task.state:
            case tasks.State.DONE:
                found = tuple(_result(digest.path, digest.size, digest.sha256) for digest in task.digests)
                run = replace(run, begun=task.began, computed=task.ended, results=found, why="")
                self._after(run, Stage.RETURNING if found else Stage.DONE, held, now)
            case tasks.State.FAILED:
                self._over(run, Stage.FAILED, f"at {run.site}: {task.why}", now)
            case _:
                self._wait_for(run, task, held, sight, now)

    def _wait_for(self, run: Run, task: Task, held: Routes, sight: Sight, now: float) -> None:
        silent = sight.unreachable.get(run.site or "", now)
        is_away = task.state is tasks.State.WAITING and now - silent > held.files.patience.total_seconds()
        others = [site for site in self._elsewhere(run, held, sight) if site not in sight.unreachable]
        if is_away and others:
            _log.warning("%s %s: %s cannot be reached; now to %s", run.beamline, run.name, run.site, others[0])
            old = run.task
            self._go(_visit(replace(run, stage=Stage.SENDING), None, now), others[0], held, now)
            self._cancel_task(old, "its site cannot be reached", now)
        elif run.why != task.why:
            self._put(replace(run, why=task.why))

    def _return(self, run: Run, held: Routes, sight: Sight, now: float) -> None:
        move = sight.moves.get(run.move or "")
        if move is None or not _is_of(move, run):
            return
        if move.state is State.DONE:
            self._after(replace(run, why=""), Stage.DONE, held, now)
        elif move.state is State.CANCELED and move.ending is not None:
            self._put(replace(run, since=now))
        elif move.state.is_final:
            where = f"{run.site}: {_on_nodes(run, held)}"
            why = move.message or f"its transfer was {move.state}"
            self._over(run, Stage.FAILED, f"its result is at {where}, and does not come back: {why}", now)

    def _after(self, run: Run, stage: Stage, held: Routes, now: float) -> None:
        if stage is Stage.DONE and run.origin is Origin.STREAM:
            stage = Stage.RELEASING
        if stage is Stage.DONE:
            self._over(run, stage, "", now)
            return
        run = replace(run, stage=stage, move=None)
        if stage is Stage.RETURNING:
            self._go(replace(run, since=now), run.site or "", held, now)
        else:
            self._put(run)

    def _refuse(self, run: Run, why: str, now: float) -> None:
        _log.warning("%s %s: %s: %s", run.beamline, run.name, run.site, why)
        self._put(_visit(replace(run, refused={**run.refused, run.site or "": why}, why=why), None, now))

    def _stuck(self, run: Run, move: Move, held: Routes, now: float) -> str:
        """Return why nothing has moved for too long; empty: it has, or waits for its turn."""
        said = move.message or move.nice_status
        if not said or said == ARRIVED:
            self._flat.pop(run.key, None)
            return ""
        far = run.visit, move.bytes
        if self._flat.get(run.key, (None, 0.0))[0] != far:
            self._flat[run.key] = far, now
        return said if now - self._flat[run.key][1] > held.files.patience.total_seconds() else ""

    def _elsewhere(self, run: Run, held: Routes, sight: Sight) -> list[str]:
        """Return the other sites that will do, the next one first; those that answer rather than others."""
        sites = _sites(run, held)
        at = sites.index(run.site) if run.site in sites else 0
        return sorted((sites[at + 1 :] + sites[:at]), key=lambda site: site in sight.unreachable)

    def _command(self, run: Run, held: Routes) -> tuple[str, ...] | None:
        route = held.files.sites[run.site or ""]
        if run.origin is Origin.STREAM:
            return route.repair if run.lost else None
        return route.command

    def _words(self, run: Run, held: Routes) -> list[str]:
        folder = _on_nodes(run, held)
        file, result = str(folder / run.files[0].name), str(folder / _result_name(run))
        return words(self._command(run, held) or (), file=file, run=run.run, result=result)

    def _results(self, run: Run, held: Routes) -> list[str]:
        if not any("{result}" in word for word in self._command(run, held) or ()):
            return []
        return [str(_on_nodes(run, held) / _result_name(run))]

    def _request(self, run: Run, held: Routes) -> Request:
        key = run.key, run.visit, run.stage
        if key not in self._requests:
            self._requests[key] = _request(run, held)
        return self._requests[key]

    def _known(self, noticed: Noticed) -> list[Run]:
        return self._runs.of_files(noticed.beamline, noticed.folder, noticed.files[0].name)

    def _name(self, noticed: Noticed) -> str:
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", noticed.run)
        if len(name) > MAX_NAME or not re.match("[A-Za-z0-9]", name):
            name = f"run_{name[: MAX_NAME - 13]}_{hashlib.sha256(noticed.run.encode()).hexdigest()[:8]}"
        for number in count(1):
            found = name if number == 1 else f"{name}_{number}"
            if self.get(noticed.beamline, found) is None:
                return found
            if noticed.is_named:
                raise ConfigError(f"{noticed.beamline}: run {found} is taken by other files")
        raise AssertionError("count never ends")

    def _over(self, run: Run, stage: Stage, why: str, now: float) -> None:
        _log.log(logging.INFO if stage is Stage.DONE else logging.ERROR, "%s %s: %s %s", *run.key, stage, why)
        self._runs.put(replace(run, stage=stage, why=why, ended=now))
        self._open.pop(run.key, None)
        self._not_before.pop(run.key, None)
        self._flat.pop(run.key, None)
        self._requests = {key: request for key, request in self._requests.items() if key[0] != run.key}
        if run.stage is Stage.COMPUTING:
            self._cancel_task(run.task, why, now)

    def _cancel_task(self, task: str, why: str, now: float) -> None:
        if self._tasks.get(task) is not None:
            self._tasks.cancel(task, why, now)

    def _put(self, run: Run) -> Run:
        self._open[run.key] = self._runs.put(run)
        return run


def _is_same(run: Run, noticed: Noticed) -> bool:
    if noticed.origin is Origin.STREAM:  # the spool never uses a folder twice
        return run.origin is Origin.STREAM
    if noticed.origin is Origin.RUN_ENGINE:  # documents may come again, and later runs may be in the same file
        return run.origin is Origin.RUN_ENGINE and run.run == noticed.run
    seen = [(file.name, file.size, file.mtime_ns) for file in run.files]
    return seen == [(file.name, file.size, file.mtime_ns) for file in noticed.files] and not (
        noticed.is_named and run.run != noticed.run
    )


def _is_of(move: Move, run: Run) -> bool:
    """Tell whether what is said of a request is of this visit: one that ended before will begin again."""
    return move.ended is None or move.ended >= run.since


def _visit(run: Run, site: str | None, now: float) -> Run:
    """Begin anew, at a site or at one that is to be chosen."""
    times = {"moving": None, "arrived": None, "begun": None, "computed": None}
    return replace(run, visit=run.visit + 1, since=now, site=site, move=None, **times)  # type: ignore[arg-type]


def _sites(run: Run, held: Routes) -> list[str]:
    """Return the sites that will do, in the beamline's order."""
    return [site for site in held.files.sites if site not in run.refused and run.asked in (None, site)]


def _on_nodes(run: Run, held: Routes) -> PurePosixPath:
    """Return the folder of a run as nodes see it."""
    return held.files.sites[run.site or ""].on_nodes / run.beamline / run.name


def _result_name(run: Run) -> str:
    return f"{run.name}_result.h5"


def _result(path: str, size: int, sha256: str) -> Result:
    return Result(PurePosixPath(path).name, size, sha256)


def _request(run: Run, held: Routes) -> Request:
    """Return what is to be moved: the files of a run to its site, or its results from there."""
    site = run.site or ""
    route, root = held.files.sites[site], held.roots[site]
    there = Place(endpoint=route.there.endpoint, path=route.there.path / run.beamline / run.name)
    returns = run.stage is Stage.RETURNING
    folder = PurePosixPath(held.files.results) if returns else run.folder
    if not folder.is_relative_to(root):
        raise ConfigError(f"{folder} is not below {root}, where collection {route.here} has its root")
    here = Place(endpoint=route.here, path="/" / folder.relative_to(root))
    moved = [(file.name, file.size, file.sha256) for file in (run.results if returns else run.files)]
    try:
        return Request(
            beamline=run.beamline,
            run=run.name,
            source=there if returns else here,
            destination=here if returns else there,
            files=tuple(File(name=name, size=size, sha256=sha256) for name, size, sha256 in moved),
            deadline=run.deadline,
        )
    except ValueError as error:
        raise ConfigError(f"{run.name}: {' '.join(str(error).split())[:300]}") from None
