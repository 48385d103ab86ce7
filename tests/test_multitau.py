"""The multi-tau operator computes what `reference` computes from the definition."""

import numpy as np
import pytest

from stream.errors import ConfigError
from stream.messages import FrameBatch
from stream.operators.multitau import MultiTau
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
