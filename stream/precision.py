"""When a run has measured enough: what is wanted, and a judge who tells whether to go on."""

from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Literal

import numpy as np

from stream import damage
from stream.damage import Drift
from stream.errors import ConfigError
from stream.messages import Result, RunStart, RunStop
from stream.operators.roimap import RoiMap
from stream.uncertainty import MIN_GROUPS, Quantity, estimate

GROWTH = 1.1
"""Looked at again are results of so many times the frames: chances to stop by luck grow with the logarithm of time."""

IN_A_ROW = 2
"""Looks that must find the goal reached: an error that is small by luck is not so for long."""

RELAXATIONS = 20
"""Of the field, 1/rate each, before anything is believed: by then delays reach well beyond the decay."""

Outcome = Literal["go on", "precise", "dose spent", "radiation damage", "detector done", "no results"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is wanted of one run, and what it may cost.

    Raises
    ------
    ConfigError
        A number cannot be meant.
    """

    q: float
    """1/angstrom; of the dynamic bin next to it."""
    of: Quantity = "rate"
    relative_error: float
    """Half of the interval of 68 % confidence over the value."""
    max_dose: float = inf
    """Exposure to the full beam (s): frames times count_time times `transmission`."""
    transmission: float = 1.0
    """Of the attenuator."""
    max_damage: float = inf
    """Relative change of the scattering of a dynamic bin against the others; infinite: nobody looks."""
    false_alarm: float = 0.01
    """Probability of "radiation damage" in a run of a sample that does not change, however long."""

    def __post_init__(self) -> None:
        for name in ("q", "relative_error", "max_dose", "max_damage"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} {getattr(self, name)} is not above 0")
        for name in ("transmission", "false_alarm"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name)} is not above 0 and up to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether to go on, and why."""

    outcome: Outcome
    reason: str
    """One line, with the numbers."""
    n_frames: int = 0
    dose: float = 0.0
    """Exposure to the full beam so far (s)."""
    value: float = nan
    """Contrast or rate (1/s), NaN while unknown."""
    error: float = nan
    """Half of its interval of 68 % confidence."""
    drift: Drift = damage.UNKNOWN


class Judge:
    """Follows one run by its results.

    Precise is what two looks in a row found so, each with a tenth more frames than the one before it, in a run of at
    least 20 relaxation times. Damage is what its test finds at look number k with an error probability of
    false_alarm / (k (k + 1)), which adds up to false_alarm over all looks there can ever be.

    Parameters
    ----------
    goal
        What is wanted.
    roimap
        The map that the results are made with.

    Raises
    ------
    ConfigError
        The map has no such q, or too few static bins there to tell an error, or to see damage.
    """

    def __init__(self, goal: Goal, roimap: RoiMap) -> None:
        self._goal = goal
        self._dynamic_of_static = roimap.dynamic_of_static
        self._bin = _bin_at(goal.q, roimap)
        self._q = float(roimap.dynamic_q[self._bin])
        self._members = np.flatnonzero(roimap.dynamic_of_static == self._bin + 1)
        self._static_q = roimap.static_q[self._members]
        if len(self._members) < MIN_GROUPS:
            few = f"the bin at q = {self._q:g} has {len(self._members)} static bins"
            raise ConfigError(f"{few}: an error shows in the spread of {MIN_GROUPS} or more")
        n_members = np.bincount(roimap.dynamic_of_static)[1:]
        if isfinite(goal.max_damage) and np.count_nonzero(n_members >= damage.MIN_MEMBERS) < 2:
            raise ConfigError(f"damage shows in two or more dynamic bins of {damage.MIN_MEMBERS} or more static bins")
        self._start: RunStart | None = None
        self._n_frames = 0
        self._value = self._error = nan
        self._drift = damage.UNKNOWN
        self._look_due = {"multitau": 0.0, "scattering": 0.0}
        self._n_precise = self._n_drift = 0

    def take(self, output: RunStart | Result | RunStop) -> Verdict:
        """Take what is known of the run, in order; what came before may come again.

        Raises
        ------
        ConfigError
            A result is made with another map.
        """
        match output:
            case RunStart():
                self._start = output
            case Result(operator="multitau" | "scattering" as name, n_frames=n_frames):
                self._n_frames = max(self._n_frames, n_frames)
                if n_frames > 0 and n_frames >= self._look_due[name]:
                    self._look_due[name] = GROWTH * n_frames
                    return self._look(output)
            case RunStop():
                return self._verdict("detector done")
        return self._verdict("dose spent" if self._dose >= self._goal.max_dose else "go on")

    def _look(self, result: Result) -> Verdict:
        goal = self._goal
        n_static = result.arrays["G2" if result.operator == "multitau" else "scattering_1d_segments"].shape[1]
        if n_static != len(self._dynamic_of_static):
            raise ConfigError(f"results have {n_static} static bins, the map {len(self._dynamic_of_static)}")
        if result.operator == "multitau":
            found = estimate(result.arrays, goal.of, self._members, self._static_q)
            self._value, self._error = found.value, found.error
            is_long = (
                self._start is not None and result.n_frames * self._start.frame_time * found.fit.rate > RELAXATIONS
            )
            is_precise = is_long and found.relative_error <= goal.relative_error
            self._n_precise = self._n_precise + 1 if is_precise else 0
            if self._n_precise >= IN_A_ROW:
                return self._verdict("precise")
        elif isfinite(goal.max_damage):
            self._n_drift += 1
            self._drift = damage.drift(result.arrays, result.n_frames, self._dynamic_of_static)
            level = goal.false_alarm / (self._n_drift * (self._n_drift + 1))
            if self._drift.p_value < level and abs(self._drift.change) > goal.max_damage:
                return self._verdict("radiation damage")
        return self._verdict("dose spent" if self._dose >= goal.max_dose else "go on")

    @property
    def _dose(self) -> float:
        count_time = self._start.count_time if self._start is not None else 0.0
        return self._n_frames * count_time * self._goal.transmission

    def _verdict(self, outcome: Outcome) -> Verdict:
        return Verdict(
            outcome=outcome,
            reason=f"{outcome}: {self._told(outcome)}",
            n_frames=self._n_frames,
            dose=self._dose,
            value=self._value,
            error=self._error,
            drift=self._drift,
        )

    def _told(self, outcome: Outcome) -> str:
        goal, unit = self._goal, " 1/s" if self._goal.of == "rate" else ""
        known = "not known"
        if isfinite(self._error):
            relative = f"{self._error / self._value:.2%} of {goal.relative_error:.2%} wanted"
            known = f"{self._value:.4g} ± {self._error:.2g}{unit} ({relative})"
        told = (
            f"{goal.of} at q = {self._q:.4g} 1/Å is {known} after {self._n_frames} frames, {self._dose:.4g} s of beam"
        )
        match outcome:
            case "radiation damage":
                change = f"{self._drift.change:+.2%}, {goal.max_damage:.2%} allowed, p = {self._drift.p_value:.1g}"
                return f"scattering changed by {change}; {told}"
            case "dose spent":
                return f"{told} of {goal.max_dose:.4g} s"
            case _:
                return told


def _bin_at(q: float, roimap: RoiMap) -> int:
    known = roimap.dynamic_q[np.isfinite(roimap.dynamic_q)]
    if not known.size:
        raise ConfigError("the map does not tell q of its bins")
    # Half a bin beyond the outermost is still theirs.
    margin = np.diff(np.unique(known)).max() / 2 if np.unique(known).size > 1 else known[0]
    if not known.min() - margin <= q <= known.max() + margin:
        raise ConfigError(f"q {q:g} 1/angstrom is outside of the map, {known.min():g} to {known.max():g}")
    return int(np.nanargmin(np.abs(roimap.dynamic_q - q)))
