"""What a lease is taken for, case by case: Slurm's and PBS's odd words, and pilots that say otherwise."""

import math

import pytest

from hpc_bridge.heartbeat import State as Pilot
from hpc_bridge.job import Job, JobState
from hpc_bridge.leases import Lease, Stage
from hpc_bridge.reconcile import Sighting, State, reconcile
from tests.world import heartbeat, site

NOW = 10_000.0
"""Pilots are heard each second; one is lost after 10 s, and starts within 60 s."""


def lease(**changes):
    of = {
        "lease": "0123456789ab",
        "beamline": "8ID",
        "site": "near",
        "queue": "demand",
        "account": "",
        "nodes": 1,
        "walltime": 3600.0,
        "replaces": None,
        "stage": Stage.SUBMITTED,
        "reason": "",
        "job_id": "17",
        "node": "",
        "created": NOW - 500,
        "submitted": NOW - 500,
        "started": None,
        "serving_since": None,
        "leaving_since": None,
        "ended": None,
    }
    return Lease(**of | changes)


def job(state=JobState.ACTIVE, **changes):
    return Job(id="17", name="xb-8ID-0123456789ab.1", state=state, **changes)


def told(state, ago=1.0, **changes):
    return Sighting().told(job(state, **changes), NOW - ago)


def missed(*agos, of=None):
    sighting = of or Sighting()
    for ago in agos:
        sighting = sighting.missed(NOW - ago)
    return sighting


def beat(state=Pilot.SERVING, ago=1.0, **changes):
    return heartbeat("0123456789ab", state, at=NOW - ago, **changes)


def seen(lease, sighting=None, heard=None, *, listening_since=0.0):
    return reconcile(lease, sighting or Sighting(), heard, now=NOW, listening_since=listening_since, site=site("near"))


NO_ID = {"stage": Stage.SUBMITTING, "job_id": None, "submitted": None}
RUNS = {"started": NOW - 30}
SERVED = {"started": NOW - 300, "serving_since": NOW - 290}

CASES = {
    "written down, not submitted yet": (lease(**NO_ID), None, None, State.SUBMITTING),
    "submit timed out, not listed, it is too early to tell": (
        lease(**NO_ID), missed(25, 15, 5), None, State.SUBMITTING),
    "submit timed out, one old listing and none since": (lease(**NO_ID), missed(300), None, State.SUBMITTING),
    "submit timed out, not listed for long": (lease(**NO_ID), missed(40, 20, 5), None, State.OVER),
    "submit timed out, its pilot is there all the same": (
        lease(**NO_ID), missed(40, 20, 5), beat(), State.SERVING),
    "submitted, not listed yet": (lease(), missed(2, 1), None, State.QUEUED),
    "submitted, nothing was listed at all": (lease(), None, None, State.QUEUED),
    "it waits": (lease(), told(JobState.QUEUED, reason="Resources"), None, State.QUEUED),
    "it is held": (lease(), told(JobState.HELD), None, State.QUEUED),
    "it waits and was not in a listing since": (lease(), missed(1, of=told(JobState.QUEUED)), None, State.QUEUED),
    "it runs, its pilot was not heard of yet": (lease(**RUNS), told(JobState.ACTIVE), None, State.STARTING),
    "it runs, its pilot compiles": (lease(**RUNS), told(JobState.ACTIVE), beat(Pilot.STARTING), State.STARTING),
    "it runs for long and was never heard of": (
        lease(started=NOW - 61), told(JobState.ACTIVE), None, State.SILENT),
    "it was heard of and does not get ready": (
        lease(started=NOW - 61), told(JobState.ACTIVE), beat(Pilot.STARTING), State.SILENT),
    "it serves": (lease(**SERVED), told(JobState.ACTIVE), beat(), State.SERVING),
    "it serves, and is listed as waiting": (
        lease(**SERVED), told(JobState.QUEUED, ago=0.5), beat(), State.SERVING),
    "it serves, and is not listed for long": (lease(**SERVED), missed(300, 200, 1), beat(), State.SERVING),
    "it serves, and no scheduler answers": (lease(**SERVED), told(JobState.ACTIVE, ago=900), beat(), State.SERVING),
    "it was heard of almost too long ago": (
        lease(**SERVED), told(JobState.ACTIVE), beat(ago=9.9), State.SERVING),
    "it was heard of too long ago; Slurm says for 27 s more that it runs": (
        lease(**SERVED), told(JobState.ACTIVE), beat(ago=10.1), State.SILENT),
    "silent, and no scheduler answers": (
        lease(**SERVED), told(JobState.ACTIVE, ago=900), beat(ago=900), State.SILENT),
    "silent, and not in the last listings": (lease(**SERVED), missed(25, 1), beat(ago=40), State.SILENT),
    "silent, and not listed for long": (lease(**SERVED), missed(35, 1), beat(ago=40), State.OVER),
    "silent, and the node failed": (
        lease(**SERVED), told(JobState.FAILED, reason="NODE_FAIL"), beat(ago=28), State.OVER),
    "it says that it goes": (lease(**SERVED), told(JobState.ACTIVE), beat(Pilot.DRAINING), State.DRAINING),
    "it said that it ended; Slurm lists it as running": (
        lease(**SERVED), told(JobState.ACTIVE), beat(Pilot.ENDED, exit_code=85), State.OVER),
    "it said that it ended, long ago": (
        lease(**SERVED), None, beat(Pilot.ENDED, ago=900, exit_code=0), State.OVER),
    "told to drain, it still serves": (
        lease(**SERVED, stage=Stage.DRAINING, leaving_since=NOW - 1), told(JobState.ACTIVE), beat(), State.DRAINING),
    "told to drain, and silent since": (
        lease(**SERVED, stage=Stage.DRAINING), told(JobState.ACTIVE), beat(ago=11), State.SILENT),
    "cancelled, and still waiting": (lease(stage=Stage.CANCELLING), told(JobState.QUEUED), None, State.QUEUED),
    "cancelled, and gone": (lease(stage=Stage.CANCELLING), told(JobState.CANCELED), None, State.OVER),
    "ended without a pilot: the command is not there": (
        lease(**RUNS), told(JobState.FAILED, exit_code=127), None, State.OVER),
    "preempted for good a moment ago": (
        lease(**SERVED), told(JobState.FAILED, ago=0.2, reason="PREEMPTED"), beat(), State.DRAINING),
    "preempted for good": (
        lease(**SERVED), told(JobState.FAILED, reason="PREEMPTED"), beat(ago=11), State.OVER),
    "requeued by Slurm a moment ago": (
        lease(**SERVED), told(JobState.QUEUED, ago=0.2, restarts=1), beat(), State.DRAINING),
    "requeued by Slurm, while its pilot lives on a node that Slurm has lost": (
        lease(**SERVED), told(JobState.QUEUED, ago=0.9, restarts=1), beat(ago=0.1), State.DRAINING),
    "requeued by Slurm": (lease(**SERVED), told(JobState.QUEUED, restarts=1), beat(ago=11), State.OVER),
    "requeued by Slurm and started once more": (
        lease(**SERVED), told(JobState.ACTIVE, restarts=1), beat(Pilot.STARTING), State.DRAINING),
    "requeued before it was ever heard of": (lease(**RUNS), told(JobState.QUEUED, restarts=1), None, State.OVER),
    "requeued by PBS, which does not count it; two heartbeats are missing": (
        lease(**SERVED), told(JobState.QUEUED, ago=0.1), beat(ago=2.5), State.DRAINING),
    "requeued by PBS": (lease(**SERVED), told(JobState.QUEUED, ago=0.1), beat(ago=11), State.OVER),
    "requeued by PBS before it was heard of": (lease(**RUNS), told(JobState.QUEUED), None, State.OVER),
    "over on record": (
        lease(**SERVED, stage=Stage.OVER, ended=NOW - 9), told(JobState.ACTIVE), beat(), State.OVER),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "_"))
def test_a_lease_is_taken_for_what_it_is(case):
    *of, state = CASES[case]
    assert seen(*of).state is state


AFTER_A_RESTART = {
    "it served, and had no time to come back": (lease(**SERVED), told(JobState.ACTIVE), 9.0, State.STARTING),
    "it served, and did not come back": (lease(**SERVED), told(JobState.ACTIVE), 11.0, State.SILENT),
    "it served, no scheduler answers, and it did not come back": (lease(**SERVED), None, 11.0, State.SILENT),
    "it never served, and has its time again": (lease(started=NOW - 900), told(JobState.ACTIVE), 59.0, State.STARTING),
    "it never served, and does not": (lease(started=NOW - 900), told(JobState.ACTIVE), 61.0, State.SILENT),
    "it is listed as waiting at the first moment": (lease(**SERVED), told(JobState.QUEUED), 2.0, State.STARTING),
    "it was requeued meanwhile": (lease(**SERVED), told(JobState.QUEUED, restarts=1), 2.0, State.OVER),
    "it ended meanwhile": (lease(**SERVED), told(JobState.COMPLETED), 2.0, State.OVER),
}


@pytest.mark.parametrize("case", AFTER_A_RESTART, ids=lambda case: case.replace(" ", "_"))
def test_a_manager_that_starts_again_holds_its_own_absence_against_nobody(case):
    of, sighting, ago, state = AFTER_A_RESTART[case]
    assert seen(of, sighting, listening_since=NOW - ago).state is state


def test_a_pilot_that_was_heard_before_the_manager_was_away_has_time_to_come_back():
    assert seen(lease(**SERVED), None, beat(ago=300), listening_since=NOW - 9).state is State.SERVING
    assert seen(lease(**SERVED), None, beat(ago=300), listening_since=NOW - 11).state is State.SILENT


@pytest.mark.parametrize(
    ("of", "sighting", "heard", "is_leaving"),
    [
        (lease(), told(JobState.QUEUED), None, False),
        (lease(stage=Stage.CANCELLING), told(JobState.QUEUED), None, True),
        (lease(**RUNS), told(JobState.ACTIVE), None, False),
        (lease(**SERVED), told(JobState.ACTIVE), beat(), False),
        (lease(**SERVED), told(JobState.ACTIVE), beat(Pilot.DRAINING), True),
        (lease(**SERVED), told(JobState.ACTIVE), beat(ago=20), True),
        (lease(**SERVED, stage=Stage.DRAINING), told(JobState.ACTIVE), beat(), True),
    ],
)
def test_what_drains_is_silent_or_cancelled_leaves(of, sighting, heard, is_leaving):
    assert seen(of, sighting, heard).is_leaving is is_leaving


def test_the_end_of_a_walltime_is_as_the_scheduler_says_else_as_it_was_asked_for():
    assert seen(lease(), told(JobState.QUEUED, ends=NOW + 9)).ends == math.inf
    assert seen(lease(**RUNS), told(JobState.ACTIVE, ends=NOW + 9)).ends == NOW + 9
    assert seen(lease(**RUNS), told(JobState.ACTIVE)).ends == NOW - 30 + 3600


def test_a_heartbeat_or_a_listing_with_it_ends_an_absence():
    absent = missed(90, 60)
    assert absent.is_absent
    assert not absent.heard().is_absent
    assert not absent.heard().missed(NOW).missed(NOW).is_absent
    assert not absent.told(job(), NOW).is_absent


def test_one_listing_is_not_enough_to_be_absent_however_late():
    assert not missed(900).is_absent


def test_why_it_is_over_is_said_in_words():
    assert seen(lease(**NO_ID), missed(40, 1)).why == "never accepted: not listed for 39 s"
    assert seen(lease(**SERVED), told(JobState.FAILED, reason="NODE_FAIL")).why == "failed (NODE_FAIL)"
    assert seen(lease(**SERVED), None, beat(Pilot.ENDED, exit_code=85)).why == "the pilot ended with 85"
