"""What is to be done so that as many pilots serve as are wanted. Pure.

A lease that stays counts as one, from before its job is submitted; one that leaves (draining, silent, cancelled) does
not count. A successor, whose lease replaces one that stays, does not count beside it. So at any time
``staying <= min(wanted, max_nodes) + successors``, and at most two successors go with one lease: one for a pilot whose
walltime ends, and one more while that one waits in a queue. What leaves still runs for as long as it takes to end, and
keeps its place among the `max_jobs` of its rung: these bound all that runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hpc_bridge.config import Queue, Site
from hpc_bridge.job import JobState
from hpc_bridge.leases import Pause, Stage
from hpc_bridge.reconcile import State, View

DRAINED_WITHIN = 60.0
"""A pilot that was told to drain and is still there so long (s) after the time that it has for it is cancelled."""

WAITED = 60.0
"""A job that waited so long (s), while better rungs are open or its site is out of reach, gets company elsewhere."""

LIMITS = ("Assoc", "QOS")
"""Slurm's reasons of jobs that wait for a limit, not for a node, begin so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of a beamline's ladder: a queue of a site, as it is now."""

    site: Site
    queue: Queue
    is_open: bool
    """Its site answers, and it is not paused."""
    room: int
    """How many more jobs of ours fit."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Begin a lease."""

    site: str
    queue: str
    replaces: str | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """Tell a pilot to hand over and go."""

    lease: str
    why: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ask the scheduler to end a job."""

    lease: str
    why: str


Action = Submit | Drain | Cancel | Pause


def decide(
    *,
    now: float,
    wanted: int,
    views: Sequence[View],
    ladder: Sequence[Rung],
    submits_left: Mapping[str, int],
    unreachable_since: Mapping[str, float],
    lets_go: bool = True,
) -> list[Action]:
    """Return what is to be done, in order; nothing twice, if it is written down what was done.

    Parameters
    ----------
    wanted
        How many pilots shall serve, at most `max_nodes`.
    views
        The leases, oldest first.
    ladder
        The first rung that is open and has room is taken.
    submits_left
        How many jobs may be submitted at each site now.
    unreachable_since
        Sites that do not answer.
    lets_go
        Whether pilots go of which there are more than wanted.
    """
    decision = _Decision(now, views, ladder, submits_left, unreachable_since)
    decision.end_what_cannot_serve(views)
    decision.give_up_waiting()
    decision.relieve()
    if lets_go:
        decision.shrink(wanted)
    decision.grow(wanted)
    decision.hand_over()
    decision.look_elsewhere()
    return decision.actions


class _Decision:
    def __init__(
        self,
        now: float,
        views: Sequence[View],
        ladder: Sequence[Rung],
        submits_left: Mapping[str, int],
        unreachable_since: Mapping[str, float],
    ) -> None:
        self.actions: list[Action] = []
        self._now = now
        self._staying = {view.lease.lease: view for view in views if not view.is_leaving}
        self._ladder = list(ladder)
        self._at = {(rung.site.site, rung.queue.name): i for i, rung in enumerate(ladder)}
        self._sites = {rung.site.site: rung.site for rung in ladder}
        self._submits_left = dict(submits_left)
        self._unreachable_since = unreachable_since

    def end_what_cannot_serve(self, views: Sequence[View]) -> None:
        for view in views:
            lease = view.lease
            if lease.stage is Stage.CANCELLING or view.state is State.OVER:
                continue
            if view.is_requeued or view.state is State.SILENT:
                self._cancel(view, view.why)
            elif lease.leaving_since is not None:
                within = self._sites[lease.site].drain.total_seconds() + DRAINED_WITHIN
                if self._now - lease.leaving_since > within:
                    self._cancel(view, f"it did not end within {within:g} s")
            elif view.state is State.DRAINING:
                self._drain(view, view.why)

    def give_up_waiting(self) -> None:
        passed_by = set()
        room = [rung.room if rung.is_open else 0 for rung in self._ladder]
        for view in [view for view in self._staying.values() if view.state is State.QUEUED]:
            i = self._rung(view)
            if i == len(self._ladder) or view.lease.site in self._unreachable_since:
                continue
            rung = self._ladder[i]
            why = _will_not_start(view, rung.queue, self._now)
            next_one = next((j for j in range(i + 1, len(room)) if room[j] > 0), None)
            if why is None or next_one is None:
                continue
            room[next_one] -= 1
            self._cancel(view, why)
            if i not in passed_by:
                passed_by.add(i)
                room[i] = 0
                until = self._now + rung.queue.retry_after.total_seconds()
                self.actions.append(Pause(site=rung.site.site, queue=rung.queue.name, until=until, why=why))
                self._ladder[i] = replace(rung, is_open=False)

    def relieve(self) -> None:
        for view in list(self._staying.values()):
            old = self._staying.get(view.lease.replaces or "")
            if old is None:
                continue
            if view.state is State.SERVING:
                self._let_go(old, f"{view.lease.lease} serves in its place")
            elif old.state is State.SERVING and not self._ends_within(old, self._site(old).ahead.total_seconds()):
                self._let_go(view, f"{old.lease.lease} came first")
        for view in list(self._staying.values()):
            if view.state is State.SERVING and self._ends_within(view, self._site(view).drain.total_seconds()):
                self._drain(view, "its walltime ends")

    def shrink(self, wanted: int) -> None:
        while self._n_staying() > wanted:
            self._let_go(min(self._counted(), key=_worth), "no more wanted")

    def grow(self, wanted: int) -> None:
        for _ in range(wanted - self._n_staying()):
            self._submit(len(self._ladder))

    def hand_over(self) -> None:
        for lease, view in self._staying.items():
            ends = self._ends_within(view, self._site(view).ahead.total_seconds())
            if view.state is State.SERVING and ends and not self._has_successor(lease):
                self._submit(len(self._ladder), replaces=lease)

    def look_elsewhere(self) -> None:
        for lease, view in self._staying.items():
            if view.state not in (State.SUBMITTING, State.QUEUED):
                continue
            of = view.lease.replaces if view.lease.replaces in self._staying else lease
            since = self._unreachable_since.get(view.lease.site)
            is_asked_in_vain = since is not None and view.state is State.SUBMITTING
            has_waited = self._now - (since or view.lease.submitted or view.lease.created) >= WAITED
            if (is_asked_in_vain or has_waited) and not self._has_successor(of, besides=lease):
                self._submit(self._rung(view) if since is None else len(self._ladder), replaces=of)

    def _counted(self) -> list[View]:
        return [view for view in self._staying.values() if view.lease.replaces not in self._staying]

    def _n_staying(self) -> int:
        return len(self._counted())

    def _has_successor(self, lease: str, besides: str | None = None) -> bool:
        return any(view.lease.replaces == lease for name, view in self._staying.items() if name != besides)

    def _rung(self, view: View) -> int:
        return self._at.get((view.lease.site, view.lease.queue), len(self._ladder))

    def _site(self, view: View) -> Site:
        return self._sites[view.lease.site]

    def _ends_within(self, view: View, seconds: float) -> bool:
        return view.ends - self._now <= seconds

    def _submit(self, stop: int, replaces: str | None = None) -> None:
        usable = (i for i, rung in enumerate(self._ladder[:stop]) if rung.is_open and rung.room > 0)
        i = next(usable, None)
        if i is None:
            return
        rung = self._ladder[i]
        site = rung.site.site
        if self._submits_left[site] > 0:
            self._submits_left[site] -= 1
            self._ladder[i] = replace(rung, room=rung.room - 1)
            self.actions.append(Submit(site, rung.queue.name, replaces))

    def _let_go(self, view: View, why: str) -> None:
        if view.state is State.SERVING:
            self._drain(view, why)
        else:
            self._cancel(view, why)

    def _drain(self, view: View, why: str) -> None:
        self.actions.append(Drain(view.lease.lease, why))
        self._staying.pop(view.lease.lease, None)

    def _cancel(self, view: View, why: str) -> None:
        self.actions.append(Cancel(view.lease.lease, why))
        self._staying.pop(view.lease.lease, None)


def _worth(view: View) -> tuple[int, bool, int, float, float]:
    up = {State.STARTING: 1, State.SERVING: 2}.get(view.state, 0)
    return up, view.has_task, view.regions, view.ends, -view.lease.created


def _will_not_start(view: View, queue: Queue, now: float) -> str | None:
    job = view.job
    if job is not None and (job.state is JobState.HELD or job.reason.startswith(LIMITS)):
        return f"{job.state}: {job.reason}"
    waited = now - (view.lease.submitted or view.lease.created)
    if queue.start_within is not None and waited > queue.start_within.total_seconds():
        return f"not started within {queue.start_within.total_seconds():g} s"
    return None
