"""Whether the beam changes the sample: the shape of its scattering drifts beyond its own noise.

Of every static bin the trend over the segments of time is taken. What a bin's counts and speckle do by chance differs
from static bin to static bin; what the sample does, the static bins of one dynamic bin do together. So their spread
tells the noise, whatever it is made of (photon statistics alone would take every slow speckle for damage), and a t-test
whether a dynamic bin drifts apart from the others. It is made for each of them; the smallest probability counts, times
their number (Bonferroni). The degrees of freedom are those of the bin alone: Welch's estimate of them, and his analysis
of variance of all bins at once, gave alarm up to 8 times too often where few static bins tell the noise.

Of an unsteady beam nothing is seen: each segment counts by its shape, its share of counts per bin. A beam that wanders
over the sample, or a sample that flows, does look like damage.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t, ttest_ind

from stream.messages import Arrays

MIN_SEGMENTS = 4

MIN_MEMBERS = 5
"""Static bins that tell the noise of a dynamic bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How far a dynamic bin drifted apart from the others, the one of which it is surest."""

    change: float
    """Of its intensity from the first segment to the last, relative, less that of the others."""
    p_value: float
    """Probability that any bin of a sample that does not change drifts as clearly."""


UNKNOWN = Drift(change=0.0, p_value=1.0)


def drift(scattering: Arrays, n_frames: int, dynamic_of_static: NDArray[np.int64]) -> Drift:
    """Return how the scattering drifts; `UNKNOWN` before there are four segments.

    Parameters
    ----------
    scattering
        A result of `stream.operators.scattering` after n_frames.
    dynamic_of_static
        (n_static,) Dynamic bin of each static bin, from 1.
    """
    begin, intensity = scattering["segment_start"], scattering["scattering_1d_segments"]
    if len(begin) < MIN_SEGMENTS:
        return UNKNOWN
    complete = (begin + (begin[1] - begin[0]) <= n_frames) & ~np.isnan(intensity).all(axis=1)
    time, intensity = begin[complete].astype(np.float64), intensity[complete]
    lit = np.isfinite(intensity).all(axis=0) & (intensity.sum(axis=0) > 0)
    intensity = intensity[:, lit]
    if len(time) < MIN_SEGMENTS or not lit.any() or not intensity.any(axis=1).all():
        return UNKNOWN
    shape = intensity / intensity.sum(axis=1, keepdims=True)
    time -= time.mean()
    # Change from the first segment to the last by a straight line, relative to the mean.
    change = (time @ shape) / (time @ time) * np.ptp(time) / shape.mean(axis=0)
    of_bin = [change[dynamic_of_static[lit] == i] for i in np.unique(dynamic_of_static[lit])]
    of_bin = [members for members in of_bin if len(members) >= MIN_MEMBERS and np.ptp(members) > 0]
    if len(of_bin) < 2:
        return UNKNOWN
    return min((_against(of_bin, i) for i in range(len(of_bin))), key=lambda each: each.p_value)


def _against(of_bin: list[NDArray[np.float64]], i: int) -> Drift:
    members, others = of_bin[i], np.concatenate([*of_bin[:i], *of_bin[i + 1 :]])
    statistic = abs(ttest_ind(members, others, equal_var=False).statistic)
    p_value = 2 * float(t.sf(statistic, min(len(members), len(others)) - 1))
    return Drift(change=float(members.mean() - others.mean()), p_value=min(1.0, len(of_bin) * p_value))
