"""Figures that mean something on a noisy machine: things measured in turn, and the ratio of each pair."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

AT_LEAST = 0.3
"""Seconds that a rate is measured over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure, beside what it was compared to in the same run."""

    figure: str
    value: float
    """Median."""
    unit: str
    against: str
    """The peer, the machine's own limit, both measured in turn with it; or what was asked for."""
    theirs: float
    """Median of the peer, in the same unit."""
    ratio: float
    """Median of value over that of the peer, pair by pair."""
    target: float | None
    """What the ratio should be at least, or (for times and memory) at most; None if nothing is promised."""
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


def rate(amount: float, run: Callable[[], object]) -> float:
    """Return how much of `amount` per second is done by `run`, which is repeated for `AT_LEAST` seconds."""
    begin = time.perf_counter()
    done = 0.0
    while done == 0 or time.perf_counter() - begin < AT_LEAST:
        run()
        done += amount
    return done / (time.perf_counter() - begin)


def in_turn(contenders: Mapping[str, Callable[[], float]], n: int) -> dict[str, list[float]]:
    """Take one figure of everyone, n times over, after a first one of each that does not count (compilers, caches)."""
    rounds = [{name: measure() for name, measure in contenders.items()} for _ in range(n + 1)][1:]
    return {name: [each[name] for each in rounds] for name in contenders}


def pairs(ours: Callable[[], float], theirs: Callable[[], float], n: int) -> list[tuple[float, float]]:
    """Take two figures in turn; see `in_turn`."""
    return list(zip(*in_turn({"ours": ours, "theirs": theirs}, n).values(), strict=True))


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
        theirs=median(theirs for _, theirs in measured),
        ratio=median(ratios),
        target=target,
        median_of=len(measured),
        low=min(ratios),
        high=max(ratios),
        less_is_better=less_is_better,
    )


def asked_for(figure: str, unit: str, measured: list[float], asked: float, *, less_is_better: bool = False) -> Figure:
    """Make a figure against a number instead of a peer."""
    which = "at most" if less_is_better else "at least"
    return compare(
        figure,
        unit,
        f"{which} {asked:g} {unit} asked for",
        [(ours, asked) for ours in measured],
        target=1,
        less_is_better=less_is_better,
    )
