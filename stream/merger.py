"""Partial sums of regions, added up and made into results of the whole detector.

Regions publish their partial sums at the same frames, but not at the same moment. They are merged at the newest frame
that all of them have reached; one that is more than `patience` behind the others is left out until it has caught up, so
that a node that was lost does not hold up what the others know. The ledger says which are left out, or never began.

Of each region are kept the newest sums, and fewer of older ones: two of every multiple of 2, 4, 8, ... steps. So there
is a frame in common with a region that lags, or that publishes more seldom.

A region that lost frames on its way may be recomputed from a file (`stream.repairs`): its sums take the place of those
of the stream if they are of more frames, whenever and however often they come. A run that ended with frames lost can be
held open for that: its results are interim ones until it is repaired, or the time for that is over.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stream import heartbeat
from stream.errors import CheckpointError
from stream.ledger import Ledger
from stream.messages import Arrays, Output, Result, RunStart, RunStop
from stream.protocols import Operator
from stream.repairs import Key, Origins, metadata_of_run

_log = logging.getLogger(__name__)

KEPT = 2
"""Partial sums of a region at multiples of each power of 2 ..."""

POWERS = 8
"""... up to this many. A region whose sums take long to make has them at multiples of one of these only."""

ENDED = 1024
"""Runs remembered after their end, so that what comes late of them begins none anew."""

MOST_REGIONS = heartbeat.MOST_REGIONS

_UNFIT = (CheckpointError, ArithmeticError, LookupError, TypeError, ValueError)
"""What sums and ledgers from the wire raise that are none."""

STREAM, STREAM_AND_FILE, FILE = range(3)
"""Ways that a run went, from the best to the worst."""


@dataclass(slots=True)
class _Region:
    start: RunStart
    partials: dict[int, dict[str, Arrays]] = field(default_factory=dict)
    """By frame and operator; of a frame that is not complete yet, some."""
    ledger: Arrays = field(default_factory=dict)
    stop: RunStop | None = None
    names: frozenset[str] = frozenset()
    """Of the operators."""
    operators: Sequence[Operator] = ()
    """While they are asked for all the time: they take more memory than sums."""
    heard: float = field(default_factory=time.monotonic)
    """When something came of it last."""

    def complete(self) -> set[int]:
        """Return the frames of which the sums of all operators are there."""
        return {n_frames for n_frames, sums in self.partials.items() if self.names <= sums.keys()}

    @property
    def received(self) -> int:
        """Frames that the sums are of."""
        return int(self.ledger["received"]) if self.ledger else 0

    @property
    def has_all(self) -> bool:
        """Whether it is from a file with all frames that there are."""
        return self.start.metadata.get("is_all") is True

    @property
    def is_whole(self) -> bool:
        """Whether it ended, and all frames came."""
        ended_well = self.stop is not None and self.stop.exit_status != "fail"
        return ended_well and bool(self.ledger) and not int(self.ledger["lost"])

    def thin_out(self, step: int) -> None:
        """Forget partial sums; see the module."""
        kept: set[int] = set()
        for power in range(POWERS):
            kept.update(sorted((n for n in self.partials if n % (step << power) == 0), reverse=True)[:KEPT])
        kept.update(sorted(self.partials, reverse=True)[:KEPT])
        self.partials = {n: sums for n, sums in self.partials.items() if n in kept}


@dataclass(slots=True)
class _Run:
    name: str
    make: Callable[[RunStart], Sequence[Operator]]
    regions: dict[int, _Region] = field(default_factory=dict)
    """As they came in the stream."""
    repairs: dict[int, _Region] = field(default_factory=dict)
    """From a file: of each region the one with most frames, complete."""
    arriving: dict[tuple[str, int], _Region] = field(default_factory=dict)
    """Repairs that are not complete, by name and region."""
    wanted: int = 1
    """Regions that there are."""
    published: tuple[int, int, bool, int] = (0, 0, False, 0)
    """Frames of the newest result, how many regions are in it, whether the run was held, how many were repaired."""
    first_end: float | None = None
    """When the first region had ended; monotonic."""
    plane: int = STREAM
    """The worst way that it went."""

    @property
    def ended(self) -> set[int]:
        """Regions of which either the stream or a file has told all."""
        return {name for name, region in self.regions.items() if region.stop is not None} | self.repairs.keys()

    @property
    def is_held(self) -> bool:
        """Whether all regions have ended: of those that have not in the stream, a file has all frames."""
        streamed = {name for name, region in self.regions.items() if region.stop is not None}
        return len(streamed | {name for name, repair in self.repairs.items() if repair.has_all}) >= self.wanted

    @property
    def is_settled(self) -> bool:
        """Whether all regions have ended, and none can become better."""
        return self.is_held and all(map(self._is_settled, self.ended))

    def _is_settled(self, name: int) -> bool:
        streamed, repair = self.regions.get(name), self.repairs.get(name)
        if repair is not None:
            return repair.has_all or (streamed is not None and streamed.stop is not None)
        return streamed is not None and streamed.is_whole

    def begin(self, start: RunStart, *, is_repair: bool) -> None:
        """Take note of a region, unless that was done before."""
        if (start.run, start.region) in self.arriving if is_repair else start.region in self.regions:
            return
        operators = self.make(start)
        region = _Region(start, names=frozenset(operator.name for operator in operators))
        if is_repair:
            self.arriving[start.run, start.region] = region
        else:
            region.operators = operators
            self.regions[start.region] = region
        regions = start.metadata.get("regions")
        self.wanted = regions if isinstance(regions, int) and 1 <= regions <= MOST_REGIONS else 1

    def region(self, message: Result | RunStop, *, is_repair: bool) -> _Region | None:
        """Return what a message is for, if that began."""
        return self.arriving.get((message.run, message.region)) if is_repair else self.regions.get(message.region)

    def end(self, stop: RunStop, *, is_repair: bool) -> None:
        """Take the end of a region."""
        region = self.region(stop, is_repair=is_repair)
        if region is None:
            return
        region.stop = stop
        self.first_end = time.monotonic() if self.first_end is None else self.first_end
        if is_repair:
            del self.arriving[stop.run, stop.region]
            before = self.repairs.get(stop.region)
            if before is None or _worth(before) < _worth(region):
                self.repairs[stop.region] = region

    def frames(self, name: int) -> set[int]:
        """Return the frames of which all sums of a region are there, of the stream or of a file."""
        found = [each for each in (self.regions.get(name), self.repairs.get(name)) if each is not None]
        return set().union(*(each.complete() for each in found))

    def best(self, name: int, n_frames: int) -> _Region:
        """Return who knows most of a region, after so many frames."""
        streamed, repair = self.regions.get(name), self.repairs.get(name)
        if repair is None:
            return self.regions[name]
        if streamed is None:
            return repair
        after = [n_frames in each.complete() for each in (streamed, repair)]
        if after[0] == after[1]:
            return repair if repair.received > streamed.received and after[1] else streamed
        return streamed if after[0] else repair

    def stop(self, name: int, n_frames: int) -> RunStop:
        """Return the end of a region that has ended, as who knows most of it tells it."""
        told = (self.best(name, n_frames), self.repairs.get(name), self.regions.get(name))
        return next(each.stop for each in told if each is not None and each.stop is not None)

    def thin_out(self) -> None:
        """Forget what will not be asked for again, of a run that may be held for long."""
        n_frames = _common(each.complete() for each in self.regions.values())
        for region in self.regions.values():
            kept = {n_frames, max(region.partials, default=0)}
            region.partials = {n: sums for n, sums in region.partials.items() if n in kept}
            region.operators = ()


def _worth(repair: _Region) -> tuple[bool, int]:
    return bool(repair.partials), repair.received


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
    repair_within
        Seconds, after the end of the first region, that a run with lost frames is held open for sums from a file.
    plane
        Tells which way runs go now: `STREAM`, `STREAM_AND_FILE` or `FILE`.
    ended
        Runs of which nothing more is wanted, as `ended` tells them.
    """

    def __init__(
        self,
        operators: Callable[[RunStart], Sequence[Operator]],
        *,
        patience: float = 10.0,
        give_up: float = 300.0,
        repair_within: float = 0.0,
        plane: Callable[[], int] = lambda: STREAM,
        ended: Iterable[Key] = (),
    ) -> None:
        self._operators = operators
        self._patience = patience
        self._give_up = give_up
        self._repair_within = repair_within
        self._plane = plane
        self._runs: dict[Key, _Run] = {}
        self._ended: dict[Key, None] = dict.fromkeys(ended)
        self._origins = Origins()

    @property
    def open_runs(self) -> list[Key]:
        """Runs that have begun and are not published as final."""
        return list(self._runs)

    @property
    def ended(self) -> list[Key]:
        """The last runs that are."""
        return list(self._ended)

    def take(self, message: RunStart | Result | RunStop) -> Iterator[Output]:
        """Take what was published of a region, in any order of regions, also twice; yield begins and ends of runs."""
        origin = self._origins.of(message)
        if origin is None:
            _log.info("%s %s of a run that did not begin here", type(message).__name__, message.run)
            return
        key, is_repair = origin
        if key in self._ended:
            return
        run = self._runs.get(key)
        match message:
            case RunStart():
                if run is None:
                    yield from self._end_namesakes(key)
                    run = self._runs[key] = _Run(key[0], self._operators)
                    yield _whole(message, key)
                run.begin(message, is_repair=is_repair)
            case Result() if run is not None:
                region = run.region(message, is_repair=is_repair)
                # What comes after its end was said before.
                if region is not None and region.stop is None:
                    self._add(region, message)
            case RunStop() if run is not None:
                was_held = run.is_held
                run.end(message, is_repair=is_repair)
                if self._repair_within and not run.is_settled:
                    if run.is_held and not was_held:
                        _log.warning("run %s lost frames: held open until they come from a file", key[0])
                        run.thin_out()
                elif run.is_held:
                    yield from self._end(key, run)

    def interim(self) -> Iterator[Result]:
        """Yield what is new since the last call, of every run that is open."""
        for run in self._runs.values():
            if not run.is_held:
                run.plane = max(run.plane, self._plane())
            n_frames, regions = self._newest(run)
            state = n_frames, len(regions), run.is_held, len(run.repairs)
            if n_frames and state > run.published:
                run.published = state
                yield from _merged(run, regions, n_frames, final=False)

    def heartbeats(self) -> Iterator[Result]:
        """Yield of every run that is open how its regions are; see `stream.heartbeat`."""
        newest = {name: run for (name, _), run in self._runs.items()}  # a heartbeat says no more of its run
        return (_heartbeat(run, run.published[0]) for run in newest.values())

    def given_up(self) -> Iterator[Output]:
        """Yield the ends of runs of which not all regions ended in time, or were not repaired in time."""
        for key, run in list(self._runs.items()):
            within = self._repair_within if run.is_held else max(self._give_up, self._repair_within)
            if run.first_end is not None and time.monotonic() > run.first_end + within:
                late = ", ".join(map(str, sorted(set(range(run.wanted)) - run.ended)))
                _log.warning("run %s: given up without %s", key[0], f"the end of region {late}" if late else "a file")
                yield from self._end(key, run)

    def _end_namesakes(self, key: Key) -> Iterator[Output]:
        """End held runs of the same name: results say no more of their run than that."""
        for other, run in list(self._runs.items()):
            if other[0] == key[0] and run.is_held:
                yield from self._end(other, run)

    def _add(self, region: _Region, result: Result) -> None:
        region.heard = time.monotonic()
        if result.operator == "ledger":
            try:
                region.ledger = {**_counts(result.arrays), **heartbeat.worker_of(result.arrays)}
            except _UNFIT as error:
                _log.warning("run %s: a ledger of region %d is no ledger: %s", result.run, result.region, error)
            return
        region.partials.setdefault(result.n_frames, {})[result.operator] = result.arrays
        if not result.final:
            spacing = np.diff(sorted({0, *region.partials}))
            region.thin_out(int(spacing.min()))

    def _newest(self, run: _Run) -> tuple[int, list[int]]:
        """Return the newest frame that may be merged, and the regions that have it."""
        if run.is_held:
            complete = {name: run.frames(name) for name in run.ended}
        else:
            # A file knows the last frame only: it would be far ahead of the others.
            complete = {name: region.complete() for name, region in run.regions.items()}
        reached = {name: max(frames) for name, frames in complete.items() if frames}
        newest = max(reached.values(), default=0)
        steps = [float(np.diff(sorted({0, *frames})).min()) for frames in complete.values() if frames]
        # Regions are a step apart all the time, however long it is.
        patience = max((self._patience / region.start.frame_time for region in run.regions.values()), default=0.0)
        behind = patience + max(steps, default=0.0)
        if len(reached) < run.wanted and newest <= behind:
            return 0, []
        for name in sorted(reached, key=lambda name: reached[name]):
            n_frames = _common(complete[name] for name in reached)
            if newest - n_frames <= behind:
                return n_frames, sorted(reached)
            del reached[name]
        return 0, []

    def _end(self, key: Key, run: _Run) -> Iterator[Output]:
        complete = {name: frames for name in run.ended if (frames := run.frames(name))}
        # Regions end apart if a gateway was killed amid a batch: then what they have in common is the result.
        n_frames = _common(complete.values())
        regions = sorted(complete) if n_frames else []
        stops = [run.stop(name, n_frames) for name in run.ended]
        results = list(_merged(run, regions, n_frames, final=True))
        worst = max(stops, key=lambda stop: ("success", "abort", "fail").index(stop.exit_status))
        exit_status = "fail" if results[-1].arrays["missing_regions"].size else worst.exit_status
        yield _heartbeat(run, n_frames)
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


def _whole(start: RunStart, key: Key) -> RunStart:
    shape, metadata = start.detector_shape or start.shape, metadata_of_run(start)
    return replace(start, run=key[0], region=0, shape=shape, origin=(0, 0), detector_shape=None, metadata=metadata)


def _merged(run: _Run, regions: list[int], n_frames: int, *, final: bool) -> Iterator[Result]:
    """Yield the results of every operator, merged in the order of regions, and the ledger."""
    name, regions = run.name, list(regions)
    while (folded := _folded(run, regions, n_frames)) is None:
        pass
    for operator in folded:
        yield Result(run=name, operator=operator.name, n_frames=n_frames, final=final, arrays=operator.result())
    ledger = _ledger(run, regions, n_frames, final=final)
    if not final:
        known = [region for region in run.regions.values() if region.stop is None and "frame_age" in region.ledger]
        ages = [float(region.ledger["frame_age"]) + time.monotonic() - region.heard for region in known]
        ledger = {**ledger, "frame_age": np.array(np.fmax.reduce(ages, initial=np.nan))}
    yield Result(run=name, operator="ledger", n_frames=n_frames, final=final, arrays=ledger)


def _folded(run: _Run, regions: list[int], n_frames: int) -> Sequence[Operator] | None:
    """Return the operators of all regions as one; None if one does not fit: it is taken from the list."""
    first: Sequence[Operator] = ()
    for region in regions:
        try:
            operators = _restored(run.best(region, n_frames), n_frames, run.make)
            for mine, theirs in zip(first, operators, strict=bool(first)):
                mine.merge(theirs)
        except _UNFIT as error:
            _log.warning("run %s: region %d cannot be merged: %s", run.name, region, error)
            regions.remove(region)
            return None  # some of its operators may be merged already
        first = first or operators
    return first


def _counts(ledger: Arrays) -> Arrays:
    counts = Ledger()
    counts.restore(ledger)
    return counts.arrays()


def _restored(region: _Region, n_frames: int, make: Callable[[RunStart], Sequence[Operator]]) -> Sequence[Operator]:
    operators = region.operators or make(region.start)
    for operator in operators:
        operator.restore(region.partials[n_frames][operator.name])
    return operators


def _ledger(run: _Run, regions: list[int], n_frames: int, *, final: bool) -> Arrays:
    """Return the ledger of the region that lost most, the other regions' troubles added, and how the frames came.

    missing_regions     that are not in the result
    repaired_regions    that are from a file
    from_file           frames that came by the file only, late: of the region with most of them
    plane               0 stream, 1 stream and file, 2 file
    awaits_file         1 while the run has ended, and its lost frames may yet come from a file
    """
    best = {name: run.best(name, n_frames) for name in {*run.regions, *run.repairs}}
    repaired = [name for name in regions if best[name] is run.repairs.get(name)]
    streamed = {name: run.regions[name].received if name in run.regions else 0 for name in regions}
    came_late = [best[name].received - streamed[name] for name in repaired]
    of_repairs = 0 if not repaired else STREAM_AND_FILE if any(streamed.values()) else FILE
    how = {
        "missing_regions": np.array(sorted(set(range(run.wanted)) - set(regions)), np.int64),
        "repaired_regions": np.array(repaired, np.int64),
        "from_file": np.array(max(came_late, default=0), np.int64),
        "plane": np.array(max(run.plane, of_repairs), np.int64),
        "awaits_file": np.array(run.is_held and not final, np.int64),
    }
    ledgers = [region.ledger for region in best.values() if region.ledger]
    if not ledgers:
        return {**Ledger().arrays(), **how}
    worst = max(ledgers, key=lambda ledger: int(ledger["lost"]))
    troubles = {
        name: np.sum([ledger[name] for ledger in ledgers], axis=0)
        for name in ("late", "duplicate", "undecodable", "stray")
    }
    lag = np.fmax.reduce([ledger["lag"] for ledger in ledgers])  # that of a file is not known
    counts = {name: array for name, array in worst.items() if name not in heartbeat.OF_A_WORKER}
    return {**counts, **troubles, "lag": np.array(lag), **how}


def _heartbeat(run: _Run, n_frames: int) -> Result:
    ended = run.ended
    arrays = heartbeat.table([_region(run, name, is_ended=name in ended) for name in range(run.wanted)])
    return Result(run=run.name, operator="regions", n_frames=n_frames, final=False, arrays=arrays)


def _region(run: _Run, name: int, *, is_ended: bool) -> heartbeat.Region:
    streamed, repair = run.regions.get(name), run.repairs.get(name)
    known = streamed or repair
    if known is None:
        return heartbeat.Region()
    frames = max(run.frames(name), default=0)
    begin, told = known.start.origin[0], known.ledger
    best = run.best(name, frames).ledger
    return heartbeat.Region(
        rows=(begin, begin + known.start.shape[0]),
        frames=frames,
        lost=int(best.get("lost", 0)),
        lag=float(told.get("lag", np.nan)),
        checkpoint=int(told.get("checkpoint", -1)),
        node=heartbeat.node_of(told),
        age=time.monotonic() - known.heard,
        ended=is_ended,
    )
