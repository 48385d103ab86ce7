"""What every operator promises, bit for bit: see `stream.protocols.Operator`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import CheckpointError, RoiMapError
from stream.messages import FrameBatch
from stream.operators.intensity import Intensity
from stream.operators.multitau import MultiTau
from stream.operators.roimap import RoiMap
from stream.operators.scattering import Scattering
from stream.operators.twotime import TwoTime
from tests.conftest import events_of, make_roimap, make_start
from tests.conftest import push as push_frames

SHAPE = (6, 50)
ROIMAP = make_roimap(SHAPE)


def multitau_per_pixel(start, roimap, **options):
    return MultiTau(start, roimap, error="pixel", **options)


def twotime(start, roimap, **options):
    return TwoTime(start, roimap, frames=16, levels=4, **options)


def twotime_per_static_bin(start, roimap, **options):
    return twotime(start, roimap, normalisation="static", bins=[2, 1], **options)


every_operator = pytest.mark.parametrize(
    "make", [MultiTau, multitau_per_pixel, Scattering, Intensity, twotime, twotime_per_static_bin]
)


class Mixed:
    """Frames of which a batch comes dense or as `Events`, by the number of its first frame."""

    def __init__(self, frames, sparse):
        self.frames = frames
        self.sparse = sparse

    def __getitem__(self, key):
        span, *where = key if isinstance(key, tuple) else (key,)
        if where:
            return Mixed(self.frames[span, *where], self.sparse)
        part = self.frames[span]
        return events_of(part) if self.sparse[span.start % len(self.sparse)] else part


@st.composite
def streams(draw):
    """Frames of any dtype with saturated pixels, cut into batches, dense or events, some of which never come."""
    dtype = draw(st.sampled_from(["|u1", "<u2", "<u4"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    top = draw(st.sampled_from([3, 200, np.iinfo(dtype).max]))
    frames = rng.integers(0, top, (sum(lengths), *SHAPE), dtype)
    frames[rng.random(frames.shape) < draw(st.sampled_from([0, 1e-4]))] = np.iinfo(dtype).max
    start = make_start(SHAPE, dtype=dtype, saturation_value=int(np.iinfo(dtype).max) - 1)
    ends = np.cumsum(lengths)
    came = [draw(st.booleans()) for _ in lengths[:-1]] + [True]
    spans = [(int(end - n), int(end)) for n, end, here in zip(lengths, ends, came, strict=True) if here]
    dark = rng.random(frames.shape) < draw(st.sampled_from([0, 0.99]))
    frames[dark] = 0
    frames[:, rng.random(SHAPE) < draw(st.sampled_from([0, 0.02]))] = np.iinfo(dtype).max
    return start, Mixed(frames, draw(st.lists(st.booleans(), min_size=1, max_size=7))), spans


def push(operator, frames, spans):
    for begin, end in spans:
        operator.push(FrameBatch(run="run-1", first=begin, frames=frames[begin:end], timestamp_ns=0))
    return operator


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@every_operator
@given(stream=streams(), cut=st.integers(1, 100))
def test_how_frames_are_batched_does_not_matter(make, stream, cut):
    start, frames, spans = stream
    pieces = [(i, min(i + cut, end)) for begin, end in spans for i in range(begin, end, cut)]
    whole, cut_up = push(make(start, ROIMAP), frames, spans), push(make(start, ROIMAP), frames, pieces)
    assert_same(whole.result(), cut_up.result())
    assert_same(whole.snapshot(), cut_up.snapshot())


@every_operator
@given(stream=streams())
def test_events_and_dense_frames_are_the_same(make, stream):
    start, frames, spans = stream
    dense, sparse = (push(make(start, ROIMAP), Mixed(frames.frames, [kind]), spans) for kind in (False, True))
    assert_same(dense.result(), sparse.result())
    assert_same(dense.snapshot(), sparse.snapshot())


@every_operator
@given(stream=streams(), at=st.integers(0, 5))
def test_a_restored_operator_goes_on_as_if_nothing_had_happened(make, stream, at):
    start, frames, spans = stream
    first = push(make(start, ROIMAP), frames, spans[:at])
    second = make(start, ROIMAP)
    second.restore(first.snapshot())
    assert second.n_frames == first.n_frames
    assert_same(push(second, frames, spans[at:]).result(), push(make(start, ROIMAP), frames, spans).result())


@every_operator
@given(stream=streams())
def test_a_snapshot_does_not_change_with_later_frames(make, stream):
    start, frames, spans = stream
    operator = push(make(start, ROIMAP), frames, spans[:1])
    snapshot = operator.snapshot()
    kept = {name: array.copy() for name, array in snapshot.items()}
    push(operator, frames, spans[1:])
    assert_same(snapshot, kept)


@every_operator
@given(stream=streams(), row=st.integers(1, SHAPE[0] - 1))
def test_regions_merge_into_the_whole_detector(make, stream, row):
    start, frames, spans = stream
    changes = {"dtype": start.dtype, "saturation_value": start.saturation_value, "detector_shape": SHAPE}
    upper = make(make_start((row, SHAPE[1]), **changes), ROIMAP)
    lower = make(make_start((SHAPE[0] - row, SHAPE[1]), origin=(row, 0), **changes), ROIMAP)
    push(upper, frames[:, :row], spans)
    push(lower, frames[:, row:], spans)
    lower.merge(upper)
    assert_same(lower.result(), push(make(start, ROIMAP), frames, spans).result())


@every_operator
@given(stream=streams(), row=st.integers(1, SHAPE[0] - 1), missing=st.sampled_from([0, 0, 1, 300]))
def test_partial_sums_of_regions_merge_into_the_whole_detector_and_the_regions_go_on(make, stream, row, missing):
    start, frames, spans = stream
    n_frames = spans[-1][1] + missing
    changes = {"dtype": start.dtype, "saturation_value": start.saturation_value, "detector_shape": SHAPE}
    upper = make_start((row, SHAPE[1]), **changes)
    lower = make_start((SHAPE[0] - row, SHAPE[1]), origin=(row, 0), **changes)
    restored = []
    for region, rows in ((upper, slice(0, row)), (lower, slice(row, None))):
        part = frames[:, rows]
        operator = push(make(region, ROIMAP), part, spans)
        operator.miss(n_frames)
        restored.append(make(region, ROIMAP))
        restored[-1].restore(operator.partial())
        again = part[slice(*spans[0])]
        operator.push(FrameBatch(run="run-1", first=n_frames, frames=again, timestamp_ns=0))
        assert operator.n_frames == n_frames + len(again)
    restored[1].merge(restored[0])
    whole = push(make(start, ROIMAP), frames, spans)
    whole.miss(n_frames)
    assert_same(restored[1].result(), whole.result())


@every_operator
@given(seed=st.integers(0, 99))
def test_regions_that_lost_different_frames_merge(make, seed):
    """Every bin lies in one region, so that each static bin must come out as in that region alone."""
    rng = np.random.default_rng(seed)
    static = np.repeat([[1], [2], [3], [4]], 50, axis=1)
    roimap = RoiMap(static_roi_map=static, dynamic_roi_map=-(-static // 2))
    frames = rng.poisson(2, (70, 4, 50)).astype("<u2")
    upper, lower = (make(make_start((2, 50), origin=(row, 0), detector_shape=(4, 50)), roimap) for row in (0, 2))
    for operator, part in ((upper, frames[:, :2]), (lower, frames[:, 2:])):
        push_frames(operator, part, came=rng.random(70) < 0.8)
    alone, n_frames = upper.result(), (upper.n_frames, lower.n_frames)
    lower.merge(upper)
    assert lower.n_frames == max(n_frames)
    merged = lower.result()
    if "G2" in merged and n_frames[0] == max(n_frames):
        for name in ("G2", "IP", "IF", "g2"):
            half = merged[name].shape[1] // 2
            np.testing.assert_array_equal(merged[name][:, :half], alone[name][:, :half])
        assert (merged["n_pairs"] <= alone["n_pairs"]).all()
    if "c2" in merged and n_frames[0] == max(n_frames):
        np.testing.assert_array_equal(merged["c2"][:, :1], alone["c2"][:, :1])
        assert (merged["n_came"] <= alone["n_came"]).all()
    if "scattering_1d" in merged:
        np.testing.assert_array_equal(merged["scattering_1d"][:2], alone["scattering_1d"][:2])


@every_operator
@given(stream=streams())
def test_asking_for_a_result_changes_nothing(make, stream):
    start, frames, spans = stream
    asked = make(start, ROIMAP)
    for span in spans:
        push(asked, frames, [span])
        asked.result()
    unasked = push(make(start, ROIMAP), frames, spans)
    assert_same(asked.snapshot(), unasked.snapshot())
    assert_same(asked.result(), unasked.result())


@every_operator
def test_a_result_before_the_first_frame_has_no_values_and_is_no_error(make):
    for name, array in make(make_start(SHAPE), ROIMAP).result().items():
        assert name in ("origin", "bins") or not np.isfinite(array).any()


@every_operator
def test_a_state_made_with_other_roi_maps_is_refused(make):
    other = make(make_start(SHAPE), make_roimap(SHAPE, seed=1))
    with pytest.raises(CheckpointError, match="another roimap"):
        make(make_start(SHAPE), ROIMAP).restore(other.snapshot())


@every_operator
def test_a_state_of_another_region_is_refused(make):
    other = make(make_start((3, 50), detector_shape=SHAPE), ROIMAP)
    with pytest.raises(CheckpointError, match="another region"):
        make(make_start(SHAPE), ROIMAP).restore(other.snapshot())


def test_a_state_made_with_other_delays_is_refused():
    with pytest.raises(CheckpointError, match="another parameters"):
        MultiTau(make_start(), ROIMAP).restore(MultiTau(make_start(), ROIMAP, delays_per_level=8).snapshot())


@every_operator
def test_a_roi_map_of_another_detector_is_refused(make):
    with pytest.raises(RoiMapError, match=r"\(6, 50\).*\(6, 51\)"):
        make(make_start((6, 51)), ROIMAP)
    with pytest.raises(RoiMapError, match=r"\(6, 50\).*\(3, 50\)"):
        make(make_start((3, 50)), ROIMAP)
