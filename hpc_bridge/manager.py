"""The manager: carries messages between pools, schedulers, pilots, run engines and people.

What is to be done is `hpc_bridge.pool`'s matter, and who runs what `hpc_bridge.dispatch`'s.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from types import TracebackType
from typing import Any, Self

from hpc_bridge.assembly import job_of, keys_of, scheduler_of
from hpc_bridge.bulk_freight import Freight, Submission
from hpc_bridge.config import Beamline, Site, checked
from hpc_bridge.control import Control
from hpc_bridge.desk import Desk, Listed, Submitted
from hpc_bridge.dialing import Addresses
from hpc_bridge.errors import BridgeError, BudgetExceeded, ConfigError
from hpc_bridge.hearing import Hearing
from hpc_bridge.heartbeat import Assignment, Do, Heard
from hpc_bridge.held import Held
from hpc_bridge.leases import Kind, Leases
from hpc_bridge.logs import bound
from hpc_bridge.pool import CancelJob, Pool, SubmitJob
from hpc_bridge.report import Seen, report
from hpc_bridge.runs import Points, Told, runs_of
from hpc_bridge.state import StateDirectory
from hpc_bridge.tasks import Tasks

_log = logging.getLogger(__name__)

WATCH = 1.0
"""Seconds between looks for who watches us."""

PACE = 0.1
"""Seconds that a look at everything may wait for heartbeats."""


class Manager:
    """Holds the leases of all beamlines of a state directory.

    It may be killed at any moment: the next one adopts what is there. When it ends by `stop`, pilots go on, for the
    next one, until they have been alone for too long.

    Raises
    ------
    RecordError
        Another manager has the directory.
    ConfigError
        What the directory says of beamlines and sites cannot be used.
    """

    def __init__(self, state: Path) -> None:
        self.watch: Callable[[Seen], object] | None = None
        """Is told every second how everything is."""
        self._watched = 0.0
        self._submissions: Counter[tuple[str, str]] = Counter()
        self._directory = StateDirectory(state)
        self._answers: SimpleQueue[Listed | Submitted] = SimpleQueue()
        self._began = time.time()
        self._sites: dict[str, Site] = {}
        self._desks: dict[str, Desk] = {}
        self._ears: dict[str, Hearing] = {}
        self._addresses: dict[str, Addresses] = {}
        """Of the pilots of sites where it is us who dial."""
        self._said: dict[str, str] = {}
        """Why a site did not answer."""
        self._away: dict[str, float] = {}
        """Since when."""
        self._listed: dict[str, float] = {}
        self._beamlines: dict[str, Held] = {}
        self._open = ExitStack()
        with ExitStack() as stack:
            self._leases = stack.enter_context(Leases.open(self._directory.record))
            self._tasks = stack.enter_context(Tasks.open(self._directory.tasks))
            self._freight = stack.enter_context(Freight(state, self._tasks))
            self._control = stack.enter_context(Control(state))
            self._open = stack.pop_all()
        try:
            sites = self._directory.sites()
            for beamline, is_let_go in self._directory.beamlines():
                self._hold(self._held(beamline, sites, is_let_go=is_let_go))
        except BridgeError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave everything to the next one."""
        for held in self._beamlines.values():
            held.close()
        for desk in self._desks.values():
            desk.close()
        self._take_answers()
        for ear in self._ears.values():
            ear.close()
        self._open.close()

    def run(self, stop: Event) -> None:
        """Hold what is wanted, until `stop` is set or the last beamline is let go.

        Raises
        ------
        RecordError
            The record cannot be written.
        """
        while self._beamlines and not stop.is_set():
            self._dial()
            for ear in self._ears.values():
                for heard in ear.poll(PACE / len(self._ears)):
                    for held in self._beamlines.values():
                        for pool in held.pools:
                            pool.heard(heard)
            self._take_answers()
            for desk in self._desks.values():
                desk.list()
            for name, held in list(self._beamlines.items()):
                with bound(beamline=name):
                    self._give_orders(held)
                if held.is_let_go and not self._leases.open_leases(name):
                    self._forget(name)
            self._freight.step({name: held.nodes for name, held in self._beamlines.items()}, self._away)
            self._control.serve(self._answer)
            if self.watch is not None and time.monotonic() - self._watched >= WATCH:
                self.watch(self._look())
                self._watched = time.monotonic()

    @property
    def beamlines(self) -> list[str]:
        """Those that are held, or not gone yet."""
        return list(self._beamlines)

    def up(self, beamline: Beamline, sites: Mapping[str, Site]) -> None:
        """Hold a beamline from now on, instead of what was said of it before.

        Raises
        ------
        BudgetExceeded
            No site's account covers the nodes that it wants.
        ConfigError
            It cannot be used; then nothing is changed.
        """
        for name in beamline.sites:
            if name in sites and name in self._sites and sites[name] != self._sites[name]:
                raise ConfigError(f"site {name} is held with other settings: take its beamlines down first")
        known = {**sites, **self._sites}
        held = None
        try:
            held = self._held(beamline, known, is_let_go=False)
            self._see_that_it_is_paid(held, known)
            self._directory.keep(beamline, [known[name] for name in beamline.sites])
            before = self._beamlines.get(beamline.beamline)
            self._hold(held)
            if before is not None:
                before.close()
        except BridgeError:
            if held is not None:
                held.close()
            raise
        finally:
            self._leave_sites()

    def down(self, beamline: str) -> None:
        """Let the nodes of a beamline go."""
        if beamline not in self._beamlines:
            raise ConfigError(f"no beamline {beamline} is held; there are: {', '.join(self._beamlines)}")
        self._beamlines[beamline].is_let_go = True
        self._freight.hold(beamline, None)
        self._directory.let_go(beamline)

    def report(self) -> dict[str, Any]:
        """Return how everything is, see `hpc_bridge.report`."""
        now = time.time()
        return {
            "manager": {"pid": os.getpid(), "since": self._began},
            "sites": {
                name: {"listed": self._listed.get(name), "unreachable": self._said.get(name)} for name in self._sites
            },
            "beamlines": {
                name: report(
                    held.beamline,
                    held.views,
                    self._leases,
                    wanted=held.wanted,
                    files={
                        "wanted": sum(held.files_wanted.values()),
                        "tasks": self._tasks.count(name),
                        **self._freight.report(name),
                    },
                    now=now,
                )
                for name, held in self._beamlines.items()
            },
        }

    def _look(self) -> Seen:
        now, used = time.time(), {}
        for name in self._beamlines:
            for account, seconds in self._leases.cost_by_account(name, since=self._began, now=now).items():
                used[name, *account] = seconds
        return Seen(
            at=now,
            report=self.report(),
            sites={name: held.beamline.sites for name, held in self._beamlines.items()},
            used=used,
            stages={name: self._freight.count(name) for name in self._beamlines},
            submissions=dict(self._submissions),
        )

    def _held(self, beamline: Beamline, sites: Mapping[str, Site], *, is_let_go: bool) -> Held:
        if missing := [name for name in beamline.sites if name not in sites]:
            raise ConfigError(f"beamline {beamline.beamline}: nothing is said of site {', '.join(missing)}")
        pool = Pool(beamline, sites, self._leases, now=time.time())
        has = Counter(lease.site for lease in self._leases.open_leases(beamline.beamline, Kind.FILES))
        # Of what is no more wanted there may still be pilots.
        files_at = dict.fromkeys([*(beamline.files.sites if beamline.files is not None else ()), *has])
        files = {
            name: Pool(beamline, sites, self._leases, now=time.time(), kind=Kind.FILES, at=name) for name in files_at
        }
        for name in beamline.sites:
            self._serve(sites[name])
        routes = None
        if beamline.files is not None and not is_let_go:
            routes = self._freight.prepare(beamline.beamline, beamline.files)
        runs = None
        if beamline.run_engine is not None:
            group = f"{beamline.beamline}.hpc-bridge"
            runs = runs_of(beamline.run_engine, group=group, properties=beamline.kafka_properties)
        held = Held(beamline, pool, files, self._leases, self._tasks, runs, is_let_go=is_let_go)
        held.routes = routes
        return held

    def _hold(self, held: Held) -> None:
        self._beamlines[held.beamline.beamline] = held
        self._freight.hold(held.beamline.beamline, held.routes)

    def _see_that_it_is_paid(self, held: Held, sites: Mapping[str, Site]) -> None:
        beamline = held.beamline
        has = len(self._leases.open_leases(beamline.beamline, Kind.STREAM))
        wants = max(0, (beamline.nodes or beamline.idle_nodes) + beamline.spares - has)
        refusals = []
        for name in beamline.sites:
            try:
                shortest = min(queue.walltime for queue in sites[name].queues).total_seconds()
                held.pool.check_budget(name, wants * shortest, time.time())
            except BudgetExceeded as error:
                refusals.append(error)
        if len(refusals) == len(beamline.sites):
            raise BudgetExceeded("; ".join(map(str, refusals)))

    def _serve(self, site: Site) -> None:
        if site.site in self._desks:
            return
        for other in self._sites.values():
            beats, theirs = site.heartbeats, other.heartbeats
            if _ear(site) == _ear(other) and (beats.secret_key, beats.allowed) != (theirs.secret_key, theirs.allowed):
                raise ConfigError(f"sites {site.site} and {other.site} share {beats.bind}, and not its keys")
        scheduler, keys = scheduler_of(site), keys_of(site)
        if _ear(site) not in self._ears:
            bind = site.heartbeats.bind
            self._ears[_ear(site)] = Hearing(bind, self._tell_pilot, keys=keys, task=self._give_task)
        if site.heartbeats.dials == "manager":
            self._addresses[site.site] = Addresses(site.directory)
        self._sites[site.site] = site
        self._desks[site.site] = Desk(site, scheduler, self._answers)

    def _dial(self) -> None:
        """Go to the pilots that wait for us."""
        if self._addresses:
            leases = self._leases.open_leases()
            for name, addresses in self._addresses.items():
                there = frozenset(lease.lease for lease in leases if lease.site == name)
                self._ears[name].dial(addresses.look(there))

    def _leave_sites(self) -> None:
        """Let go of the sites that no beamline names any more."""
        named = {name for held in self._beamlines.values() for name in held.beamline.sites}
        for name in self._sites.keys() - named:
            del self._sites[name]
            self._said.pop(name, None)
            self._away.pop(name, None)
            self._addresses.pop(name, None)
            self._desks.pop(name).close()
        for ear in self._ears.keys() - {_ear(site) for site in self._sites.values()}:
            self._ears.pop(ear).close()
        self._freight.leave()

    def _tell_pilot(self, lease: str) -> tuple[Do, str]:
        for held in self._beamlines.values():
            for pool in held.pools:
                if (answer := pool.answer(lease)) is not None:
                    return answer
        return Do.END, "its lease is not on record"

    def _give_task(self, heard: Heard, do: Do) -> Assignment | None:
        lease = self._leases.get(heard.heartbeat.lease)
        if lease is None or lease.kind is not Kind.FILES or lease.beamline not in self._beamlines:
            return None
        held = self._beamlines[lease.beamline]
        may_begin = do is Do.GO_ON and not held.is_let_go
        return held.dispatch.answer(heard, site=lease.site, may_begin=may_begin)

    def _give_orders(self, held: Held) -> None:
        now = time.time()
        self._tell_of_files(held.beamline.beamline, held.look_at_runs(now), now)
        held.views = [view for pool in held.pools for view in pool.views(now)]
        orders = held.pool.orders(now, held.want(now))
        wanted = held.want_files(now)
        for name, pool in held.files.items():
            orders += pool.orders(now, wanted.get(name, 0))
        held.take_back_tasks(now)
        for order in orders:
            match order:
                case SubmitJob(lease):
                    instead = f", instead of {lease.replaces}" if lease.replaces else ""
                    site = self._sites[lease.site]
                    with bound(site=lease.site):
                        _log.info("%s: asked of %s at %s%s", lease.name, lease.queue, lease.site, instead)
                    self._desks[lease.site].submit(lease.lease, job_of(lease, site, held.beamline))
                case CancelJob(site=name, job_id=job_id, why=why):
                    with bound(site=name):
                        _log.info("job %s at %s is cancelled: %s", job_id, name, why)
                    self._desks[name].cancel(job_id)

    def _tell_of_files(self, beamline: str, told: Sequence[Told | Points], now: float) -> None:
        points = [(each.run, each.uri) for each in told if isinstance(each, Points)]
        ended = [each.run for each in told if isinstance(each, Told) and not each.began]
        self._freight.told(beamline, points, ended, now)

    def _take_answers(self) -> None:
        while True:
            try:
                answer = self._answers.get_nowait()
            except Empty:
                return
            match answer:
                case Listed():
                    with bound(site=answer.site):
                        self._take_listing(answer)
                case Submitted(lease=lease, at=at, job_id=job_id, refused=refused):
                    if (known := self._leases.get(lease)) is not None:
                        outcome = "accepted" if job_id is not None else "refused" if refused else "unanswered"
                        self._submissions[known.site, outcome] += 1
                    for pool in [pool for held in self._beamlines.values() for pool in held.pools]:
                        if job_id is not None:
                            pool.submitted(lease, job_id, at)
                        elif refused:
                            pool.refused(lease, refused, at)
                        else:
                            pool.unanswered(lease, at)

    def _take_listing(self, listed: Listed) -> None:
        name, jobs = listed.site, listed.jobs
        if jobs is None:
            if name not in self._said:
                _log.warning("%s cannot be reached: %s", name, listed.why)
            self._said[name] = listed.why
            self._away.setdefault(name, listed.asked)
        else:
            if self._said.pop(name, None) is not None:
                _log.warning("%s is back", name)
            self._away.pop(name, None)
            self._listed[name] = listed.asked
        for held in self._beamlines.values():
            for pool in held.pools_at(name):
                if jobs is None:
                    pool.unreachable(name, listed.asked)
                else:
                    pool.listed(name, listed.asked, jobs)

    def _forget(self, name: str) -> None:
        _log.info("%s is let go", name)
        self._beamlines.pop(name).close()
        self._freight.hold(name, None)
        self._directory.forget(name)
        self._leave_sites()

    def _answer(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        match asked:
            case {"do": "status"}:
                return self.report()
            case {"do": "up", "beamline": dict(beamline), "sites": list(sites)}:
                known = [checked(site, Site) for site in sites]
                self.up(checked(beamline, Beamline), {site.site: site for site in known})
                return {}
            case {"do": "down", "beamline": str(beamline)}:
                self.down(beamline)
                return {}
            case {"do": "submit", "submission": dict(submission)}:
                runs = self._freight.submit(checked(submission, Submission))
                return {"runs": [run.name for run in runs]}
            case {"do": "files", "beamline": str(beamline), "runs": list(names)}:
                return {"runs": self._freight.runs(beamline, map(str, names))}
            case {"do": "cancel", "beamline": str(beamline), "runs": list(names)}:
                self._freight.cancel(beamline, map(str, names))
                return {}
            case _:
                raise ConfigError(f"what is {str(asked)[:100]}?")


def _ear(site: Site) -> str:
    """Return the name of the ear that hears a site's pilots: those that dial one address share one."""
    return site.heartbeats.bind or site.site
