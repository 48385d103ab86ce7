"""What a result tells, in words and numbers for a table: its run, and the dynamics at every q."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from stream.compare import Comparison
from stream.fit import Fit, fits
from stream.live.dynamics import PowerLaw
from stream.result import Curves, Segments


def facts(curves: Curves, found: Sequence[Fit]) -> Mapping[str, object]:
    """Describe the run, and how its rates go with q; `found` is what `dynamics` found."""
    told: dict[str, object] = {"run": curves.run, "result": f"{curves.path}, by {curves.format}", **curves.facts}
    told["delays"] = f"{len(curves.tau)}, {curves.tau[0]:.4g} s to {curves.tau[-1]:.4g} s"
    if curves.converted:
        told["in the file"] = ", ".join(curves.converted)
    if curves.twotime is not None:
        n, step = len(curves.twotime.time), curves.twotime.step
        told["two-time"] = f"{len(curves.twotime.bins)} bins, {n} times of {step:.4g} s"
    if (parts := curves.segments) is not None:
        told["segments"] = f"{len(parts.start)} of {parts.start[1] - parts.start[0]:.4g} s"
    rate = np.array([each.rate if each.converged else math.nan for each in found])
    law = PowerLaw.of(curves.q, rate, np.array([each.rate_err for each in found]))
    if math.isfinite(law.diffusion):
        told["D"] = f"{with_error(law.diffusion, law.diffusion_err)} Å²/s (rate / q², mean of the converged)"
    if math.isfinite(law.exponent):
        told["rate ~ q^n"] = f"n = {with_error(law.exponent, law.exponent_err)}"
    return told


def dynamics(curves: Curves) -> list[Fit]:
    """Fit an exponential decay to g2 of every bin."""
    return fits(curves.tau, curves.g2, curves.g2_err)


def table_of_fits(curves: Curves, found: Sequence[Fit]) -> Table:
    """Return contrast, rate and baseline of every bin, with their standard errors."""
    table = _table("q (1/Å)", "contrast", "rate (1/s)", "τ = 1/rate (s)", "baseline", "converged")
    for i, each in enumerate(found):
        table.add_row(
            _label(curves, i),
            with_error(each.contrast, each.contrast_err),
            with_error(each.rate, each.rate_err),
            with_error(1 / each.rate, each.rate_err / each.rate**2) if each.rate > 0 else "–",
            with_error(each.baseline, each.baseline_err),
            "yes" if each.converged else "no",
            style="" if each.converged else "dim",
        )
    return table


def table_of_ageing(curves: Curves, parts: Segments) -> Table:
    """Return contrast and rate of every bin early and late in the run, and the change of the rate in its errors."""
    late = parts.late
    early_fits, late_fits = (fits(curves.tau, parts.g2[i], parts.g2_err[i]) for i in (0, late))
    table = _table("q (1/Å)", "contrast early", "late", "rate early", "late", "change / error")
    spans = (f"{name}: {parts.start[i]:.4g} s to {parts.stop[i]:.4g} s" for name, i in (("early", 0), ("late", late)))
    table.title, table.title_justify, table.title_style = f"{', '.join(spans)}; rates in 1/s", "left", "dim"
    for i, both in enumerate(zip(early_fits, late_fits, strict=True)):
        converged = all(each.converged for each in both)
        contrasts = (with_error(each.contrast, each.contrast_err) for each in both)
        rates = (with_error(each.rate, each.rate_err) for each in both)
        change = (
            (both[1].rate - both[0].rate) / math.hypot(both[0].rate_err, both[1].rate_err) if converged else math.nan
        )
        told = f"{change:+.1f}" if math.isfinite(change) else "–"
        table.add_row(_label(curves, i), *contrasts, *rates, told, style="" if converged else "dim")
    return table


def table_of_differences(a: Curves, found: Comparison) -> Table:
    """Return how far g2 of every bin lie apart, in units of their errors."""
    table = _table("q (1/Å)", "delays", "median |z|", "max |z|", "at τ (s)")
    for each in found.bins:
        if not each.z.size:
            table.add_row(_label(a, each.a), "0", "–", "–", "–", style="dim")
            continue
        at = each.tau[np.argmax(np.abs(each.z))]
        table.add_row(_label(a, each.a), str(each.z.size), f"{each.median:.3g}", f"{each.largest:.3g}", f"{at:.4g}")
    return table


def with_error(value: float, error: float) -> str:
    """Write a value with its standard error as 1.832(15): 1.832 +- 0.015; a dash where the error is larger than it."""
    if not math.isfinite(value) or error >= abs(value):
        return "–"
    if not (math.isfinite(error) and error > 0):
        return f"{value:.4g}"
    power = math.floor(math.log10(abs(value)))
    power = 0 if -4 < power < 6 else power
    value, error = value / 10.0**power, error / 10.0**power
    decimals = max(0, 1 - math.floor(math.log10(error)))
    written = f"{value:.{decimals}f}({error * 10**decimals:.0f})"
    return f"{written}e{power}" if power else written


def _label(curves: Curves, index: int) -> str:
    if not math.isfinite(curves.q[index]):
        return f"bin {index + 1}"
    azimuth = f", {curves.phi[index]:.4g}°" if np.unique(curves.phi[np.isfinite(curves.phi)]).size > 1 else ""
    return f"{curves.q[index]:.4g}{azimuth}"


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right", no_wrap=True, style="bold" if i == 0 else "")
    return table
