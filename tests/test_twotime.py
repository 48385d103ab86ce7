"""Two-time correlation is what `reference` computes from the definition."""

from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.config import check
from stream.correlators import operators_of
from stream.errors import CheckpointError, ConfigError
from stream.messages import FrameBatch
from stream.operators.kernels.twotime import products
from stream.operators.roimap import RoiMap
from stream.operators.twotime import HEAD_BYTES, SEGMENTS, TwoTime, partial_bytes
from stream.wire import pack_arrays
from tests import reference
from tests.conftest import make_roimap, make_start, push
from tests.plane import Plane, until_said
from tests.test_command_line import xpcs_stream
from tests.test_kill import assert_identical, contents, frames, free, qmap

__all__ = ["frames", "qmap"]

TWO_TIME = ("--two-time", 64)
EXACT = {"rtol": 1e-13, "atol": 0, "equal_nan": True}


def correlate(frames, roimap, /, *, came=None, batch=1000, saturation_value=None, **options):
    start = make_start(frames.shape[1:], dtype=frames.dtype.str, saturation_value=saturation_value)
    return push(TwoTime(start, roimap, **options), frames, came=came, batch=batch).result()


def assert_as_defined(
    result, frames, roimap, *, kept, levels, normalisation="dynamic", came=None, saturation_value=None
):
    flat = frames.reshape(len(frames), -1)
    static, of_static = roimap.static_roi_map.ravel(), roimap.dynamic_of_static
    options = {"normalisation": normalisation, "came": came, "saturation_value": saturation_value}
    expected = reference.twotime(flat, static, of_static, kept=kept, levels=levels, **options)
    assert len(result["avg_frame"]) == len(expected)
    for level, values in enumerate(expected):
        n = len(values["n_came"])
        assert result["n_times"][level] == n
        assert result["first"][level] == values["first"]
        assert result["avg_frame"][level] == values["avg_frame"]
        np.testing.assert_array_equal(result["n_came"][level, :n], values["n_came"])
        np.testing.assert_allclose(result["c2"][level, :, :n, :n], values["c2"], err_msg=f"level {level}", **EXACT)
        assert np.isnan(result["c2"][level, :, n:]).all()
        assert np.isnan(result["c2"][level, :, :, n:]).all()
    last = expected[-1]["c2"]
    np.testing.assert_array_equal(result["delay"], np.arange(last.shape[1]) * expected[-1]["avg_frame"])
    np.testing.assert_allclose(result["tau"], result["delay"] * 0.01, rtol=1e-15)
    np.testing.assert_allclose(result["g2"], reference.along_diagonals(last), **EXACT)
    length = last.shape[1] // SEGMENTS
    assert result["g2_segments"].shape == (length, SEGMENTS, len(last))
    for i in range(SEGMENTS):
        part = slice(i * length, (i + 1) * length)
        segment = reference.along_diagonals(last[:, part, part])
        np.testing.assert_allclose(result["g2_segments"][:, i], segment, **EXACT)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 70),
    kept=st.integers(2, 17),
    levels=st.integers(1, 5),
    lost=st.sampled_from([0, 0.1, 0.8]),
    mean=st.sampled_from([0.02, 1, 40]),
    normalisation=st.sampled_from(["dynamic", "static"]),
    batch=st.sampled_from([1, 3, 64, 1000]),
)
def test_any_stream_correlates_as_defined(seed, n, kept, levels, lost, mean, normalisation, batch):
    rng = np.random.default_rng(seed)
    roimap = make_roimap((3, 20), seed=seed % 7)
    frames = rng.poisson(mean * rng.exponential(size=(n, 3, 20))).astype("<u2")
    frames[rng.random(frames.shape) < rng.choice([0, 1e-3])] = 65535
    came = rng.random(n) >= lost
    came[-1] = True
    options = {"levels": levels, "normalisation": normalisation}
    told = {"came": came, "saturation_value": 65534}
    result = correlate(frames, roimap, frames=kept, batch=batch, **options, **told)
    assert_as_defined(result, frames, roimap, kept=kept, **options, **told)


def test_a_pixel_that_leaves_is_forgotten_also_where_it_was_told_of(roimap):
    frames = np.random.default_rng(6).poisson(5, (20, 6, 50)).astype("<u2")
    frames[15, 3, :10] = 65535
    operator = TwoTime(make_start(saturation_value=65534), roimap, frames=8, levels=2)
    push(operator, frames[:12])
    operator.result()
    operator.push(FrameBatch(run="run-1", first=12, frames=frames[12:], timestamp_ns=0))
    assert_as_defined(operator.result(), frames, roimap, kept=8, levels=2, saturation_value=65534)


def test_what_ages_is_seen_at_its_time(roimap):
    """Speckles that stand still, and are others from frame 20 on."""
    rng = np.random.default_rng(0)
    still = rng.poisson(20, (2, 6, 50)) * rng.integers(0, 2, (2, 6, 50))
    frames = np.repeat(still, 20, axis=0).astype("<u2")
    c2 = correlate(frames, roimap, frames=64)["c2"][0]
    assert (c2[:, :20, :20] > 1.5).all()
    assert (c2[:, 20:, 20:] > 1.5).all()
    assert (c2[:, :20, 20:] < 1.4).all()


def test_lost_frames_are_unknown_and_never_filled(roimap):
    frames = np.random.default_rng(1).poisson(5, (12, 6, 50)).astype("<u2")
    came = np.ones(12, bool)
    came[[3, 6, 7]] = False
    result = correlate(frames, roimap, frames=8, levels=2, came=came)
    lost = np.flatnonzero(~came) - 4
    unknown = np.isnan(result["c2"][0]).all(axis=0)
    assert unknown.tolist() == [[i in lost or j in lost for j in range(8)] for i in range(8)]
    assert result["n_came"][1, :6].tolist() == [2, 1, 2, 0, 2, 2]
    assert np.isnan(result["c2"][1, :, 3, :]).all()


def test_the_newest_frames_stay_at_full_resolution_and_the_whole_run_is_kept_coarser(roimap):
    frames = np.random.default_rng(2).poisson(5, (100, 6, 50)).astype("<u2")
    result = correlate(frames, roimap, frames=16, levels=8)
    assert result["avg_frame"].tolist() == [1, 2, 4, 8]
    assert result["first"].tolist() == [84, 68, 36, 0]
    assert result["n_times"].tolist() == [16, 16, 16, 12]


def test_a_run_longer_than_what_is_kept_costs_no_more_memory(roimap):
    operator = TwoTime(make_start(), roimap, frames=4, levels=3)
    ones = np.ones((64, 6, 50), "<u2")
    sizes = set()
    for first in range(0, 640, 64):
        operator.push(FrameBatch(run="run-1", first=first, frames=ones, timestamp_ns=0))
        sizes.add(sum(array.nbytes for array in operator.snapshot().values()))
    assert len(sizes) == 1
    assert operator.result()["first"].tolist() == [636, 632, 624]


def test_a_gap_of_any_length_costs_no_time(roimap):
    operator = TwoTime(make_start(), roimap, frames=8, levels=4)
    frames = np.ones((3, 6, 50), "<u2")
    operator.push(FrameBatch(run="run-1", first=0, frames=frames, timestamp_ns=0))
    operator.push(FrameBatch(run="run-1", first=2**60, frames=frames, timestamp_ns=0))
    assert operator.n_frames == 2**60 + 3
    assert operator.result()["n_came"][:, -3:].tolist() == [[1, 1, 1], [0, 0, 2], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(("dtype", "top"), [("|u1", 2**8), ("<u2", 2**16), ("<u4", 2**24)])
def test_counts_up_to_the_largest_neither_overflow_nor_round(roimap, dtype, top):
    frames = np.random.default_rng(3).integers(top - 9, top, (40, 6, 50)).astype(dtype)
    result = correlate(frames, roimap, frames=8, levels=5)
    assert_as_defined(result, frames, roimap, kept=8, levels=5)


def test_one_pixel_may_be_bright_where_others_are_dark(roimap):
    frames = np.random.default_rng(4).poisson(0.1, (40, 6, 50)).astype("<u4")
    frames[::3, 2, 7] = 2**24 - 1
    assert_as_defined(correlate(frames, roimap, frames=8, levels=5), frames, roimap, kept=8, levels=5)


@pytest.mark.parametrize("largest", [0, 1, 63, 64, 2**12, 2**26 - 1, 2**26, 2**30])
def test_products_are_exact_for_any_size_of_counts(largest):
    rng = np.random.default_rng(largest)
    a, b = (rng.integers(0, largest, (3, 2000 if largest < 2**26 else 2), endpoint=True) for _ in range(2))
    a[0] = b[0] = largest
    expected = a.astype(object) @ b.astype(object).T
    kind = np.float32 if largest < 2**24 else np.float64
    assert products(a.astype(kind), b.astype(kind), float(largest)).tolist() == expected.tolist()


def test_pixels_too_bright_to_be_counted_exactly_are_refused_by_name():
    static = np.ones((1, 3), int)
    roimap = RoiMap(static_roi_map=static, dynamic_roi_map=static)
    frames = np.full((2**10, 1, 3), 2**24 - 1, "<u4")
    with pytest.raises(ConfigError, match=r"a pixel holds 2147483520 counts at a time.*mask it"):
        correlate(frames, roimap, frames=4, levels=9)


def test_only_the_bins_asked_for_are_correlated():
    roimap = make_roimap(n_static=6, n_dynamic=3)
    frames = np.random.default_rng(5).poisson(5, (20, 6, 50)).astype("<u2")
    every = correlate(frames, roimap, frames=8, levels=2)
    some = correlate(frames, roimap, frames=8, levels=2, bins=[3, 1])
    assert some["bins"].tolist() == [1, 3]
    np.testing.assert_array_equal(some["c2"], every["c2"][:, [0, 2]])


@pytest.mark.parametrize("normalisation", ["dynamic", "static"])
def test_with_photons_everywhere_it_is_what_boost_corr_computes(roimap, normalisation):
    """`TwotimeCorrelator` of boost_corr 0.1.7: compute_smooth_data ("dqmap", "sqmap"), then calc_normal_twotime."""
    frames = np.random.default_rng(7).poisson(5, (20, 6, 50)).astype("<u2")
    c2 = correlate(frames, roimap, frames=32, normalisation=normalisation)["c2"][0]
    smooth = roimap.static_roi_map if normalisation == "static" else roimap.dynamic_roi_map
    smoothed = frames.astype(float)
    for b in range(1, smooth.max() + 1):
        smoothed[:, smooth == b] /= smoothed[:, smooth == b].mean(axis=1, keepdims=True)
    for q in range(2):
        series = smoothed[:, roimap.dynamic_roi_map == q + 1]
        norm = 1 / series.sum(axis=1)
        np.testing.assert_allclose(c2[q], series @ series.T * np.outer(norm, norm) * series.shape[1], rtol=1e-12)


def test_a_region_without_any_pixel_of_the_map_knows_nothing_and_merges():
    bins = np.zeros((2, 50), int)
    bins[1, :5] = 1
    roimap = RoiMap(static_roi_map=bins, dynamic_roi_map=bins)
    frames = np.random.default_rng(8).poisson(5, (9, 2, 50)).astype("<u2")
    upper, lower = (
        push(TwoTime(make_start((1, 50), origin=(row, 0), detector_shape=(2, 50)), roimap), frames[:, row : row + 1])
        for row in (0, 1)
    )
    assert np.isnan(upper.result()["c2"]).all()
    alone = lower.result()["c2"]
    lower.merge(upper)
    np.testing.assert_array_equal(lower.result()["c2"], alone)


def test_a_bin_that_is_not_in_the_map_is_refused(roimap):
    with pytest.raises(ConfigError, match="no dynamic bin 3, the map has 2"):
        TwoTime(make_start(), roimap, bins=[1, 3])


def test_what_would_take_too_much_memory_is_refused_with_its_numbers():
    start, roimap = make_start((512, 1024)), make_roimap((512, 1024))
    with pytest.raises(ConfigError, match=r"1000 frames of 4\d+ pixels at 8 levels take 13\.\d GiB.*memory_gib: 4;"):
        TwoTime(start, roimap, frames=1000)
    with pytest.raises(ConfigError, match=r"products of 2 bins 5\.96 GiB"):
        TwoTime(make_start(), make_roimap(), frames=20000, levels=1)


def test_sums_that_could_become_inexact_are_refused():
    with pytest.raises(
        ConfigError, match=r"16 levels are too many for 2.... pixels in a bin with up to 16777215 counts"
    ):
        TwoTime(make_start((512, 64), dtype="<u4"), make_roimap((512, 64), n_dynamic=1), frames=2, levels=16)


def test_it_is_computed_where_it_is_asked_for(roimap):
    document = {"source": {"address": "any.h5"}, "qmap": "any"}
    names = [operator.name for operator in operators_of(check(document), roimap)(make_start())]
    assert "twotime" not in names
    asked = document | {"operators": {"twotime": {"frames": 8, "bins": [2], "levels": 3}}}
    operator = operators_of(check(asked), roimap)(make_start())[-1]
    operator.restore(TwoTime(make_start(), roimap, frames=8, bins=[2], levels=3).snapshot())


def test_a_state_made_with_other_parameters_is_refused(roimap):
    state = TwoTime(make_start(), roimap, frames=8).snapshot()
    for options in ({"frames": 9}, {"frames": 8, "levels": 2}, {"frames": 8, "normalisation": "static"}):
        with pytest.raises(CheckpointError, match="another parameters"):
            TwoTime(make_start(), roimap, **options).restore(state)


def test_sums_of_more_times_than_are_kept_are_refused_before_there_is_room_made_for_them(roimap):
    operator = TwoTime(make_start(), roimap, frames=8)
    operator.push(FrameBatch(run="run-1", first=0, frames=np.ones((3, 6, 50), "<u2"), timestamp_ns=0))
    good = operator.partial()
    for name, array in (("weights_0", np.ones(10**6, int)), ("G2_0", good["G2_0"][:, :1]), ("pixels", np.ones(2))):
        with pytest.raises(CheckpointError, match=f"twotime: {name} is not the sums"):
            operator.restore({**good, name: array})
    with pytest.raises(CheckpointError, match="twotime: "):
        operator.restore({**operator.snapshot(), "alive": np.ones((2, 2), np.uint8)})


def test_of_regions_that_are_merged_the_sums_of_one_are_kept(roimap):
    first, second = (TwoTime(make_start(), roimap, frames=8) for _ in range(2))
    push(second, np.ones((3, 6, 50), "<u2"))
    partial = second.partial()
    for _ in range(2):
        for each in (first, second):
            each.restore(partial)
        first.merge(second)
        assert len(first._merged) == 1
        assert second._merged == []


def test_frames_that_come_twice_are_refused(roimap):
    operator = TwoTime(make_start(), roimap, frames=8)
    batch = FrameBatch(run="run-1", first=0, frames=np.ones((3, 6, 50), "<u2"), timestamp_ns=0)
    operator.push(batch)
    with pytest.raises(ValueError, match="frame 0 came after 3 were pushed"):
        operator.push(batch)


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory, qmap, frames):
    out = tmp_path_factory.mktemp("alone") / "result.h5"
    said = xpcs_stream("run", "--source", frames, "--qmap", qmap, "--out", out, "--quiet", *TWO_TIME)
    assert said.exit_code == 0, said.output
    return contents(out)


@pytest.mark.timeout(240)
def test_regions_of_workers_of_which_one_is_killed_merge_into_the_result_of_one_process(
    tmp_path, qmap, frames, of_one_process
):
    with ExitStack() as stack:
        plane = Plane(f"zmq://{free()}/beamline", stack, tmp_path, qmap)
        unlucky = plane.worker("--name", "unlucky", *TWO_TIME)
        until_said(unlucky, "taking regions")
        plane.replay(frames, "400 Hz")
        until_said(unlucky, "region 3 begins")
        merger = plane.merger(*TWO_TIME)
        plane.worker("--name", "heir", *TWO_TIME)
        unlucky.kill()
        result = plane.result(merger)
    assert result["xpcs/twotime/correlation_map/c2_00003"].shape == (39, 39)
    assert_identical(result, of_one_process)


@pytest.mark.parametrize("command", ["worker", "merge", "backfill"])
@pytest.mark.parametrize(("address", "fits"), [("zmq://127.0.0.1:9/id", 834), ("kafka://127.0.0.1:9/id", 416)])
def test_sums_too_large_for_the_plane_are_refused_at_once_with_what_would_fit(command, address, fits, qmap, tmp_path):
    of_command = {
        "worker": ("--source", address, "--checkpoints", tmp_path),
        "merge": ("--source", address),
        "backfill": ("scan-7", "--source", tmp_path, "--plane", address),
    }
    arguments = (command, *of_command[command], "--qmap", qmap)
    said = xpcs_stream(*arguments, "--two-time", 1000)
    assert said.exit_code == 1
    assert "sums of 1000 frames and 3 dynamic bins may be 96.4 MB, more than the" in said.output
    assert f"; {fits} frames would fit" in said.output


def test_no_partial_sum_is_larger_than_was_said_before_the_run(roimap):
    frames = np.random.default_rng(9).integers(0, 2**16 - 1, (600, 6, 50)).astype("<u2")
    for normalisation, n_rows in (("dynamic", 2), ("static", 6)):
        operator = push(TwoTime(make_start(), roimap, frames=32, levels=5, normalisation=normalisation), frames)
        _, buffers = pack_arrays(operator.partial())
        n_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        most = partial_bytes(32, 5, n_rows)
        assert most - HEAD_BYTES - 1000 < n_bytes < most


def test_an_option_that_means_nothing_alone_is_refused(qmap):
    said = xpcs_stream("run", "--source", "any.h5", "--qmap", qmap, "--two-time-normalisation", "static")
    assert said.exit_code == 2
    assert "--two-time-normalisation goes with --two-time FRAMES" in " ".join(said.output.split())
    said = xpcs_stream("run", "--source", "any.h5", "--qmap", qmap, "--two-time", 8, "--two-time-normalisation", "q")
    assert said.exit_code == 1
    assert "--two-time-normalisation: " in said.output
