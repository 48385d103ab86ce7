"""Contrast and rate with errors that hold.

Neighbouring delays of g2 come from the same speckles, so that their errors go together: least squares, which takes them
for independent, promises up to 4 times too much (seen with the simulated detector: the error of the contrast of slow,
bright speckle was 3.6 times what `stream.fit` tells). Static bins share no pixel. They are left out in turn, and how
much the fit moves tells its error, whatever the delays have in common (jackknife; Efron & Stein, Ann. Statist. 9, 586
(1981)). What all pixels have in common, such as an unsteady beam, no spread over them can tell.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from stream.fit import Fit, fit
from stream.messages import Arrays

Quantity = Literal["contrast", "rate"]

MAX_GROUPS = 20
"""Static bins are left out one by one, or in so many groups: more make the error only a little surer."""

MIN_GROUPS = 5

ONE_SIGMA = 0.8413447460685429
"""Of a normal distribution lies below one standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number of one dynamic bin and half of its interval of 68 % confidence. NaN where unknown."""

    fit: Fit
    value: float
    error: float

    @property
    def relative_error(self) -> float:
        """Infinite where unknown."""
        return self.error / self.value if self.value > 0 and np.isfinite(self.error) else np.inf


def estimate(multitau: Arrays, of: Quantity, members: NDArray[np.int64], static_q: NDArray[np.float64]) -> Estimate:
    """Fit g2 of one dynamic bin, and tell the error from the spread over its static bins.

    Parameters
    ----------
    multitau
        A result of `stream.operators.multitau`.
    of
        Which number is wanted.
    members
        (n,) The static bins of the dynamic bin, from 0. Those without light do not count; with fewer than 5 others
        nothing is known.
    static_q
        (n,) Their q. What changes linearly with it is no error: dynamics differ within a ring. NaN: unknown.
    """
    with np.errstate(all="ignore"):  # no light, or no pair yet
        g2 = multitau["G2"][:, members] / (multitau["IP"][:, members] * multitau["IF"][:, members])
    lit = np.isfinite(g2).any(axis=0)
    g2, q = g2[:, lit], static_q[lit]
    n = int(min(g2.shape[1], MAX_GROUPS))
    whole = _fit(multitau["tau"], g2)
    value = getattr(whole, of)
    if n < MIN_GROUPS or not whole.converged:
        return Estimate(fit=whole, value=value, error=np.nan)
    group = np.arange(g2.shape[1]) % n
    without = np.array([getattr(_fit(multitau["tau"], g2[:, group != i], whole), of) for i in range(n)])
    pseudo = n * value - (n - 1) * without
    trend = np.ones((n, 1))
    if np.isfinite(q).all() and np.ptp(q) > 0:
        q_of_group = np.array([q[group == i].mean() for i in range(n)])
        trend = np.column_stack([trend, q_of_group - q.mean()])
    n_free = n - trend.shape[1]
    if not np.isfinite(pseudo).all():
        return Estimate(fit=whole, value=value, error=np.nan)
    residual = pseudo - trend @ np.linalg.lstsq(trend, pseudo)[0]
    error = t.ppf(ONE_SIGMA, n_free) * np.sqrt(residual @ residual / (n_free * n))
    return Estimate(fit=whole, value=value, error=float(error))


def _fit(tau: NDArray[np.float64], g2: NDArray[np.float64], start: Fit | None = None) -> Fit:
    n = g2.shape[1]
    if n < 2:
        return fit(tau, g2.mean(axis=1) if n else np.full(len(tau), np.nan), np.full(len(tau), np.nan))
    return fit(tau, g2.mean(axis=1), g2.std(axis=1, ddof=1) / np.sqrt(n), start=start)
