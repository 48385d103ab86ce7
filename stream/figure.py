"""Results as pictures: g2 of every bin, mean image, scattering, intensity, two-time correlation; and two of them."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from stream.compare import Comparison
from stream.fit import Fit, fits
from stream.operators.roimap import RoiMap
from stream.result import Curves, Segments, TwoTimes, opened, read

logger = logging.getLogger(__name__)

_NEEDED = (
    *("entry/entry_identifier", "entry/start_time", "entry/data/v_dim0", "entry/data/v_dim1"),
    *("entry/instrument/detector_1/frame_time", "xpcs/qmap/dynamic_roi_map", "xpcs/spatial_mean"),
    *("xpcs/multitau/normalized_g2", "xpcs/multitau/normalized_g2_err", "xpcs/multitau/tau", "xpcs/multitau/n_pairs"),
    *("xpcs/temporal_mean/frame_average", "xpcs/temporal_mean/v_dim0", "xpcs/temporal_mean/scattering_1d"),
    *("xpcs/temporal_mean/scattering_1d_segments", "xpcs/metadata", "xpcs/n_frames", "xpcs/exit_status"),
)

_FEW_PAIRS = 32
"""Delays with fewer pairs of frames are drawn pale."""

_MOST_PANELS = 40
_UNITS = {"1/angstrom": "Å⁻¹", "A^-1": "Å⁻¹", "Å^-1": "Å⁻¹", "degree": "°", "deg": "°"}
_MOST_TWO_TIMES = 12
_LARGEST_IMAGE = 700
_LARGEST_TWO_TIME = 400
_OUTLINE = (255, 255, 255, 140)
_INK = "#1f2933"
_PALE = "#8b98a5"
_TRUTH = "#d1495b"
_OTHER = "#d1495b"


@dataclass(frozen=True, slots=True)
class _Axis:
    """One dimension of the map, e.g. q: where each bin lies."""

    name: str
    unit: str
    values: NDArray[np.float64]

    @classmethod
    def read(cls, dataset: h5py.Dataset) -> Self:
        unit = str(dataset.attrs["units"])
        return cls(str(dataset.attrs["long_name"]), _UNITS.get(unit, unit), dataset[()])

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.values).all())

    @property
    def label(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def at(self, index: int) -> str:
        space = "" if self.unit == "°" else " "
        return f"{self.name} = {self.values[index]:.4g}{space}{self.unit}"


def draw_map(roimap: RoiMap) -> Figure:
    """Draw which q each pixel belongs to."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    q = np.concatenate([[np.nan], roimap.dynamic_q])[roimap.dynamic_roi_map]
    image = axes.imshow(q, interpolation="nearest")
    axes.set(xlabel="column (pixel)", ylabel="row (pixel)", title=f"{roimap.n_dynamic} dynamic bins")
    figure.colorbar(image, label="q (Å⁻¹)")
    return figure


def draw(path: Path) -> Figure:
    """Return the picture of a result file of any format that `stream.result` reads.

    Of those that `stream.sinks.hdf5` writes also image, scattering and intensity are drawn. Above `_MOST_PANELS`
    dynamic bins an even choice of them is drawn. A fit that converged is drawn through its points. Where the run was
    simulated and the file says so, the g2 that it was made with is drawn over the measured one:
    g2 = 1 + contrast * (sum_j weights_j exp(-rate_bin factors_j tau))^2.

    Raises
    ------
    ConfigError, RoiMapError
        The file cannot be read: see `stream.result.read`.
    """
    curves = read(path)
    with opened(path) as file:
        return _draw(curves, file)


def draw_comparison(a: Curves, b: Curves, found: Comparison) -> Figure:
    """Return the picture of two results over each other, and below it how far they lie apart."""
    bins = [found.bins[i] for i in _even_choice(len(found.bins))]
    height = max(4.0, 2.0 * _grid(len(bins))[0])
    figure = Figure(figsize=(12, 0.8 + height + 2.6), layout="constrained", facecolor="white")
    header, body, below = figure.subfigures(3, 1, squeeze=False, height_ratios=[0.8, height, 2.6])[:, 0]
    header.text(
        0.012, 0.72, _plain(f"{a.run} · {a.path.name}"), fontsize=13, fontweight="bold", color=_INK, va="center"
    )
    header.text(
        0.012, 0.3, _plain(f"{b.run} · {b.path.name}"), fontsize=13, fontweight="bold", color=_OTHER, va="center"
    )
    said = f"median |z| {found.median:.3g}, max {found.largest:.3g}, {found.n_delays} delays in common"
    header.text(0.99, 0.5, said, fontsize=10, color=_INK, va="center", ha="right")
    panels = _panels(body, len(bins))
    apart = below.subplots()
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(bins)))
    for axes, each, color in zip(panels, bins, colors, strict=True):
        axes.set_title(f"{a.named(each.a)}: median |z| {each.median:.2g}", fontsize=9, color=_INK)
        for curves, index, ink, marker in ((a, each.a, _INK, "o"), (b, each.b, _OTHER, "x")):
            points = (curves.tau, curves.g2[:, index], np.nan_to_num(curves.g2_err[:, index]))
            axes.errorbar(*points, fmt=marker, markersize=3, elinewidth=0.8, color=ink)
        apart.plot(each.tau, each.z, ".-", color=color, linewidth=0.6, markersize=4)
    shown = [(curves, [getattr(each, side) for each in bins]) for curves, side in ((a, "a"), (b, "b"))]
    taus = np.concatenate([a.tau, b.tau])
    ylim = _range(np.concatenate([curves.g2[:, indices].ravel() for curves, indices in shown]))
    panels[0].set(xlim=(taus.min() / 1.5, taus.max() * 1.5), ylim=ylim)
    apart.axhspan(-1, 1, color=_PALE, alpha=0.25, linewidth=0)
    apart.set(xscale="log", xlim=panels[0].get_xlim())
    apart.set_xlabel("τ (s)", color=_INK)
    apart.set_ylabel("difference / error", color=_INK)
    apart.grid(color=_PALE, alpha=0.2, linewidth=0.6)
    if len(bins) < len(found.bins):
        body.suptitle(f"{len(bins)} of {len(found.bins)} bins", fontsize=9, color=_PALE)
    _quiet(figure)
    return figure


def _draw(curves: Curves, file: h5py.File) -> Figure:
    is_whole = all(name in file for name in _NEEDED)
    drawn = 7.5 if curves.segments is None else 9.9
    height = max(drawn if is_whole else 3.0, 2.0 * _grid(min(len(curves.q), _MOST_PANELS))[0])
    n_two_times = min(len(curves.twotime.bins), _MOST_TWO_TIMES) if curves.twotime else 0
    below = 2.9 * math.ceil(n_two_times / 4)
    heights = [0.65, height, *([below] if below else [])]
    figure = Figure(figsize=(15, sum(heights)), layout="constrained", facecolor="white")
    header, body, *rest = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    left, right = body, None
    if is_whole:
        left, right = body.subfigures(1, 2, squeeze=False, width_ratios=[1.75, 1])[0]
    _header(header, curves, file)
    _correlations(left, curves, file)
    if right is not None:
        heights = [3.5, 2.2, 1.8, *([2.4] if curves.segments else []), height - drawn + 0.1]
        image, scattering, intensity, *segments, blank = right.subplots(len(heights), 1, height_ratios=heights)
        blank.remove()
        _image(image, file)
        _scattering(scattering, file["xpcs/temporal_mean"])
        _intensity(intensity, file)
        if curves.segments is not None:
            _ageing(segments[0], curves, curves.segments)
    if curves.twotime is not None and rest:
        _two_times(rest[0], curves, curves.twotime)
    _quiet(figure)
    return figure


def _quiet(figure: Figure) -> None:
    for axes in figure.get_axes():
        axes.tick_params(colors=_INK, labelsize=8)
        axes.spines[:].set_color(_PALE)


def _two_times(figure: SubFigure, curves: Curves, twotime: TwoTimes) -> None:
    """Draw c2 of the processed bins, or an even choice of them; what is not known is blank."""
    chosen = np.linspace(0, len(twotime.bins) - 1, min(len(twotime.bins), _MOST_TWO_TIMES)).round().astype(np.intp)
    panels = figure.subplots(math.ceil(len(chosen) / 4), 4, squeeze=False).ravel()
    for axes in panels[len(chosen) :]:
        axes.remove()
    ends = (float(twotime.time[0]), float(twotime.time[-1]) + twotime.step)
    for axes, i in zip(panels, chosen, strict=False):
        c2 = twotime.c2(i).astype(np.float64)
        np.fill_diagonal(c2, np.nan)  # shot noise, no correlation
        c2 = _block_mean(c2, math.ceil(len(c2) / _LARGEST_TWO_TIME))
        c2 = np.where(np.isfinite(c2), c2, c2.T)  # symmetric: t1 and t2 may change places
        known = c2[np.isfinite(c2)]
        low, high = np.percentile(known, (1, 99)) if known.size else (0.9, 1.5)
        options: dict[str, Any] = {"origin": "lower", "extent": (*ends, *ends), "interpolation": "nearest"}
        mesh = axes.imshow(np.ma.masked_invalid(c2), vmin=low, vmax=max(high, low + 1e-6), **options)
        axes.set_title(f"two-time: {_named(curves, int(twotime.bins[i]) - 1)}", fontsize=9, color=_INK)
        axes.set_xlabel("t₁ (s)", color=_INK)
        axes.set_ylabel("t₂ (s)", color=_INK)
        bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.02, 0, 0.04, 1)))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
    if len(chosen) < len(twotime.bins):
        figure.suptitle(f"{len(chosen)} of {len(twotime.bins)} two-time correlations", fontsize=9, color=_PALE)


def _named(curves: Curves, index: int) -> str:
    return curves.named(index) if 0 <= index < len(curves.q) else f"bin {index + 1}"


def _header(figure: SubFigure, curves: Curves, file: h5py.File) -> None:
    told = curves.facts
    parts = []
    if "frames" in told:
        frame_time = file["entry/instrument/detector_1/frame_time"][()]
        parts.append(f"{told['frames']:,} frames × {frame_time * 1e3:.4g} ms")
    if "lost" in told:
        parts.append(f"{told['lost']:,} lost" if told["lost"] else "none lost")
        if late := told.get("from_file"):
            parts.append(f"{late:,} late, from a file")
        parts += [f"{told[name]:,} {name}" for name in ("late", "duplicate", "undecodable") if told.get(name)]
    if (status := told.get("exit status", "success")) != "success":
        parts.append(f"exit status: {status}")
    if curves.format != "xpcs-stream":
        parts.append(curves.format)
    if start := str(told.get("start", "")):
        parts.append(_plain(start[:19].replace("T", " ") if start[:4].isdecimal() else start))
    figure.text(0.012, 0.62, _plain(curves.run), fontsize=15, fontweight="bold", color=_INK, va="center")
    figure.text(0.012, 0.12, "   ·   ".join(parts), fontsize=10, color=_INK, va="center")


def _correlations(figure: SubFigure, curves: Curves, file: h5py.File) -> None:
    tau, g2, error = curves.tau, curves.g2, curves.g2_err
    trusted = ~(curves.n_pairs < _FEW_PAIRS)  # also where it is not told
    titles = _titles(curves, file)
    truth = _truth(json.loads(file["xpcs/metadata"][()]), g2.shape[1]) if "xpcs/metadata" in file else None
    found = fits(tau, g2, error)
    bins = _even_choice(g2.shape[1])
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(bins)))
    panels = _panels(figure, len(bins))
    for axes, index, color in zip(panels, bins, colors, strict=True):
        axes.set_title(titles[index], fontsize=9, color=_INK)
        for chosen, alpha in ((trusted, 1.0), (~trusted, 0.25)):
            points = (tau[chosen], g2[chosen, index], np.nan_to_num(error[chosen, index]))
            axes.errorbar(*points, fmt="o", markersize=3, elinewidth=0.8, color=color, alpha=alpha)
        if found[index].converged:
            axes.plot(tau, _fitted(found[index], tau), color=_INK, linewidth=0.9, alpha=0.7, label="fit")
        if truth:
            axes.plot(tau, truth.g2(tau, index), color=_TRUTH, linewidth=1.1, label=truth.label, zorder=3)
    panels[0].set(xlim=(tau[0] / 1.5, tau[-1] * 1.5), ylim=_range(g2[trusted]))
    if panels[0].get_legend_handles_labels()[1]:
        panels[0].legend(fontsize=7, frameon=False, loc="upper right")
    if len(bins) < g2.shape[1]:
        figure.suptitle(f"{len(bins)} of {g2.shape[1]} bins", fontsize=9, color=_PALE)


def _titles(curves: Curves, file: h5py.File) -> list[str]:
    """Return what each bin is called: where it lies, along the dimensions of the map that differ."""
    if "entry/data/v_dim0" not in file or "entry/data/v_dim1" not in file:
        return [curves.named(i) for i in range(len(curves.q))]
    dims = [_Axis.read(file[f"entry/data/v_dim{dim}"]) for dim in (0, 1)]
    titled = [dim for dim in dims if dim.known and np.unique(dim.values).size > 1]
    return [", ".join(dim.at(i) for dim in titled) or f"bin {i + 1}" for i in range(len(curves.q))]


def _fitted(found: Fit, tau: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(found.baseline + found.contrast * np.exp(-2 * (found.rate * tau) ** found.stretch))


def _panels(figure: SubFigure, n: int) -> list[Axes]:
    """Return panels for g2 against the logarithm of tau, which share their axes."""
    rows, columns = _grid(n)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[n:]:
        axes.remove()
    for panel, axes in enumerate(panels[:n]):
        axes.axhline(1, color=_PALE, linewidth=0.6)
        axes.set_xscale("log")
        axes.grid(color=_PALE, alpha=0.2, linewidth=0.6)
        axes.xaxis.set_minor_locator(NullLocator())  # most of the drawing time would go into them
        if panel >= len(panels) - columns:
            axes.set_xlabel("τ (s)", color=_INK)
        if panel % columns == 0:
            axes.set_ylabel("g₂", color=_INK)
    return list(panels[:n])


@dataclass(frozen=True, slots=True)
class _Truth:
    contrast: float
    rate: NDArray[np.float64]
    weights: NDArray[np.float64]
    factors: NDArray[np.float64]
    label: str

    def g2(self, tau: NDArray[np.float64], index: int) -> NDArray[np.float64]:
        g1 = np.exp(-self.rate[index] * np.outer(tau, self.factors)) @ self.weights
        return np.asarray(1 + self.contrast * g1**2)


def _truth(metadata: Mapping[str, Any], n_bins: int) -> _Truth | None:
    """Return what a simulated detector says of itself (see `stream.ingest.simulated`), if the run was simulated."""
    told = metadata.get("truth")
    if told is None:
        return None
    try:
        contrast, stretch = float(told["contrast"]), float(told.get("stretch", 1))
        rate, weights, factors = (np.asarray(told[name], float) for name in ("rate", "weights", "factors"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        logger.warning("truth is not drawn: it cannot be read: %r", error)
        return None
    if rate.shape != (n_bins,) or weights.shape != factors.shape or weights.ndim != 1:
        logger.warning("truth is not drawn: it has rate %s for %d bins", rate.shape, n_bins)
        return None
    return _Truth(contrast, rate, weights, factors, "simulated" + (f", stretch {stretch:g}" if stretch != 1 else ""))


def _image(axes: Axes, file: h5py.File) -> None:
    image, bins = file["xpcs/temporal_mean/frame_average"][()], file["xpcs/qmap/dynamic_roi_map"][()]
    rows, columns = image.shape
    block = math.ceil(max(image.shape) / _LARGEST_IMAGE)
    image, bins = _block_mean(image, block), bins[::block, ::block]
    counts = image[np.isfinite(image) & (image > 0)]
    norm: Normalize = Normalize(0, 1)
    if counts.size:
        low, high = np.percentile(counts, (1, 99.9))
        norm = LogNorm(low, max(high, low * 1.01), clip=True)
    colors = colormaps["magma"].with_extremes(bad="#d8dee4")
    colors = colormaps["magma"].with_extremes(bad="#d8dee4")
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    mesh = axes.imshow(np.ma.masked_invalid(image), norm=norm, cmap=colors, interpolation="nearest", extent=extent)
    outline = np.zeros((*bins.shape, 4), np.uint8)
    outline[:-1][bins[:-1] != bins[1:]] = _OUTLINE
    outline[:, :-1][bins[:, :-1] != bins[:, 1:]] = _OUTLINE
    axes.imshow(outline, extent=extent)
    axes.set_title("mean counts per pixel and frame, bins outlined", fontsize=9, color=_INK)
    bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.02, 0, 0.025, 1)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)


def _scattering(axes: Axes, group: h5py.Group) -> None:
    dim = _Axis.read(group["v_dim0"])
    if not dim.known:
        dim = _Axis("bin", "", np.arange(1.0, len(dim.values) + 1))
    mean, segments = group["scattering_1d"][()].ravel(), np.atleast_2d(group["scattering_1d_segments"][()])
    values, ring = np.unique(dim.values, return_inverse=True)
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(segments)))
    for segment, color in zip(segments, colors, strict=True):
        axes.plot(values, _mean_per(ring, segment), color=color, linewidth=0.8, alpha=0.7)
    axes.plot(values, _mean_per(ring, mean), "o-", color=_INK, markersize=2.5, linewidth=0.8)
    if np.nanmax(mean, initial=0) > 0:
        axes.set_yscale("log")
    if values[0] > 0 and values[-1] > 100 * values[0]:
        axes.set_xscale("log")
    axes.set_xlabel(dim.label, color=_INK)
    axes.set_ylabel("counts", color=_INK)
    axes.set_title(f"scattering: whole run (dark) and in {len(segments)} parts, early to late", fontsize=9, color=_INK)
    axes.grid(color=_PALE, alpha=0.2, linewidth=0.6)


def _intensity(axes: Axes, file: h5py.File) -> None:
    group = file["xpcs/spatial_mean"]
    frame_time = file["entry/instrument/detector_1/frame_time"][()]
    if "frame" in group:
        axes.plot(
            group["frame"][()] * frame_time, group["intensity"][()], color=colormaps["viridis"](0.4), linewidth=0.8
        )
    if "ledger" in file["xpcs"]:
        spans = [(first * frame_time, (end - first) * frame_time) for first, end in file["xpcs/ledger/lost_spans"]]
        lost: dict[str, Any] = {
            "transform": axes.get_xaxis_transform(),
            "color": _TRUTH,
            "alpha": 0.4,
            "linewidth": 0.8,
        }
        axes.broken_barh(spans, (0, 1), **lost)
    axes.set_xlabel("time (s)", color=_INK)
    axes.set_ylabel("counts", color=_INK)
    axes.set_title("mean counts per pixel and frame" + "; lost frames red", fontsize=9, color=_INK)
    axes.grid(color=_PALE, alpha=0.2, linewidth=0.6)


def _ageing(axes: Axes, curves: Curves, parts: Segments) -> None:
    """Draw g2 of the first bin of which it is known, of every segment."""
    bins = np.flatnonzero(np.isfinite(parts.g2).any(axis=(0, 1)))
    if not bins.size:
        axes.remove()
        return
    index = int(bins[0])
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(parts.start)))
    for g2, error, color in zip(parts.g2[:, :, index], parts.g2_err[:, :, index], colors, strict=True):
        known = np.isfinite(g2)
        points = curves.tau[known], g2[known], np.nan_to_num(error[known])
        axes.errorbar(*points, fmt=".-", markersize=3, linewidth=0.8, elinewidth=0.6, color=color, alpha=0.8)
    axes.plot(curves.tau, curves.g2[:, index], color=_INK, linewidth=1.2)
    trusted = ~(curves.n_pairs < _FEW_PAIRS * len(parts.start))
    axes.set(xscale="log", ylim=_range(parts.g2[:, trusted, index]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("τ (s)", color=_INK)
    axes.set_ylabel("g₂", color=_INK)
    named = f"g₂, {curves.named(index)}: whole run (dark) and in {len(parts.start)} parts, early to late"
    axes.set_title(named, fontsize=9, color=_INK)
    axes.grid(color=_PALE, alpha=0.2, linewidth=0.6)


def _mean_per(ring: NDArray[np.intp], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the bins of each ring that are known; NaN where none is."""
    known = np.isfinite(values)
    total = np.bincount(ring[known], weights=values[known], minlength=ring.max() + 1)
    number = np.bincount(ring[known], minlength=ring.max() + 1)
    mean = np.full(total.shape, np.nan)
    np.divide(total, number, out=mean, where=number > 0)
    return mean


def _block_mean(image: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Return the mean over blocks of pixels, of those that are known; NaN where none is."""
    if block == 1:
        return image
    known = np.isfinite(image)
    sums, numbers = np.where(known, image, 0.0), known.astype(np.float64)
    for axis, size in enumerate(image.shape):
        edges = np.arange(0, size, block)
        sums, numbers = np.add.reduceat(sums, edges, axis), np.add.reduceat(numbers, edges, axis)
    mean = np.full(sums.shape, np.nan)
    np.divide(sums, numbers, out=mean, where=numbers > 0)
    return mean


def _range(g2: NDArray[np.float64]) -> tuple[float, float]:
    known = g2[np.isfinite(g2)]
    if not known.size:
        return 0.9, 1.5
    low, high = min(1.0, known.min()), max(1.0, known.max())
    margin = 0.12 * (high - low) or 0.1
    return low - margin, high + margin


def _grid(n_panels: int) -> tuple[int, int]:
    columns = min(4, math.ceil(math.sqrt(n_panels)))
    return math.ceil(n_panels / columns), columns


def _even_choice(n_bins: int) -> NDArray[np.intp]:
    return np.unique(np.linspace(0, n_bins - 1, min(n_bins, _MOST_PANELS)).round().astype(np.intp))


def _plain(text: str) -> str:
    """Return text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
