"""What is done so that as many pilots serve as are wanted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_bridge.decide import Cancel, Drain, Rung, Submit, decide
from hpc_bridge.heartbeat import State as Pilot
from hpc_bridge.job import Job, JobState
from hpc_bridge.leases import Lease, Pause, Stage
from hpc_bridge.reconcile import State, View
from tests.world import heartbeat, queue, seconds, site

NOW = 10_000.0
"""Walltimes are an hour; pilots are relieved 60 s before the end, and drained 15 s before it at the latest."""

DEMAND = queue("demand", walltime=seconds(3600), start_within=seconds(30))
BATCH = queue("batch", walltime=seconds(3600))
NEAR, FAR = site("near", (DEMAND, BATCH)), site("far", (BATCH,))


def rung(site, queue, *, is_open=True, room=10):
    return Rung(site=site, queue=queue, is_open=is_open, room=room)


NEAR_DEMAND, NEAR_BATCH, FAR_BATCH = rung(NEAR, DEMAND), rung(NEAR, BATCH), rung(FAR, BATCH)


def view(lease, state, *, at="near/demand", ago=10.0, regions=1, ends_in=None, **changes):
    """A lease that was submitted `ago` seconds ago."""
    where, queue = at.split("/")
    job = {name: changes.pop(name) for name in ("reason", "held") if name in changes}
    is_up = state in (State.STARTING, State.SERVING, State.DRAINING, State.SILENT)
    of = Lease(
        **{
            "lease": lease,
            "beamline": "8ID",
            "site": where,
            "queue": queue,
            "account": "",
            "nodes": 1,
            "walltime": 3600.0,
            "replaces": None,
            "stage": Stage.SUBMITTING if state is State.SUBMITTING else Stage.SUBMITTED,
            "reason": "",
            "job_id": lease,
            "node": "",
            "created": NOW - ago,
            "submitted": None if state is State.SUBMITTING else NOW - ago,
            "started": NOW + (3000 if ends_in is None else ends_in) - 3600 if is_up else None,
            "serving_since": None,
            "leaving_since": None,
            "ended": None,
        }
        | {name: value for name, value in changes.items() if name != "is_requeued"}
    )
    return View(
        lease=of,
        state=state,
        why="so",
        job=Job(id=lease, name=of.name, state=JobState.HELD if job.get("held") else JobState.QUEUED,
                reason=job.get("reason", "")) if state is State.QUEUED else None,
        heard=heartbeat(lease, Pilot.SERVING, at=NOW, n_regions=regions) if state is State.SERVING else None,
        is_requeued=changes.get("is_requeued", False),
    )  # fmt: skip


def actions(wanted, *views, ladder=(NEAR_DEMAND, NEAR_BATCH, FAR_BATCH), submits_left=100, unreachable=None):
    left = {each.site.site: submits_left for each in ladder}
    return decide(
        now=NOW,
        wanted=wanted,
        views=views,
        ladder=ladder,
        submits_left=left,
        unreachable_since=unreachable or {},
    )


def serving(name, **changes):
    return view(name, State.SERVING, **changes)


def queued(name, **changes):
    return view(name, State.QUEUED, **changes)


def leases(actions):
    return [action.lease for action in actions]


DEMANDED = Submit("near", "demand")


def test_what_is_missing_is_submitted_at_once():
    assert actions(3) == [DEMANDED] * 3


@pytest.mark.parametrize("state", [State.SUBMITTING, State.QUEUED, State.STARTING, State.SERVING])
def test_what_is_on_its_way_counts_like_what_serves(state):
    assert actions(1, view("a", state)) == []


@pytest.mark.parametrize("state", [State.DRAINING, State.SILENT])
def test_what_goes_does_not_count(state):
    assert DEMANDED in actions(1, view("a", state))


def test_a_silent_pilot_is_cancelled_and_replaced_in_the_same_moment():
    assert actions(1, view("a", State.SILENT)) == [Cancel("a", "so"), DEMANDED]


def test_a_requeued_job_is_cancelled_also_while_its_pilot_lives():
    assert actions(1, view("a", State.DRAINING, is_requeued=True)) == [Cancel("a", "so"), DEMANDED]


def test_a_pilot_that_goes_by_itself_is_replaced_and_noted_as_draining():
    assert actions(1, view("a", State.DRAINING)) == [Drain("a", "so"), DEMANDED]


def test_a_pilot_that_does_not_end_its_drain_is_cancelled():
    def drains(since):
        return view("a", State.DRAINING, stage=Stage.DRAINING, leaving_since=NOW - since)

    assert actions(0, drains(15 + 59)) == []
    assert leases(actions(0, drains(15 + 61))) == ["a"]
    assert actions(0, view("a", State.DRAINING, stage=Stage.CANCELLING, leaving_since=NOW - 61)) == []


def test_no_more_is_submitted_than_the_rate_allows():
    assert actions(5, submits_left=2) == [DEMANDED] * 2
    assert actions(5, submits_left=0) == []
    assert actions(5, submits_left=-3) == []


def test_a_rate_that_is_used_up_is_waited_for_and_not_evaded():
    left = {"near": 0, "far": 5}
    ladder = (NEAR_DEMAND, FAR_BATCH)
    assert decide(now=NOW, wanted=1, views=[], ladder=ladder, submits_left=left, unreachable_since={}) == []


def test_the_first_rung_that_is_open_and_has_room_is_taken():
    full, closed = rung(NEAR, DEMAND, room=2), rung(NEAR, BATCH, is_open=False)
    assert actions(3, ladder=(full, closed, FAR_BATCH)) == [DEMANDED, DEMANDED, Submit("far", "batch")]


def test_without_an_open_rung_nothing_is_submitted():
    assert actions(3, ladder=(rung(NEAR, DEMAND, is_open=False), rung(FAR, BATCH, room=-1))) == []


PAUSED = Pause(site="near", queue="demand", until=NOW + 60, why="not started within 30 s")


def test_a_job_that_waits_too_long_is_taken_back_and_the_next_rung_is_tried():
    assert actions(1, queued("a", ago=31)) == [
        Cancel("a", "not started within 30 s"),
        PAUSED,
        Submit("near", "batch"),
    ]
    assert actions(1, queued("a", ago=29)) == []


def test_all_jobs_that_wait_too_long_are_taken_back_at_once_as_far_as_there_is_room():
    waiting = [queued(name, ago=31) for name in "abc"]
    room_for_all = actions(3, *waiting, ladder=(NEAR_DEMAND, NEAR_BATCH))
    assert room_for_all.count(Submit("near", "batch")) == 3
    room_for_two = actions(3, *waiting, ladder=(NEAR_DEMAND, rung(NEAR, BATCH, room=2)))
    assert [type(action) for action in room_for_two].count(Cancel) == 2
    assert room_for_two.count(Submit("near", "batch")) == 2
    assert room_for_two.count(PAUSED) == 1


def test_a_job_is_not_taken_back_for_a_rung_that_is_passed_by_in_the_same_moment():
    hasty = rung(NEAR, queue("batch", start_within=seconds(30)))
    waiting = [queued("a", at="near/batch", ago=32), queued("b", ago=31)]
    ladder = (NEAR_DEMAND, hasty, rung(FAR, BATCH, room=1))
    assert leases(each for each in actions(2, *waiting, ladder=ladder) if isinstance(each, Cancel)) == ["a"]


@pytest.mark.parametrize("rest", [(), (rung(NEAR, BATCH, is_open=False),), (rung(NEAR, BATCH, room=0),)])
def test_on_the_last_rung_that_can_be_used_a_job_waits_for_ever(rest):
    assert actions(1, queued("a", ago=9999), ladder=(NEAR_DEMAND, *rest)) == []


@pytest.mark.parametrize("how", [{"reason": "AssocGrpCPUMinutesLimit"}, {"reason": "QOSGrpNodeLimit"}, {"held": True}])
def test_a_job_that_is_held_or_waits_for_a_limit_is_not_waited_for(how):
    ladder = (NEAR_BATCH, FAR_BATCH)
    cancel, pause, submit = actions(1, queued("a", at="near/batch", **how), ladder=ladder)
    assert (cancel.lease, pause.queue, submit) == ("a", "batch", Submit("far", "batch"))
    assert actions(1, queued("a", at="near/batch", **how), ladder=(NEAR_BATCH,)) == []


def test_when_a_better_rung_opens_again_pilots_that_are_up_stay():
    for state in (State.STARTING, State.SERVING):
        assert actions(1, view("a", state, at="far/batch", ago=9999)) == []


def test_a_job_that_waits_on_a_worse_rung_gets_company_on_a_better_one():
    assert actions(1, queued("a", at="far/batch", ago=59)) == []
    assert actions(1, queued("a", at="far/batch", ago=61)) == [Submit("near", "demand", replaces="a")]
    assert actions(1, queued("a", at="near/demand", ago=61), ladder=(NEAR_DEMAND,)) == []
    assert actions(1, queued("a", at="far/batch", ago=61), queued("b", replaces="a")) == []


def test_of_a_waiting_job_and_its_company_the_one_that_serves_first_stays():
    waits = queued("a", at="far/batch", ago=99)
    assert leases(actions(1, waits, serving("b", replaces="a"))) == ["a"]
    served = serving("a", at="far/batch", ago=99)
    assert leases(actions(1, served, queued("b", replaces="a"))) == ["b"]
    assert actions(1, waits, view("b", State.STARTING, replaces="a")) == []


GONE = rung(NEAR, DEMAND, is_open=False)


def test_what_was_asked_of_a_site_that_does_not_answer_is_asked_of_the_next_at_once():
    ladder = (GONE, FAR_BATCH)
    asked = view("a", State.SUBMITTING)
    assert actions(1, asked, ladder=ladder, unreachable={"near": NOW}) == [Submit("far", "batch", replaces="a")]
    assert actions(1, asked, ladder=(GONE,), unreachable={"near": NOW}) == []


def test_what_waits_at_a_site_that_does_not_answer_gets_company_elsewhere_after_a_while():
    ladder = (GONE, FAR_BATCH)
    waits = queued("a", ago=9999)
    assert actions(1, waits, ladder=ladder, unreachable={"near": NOW - 59}) == []
    assert actions(1, waits, ladder=ladder, unreachable={"near": NOW - 61}) == [Submit("far", "batch", replaces="a")]


def test_pilots_that_serve_at_a_site_that_does_not_answer_stay():
    ladder = (GONE, FAR_BATCH)
    assert actions(1, serving("a"), ladder=ladder, unreachable={"near": NOW - 9999}) == []


def test_a_pilot_gets_a_successor_before_its_walltime_ends_and_only_one():
    assert actions(1, serving("a", ends_in=61)) == []
    assert actions(1, serving("a", ends_in=59)) == [Submit("near", "demand", replaces="a")]
    assert actions(1, serving("a", ends_in=59), queued("b", replaces="a")) == []


def test_a_pilot_goes_once_its_successor_serves_and_not_before():
    old = serving("a", ends_in=40)
    assert actions(1, old, view("b", State.STARTING, replaces="a")) == []
    assert actions(1, old, serving("b", replaces="a")) == [Drain("a", "b serves in its place")]


def test_a_pilot_goes_before_its_walltime_ends_also_without_a_successor():
    assert actions(1, serving("a", ends_in=14), queued("b", replaces="a")) == [Drain("a", "its walltime ends")]
    assert actions(1, serving("a", ends_in=14)) == [Drain("a", "its walltime ends"), DEMANDED]


def test_a_successor_that_is_lost_is_replaced():
    old = serving("a", ends_in=40)
    lost = view("b", State.SILENT, replaces="a")
    assert actions(1, old, lost) == [Cancel("b", "so"), Submit("near", "demand", replaces="a")]


def test_a_pilot_that_dies_during_its_hand_over_is_replaced_by_its_successor_alone():
    assert actions(1, view("a", State.SILENT), queued("b", replaces="a")) == [Cancel("a", "so")]
    assert actions(1, queued("b", replaces="a")) == []


def test_a_successor_that_waits_gets_company_on_a_better_rung():
    old, waits = serving("a", ends_in=40), queued("b", at="far/batch", ago=61, replaces="a")
    assert actions(1, old, waits) == [Submit("near", "demand", replaces="a")]
    assert actions(1, old, waits, queued("c", replaces="a")) == []


def test_when_one_of_two_successors_serves_both_others_go():
    old, waits = serving("a", ends_in=40), queued("b", at="far/batch", ago=99, replaces="a")
    assert leases(actions(1, old, waits, serving("c", replaces="a"))) == ["a", "b"]


def test_who_is_no_more_wanted_goes_first_those_that_do_not_serve_the_newest_first():
    some = [serving("s"), view("u", State.STARTING), queued("old", ago=20), queued("new", ago=10)]
    assert leases(actions(3, *some)) == ["new"]
    assert leases(actions(2, *some)) == ["new", "old"]
    assert actions(1, *some) == [Cancel(name, "no more wanted") for name in ("new", "old", "u")]


def test_of_those_that_serve_the_one_with_fewest_regions_goes_then_the_one_that_ends_first():
    some = [
        serving("many", regions=5, ends_in=100),
        serving("soon", regions=2, ends_in=200),
        serving("late", regions=2, ends_in=900),
    ]
    assert actions(2, *some) == [Drain("soon", "no more wanted")]
    assert leases(actions(1, *some)) == ["soon", "late"]


def test_with_a_pilot_that_is_no_more_wanted_its_successor_goes():
    pair = [serving("a", ends_in=40), queued("b", replaces="a")]
    assert leases(actions(0, *pair)) == ["a", "b"]
    assert leases(actions(1, *pair, serving("c", regions=9))) == ["a", "b"]


def test_when_none_is_wanted_all_go():
    some = [serving("a"), queued("b"), view("c", State.SUBMITTING), view("d", State.STARTING)]
    assert sorted(leases(actions(0, *some))) == ["a", "b", "c", "d"]


@st.composite
def situations(draw):
    views = []
    for i in range(draw(st.integers(0, 8))):
        state = draw(st.sampled_from([state for state in State if state is not State.OVER]))
        stages = {State.SUBMITTING: [Stage.SUBMITTING, Stage.CANCELLING], State.DRAINING: [Stage.SUBMITTED]}
        stage = draw(st.sampled_from(stages.get(state, [Stage.SUBMITTED, Stage.DRAINING, Stage.CANCELLING])))
        views.append(
            view(
                f"{i}",
                state,
                at=draw(st.sampled_from(["near/demand", "near/batch", "far/batch"])),
                ago=draw(st.sampled_from([1.0, 40.0, 100.0])),
                ends_in=draw(st.sampled_from([5.0, 40.0, 1000.0])),
                regions=draw(st.integers(0, 3)),
                replaces=draw(st.none() | st.sampled_from([f"{j}" for j in range(i)])) if i else None,
                stage=stage,
                leaving_since=NOW - 1 if stage in (Stage.DRAINING, Stage.CANCELLING) else None,
            )
        )
    ladder = [
        rung(site, queue, is_open=draw(st.booleans()), room=draw(st.integers(0, 4)))
        for site, queue in ((NEAR, DEMAND), (NEAR, BATCH), (FAR, BATCH))
    ]
    return draw(st.integers(0, 5)), views, ladder, draw(st.integers(0, 5))


def after(views, done):
    """The same moment, once what was done is written down."""
    stages = {action.lease: Stage.DRAINING if isinstance(action, Drain) else Stage.CANCELLING
              for action in done if isinstance(action, Drain | Cancel)}  # fmt: skip
    changed = []
    for each in views:
        stage = stages.get(each.lease.lease, each.lease.stage)
        is_leaving = stage in (Stage.DRAINING, Stage.CANCELLING)
        state = State.DRAINING if is_leaving and each.state is State.SERVING else each.state
        since = (each.lease.leaving_since or NOW) if is_leaving else None
        at = f"{each.lease.site}/{each.lease.queue}"
        new = view(
            each.lease.lease, state, at=at, ago=NOW - each.lease.created, regions=each.regions,
            ends_in=each.ends - NOW if each.lease.started else None, replaces=each.lease.replaces, stage=stage,
            leaving_since=since,
        )  # fmt: skip
        changed.append(new)
    begun = [action for action in done if isinstance(action, Submit)]
    return changed + [
        view(f"new{i}", State.SUBMITTING, at=f"{each.site}/{each.queue}", ago=0.0, replaces=each.replaces)
        for i, each in enumerate(begun)
    ]


@given(situations())
def test_what_was_done_is_not_done_again(situation):
    wanted, views, ladder, left = situation
    done = actions(wanted, *views, ladder=ladder, submits_left=left)
    begun = [(action.site, action.queue) for action in done if isinstance(action, Submit)]
    paused = [(action.site, action.queue) for action in done if isinstance(action, Pause)]
    ladder = [
        rung(
            each.site,
            each.queue,
            is_open=each.is_open and (each.site.site, each.queue.name) not in paused,
            room=each.room - begun.count((each.site.site, each.queue.name)),
        )
        for each in ladder
    ]
    assert actions(wanted, *after(views, done), ladder=ladder, submits_left=left - len(begun)) == []


@given(situations())
def test_those_that_stay_are_never_more_than_wanted_but_for_successors(situation):
    wanted, views, ladder, left = situation
    done = actions(wanted, *views, ladder=ladder, submits_left=left)
    staying = {each.lease.lease: each.lease for each in after(views, done) if not each.is_leaving}
    assert sum(lease.replaces not in staying for lease in staying.values()) <= wanted


@given(situations())
def test_no_pilot_is_let_go_for_a_successor_that_does_not_serve(situation):
    wanted, views, ladder, left = situation
    by_name = {each.lease.lease: each for each in views}
    for action in actions(wanted, *views, ladder=ladder, submits_left=left):
        if isinstance(action, Drain) and action.why.endswith("in its place"):
            assert by_name[action.why.split()[0]].state is State.SERVING


@given(situations())
def test_rungs_and_rates_are_kept_to(situation):
    wanted, views, ladder, left = situation
    begun = [each for each in actions(wanted, *views, ladder=ladder, submits_left=left) if isinstance(each, Submit)]
    for each in ladder:
        n = sum((action.site, action.queue) == (each.site.site, each.queue.name) for action in begun)
        assert n <= (each.room if each.is_open else 0)
    for name in ("near", "far"):
        assert sum(action.site == name for action in begun) <= left
