"""Partial sums of regions, added up and made into results of the whole detector.

Regions publish their partial sums at the same frames, but not at the same moment. They are merged at the newest frame
that all of them have reached; one that is more than `patience` behind the others is left out until it has caught up, so
that a node that was lost does not hold up what the others know. The ledger says which are left out, or never began.

Of each region are kept the newest sums, and fewer of older ones: two of every multiple of 2, 4, 8 steps. So there is a
frame in common with a region that lags.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stream.errors import CheckpointError
from stream.ledger import Ledger
from stream.messages import Arrays, Output, Result, RunStart, RunStop
from stream.protocols import Operator

_log = logging.getLogger(__name__)

KEPT = 2
"""Partial sums of a region at multiples of each power of 2 ..."""

POWERS = 5
"""... up to this many."""

MOST_REGIONS = 4096
"""That a run may say it has."""

ENDED = 1024
"""Runs remembered after their end, so that what comes late of them begins none anew."""


Key = tuple[str, str]
"""Name of a run and when it began: a detector that was restarted counts its runs anew."""


@dataclass(slots=True)
class _Region:
    start: RunStart
    partials: dict[int, dict[str, Arrays]] = field(default_factory=dict)
    """By frame and operator; of a frame that is not complete yet, some."""
    ledger: Arrays = field(default_factory=dict)
    stop: RunStop | None = None
    operators: Sequence[Operator] = ()

    def complete(self) -> set[int]:
        """Return the frames of which the sums of all operators are there."""
        names = {operator.name for operator in self.operators}
        return {n_frames for n_frames, sums in self.partials.items() if names <= sums.keys()}

    def thin_out(self, step: int) -> None:
        """Forget partial sums; see the module."""
        kept: set[int] = set()
        for power in range(POWERS):
            kept.update(sorted((n for n in self.partials if n % (step << power) == 0), reverse=True)[:KEPT])
        kept.update(sorted(self.partials, reverse=True)[:KEPT])
        self.partials = {n: sums for n, sums in self.partials.items() if n in kept}


@dataclass(slots=True)
class _Run:
    regions: dict[int, _Region] = field(default_factory=dict)
    wanted: int = 1
    """Regions that there are."""
    published: tuple[int, int] = (0, 0)
    """Frames of the newest result, and how many regions are in it."""
    first_end: float | None = None
    """When the first region had ended; monotonic."""


class Merger:
    """Takes what workers publish of their regions, and makes of it what one process would publish of the detector.

    Parameters
    ----------
    operators
        Makes the operators of a region, as the workers do.
    patience
        Seconds, by the frames' own time, that a region may be behind the others.
    give_up
        Seconds to wait for the end of the last region after that of the first.
    ended
        Runs of which nothing more is wanted, as `ended` tells them.
    """

    def __init__(
        self,
        operators: Callable[[RunStart], Sequence[Operator]],
        *,
        patience: float = 10.0,
        give_up: float = 300.0,
        ended: Iterable[Key] = (),
    ) -> None:
        self._operators = operators
        self._patience = patience
        self._give_up = give_up
        self._runs: dict[Key, _Run] = {}
        self._ended: dict[Key, None] = dict.fromkeys(ended)
        self._run_of: dict[int, Key] = {}
        """By region, the run that it is in."""

    @property
    def open_runs(self) -> list[Key]:
        """Runs that have begun and are not published as final."""
        return list(self._runs)

    @property
    def ended(self) -> list[Key]:
        """The last runs that are."""
        return list(self._ended)

    def take(self, message: RunStart | Result | RunStop) -> Iterator[Output]:
        """Take what a worker published, in any order of regions, also twice; yield the beginning and end of runs."""
        if isinstance(message, RunStart):
            self._run_of[message.region] = message.run, str(message.metadata.get("start_time", ""))
        key = self._run_of.get(message.region)
        if key in self._ended:
            return
        run = self._runs.get(key) if key is not None and key[0] == message.run else None
        match message:
            case RunStart() if key is not None:
                if run is None:
                    run = self._runs[key] = _Run()
                    yield _whole(message)
                if message.region not in run.regions:
                    run.regions[message.region] = _Region(message, operators=self._operators(message))
                    regions = message.metadata.get("regions")
                    run.wanted = regions if isinstance(regions, int) and 1 <= regions <= MOST_REGIONS else 1
            case Result() if run is not None and message.region in run.regions:
                # What comes after its end was said before.
                if run.regions[message.region].stop is None:
                    self._add(run.regions[message.region], message)
            case RunStop() if key is not None and run is not None and message.region in run.regions:
                run.regions[message.region].stop = message
                run.first_end = time.monotonic() if run.first_end is None else run.first_end
                yield from self._end(key, run)
            case _:
                _log.info("%s %s of a run that did not begin here", type(message).__name__, message.run)

    def interim(self) -> Iterator[Result]:
        """Yield what is new since the last call, of every run that is open."""
        for run in self._runs.values():
            n_frames, regions = self._newest(run)
            if n_frames and (n_frames, len(regions)) > run.published:
                run.published = n_frames, len(regions)
                yield from _merged(run, regions, n_frames, final=False)

    def given_up(self) -> Iterator[Output]:
        """Yield the ends of runs of which not all regions ended in time."""
        for key, run in list(self._runs.items()):
            if run.first_end is not None and time.monotonic() > run.first_end + self._give_up:
                late = sorted(set(range(run.wanted)) - _ended(run))
                _log.warning("run %s: given up without the end of region %s", key[0], ", ".join(map(str, late)))
                yield from self._end(key, run, give_up=True)

    def _add(self, region: _Region, result: Result) -> None:
        if result.operator == "ledger":
            region.ledger = result.arrays
            return
        region.partials.setdefault(result.n_frames, {})[result.operator] = result.arrays
        if not result.final:
            spacing = np.diff(sorted({0, *region.partials}))
            region.thin_out(int(spacing.min()))

    def _newest(self, run: _Run) -> tuple[int, list[int]]:
        """Return the newest frame that may be merged, and the regions that have it."""
        complete = {name: region.complete() for name, region in run.regions.items()}
        reached = {name: max(frames) for name, frames in complete.items() if frames}
        newest = max(reached.values(), default=0)
        steps = [float(np.diff(sorted({0, *frames})).min()) for frames in complete.values() if frames]
        # Regions are a step apart all the time, however long it is.
        behind = max([self._patience / region.start.frame_time for region in run.regions.values()] + steps, default=0.0)
        if len(reached) < run.wanted and newest <= behind:
            return 0, []
        for name in sorted(reached, key=lambda name: reached[name]):
            n_frames = _common(complete[name] for name in reached)
            if newest - n_frames <= behind:
                return n_frames, sorted(reached)
            del reached[name]
        return 0, []

    def _end(self, key: Key, run: _Run, *, give_up: bool = False) -> Iterator[Output]:
        ended = _ended(run)
        if len(ended) < run.wanted and not give_up:
            return
        stops = [stop for region in ended if (stop := run.regions[region].stop) is not None]
        complete = {region: frames for region in ended if (frames := run.regions[region].complete())}
        # Regions end apart if a gateway was killed amid a batch: then what they have in common is the result.
        n_frames = _common(complete.values())
        regions = sorted(complete) if n_frames else []
        results = list(_merged(run, regions, n_frames, final=True))
        worst = max(stops, key=lambda stop: ("success", "abort", "fail").index(stop.exit_status))
        exit_status = "fail" if results[-1].arrays["missing_regions"].size else worst.exit_status
        yield from results
        yield RunStop(run=key[0], n_frames=max(stop.n_frames for stop in stops), exit_status=exit_status)
        del self._runs[key]
        self._ended[key] = None
        while len(self._ended) > ENDED:
            del self._ended[next(iter(self._ended))]


def _common(frames: Iterable[set[int]]) -> int:
    """Return the newest frame that is in all sets; 0 if there is none."""
    sets = list(frames)
    return max(set.intersection(*sets), default=0) if sets else 0


def _ended(run: _Run) -> set[int]:
    return {name for name, region in run.regions.items() if region.stop is not None}


def _whole(start: RunStart) -> RunStart:
    metadata = {name: value for name, value in start.metadata.items() if name != "regions"}
    shape = start.detector_shape or start.shape
    return replace(start, region=0, shape=shape, origin=(0, 0), detector_shape=None, metadata=metadata)


def _merged(run: _Run, regions: list[int], n_frames: int, *, final: bool) -> Iterator[Result]:
    """Yield the results of every operator, merged in the order of regions, and the ledger."""
    name = next(iter(run.regions.values())).start.run
    restored: dict[int, Sequence[Operator]] = {}
    for region in regions:
        try:
            restored[region] = _restored(run.regions[region], n_frames)
        except (CheckpointError, KeyError, ValueError) as error:
            _log.warning("run %s: region %d cannot be merged: %s", name, region, error)
    if restored:
        for first, *others in zip(*restored.values(), strict=True):
            for other in others:
                first.merge(other)
            yield Result(run=name, operator=first.name, n_frames=n_frames, final=final, arrays=first.result())
    ledger = _ledger(run, list(restored))
    yield Result(run=name, operator="ledger", n_frames=n_frames, final=final, arrays=ledger)


def _restored(region: _Region, n_frames: int) -> Sequence[Operator]:
    for operator in region.operators:
        operator.restore(region.partials[n_frames][operator.name])
    return region.operators


def _ledger(run: _Run, regions: list[int]) -> Arrays:
    """Return the ledger of the region that lost most, the other regions' troubles added, and which are not in it."""
    ledgers = [region.ledger for region in run.regions.values() if region.ledger]
    missing = np.array(sorted(set(range(run.wanted)) - set(regions)), np.int64)
    if not ledgers:
        return {**Ledger().arrays(), "missing_regions": missing}
    worst = max(ledgers, key=lambda ledger: int(ledger["lost"]))
    troubles = {
        name: np.sum([ledger[name] for ledger in ledgers], axis=0)
        for name in ("late", "duplicate", "undecodable", "stray")
    }
    lag = np.max([ledger["lag"] for ledger in ledgers])
    return {**worst, **troubles, "lag": np.array(lag), "missing_regions": missing}
