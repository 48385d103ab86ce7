"""One beamline's leases: what is ordered, what is written down, and what a manager that starts again goes on from."""

from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_bridge.config import Account
from hpc_bridge.errors import ConfigError
from hpc_bridge.heartbeat import Do
from hpc_bridge.heartbeat import State as Pilot
from hpc_bridge.job import Job, JobState
from hpc_bridge.leases import Leases, Stage
from hpc_bridge.pool import CancelJob, Pool, SubmitJob
from hpc_bridge.reconcile import State
from tests.world import beamline, heartbeat, queue, seconds, site

NEAR = site("near", (queue("demand", max_jobs=3), queue("batch")))
FAR = site("far")
SITES = {"near": NEAR, "far": FAR}
NOW = 1000.0


@pytest.fixture
def leases(tmp_path):
    with Leases.open(tmp_path / "leases") as leases:
        yield leases


def open_pool(leases, now=NOW, **changes):
    pool = Pool(beamline(**{"sites": ("near", "far")} | changes), SITES, leases, now=now)
    pool.listed("near", now, [])
    pool.listed("far", now, [])
    return pool


@pytest.fixture
def pool(leases):
    return open_pool(leases)


def job(lease, job_id="17", state=JobState.ACTIVE, **changes):
    return Job(id=job_id, name=f"{lease.name}.1700000000", state=state, **changes)


def one(pool, wanted=1, now=NOW):
    [order] = pool.orders(now, wanted)
    assert isinstance(order, SubmitJob)
    return order.lease


def served(pool, leases, now=NOW):
    """A lease whose pilot serves."""
    lease = one(pool, now=now)
    pool.submitted(lease.lease, "17", now)
    pool.listed("near", now + 1, [job(lease)])
    pool.heard(heartbeat(lease.lease, at=now + 2, began=now + 1))
    return leases.get(lease.lease)


def states(pool, now):
    return [view.state for view in pool.views(now)]


def test_what_is_ordered_is_on_record_with_all_that_its_job_needs(leases):
    accounts = {"near": Account(account="xpcs::8id")}
    lease = one(open_pool(leases, accounts=accounts))
    assert leases.open_leases() == [lease]
    assert (lease.beamline, lease.site, lease.queue, lease.account) == ("8ID", "near", "demand", "xpcs::8id")
    assert (lease.walltime, lease.stage, lease.created) == (600.0, Stage.SUBMITTING, NOW)


def test_when_the_clock_is_set_back_nobody_is_lost_and_what_is_seen_from_then_on_counts(pool, leases):
    lease = served(pool, leases)
    assert pool.orders(NOW + 3, 1) == []
    then = NOW - 500
    assert pool.orders(then, 1) == []
    pool.listed("near", then + 1, [job(lease)])
    assert states(pool, then + 1) == [State.STARTING]
    pool.heard(heartbeat(lease.lease, at=then + 2, began=then - 60))
    assert states(pool, then + 2) == [State.SERVING]
    silent = then + 3 + NEAR.heartbeats.lost_after.total_seconds()
    assert states(pool, silent) == [State.SILENT]


def test_nothing_is_ordered_twice(pool):
    assert len(pool.orders(NOW, 3)) == 3
    assert pool.orders(NOW, 3) == pool.orders(NOW + 5, 3) == []


def test_no_more_is_ordered_than_the_most_nodes(leases):
    pool = open_pool(leases, max_nodes=2)
    assert len(pool.orders(NOW, 7)) == 2


def test_nothing_is_submitted_to_a_site_before_it_has_listed_its_jobs(leases):
    pool = Pool(beamline(), SITES, leases, now=NOW)
    assert pool.orders(NOW, 1) == []
    pool.listed("near", NOW, [])
    assert len(pool.orders(NOW, 1)) == 1


def test_a_lease_goes_from_submitting_to_serving(pool, leases):
    lease = one(pool)
    assert states(pool, NOW) == [State.SUBMITTING]
    pool.submitted(lease.lease, "17", NOW + 1)
    assert states(pool, NOW + 1) == [State.QUEUED]
    pool.listed("near", NOW + 2, [job(lease, started=NOW + 1.5, nodes=("n7",))])
    assert states(pool, NOW + 2) == [State.STARTING]
    pool.heard(heartbeat(lease.lease, Pilot.STARTING, at=NOW + 3))
    pool.heard(heartbeat(lease.lease, Pilot.SERVING, at=NOW + 4))
    assert states(pool, NOW + 4) == [State.SERVING]
    of = leases.get(lease.lease)
    assert (of.job_id, of.submitted, of.started, of.serving_since, of.node) == (
        "17", NOW + 1, NOW + 1.5, NOW + 4, "n7",
    )  # fmt: skip
    assert pool.orders(NOW + 5, 1) == []


def test_a_refused_job_is_over_and_its_rung_is_passed_by_for_a_while(pool, leases):
    lease = one(pool)
    pool.refused(lease.lease, "Invalid account", NOW + 1)
    assert leases.get(lease.lease).reason == "refused: Invalid account"
    [pause] = leases.pauses("8ID", NOW + 2)
    assert (pause.site, pause.queue, pause.why) == ("near", "demand", "Invalid account")
    assert one(pool, now=NOW + 2).queue == "batch"
    assert {order.lease.queue for order in pool.orders(NOW + 62, 2)} == {"demand"}


def test_a_site_that_does_not_answer_is_passed_by_until_it_does(pool):
    pool.unreachable("near", NOW + 1)
    assert one(pool, now=NOW + 1).site == "far"
    pool.listed("near", NOW + 2, [])
    [order] = pool.orders(NOW + 2, 2)
    assert order.lease.site == "near"


def test_what_a_site_did_not_answer_before_its_newest_listing_says_nothing(pool):
    pool.listed("near", NOW + 5, [])
    pool.unreachable("near", NOW + 1)
    assert one(pool, now=NOW + 6).site == "near"


def test_a_submission_without_an_answer_is_asked_of_the_next_site_and_taken_back_here_when_that_serves(pool, leases):
    lease = one(pool)
    pool.unanswered(lease.lease, NOW + 10)
    other = one(pool, now=NOW + 10)
    assert (other.site, other.replaces) == ("far", lease.lease)
    pool.submitted(other.lease, "3", NOW + 11)
    pool.listed("near", NOW + 12, [job(lease, state=JobState.QUEUED)])
    assert leases.get(lease.lease).job_id == "17"
    pool.heard(heartbeat(other.lease, at=NOW + 13))
    assert pool.orders(NOW + 14, 1) == [CancelJob("near", "17", f"{other.lease} serves in its place")]


def test_a_submission_that_takes_long_is_not_taken_for_one_that_failed(pool):
    lease = one(pool)
    for after in range(1, 100, 3):
        pool.listed("near", NOW + after, [])
        assert pool.orders(NOW + after, 1) == []
    pool.unanswered(lease.lease, NOW + 100)
    for after in range(101, 130, 3):
        pool.listed("near", NOW + after, [])
        assert pool.orders(NOW + after, 1) == []
    pool.listed("near", NOW + 132, [])
    assert one(pool, now=NOW + 132) != lease


def test_a_job_that_turns_up_after_its_lease_was_given_up_is_cancelled(pool):
    lease = one(pool)
    pool.unanswered(lease.lease, NOW + 10)
    for after in (11, 20, 42):
        pool.listed("near", NOW + after, [])
    one(pool, now=NOW + 42)
    pool.listed("near", NOW + 60, [job(lease, state=JobState.QUEUED)])
    [order] = pool.orders(NOW + 60, 1)
    assert (order.site, order.job_id) == ("near", "17")
    assert pool.answer(lease.lease)[0] is Do.END


def test_a_manager_killed_before_it_submitted_submits_again_once_that_is_sure(pool, leases):
    lease = one(pool)
    again = open_pool(leases, now=NOW + 5)
    assert states(again, NOW + 5) == [State.SUBMITTING]
    again.listed("near", NOW + 20, [])
    assert again.orders(NOW + 20, 1) == []
    again.listed("near", NOW + 36, [])
    assert one(again, now=NOW + 36).lease != lease.lease


def test_a_manager_killed_after_it_submitted_adopts_the_job(pool, leases):
    lease = one(pool)
    again = open_pool(leases, now=NOW + 5)
    again.listed("near", NOW + 6, [job(lease, "99", JobState.QUEUED, submitted=NOW + 1)])
    assert again.orders(NOW + 6, 1) == []
    assert (leases.get(lease.lease).job_id, leases.get(lease.lease).submitted) == ("99", NOW + 1)


def test_a_manager_that_starts_again_orders_nothing_while_pilots_come_back(pool, leases):
    lease = served(pool, leases)
    again = open_pool(leases, now=NOW + 100)
    again.listed("near", NOW + 100.5, [job(lease)])
    assert again.orders(NOW + 101, 1) == []
    again.heard(heartbeat(lease.lease, at=NOW + 102))
    assert again.orders(NOW + 105, 1) == []


def test_a_manager_that_starts_again_remembers_whom_it_told_to_go(pool, leases):
    lease = served(pool, leases)
    pool.orders(NOW + 5, 0)
    again = open_pool(leases, now=NOW + 6)
    assert again.answer(lease.lease) == (Do.DRAIN, "no more wanted")
    assert len(again.orders(NOW + 6, 1)) == 1


def test_a_silent_pilot_is_cancelled_and_replaced_at_once(pool, leases):
    lease = served(pool, leases)
    pool.listed("near", NOW + 9, [job(lease)])
    assert pool.orders(NOW + 9, 1) == pool.orders(NOW + 12, 1) == []
    submit, cancel = pool.orders(NOW + 12.5, 1)
    assert isinstance(submit, SubmitJob)
    assert cancel == CancelJob("near", "17", "not heard of for 10 s")
    assert pool.answer(lease.lease)[0] is Do.END


def test_a_preempted_pilot_is_replaced_before_its_heartbeats_are_missed(pool, leases):
    lease = served(pool, leases)
    pool.listed("near", NOW + 2.5, [job(lease, state=JobState.QUEUED, restarts=1)])
    submit, cancel = pool.orders(NOW + 2.6, 1)
    assert isinstance(submit, SubmitJob)
    assert cancel.job_id == "17"


@pytest.mark.parametrize("began", [0.0, 1e12])
def test_a_pilot_that_does_not_know_the_time_began_between_its_submission_and_now(pool, leases, began):
    lease = one(pool)
    pool.submitted(lease.lease, "17", NOW)
    pool.heard(heartbeat(lease.lease, at=NOW + 9, began=began))
    assert NOW <= leases.get(lease.lease).started <= NOW + 9


def test_a_pilot_is_told_what_it_is_to_do(pool, leases):
    lease = served(pool, leases)
    assert pool.answer(lease.lease) == (Do.GO_ON, "")
    assert pool.orders(NOW + 3, 0) == []
    assert pool.answer(lease.lease) == (Do.DRAIN, "no more wanted")
    pool.heard(heartbeat(lease.lease, Pilot.ENDED, at=NOW + 5, exit_code=0))
    pool.orders(NOW + 5, 0)
    assert pool.answer(lease.lease) == (Do.END, "no more wanted; the pilot ended with 0")
    assert leases.get(lease.lease).ended == NOW + 5


def test_a_pilot_that_nobody_knows_is_not_ours_to_answer(pool, leases):
    assert pool.answer("ffffffffffff") is None
    other = Pool(beamline(beamline="2BM"), SITES, leases, now=NOW)
    assert other.answer(served(pool, leases).lease) is None
    pool.heard(heartbeat("ffffffffffff", at=NOW))
    assert pool.orders(NOW + 3, 1) == []


def test_a_job_is_cancelled_again_until_it_is_seen_to_be_over(pool):
    lease = one(pool)
    pool.submitted(lease.lease, "17", NOW)
    assert pool.orders(NOW + 1, 0) == [CancelJob("near", "17", "no more wanted")]
    assert pool.orders(NOW + 5, 0) == []
    assert len(pool.orders(NOW + 12, 0)) == 1
    pool.unreachable("near", NOW + 13)
    assert pool.orders(NOW + 23, 0) == []
    pool.listed("near", NOW + 24, [job(lease, state=JobState.CANCELED)])
    assert pool.orders(NOW + 24, 0) == []
    assert pool.views(NOW + 24) == []


def test_a_job_cancelled_before_its_id_was_known_is_cancelled_once_it_is(pool):
    lease = one(pool)
    assert pool.orders(NOW + 1, 0) == []
    pool.submitted(lease.lease, "17", NOW + 2)
    assert pool.orders(NOW + 2, 0) == [CancelJob("near", "17", "no more wanted")]


ORPHAN = "xb-8ID-ffffffffffff.1700000000"


def test_a_job_of_ours_whose_lease_nobody_knows_is_cancelled(pool):
    pool.listed("near", NOW + 1, [Job(id="5", name=ORPHAN, state=JobState.ACTIVE)])
    assert pool.orders(NOW + 1, 0) == [CancelJob("near", "5", "its lease is not on record")]
    assert pool.orders(NOW + 2, 0) == []


@pytest.mark.parametrize("name", ["xb-2BM-ffffffffffff.1", "xb-8ID2-ffffffffffff", "xb-8ID-by-hand", "myjob"])
def test_a_job_that_is_not_of_our_making_is_left_alone(pool, name):
    pool.listed("near", NOW + 1, [Job(id="5", name=name, state=JobState.ACTIVE)])
    assert pool.orders(NOW + 1, 0) == []


def test_an_orphan_that_is_over_is_left_alone(pool):
    pool.listed("near", NOW + 1, [Job(id="5", name=ORPHAN, state=JobState.COMPLETED)])
    assert pool.orders(NOW + 1, 0) == []


@pytest.mark.parametrize("turn", [1, -1])
def test_of_two_jobs_of_one_lease_the_one_that_runs_stays(pool, turn):
    lease = one(pool)
    both = [job(lease, "17", JobState.QUEUED), job(lease, "18", JobState.ACTIVE)][::turn]
    pool.listed("near", NOW + 1, both)
    assert [order.job_id for order in pool.orders(NOW + 1, 1)] == ["17"]
    pool.listed("near", NOW + 2, both)
    assert states(pool, NOW + 2) == [State.STARTING]


def test_of_two_jobs_of_one_lease_the_one_that_we_know_stays(pool):
    lease = one(pool)
    pool.submitted(lease.lease, "17", NOW)
    pool.listed("near", NOW + 1, [job(lease, "17", JobState.QUEUED), job(lease, "18", JobState.ACTIVE)])
    assert [order.job_id for order in pool.orders(NOW + 1, 1)] == ["18"]
    assert states(pool, NOW + 1) == [State.QUEUED]


def test_a_pilot_that_was_never_listed_while_it_was_heard_is_silent_and_not_over_when_it_is_no_more(pool, leases):
    lease = served(pool, leases)
    for after in range(3, 100):
        pool.heard(heartbeat(lease.lease, at=NOW + after))
        pool.listed("near", NOW + after, [])
        assert pool.orders(NOW + after, 1) == []
    pool.listed("near", NOW + 105, [])
    pool.orders(NOW + 105, 1)
    pool.listed("near", NOW + 110, [])
    assert states(pool, NOW + 110) == [State.SILENT]


def test_the_job_of_a_pilot_that_ended_has_a_moment_to_end_too(pool, leases):
    lease = served(pool, leases)
    pool.heard(heartbeat(lease.lease, Pilot.ENDED, at=NOW + 5, exit_code=0))
    pool.listed("near", NOW + 6, [job(lease)])
    assert [type(order) for order in pool.orders(NOW + 6, 1)] == [SubmitJob]
    pool.listed("near", NOW + 16, [job(lease)])
    assert [order.job_id for order in pool.orders(NOW + 16, 1)] == ["17"]


def test_a_job_that_is_requeued_after_its_pilot_ended_is_cancelled_at_once(pool, leases):
    lease = served(pool, leases)
    pool.heard(heartbeat(lease.lease, Pilot.ENDED, at=NOW + 5, exit_code=85))
    pool.listed("near", NOW + 6, [job(lease, state=JobState.QUEUED, restarts=1)])
    assert CancelJob in [type(order) for order in pool.orders(NOW + 6, 1)]


def test_a_listing_that_was_overtaken_counts_for_nothing(pool):
    lease = one(pool)
    pool.submitted(lease.lease, "17", NOW)
    pool.listed("near", NOW + 5, [job(lease)])
    pool.listed("near", NOW + 3, [job(lease, state=JobState.FAILED)])
    assert states(pool, NOW + 6) == [State.STARTING]


def test_a_rung_has_room_for_the_jobs_of_all_beamlines_together(pool, leases):
    other = open_pool(leases, beamline="2BM")
    assert [order.lease.queue for order in other.orders(NOW, 2)] == ["demand"] * 2
    assert [order.lease.queue for order in pool.orders(NOW, 2)] == ["demand", "batch"]


def test_the_rate_of_submissions_is_that_of_all_beamlines_together(leases, monkeypatch):
    monkeypatch.setitem(SITES, "near", site("near", submits_per_minute=3))
    pool, other = open_pool(leases), open_pool(leases, beamline="2BM")
    assert len(pool.orders(NOW, 2)) == 2
    assert len(other.orders(NOW, 2)) == 1
    assert pool.orders(NOW + 59, 3) == []
    assert len(pool.orders(NOW + 60, 3)) == 1


def test_a_rate_below_one_a_minute_is_kept_to(leases, monkeypatch):
    monkeypatch.setitem(SITES, "near", site("near", submits_per_minute=0.5))
    pool = open_pool(leases)
    assert len(pool.orders(NOW, 2)) == 1
    for after in range(5, 120, 5):
        assert pool.orders(NOW + after, 2) == []
    assert len(pool.orders(NOW + 120, 2)) == 1


def test_a_job_that_is_over_leaves_its_room_before_its_pilot_is_known_to_be_lost(pool, leases, monkeypatch):
    lease = served(pool, leases)
    pool.orders(NOW + 2, 3)
    pool.listed("near", NOW + 2.5, [job(lease, state=JobState.FAILED, reason="PREEMPTED")])
    [order] = pool.orders(NOW + 3, 3)
    assert order.lease.queue == "demand"


def test_what_an_account_does_not_cover_is_not_submitted_and_why_is_on_record(leases):
    accounts = {"near": Account(account="xpcs::8id", node_hours=0.4)}
    pool = open_pool(leases, accounts=accounts)
    # An hour is six jobs of ten minutes: two fit.
    assert [order.lease.site for order in pool.orders(NOW, 4)] == ["near"] * 2
    assert {pause.site for pause in leases.pauses("8ID", NOW)} == {"near"}
    assert "account xpcs::8id at near has 0.07 of 0.4 node hours left" in leases.pauses("8ID", NOW)[0].why
    assert [order.lease.site for order in pool.orders(NOW + 1, 4)] == ["far"] * 2


def test_what_was_used_counts_since_the_day_that_is_named(leases):
    began = 1_700_000_000.0
    for since, n in (("2023-11-14T22:00:00+00:00", 0), ("2023-11-14T23:00:00+00:00", 1)):
        lease = leases.begin(
            beamline="8ID", site="near", queue="demand", account="xpcs", walltime=600.0, now=began
        ).lease
        leases.started(lease, began, "n1")
        leases.ended(lease, began + 600, "done")
        accounts = {"near": Account(account="xpcs", node_hours=0.2, since=since)}
        pool = open_pool(leases, now=began + 4000, accounts=accounts)
        assert sum(order.lease.site == "near" for order in pool.orders(began + 4000, 1)) == n


def test_sites_that_are_not_known_are_refused_by_name(leases):
    with pytest.raises(ConfigError, match="site moon is not known"):
        Pool(beamline(sites=("near", "moon")), SITES, leases, now=NOW)
    leases.begin(beamline="8ID", site="far", queue="demand", account="", walltime=9.0, now=NOW)
    with pytest.raises(ConfigError, match="has leases at far"):
        Pool(beamline(sites=("near",)), SITES, leases, now=NOW)


def test_while_the_manager_was_away_nobody_was_silent(pool, leases):
    alive = served(pool, leases)
    [dead] = [order.lease for order in pool.orders(NOW + 3, 2)]
    pool.submitted(dead.lease, "18", NOW + 3)
    pool.heard(heartbeat(dead.lease, at=NOW + 4))
    back = NOW + 300

    def go_on(after):
        pool.listed("near", back + after, [job(alive), job(dead, "18")])
        pool.heard(heartbeat(alive.lease, at=back + after))
        return pool.orders(back + after, 2)

    assert pool.orders(back, 2) == go_on(1) == go_on(10) == []
    submit, cancel = go_on(11)
    assert (submit.lease.queue, cancel.job_id) == ("demand", "18")


def test_a_queue_that_is_no_more_in_the_file_of_its_site_keeps_its_jobs(pool, leases, monkeypatch):
    lease = one(pool)
    pool.submitted(lease.lease, "17", NOW)
    monkeypatch.setitem(SITES, "near", site("near", (queue("other", start_within=seconds(1)),)))
    again = open_pool(leases, now=NOW + 30)
    assert again.orders(NOW + 31, 1) == []


@contextmanager
def record(folder):
    file = folder / "leases"
    for each in folder.iterdir():
        each.unlink()
    with Leases.open(file) as leases:
        yield leases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("record")


listings = st.lists(
    st.tuples(
        st.floats(0, 200),
        st.none() | st.sampled_from([JobState.QUEUED, JobState.HELD, JobState.ACTIVE]),
    ),
    max_size=30,
)


@given(listings=listings, unheard=st.sets(st.integers(0, 200)), order=st.randoms(use_true_random=False))
def test_a_pilot_that_is_heard_is_never_over_whatever_listings_say_or_when_they_come(folder, listings, unheard, order):
    arrivals = [order.uniform(asked, 200) for asked, _ in listings]
    with record(folder) as leases:
        pool = open_pool(leases)
        lease = one(pool)
        pool.submitted(lease.lease, "17", NOW)
        silence = 0
        for after in range(1, 200):
            for arrival, (asked, state) in zip(arrivals, listings, strict=True):
                if after - 1 < arrival <= after:
                    pool.listed("near", NOW + asked, [] if state is None else [job(lease, state=state)])
            silence = silence + 1 if after in unheard and silence < 2 else 0
            if silence == 0:
                pool.heard(heartbeat(lease.lease, at=NOW + after))
            assert pool.orders(NOW + after, 1) == []
        assert leases.get(lease.lease).stage is Stage.SUBMITTED


@given(listings=listings, answer=st.sampled_from(["id", "none", "never"]), heard=st.sets(st.integers(0, 200)))
def test_a_job_that_may_run_is_held_or_cancelled_whatever_was_listed_before(folder, listings, answer, heard):
    with record(folder) as leases:
        pool = open_pool(leases)
        lease = one(pool)
        if answer == "id":
            pool.submitted(lease.lease, "17", NOW + 1)
        elif answer == "none":
            pool.unanswered(lease.lease, NOW + 1)
        for after in range(1, 200):
            for asked, state in listings:
                if after - 1 < asked <= after:
                    pool.listed("near", NOW + asked, [] if state is None else [job(lease, state=state)])
            if after in heard:
                pool.heard(heartbeat(lease.lease, at=NOW + after))
            pool.orders(NOW + after, 1)
        pool.listed("near", NOW + 300, [job(lease)])
        cancelled = [order.job_id for order in pool.orders(NOW + 300, 1) if isinstance(order, CancelJob)]
        of = leases.get(lease.lease)
        assert cancelled == ["17"] or (of.ended is None and of.job_id == "17")
