"""How many nodes are wanted, when."""

from datetime import timedelta

from hpc_bridge.demand import MAX_RUNS, Demand
from hpc_bridge.leases import LONGEST_RUN, Run
from tests.world import beamline, seconds

ENGINE = "zmq+bluesky://localhost:5578"


def demand(runs=(), **changes):
    wants = {"nodes": 2, "max_nodes": 5, "idle_nodes": 1, "linger": seconds(600), "run_engine": ENGINE} | changes
    return Demand(beamline(**wants), runs)


def wanted(demand, now, lag=None, serving=100):
    return demand.wanted(now, lag=lag, serving=serving)


def test_without_a_run_engine_nodes_and_spares_are_always_wanted():
    assert wanted(demand(run_engine=None, spares=1), 0.0) == 3


def test_between_runs_only_idle_nodes_are():
    assert wanted(demand(spares=1), 0.0) == 1


def test_a_run_wants_its_nodes_at_once_and_until_a_while_after_it():
    it = demand(spares=1)
    it.began("a", 10.0)
    assert wanted(it, 10.0) == 3
    it.ended("a", 100.0)
    assert wanted(it, 699.0) == 3
    assert wanted(it, 701.0) == 1


def test_the_last_of_several_runs_counts():
    it = demand()
    it.began("a", 10.0)
    it.began("b", 20.0)
    it.ended("a", 100.0)
    assert wanted(it, 5000.0) == 2
    it.ended("b", 6000.0)
    assert wanted(it, 6700.0) == 1


def test_a_run_that_begins_while_nodes_linger_keeps_them():
    it = demand()
    it.began("a", 10.0)
    it.ended("a", 100.0)
    it.began("b", 600.0)
    assert wanted(it, 1500.0) == 2


def test_a_run_told_of_twice_is_one_and_an_end_of_an_unknown_one_none():
    it = demand()
    it.ended("nobody's", 0.0)
    assert wanted(it, 1.0) == 1
    it.began("a", 10.0)
    it.began("a", 11.0)
    it.ended("a", 20.0)
    it.ended("a", 900.0)
    assert wanted(it, 1000.0) == 1


def test_a_run_whose_stop_is_missing_is_over_after_a_day():
    it = demand()
    it.began("a", 0.0)
    assert wanted(it, LONGEST_RUN - 1) == 2
    assert wanted(it, LONGEST_RUN + 599) == 2
    assert wanted(it, LONGEST_RUN + 601) == 1


def test_runs_without_end_do_not_fill_the_memory():
    it = demand()
    for i in range(3 * MAX_RUNS):
        it.began(f"{i}", float(i))
    for i in range(2 * MAX_RUNS, 3 * MAX_RUNS):
        it.ended(f"{i}", 5000.0)
    assert wanted(it, 9000.0) == 1


def test_a_manager_that_starts_again_wants_what_it_wanted():
    assert wanted(demand([Run(run="a", began=0.0, ended=None)]), 5000.0) == 2
    assert wanted(demand([Run(run="a", began=0.0, ended=4900.0)]), 5000.0) == 2
    assert wanted(demand([Run(run="a", began=0.0, ended=4000.0)]), 5000.0) == 1
    both = [Run(run="a", began=0.0, ended=4900.0), Run(run="b", began=1.0, ended=2.0)]
    assert wanted(demand(both), 5000.0) == 2


GROWS = {"run_engine": None, "grow_at_lag": timedelta(seconds=5), "grow_after": timedelta(seconds=30)}


def lagging(it, begin, end, lag=6.0, serving=100):
    return [wanted(it, float(now), lag, serving) for now in range(begin, end)][-1]


def test_pilots_that_lag_for_a_while_get_one_more_each_time_up_to_the_most():
    it = demand(**GROWS)
    assert lagging(it, 0, 30) == 2
    assert lagging(it, 30, 31) == 3
    assert lagging(it, 31, 62) == 4
    assert lagging(it, 62, 500) == 5


def test_a_lag_that_comes_and_goes_asks_for_nothing():
    it = demand(**GROWS)
    for begin in range(0, 600, 30):
        assert lagging(it, begin, begin + 29) == 2
        assert wanted(it, begin + 29, 1.0) == 2


def test_a_lag_that_is_not_known_is_none():
    it = demand(**GROWS)
    assert [wanted(it, float(now)) for now in range(100)] == [2] * 100


def test_there_is_no_growth_before_all_that_are_wanted_serve():
    it = demand(**GROWS)
    assert lagging(it, 0, 31) == 3
    assert lagging(it, 31, 500, serving=2) == 3
    assert lagging(it, 500, 529, serving=3) == 3
    assert lagging(it, 529, 531, serving=3) == 4


def test_what_was_added_goes_one_by_one_when_nothing_lags_for_a_while():
    it = demand(**GROWS)
    lagging(it, 0, 62)
    assert lagging(it, 62, 660, lag=0.0) == 4
    assert lagging(it, 660, 663, lag=0.0) == 3
    assert lagging(it, 663, 1263, lag=0.0) == 2
    assert lagging(it, 1263, 5000, lag=0.0) == 2


def test_what_was_added_goes_with_the_runs():
    it = demand(**GROWS | {"run_engine": ENGINE})
    it.began("a", 0.0)
    assert lagging(it, 0, 62) == 4
    it.ended("a", 62.0)
    assert wanted(it, 663.0, 6.0) == 1
    it.began("b", 700.0)
    assert wanted(it, 700.0, 6.0) == 2
