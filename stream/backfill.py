"""Regions that lost frames on their way, recomputed from a file and published as by a worker (`stream.repairs`).

Multi-tau with holes cannot be patched: who has a hole is computed anew from frame 0, all such regions in one reading of
the file. What regions lost stands in the log of partial sums; up to where it is to be read is marked in it.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stream import checkpoint
from stream.backfill_file import RunFile
from stream.correlators import Make
from stream.errors import CheckpointError, ConfigError, SourceError
from stream.ingest.hdf5 import Hdf5Source
from stream.merger import MOST_REGIONS
from stream.messages import Arrays, FrameBatch, Message, Output, Position, Result, RunStart, RunStop
from stream.pipeline import Pipeline
from stream.plane import Plane
from stream.protocols import Operator, Sink, Source
from stream.regions import Regions
from stream.repairs import Key, Origins, metadata_of_run, repair

_log = logging.getLogger(__name__)

NEVER = 1e9
"""Seconds between partial sums, where only the last ones are wanted."""

PATIENCE = 60.0
"""Seconds for the end of the log of partial sums, from when nothing more waits in it."""

SAY = 5.0
"""Seconds between two words of how far it is."""

Say = Callable[[str], None]


@dataclass(slots=True)
class Published:
    """What is known of a region."""

    start: RunStart
    ledger: Arrays = field(default_factory=dict)
    stop: RunStop | None = None


@dataclass(slots=True)
class RunLog:
    """What is known of the regions of a run."""

    streamed: dict[int, Published] = field(default_factory=dict)
    repaired: dict[int, Published] = field(default_factory=dict)


def published(plane: Plane, run: str, stop: threading.Event) -> dict[Key, RunLog]:
    """Read what has been published up to now of runs of a name, by name and start_time, without acknowledging it.

    Raises
    ------
    SourceError
        The mark at the end of the log does not come back: a gateway over ZeroMQ was started anew meanwhile.
    """
    mark = f"end of log {uuid.uuid4().hex}"
    found: dict[Key, RunLog] = {}
    origins = Origins()
    with plane.partials(stop) as log, plane.results() as results:
        waits_for = set(range(plane.n_logs()))
        for region in waits_for:
            # Final, so that it is not lost; of a run that nobody knows, so that mergers leave it alone.
            log.write(Result(run=mark, region=region, operator="mark", n_frames=0, final=True, arrays={}))
        log.flush()
        deadline, has_come = time.monotonic() + PATIENCE, True
        for message in results:
            # Where one follows the other there is more to be read; else it is what workers publish now.
            if message is not None and has_come:
                deadline = time.monotonic() + PATIENCE
            elif time.monotonic() > deadline:
                waiting = f"the end of the log of partial sums did not come in {PATIENCE:g} s"
                raise SourceError(f"plane of {plane.beamline}: {waiting}: is its gateway another one now? Try again")
            has_come = message is not None
            if isinstance(message, Result) and message.run == mark:
                waits_for.discard(message.region)
            elif isinstance(message, RunStart | Result | RunStop) and (origin := origins.of(message)) is not None:
                key, is_repair = origin
                if key[0] == run:
                    known = found.setdefault(key, RunLog())
                    if is_repair and isinstance(message, RunStart):
                        known.repaired.pop(message.region, None)
                    _take(known.repaired if is_repair else known.streamed, message)
            if not waits_for or stop.is_set():
                break
    return found


def _take(regions: dict[int, Published], message: RunStart | Result | RunStop) -> None:
    match message:
        case RunStart():
            regions.setdefault(message.region, Published(message))
        case Result(operator="ledger") if regions[message.region].stop is None:
            regions[message.region].ledger = message.arrays
        case RunStop():
            regions[message.region].stop = message


def of_file(found: Mapping[Key, RunLog], file: RunFile) -> RunLog:
    """Return the run that a file is of; one of which nothing is known, if it is not there."""
    began = file.start.metadata.get("start_time")
    same = [log for (_, start_time), log in found.items() if began is None or not start_time or start_time == began]
    return same[-1] if same else RunLog()


def wanted(log: RunLog, file: RunFile, n_regions: int) -> tuple[list[int], list[int]]:
    """Return the regions to recompute, and those that are not whole and of which the file has no more frames."""
    recompute, hopeless = [], []
    for region in range(n_regions):
        streamed, repaired = log.streamed.get(region), log.repaired.get(region)
        is_repaired = repaired is not None and repaired.stop is not None and repaired.ledger
        if repaired is not None and is_repaired and int(repaired.ledger["received"]) >= file.received:
            continue
        is_known = streamed is not None and streamed.stop is not None and streamed.ledger
        if streamed is None or not is_known or file.received > int(streamed.ledger["received"]):
            recompute.append(region)
        elif int(streamed.ledger["lost"]) or (streamed.stop is not None and streamed.stop.exit_status == "fail"):
            hopeless.append(region)
    return recompute, hopeless


def whole(log: RunLog, file: RunFile, run: str, n_regions: int) -> RunStart:
    """Return the start of the whole run: as in the stream, so that it is computed in the same way.

    Raises
    ------
    ConfigError
        The file does not fit the stream.
    """
    if not log.streamed:
        return replace(file.start, run=run)
    region, known = next(iter(log.streamed.items()))
    row, column = known.start.origin
    shape = file.start.shape
    origin = (max(0, row - shape[0] * region // n_regions), column)
    start = replace(
        known.start, run=run, region=0, shape=shape, origin=origin, metadata=dict(metadata_of_run(known.start))
    )
    of_region = list(Regions(n_regions).cut(start))[region]
    for name in ("shape", "origin", "dtype", "saturation_value"):
        there = getattr(file.start if name in ("dtype", "saturation_value") else of_region, name)
        if there != getattr(known.start, name):
            streamed = getattr(known.start, name)
            raise ConfigError(f"{file.path}: {name} is {there}, in the stream of run {run} it was {streamed}")
    return start


class InRegions:
    """The operators of some regions, fed with frames of the whole detector. An `Operator`.

    Parameters
    ----------
    start
        Of the whole run.
    """

    name = "regions"

    def __init__(self, start: RunStart, make: Make, cut: Regions, regions: Sequence[int]) -> None:
        starts = {part.region: part for part in cut.cut(start) if isinstance(part, RunStart)}
        self._cut = cut
        self._operators: dict[int, list[Operator]] = {region: make(starts[region]) for region in regions}
        self.n_frames = 0

    def push(self, batch: FrameBatch) -> None:
        """Fold in frames; see `Operator`."""
        for part in self._cut.cut(batch):
            if isinstance(part, FrameBatch):
                for operator in self._operators.get(part.region, ()):
                    operator.push(part)
        self.n_frames = batch.first + len(batch.frames)

    def miss(self, n_frames: int) -> None:
        """Go on to n_frames; see `Operator`."""
        for _, operator in self._each():
            operator.miss(n_frames)
        self.n_frames = max(self.n_frames, n_frames)

    def result(self) -> Arrays:
        """Return what is known so far, as ``region/operator/name``."""
        return _named((where, operator.result()) for where, operator in self._each())

    def partial(self) -> Arrays:
        """Return what is to be merged, as ``region/operator/name``."""
        return _named((where, operator.partial()) for where, operator in self._each())

    def snapshot(self) -> Arrays:
        """Return the whole state."""
        return _named((where, operator.snapshot()) for where, operator in self._each())

    def restore(self, state: Arrays) -> None:
        """Take over a `snapshot`."""
        states = split(state)
        for where, operator in self._each():
            if where not in states:
                raise CheckpointError(f"nothing is known there of {operator.name} of region {where[0]}")
            operator.restore(states[where])
            self.n_frames = operator.n_frames

    def merge(self, other: Self) -> None:
        """Add what another knows of other pixels."""
        for (_, operator), (_, more) in zip(self._each(), other._each(), strict=True):
            operator.merge(more)

    def _each(self) -> Iterator[tuple[tuple[int, str], Operator]]:
        for region, operators in self._operators.items():
            for operator in operators:
                yield (region, operator.name), operator


def _named(states: Iterator[tuple[tuple[int, str], Arrays]]) -> Arrays:
    return {
        f"{region}/{operator}/{name}": array for (region, operator), state in states for name, array in state.items()
    }


def split(state: Arrays) -> dict[tuple[int, str], dict[str, NDArray[Any]]]:
    """Return the arrays of each region and operator."""
    states: dict[tuple[int, str], dict[str, NDArray[Any]]] = {}
    for name, array in state.items():
        region, operator, key = name.split("/", 2)
        states.setdefault((int(region), operator), {})[key] = array
    return states


class OfRun:
    """The frames of a file as those of a run in the stream. A `Source`, which tells how far it is.

    Parameters
    ----------
    source
        Closed by who opened it.
    start
        Of the run.
    n_frames
        That it has at least: what is missing at the end is lost.
    """

    def __init__(self, source: Source, start: RunStart, n_frames: int, say: Say) -> None:
        self._source, self._start, self._n_frames, self._say = source, start, n_frames, say

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Do nothing."""

    def __iter__(self) -> Iterator[Message | None]:
        """Yield what the source yields."""
        run, began, first, said_at = self._start.run, time.monotonic(), -1, time.monotonic()
        for message in self._source:
            match message:
                case RunStart():
                    yield self._start
                case FrameBatch():
                    first = message.first if first < 0 else first
                    if (now := time.monotonic()) > said_at + SAY:
                        said_at = now
                        rate = (message.first - first) / (now - began)
                        left = (self._n_frames - message.first) / rate if rate else float("nan")
                        self._say(
                            f"{message.first:,} of {self._n_frames:,} frames, {rate:,.0f} frames/s, {left:,.0f} s left"
                        )
                    yield replace(message, run=run)
                case RunStop():
                    yield replace(message, run=run, n_frames=max(message.n_frames, self._n_frames))
                case _:
                    yield message

    def position(self) -> Position:
        """Return that of the source."""
        return self._source.position()

    def seek(self, position: Position) -> None:
        """Let the source go there."""
        self._source.seek(position)


class Repairs:
    """Publishes what `InRegions` know as a worker of each region would. A `Sink`.

    Parameters
    ----------
    log
        Where partial sums go; closed by who opened it.
    is_all
        Whether the file has every frame that the gateway had.

    Attributes
    ----------
    is_done
        Whether the end was written.
    """

    def __init__(self, log: Sink, cut: Regions, regions: Sequence[int], *, is_all: bool) -> None:
        self._log, self._cut, self._regions, self._is_all = log, cut, regions, is_all
        self._name = uuid.uuid4().hex
        self.is_done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing."""

    def write(self, output: Output) -> None:
        """Take one output of the pipeline."""
        match output:
            case RunStart():
                for part in self._cut.cut(output):
                    if part.region in self._regions and isinstance(part, RunStart):
                        self._log.write(repair(part, self._name, is_all=self._is_all))
            case Result(final=False):
                return  # nobody waits to hear that we are there
            case Result(operator="ledger"):
                # How long ago a frame of a file was measured says nothing.
                arrays = {**output.arrays, "lag": np.array(np.nan)}
                for region in self._regions:
                    self._log.write(replace(output, run=self._name, region=region, arrays=arrays))
            case Result():
                for (region, operator), arrays in split(output.arrays).items():
                    self._log.write(replace(output, run=self._name, region=region, operator=operator, arrays=arrays))
            case RunStop():
                for region in self._regions:
                    self._log.write(replace(output, run=self._name, region=region))
                self.is_done = True

    def flush(self) -> None:
        """Return once the log has everything."""
        self._log.flush()


class Nowhere:
    """No checkpoints: a run that is left is not ended with what it has. A `stream.checkpoint.Store`."""

    def load(self) -> checkpoint.Checkpoint | None:
        """Return None."""
        return None

    def save(self, checkpoint: checkpoint.Checkpoint) -> None:
        """Do nothing."""

    def pass_by(self, position: Position) -> None:
        """Do nothing."""


def backfill(
    run: str,
    file: RunFile,
    plane: Plane,
    make: Make,
    *,
    n_regions: int | None,
    saved: Path | None,
    checkpoint_every: float,
    say: Say,
    stop: threading.Event,
) -> bool:
    """Recompute from a file the regions that lost frames of a run, and publish them; return whether that is done.

    Parameters
    ----------
    n_regions
        Of the detector, for a run of which the plane knows nothing.
    saved
        Where the state is kept. None: nowhere, and a start after a stop begins anew.
    stop
        May be set at any time.

    Raises
    ------
    ConfigError
        The file is not of that run, or nobody says how many regions there are.
    SourceError, SinkError, CheckpointError
        The file, the plane or the checkpoint fails.
    """
    log = of_file(published(plane, run, stop), file)
    if stop.is_set():
        return False
    n_regions = _n_regions(log) or n_regions or _of_plane(plane)
    if n_regions is None:
        raise ConfigError(f"nothing is known of run {run} there: say with --regions into how many it is cut")
    start, cut = whole(log, file, run, n_regions), Regions(n_regions)
    regions, hopeless = wanted(log, file, n_regions)
    store = checkpoint.File(saved) if saved is not None else Nowhere()
    left = store.load()
    if saved is not None and left is not None and left.running is None:
        saved.unlink()  # of a repair that was published, and killed at its very end
    elif left is not None and left.running is not None:
        regions = _left(left.running, start, saved)
    if not (regions or hopeless):
        say(f"run {run}: nothing to repair")
        return True
    ends = [each.stop.n_frames for each in log.streamed.values() if each.stop is not None]
    with plane.partials(stop) as partials:
        if hopeless:
            say(f"run {run}: {file.path} has no more frames than came of region {_listed(hopeless)}")
            _publish_hopeless(Repairs(partials, cut, hopeless, is_all=file.is_all), start, file)
        if not regions:
            return True
        say(f"run {run}: region {_listed(regions)} of {n_regions} from {file.path}, {file.received:,} frames")
        repairs = Repairs(partials, cut, regions, is_all=file.is_all)
        with Hdf5Source(file.path, give="photons") as source:
            Pipeline(
                OfRun(source, start, max([file.n_frames, *ends]), say),
                lambda start: [InRegions(start, make, cut, regions)],
                [repairs],
                partials=True,
                publish_every=NEVER,
                checkpoints=store,
                checkpoint_every=checkpoint_every,
                runs=1,
                stop=stop,
            ).run()
    if repairs.is_done and saved is not None:
        saved.unlink(missing_ok=True)
    return repairs.is_done


def _left(running: checkpoint.Running, start: RunStart, saved: Path | None) -> list[int]:
    """Return the regions that a checkpoint is of; they are gone on with."""
    times = [each.metadata.get("start_time") for each in (running.start, start)]
    if running.start.run != start.run or times[0] != times[1] or InRegions.name not in running.operators:
        raise CheckpointError(f"{saved}: it is of run {running.start.run}, and not of this repair")
    return sorted({region for region, _ in split(running.operators[InRegions.name])})


def _n_regions(log: RunLog) -> int | None:
    for known in log.streamed.values():
        regions = known.start.metadata.get("regions")
        if isinstance(regions, int) and 1 <= regions <= MOST_REGIONS:
            return regions
    return None


def _of_plane(plane: Plane) -> int | None:
    n = plane.n_logs()
    return n if n > 1 else None


def _listed(regions: Sequence[int]) -> str:
    return ", ".join(map(str, regions))


def _publish_hopeless(repairs: Repairs, start: RunStart, file: RunFile) -> None:
    """Tell that nothing better comes: a merger does not wait for it then."""
    ledger = Result(run=start.run, operator="ledger", n_frames=file.n_frames, final=True, arrays=file.ledger())
    end = RunStop(run=start.run, n_frames=file.n_frames, exit_status="success")
    for output in (start, ledger, end):
        repairs.write(output)
    repairs.flush()
