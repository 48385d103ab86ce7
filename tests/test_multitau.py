"""The multi-tau operator computes what `reference` computes from the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.errors import ConfigError
from stream.messages import FrameBatch
from stream.operators.kernels.layout import LANES, TILE
from stream.operators.multitau import MultiTau
from stream.operators.roimap import RoiMap
from tests import reference
from tests.conftest import make_roimap, make_start, push

EXACT = {"rtol": 1e-13, "atol": 0, "equal_nan": True}
COMPARED = ("delay", "n_pairs", "G2", "IP", "IF", "g2")


def correlate(frames, roimap, *, came=None, batch=1000, saturation_value=None, **options):
    start = make_start(frames.shape[1:], dtype=frames.dtype.str, saturation_value=saturation_value)
    return push(MultiTau(start, roimap, **options), frames, came=came, batch=batch).result()


def assert_as_defined(result, frames, roimap, *, error="static", **options):
    expected = reference.multitau(frames, roimap.static_roi_map.ravel(), roimap.dynamic_of_static, **options)
    for name in COMPARED:
        np.testing.assert_allclose(result[name], expected[name], err_msg=name, **EXACT)
    np.testing.assert_allclose(result["g2_err"], expected[f"g2_err_{error}"], rtol=1e-6, atol=1e-15, equal_nan=True)


def speckle(n, shape, tau, mean, seed=0):
    """Counts of a complex AR(1) field per pixel."""
    rng = np.random.default_rng(seed)
    rho = np.exp(-1 / tau)
    field = np.zeros((2, *shape))
    frames = np.empty((n, *shape), "<u2")
    for t in range(-int(5 * tau), n):
        field = rho * field + np.sqrt(1 - rho**2) * rng.standard_normal(field.shape)
        if t >= 0:
            frames[t] = rng.poisson(mean * (field**2).sum(axis=0) / 2)
    return frames


@pytest.mark.parametrize("n", [1, 2, 9, 100, 257])
def test_poisson_counts_correlate_as_defined(roimap, n):
    frames = np.random.default_rng(1).poisson(1.5, (n, 6, 50)).astype("<u2")
    assert_as_defined(correlate(frames, roimap), frames, roimap)


def test_speckle_correlates_as_defined(roimap):
    frames = speckle(300, (6, 50), tau=10, mean=2)
    assert_as_defined(correlate(frames, roimap, batch=37), frames, roimap)


@pytest.mark.parametrize(("d", "levels"), [(1, 16), (2, 3), (4, 1), (8, 5), (16, 2)])
def test_any_delays_per_level_and_number_of_levels(roimap, d, levels):
    frames = np.random.default_rng(2).poisson(1.5, (150, 6, 50)).astype("<u2")
    result = correlate(frames, roimap, delays_per_level=d, levels=levels)
    assert_as_defined(result, frames, roimap, d=d, levels=levels)


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
def test_counts_up_to_the_largest_of_the_dtype_neither_overflow_nor_round(roimap, dtype):
    top = np.iinfo(dtype).max
    frames = np.random.default_rng(3).integers(top - 3, top, (100, 6, 50), dtype, endpoint=True)
    assert_as_defined(correlate(frames, roimap), frames, roimap)


def test_one_pixel_may_be_bright_where_others_are_dark(roimap):
    frames = np.random.default_rng(4).poisson(0.1, (200, 6, 50)).astype("<u4")
    frames[::3, 2, 7] = 2**32 - 1
    assert_as_defined(correlate(frames, roimap), frames, roimap)


@pytest.mark.parametrize("lost", [0.01, 0.3, 0.9])
def test_lost_frames_are_left_out_of_pairs(roimap, lost):
    rng = np.random.default_rng(5)
    frames = speckle(300, (6, 50), tau=10, mean=2)
    came = rng.random(len(frames)) >= lost
    came[-1] = True
    assert_as_defined(correlate(frames, roimap, came=came), frames, roimap, came=came)


def test_a_long_burst_of_lost_frames_is_left_out_of_pairs(roimap):
    frames = speckle(600, (6, 50), tau=10, mean=2)
    came = np.ones(len(frames), bool)
    came[101:388] = False
    assert_as_defined(correlate(frames, roimap, came=came), frames, roimap, came=came)


def test_a_gap_of_any_length_costs_no_time(roimap):
    operator = MultiTau(make_start(), roimap)
    frames = np.ones((3, 6, 50), "<u2")
    operator.push(FrameBatch(run="run-1", first=0, frames=frames, timestamp_ns=0))
    operator.push(FrameBatch(run="run-1", first=2**60, frames=frames, timestamp_ns=0))
    assert operator.n_frames == 2**60 + 3
    assert operator.result()["n_pairs"][:3].tolist() == [4, 2, 0]


@pytest.mark.parametrize("error", ["static", "pixel"])
def test_masked_and_overflown_pixels_leave_when_they_saturate(roimap, error):
    rng = np.random.default_rng(6)
    frames = rng.poisson(1.5, (200, 6, 50)).astype("<u2")
    frames[:, 1, :4] = 65535
    frames[rng.random(frames.shape) < 1e-3] = 65535
    came = rng.random(len(frames)) > 0.1
    came[-1] = True
    result = correlate(frames, roimap, came=came, saturation_value=65534, error=error)
    assert_as_defined(result, frames, roimap, came=came, saturation_value=65534, error=error)


def test_the_error_per_pixel_is_that_of_the_aps(roimap):
    frames = speckle(200, (6, 50), tau=10, mean=2)
    assert_as_defined(correlate(frames, roimap, error="pixel"), frames, roimap, error="pixel")


def test_a_bin_without_light_is_unknown_and_left_out_of_the_mean(roimap):
    frames = np.random.default_rng(7).poisson(1.5, (50, 6, 50)).astype("<u2")
    frames[:, roimap.static_roi_map == 2] = 0
    result = correlate(frames, roimap)
    assert_as_defined(result, frames, roimap)
    assert np.isfinite(result["g2"]).all()


def test_constant_light_has_g2_of_one(roimap):
    frames = np.full((64, 6, 50), 7, "<u2")
    np.testing.assert_array_equal(correlate(frames, roimap)["g2"], 1)


def test_long_runs_do_not_drift():
    """1e5 frames against sums in numpy's float64: 1e-6 is asked for; both are exact here."""
    roimap = make_roimap((2, 30), 2, 1)
    frames = np.random.default_rng(8).poisson(3, (100_000, 2, 30)).astype("<u2")
    result = correlate(frames, roimap, batch=1000)
    static = roimap.static_roi_map.ravel()
    flat = frames.reshape(len(frames), -1).astype(float)
    for i, (level, k) in enumerate(reference.delays(len(frames), 4, 16)):
        n = len(frames) >> level
        c = flat[: n << level].reshape(n, -1, flat.shape[1]).sum(axis=1)
        means = [(x.sum(axis=0)) / (n - k) for x in (c[:-k] * c[k:], c[:-k], c[k:])]
        g2 = [
            means[0][static == b].mean() / (means[1][static == b].mean() * means[2][static == b].mean()) for b in (1, 2)
        ]
        assert result["delay"][i] == k << level
        np.testing.assert_allclose(result["g2"][i, 0], np.mean(g2), rtol=1e-12)


def test_delays_are_those_of_the_aps():
    """boost_corr's gen_tau_bin for 2000 frames: 38 delays up to 1536."""
    roimap = make_roimap((1, 8), 2, 1)
    delay = correlate(np.ones((2000, 1, 8), "|u1"), roimap)["delay"]
    assert delay[:16].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]
    assert (len(delay), delay[-1]) == (38, 1536)


def test_the_number_of_threads_changes_nothing():
    roimap = make_roimap((40, 64), 12, 3)
    frames = np.random.default_rng(9).poisson(1.5, (100, 40, 64)).astype("<u2")
    one, three = (correlate(frames, roimap, threads=threads) for threads in (1, 3))
    for name in one:
        np.testing.assert_array_equal(one[name], three[name], err_msg=name)


@pytest.mark.parametrize(
    ("options", "said"), [({"delays_per_level": 0}, "delays_per_level: 0"), ({"levels": 99}, "99")]
)
def test_impossible_options_are_named(roimap, options, said):
    with pytest.raises(ValueError, match=said):
        MultiTau(make_start(), roimap, **options)


def test_counts_that_could_not_be_summed_exactly_are_refused(roimap):
    frames = np.full((1, 6, 50), 2**32 - 1, "<u4")
    with pytest.raises(ConfigError, match=r"counts in one bin and frame are too many for 28 levels"):
        correlate(frames, roimap, levels=28)


def one_bin_each(static):
    """A map of static bins, each of which is a dynamic bin."""
    return RoiMap(static_roi_map=static, dynamic_roi_map=static)


def assert_mapped_as_defined(result, frames, roimap, **options):
    """The same, without the time that `reference` takes for pixels outside of the map."""
    static = roimap.static_roi_map.ravel()
    inside = static > 0
    expected = reference.multitau(
        frames.reshape(len(frames), -1)[:, inside], static[inside], roimap.dynamic_of_static, **options
    )
    for name in COMPARED:
        np.testing.assert_allclose(result[name], expected[name], err_msg=name, **EXACT)


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
@pytest.mark.parametrize("mean", [0, 0.1])
def test_a_hot_pixel_of_the_map_among_dark_ones(roimap, dtype, mean):
    frames = np.random.default_rng(10).poisson(mean, (200, 6, 50)).astype(dtype)
    hot = np.argwhere(roimap.static_roi_map == 2)[5]
    frames[::3, *hot] = np.iinfo(dtype).max
    assert_as_defined(correlate(frames, roimap), frames, roimap)


@pytest.mark.parametrize("mean", [0.05, 5, 3000])
def test_a_region_may_be_one_pixel(mean):
    roimap = one_bin_each(np.ones((1, 1), int))
    frames = np.random.default_rng(11).poisson(mean, (400, 1, 1)).astype("<u2")
    assert_as_defined(correlate(frames, roimap), frames, roimap)


def test_a_bin_may_be_one_pixel_among_others_and_another_all_of_a_strip():
    static = np.full((3, 40), 1)
    static[1, 8 : 8 + LANES] = 2
    static[1, 30] = 3
    static[2, 39] = 4
    frames = np.random.default_rng(12).poisson(2, (150, 3, 40)).astype("<u2")
    assert_as_defined(correlate(frames, one_bin_each(static)), frames, one_bin_each(static))


def test_without_photons_every_mean_is_zero_and_g2_unknown(roimap):
    frames = np.zeros((100, 6, 50), "<u2")
    result = correlate(frames, roimap)
    assert_as_defined(result, frames, roimap)
    assert (result["IP"] == 0).all()
    assert np.isnan(result["g2"]).all()


@pytest.mark.parametrize("dark", [np.arange(300) % 2 == 0, np.arange(300) < 290, np.arange(300) % 64 != 5])
def test_dark_frames_between_bright_ones_count(roimap, dark):
    frames = np.random.default_rng(13).poisson(50, (300, 6, 50)).astype("<u2")
    frames[dark] = 0
    assert_as_defined(correlate(frames, roimap), frames, roimap)


@pytest.mark.parametrize("n_faint", [1, 2, 7, 100, 249])
@pytest.mark.parametrize("mean", [100, 2000, 5000, 40_000, 70_000, 2**31])
def test_light_may_become_brighter_in_mid_block_than_32_bits_can_sum(mean, n_faint):
    roimap = make_roimap((2, 30), 3, 1)
    rng = np.random.default_rng(14)
    frames = rng.poisson(1, (250, 2, 30)).astype("<u4")
    frames[n_faint:] = rng.poisson(mean, (250 - n_faint, 2, 30))
    assert_as_defined(correlate(frames, roimap), frames, roimap)
    frames = frames[::-1]
    assert_as_defined(correlate(frames, roimap, batch=n_faint), frames, roimap)


@pytest.mark.parametrize("mean", [120, 500, 1000, 2**14, 2**15])
def test_sums_of_a_level_may_outgrow_any_plane_of_the_state(mean):
    """Rows of 8, 16 and more bits, and products of 31 and more, begin at one level or another."""
    roimap = make_roimap((1, 40), 3, 1)
    frames = np.random.default_rng(15).poisson(mean, (600, 1, 40)).astype("<u4")
    assert_as_defined(correlate(frames, roimap, batch=71), frames, roimap)


@pytest.mark.parametrize("n_pixel", [1, LANES - 1, LANES + 1, TILE - 1, TILE, TILE + 1, 2 * TILE + 1])
def test_frames_may_have_any_number_of_pixels(n_pixel):
    roimap = make_roimap((1, n_pixel), min(n_pixel, 3), 1)
    frames = np.random.default_rng(16).poisson(1.5, (60, 1, n_pixel)).astype("<u2")
    assert_as_defined(correlate(frames, roimap), frames, roimap)


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
@pytest.mark.parametrize("batch", [1, 100, 1000])
def test_pixels_leave_each_in_its_own_frame_in_the_middle_of_a_block(dtype, batch):
    shape = (2, 150)
    roimap = make_roimap(shape, 4, 2)
    frames = np.random.default_rng(17).poisson(1.5, (300, *shape)).astype(dtype)
    top = np.iinfo(dtype).max
    pixels = frames.reshape(300, -1)
    for i, t in enumerate([0, 1, 2, 7, 8, 63, 64, 127, 128, 200, 254, 255, 256, 257, 299]):
        pixels[t, 20 * i] = top
        pixels[t + 1 :, 20 * i] = top - 1
    result = correlate(frames, roimap, batch=batch, saturation_value=int(top) - 1)
    assert_as_defined(result, frames, roimap, saturation_value=int(top) - 1)


def test_all_pixels_of_a_bin_may_leave_at_once(roimap):
    frames = np.random.default_rng(18).poisson(1.5, (100, 6, 50)).astype("<u2")
    frames[37, roimap.static_roi_map == 2] = 65535
    result = correlate(frames, roimap, saturation_value=65534)
    assert_as_defined(result, frames, roimap, saturation_value=65534)


def test_a_saturation_value_below_the_largest_number_is_kept(roimap):
    frames = np.random.default_rng(19).integers(0, 1001, (80, 6, 50)).astype("<u2")
    result = correlate(frames, roimap, saturation_value=999)
    assert_as_defined(result, frames, roimap, saturation_value=999)


@pytest.mark.parametrize("saturation_value", [65_535, 65_536, 2**32, 2**40])
def test_no_pixel_leaves_at_a_saturation_value_that_the_dtype_cannot_exceed(roimap, saturation_value):
    frames = np.random.default_rng(24).integers(65_500, 65_536, (80, 6, 50)).astype("<u2")
    assert_as_defined(correlate(frames, roimap, saturation_value=saturation_value), frames, roimap)


def test_what_masked_pixels_read_does_not_count_towards_what_can_be_summed(roimap):
    frames = np.ones((40, 6, 50), "<u4")
    first, second, *_ = np.argwhere(roimap.static_roi_map == 1)
    frames[:, *first] = frames[20:, *second] = 2**32 - 1
    known = {"saturation_value": 2**32 - 2, "levels": 28}
    assert_as_defined(correlate(frames, roimap, **known), frames, roimap, **known)


@pytest.mark.parametrize("length", [1, 5, 8, 9, 100, 255, 256, 257, 300, 511])
def test_a_gap_of_any_length_is_left_out_of_pairs(length):
    roimap = make_roimap((2, 30), 4, 2)
    frames = np.random.default_rng(20).poisson(3, (700, 2, 30)).astype("<u2")
    came = np.ones(len(frames), bool)
    came[77 : 77 + length] = False
    came[650:653] = False
    assert_as_defined(correlate(frames, roimap, came=came), frames, roimap, came=came)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_high_counts_are_weighted_where_frames_are_missing(dtype):
    roimap = make_roimap((2, 30), 4, 2)
    rng = np.random.default_rng(21)
    frames = rng.integers(0, np.iinfo(dtype).max, (300, 2, 30), dtype)
    frames[:100] //= 2**8
    came = rng.random(len(frames)) > 0.1
    came[-1] = True
    assert_as_defined(correlate(frames, roimap, came=came), frames, roimap, came=came)


def test_coarse_frames_of_more_frames_than_16_bits_count_are_weighted_where_others_are_missing():
    frames = np.random.default_rng(23).poisson(1e-3, (3 << 16, 1, 1)).astype("<u2")
    came = np.ones(len(frames), bool)
    came[(1 << 15) + 7 : (1 << 15) + 300] = False
    roimap = one_bin_each(np.ones((1, 1), int))
    result = correlate(frames, roimap, came=came, batch=5000, delays_per_level=1, levels=17)
    assert_as_defined(result, frames, roimap, came=came, d=1, levels=17)


@pytest.mark.parametrize("error", ["static", "pixel"])
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_leaves_the_same_bits(threads, error):
    """Also of pixels that leave, in the state, and of a map whose tiles the threads cannot share evenly."""
    roimap = make_roimap((40, 64), 12, 3)
    rng = np.random.default_rng(22)
    frames = rng.poisson(1.5, (400, 40, 64)).astype("<u2")
    frames[:, 3:5] *= 300
    frames[rng.random(frames.shape) < 1e-5] = 65535
    came = rng.random(len(frames)) > 0.05
    start = make_start((40, 64), saturation_value=65534)
    one, more = (
        push(MultiTau(start, roimap, threads=n, error=error), frames, came=came, batch=90) for n in (1, threads)
    )
    for a, b in ((one.result(), more.result()), (one.snapshot(), more.snapshot())):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@st.composite
def maps(draw):
    """Few pixels in bins, on one or more tiles, of which some may hold none."""
    shape = draw(st.sampled_from([(1, 5), (1, TILE), (2, 130), (3, 300), (1, 1200)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    static = np.zeros(shape[0] * shape[1], int)
    for begin in draw(st.lists(st.integers(0, len(static) - 1), min_size=1, max_size=6)):
        part = static[begin : begin + draw(st.sampled_from([1, 3, 20]))]
        part[:] = rng.integers(1, 4) if draw(st.booleans()) else rng.integers(0, 4, len(part))
    static[begin] = 1
    return one_bin_each(static.reshape(shape))


@given(
    roimap=maps(),
    dtype=st.sampled_from(["|u1", "<u2", "<u4"]),
    top=st.sampled_from([1, 30, 255, 2000, 40_000, 2**32 - 1]),
    n=st.integers(1, 300),
    batch=st.integers(1, 300),
    d=st.integers(1, 9),
    levels=st.integers(1, 16),
    lost=st.sampled_from([0, 0.02, 0.5]),
    gap=st.tuples(st.integers(0, 300), st.sampled_from([0, 20, 257])),
    saturated=st.sampled_from([0, 1e-3]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_any_run_correlates_as_defined(roimap, dtype, top, n, batch, d, levels, lost, gap, saturated, seed):
    rng = np.random.default_rng(seed)
    largest = int(np.iinfo(dtype).max)
    frames = rng.integers(0, min(top, largest - 1), (n, *roimap.shape), dtype, endpoint=True)
    frames[rng.random(frames.shape) < saturated] = largest
    came = rng.random(n) >= lost
    came[gap[0] : gap[0] + gap[1]] = False
    came[-1] = True
    known = {"came": came, "saturation_value": largest - 1}
    result = correlate(frames, roimap, batch=batch, delays_per_level=d, levels=levels, **known)
    assert_mapped_as_defined(result, frames, roimap, d=d, levels=levels, **known)


@pytest.mark.parametrize(("shape", "dtype"), [((3, 6, 50), "|u1"), ((3, 5, 50), "<u2"), ((3, 6, 50), "<u4")])
def test_frames_that_are_not_those_of_the_run_are_refused(roimap, shape, dtype):
    operator = MultiTau(make_start(), roimap)
    with pytest.raises(ValueError, match=r"are not those of the run"):
        operator.push(FrameBatch(run="run-1", first=0, frames=np.ones(shape, dtype), timestamp_ns=0))
    assert operator.n_frames == 0


def test_a_snapshot_is_of_the_moment_it_was_asked_for():
    shape = (512, 512)
    frames = np.random.default_rng(3).integers(0, 4, (512, *shape), "<u2")
    roimap = make_roimap(shape)
    one, other = (MultiTau(make_start(shape), roimap) for _ in range(2))
    for operator in (one, other):
        push(operator, frames[:256])
    snapshot = one.snapshot()
    one.push(FrameBatch(run="run-1", first=256, frames=frames[256:], timestamp_ns=0))
    expected = other.snapshot()
    assert snapshot.keys() == expected.keys()
    for name, array in snapshot.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
