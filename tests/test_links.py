"""Over drawn histories of links, queues and spools, what the switch does to the frames of a beamline."""

from dataclasses import replace

import pytest

from bench import switch
from bench.links import Fault, always, history, ours, simulate
from hpc_bridge.switch import Plane, Switching

SETTINGS = Switching()
LOOK, SILENT = 1, 5
BACK = 30 + 10 + 2 * LOOK
"""From stream+file: dwell and steady; a minute more where frames were lost."""

ONE_RUN = replace(
    history(0), seconds=2800, runs=((10, 1700, 0.5),), faults=(), ring=5.0, spool=2000.0, queue=20, files=0.0
)


@pytest.mark.parametrize("seed", range(25))
def test_whatever_goes_wrong(seed):
    where = replace(history(seed, 3600, quiet=1100), files=0.0)
    told = simulate(where, ours())
    what = list(zip(told.planes, told.serves, strict=True))

    # Never more to and fro than there were faults for; of a link that is too slow, each time that it was tried again.
    slow = sum(fault.end - fault.begin for fault in where.faults if fault.share)
    assert told.switches <= 4 * (len(where.faults) + 1) + 2 * slow / 300

    # Degraded soon after the last pilot is heard of for the last time.
    for now in range(SILENT + 2 * LOOK, len(what)):
        if not any(serves for _, serves in what[now - SILENT - 2 * LOOK : now]):
            assert what[now][0] is not Plane.STREAM

    # All is well in the end.
    assert what[-1] == (Plane.STREAM, True)

    # What is in no other place was in the spool, but for the second in which it failed.
    assert told.only_file_and_lost <= 0.9 * told.switches * LOOK


def until(told, plane, begin):
    return next(now for now in range(begin, len(told.planes)) if told.planes[now] is plane) - begin


def test_a_link_that_is_cut_for_half_a_minute_costs_a_file_and_all_is_well_two_minutes_later():
    told = simulate(replace(ONE_RUN, faults=(Fault(300, 330, 0.0),)), ours())
    assert until(told, Plane.BOTH, 300) <= SILENT + 2 * LOOK
    assert Plane.FILE not in told.planes
    assert until(told, Plane.STREAM, 330) <= BACK + ONE_RUN.queue + 60
    [run] = told.runs
    assert run.live < run.came
    assert run.complete == 1
    assert run.final is not None


def test_a_link_that_is_cut_for_good_leaves_the_file_and_no_frame_goes_over_it_in_vain():
    told = simulate(replace(ONE_RUN, faults=(Fault(300, 1790, 0.0),)), ours())
    assert until(told, Plane.FILE, 300) <= 130 + LOOK
    assert set(told.planes[450:1790]) == {Plane.FILE}
    assert told.runs[0].spooled == pytest.approx(told.runs[0].came)


def test_nodes_that_are_waited_for_longer_than_the_gateway_keeps_frames_cost_a_file_and_nothing_else():
    told = simulate(replace(ONE_RUN, faults=(Fault(300, 400, None),)), ours())
    assert told.switches == 2
    assert told.runs[0].complete == 1
    assert told.runs[0].live > 0.9 * (told.runs[0].came - 0.5 * 100)


def test_on_a_slow_link_the_files_of_earlier_runs_get_it_for_themselves_after_a_while():
    runs = tuple((begin, begin + 280, 0.5) for begin in range(10, 3000, 300))
    where = replace(ONE_RUN, seconds=3300, runs=runs, faults=(Fault(100, 3200, 0.3),), spool=5000.0)
    mine, streamed = simulate(where, ours()), simulate(where, always(Plane.STREAM))
    assert mine.until_final(3300) < streamed.until_final(3300)
    assert mine.live < streamed.live
    assert mine.switches <= 12, "each pause is twice as long as the one before"


def test_files_that_take_their_share_of_the_link_from_the_frames_do_not_make_them_go_to_and_fro():
    """A cut of 10 s costs a file, which costs the next run its own, and so on: that is not the switch's to mend."""
    runs = tuple((begin, begin + 280, 0.7) for begin in range(10, 7000, 300))
    where = replace(ONE_RUN, seconds=7200, runs=runs, faults=(Fault(100, 110, 0.0),), files=0.5)
    told = simulate(where, ours())
    assert sum(run.goes for run in told.runs) > 5
    assert told.switches <= 7200 / 100
    assert simulate(replace(where, files=0.0), ours()).switches == 2


def test_a_full_spool_lets_nobody_go_by_file_only():
    where = replace(ONE_RUN, faults=(Fault(100, 1790, 0.0),), spool=400.0)
    told = simulate(where, ours())
    full = until(told, Plane.FILE, 0) + until(told, Plane.BOTH, until(told, Plane.FILE, 0))
    assert 400 / 0.5 - full > 100, "long before it is full"
    assert told.only_file_and_lost == 0
    assert set(told.planes[full:1700]) == {Plane.BOTH}


def test_the_figures_for_tuning_are_those_of_all_policies_in_the_same_histories():
    found = list(switch.figures(2))
    assert {figure.against for figure in found} == {
        "always streamed, no file",
        "always streamed, lossy runs' files",
        "always both ways",
        "at most 6 1 asked for",
    }
    assert all(figure.median_of == 2 and figure.met for figure in found)
    never = list(switch.figures(2, policy=lambda: always(Plane.STREAM)))
    assert [figure.ratio for figure in never if figure.against == "always streamed, lossy runs' files"] == [1] * 4
