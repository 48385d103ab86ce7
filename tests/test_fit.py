"""What is fitted to g2 is what made it, within its errors; and it is said where nothing can be told."""

import numpy as np
import pytest

from stream.fit import NO_FIT, Fit, fit, fits

DELAY = np.array([*range(1, 9), *(k << level for level in range(1, 12) for k in range(5, 9))])
TAU = DELAY * 1e-3
N_CURVES = 300


def curve(rng, rate=10.0, contrast=0.2, baseline=1.0, stretch=1.0, error=2e-3):
    """A noisy curve and its errors, which differ from point to point by a factor of 4."""
    g2_err = error * rng.uniform(0.5, 2.0, len(TAU))
    return baseline + contrast * np.exp(-2 * (rate * TAU) ** stretch) + rng.normal(0, g2_err), g2_err


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def within(pulls):
    """Whether one standard error holds the truth in about 68 % of the cases: within 3 sigma of that."""
    return abs(np.mean(np.abs(pulls) < 1) - 0.683) < 3 * np.sqrt(0.683 * 0.317 / len(pulls))


def test_standard_errors_hold_the_truth_as_often_as_they_should(rng):
    pulls = []
    for _ in range(N_CURVES):
        rate = 10 ** rng.uniform(0, 2)
        made = fit(TAU, *curve(rng, rate))
        assert made.converged
        pulls.append(
            [
                (made.contrast - 0.2) / made.contrast_err,
                (made.rate - rate) / made.rate_err,
                (made.baseline - 1) / made.baseline_err,
            ]
        )
    assert all(within(of_parameter) for of_parameter in np.transpose(pulls))


def test_a_stretched_curve_tells_its_exponent(rng):
    made = [fit(TAU, *curve(rng, 20.0, stretch=0.7), stretched=True) for _ in range(N_CURVES)]
    assert all(each.converged for each in made)
    assert within([(each.stretch - 0.7) / each.stretch_err for each in made])


def test_a_single_exponential_has_exponent_one(rng):
    made = fit(TAU, *curve(rng))
    assert (made.stretch, made.stretch_err) == (1.0, 0.0)


def test_points_count_by_their_errors(rng):
    g2, g2_err = curve(rng)
    spoiled, unsure = g2.copy(), g2_err.copy()
    spoiled[5], unsure[5] = 3.0, 1e6
    assert fit(TAU, spoiled, unsure).rate == pytest.approx(
        fit(np.delete(TAU, 5), np.delete(g2, 5), np.delete(g2_err, 5)).rate
    )


def test_standard_errors_grow_with_the_errors_of_g2(rng):
    g2, g2_err = curve(rng)
    assert fit(TAU, g2, 2 * g2_err).rate_err == pytest.approx(2 * fit(TAU, g2, g2_err).rate_err, rel=1e-3)


def test_points_that_are_not_known_are_left_out(rng):
    g2, g2_err = curve(rng)
    g2[-9:], g2_err[3], g2_err[4] = np.nan, np.nan, 0.0
    known = np.ones(len(TAU), bool)
    known[[3, 4, *range(-9, 0)]] = False
    assert fit(TAU, g2, g2_err) == fit(TAU[known], g2[known], g2_err[known])


def test_without_errors_the_scatter_tells_them(rng):
    pulls = []
    for _ in range(N_CURVES):
        g2 = 1 + 0.2 * np.exp(-20 * TAU) + rng.normal(0, 2e-3, len(TAU))
        made = fit(TAU, g2, np.full(len(TAU), np.nan))
        pulls.append((made.rate - 10) / made.rate_err)
    assert within(pulls)


def test_a_curve_without_contrast_does_not_converge(rng):
    assert np.mean([fit(TAU, *curve(rng, contrast=0.0)).converged for _ in range(N_CURVES)]) < 0.02


def test_a_decay_that_is_over_before_the_first_delay_does_not_converge(rng):
    assert not any(fit(TAU, *curve(rng, rate=1e5)).converged for _ in range(20))


@pytest.mark.parametrize("n", range(4))
def test_not_more_points_than_parameters_are_no_fit(rng, n):
    g2, g2_err = curve(rng)
    g2[n:] = np.nan
    assert fit(TAU, g2, g2_err) is NO_FIT


@pytest.mark.parametrize("g2", [np.zeros(52), np.ones(52), np.full(52, np.nan), np.full(52, 1e300), np.array([])])
def test_what_is_no_curve_is_no_error(g2):
    made = fit(TAU[: len(g2)], g2, np.full(len(g2), 1e-3))
    assert not made.converged


def test_a_fit_that_begins_at_the_last_one_ends_at_the_same(rng):
    g2, g2_err = curve(rng)
    last = fit(TAU, *curve(rng))
    warm, cold = fit(TAU, g2, g2_err, start=last), fit(TAU, g2, g2_err)
    assert warm.rate == pytest.approx(cold.rate, rel=1e-4)


def test_a_bad_beginning_does_not_spoil_a_fit(rng):
    g2, g2_err = curve(rng)
    nowhere = Fit(
        contrast=1e9, rate=1e9, baseline=-1e9, contrast_err=1.0, rate_err=1.0, baseline_err=1.0, converged=True
    )
    assert fit(TAU, g2, g2_err, start=nowhere).rate == pytest.approx(fit(TAU, g2, g2_err).rate, rel=1e-4)


def test_all_bins_of_a_result_are_fitted_each_by_itself(rng):
    curves = [curve(rng, rate) for rate in (3.0, 10.0, 30.0)]
    g2, g2_err = (np.stack(each, axis=1) for each in zip(*curves, strict=True))
    made = fits(TAU, g2, g2_err)
    assert made == [fit(TAU, *each) for each in curves]
    assert fits(TAU, g2, g2_err, start=made)[1].rate == pytest.approx(made[1].rate, rel=1e-4)
