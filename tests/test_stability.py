"""g2 of successive parts of a run, and that it is exact however the frames came."""

from itertools import pairwise
from threading import Event, Timer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.errors import CheckpointError
from stream.messages import FrameBatch
from stream.operators.multitau import MultiTau
from stream.operators.roimap import RoiMap
from stream.operators.stability import affordable
from tests.conftest import events_of, make_roimap, make_start
from tests.conftest import push as push_frames
from tests.reference import multitau_segments

SHAPE = (3, 10)
ROIMAP = make_roimap(SHAPE)
STATIC = ROIMAP.static_roi_map.ravel()
TOLERANCE = {"rtol": 1e-12, "atol": 0}


def ageing(n, seed=0, dtype="<u2", shape=SHAPE):
    """Frames of speckle that becomes slower and brighter."""
    rng = np.random.default_rng(seed)
    wave = np.cumsum(np.linspace(0.5, 0.05, n))[:, None, None] + rng.random(shape) * 6
    return rng.poisson(np.linspace(2, 5, n)[:, None, None] * (1 + 0.8 * np.sin(wave))).astype(dtype)


def start_of(shape=SHAPE, **changes):
    return make_start(shape, saturation_value=60, **changes)


def assert_agrees(result, frames, **options):
    expected = multitau_segments(frames, STATIC, ROIMAP.dynamic_of_static, saturation_value=60, **options)
    np.testing.assert_array_equal(result["segment_start"], expected["start"])
    np.testing.assert_array_equal(result["segment_stop"], expected["stop"])
    np.testing.assert_array_equal(result["n_pairs_segments"], expected["n_pairs"])
    np.testing.assert_allclose(result["g2_segments"], expected["g2"], **TOLERANCE)
    np.testing.assert_allclose(result["g2_err_segments"], expected["g2_err_static"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (100, {}),  # one segment
        (256, {}),
        (257, {}),
        (1000, {}),  # the last is unfinished
        (2048, {}),  # as many as there may be
        (2049, {}),  # longer ones, all of them whole but the last
        (1800, {"segments": 3}),  # of which one has no neighbour
        (900, {"d": 2, "levels": 3}),
    ],
)
def test_segments_agree_with_the_definition(n, options):
    frames = ageing(n)
    given = {"delays_per_level" if name == "d" else name: value for name, value in options.items()}
    assert_agrees(push_frames(MultiTau(start_of(), ROIMAP, **given), frames, batch=333).result(), frames, **options)


def test_segments_agree_with_the_definition_where_frames_are_lost_and_pixels_leave():
    frames = ageing(1500)
    frames[700, 1, 2] = frames[256, 0, :4] = frames[255, 2, 3] = 61
    rng = np.random.default_rng(1)
    came = rng.random(1500) < 0.95
    came[300:620] = False  # ends of segments are in it
    came[700] = came[256] = came[255] = True
    operator = push_frames(MultiTau(start_of(), ROIMAP), frames, came=came)
    operator.miss(1500)
    assert_agrees(operator.result(), frames, came=came)


def test_segments_of_one_that_is_everything_are_the_whole_run():
    result = push_frames(MultiTau(start_of(), ROIMAP), ageing(200)).result()
    np.testing.assert_array_equal(result["g2_segments"], result["g2"][None])
    np.testing.assert_array_equal(result["g2_err_segments"], result["g2_err"][None])
    np.testing.assert_array_equal(result["n_pairs_segments"], result["n_pairs"][None])


def test_segments_show_that_the_dynamics_slow_down():
    result = push_frames(MultiTau(start_of(), ROIMAP), ageing(2048)).result()
    at = np.searchsorted(result["delay"], 4)
    falls = result["g2_segments"][:, 0] - result["g2_segments"][:, at]
    assert (falls[0] > 4 * falls[-1]).all()


def test_without_segments_nothing_is_told_of_them():
    result = push_frames(MultiTau(start_of(), ROIMAP, segments=0), ageing(600)).result()
    assert result["g2_segments"].shape == (0, *result["g2"].shape)
    assert result["segment_start"].shape == (0,)


@pytest.mark.parametrize("segments", [-1, 65])
def test_other_numbers_of_segments_are_refused(segments):
    with pytest.raises(ValueError, match=f"segments: {segments}"):
        MultiTau(start_of(), ROIMAP, segments=segments)


# The laws of operators (tests/test_operator_laws.py) once more, in runs of many segments.

LONGEST = 5000
FRAMES = ageing(LONGEST)
FRAMES[np.random.default_rng(2).random(FRAMES.shape) < 2e-5] = 61


@st.composite
def runs(draw):
    """Spans of frames, dense or events, between which some are lost."""
    edges = sorted(draw(st.sets(st.integers(0, LONGEST), min_size=2, max_size=6)))
    spans = [(begin, end) for begin, end in pairwise(edges) if draw(st.integers(0, 3))]
    return spans or [(edges[0], edges[-1])]


def push(operator, spans, *, step=LONGEST, sparse=0, rows=slice(None)):
    for begin, end in spans:
        for i, first in enumerate(range(begin, end, step)):
            frames = FRAMES[first : min(first + step, end), rows]
            given = events_of(frames) if sparse >> i % 3 & 1 else frames
            operator.push(FrameBatch(run="run-1", first=first, frames=given, timestamp_ns=0))
    return operator


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


few = settings(max_examples=25)


@few
@given(spans=runs(), step=st.integers(40, 3000), sparse=st.integers(0, 7), segments=st.integers(0, 9))
def test_how_frames_are_batched_does_not_matter(spans, step, sparse, segments):
    whole, cut_up = (MultiTau(start_of(), ROIMAP, segments=segments) for _ in range(2))
    push(whole, spans)
    push(cut_up, spans, step=step, sparse=sparse)
    assert_same(whole.result(), cut_up.result())
    assert_same(whole.snapshot(), cut_up.snapshot())


@few
@given(spans=runs(), step=st.integers(40, 3000))
def test_asking_for_a_result_changes_nothing(spans, step):
    asked = MultiTau(start_of(), ROIMAP)
    for begin, end in spans:
        for first in range(begin, end, step):
            push(asked, [(first, min(first + step, end))]).result()
            asked.partial()
    unasked = push(MultiTau(start_of(), ROIMAP), spans)
    assert_same(asked.snapshot(), unasked.snapshot())


@few
@given(spans=runs(), at=st.integers(0, 5))
def test_a_restored_operator_goes_on_as_if_nothing_had_happened(spans, at):
    first, second = push(MultiTau(start_of(), ROIMAP), spans[:at]), MultiTau(start_of(), ROIMAP)
    second.restore(first.snapshot())
    push(second, spans[at:])
    whole = push(MultiTau(start_of(), ROIMAP), spans)
    assert_same(second.snapshot(), whole.snapshot())
    assert_same(second.result(), whole.result())


def test_sums_of_segments_that_take_two_words_are_kept():
    frames = np.random.default_rng(4).integers(2**31, 2**32, (600, *SHAPE), np.uint32)
    first, second = (MultiTau(make_start(SHAPE, dtype="<u4"), ROIMAP, levels=3) for _ in range(2))
    second.restore(push_frames(first, frames).snapshot())
    result = second.result()
    assert result["g2_segments"].shape[0] == 3
    assert_same(result, first.result())
    expected = multitau_segments(frames, STATIC, ROIMAP.dynamic_of_static, levels=3)
    np.testing.assert_allclose(result["g2_segments"], expected["g2"], **TOLERANCE)


@few
@given(spans=runs(), row=st.integers(1, 2), is_partial=st.booleans(), error=st.sampled_from(["static", "pixel"]))
def test_regions_merge_into_the_whole_detector(spans, row, is_partial, error):
    regions = []
    for begin, end in ((0, row), (row, 3)):
        region = start_of((end - begin, 10), origin=(begin, 0), detector_shape=SHAPE)
        operator = push(MultiTau(region, ROIMAP, error=error), spans, rows=slice(begin, end))
        regions.append(MultiTau(region, ROIMAP, error=error) if is_partial else operator)
        if is_partial:
            regions[-1].restore(operator.partial())
    regions[1].merge(regions[0])
    assert_same(regions[1].result(), push(MultiTau(start_of(), ROIMAP, error=error), spans).result())


def test_what_was_merged_can_take_over_other_sums():
    """As a merger does, all the time."""
    regions = [start_of((end - begin, 10), origin=(begin, 0), detector_shape=SHAPE) for begin, end in ((0, 1), (1, 3))]
    streams = [MultiTau(region, ROIMAP) for region in regions]
    restored = [MultiTau(region, ROIMAP) for region in regions]
    for span in ((0, 700), (700, 1000), (1000, 3000)):
        for stream, other, rows in zip(streams, restored, (slice(0, 1), slice(1, 3)), strict=True):
            other.restore(push(stream, [span], rows=rows).partial())
        restored[0].merge(restored[1])
        assert_same(restored[0].result(), push(MultiTau(start_of(), ROIMAP), [(0, span[1])]).result())


def test_regions_that_lost_different_frames_tell_the_pairs_of_the_poorer_one():
    frames = ageing(1500)
    rng = np.random.default_rng(3)
    operators = []
    for row in (0, 1):
        operator = MultiTau(start_of((1, 10), origin=(row, 0), detector_shape=SHAPE), ROIMAP)
        push_frames(operator, frames[:, row : row + 1], came=rng.random(1500) < 0.9)
        operators.append(operator)
    n_frames = max(operator.n_frames for operator in operators)
    for operator in operators:
        operator.miss(n_frames)
    alone = [operator.result()["n_pairs_segments"] for operator in operators]
    operators[0].merge(operators[1])
    np.testing.assert_array_equal(operators[0].result()["n_pairs_segments"], np.minimum(*alone))


@pytest.mark.parametrize(("per_bin", "segments"), [(2, 4), (1, 2)])
def test_regions_of_many_static_bins_have_the_segments_of_the_whole(per_bin, segments):
    shape, n = (30, 50), 900
    static = (np.arange(1500, dtype=np.int32) // per_bin + 1).reshape(shape)
    roimap = RoiMap(static_roi_map=static, dynamic_roi_map=np.where(static % 2, 1, 2).astype(np.int32))
    frames = ageing(n, shape=shape)
    whole = push_frames(MultiTau(start_of(shape), roimap), frames)
    regions = []
    for rows, stop in ((slice(0, 10), n), (slice(10, 30), 600)):
        start = start_of((rows.stop - rows.start, 50), origin=(rows.start, 0), detector_shape=shape)
        first, second, sent = (MultiTau(start, roimap) for _ in range(3))
        second.restore(push_frames(first, frames[:stop, rows]).snapshot())
        if stop < n:
            second.push(FrameBatch(run="run-1", first=stop, frames=frames[stop:, rows].copy(), timestamp_ns=0))
        sent.restore(second.partial())
        regions.append(sent)
    regions[0].merge(regions[1])
    assert_same(regions[0].result(), whole.result())
    assert len(whole.result()["segment_start"]) == segments


@pytest.mark.parametrize(("n_static", "segments"), [(1, 8), (421, 8), (422, 7), (1686, 2), (1687, 0), (100_000, 0)])
def test_segments_are_as_many_as_a_record_has_room_for(n_static, segments):
    assert affordable(8, 4 * 17, n_static) == segments


def test_with_errors_of_pixels_there_are_no_segments():
    result = push_frames(MultiTau(start_of(), ROIMAP, error="pixel"), ageing(600)).result()
    assert result["segment_start"].shape == (0,)


def test_an_end_of_a_segment_takes_only_the_delays_that_there_are(monkeypatch):
    """All of them, most of which are empty, took several times as long as the frames."""
    operator, told = MultiTau(start_of(), ROIMAP), []
    monkeypatch.setattr(operator, "_totals", lambda *given: told.append(given) or MultiTau._totals(operator, *given))
    push_frames(operator, ageing(256))
    assert told == [(27,)]


def test_a_snapshot_is_of_before_the_merge():
    regions = [
        push(MultiTau(start_of((1, 10), origin=(row, 0), detector_shape=SHAPE), ROIMAP), [(0, 600)], rows=[row])
        for row in (0, 1)
    ]
    expected = dict(regions[0].snapshot())
    go_on = Event()
    regions[0]._copier.submit(go_on.wait, 30)  # the copy comes late
    late = regions[0].snapshot()
    Timer(0.1, go_on.set).start()
    regions[0].merge(regions[1])
    assert_same(dict(late), expected)


def test_segments_of_other_frames_are_not_merged():
    one, two = (push(MultiTau(start_of(), ROIMAP), [(0, n)]) for n in (600, 900))
    with pytest.raises(ValueError, match="cannot be merged"):
        one._stability.merged(two._stability, one._so_far(600), two._so_far(900))


@pytest.mark.parametrize(
    "damage",
    [
        {"segment_length": np.array(0)},
        {"segment_length": np.array([256])},
        {"segment_length": np.array(512)},
        {"segment_length": np.array(np.inf)},
        {"segment_length": np.array(256.0)},
        {"segment_pairs": np.zeros((2, 27))},
        {"segment_sums": np.zeros((1, 2, 4, 27, 6))},
        {"segment_pairs": np.zeros((1, 27), np.int64), "segment_sums": np.zeros((1, 1, 4, 27, 6), np.int64)},
        {"segment_pairs": np.zeros((2, 99), np.int64), "segment_sums": np.zeros((1, 2, 4, 99, 6), np.int64)},
        {"segment_length": np.array(300)},
        {"segment_pairs": np.zeros((9, 1), np.int64)},
        {"segment_sums": np.zeros((1, 2, 4, 30, 7), np.int64)},
        {"segment_sums": np.zeros(5, np.int64)},
        {"segment_sums": np.zeros((3, 0, 4, 0, 6), np.int64), "segment_pairs": np.zeros((0, 0), np.int64)},
    ],
)
def test_segments_that_do_not_fit_are_refused(damage):
    operator = push(MultiTau(start_of(), ROIMAP), [(0, 700)])
    with pytest.raises(CheckpointError, match="segments"):
        MultiTau(start_of(), ROIMAP).restore({**operator.partial(), **damage})


def test_a_state_made_with_another_number_of_segments_is_refused():
    with pytest.raises(CheckpointError, match="another parameters"):
        MultiTau(start_of(), ROIMAP).restore(MultiTau(start_of(), ROIMAP, segments=4).snapshot())
