"""Two results of the same sample, or of the same frames by two programs: how far their g2 lie apart.

Of a bin and a delay that both have, ``z = (g2_a - g2_b) / sqrt(g2_err_a**2 + g2_err_b**2)``. Of two measurements of the
same dynamics the median of abs(z) is 0.67. Two programs that correlate the same frames have the same noise: there it is
to be far smaller, and is no statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.result import Curves

TAU_TOLERANCE = 1e-6
"""Delays are the same that differ by less, relative: one of the formats keeps them in float32."""

Q_TOLERANCE = 1e-3
"""Bins are the same whose q differ by less, relative ..."""

PHI_TOLERANCE = 0.1
"""... and whose azimuths do by less (degree), where both results tell them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """One bin that both results have."""

    a: int
    """From 0."""
    b: int
    tau: NDArray[np.float64]
    """(n,) Delays in common, at which both g2 are known with an error (s)."""
    z: NDArray[np.float64]
    """(n,)"""

    @property
    def median(self) -> float:
        """Of |z|; NaN if there is no delay."""
        return float(np.median(np.abs(self.z))) if self.z.size else np.nan

    @property
    def largest(self) -> float:
        """Of |z|; NaN if there is no delay."""
        return float(np.abs(self.z).max()) if self.z.size else np.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two results have in common, and how it differs."""

    bins: Sequence[Bin]
    n_delays: int
    """In common."""
    notes: Sequence[str]
    """What is not as one would think: other delays, bins that one of them has, errors that one does not tell."""

    @property
    def median(self) -> float:
        """Of |z| of all bins and delays."""
        return float(np.median(np.abs(np.concatenate([each.z for each in self.bins]))))

    @property
    def largest(self) -> float:
        """Of |z| of all bins and delays."""
        return float(np.abs(np.concatenate([each.z for each in self.bins])).max())


def compare(a: Curves, b: Curves, *, q_tolerance: float = Q_TOLERANCE) -> Comparison:
    """Compare two results bin by bin.

    Where one of them tells no errors at all, those of the other are taken alone, and that is noted.

    Raises
    ------
    ConfigError
        They have no bin, no delay or no known value in common, a bin of one is several of the other, or neither tells
        errors: the message names it.
    """
    pairs, notes = _bins(a, b, q_tolerance)
    of_a, of_b = _same(a.tau, b.tau, TAU_TOLERANCE)
    if not of_a.size:
        raise ConfigError(f"no delay in common: {_delays(a)}, {_delays(b)}")
    if of_a.size < max(len(a.tau), len(b.tau)):
        notes.append(f"{of_a.size} delays in common: {_delays(a)}, {_delays(b)}")
    notes += [f"{each.path}: {what}, converted" for each in (a, b) for what in each.converted]
    variances = []
    for each, rows in ((a, of_a), (b, of_b)):
        variance = each.g2_err[rows] ** 2
        if not (variance > 0).any():
            notes.append(f"{each.path} tells no errors: those of the other are taken alone")
            variance = np.zeros_like(variance)
        variances.append(variance)
    if not any(variance.any() for variance in variances):
        raise ConfigError(f"neither {a.path} nor {b.path} tells errors of g2 at these delays")
    bins = []
    for i, j in pairs:
        difference = a.g2[of_a, i] - b.g2[of_b, j]
        variance = variances[0][:, i] + variances[1][:, j]
        known = np.isfinite(difference) & (variance > 0)
        bins.append(Bin(a=i, b=j, tau=a.tau[of_a][known], z=difference[known] / np.sqrt(variance[known])))
    if not any(each.z.size for each in bins):
        raise ConfigError(f"{a.path} and {b.path} have no g2 in common that both know with its error")
    return Comparison(bins=bins, n_delays=of_a.size, notes=notes)


def _bins(a: Curves, b: Curves, tolerance: float) -> tuple[list[tuple[int, int]], list[str]]:
    if a.map_digest == b.map_digest:
        return [(i, i) for i in range(len(a.q))], []
    for each in (a, b):
        if not np.isfinite(each.q).any():
            raise ConfigError(f"{each.path} does not tell the q of its bins, and its map is not that of the other")
    phi_told = np.isfinite(a.phi).any() and np.isfinite(b.phi).any()
    with np.errstate(invalid="ignore"):
        near = np.abs(a.q[:, None] - b.q) <= tolerance * np.abs(b.q)
        if phi_told:
            near &= np.abs((a.phi[:, None] - b.phi + 180) % 360 - 180) <= PHI_TOLERANCE
    for each, n_near in ((a, near.sum(axis=1)), (b, near.sum(axis=0))):
        if (n_near > 1).any():
            i = int(np.argmax(n_near))
            raise ConfigError(
                f"{each.path}: bin {i + 1} ({each.named(i)}) is {n_near[i]} bins of the other within {tolerance:g} of q"
                + ("" if phi_told else "; not both tell their azimuths")
            )
    if not near.any():
        raise ConfigError(f"no bin in common within {tolerance:g} of q: {_range(a)}, {_range(b)}")
    notes = []
    if n_alone := len(a.q) - int(near.any(axis=1).sum()):
        notes.append(f"{n_alone} of {len(a.q)} bins of {a.path} are not in {b.path} within {tolerance:g} of q")
    if n_alone := len(b.q) - int(near.any(axis=0).sum()):
        notes.append(f"{n_alone} of {len(b.q)} bins of {b.path} are not in {a.path} within {tolerance:g} of q")
    return [(int(i), int(j)) for i, j in np.argwhere(near)], notes


def _same(
    a: NDArray[np.float64], b: NDArray[np.float64], tolerance: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return where the values stand that both have; both ascend."""
    first = np.searchsorted(b, a * (1 - tolerance))
    same = np.flatnonzero(np.searchsorted(b, a * (1 + tolerance), side="right") > first)
    return same, first[same]


def _delays(each: Curves) -> str:
    return f"{each.path} has {len(each.tau)} from {each.tau[0]:.4g} s to {each.tau[-1]:.4g} s"


def _range(each: Curves) -> str:
    q = each.q[np.isfinite(each.q)]
    return f"{each.path} has {len(q)} from {q.min():.4g} to {q.max():.4g} 1/angstrom"
