"""Computing centres, pilots and a manager's messages without any of them: time passes in steps of a second.

The pool, its record on disk and all that decides are the real ones. What a scheduler, a node and a network may do to
them is here; each that is not written down is lost when the manager dies.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta

from hpc_bridge.config import Beamline, Heartbeats, Queue, Site
from hpc_bridge.heartbeat import Do, Heard, Heartbeat, Status
from hpc_bridge.heartbeat import State as Pilot
from hpc_bridge.job import Job, JobState
from hpc_bridge.leases import Leases, Stage
from hpc_bridge.pool import CancelJob, Pool, SubmitJob

T0 = 1_700_000_000.0
LOST_AFTER = 10.0
"""As sites have it if they are not told (s)."""
LEAVING = (Stage.DRAINING, Stage.CANCELLING, Stage.OVER)


def seconds(n):
    return timedelta(seconds=n)


def queue(name, **changes):
    return Queue(**{"name": name, "walltime": seconds(600), "max_jobs": 10, "retry_after": seconds(60)} | changes)


def site(name="near", queues=None, **changes):
    changes = {
        "site": name,
        "scheduler": "local",
        "directory": "/tmp",  # noqa: S108 - never touched
        "heartbeats": Heartbeats(bind="tcp://127.0.0.1:1", address="tcp://127.0.0.1:1"),
        "queues": queues or (queue("demand"),),
        "starts_within": seconds(60),
        "ahead": seconds(60),
        "drain": seconds(15),
        "submits_per_minute": 20,
    } | changes
    return Site(**changes)


def beamline(**changes):
    return Beamline(**{"beamline": "8ID", "sites": ("near",), "command": ("true",), "max_nodes": 8} | changes)


def heartbeat(lease, state=Pilot.SERVING, *, at, began=T0, n_regions=1, pid=1, node="n1", exit_code=None):
    said = Heartbeat(
        lease=lease,
        node=node,
        pid=pid,
        n=0,
        state=state,
        started=began,
        now=at,
        exit_code=exit_code,
        status=Status(ready=state is Pilot.SERVING, regions=tuple(range(n_regions))),
    )
    return Heard(heartbeat=said, at=at, monotonic=at)


@dataclass
class Task:
    """A job as its centre has it, and the pilot on its node."""

    id: str
    lease: str
    name: str
    queue: str
    submitted: float
    listed_from: float
    starts: float
    walltime: float
    state: JobState = JobState.QUEUED
    reason: str = ""
    started: float | None = None
    ended: float | None = None
    restarts: int = 0
    is_cancelled: bool = False
    node_fails_at: float = math.inf
    pilots: list = field(default_factory=list)

    @property
    def is_over(self):
        return self.state.is_final

    def end(self, state, reason, now):
        self.state, self.reason, self.ended = state, reason, now

    def requeue(self, now, wait):
        self.state, self.started, self.restarts, self.starts = JobState.QUEUED, None, self.restarts + 1, now + wait
        self.node_fails_at = math.inf

    def told(self):
        ends = None if self.started is None else self.started + self.walltime
        return Job(
            id=self.id,
            name=f"{self.name}.1700000000",
            state=self.state,
            reason=self.reason,
            queue=self.queue,
            nodes=() if self.started is None else (f"n{self.id}",),
            submitted=self.submitted,
            started=self.started,
            ends=ends,
            ended=self.ended,
            restarts=self.restarts,
        )


@dataclass
class Node:
    """A pilot."""

    lease: str
    pid: int
    began: float
    serves_from: float
    state: Pilot = Pilot.STARTING
    gone_at: float = math.inf
    """When it will have ended, once it drains."""
    is_dead: bool = False
    answered: float = 0.0
    heard_at: float = -math.inf
    cut_until: float = -math.inf

    @property
    def lives(self):
        return not self.is_dead and self.state is not Pilot.ENDED

    def drain(self, now):
        if self.lives and self.state is not Pilot.DRAINING:
            self.state, self.gone_at = Pilot.DRAINING, now + 2


class Centre:
    """A scheduler and its nodes."""

    def __init__(self, name, dice):
        self.name = name
        self.dice = dice
        self.tasks = {}
        self.down_until = self.late_until = self.deaf_until = -math.inf
        self.stuck_until = Counter()
        self.refuses_until = Counter()

    def submit(self, lease, now):
        wait = max(self.dice.uniform(0, 4), self.stuck_until[lease.queue] - now)
        task = Task(
            id=str(100 + len(self.tasks)),
            lease=lease.lease,
            name=lease.name,
            queue=lease.queue,
            submitted=now,
            listed_from=now + self.dice.uniform(0, 4),
            starts=now + wait,
            walltime=lease.walltime,
        )
        self.tasks[task.id] = task
        return task.id

    def jobs(self, now):
        remembered = now - 60
        return [
            task.told()
            for task in self.tasks.values()
            if task.listed_from <= now and (task.ended is None or task.ended > remembered)
        ]

    def cancel(self, task, now):
        task.is_cancelled = True
        living = [pilot for pilot in task.pilots if pilot.lives]
        for pilot in living:
            pilot.drain(now)
        if not living:
            task.end(JobState.CANCELED, "", now)

    def pass_time(self, now):
        for task in [task for task in self.tasks.values() if not task.is_over]:
            if task.state is JobState.QUEUED and task.starts <= now:
                task.state, task.started = JobState.ACTIVE, now
                boot = self.dice.uniform(0, 6)
                task.pilots.append(Node(task.lease, len(task.pilots), now, now + boot + 1, answered=now))
            elif task.state is JobState.ACTIVE:
                self._run(task, now)

    def _run(self, task, now):
        pilot = task.pilots[-1]
        if now >= task.started + task.walltime:
            pilot.is_dead = True
            task.end(JobState.FAILED, "TIMEOUT", now)
        elif now >= task.node_fails_at:
            task.requeue(now, 5)
        elif pilot.state is Pilot.ENDED:
            task.end(JobState.CANCELED if task.is_cancelled else JobState.COMPLETED, "", now)


class World:
    """All of it, with the manager's process in the middle."""

    def __init__(self, path, beamline, sites, seed):
        self.dice = random.Random(seed)
        self.path = path
        self.beamline = beamline
        self.sites = {each.site: each for each in sites}
        self.centres = {name: Centre(name, self.dice) for name in self.sites}
        self.now = T0
        self.wanted = 0
        self.pool = None
        self.begun = -math.inf
        self.up_at = self.now
        self.messages = []
        """(when, what) of what is under way to the manager, or to a scheduler in the manager's name."""
        self.submits = []
        self.newest = {}
        """When the newest pilot of each lease began that was heard of, as `hpc_bridge.hearing.Hearing` knows it."""

    def close(self):
        self.kill_manager(math.inf)

    @property
    def tasks(self):
        return [task for centre in self.centres.values() for task in centre.tasks.values()]

    @property
    def waiting_or_running(self):
        return [task for task in self.tasks if not task.is_over]

    @property
    def pilots(self):
        return [pilot for task in self.tasks for pilot in task.pilots if pilot.lives]

    @property
    def n_serving(self):
        return sum(pilot.state is Pilot.SERVING for pilot in self.pilots)

    def kill_manager(self, for_seconds):
        if self.pool is not None:
            self.leases.close()
        # What was sent to a scheduler arrives; nobody waits for its answer.
        self.messages = [message for message in self.messages if message[2]]
        self.newest.clear()
        self.pool, self.up_at = None, self.now + for_seconds

    def step(self):
        self.now += 1
        for centre in self.centres.values():
            centre.pass_time(self.now)
        if self.pool is None and self.now >= self.up_at:
            self.leases = Leases.open(self.path)
            self.begun = self.now
            self.pool = Pool(self.beamline, self.sites, self.leases, now=self.now)
        due = [message for message in self.messages if message[0] <= self.now]
        self.messages = [message for message in self.messages if message[0] > self.now]
        for _, arrive, _ in due:
            arrive()
        for pilot in self.pilots:
            self._beat(pilot)
        if self.pool is None:
            return
        for centre in self.centres.values():
            if (self.now - T0) % 3 == 0:
                self._list(centre)
        for order in self.pool.orders(self.now, self.wanted):
            match order:
                case SubmitJob(lease):
                    self.submits.append((lease.site, self.now))
                    self._submit(self.centres[lease.site], lease)
                case CancelJob(name, job_id):
                    self._cancel(self.centres[name], job_id)
        self._see_that_it_is_sound()

    def pass_time(self, n):
        for _ in range(n):
            self.step()

    def pass_until(self, is_so, within):
        for _ in range(within):
            if is_so():
                return
            self.step()
        assert is_so(), self.story()

    def story(self):
        rows = [f"at {self.now - T0:.0f}, wanted {self.wanted}"]
        for view in [] if self.pool is None else self.pool.views(self.now):
            lease = view.lease
            rows.append(
                f"{lease.lease} {lease.site}/{lease.queue} {lease.job_id} {lease.stage} {view.state} {view.why}"
            )
        for task in self.waiting_or_running:
            pilots = [(pilot.state, pilot.is_dead) for pilot in task.pilots]
            rows.append(f"{task.lease} {task.id} {task.queue} {task.state} {task.restarts} {pilots}")
        return "\n".join(rows)

    def _send(self, after, arrive, *, survives=False):
        self.messages.append((self.now + after, arrive, survives))

    def _list(self, centre):
        asked = self.now
        if asked < centre.down_until:
            self._send(10, lambda: self.pool.unreachable(centre.name, asked))
            return
        late = 12 if asked < centre.late_until else 1
        jobs = centre.jobs(asked)
        self._send(self.dice.uniform(0, late), lambda: self.pool.listed(centre.name, asked, jobs))

    def _submit(self, centre, lease):
        def arrive():
            if self.now < centre.down_until:
                answer(10, lambda: self.pool.unanswered(lease.lease, self.now))
            elif self.now < centre.refuses_until[lease.queue]:
                answer(1, lambda: self.pool.refused(lease.lease, "no such account", self.now))
            else:
                job_id = centre.submit(lease, self.now)
                if self.now < centre.deaf_until:
                    answer(10, lambda: self.pool.unanswered(lease.lease, self.now))
                else:
                    answer(self.dice.uniform(0, 2), lambda: self.pool.submitted(lease.lease, job_id, self.now))

        pool = self.pool

        def answer(after, tell):
            if self.pool is pool:
                self._send(after, tell)

        self._send(self.dice.uniform(0, 2), arrive, survives=self.dice.random() < 0.7)

    def _cancel(self, centre, job_id):
        task = centre.tasks.get(job_id)
        if task is not None and not task.is_over and self.now >= centre.down_until:
            self._send(0.5, lambda: None if task.is_over else centre.cancel(task, self.now), survives=True)

    def _beat(self, pilot):
        if pilot.state is Pilot.STARTING and self.now >= pilot.serves_from:
            pilot.state = Pilot.SERVING
        if self.now >= pilot.gone_at:
            pilot.state = Pilot.ENDED
        if self.now - pilot.answered > 120:
            pilot.drain(self.now)
        if self.pool is None or self.now < pilot.cut_until:
            return
        newest = self.newest[pilot.lease] = max(self.newest.get(pilot.lease, 0), pilot.began)
        if pilot.began < newest:
            do = Do.END
        else:
            do, _ = self.pool.answer(pilot.lease) or (Do.END, "")
            self.pool.heard(heartbeat(pilot.lease, pilot.state, at=self.now, began=pilot.began, pid=pilot.pid))
        pilot.heard_at = pilot.answered = self.now
        if do is not Do.GO_ON:
            pilot.drain(self.now)

    def _see_that_it_is_sound(self):
        wanted = min(self.wanted, self.beamline.max_nodes)
        leases = {lease.lease: lease for lease in self.leases.open_leases()}
        staying = {name: lease for name, lease in leases.items() if lease.stage not in LEAVING}
        counted = [lease for lease in staying.values() if lease.replaces not in staying]
        if self.now - self.begun <= LOST_AFTER:
            wanted = max(wanted, len(counted))  # as long as it has not heard of all it lets nobody go
        assert len(counted) <= wanted, self.story()
        successors = Counter(lease.replaces for lease in staying.values() if lease.replaces in staying)
        assert not successors or max(successors.values()) <= 2, self.story()
        names = Counter((task.lease) for task in self.tasks)
        assert not names or max(names.values()) == 1, self.story()
        living = {pilot.lease for pilot in self.pilots if pilot.lease in staying}
        assert len(living) <= wanted + sum(successors.values()), self.story()
        for name, each in self.sites.items():
            recent = sum(at > self.now - 60 and where == name for where, at in self.submits)
            assert recent <= each.submits_per_minute, self.story()
            for rung in each.queues:
                there = [t for t in self.centres[name].tasks.values() if t.queue == rung.name and not t.is_over]
                assert sum(t.lease in leases for t in there) <= rung.max_jobs, self.story()
        for task in self.waiting_or_running:
            # What its pilot says outranks all else.
            pilot = task.pilots[-1] if task.pilots and task.restarts == 0 else None
            is_heard = pilot is not None and pilot.state is Pilot.SERVING and self.now - pilot.heard_at <= 10
            assert not is_heard or task.lease in leases, self.story()
