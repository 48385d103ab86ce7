"""Figures as a picture: a row for each, with what it was measured against, on a logarithmic axis per unit."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from bench.measure import Figure

MET, MISSED, OPEN = "tab:green", "tab:red", "tab:blue"


def draw(figures: Sequence[Figure], path: Path) -> None:
    """Write a picture of at least one figure; its format follows the name."""
    panels = [list(each) for _, each in groupby(sorted(figures, key=lambda f: f.unit), key=lambda f: f.unit)]
    panels.sort(key=len, reverse=True)
    rows = [len(panel) + 2 for panel in panels]
    canvas = Canvas(figsize=(13, 0.26 * sum(rows) + 0.6), layout="constrained")
    axes = canvas.subplots(len(panels), squeeze=False, height_ratios=rows)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel)
    axes[0].legend(
        *axes[0].get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False
    )
    canvas.savefig(path, dpi=110)


def _draw_panel(axis: Axes, figures: list[Figure]) -> None:
    """Ours, theirs, and where the target would have us; the ratio with its lowest and highest at the right."""
    for row, each in enumerate(figures):
        colour = OPEN if each.target is None else MET if each.met else MISSED
        axis.plot([each.theirs, each.value], [row, row], color=colour, linewidth=2, alpha=0.35)
        axis.plot(each.value, row, "o", color=colour)
        text = f"{each.ratio:.3g} ×  ({each.low:.3g} to {each.high:.3g})"
        if each.target is not None:
            text += f"  asked {'≤' if each.less_is_better else '≥'} {each.target:g}"
        axis.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=8)
    rows = range(len(figures))
    axis.plot([], "o", color=OPEN, label="ours: green if its target is met, red if not")
    axis.plot([f.theirs for f in figures], rows, "|", color="black", markersize=10, label="against which it is held")
    asked = [(f.target * f.theirs, row) for row, f in enumerate(figures) if f.target is not None]
    if asked:
        axis.plot(*zip(*asked, strict=True), "d", color="black", fillstyle="none", markersize=5, label="target")
    axis.set_xscale("log")
    axis.set_yticks(rows, [f"{f.figure}  |  {f.against}" for f in figures], fontsize=8)
    axis.set_ylim(len(figures) - 0.5, -0.5)
    axis.set_xlabel(figures[0].unit)
    axis.grid(axis="x", alpha=0.3)
