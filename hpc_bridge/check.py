"""Whether a site can be used, found out step by step before there is beam."""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpc_bridge.assembly import job, keys_of, scheduler_of, way_home
from hpc_bridge.config import Beamline, Queue, Site
from hpc_bridge.dialing import Addresses, file_of
from hpc_bridge.errors import BridgeError
from hpc_bridge.hearing import Hearing
from hpc_bridge.heartbeat import Do, Finding, Heard, State
from hpc_bridge.job import JobSpec, JobState
from hpc_bridge.leases import PREFIXES
from hpc_bridge.scheduler import Scheduler

MOST_OFFSET = 1.0
"""How far (s) a node's clock may be off: lags are by it."""

LOOK = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What was found out."""

    where: str
    name: str
    ok: bool
    detail: str
    seconds: float


def prove(
    site: Site,
    beamline: Beamline,
    *,
    queues: Sequence[str],
    command: Sequence[str],
    reach: Sequence[str],
    writable: Sequence[Path],
    within: float,
) -> Iterator[Step]:
    """Yield each step once it is known. Of every queue that is named (none: of all) a trial job is run and cancelled.

    Parameters
    ----------
    command
        Has to end with 0 on a node.
    reach
        ``HOST:PORT`` that a node has to reach.
    writable
        Directories that a node has to write to.
    within
        Seconds that a trial may take, with its time in the queue.
    """
    began = time.monotonic()

    def step(name: str, error: BridgeError | None, detail: str = "") -> Step:
        seconds = time.monotonic() - began
        said = [str(each) for each in (error, detail) if each]
        return Step(where=site.site, name=name, ok=error is None, detail="; ".join(said), seconds=seconds)

    rungs = [queue for queue in site.queues if not queues or queue.name in queues]
    try:
        scheduler, keys = scheduler_of(site), keys_of(site)
    except BridgeError as error:
        yield step("configuration", error)
        return
    yield step("configuration", None, f"{len(site.credentials)} files of credentials, {'' if keys else 'no '}keys")
    try:
        jobs = scheduler.list(tuple(PREFIXES.values()))
    except BridgeError as error:
        yield step("the scheduler answers", error)
        return
    yield step("the scheduler answers", None, f"{len(jobs)} jobs of ours")
    try:
        ear = Hearing(site.heartbeats.bind, lambda _: (Do.GO_ON, ""), keys=keys)
    except BridgeError as error:
        yield step("heartbeats can come", error, "is a manager there? Take it down first")
        return
    addresses = None
    if site.heartbeats.dials == "manager":
        addresses = Addresses(site.directory)
        way = f"the manager dials pilots, which listen at {site.heartbeats.listen} and say so in {site.directory}"
    else:
        way = f"pilots dial {site.heartbeats.address}, the manager listens at {site.heartbeats.bind}"
    with ear:
        yield step("heartbeats can come", None, way)
        for rung in rungs:
            lease = secrets.token_hex(6)
            arguments = ["pilot", "--trial", *way_home(site, lease)]
            arguments += [word for address in reach for word in ("--reach", address)]
            arguments += [word for directory in writable for word in ("--writable", str(directory))]
            spec = job(f"xbcheck-{lease}", (*arguments, "--", *command), site, rung.name, beamline)
            try:
                yield from _trial(scheduler, _Listening(ear, addresses, lease), spec, rung, within)
            finally:
                if addresses is not None:
                    with suppress(OSError):
                        file_of(site.directory, lease).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Listening:
    """To one pilot."""

    ear: Hearing
    addresses: Addresses | None
    lease: str

    def hear(self) -> list[Heard]:
        """Return what it said since the last time, waiting a moment for it."""
        if self.addresses is not None:
            self.ear.dial(self.addresses.look(frozenset([self.lease])))
        return [heard for heard in self.ear.poll(LOOK) if heard.heartbeat.lease == self.lease]


def _trial(scheduler: Scheduler, pilot: _Listening, spec: JobSpec, rung: Queue, within: float) -> Iterator[Step]:
    began = time.monotonic()

    def step(name: str, *, ok: bool, detail: str, seconds: float | None = None) -> Step:
        passed = time.monotonic() - began if seconds is None else seconds
        return Step(where=rung.name, name=name, ok=ok, detail=detail, seconds=passed)

    try:
        job_id = scheduler.submit(spec)
    except BridgeError as error:
        yield step("takes a job", ok=False, detail=str(error))
        return
    yield step("takes a job", ok=True, detail=job_id)
    try:
        told: tuple[Finding, ...] = ()
        is_heard = False
        for heard in _heard(scheduler, pilot, job_id, began + within):
            if not isinstance(heard, Heard):
                yield step("its node is heard of", ok=False, detail=f"{heard}; its output is in {spec.directory}")
                return
            if not is_heard:
                is_heard = True
                yield step("its node is heard of", ok=True, detail=heard.heartbeat.node)
                is_near = abs(heard.offset) < MOST_OFFSET
                yield step("its clock", ok=is_near, detail=f"is {heard.offset:+.3f} s off", seconds=0.0)
            for found in heard.heartbeat.findings:
                if found not in told:
                    yield step(found.name, ok=found.ok, detail=found.detail, seconds=found.seconds)
            told = heard.heartbeat.findings
    finally:
        try:
            scheduler.cancel([job_id])
        except BridgeError as error:
            yield step("is cancelled", ok=False, detail=str(error))


def _heard(scheduler: Scheduler, pilot: _Listening, job_id: str, deadline: float) -> Iterator[Heard | str]:
    """Yield heartbeats until the trial has ended, or why there are none."""
    state, look = "nothing is known of its job", 0.0
    while time.monotonic() < deadline:
        for heard in pilot.hear():
            yield heard
            if heard.heartbeat.state is State.ENDED:
                return
        if time.monotonic() < look or pilot.lease in pilot.ear.heard:
            continue
        look = time.monotonic() + 2.0
        try:
            known = scheduler.status([job_id]).get(job_id)
        except BridgeError as error:
            state = str(error)
            continue
        if known is not None:
            state = f"its job is {known.state} {known.reason}".rstrip()
            if known.state.is_final and known.state is not JobState.COMPLETED:
                break
    yield f"not in time, or it ended before it spoke: {state}"
