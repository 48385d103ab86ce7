"""The frames in the files that Bluesky's documents point to, while they grow."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from stream.errors import ConfigError, DecodeError, SourceError
from stream.ingest.bluesky_facts import Facts, merged
from stream.ingest.bluesky_messages import Documents, Ended, Master, Opened, Rows, Told
from stream.ingest.bluesky_roots import Roots
from stream.ingest.bluesky_runs import Runs
from stream.ingest.hdf5 import Hdf5Source
from stream.ingest.hdf5_growing import GrowingFrames
from stream.ingest.position import place_of
from stream.messages import FrameBatch, Give, Message, Position, Rejected, RunStart, RunStop
from stream.wire import MAX_LENGTH, one_line

LOOK = 0.05
"""Seconds between looks into files: for what is told of meanwhile, and what was told of and was not yet there."""


@dataclass(slots=True)
class _Reading:
    """A run, as far as its frames are read."""

    facts: Facts
    before: Position
    """Where the documents stood before its start."""
    todo: deque[tuple[Rows | Master, float]] = field(default_factory=deque)
    """What is told of, and until when it may take to come."""
    ended: Ended | None = None
    frames: GrowingFrames | None = None
    """None before its RunStart."""
    event: int = 0
    """Which one's master file is read."""
    next: int = -1
    """Frame to be read next; -1 before the RunStart."""
    is_refused: bool = False
    is_done: bool = False
    """All of it was read, maybe before a restart. It is kept while an older one is not."""

    @property
    def is_begun(self) -> bool:
        """Some of it was read, and not all."""
        return not self.is_done and (self.next >= 0 or self.event > 0)

    @property
    def has_something(self) -> bool:
        """It can be read, or is over."""
        return not self.is_done and (bool(self.todo) or self.ended is not None)

    def places(self) -> Position:
        """Return how far it is read."""
        run = self.facts.run
        if self.is_done:
            return {_end_of(run): 1}
        return {_event_of(run): self.event, place_of(run): self.next} if self.is_begun else {}

    def add(self, told: Rows | Master, until: float) -> None:
        """Take what can be read at once with what is not yet tried as one."""
        last = self.todo[-1][0] if len(self.todo) > 1 else None
        if isinstance(told, Rows) and isinstance(last, Rows) and told == replace(last.after, n=told.n):
            told = replace(last, n=last.n + told.n)
            self.todo.pop()
        self.todo.append((told, until))


class _NotYet(Exception):
    pass


class BlueskyFiles:
    """A `stream.protocols.Source` for a beamline whose detector writes files and streams nothing.

    Reads HDF5 files that stream_resource and stream_datum documents tell of (ophyd-async), as far as these tell, and
    EIGER master files (AD_EIGER2). A run is called by the uid of its start, the second and later events of EIGER master
    files ``uid/2``, ``uid/3``, ...: each is a series of its own. Runs that overlap come one after the other.

    What cannot be read is tried again for `within` seconds, then it is `Rejected`, so it shows as lost.

    Parameters
    ----------
    documents
        Open; closed with this.
    roots
        Which files may be read, and where they are.
    data_key
        Of the detector's frames. None: the first whose data stand in files.
    batch, give
        See `stream.ingest.hdf5.Hdf5Source`.
    frame_time
        Start to start of frames (s). None: as the file says, else as the documents say.
    within
        How long files may be behind documents, and documents behind each other (s).
    silence
        See `stream.ingest.bluesky_runs.Runs`.
    """

    def __init__(
        self,
        documents: Documents,
        roots: Roots,
        *,
        data_key: str | None = None,
        batch: int = 64,
        give: Give = "frames",
        frame_time: float | None = None,
        within: float = 10.0,
        silence: float = 60.0,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch is {batch}, must be at least 1")
        self._documents, self._roots = documents, roots
        self._batch = min(batch, MAX_LENGTH) if give == "chunks" else batch
        self._give: Give = give
        self._frame_time, self._within = frame_time, within
        self._runs = Runs(data_key=data_key, within=within, silence=silence)
        self._readings: dict[str, _Reading] = {}
        """In the order of their starts; the oldest is not done."""
        self._sought: dict[str, int] = {}
        """Places of runs whose start did not come again."""
        self._sought_until = 0.0
        """When they are no longer waited for."""
        self._look = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._documents.__exit__(None, None, None)

    def __iter__(self) -> Iterator[Message | None]:
        """Yield messages as documents tell of them; None when nothing came for one poll. Ends if the documents do."""
        before = self._documents.position()
        self._sought_until = time.monotonic() + self._within
        for document in self._documents:
            now = time.monotonic()
            match document:
                case Rejected() | None:
                    yield document
                case name, told:
                    yield from self._take(self._runs.feed(name, told, now), before, now)
            before = self._documents.position()
            if now >= self._look:
                self._look = now + LOOK
                yield from self._take(self._runs.expire(now), before, now)
                yield from self._read()
        yield from self._take(self._runs.close(), before, time.monotonic())
        self._sought_until = 0.0
        while self._readings:
            yield from self._read()
            yield None
            time.sleep(LOOK)  # files do not tell that they grew

    def position(self) -> Position:
        """Return where the documents of the oldest run begin that is not read, and what is read of it and of others.

        {} if documents cannot go back.
        """
        oldest = next(iter(self._readings.values()), None)
        places = dict(self._documents.position() if oldest is None else oldest.before)
        if places:
            for read in (self._sought, *(reading.places() for reading in self._readings.values())):
                places |= read
        return places

    def seek(self, position: Position) -> None:
        """Go to a `position` before iterating.

        Raises
        ------
        NotSeekable
            The documents cannot go back, or not there.
        """
        of_runs = (_event_of(""), place_of(""), _end_of(""))
        self._sought = {place: n for place, n in position.items() if place.endswith(of_runs)}
        self._documents.seek({place: n for place, n in position.items() if place not in self._sought})

    def _take(self, told: Iterator[Told], before: Position, now: float) -> Iterator[Rejected]:
        for each in told:
            match each:
                case Opened(facts=facts):
                    if facts.run not in self._readings:
                        event = self._sought.pop(_event_of(facts.run), 0)
                        next_ = self._sought.pop(place_of(facts.run), -1)
                        is_done = bool(self._sought.pop(_end_of(facts.run), 0))
                        self._readings[facts.run] = _Reading(facts, before, event=event, next=next_, is_done=is_done)
                    self._readings[facts.run].facts = facts
                case Rows(run=run) | Master(run=run):
                    if not self._readings[run].is_done:
                        self._readings[run].add(each, now + self._within)
                case Ended(run=run):
                    self._readings[run].ended = each
                    self._forget()
                    self._look = 0.0
                case Rejected():
                    yield each

    def _read(self) -> Iterator[Message]:
        """Yield what can be read now, run after run."""
        while (reading := self._reading()) is not None:
            run = reading.facts.run
            while reading.todo:
                told, until = reading.todo[0]
                try:
                    yield from self._read_one(reading, told, until)
                except _NotYet:
                    return
                except (SourceError, ConfigError, DecodeError) as error:
                    # What keeps a run from being begun keeps it from being read.
                    reading.is_refused = isinstance(told, Rows) and reading.frames is None
                    yield Rejected(reason=one_line(f"run {run}: {error}"))
                reading.todo.popleft()
            if reading.ended is None:
                return
            reading.is_done = True
            self._forget()
            if reading.frames is not None:
                yield RunStop(run=run, n_frames=reading.next, exit_status=reading.ended.exit_status)

    def _forget(self) -> None:
        """Forget runs that are done, from the oldest on."""
        for run, reading in list(self._readings.items()):
            if not reading.is_done or reading.ended is None:
                return
            del self._readings[run]

    def _reading(self) -> _Reading | None:
        """Return the run that is read, or is to be read next; none before that comes again which is half read."""
        if any(place.endswith(place_of("")) for place in self._sought) and time.monotonic() < self._sought_until:
            return None
        begun = (each for each in self._readings.values() if each.is_begun)
        return next(begun, None) or next((each for each in self._readings.values() if each.has_something), None)

    def _read_one(self, reading: _Reading, told: Rows | Master, until: float) -> Iterator[Message]:
        may_wait = time.monotonic() < until
        if isinstance(told, Master):
            yield from self._read_master(reading, told, may_wait=may_wait)
        elif not reading.is_refused:
            yield from self._read_rows(reading, told, may_wait=may_wait)

    def _read_rows(self, reading: _Reading, rows: Rows, *, may_wait: bool) -> Iterator[Message]:
        path, end = self._roots.of_uri(rows.uri), rows.first + rows.n
        try:
            if reading.frames is None:
                reading.frames = GrowingFrames.begin(
                    path, rows.dataset, reading.facts, frame_time=self._frame_time, give=self._give
                )
                reading.next = max(reading.next, 0)
                yield reading.frames.start
            frames = reading.frames
            reading.next = max(reading.next, rows.first)
            row = rows.row + reading.next - rows.first
            for n, stretch in frames.read(path, rows.dataset, row, end - reading.next, self._batch):
                if isinstance(stretch, str) and may_wait:
                    raise _NotYet
                first, reading.next = reading.next, reading.next + n
                if isinstance(stretch, str):
                    yield Rejected(reason=f"{path}: frames {first} to {reading.next - 1}: {stretch}")
                else:
                    timestamp_ns = frames.start_ns + round(first * frames.start.frame_time * 1e9)
                    yield FrameBatch(run=rows.run, first=first, frames=stretch, timestamp_ns=timestamp_ns)
        except SourceError:
            if may_wait:
                raise _NotYet from None
            raise
        if reading.next < end and may_wait:
            raise _NotYet
        if reading.next < end:
            raise SourceError(f"{path}: frames {reading.next} to {end - 1} are told of, and not there")

    def _read_master(self, reading: _Reading, master: Master, *, may_wait: bool) -> Iterator[Message]:
        if master.event < reading.event:
            return
        path = self._roots.of_path(master.path)
        try:
            source = self._open_master(path, reading.facts)
        except SourceError:
            if may_wait:
                raise _NotYet from None
            raise
        with source:
            is_growing = may_wait and not source.is_complete
            if reading.next >= 0 and master.event == reading.event:
                source.seek({next(iter(source.position())): reading.next})
            reading.event = master.event
            facts = reading.facts
            if master.event:
                facts = replace(facts, run=f"{facts.run}/{master.event + 1}")
            for message in source:
                if is_growing and isinstance(message, RunStop):
                    raise _NotYet
                reading.next = next(iter(source.position().values()))
                match message:
                    case RunStart():
                        start = merged(message, facts)
                        yield _unplanned(start) if is_growing else start
                    case FrameBatch() | RunStop():
                        yield replace(message, run=facts.run)
                    case Rejected():
                        yield message
        reading.event, reading.next = master.event + 1, -1

    def _open_master(self, path: Path, facts: Facts) -> Hdf5Source:
        try:
            return Hdf5Source(path, batch=self._batch, frame_time=self._frame_time, give=self._give)
        except ConfigError:
            if self._frame_time is not None or "frame_time" not in facts.numbers:
                raise
            return Hdf5Source(path, batch=self._batch, frame_time=facts.numbers["frame_time"], give=self._give)


def _unplanned(start: RunStart) -> RunStart:
    """Return it without the number of frames, which is of those that are there so far."""
    return replace(start, metadata={name: value for name, value in start.metadata.items() if name != "n_frames"})


def _event_of(run: str) -> str:
    return f"{run}:event"


def _end_of(run: str) -> str:
    return f"{run}:end"
