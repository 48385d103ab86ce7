"""What the curves tell: contrast and rate of every bin, and how the rate goes with q."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stream.fit import Fit, fits
from stream.messages import Arrays

NUMBERS = ("contrast", "rate", "baseline", "stretch")


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """``rate = coefficient * q**exponent``, each number with its standard error; NaN where unknown."""

    diffusion: float
    """``rate / q**2``, the mean over the bins (angstrom^2/s)."""
    diffusion_err: float
    exponent: float
    exponent_err: float
    coefficient: float
    """Goes with `exponent`, for the line through the rates."""

    @classmethod
    def of(cls, q: NDArray[np.float64], rate: NDArray[np.float64], rate_err: NDArray[np.float64]) -> Self:
        """Fit rates above 0, weighted by their errors; these grow until they explain how the rates scatter."""
        known = np.isfinite(q) & (q > 0) & np.isfinite(rate) & (rate > 0) & (rate_err > 0)
        diffusion = diffusion_err = exponent = exponent_err = coefficient = np.nan
        if known.any():
            value, error = rate[known] / q[known] ** 2, rate_err[known] / q[known] ** 2
            diffusion, diffusion_err = _mean(value, error)
        if np.unique(q[known]).size > 2:
            x, y, error = np.log(q[known]), np.log(rate[known]), rate_err[known] / rate[known]
            weight = 1 / error**2
            middle = weight @ x / weight.sum()
            spread = weight @ (x - middle) ** 2
            exponent = float(weight @ ((x - middle) * y) / spread)
            at_middle = float(weight @ y / weight.sum())
            excess = (((y - at_middle - exponent * (x - middle)) / error) ** 2).sum() / (len(x) - 2)
            exponent_err = float(np.sqrt(max(1.0, excess) / spread))
            coefficient = float(np.exp(at_middle - exponent * middle))
        return cls(
            diffusion=diffusion,
            diffusion_err=diffusion_err,
            exponent=exponent,
            exponent_err=exponent_err,
            coefficient=coefficient,
        )


def _mean(value: NDArray[np.float64], error: NDArray[np.float64]) -> tuple[float, float]:
    weight = 1 / error**2
    mean = weight @ value / weight.sum()
    excess = (((value - mean) / error) ** 2).sum() / (len(value) - 1) if len(value) > 1 else 1.0
    return float(mean), float(np.sqrt(max(1.0, excess) / weight.sum()))


class Dynamics:
    """Fits of the bins, each beginning where that of the result before ended."""

    def __init__(self, q: NDArray[np.float64]) -> None:
        self._q = q
        self._last: dict[str, list[Fit]] = {}

    def of(self, multitau: Arrays) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Fit a result of `stream.operators.multitau` by both models.

        Returns
        -------
        facts
            By model (single, stretched) the `PowerLaw`.
        arrays
            ``<model>_<number>`` and ``<model>_<number>_err`` (n_dynamic,), ``<model>_converged``.
        """
        facts: dict[str, Any] = {}
        arrays: dict[str, NDArray[Any]] = {}
        for model in ("single", "stretched"):
            before = self._last.get(model)
            found = fits(
                multitau["tau"],
                multitau["g2"],
                multitau["g2_err"],
                stretched=model == "stretched",
                start=before if before and len(before) == multitau["g2"].shape[1] else None,
            )
            self._last[model] = found
            for number in NUMBERS:
                arrays[f"{model}_{number}"] = np.array([getattr(each, number) for each in found], "<f8")
                arrays[f"{model}_{number}_err"] = np.array([getattr(each, f"{number}_err") for each in found], "<f8")
            converged = np.array([each.converged for each in found], bool)
            arrays[f"{model}_converged"] = converged.astype("|u1")
            q = self._q if len(self._q) == len(found) else np.full(len(found), np.nan)
            rate = np.where(converged, arrays[f"{model}_rate"], np.nan)
            law = PowerLaw.of(q, rate, arrays[f"{model}_rate_err"])
            facts[model] = {name: getattr(law, name) for name in law.__dataclass_fields__}
        return facts, arrays
