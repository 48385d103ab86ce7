"""Figures that mean something on a noisy machine: two things measured in turn, and the ratio of each pair."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure, beside what it was compared to in the same run."""

    figure: str
    value: float
    """Median."""
    unit: str
    against: str
    """The peer, or the machine's own limit, measured in turn with it."""
    ratio: float
    """Median of value over that of the peer, pair by pair."""
    target: float | None
    """What the ratio should be at least, or (for times) at most; None if nothing is promised."""
    median_of: int
    """Number of pairs."""
    low: float
    """Smallest ratio of a pair."""
    high: float
    """Largest ratio of a pair."""
    less_is_better: bool = False

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the target."""
        if self.target is None:
            return True
        return self.ratio <= self.target if self.less_is_better else self.ratio >= self.target


def seconds(run: Callable[[], object]) -> float:
    """Return how long `run` takes by the wall clock."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def pairs(ours: Callable[[], float], theirs: Callable[[], float], n: int) -> list[tuple[float, float]]:
    """Take both figures in turn, after one of each that does not count (compilers, caches)."""
    return [(ours(), theirs()) for _ in range(n + 1)][1:]


def compare(
    figure: str,
    unit: str,
    against: str,
    measured: list[tuple[float, float]],
    *,
    target: float | None = None,
    less_is_better: bool = False,
) -> Figure:
    """Make a figure of pairs (ours, theirs) in the same unit."""
    ratios = [ours / theirs for ours, theirs in measured]
    return Figure(
        figure=figure,
        value=median(ours for ours, _ in measured),
        unit=unit,
        against=against,
        ratio=median(ratios),
        target=target,
        median_of=len(measured),
        low=min(ratios),
        high=max(ratios),
        less_is_better=less_is_better,
    )
