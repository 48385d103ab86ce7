"""Regions that lost frames, recomputed from a file, in whatever order their sums come: one run, the best result."""

import gc
import math
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.backfill import InRegions, Published, Repairs, RunLog, _publish_hopeless, wanted
from stream.backfill_file import RunFile
from stream.merger import Merger
from stream.merging import merge, saved
from stream.messages import FrameBatch, Result, RunStart, RunStop
from stream.pipeline import Pipeline
from stream.regions import Regions
from tests.sources import ListSink, ListSource
from tests.test_merger import N_FRAMES, REGIONS, assert_same, interleaved, merged, operators, partials, run_of, whole

START = "2026-11-22T00:00:00+00:00"
LOST = [40, 160, 280]
"""First frames of batches of 20, the last one among them."""
SENT = {
    name: run_of(lost=lost)
    for name, lost in {"all": (), "some": LOST, "few": LOST[:1], "none": range(0, 300, 20)}.items()
}
UNDISTURBED = whole(SENT["all"])
STREAMED = {name: [partials(messages, region) for region in range(REGIONS)] for name, messages in SENT.items()}


def repairs(messages, regions=range(REGIONS), *, is_all=True):
    """What a backfill from a file with these frames publishes, by region."""
    sink, cut = ListSink(), Regions(REGIONS)
    make = lambda start: [InRegions(start, operators, cut, regions)]  # noqa: E731
    Pipeline(
        ListSource(messages), make, [Repairs(sink, cut, regions, is_all=is_all)], partials=True, publish_every=1e9
    ).run()
    return [[each for each in sink.outputs if each.region == region] for region in regions]


def held(messages, merger=None, **options):
    return merged(messages, merger=merger or Merger(operators, patience=1e9, repair_within=math.inf), **options)


def ledger(sink, *, final=True):
    return sink.results(final=final)["run-1", "ledger"]


def ends(sink):
    return [each for each in sink.outputs if isinstance(each, RunStop)]


def streamed(kinds):
    return [STREAMED[kind][region] for region, kind in enumerate(kinds)]


kinds = st.lists(st.sampled_from(["all", "some", "few", "none"]), min_size=REGIONS, max_size=REGIONS)


@given(kinds, st.integers(0, 99), st.integers(1, 2), st.sets(st.integers(0, REGIONS - 1)))
def test_in_any_order_and_twice_the_repaired_result_is_that_of_a_run_without_loss(kinds, seed, times, cut_for_good):
    streams = streamed(kinds)
    for region in cut_for_good:
        streams[region] = streams[region][: 1 + seed % 6]
    lossy = [region for region in range(REGIONS) if kinds[region] != "all" or region in cut_for_good]
    sink = held(interleaved([*streams, *(repairs(SENT["all"], lossy) * times if lossy else [])], seed))
    assert_same(sink, UNDISTURBED)
    assert ends(sink) == [SENT["all"][-1]]
    assert sum(isinstance(each, RunStart) for each in sink.outputs) == 1
    assert [each.run for each in sink.outputs] == ["run-1"] * len(sink.outputs)
    found = ledger(sink)
    assert set(found["repaired_regions"].tolist()) <= set(lossy)
    assert found["missing_regions"].size == 0
    assert found["awaits_file"] == 0


@given(kinds, kinds, st.integers(0, 99))
def test_whoever_has_more_frames_of_a_region_wins_at_the_end(of_stream, of_file, seed):
    from_file = [repairs(SENT[kind], [region], is_all=False)[0] for region, kind in enumerate(of_file)]
    sink = held([*interleaved([*streamed(of_stream), *from_file], seed)])
    order = ["none", "some", "few", "all"]
    best = [max(pair, key=order.index) for pair in zip(of_stream, of_file, strict=True)]
    expected = merged(interleaved(streamed(best), 0))
    results = sink.results(final=True)
    for name in ("multitau", "scattering", "intensity"):
        for key, array in expected.results(final=True)["run-1", name].items():
            np.testing.assert_array_equal(results["run-1", name][key], array, err_msg=f"{name} {key}")
    better = [region for region in range(REGIONS) if order.index(of_file[region]) > order.index(of_stream[region])]
    complete_before = [region for region in range(REGIONS) if of_stream[region] == "all"]
    assert not set(ledger(sink)["repaired_regions"].tolist()) & set(complete_before)
    assert ledger(sink)["repaired_regions"].tolist() == better
    assert len(ends(sink)) == 1


def test_a_run_with_lost_frames_is_held_open_and_its_interim_results_say_so():
    merger = Merger(operators, patience=1e9, repair_within=math.inf)
    for message in interleaved(streamed(["all", "some", "all", "all"]), 1):
        assert not [each for each in merger.take(message) if not isinstance(each, RunStart)]
    results = {each.operator: each for each in merger.interim()}
    assert results["multitau"].n_frames == 300
    assert not results["multitau"].final
    assert (results["ledger"].arrays["awaits_file"], results["ledger"].arrays["lost"]) == (1, 60)
    assert not list(merger.interim()), "nothing is new"
    assert not list(merger.given_up())
    assert merger.open_runs == [("run-1", START)]
    [repair] = repairs(SENT["all"], [1])
    outputs = [each for message in repair for each in merger.take(message)]
    assert isinstance(outputs[-1], RunStop)
    assert outputs[-2].arrays["repaired_regions"].tolist() == [1]
    assert (outputs[-2].arrays["from_file"], outputs[-2].arrays["plane"]) == (60, 1)
    assert not merger.open_runs


def test_each_repaired_region_improves_the_interim_result():
    merger = Merger(operators, patience=1e9, repair_within=math.inf)
    for message in interleaved(streamed(["some", "none", "all", "all"]), 1):
        list(merger.take(message))
    list(merger.interim())
    first, second = repairs(SENT["all"], [0, 1])
    for message in first:
        assert not list(merger.take(message))
    [found] = [each.arrays for each in merger.interim() if each.operator == "ledger"]
    assert found["repaired_regions"].tolist() == [0]
    assert found["lost"] == 300
    assert [each for message in second for each in merger.take(message)]


def test_when_the_time_for_repairs_is_over_the_result_is_final_with_what_there_is(caplog):
    merger = Merger(operators, patience=1e9, repair_within=1e-9)
    for message in interleaved(streamed(["all", "some", "all", "all"]), 1):
        assert not [each for each in merger.take(message) if not isinstance(each, RunStart)]
    outputs = list(merger.given_up())
    assert outputs[-1] == SENT["all"][-1]
    assert outputs[-2].arrays["lost"] == 60
    assert "given up without a file" in caplog.text
    late = [each for message in repairs(SENT["all"], [1])[0] for each in merger.take(message)]
    assert not late


def test_a_run_that_lost_nothing_is_not_held():
    sink = held(interleaved(STREAMED["all"], 3))
    assert len(ends(sink)) == 1
    assert ledger(sink)["plane"] == 0


def test_frames_that_the_file_does_not_have_either_end_the_wait():
    streams = streamed(["all", "few", "all", "all"])
    sink = held([*interleaved(streams, 3), *repairs(SENT["few"], [1])[0]])
    assert ends(sink)
    assert (ledger(sink)["lost"], ledger(sink)["repaired_regions"].size) == (20, 0)
    nothing_better = [each for each in repairs(SENT["few"], [1])[0] if getattr(each, "operator", "ledger") == "ledger"]
    assert len(nothing_better) == 3
    sink = held([*interleaved(streams, 3), *nothing_better])
    assert_same(sink, merged(interleaved(streams, 3)))


def test_a_run_that_nobody_ended_does_not_wait_for_a_file_that_has_no_more_of_it():
    """The gateway was killed: workers learn that the run is over when the next one begins."""
    start, *batches, _ = SENT["all"]
    streams = [partials([start, *batches, *run_of("run-2")], region) for region in range(REGIONS)]
    streams = [[each for each in stream if each.run == "run-1"] for stream in streams]
    assert {stream[-1].exit_status for stream in streams} == {"fail"}
    streamed = {region: Published(stream[0], stream[-2].arrays, stream[-1]) for region, stream in enumerate(streams)}
    file = RunFile(path=Path("file"), start=start, n_frames=280, lost=np.empty((0, 2), int), is_all=False)
    assert wanted(RunLog(streamed), file, REGIONS) == ([], list(range(REGIONS)))
    merger = Merger(operators, patience=1e9, repair_within=math.inf)
    for message in interleaved(streams, 1):
        list(merger.take(message))
    assert merger.open_runs
    outputs = [each for message in nothing_better(file) for each in merger.take(message)]
    assert outputs[-1] == RunStop(run="run-1", n_frames=N_FRAMES, exit_status="fail")
    assert outputs[-2].arrays["received"] == N_FRAMES
    assert not merger.open_runs


def nothing_better(file):
    """What a backfill publishes of regions of which the file has no more frames."""
    sink = ListSink()
    _publish_hopeless(Repairs(sink, Regions(REGIONS), range(REGIONS), is_all=file.is_all), file.start, file)
    return sink.outputs


def test_what_is_recomputed_is_what_the_file_has_more_frames_of():
    ledgers = [stream[-2].arrays for stream in streamed(["all", "few", "some", "none"])]
    stops = [stream[-1] for stream in STREAMED["all"]]
    log = RunLog({r: Published(STREAMED["all"][r][0], ledgers[r], stops[r]) for r in range(REGIONS)})
    file = RunFile(path=Path("file"), start=SENT["all"][0], n_frames=300, lost=np.array([[0, 20]]), is_all=False)
    assert wanted(log, file, REGIONS) == ([2, 3], [1])
    assert wanted(log, replace(file, lost=np.empty((0, 2), int)), REGIONS) == ([1, 2, 3], [])
    log.streamed[0].stop = None
    assert wanted(log, file, REGIONS) == ([0, 2, 3], [1])


def test_a_run_that_is_held_keeps_sums_and_no_operators():
    alive = weakref.WeakSet()

    def counted(start):
        made = operators(start)
        alive.update(made)
        return made

    merger = Merger(counted, patience=1e9, repair_within=math.inf)
    for message in interleaved([*STREAMED["some"], repairs(SENT["few"], [1], is_all=False)[0]], 1):
        list(merger.take(message))
    assert list(merger.interim())
    gc.collect()
    assert merger.open_runs
    assert not alive


def test_a_run_of_which_nothing_was_streamed_is_that_of_its_file():
    sink = held(interleaved(repairs(SENT["all"]), 4))
    assert_same(sink, UNDISTURBED)
    begun = [each for each in sink.outputs if isinstance(each, RunStart)]
    assert [(each.run, each.region, each.detector_shape) for each in begun] == [("run-1", 0, None)]
    assert not begun[0].metadata.keys() & {"source", "repairs", "is_all", "regions"}
    assert (ledger(sink)["plane"], ledger(sink)["from_file"]) == (2, 300)


def test_a_file_that_was_not_closed_waits_for_the_stream_that_may_know_more():
    merger = Merger(operators, patience=1e9, repair_within=math.inf)
    unended = [stream[:-1] for stream in STREAMED["all"]]
    for message in interleaved([*unended, *repairs(SENT["few"], is_all=False)], 2):
        assert not [each for each in merger.take(message) if not isinstance(each, RunStart)]
    outputs = [each for stream in STREAMED["all"] for each in merger.take(stream[-1])]
    assert outputs[-2].arrays["lost"] == 0


def test_a_file_that_was_not_closed_ends_no_run_that_still_streams():
    merger = Merger(operators, patience=1e9)
    unended = [stream[:-1] for stream in STREAMED["all"]]
    for message in interleaved([*unended, *repairs(SENT["few"], is_all=False)], 2):
        assert not [each for each in merger.take(message) if not isinstance(each, RunStart)]
    assert not list(merger.given_up())
    assert merger.open_runs


def test_repairs_amid_the_next_run_are_of_the_run_before():
    one, two = run_of("run-1", lost=LOST), run_of("run-2")
    streams = [partials([*one, *two], region) for region in range(REGIONS)]
    for seed in range(5):
        sink = held(interleaved([*streams, *repairs(SENT["all"])], seed))
        assert_same(sink, whole([*run_of("run-1"), *two]))
        assert sorted(each.run for each in ends(sink)) == ["run-1", "run-2"]


def test_a_run_of_the_same_name_ends_the_wait_of_the_one_before():
    start, *rest = run_of()
    again = [replace(start, metadata={**start.metadata, "start_time": "later"}), *rest]
    later = [partials(again, region) for region in range(REGIONS)]
    sink = held([*interleaved(STREAMED["some"], 0), *interleaved(later, 0)])
    order = [type(each).__name__ for each in sink.outputs if not isinstance(each, Result)]
    assert order == ["RunStart", "RunStop"] * 2


def test_killed_while_it_holds_a_run_it_holds_it_again(tmp_path):
    position = tmp_path / "position"
    two = run_of("run-2")
    before = [
        *interleaved(streamed(["some"] * REGIONS), 5),
        *interleaved([partials(two, r) for r in range(REGIONS)], 5),
    ]
    with pytest.raises(OSError, match="killed"):
        held([*before, OSError("killed")], position=position)
    begin, ended = saved(position)
    assert begin == {"message": 0}
    assert [run for run, _ in ended] == ["run-2"]
    messages = [*before, *interleaved(repairs(SENT["all"]), 5)][begin["message"] :]
    sink = held(messages, merger=Merger(operators, patience=1e9, repair_within=math.inf, ended=ended))
    assert_same(sink, UNDISTURBED)


def test_of_a_run_that_is_held_nothing_is_acknowledged():
    source = ListSource([*interleaved(STREAMED["some"], 1), None])
    merger = Merger(operators, patience=1e9, repair_within=math.inf)
    merge(source, merger, [ListSink()], stop=threading.Event())
    assert not source.acknowledged.get("message")


def test_the_worst_way_that_a_run_went_stands_in_its_ledger():
    ways = iter([0, 2, 1])
    merger = Merger(operators, patience=1e9, plane=lambda: next(ways, 0))
    *earlier, last = interleaved(STREAMED["all"], 1)
    for message in earlier:
        list(merger.take(message))
        if isinstance(message, Result) and message.operator == "ledger":
            list(merger.interim())
    outputs = list(merger.take(last))
    assert outputs[-2].arrays["plane"] == 2


def test_an_unfinished_repair_changes_nothing_and_another_one_may_follow():
    [broken] = repairs(SENT["all"], [1])
    [good] = repairs(SENT["all"], [1])
    messages = [*interleaved(streamed(["all", "few", "all", "all"]), 1), *broken[:-1], *good]
    assert_same(held(messages), UNDISTURBED)


def test_of_several_files_the_one_with_most_frames_counts():
    unended = [stream[:3] for stream in STREAMED["all"]]
    some, few = (repairs(SENT[kind], is_all=False) for kind in ("some", "few"))
    ends = [STREAMED["none"][region][-1:] for region in range(REGIONS)]
    for first, second in ((few, some), (some, few)):
        sink = held([*interleaved(unended, 1), *interleaved(first, 1), *interleaved(second, 1), *interleaved(ends, 1)])
        assert ledger(sink)["lost"] == 20


def test_frames_are_not_invented():
    sink = held([*interleaved(streamed(["some"] * REGIONS), 1), *interleaved(repairs(SENT["few"]), 2)])
    assert_same(sink, whole(SENT["few"]))
    assert ledger(sink)["lost_spans"].tolist() == [[40, 60]]
    assert isinstance(SENT["few"][1], FrameBatch)
