"""What a lease is, by the record, the scheduler's listings and the heartbeats. Pure.

A heartbeat is stronger than anything a scheduler says, and what a scheduler does not say is next to nothing: jobs are
not listed yet, accounting lags, controllers restart. A lease is over by positive evidence, or by absence from several
listings over a long time without a heartbeat.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from hpc_bridge import heartbeat
from hpc_bridge.config import Site
from hpc_bridge.heartbeat import Heard
from hpc_bridge.job import Job, JobState
from hpc_bridge.leases import Lease, Stage

ABSENT_AFTER = 30.0
"""A job is gone that was in no listing, where the first and the last were asked for so far apart (s)."""

MISSED_BEATS = 2
"""A pilot that missed so many cannot prove that its job, listed as waiting, does run."""


class State(StrEnum):
    """What a lease is."""

    SUBMITTING = "submitting"
    """Whether there is a job is not known."""
    QUEUED = "queued"
    STARTING = "starting"
    """It runs, and its pilot does not serve yet."""
    SERVING = "serving"
    DRAINING = "draining"
    """Its pilot lives, and is about to go: by itself, told by us, or without the scheduler's leave."""
    SILENT = "silent"
    """It should live and is not heard of."""
    OVER = "over"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What listings told of one lease. All times are when a listing was asked for."""

    job: Job | None = None
    """As it was told of last."""
    asked: float = -math.inf
    """When `job` was told of."""
    missed_since: float = math.inf
    """First listing without it since then, or since its pilot was heard of."""
    missed_until: float = -math.inf
    """Last one."""

    def told(self, job: Job, asked: float) -> Self:
        """Take a listing that has the job."""
        return replace(self.heard(), job=job, asked=asked)

    def missed(self, asked: float) -> Self:
        """Take a listing that does not have it."""
        return replace(self, missed_since=min(self.missed_since, asked), missed_until=asked)

    def heard(self) -> Self:
        """Forget that listings did not have it."""
        return replace(self, missed_since=math.inf, missed_until=-math.inf)

    @property
    def is_absent(self) -> bool:
        """Whether it was missed for long, by two listings at least."""
        return self.missed_until - self.missed_since >= ABSENT_AFTER


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a lease is, and by what."""

    lease: Lease
    state: State
    why: str = ""
    """It is so, in words for people."""
    job: Job | None = None
    heard: Heard | None = None
    is_requeued: bool = False
    """The scheduler wants to start it once more, which we do not."""

    @property
    def is_leaving(self) -> bool:
        """Whether it can no more be counted on."""
        return self.lease.stage in (Stage.DRAINING, Stage.CANCELLING) or self.state in (
            State.DRAINING,
            State.SILENT,
            State.OVER,
        )

    @property
    def ends(self) -> float:
        """When its walltime is over; infinite while it has not started."""
        if self.job is not None and self.job.state is JobState.ACTIVE and self.job.ends is not None:
            return self.job.ends
        return math.inf if self.lease.started is None else self.lease.started + self.lease.walltime

    @property
    def regions(self) -> int:
        """How many regions its pilot has."""
        return 0 if self.heard is None else len(self.heard.heartbeat.status.regions)

    @property
    def has_task(self) -> bool:
        """Whether its pilot runs a task."""
        told = None if self.heard is None else self.heard.heartbeat.task
        return told is not None and told.state is heartbeat.TaskState.RUNNING


def reconcile(
    lease: Lease, sighting: Sighting, heard: Heard | None, *, now: float, listening_since: float, site: Site
) -> View:
    """Return what a lease is.

    Parameters
    ----------
    heard
        Its newest heartbeat that came to this manager.
    listening_since
        Since when the manager is there to hear, without a break: what it could not hear is not held against a pilot.
    """
    job = sighting.job
    last_sign = listening_since if heard is None else max(heard.at, listening_since)
    is_requeued = _is_requeued(sighting, lease, last_sign=last_sign, site=site)

    def view(state: State, why: str = "") -> View:
        return View(lease=lease, state=state, why=why, job=job, heard=heard, is_requeued=is_requeued)

    if lease.stage is Stage.OVER:
        return view(State.OVER, lease.reason)
    if heard is not None and heard.heartbeat.state is heartbeat.State.ENDED:
        return view(State.OVER, f"the pilot ended with {heard.heartbeat.exit_code}")
    lost_after = site.heartbeats.lost_after.total_seconds()
    starts_within = site.starts_within.total_seconds()
    gone = _gone(job, is_requeued=is_requeued)
    if heard is not None and now - last_sign <= lost_after:
        if gone is not None:
            return view(State.DRAINING, gone)
        if lease.stage in (Stage.DRAINING, Stage.CANCELLING):
            return view(State.DRAINING, lease.reason)
        match heard.heartbeat.state:
            case heartbeat.State.SERVING:
                return view(State.SERVING)
            case heartbeat.State.DRAINING:
                return view(State.DRAINING, "the pilot was told to go, not by us")
            case _ if lease.started is not None and now - max(lease.started, listening_since) > starts_within:
                return view(State.SILENT, f"its pilot does not serve within {starts_within:g} s")
            case _:
                return view(State.STARTING)
    if gone is not None:
        return view(State.OVER, gone)
    if sighting.is_absent:
        words = "never accepted: " if lease.job_id is None else ""
        return view(State.OVER, f"{words}not listed for {sighting.missed_until - sighting.missed_since:.0f} s")
    if lease.job_id is None:
        return view(State.SUBMITTING)
    if heard is not None:
        return view(State.SILENT, f"not heard of for {now - heard.at:.0f} s")
    if lease.started is None:
        return view(State.QUEUED, "" if job is None else job.reason)
    patience = starts_within if lease.serving_since is None else lost_after
    if now - max(lease.started, listening_since) > patience:
        return view(State.SILENT, f"it runs and is not heard of for {patience:g} s")
    return view(State.STARTING)


def _is_requeued(sighting: Sighting, lease: Lease, *, last_sign: float, site: Site) -> bool:
    job = sighting.job
    if job is None or job.state.is_final:
        return False
    if job.restarts > 0:
        return True
    waits_again = job.state in (JobState.QUEUED, JobState.HELD) and lease.started is not None
    return waits_again and sighting.asked - last_sign > MISSED_BEATS * site.heartbeats.every.total_seconds()


def _gone(job: Job | None, *, is_requeued: bool) -> str | None:
    if job is None or not (is_requeued or job.state.is_final):
        return None
    words = f"{job.state}{f' ({job.reason})' if job.reason else ''}"
    return f"requeued: {words}" if is_requeued else words
