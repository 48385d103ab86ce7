"""The leases of one beamline: takes note of all that is seen of them, and says what the manager is to do.

All that must outlive the manager is in the record before it is done; the rest is seen again. The manager only carries
messages, in any order, and may be killed between any two of them::

    pool = Pool(beamline, sites, leases, now=time.time())  # once pilots can be heard
    while True:
        for heard in hearing.poll(within):  # Hearing asks pool.answer(lease) for each of them
            pool.heard(heard)
        for each listing that was answered:  # asked for now and then at every site, under way in its own thread
            pool.listed(site, asked, jobs)  # or pool.unreachable(site, asked)
        for order in pool.orders(now, demand.wanted(...)):
            match order:  # carried out in a thread of its site
                case SubmitJob(lease): ...  # then pool.submitted, pool.refused or pool.unanswered
                case CancelJob(site, job_id): ...  # it is ordered again until the job is seen to be over
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_bridge import budget
from hpc_bridge.config import Beamline, Site
from hpc_bridge.decide import Cancel, Drain, Rung, Submit, decide
from hpc_bridge.errors import BudgetExceeded, ConfigError
from hpc_bridge.heartbeat import Do, Heard
from hpc_bridge.heartbeat import State as Pilot
from hpc_bridge.job import Job, JobState
from hpc_bridge.leases import PREFIXES, Kind, Lease, Leases, Pause, Stage
from hpc_bridge.reconcile import Sighting, State, View, reconcile

_log = logging.getLogger(__name__)

SET_BACK = 1.0
"""A clock that goes back by more was set (s)."""

CANCEL_AGAIN = 10.0
"""A job that is to be cancelled and still there is cancelled again after so long (s)."""

ENDING = 10.0
"""How long (s) a job may be listed as running after its pilot said that it ended."""


FAILURES = 3
"""Pilots in a row that ended by themselves soon, after which their rung is passed by for a while."""

STEADY = 60.0
"""Not soon is after having served for so long (s)."""

TAKEN = ("PREEMPTED", "NODE_FAIL", "CANCELLED", "REQUEUED", "BOOT_FAIL")
"""Slurm's words for jobs that are not to blame."""


@dataclass(frozen=True, slots=True)
class SubmitJob:
    """Submit the job of a lease, under its name; it is on record. Then tell the pool what came of it, once."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Cancel a job. Nothing needs to be told: whether it worked will be seen."""

    site: str
    job_id: str
    why: str


Order = SubmitJob | CancelJob


class Pool:
    """What one beamline has of one kind.

    Parameters
    ----------
    sites
        By name, those of the beamline at least.
    leases
        The record, which may be shared with pools of other beamlines and kinds.
    now
        Since when pilots can be heard. All times are seconds of the Unix epoch by one clock, that of `Heard.at`. If it
        is set back, all begins anew with what is on record. Should `orders` not be called for longer than `lost_after`,
        then nobody is held to have been silent meanwhile.
    at
        Only what it has at this site; None: at all of its sites, of which any is as good.

    Raises
    ------
    ConfigError
        A site of the beamline, or one where it has a lease, is not among the sites.
    """

    def __init__(
        self,
        beamline: Beamline,
        sites: Mapping[str, Site],
        leases: Leases,
        *,
        now: float,
        kind: Kind = Kind.STREAM,
        at: str | None = None,
    ) -> None:
        self._beamline, self._kind = beamline, kind
        self._name = re.compile(rf"{PREFIXES[kind]}{re.escape(beamline.beamline)}-([0-9a-f]{{12}})(\.|$)")
        self._leases = leases
        ours = leases.open_leases(beamline.beamline)
        self._open = {lease.lease: lease for lease in ours if lease.kind is kind and at in (None, lease.site)}
        for name in dict.fromkeys([*beamline.sites, *(lease.site for lease in ours)]):
            if name not in sites:
                raise ConfigError(f"beamline {beamline.beamline}: site {name} is not known")
            if name not in beamline.sites:
                raise ConfigError(
                    f"beamline {beamline.beamline}: has leases at {name}, which is no more among its sites"
                )
        self._sites = {name: sites[name] for name in beamline.sites if at in (None, name)}
        self._sightings: dict[str, Sighting] = {}
        self._heard: dict[str, Heard] = {}
        self._listings: dict[str, tuple[float, Sequence[Job]]] = {}
        self._unreachable_since: dict[str, float] = {}
        self._cancelled: dict[tuple[str, str], float] = {}
        self._drained: dict[str, float] = {}
        """When pilots were told to go, by whomever."""
        self._failures: Counter[tuple[str, str]] = Counter()
        self._submit_ended: dict[str, float] = {}
        """When it was no more under way to submit a lease of this process; infinite while it is."""
        self._lost_after = min(site.heartbeats.lost_after.total_seconds() for site in self._sites.values())
        self._listening_since = self._last = now

    def listed(self, site: str, asked: float, jobs: Sequence[Job]) -> None:
        """Take what jobs a site lists, ours among others, and when it was asked for them.

        A listing that a newer one has overtaken counts for nothing.
        """
        if asked < self._listings.get(site, (-math.inf,))[0]:
            return
        self._listings[site] = asked, [job for job in jobs if self._name.match(job.name)]
        self._unreachable_since.pop(site, None)
        told = self._by_lease(site)
        for lease in [lease for lease in self._open.values() if lease.site == site]:
            sighting = self._sightings.get(lease.lease, Sighting())
            job = told.get(lease.lease)
            if job is not None:
                self._sightings[lease.lease] = sighting.told(job, asked)
                self._write_down(lease, job, asked)
            elif asked > max(lease.submitted or lease.created, self._submit_ended.get(lease.lease, 0.0)):
                self._sightings[lease.lease] = sighting.missed(asked)

    def unreachable(self, site: str, asked: float) -> None:
        """Take that a site did not list its jobs."""
        if asked > self._listings.get(site, (-math.inf,))[0]:
            self._unreachable_since.setdefault(site, asked)

    def reaches(self, site: str) -> bool:
        """Say whether a site answers."""
        return site in self._listings and site not in self._unreachable_since

    def heard(self, heard: Heard) -> None:
        """Take a heartbeat, of the newest pilot of its lease; those of others' pilots are no matter."""
        beat = heard.heartbeat
        lease = self._open.get(beat.lease)
        if lease is None:
            return
        self._heard[lease.lease] = heard
        if beat.state is Pilot.DRAINING:
            self._drained[lease.lease] = heard.at
        self._sightings[lease.lease] = self._sightings.get(lease.lease, Sighting()).heard()
        if lease.started is None or not lease.node:
            began = min(max(heard.began, lease.created), heard.at)
            lease = self._put(self._leases.started(lease.lease, began, beat.node))
        if lease.serving_since is None and beat.state is Pilot.SERVING:
            self._put(self._leases.serving(lease.lease, heard.at))

    def submitted(self, lease: str, job_id: str, at: float) -> None:
        """Take the id of the job that was submitted for a lease."""
        if lease in self._open:
            self._submit_ended[lease] = at
            self._put(self._leases.submitted(lease, job_id, at))

    def refused(self, lease: str, why: str, at: float) -> None:
        """Take that a scheduler refused the job of a lease; its rung is passed by for a while."""
        if lease in self._open:
            self._pass_by(self._open[lease].site, self._open[lease].queue, why, at)
            self._end(self._open[lease], at, f"refused: {why}")

    def unanswered(self, lease: str, at: float) -> None:
        """Take that a scheduler did not say whether it will run the job of a lease: listings will tell."""
        if lease in self._open:
            self._submit_ended[lease] = at
            self._unreachable_since.setdefault(self._open[lease].site, at)

    def answer(self, lease: str) -> tuple[Do, str] | None:
        """Return what the pilot of a lease is to do, and why; None: it is not of this beamline."""
        ours = self._open.get(lease) or self._leases.get(lease)
        if ours is None or (ours.beamline, ours.kind) != (self._beamline.beamline, self._kind):
            return None
        match ours.stage:
            case Stage.DRAINING:
                return Do.DRAIN, ours.reason
            case Stage.CANCELLING | Stage.OVER:
                return Do.END, ours.reason
            case _:
                return Do.GO_ON, ""

    def views(self, now: float) -> list[View]:
        """Return what the leases are that are not over on record, oldest first."""
        return [
            reconcile(
                lease,
                self._sightings.get(lease.lease, Sighting()),
                self._heard.get(lease.lease),
                now=now,
                listening_since=self._listening_since,
                site=self._sites[lease.site],
            )
            for lease in self._open.values()
        ]

    def orders(self, now: float, wanted: int) -> list[Order]:
        """Return what is to be done so that `wanted` pilots serve; new leases are on record.

        Raises
        ------
        RecordError
            The record cannot be written: then nothing may be done.
        """
        if now < self._last - SET_BACK:
            _log.warning("%s: the clock was set back by %.0f s", self._beamline.beamline, self._last - now)
            self._begin_anew(now)
        if now - self._last > self._lost_after:
            _log.warning("%s: away for %.0f s", self._beamline.beamline, now - self._last)
            self._listening_since = now
        self._last = now
        views = self.views(now)
        for view in views:
            if view.state is State.OVER:
                if self._failed(view, now):
                    self._mind_failure(view, now)
                elif view.lease.serving_since is not None:
                    self._failures[view.lease.site, view.lease.queue] = 0
                self._end(view.lease, _ended(view, now), view.why)
        actions = decide(
            now=now,
            wanted=min(wanted, self._beamline.max_nodes) if self._kind is Kind.STREAM else wanted,
            views=views,
            ladder=self._ladder(now),
            submits_left={name: self._submits_left(site, now) for name, site in self._sites.items()},
            unreachable_since=self._unreachable_since,
            # Those that were not heard of yet would seem the least to lose.
            lets_go=not wanted or now - self._listening_since > self._lost_after,
        )
        orders: list[Order] = []
        for action in actions:
            match action:
                case Submit():
                    orders += self._begin(action, now)
                case Drain(lease, why):
                    self._leave(lease, Stage.DRAINING, why, now)
                case Cancel(lease, why):
                    self._leave(lease, Stage.CANCELLING, why, now)
                    view = next(view for view in views if view.lease.lease == lease)
                    if view.state is State.SILENT and view.lease.serving_since is None:
                        self._mind_failure(view, now)
                case Pause(site=site, queue=queue, why=why):
                    self._pass_by(site, queue, why, now)
        return [*orders, *self._cancels(now)]

    def _begin_anew(self, now: float) -> None:
        """Forget what was seen, as a manager that starts again: what comes next would seem older."""
        for seen in (self._sightings, self._heard, self._listings, self._unreachable_since, self._drained):
            seen.clear()
        self._submit_ended = {lease: at if at == math.inf else min(at, now) for lease, at in self._submit_ended.items()}
        self._listening_since = now

    def _failed(self, view: View, now: float) -> bool:
        """Say whether it ended soon although nobody wanted it to: then the next one may, too."""
        lease, job = view.lease, view.job
        if lease.leaving_since is not None or lease.started is None:
            return False
        if lease.lease in self._drained or (job is not None and job.reason.startswith(TAKEN)):
            return False
        return lease.serving_since is None or now - lease.serving_since < STEADY

    def _mind_failure(self, view: View, now: float) -> None:
        site, queue = rung = view.lease.site, view.lease.queue
        self._failures[rung] += 1
        if self._failures[rung] >= FAILURES:
            where = f"their output is in {self._sites[site].directory}"
            self._pass_by(site, queue, f"{FAILURES} pilots in a row did not last: {view.why}; {where}", now)
            self._failures[rung] = 0

    def _by_lease(self, site: str) -> dict[str, Job]:
        told: dict[str, Job] = {}
        for job in self._listings[site][1]:
            lease = self._open.get(self._lease_of(job))
            if lease is None or lease.job_id not in (None, job.id):
                continue
            other = told.get(lease.lease)
            # A lease that does not know its job takes one, and the same one each time: the others are cancelled.
            if other is None or _order(job) < _order(other):
                told[lease.lease] = job
        return told

    def _lease_of(self, job: Job) -> str:
        match = self._name.match(job.name)
        return match[1] if match else ""

    def _write_down(self, lease: Lease, job: Job, asked: float) -> None:
        if lease.job_id is None:
            _log.info("%s: adopted job %s", lease.name, job.id)
            lease = self._put(self._leases.submitted(lease.lease, job.id, job.submitted or asked))
        ran = job.state.is_final and job.started is not None
        if lease.started is None and (job.state is JobState.ACTIVE or ran):
            self._put(self._leases.started(lease.lease, job.started or asked, ",".join(job.nodes)))

    def _ladder(self, now: float) -> list[Rung]:
        pauses = self._leases.pauses(self._beamline.beamline, now)
        paused = {(pause.site, pause.queue) for pause in pauses if pause.kind is self._kind}
        taken = Counter(self._leases.taken(besides=self._beamline.beamline))
        taken.update((lease.site, lease.queue) for lease in self._others())
        for lease in self._open.values():
            job = self._sightings.get(lease.lease, Sighting()).job
            if job is None or not job.state.is_final:
                taken[lease.site, lease.queue] += 1
        return [
            Rung(
                site=site,
                queue=queue,
                is_open=self.reaches(name) and (name, queue.name) not in paused,
                room=queue.max_jobs - taken[name, queue.name],
            )
            for name, site in self._sites.items()
            for queue in site.queues
        ]

    def _submits_left(self, site: Site, now: float) -> int:
        per_minute = site.submits_per_minute
        return max(1, int(per_minute)) - self._leases.begun(site.site, now - 60 * max(1.0, 1 / per_minute))

    def _begin(self, action: Submit, now: float) -> list[Order]:
        site = self._sites[action.site]
        [queue] = [queue for queue in site.queues if queue.name == action.queue]
        walltime = queue.walltime.total_seconds()
        try:
            self.check_budget(action.site, walltime, now)
        except BudgetExceeded as error:
            self._pass_by(action.site, action.queue, str(error), now)
            return []
        account = self._beamline.accounts.get(action.site)
        lease = self._leases.begin(
            beamline=self._beamline.beamline,
            site=action.site,
            queue=action.queue,
            account="" if account is None else account.account,
            walltime=walltime,
            now=now,
            replaces=action.replaces,
            kind=self._kind,
        )
        self._submit_ended[lease.lease] = math.inf
        return [SubmitJob(self._put(lease))]

    def check_budget(self, site: str, node_seconds: float, now: float) -> None:
        """See that the account at a site covers a request beside what was used and what the leases there may use.

        Raises
        ------
        BudgetExceeded
            It does not.
        """
        account = self._beamline.accounts.get(site)
        if account is None or account.node_hours is None:
            return
        leases = [*self._open.values(), *self._others()]
        ours = [lease for lease in leases if (lease.site, lease.account) == (site, account.account)]
        budget.check(
            account,
            site=site,
            used_s=self._leases.cost(self._beamline.beamline, site, account.account, since=account.begins, now=now),
            committed_s=budget.committed(ours, now),
            request_s=node_seconds,
        )

    def _pass_by(self, site: str, queue: str, why: str, now: float) -> None:
        _log.warning("%s: %s at %s is passed by: %s", self._beamline.beamline, queue, site, why)
        retry_after = next(each.retry_after for each in self._sites[site].queues if each.name == queue)
        pause = Pause(site=site, queue=queue, until=now + retry_after.total_seconds(), why=why, kind=self._kind)
        self._leases.pause(self._beamline.beamline, pause)

    def _others(self) -> list[Lease]:
        """Return the leases of this beamline that other pools have."""
        leases = self._leases.open_leases(self._beamline.beamline)
        return [lease for lease in leases if lease.lease not in self._open]

    def _cancels(self, now: float) -> list[Order]:
        orders: list[Order] = []
        self._cancelled = {job: at for job, at in self._cancelled.items() if 0 <= now - at < CANCEL_AGAIN}
        for site, (asked, jobs) in self._listings.items():
            leaving = [lease for lease in self._open.values() if lease.stage is Stage.CANCELLING and lease.site == site]
            unwanted = {lease.job_id: lease.reason for lease in leaving if lease.job_id is not None}
            unwanted |= {job.id: why for job in jobs if (why := self._why_orphan(job, asked)) is not None}
            for job_id, why in unwanted.items():
                if site not in self._unreachable_since and (site, job_id) not in self._cancelled:
                    self._cancelled[site, job_id] = now
                    orders.append(CancelJob(site, job_id, why))
        return orders

    def _why_orphan(self, job: Job, asked: float) -> str | None:
        if job.state.is_final:
            return None
        name = self._lease_of(job)
        lease = self._open.get(name) or self._leases.get(name)
        if lease is None:
            return "its lease is not on record"
        if lease.ended is None:
            return None if lease.job_id in (None, job.id) else f"its lease has job {lease.job_id}"
        is_ending = job.state is JobState.ACTIVE and asked < lease.ended + ENDING
        return None if is_ending else f"its lease is over: {lease.reason}"

    def _leave(self, lease: str, stage: Stage, why: str, now: float) -> None:
        _log.info("%s: %s: %s", self._open[lease].name, stage, why)
        self._put(self._leases.leaving(lease, stage, why, now))

    def _put(self, lease: Lease) -> Lease:
        self._open[lease.lease] = lease
        return lease

    def _end(self, lease: Lease, at: float, why: str) -> None:
        _log.info("%s: over: %s", lease.name, why)
        self._leases.ended(lease.lease, at, why)
        for known in (self._open, self._sightings, self._heard, self._drained, self._submit_ended):
            known.pop(lease.lease, None)


def _order(job: Job) -> tuple[bool, bool, str]:
    return job.state.is_final, job.state is not JobState.ACTIVE, job.id


def _ended(view: View, now: float) -> float:
    job, heard = view.job, view.heard
    if job is not None and job.state.is_final and job.ended is not None:
        return min(job.ended, now)
    return heard.at if heard is not None and heard.heartbeat.state is Pilot.ENDED else now
