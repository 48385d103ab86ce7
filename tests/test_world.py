"""Histories of faults: what a pool does to real nodes must be right at any moment and come to rest in the end."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_bridge.job import JobState
from tests.world import T0, World, beamline, queue, seconds, site

NEAR = site(
    "near",
    (
        queue("demand", walltime=seconds(200), max_jobs=4, start_within=seconds(30)),
        queue("preemptable", max_jobs=6, start_within=seconds(40)),
    ),
)
FAR = site("far", (queue("batch", walltime=seconds(400)),))

numbers = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def world(folder, seed, sites=(NEAR, FAR), **changes):
    wants = {"sites": tuple(each.site for each in sites), "max_nodes": 5} | changes
    return World(folder / f"{next(numbers)}", beamline(**wants), sites, seed)


def fault(world, kind, pick, length):
    """Let something go wrong, for some seconds where it passes by itself."""
    centre = world.centres[sorted(world.centres)[pick % 2]]
    queues = [each.name for each in world.sites[centre.name].queues]
    until = world.now + length
    running = [task for task in world.tasks if task.state is JobState.ACTIVE and task.pilots[-1].lives]
    match kind:
        case "the controller is down":
            centre.down_until = until
        case "listings come late":
            centre.late_until = until
        case "answers to submissions are lost":
            centre.deaf_until = until
        case "a queue is full":
            centre.stuck_until[queues[pick % len(queues)]] = until
        case "a queue refuses":
            centre.refuses_until[queues[pick % len(queues)]] = until
        case "the manager is killed":
            world.kill_manager(length % 40)
        case "wanted":
            world.wanted = pick % 7
        case _ if running:
            task = running[pick % len(running)]
            pilot = task.pilots[-1]
            match kind:
                case "preempted without warning":
                    pilot.is_dead = True
                    task.requeue(world.now, length)
                case "preempted for good":
                    pilot.is_dead = True
                    task.end(JobState.FAILED, "PREEMPTED", world.now)
                case "told to go by the scheduler":
                    pilot.drain(world.now)
                case "a node dies":
                    pilot.is_dead = True
                    task.node_fails_at = world.now + 3 * length
                case "a node is lost to the scheduler":
                    task.requeue(world.now, length)
                case "no way to the manager":
                    pilot.cut_until = until


KINDS = (
    "the controller is down",
    "listings come late",
    "answers to submissions are lost",
    "a queue is full",
    "a queue refuses",
    "the manager is killed",
    "wanted",
    "preempted without warning",
    "preempted for good",
    "told to go by the scheduler",
    "a node dies",
    "a node is lost to the scheduler",
    "no way to the manager",
)

faults = st.lists(
    st.tuples(st.integers(5, 150), st.sampled_from(KINDS), st.integers(0, 100), st.integers(1, 90)), max_size=14
)


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), faults=faults)
def test_after_any_faults_all_that_is_wanted_serves_again_and_nothing_is_left_in_the_end(folder, seed, faults):
    it = world(folder, seed)
    it.wanted = 4
    due = sorted(faults)
    while due:
        it.step()
        while due and due[0][0] <= it.now - T0:
            fault(it, *due.pop(0)[1:])
    it.wanted = 4
    it.pass_until(lambda: it.pool is not None and it.n_serving >= 4, within=300)
    it.wanted = 0
    it.pass_until(lambda: it.pool is not None and not it.waiting_or_running and not it.pilots, within=300)
    it.pass_until(lambda: not it.leases.open_leases(), within=150)
    it.close()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), killed_at=st.integers(10, 400))
def test_a_hand_over_never_leaves_fewer_serving_also_when_the_manager_dies_meanwhile(folder, seed, killed_at):
    # A successor that was about to be submitted is given up after half a minute, then there must be time for another.
    short = queue("demand", walltime=seconds(200))
    it = world(folder, seed, (site("near", (short,), ahead=seconds(90)),))
    it.wanted = 3
    it.pass_until(lambda: it.n_serving == 3, within=30)
    while it.now < T0 + 500:
        if it.now == T0 + killed_at:
            it.kill_manager(15)
        it.step()
        assert it.n_serving >= 3, it.story()
    assert len(it.tasks) >= 3 * 4
    it.close()


@pytest.fixture
def serving(folder):
    """Four pilots that serve at the near site."""
    it = world(folder, 7)
    it.wanted = 4
    it.pass_until(lambda: it.n_serving == 4, within=30)
    yield it
    it.close()


def seconds_until_four_serve(it):
    began = it.now
    it.pass_until(lambda: it.n_serving >= 4, within=100)
    return it.now - began


def test_a_preempted_pilot_is_replaced_as_fast_as_a_listing_tells(serving):
    fault(serving, "preempted without warning", 0, 60)
    # 3 s to the next listing and 1 s until it comes, 2 to submit, 4 in the queue, 8 to start.
    assert seconds_until_four_serve(serving) <= 18


def test_a_node_that_dies_is_replaced_long_before_the_scheduler_notices(serving):
    fault(serving, "a node dies", 0, 90)
    assert seconds_until_four_serve(serving) <= 10 + 18


def test_a_controller_that_is_away_for_half_a_minute_costs_and_doubles_nothing(serving):
    before = [task.id for task in serving.tasks]
    for centre in serving.centres.values():
        centre.down_until = serving.now + 30
    serving.pass_time(60)
    assert [task.id for task in serving.tasks] == before
    assert serving.n_serving == 4


def test_a_manager_that_is_killed_and_starts_again_doubles_nothing(serving):
    before = [task.id for task in serving.tasks]
    serving.kill_manager(20)
    serving.pass_time(60)
    assert [task.id for task in serving.tasks] == before
    assert serving.n_serving == 4


def test_when_a_site_goes_away_with_its_nodes_the_next_one_takes_over(serving):
    near = serving.centres["near"]
    near.down_until = serving.now + 10_000
    for pilot in serving.pilots:
        pilot.is_dead = True
    assert seconds_until_four_serve(serving) <= 10 + 18
    assert sum(not task.is_over for task in serving.centres["far"].tasks.values()) == 4


def test_a_site_that_refuses_and_one_that_is_full_are_passed_by(folder):
    it = world(folder, 1)
    it.centres["near"].refuses_until["demand"] = it.now + 10_000
    it.centres["near"].stuck_until["preemptable"] = it.now + 10_000
    it.wanted = 4
    it.pass_until(lambda: it.n_serving == 4, within=100)
    assert [task.queue for task in it.tasks if task.pilots] == ["batch"] * 4
    it.close()
