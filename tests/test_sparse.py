"""Frames of few photons, correlated photon by photon, give what the same frames give row by row: bit for bit."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.messages import FrameBatch
from stream.operators.kernels import sparse
from stream.operators.kernels.layout import ROOM, TILE
from stream.operators.multitau import MultiTau
from tests import reference
from tests.conftest import events_of, make_roimap, make_start

SHAPE = (5, 100)
"""Two tiles, of which the second begins in the first."""

ROIMAP = make_roimap(SHAPE)


def thin_frames(n, mean, shape=SHAPE, seed=0):
    """Photons that come more often to some pixels than to others."""
    rng = np.random.default_rng(seed)
    return rng.poisson(mean * rng.exponential(1, shape), (n, *shape)).astype("<u2")


def spans_of(came, batch):
    """(begin, end) of batches of at most `batch` frames, none of which is missing."""
    edges = [0, *(np.flatnonzero(np.diff(came)) + 1), len(came)]
    return [(i, min(i + batch, end)) for begin, end in pairwise(edges) if came[begin] for i in range(begin, end, batch)]


def push(operator, frames, spans, kind):
    """Push spans of frames, of which `kind` makes what is sent."""
    for begin, end in spans:
        part = kind(frames[begin:end])
        operator.push(FrameBatch(run="run-1", first=begin, frames=part, timestamp_ns=0))
    return operator


def dense(frames):
    return frames


def make(frames, roimap=ROIMAP, **options):
    start = make_start(frames.shape[1:], dtype=frames.dtype.str, saturation_value=np.iinfo(frames.dtype).max - 1)
    return MultiTau(start, roimap, **options)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same_state(a, b):
    assert_same(a.result(), b.result())
    assert_same(a.snapshot(), b.snapshot())


def assert_sparse_is_dense(frames, *, came=None, batch=1000, **options):
    spans = spans_of(np.ones(len(frames), bool) if came is None else came, batch)
    assert_same_state(
        push(make(frames, **options), frames, spans, events_of), push(make(frames, **options), frames, spans, dense)
    )


@pytest.mark.parametrize("mean", [0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3])
def test_photons_of_any_rate(mean):
    assert_sparse_is_dense(thin_frames(7000, mean))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("mean", [1e-3, 0.03])
def test_photons_at_any_delays_per_level(d, mean):
    assert_sparse_is_dense(thin_frames(4500, mean, seed=d), delays_per_level=d)


@pytest.mark.parametrize("levels", [1, 3, 4, 5, 9, 10, 28])
def test_photons_at_any_number_of_levels(levels):
    assert_sparse_is_dense(thin_frames(4500, 0.002), levels=levels)


@pytest.mark.parametrize("batch", [1, 50, 255, 256, 5000])
def test_photons_in_batches_of_any_length(batch):
    assert_sparse_is_dense(thin_frames(4500, 0.01), batch=batch)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_photons_on_any_number_of_threads(threads):
    shape = (20, 128)
    assert_sparse_is_dense(thin_frames(2500, 0.01, shape), roimap=make_roimap(shape, 12, 3), threads=threads)


def test_the_error_per_pixel_of_photons():
    assert_sparse_is_dense(thin_frames(2500, 0.02), error="pixel")


def test_pixels_on_which_every_photon_falls():
    """Their pairs are more than those of all others, at every delay."""
    frames = thin_frames(3000, 1e-3)
    frames[:, 0, ::40] = 2
    frames[::2, 4, 99] = 1
    assert_sparse_is_dense(frames)


def test_more_photons_of_a_tile_in_a_block_than_there_is_room_for():
    frames = thin_frames(33_000, 0.03, (1, TILE))
    assert np.count_nonzero(frames[2**14 : 2**15]) > ROOM
    assert_sparse_is_dense(frames, roimap=make_roimap((1, TILE)))


@pytest.mark.parametrize("lost", [3e-4, 3e-3, 0.1])
def test_photons_of_runs_with_lost_frames(lost):
    frames = thin_frames(7000, 0.01)
    came = np.random.default_rng(1).random(len(frames)) >= lost
    assert_sparse_is_dense(frames, came=came)


@pytest.mark.parametrize("length", [1, 16, 255, 256, 257, 1500])
def test_photons_before_and_after_a_gap(length):
    frames = thin_frames(6000, 0.01)
    came = np.ones(len(frames), bool)
    came[2345 : 2345 + length] = False
    assert_sparse_is_dense(frames, came=came)


def test_results_asked_for_in_between_change_nothing():
    frames = thin_frames(6000, 0.01)
    rng = np.random.default_rng(2)
    came = np.ones(len(frames), bool)
    came[3000:3100] = False
    asked, thin, rows = make(frames), make(frames), make(frames)
    for span in spans_of(came, 37):
        for operator, kind in ((asked, events_of), (thin, events_of), (rows, dense)):
            push(operator, frames, [span], kind)
        if rng.random() < 0.1:
            assert_same(asked.result(), rows.result())
    assert_same_state(asked, rows)
    assert_same_state(thin, rows)


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
def test_pixels_that_leave_among_photons(dtype):
    rng = np.random.default_rng(3)
    frames = thin_frames(5000, 0.01).astype(dtype)
    top = np.iinfo(dtype).max
    frames[:, 1, 3:6] = top
    frames[rng.integers(0, len(frames), 12), rng.integers(0, 5, 12), rng.integers(0, 100, 12)] = top
    frames[4000:, 3, 7] = top - 1
    assert_sparse_is_dense(frames)


@pytest.mark.parametrize("count", [255, 256, sparse.BRIGHTEST, sparse.BRIGHTEST + 1, 9000, 65534])
def test_one_bright_photon_among_others(count):
    frames = thin_frames(5000, 0.003)
    frames[[300, 1029, 3100], 1, 2] = count
    frames[3101, 1, 2] = count
    assert_sparse_is_dense(frames)


@pytest.mark.parametrize("where", [2047, 4095, 4088])
def test_counts_just_before_photons_are_looked_at_one_by_one(where):
    """What is kept of them meets the photons of the next block."""
    frames = thin_frames(6500, 0.003)
    frames[where - 5 : where + 1, 0, :50] = 40
    assert_sparse_is_dense(frames)


@pytest.mark.parametrize("begin", [4096, 4099])
def test_high_counts_in_the_frames_before_the_first_whole_coarse_one(begin):
    """Asking for a result makes a block begin in mid coarse frame; until the next one, rows are taken."""
    frames = thin_frames(6500, 0.01)
    frames[4104:4112, 1, 2] = 300
    thin, rows = (push(make(frames), frames, [(0, begin)], kind) for kind in (events_of, dense))
    assert_same(thin.result(), rows.result())
    rest = [(begin, len(frames))]
    assert_same_state(push(thin, frames, rest, events_of), push(rows, frames, rest, dense))


def test_rows_and_photons_may_take_turns():
    frames = thin_frames(9000, 0.01)
    frames[4000:4700] = np.random.default_rng(4).poisson(2, (700, *SHAPE))
    spans = spans_of(np.ones(len(frames), bool), 300)
    rng = np.random.default_rng(5)
    turns = make(frames)
    for begin, end in spans:
        is_dense = 4000 <= begin < 4700 or rng.random() < 0.2
        push(turns, frames, [(begin, end)], dense if is_dense else events_of)
    assert_same_state(turns, push(make(frames), frames, spans, dense))


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 200)),
    n=st.integers(1, 3000),
    mean=st.sampled_from([1e-3, 0.01, 0.03, 0.2]),
    lost=st.sampled_from([0, 0, 1e-3]),
    above=st.sampled_from([0, 1e-6, 1e-5]),
    batch=st.integers(20, 3000),
    d=st.integers(1, 9),
    levels=st.integers(1, 16),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100)
def test_whatever_comes_as_photons(shape, n, mean, lost, above, batch, d, levels, seed):
    rng = np.random.default_rng(seed)
    frames = thin_frames(n, mean, shape, seed)
    frames[rng.random(frames.shape) < above] = rng.choice([300, 9000, 65535])
    static = rng.integers(0, 4, shape)
    static[:, rng.integers(0, shape[1]) :] = 0
    static[0, 0] = 1
    roimap = type(ROIMAP)(static_roi_map=static, dynamic_roi_map=(static > 0).astype(int))
    came = rng.random(n) >= lost
    assert_sparse_is_dense(frames, came=came, roimap=roimap, batch=batch, delays_per_level=d, levels=levels)


@pytest.mark.parametrize(("d", "mean", "lost"), [(4, 0.01, 0), (4, 0.03, 1e-3), (2, 0.01, 1e-3), (1, 0.02, 0)])
def test_photons_correlate_as_defined(d, mean, lost):
    shape = (2, 30)
    frames = thin_frames(1500, 1, shape) * (thin_frames(1500, mean, shape, seed=1) > 0)
    roimap = make_roimap(shape, 4, 2)
    came = np.random.default_rng(6).random(len(frames)) >= lost
    came[-1] = True
    result = push(make(frames, roimap, delays_per_level=d), frames, spans_of(came, 200), events_of).result()
    static = roimap.static_roi_map.ravel()
    expected = reference.multitau(frames, static, roimap.dynamic_of_static, d=d, came=came)
    for name in ("delay", "n_pairs", "G2", "IP", "IF", "g2"):
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-13, atol=0, err_msg=name)


@pytest.mark.parametrize("at", [1, 700, 2048, 3333])
@pytest.mark.parametrize("back", [events_of, dense])
def test_photons_go_on_after_a_restart(at, back):
    frames = thin_frames(5000, 0.01)
    frames[[40, 2000, 3500], 2, 9] = 65535
    first = push(make(frames), frames, [(0, at)], events_of)
    second = make(frames)
    second.restore(first.snapshot())
    spans = [(i, min(i + 500, len(frames))) for i in range(at, len(frames), 500)]
    push(second, frames, spans, back)
    assert_same_state(second, push(make(frames), frames, [(0, at), *spans], dense))


@pytest.mark.parametrize("n_upper", [3500, 5000])
def test_regions_of_photons_merge_as_regions_of_rows_do(n_upper):
    frames = thin_frames(5000, 0.01, (7, 100))
    roimap = make_roimap((7, 100))

    def merged(kind):
        upper, lower = (
            MultiTau(make_start((rows, 100), origin=(row, 0), detector_shape=(7, 100)), roimap)
            for row, rows in ((0, 4), (4, 3))
        )
        push(upper, frames[:, :4], [(i, i + 100) for i in range(0, n_upper, 100)], kind)
        push(lower, frames[:, 4:], [(i, i + 250) for i in range(0, 5000, 250)], kind)
        lower.merge(upper)
        return lower.result()

    assert_same(merged(events_of), merged(dense))
    if n_upper == len(frames):
        assert_same(merged(events_of), push(make(frames, roimap), frames, [(0, 5000)], dense).result())
