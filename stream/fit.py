"""What g2 tells of the dynamics: contrast and rate of an exponential decay, fitted while the run is on."""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeWarning, curve_fit

MAX_EVALUATIONS = 2000
"""Of the model, before a fit is given up."""

SIGNIFICANT = 3.0
"""Standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """``g2 = baseline + contrast * exp(-2 (rate * tau)**stretch)`` (Siegert relation, |g1| a stretched exponential).

    Each number with its standard error, as it follows from the errors of g2. These are taken to be independent of each
    other, which those of neighbouring delays are not quite. All are NaN where nothing could be fitted.
    """

    contrast: float
    rate: float
    """1/s"""
    baseline: float
    stretch: float = 1.0
    contrast_err: float
    rate_err: float
    baseline_err: float
    stretch_err: float = 0.0
    converged: bool
    """The fit came to an end, and contrast and rate are above 0 by more than three standard errors."""


NO_FIT = Fit(
    contrast=np.nan,
    rate=np.nan,
    baseline=np.nan,
    stretch=np.nan,
    contrast_err=np.nan,
    rate_err=np.nan,
    baseline_err=np.nan,
    stretch_err=np.nan,
    converged=False,
)


def fit(tau: ArrayLike, g2: ArrayLike, g2_err: ArrayLike, *, stretched: bool = False, start: Fit | None = None) -> Fit:
    """Fit one curve, weighted by its errors.

    Parameters
    ----------
    tau : (n_delay,)
        s, above 0.
    g2, g2_err : (n_delay,)
        Points without a finite g2 and a finite error above 0 are left out. Where no point has such an error, all weigh
        the same, and the standard errors follow from how they scatter.
    stretched
        Fit the exponent, too; else it is 1.
    start
        Where to begin, e.g. the last fit of the same bin; if it did not converge, or none does from there, the curve
        itself tells.

    Returns
    -------
    Fit
        `converged` is False where there are not more points than parameters, or they do not tell.
    """
    tau, g2, g2_err = (np.asarray(values, np.float64) for values in (tau, g2, g2_err))
    known = np.isfinite(g2) & (tau > 0)
    weighted = known & np.isfinite(g2_err) & (g2_err > 0)
    is_weighted = bool(weighted.any())
    known = weighted if is_weighted else known
    if np.count_nonzero(known) <= 3 + stretched:
        return NO_FIT
    tau, g2, sigma = tau[known], g2[known], g2_err[known] if is_weighted else None
    guesses = [_guess(tau, g2)]
    if start is not None and start.converged:
        guesses.insert(0, (start.contrast, start.rate, start.baseline, start.stretch))
    done = NO_FIT
    for contrast, rate, baseline, stretch in guesses:
        begin = np.array([contrast, np.log(rate), baseline, *([np.log(stretch)] if stretched else [])])
        done = _fit(tau, g2, sigma, begin)
        if done.converged:
            break
    return done


def fits(
    tau: ArrayLike, g2: ArrayLike, g2_err: ArrayLike, *, stretched: bool = False, start: list[Fit] | None = None
) -> list[Fit]:
    """Fit every bin of a result of `stream.operators.multitau`: g2 and g2_err are (n_delay, n_dynamic)."""
    of_bin = zip(np.asarray(g2).T, np.asarray(g2_err).T, strict=True)
    return [
        fit(tau, curve, error, stretched=stretched, start=start[i] if start else None)
        for i, (curve, error) in enumerate(of_bin)
    ]


def _model(tau: NDArray[np.float64], *parameters: float) -> NDArray[np.float64]:
    # Rate and stretch by their logarithms: they cannot become negative, and steps are of their own size.
    contrast, log_rate, baseline, *rest = parameters
    stretch = np.exp(rest[0]) if rest else 1.0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        decay: NDArray[np.float64] = np.exp(-2 * np.exp(stretch * (log_rate + np.log(tau))))
    return baseline + contrast * decay


def _guess(tau: NDArray[np.float64], g2: NDArray[np.float64]) -> tuple[float, float, float, float]:
    order = np.argsort(tau)
    tau, g2 = tau[order], g2[order]
    n_end = max(1, len(g2) // 8)
    first, baseline = float(np.median(g2[:n_end])), float(np.median(g2[-n_end:]))
    fallen = np.flatnonzero((g2 - baseline) * np.sign(first - baseline) <= abs(first - baseline) / np.e)
    at = tau[fallen[0]] if fallen.size else tau[-1]
    return first - baseline, 1 / (2 * float(at)), baseline, 1.0


def _fit(
    tau: NDArray[np.float64], g2: NDArray[np.float64], sigma: NDArray[np.float64] | None, begin: NDArray[np.float64]
) -> Fit:
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("error", OptimizeWarning)  # the covariance could not be estimated
            best, covariance = curve_fit(
                _model, tau, g2, begin, sigma, absolute_sigma=sigma is not None, maxfev=MAX_EVALUATIONS
            )
            error = np.sqrt(np.diag(covariance))
            contrast, rate, baseline, stretch = *(best[0], np.exp(best[1]), best[2]), np.exp(best[3:].sum())
            rate_err, stretch_err = rate * error[1], stretch * error[3:].sum()
    except (RuntimeError, OptimizeWarning, ValueError):  # no end in time, or a step into what is not finite
        return NO_FIT
    numbers = np.array([contrast, rate, baseline, stretch, error[0], rate_err, error[2], stretch_err])
    is_known = bool(np.isfinite(numbers).all())
    return Fit(
        contrast=float(contrast),
        rate=float(rate),
        baseline=float(baseline),
        stretch=float(stretch),
        contrast_err=float(error[0]),
        rate_err=float(rate_err),
        baseline_err=float(error[2]),
        stretch_err=float(stretch_err),
        converged=is_known and bool(contrast > SIGNIFICANT * error[0] and rate > SIGNIFICANT * rate_err),
    )
