"""The manager: carries messages between pools, schedulers, pilots, run engines and people.

What is to be done is `hpc_bridge.pool`'s matter.
"""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from types import TracebackType
from typing import Any, Self

from hpc_bridge.assembly import job_of, keys_of, scheduler_of
from hpc_bridge.config import Beamline, Site, checked
from hpc_bridge.control import Control
from hpc_bridge.demand import Demand
from hpc_bridge.desk import Desk, Listed, Submitted
from hpc_bridge.errors import BridgeError, BudgetExceeded, ConfigError
from hpc_bridge.hearing import Hearing
from hpc_bridge.heartbeat import Do
from hpc_bridge.leases import Leases
from hpc_bridge.pool import CancelJob, Pool, SubmitJob
from hpc_bridge.reconcile import State, View
from hpc_bridge.report import report
from hpc_bridge.runs import Runs, runs_of
from hpc_bridge.state import StateDirectory

_log = logging.getLogger(__name__)

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
        self._directory = StateDirectory(state)
        self._answers: SimpleQueue[Listed | Submitted] = SimpleQueue()
        self._began = time.time()
        self._sites: dict[str, Site] = {}
        self._desks: dict[str, Desk] = {}
        self._ears: dict[str, Hearing] = {}
        self._said: dict[str, str] = {}
        """Why a site did not answer."""
        self._listed: dict[str, float] = {}
        self._beamlines: dict[str, _Held] = {}
        self._open = ExitStack()
        with ExitStack() as stack:
            self._leases = stack.enter_context(Leases.open(self._directory.record))
            self._control = stack.enter_context(Control(state))
            self._open = stack.pop_all()
        try:
            sites = self._directory.sites()
            for beamline, is_let_go in self._directory.beamlines():
                self._beamlines[beamline.beamline] = self._held(beamline, sites, is_let_go=is_let_go)
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
            for ear in self._ears.values():
                for heard in ear.poll(PACE / len(self._ears)):
                    for held in self._beamlines.values():
                        held.pool.heard(heard)
            self._take_answers()
            for desk in self._desks.values():
                desk.list()
            for name, held in list(self._beamlines.items()):
                self._give_orders(held)
                if held.is_let_go and not self._leases.open_leases(name):
                    self._forget(name)
            self._control.serve(self._answer)

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
            self._beamlines[beamline.beamline] = held
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
                name: report(held.beamline, held.views, self._leases, wanted=held.wanted, now=now)
                for name, held in self._beamlines.items()
            },
        }

    def _held(self, beamline: Beamline, sites: Mapping[str, Site], *, is_let_go: bool) -> "_Held":
        if missing := [name for name in beamline.sites if name not in sites]:
            raise ConfigError(f"beamline {beamline.beamline}: nothing is said of site {', '.join(missing)}")
        pool = Pool(beamline, sites, self._leases, now=time.time())
        for name in beamline.sites:
            self._serve(sites[name])
        runs = None
        if beamline.run_engine is not None:
            group = f"{beamline.beamline}.hpc-bridge"
            runs = runs_of(beamline.run_engine, group=group, properties=beamline.kafka_properties)
        return _Held(beamline, pool, self._leases, runs, is_let_go=is_let_go)

    def _see_that_it_is_paid(self, held: "_Held", sites: Mapping[str, Site]) -> None:
        beamline = held.beamline
        has = len(self._leases.open_leases(beamline.beamline))
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
            if beats.bind == theirs.bind and (beats.secret_key, beats.allowed) != (theirs.secret_key, theirs.allowed):
                raise ConfigError(f"sites {site.site} and {other.site} share {beats.bind}, and not its keys")
        scheduler, keys = scheduler_of(site), keys_of(site)
        bind = site.heartbeats.bind
        if bind not in self._ears:
            self._ears[bind] = Hearing(bind, self._tell_pilot, keys=keys)
        self._sites[site.site] = site
        self._desks[site.site] = Desk(site, scheduler, self._answers)

    def _leave_sites(self) -> None:
        """Let go of the sites that no beamline names any more."""
        named = {name for held in self._beamlines.values() for name in held.beamline.sites}
        for name in self._sites.keys() - named:
            del self._sites[name]
            self._said.pop(name, None)
            self._desks.pop(name).close()
        for bind in self._ears.keys() - {site.heartbeats.bind for site in self._sites.values()}:
            self._ears.pop(bind).close()

    def _tell_pilot(self, lease: str) -> tuple[Do, str]:
        for held in self._beamlines.values():
            if (answer := held.pool.answer(lease)) is not None:
                return answer
        return Do.END, "its lease is not on record"

    def _give_orders(self, held: "_Held") -> None:
        now = time.time()
        held.look_at_runs(now)
        held.views = held.pool.views(now)
        for order in held.pool.orders(now, held.want(now)):
            match order:
                case SubmitJob(lease):
                    instead = f", instead of {lease.replaces}" if lease.replaces else ""
                    _log.info("%s: asked of %s at %s%s", lease.name, lease.queue, lease.site, instead)
                    site = self._sites[lease.site]
                    self._desks[lease.site].submit(lease.lease, job_of(lease, site, held.beamline))
                case CancelJob(site=name, job_id=job_id, why=why):
                    _log.info("job %s at %s is cancelled: %s", job_id, name, why)
                    self._desks[name].cancel(job_id)

    def _take_answers(self) -> None:
        while True:
            try:
                answer = self._answers.get_nowait()
            except Empty:
                return
            match answer:
                case Listed():
                    self._take_listing(answer)
                case Submitted(lease=lease, at=at, job_id=job_id, refused=refused):
                    for held in self._beamlines.values():
                        if job_id is not None:
                            held.pool.submitted(lease, job_id, at)
                        elif refused:
                            held.pool.refused(lease, refused, at)
                        else:
                            held.pool.unanswered(lease, at)

    def _take_listing(self, listed: Listed) -> None:
        name, jobs = listed.site, listed.jobs
        if jobs is None:
            if name not in self._said:
                _log.warning("%s cannot be reached: %s", name, listed.why)
            self._said[name] = listed.why
        else:
            if self._said.pop(name, None) is not None:
                _log.warning("%s is back", name)
            self._listed[name] = listed.asked
        for held in self._beamlines.values():
            if name in held.beamline.sites:
                if jobs is None:
                    held.pool.unreachable(name, listed.asked)
                else:
                    held.pool.listed(name, listed.asked, jobs)

    def _forget(self, name: str) -> None:
        _log.info("%s is let go", name)
        self._beamlines.pop(name).close()
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
            case _:
                raise ConfigError(f"what is {str(asked)[:100]}?")


class _Held:
    """A beamline."""

    def __init__(self, beamline: Beamline, pool: Pool, leases: Leases, runs: Runs | None, *, is_let_go: bool) -> None:
        self.beamline, self.pool, self.is_let_go = beamline, pool, is_let_go
        self.views: list[View] = []
        self.wanted = 0
        self._leases = leases
        since = time.time() - beamline.linger.total_seconds()
        has = len(leases.open_leases(beamline.beamline))
        self._demand = Demand(beamline, leases.runs(beamline.beamline, since), has=has)
        self._runs = runs

    def close(self) -> None:
        """Listen to the run engine no more."""
        if self._runs is not None:
            self._runs.__exit__(None, None, None)

    def look_at_runs(self, now: float) -> None:
        """Take note of runs that began or ended."""
        for told in self._runs.look() if self._runs is not None else ():
            name = self.beamline.beamline
            _log.info("%s: run %s %s", name, told.run, "begins" if told.began else "ended")
            if told.began:
                self._leases.run_began(name, told.run, now)
                self._demand.began(told.run, now)
            else:
                self._leases.run_ended(name, told.run, now)
                self._demand.ended(told.run, now)

    def want(self, now: float) -> int:
        """Return how many nodes are wanted."""
        serving = [view for view in self.views if view.state is State.SERVING]
        lags = [view.heard.heartbeat.status.lag_s for view in serving if view.heard is not None]
        lag = max((lag for lag in lags if lag is not None), default=None)
        self.wanted = 0 if self.is_let_go else self._demand.wanted(now, lag=lag, serving=len(serving))
        return self.wanted
