"""Partial sums of regions, merged, against one pipeline of the whole detector."""

import random
import threading
from dataclasses import replace

import numpy as np
import pytest

from stream.merger import Merger
from stream.merging import merge, saved
from stream.messages import FrameBatch, Rejected, Result, RunStart, RunStop
from stream.operators.intensity import Intensity
from stream.operators.multitau import MultiTau
from stream.operators.scattering import Scattering
from stream.pipeline import Pipeline
from stream.regions import Regions
from tests.conftest import make_roimap, make_start
from tests.sources import ListSink, ListSource

SHAPE = (8, 60)
ROIMAP = make_roimap(SHAPE)
N_FRAMES = 300
EVERY = 600.0
"""Seconds between partial sums: 64 frames, the power of 2 that takes at least that long."""
REGIONS = 4
COUNTS = np.random.default_rng(5).poisson(1, (N_FRAMES, *SHAPE)).astype("<u2")


def operators(start):
    return [MultiTau(start, ROIMAP), Scattering(start, ROIMAP), Intensity(start, ROIMAP)]


def run_of(name="run-1", lost=()):
    start = make_start(SHAPE, run=name, metadata={"n_frames": N_FRAMES, "start_time": "2026-11-22T00:00:00+00:00"})
    start = replace(start, frame_time=10.0)  # so slow that all sums are made, however long that takes
    firsts = [first for first in range(0, N_FRAMES, 20) if first not in lost]
    batches = [FrameBatch(run=name, first=first, frames=COUNTS[first : first + 20], timestamp_ns=0) for first in firsts]
    return [start, *batches, RunStop(run=name, n_frames=N_FRAMES, exit_status="success")]


def whole(messages):
    """What one pipeline of the whole detector delivers."""
    sink = ListSink()
    Pipeline(ListSource(messages), operators, [sink], publish_every=1e9).run()
    return sink


def partials(messages, region):
    """What the worker of a region publishes."""
    sink = ListSink()
    of_region = [part for message in messages for part in Regions(REGIONS).cut(message) if part.region == region]
    Pipeline(ListSource(of_region), operators, [sink], partials=True, publish_every=EVERY).run()
    return sink.outputs


def all_partials(messages):
    return [partials(messages, region) for region in range(REGIONS)]


def interleaved(streams, seed):
    """The messages of all streams, each in order, otherwise in any."""
    streams = [list(stream) for stream in streams]
    dice = random.Random(seed)
    while streams:
        stream = dice.choice(streams)
        yield stream.pop(0)
        streams = [stream for stream in streams if stream]


def merged(messages, *, merger=None, **options):
    sink = ListSink()
    merger = merger or Merger(operators, patience=1e9)
    merge(ListSource(list(messages)), merger, [sink], stop=threading.Event(), **options)
    return sink


def assert_same(sink, expected, *, final=True):
    found, wanted = sink.results(final=final), expected.results(final=final)
    assert found.keys() == wanted.keys()
    for key, arrays in wanted.items():
        for name, array in arrays.items():
            if name != "lag":
                np.testing.assert_array_equal(found[key][name], array, err_msg=f"{key} {name}")


def test_partial_sums_are_published_at_the_same_frames_in_every_region():
    published = [
        [each.n_frames for each in stream if isinstance(each, Result) and each.operator == "multitau"]
        for stream in all_partials(run_of(lost=[60]))
    ]
    assert published == [[64, 128, 192, 256, 300]] * REGIONS


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lost", [(), (60, 280)])
def test_the_merged_regions_are_the_whole_detector_bit_for_bit(seed, lost):
    messages = run_of(lost=lost)
    sink = merged(interleaved(all_partials(messages), seed))
    assert_same(sink, whole(messages))
    assert [each for each in sink.outputs if isinstance(each, RunStop)] == messages[-1:]
    begun = [each for each in sink.outputs if isinstance(each, RunStart)]
    assert [(each.region, each.shape, each.origin, each.detector_shape) for each in begun] == [(0, SHAPE, (0, 0), None)]
    assert "regions" not in begun[0].metadata


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_twice_or_from_a_former_owner_has_no_effect(seed):
    messages = run_of()
    streams = all_partials(messages)
    again = [stream[: len(stream) * 2 // 3] + stream for stream in streams]
    sink = merged([*interleaved(again, seed), *streams[2]])
    assert_same(sink, whole(messages))
    assert sum(isinstance(each, RunStop) for each in sink.outputs) == 1


def test_interim_results_are_those_of_a_frame_that_all_regions_have_reached():
    messages = run_of()
    streams = all_partials(messages)
    merger = Merger(operators, patience=1e9)

    def take(region, n_frames):
        for message in streams[region]:
            if not isinstance(message, Result) or message.n_frames <= n_frames:
                assert not [each for each in merger.take(message) if isinstance(each, Result)]

    streams = [[each for each in stream if not isinstance(each, RunStop)] for stream in streams]
    for region, n_frames in enumerate((256, 128, 192, 256)):
        take(region, n_frames)
    results = {result.operator: result for result in merger.interim()}
    assert {result.n_frames for result in results.values()} == {128}
    cut_off = [each for each in messages if not isinstance(each, FrameBatch) or each.first < 120]
    expected = MultiTau(messages[0], ROIMAP)
    for batch in cut_off[1:-1]:
        expected.push(batch)
    expected.push(replace(messages[7], frames=messages[7].frames[:8]))
    np.testing.assert_array_equal(results["multitau"].arrays["g2"], expected.result()["g2"])
    assert not list(merger.interim()), "nothing is new"


def test_before_there_is_a_frame_in_common_there_is_no_result(caplog):
    streams = all_partials(run_of())
    merger = Merger(operators, patience=1e9)
    for region, stream in enumerate(streams):
        due = [each for each in stream if isinstance(each, Result) and each.n_frames == (64 if region else 128)]
        for message in [stream[0], *due]:
            list(merger.take(message))
    assert not list(merger.interim())
    assert not caplog.text


def test_a_region_far_behind_is_left_out_and_named_until_it_has_caught_up():
    streams = all_partials(run_of())
    merger = Merger(operators, patience=1000.0)
    for region, n_frames in enumerate((256, 256, 64, 256)):
        for message in streams[region]:
            if not isinstance(message, Result | RunStop) or (
                isinstance(message, Result) and message.n_frames <= n_frames
            ):
                list(merger.take(message))
    results = {result.operator: result for result in merger.interim()}
    assert results["multitau"].n_frames == 256
    assert results["ledger"].arrays["missing_regions"].tolist() == [2]
    for message in streams[2]:
        list(merger.take(message))
    for region in (0, 1, 3):
        outputs = [each for message in streams[region] for each in merger.take(message)]
    final = {each.operator: each for each in outputs if isinstance(each, Result)}
    assert final["ledger"].arrays["missing_regions"].tolist() == []
    np.testing.assert_array_equal(
        final["multitau"].arrays["g2"], whole(run_of()).results(final=True)["run-1", "multitau"]["g2"]
    )


def test_a_region_that_never_ends_is_given_up_and_the_run_called_a_failure():
    streams = all_partials(run_of())
    merger = Merger(operators, give_up=0.0)
    for message in interleaved(streams[:3], 0):
        list(merger.take(message))
    outputs = list(merger.given_up())
    assert outputs[-1] == RunStop(run="run-1", n_frames=N_FRAMES, exit_status="fail")
    [ledger] = [each.arrays for each in outputs if isinstance(each, Result) and each.operator == "ledger"]
    assert ledger["missing_regions"].tolist() == [3]
    assert not merger.open_runs


def test_the_ledger_is_that_of_the_region_that_lost_most():
    messages = run_of()
    streams = [partials(run_of(lost=[40, 80]) if region == 1 else messages, region) for region in range(REGIONS)]
    arrays = merged(interleaved(streams, 1)).results(final=True)["run-1", "ledger"]
    assert (arrays["sent"], arrays["received"], arrays["lost"]) == (300, 260, 40)
    assert arrays["lost_spans"].tolist() == [[40, 60], [80, 100]]


def test_runs_of_which_some_regions_have_begun_the_next_are_kept_apart():
    first, second = run_of("run-1"), run_of("run-2", lost=[100])
    streams = [partials([*first, *second], region) for region in range(REGIONS)]
    sink = merged(interleaved(streams, 7))
    assert_same(sink, whole([*first, *second]))


def test_killed_and_restarted_it_gives_the_same_answer_and_does_not_repeat_what_is_done(tmp_path):
    first, second = run_of("run-1"), run_of("run-2")
    messages = list(interleaved([partials([*first, *second], region) for region in range(REGIONS)], 3))
    position = tmp_path / "position"
    ends = [i for i, each in enumerate(messages) if isinstance(each, RunStop) and each.run == "run-1"]
    killed = [*messages[: ends[-1] + 20], OSError("killed")]
    with pytest.raises(OSError, match="killed"):
        merged(killed, position=position)
    begin, ended = saved(position)
    assert begin["message"] <= ends[-1]
    sink = merged(messages[begin["message"] :], merger=Merger(operators, patience=1e9, ended=ended))
    assert {run for run, _ in sink.results(final=True)} == {"run-2"}
    assert_same(sink, whole(second))


def test_what_comes_once_more_of_a_run_that_is_done_is_acknowledged_too():
    messages = list(interleaved(all_partials(run_of()), 1))
    source, merger = ListSource([*messages, *messages, None]), Merger(operators, patience=1e9)
    merge(source, merger, [ListSink()], stop=threading.Event())
    assert source.acknowledged == {"message": 2 * len(messages) + 1}


def test_of_a_run_that_is_open_nothing_is_acknowledged():
    messages = list(interleaved(all_partials(run_of()), 1))
    source, merger = ListSource([*messages[:-1], None]), Merger(operators, patience=1e9)
    merge(source, merger, [ListSink()], stop=threading.Event())
    assert not source.acknowledged.get("message")


def test_what_cannot_be_read_is_skipped():
    streams = all_partials(run_of())
    messages = [each for message in interleaved(streams, 2) for each in (Rejected(reason="poison"), message)]
    assert_same(merged(messages), whole(run_of()))


def again(name, start_time):
    start, *rest = run_of(name)
    return [replace(start, metadata={**start.metadata, "start_time": start_time}), *rest]


@pytest.mark.parametrize("seed", range(3))
def test_runs_of_the_same_name_that_began_at_other_times_are_other_runs(seed):
    messages = [*again("series-1", "2026-11-22T01:00:00+00:00"), *again("series-1", "2026-11-22T02:00:00+00:00")]
    sink = merged(interleaved([partials(messages, region) for region in range(REGIONS)], seed))
    assert sum(isinstance(each, RunStop) for each in sink.outputs) == 2
    assert [each.metadata["start_time"][11:13] for each in sink.outputs if isinstance(each, RunStart)] == ["01", "02"]


def test_a_finished_run_does_not_come_back_after_a_restart(tmp_path):
    streams = all_partials(run_of())
    merged(interleaved(streams, 0), position=tmp_path / "position")
    _, ended = saved(tmp_path / "position")
    assert not merged(streams[2], merger=Merger(operators, give_up=0.0, ended=ended)).outputs


def test_regions_that_ended_apart_merge_where_all_of_them_were():
    messages = run_of()
    cut_off = [*messages[:11], replace(messages[-1], n_frames=200, exit_status="fail")]
    longer = [*messages[:12], replace(messages[-1], n_frames=220, exit_status="fail")]
    streams = [partials(longer if region == 0 else cut_off, region) for region in range(REGIONS)]
    sink = merged(interleaved(streams, 0))
    results = sink.results(final=True)
    assert results["run-1", "ledger"]["missing_regions"].size == 0
    assert {each.n_frames for each in sink.outputs if isinstance(each, Result) and each.final} == {192}
    assert sink.outputs[-1] == RunStop(run="run-1", n_frames=220, exit_status="fail")


def test_a_result_of_few_regions_waits_for_the_others_and_is_replaced_once_they_come():
    streams = [[each for each in stream if not isinstance(each, RunStop)] for stream in all_partials(run_of())]
    merger = Merger(operators, patience=1e9)
    for message in streams[0]:
        list(merger.take(message))
    assert not list(merger.interim())
    for stream in streams[1:]:
        for message in stream:
            list(merger.take(message))
    [ledger] = [each.arrays for each in merger.interim() if each.operator == "ledger"]
    assert ledger["missing_regions"].size == 0


def test_the_image_of_a_region_that_is_left_out_is_not_an_old_one():
    streams = all_partials(run_of())
    merger = Merger(operators, patience=1000.0)
    for until, regions in ((64, range(REGIONS)), (256, (0, 1, 3))):
        for message in (each for region in regions for each in streams[region]):
            if isinstance(message, RunStart) or (isinstance(message, Result) and message.n_frames <= until):
                list(merger.take(message))
        results = {each.operator: each.arrays for each in merger.interim()}
    assert results["ledger"]["missing_regions"].tolist() == [2]
    assert np.isnan(results["scattering"]["image"][4:6]).all()


@pytest.mark.parametrize("damage", [{"levels": 3}, {"delays_per_level": 8}, None])
def test_a_region_correlated_otherwise_or_damaged_is_left_out_and_named(damage, caplog):
    streams = all_partials(run_of())
    for i, message in enumerate(streams[1]):
        if isinstance(message, Result) and message.operator == "multitau":
            start = streams[1][0]
            other = MultiTau(start, ROIMAP, **(damage or {}))
            other.miss(message.n_frames)
            arrays = dict(other.partial())
            if damage is None:
                del arrays["weights"]
            streams[1][i] = replace(message, arrays=arrays)
    sink = merged(interleaved(streams, 0))
    results = sink.results(final=True)
    assert results["run-1", "ledger"]["missing_regions"].tolist() == [1]
    assert np.isfinite(results["run-1", "multitau"]["g2"]).any()
    assert "region 1 cannot be merged" in caplog.text
    assert sink.outputs[-1].exit_status == "fail"


@pytest.mark.parametrize(
    "damage",
    [
        {"lag": np.zeros(2)},
        {"lost": np.array(np.inf)},
        {"checkpoint": np.array(np.inf)},
        {"frame_age": np.zeros(2)},
        {"node": np.zeros((3, 3), np.uint8)},
    ],
)
def test_what_is_no_ledger_is_named_and_left_out(damage, caplog):
    streams = all_partials(run_of())
    for i, message in enumerate(streams[1]):
        if isinstance(message, Result) and message.operator == "ledger":
            streams[1][i] = replace(message, arrays={**message.arrays, **damage})
    merger = Merger(operators, patience=1e9)
    for message in (each for stream in streams for each in stream if not isinstance(each, RunStop)):
        list(merger.take(message))
    assert [each.operator for each in merger.interim()][-1] == "ledger"
    [heartbeat] = merger.heartbeats()
    assert np.isnan(heartbeat.arrays["lag"]).tolist() == [False, True, False, False]
    assert "a ledger of region 1 is no ledger" in caplog.text


def test_a_region_whose_last_operator_does_not_merge_leaves_no_trace(monkeypatch):
    streams = all_partials(run_of())
    merge_as_ever = Intensity.merge

    def refuse(self, other):
        if other._start.region == 2:
            raise OverflowError("too bright")
        merge_as_ever(self, other)

    monkeypatch.setattr(Intensity, "merge", refuse)
    sink = merged(interleaved(streams, 0))
    results = sink.results(final=True)
    assert results["run-1", "ledger"]["missing_regions"].tolist() == [2]
    assert np.isnan(results["run-1", "scattering"]["image"][4:6]).all()


def test_of_runs_of_one_name_the_newest_has_a_heartbeat():
    merger = Merger(operators, patience=1e9)
    for when in ("2026-11-22T00:00:00+00:00", "2026-11-22T01:00:00+00:00"):
        start = next(Regions(REGIONS).cut(replace(run_of()[0], metadata={"start_time": when})))
        list(merger.take(start))
    assert len(merger.open_runs) == 2
    assert len(list(merger.heartbeats())) == 1


def test_the_age_of_frames_is_that_of_regions_that_have_not_ended():
    streams = all_partials(run_of())
    merger = Merger(operators, patience=1e9)
    for message in (*streams[0], *(each for stream in streams[1:] for each in stream[:-1])):
        if isinstance(message, Result) and message.operator == "ledger":
            age = 1e6 if message.region == 0 else 1.0
            message = replace(message, arrays={**message.arrays, "frame_age": np.array(age)})
        list(merger.take(message))
    [*_, ledger] = merger.interim()
    assert 1 <= ledger.arrays["frame_age"] < 1e6
