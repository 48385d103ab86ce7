"""A detector's own stream, called and described by Bluesky's documents of the same run."""

import logging
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from stream.ingest.bluesky_facts import Facts, merged
from stream.ingest.bluesky_messages import Document, Documents, Ended, Opened, Told
from stream.ingest.bluesky_runs import Runs
from stream.messages import Chunks, Events, ExitStatus, FrameBatch, Message, Position, Rejected, RunStart, RunStop
from stream.protocols import Source

_log = logging.getLogger(__name__)

MAX_HELD_BYTES = 2**30
"""Of frames that are held while their run is not known."""

_UID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(slots=True)
class _Known:
    """A run by its documents."""

    facts: Facts
    is_described: bool = False
    ended: float | None = None
    exit_status: ExitStatus = "success"

    def was_open(self, then: float) -> bool:
        """Tell whether it had not ended by then, as far as was known."""
        return self.ended is None or self.ended >= then


@dataclass(slots=True)
class _Held:
    """What waits for documents of its run, and what came after it."""

    first: RunStart | RunStop
    until: float
    idle: float
    """When the detector had nothing last before it came: a run that ended by then is not the one that sent it."""
    messages: deque[tuple[Message, Position]] = field(default_factory=deque)
    nbytes: int = 0


class BlueskySource:
    """A `stream.protocols.Source`: a detector's, its runs by the uid that Bluesky gave them, with what Bluesky knows.

    A RunStart of the detector waits until start and descriptor of its run came. These are found by the uid, where the
    detector's stream carries one (as its run, or anywhere in its metadata, such as Dectris user_data); else by arming
    order: of the runs that are open and not yet taken, the oldest one that names detectors, or else the oldest one. (An
    adaptive plan has a run of its own around those that measure.) What did not come within a while is done without: the
    descriptor, or all of it; then the run goes on by the detector's own name. A RunStop waits as long for that of the
    documents, which knows whether the plan failed.

    Where both state something, the detector's value counts; conflicts are reported (`stream.ingest.bluesky_facts`).

    Parameters
    ----------
    documents, detector
        Open; closed with this. `documents` is asked with every message of the detector: make it with ``wait=0``. Where
        they end, this ends too, once the detector sent the runs that they tell of.
    within
        How long a run of the detector waits, and after the last document this for the detector (s).
    """

    def __init__(self, documents: Documents, detector: Source, *, within: float = 2.0) -> None:
        self._documents, self._detector, self._within = documents, detector, within
        self._runs = Runs()
        self._known: dict[str, _Known] = {}
        """By uid, in the order of their starts; those that are taken are not there."""
        self._taken: dict[str, _Known] = {}
        """By the detector's name."""
        self._held: _Held | None = None
        self._has_ended = False
        """No more documents will come."""
        self._heard = 0.0
        """When the detector, or the last document, came."""
        self._idle = 0.0
        """When there was nothing of the detector: what it sends may have to wait for us, longer than documents do."""
        self._position: Position = detector.position()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._documents.__exit__(None, None, None)
        finally:
            self._detector.__exit__(None, None, None)

    def __iter__(self) -> Iterator[Message | None]:
        """Yield the detector's messages, and Rejected for documents that are none."""
        documents = iter(self._documents)
        for message in self._detector:
            if message is None:
                self._idle = time.monotonic()
            else:
                self._heard = time.monotonic()
            yield from self._listen(documents)
            if isinstance(message, RunStart) or (isinstance(message, RunStop) and self._may_fail(message)):
                yield from self._release()
                self._held = _Held(message, self._heard + self._within, self._idle)
            if self._held is None:
                self._position = self._detector.position()
                yield self._named(message)
                if self._is_over:
                    return
                continue
            if message is None:
                yield None
            else:
                self._hold(self._held, message)
            if self._is_known(self._held):
                yield from self._release()
        yield from self._release()

    def position(self) -> Position:
        """Return the detector's, just after the message yielded last."""
        return self._position

    def seek(self, position: Position) -> None:
        """Go to a `position` of the detector; NotSeekable if it cannot."""
        self._detector.seek(position)
        self._position = position

    def _listen(self, documents: Iterator[tuple[str, Document] | Rejected | None]) -> Iterator[Rejected]:
        """Take all documents that are there."""
        now = time.monotonic()
        for each in documents:
            if each is None:
                break
            if isinstance(each, Rejected):
                yield each
            else:
                name, document = each
                yield from self._take(self._runs.feed(name, document, now), now)
        else:
            if not self._has_ended:
                self._has_ended, self._heard = True, now
        yield from self._take(self._runs.expire(now), now)
        # A run may have been too short for us to see it open.
        idle = self._idle if self._held is None else self._held.idle
        for uid in [uid for uid, known in self._known.items() if not known.was_open(idle - self._within)]:
            del self._known[uid]

    @property
    def _is_over(self) -> bool:
        is_open = self._known or self._taken
        return self._has_ended and not (is_open and time.monotonic() < self._heard + self._within)

    def _take(self, told: Iterator[Told], now: float) -> Iterator[Rejected]:
        for each in told:
            match each:
                case Opened(facts=facts, is_described=is_described):
                    known = self._find(facts.run)
                    if known is None:
                        known = self._known[facts.run] = _Known(facts)
                    known.facts, known.is_described = facts, is_described
                case Ended(run=run, exit_status=exit_status):
                    if (known := self._find(run)) is not None:
                        known.ended, known.exit_status = now, exit_status
                case Rejected():
                    yield each

    def _find(self, uid: str) -> _Known | None:
        taken = (known for known in self._taken.values() if known.facts.run == uid)
        return self._known.get(uid) or next(taken, None)

    def _hold(self, held: _Held, message: Message) -> None:
        held.messages.append((message, self._detector.position()))
        if isinstance(message, FrameBatch):
            held.nbytes += _nbytes(message)

    def _may_fail(self, stop: RunStop) -> bool:
        """Tell whether documents may know of a failure that the detector does not know of."""
        known = self._taken.get(stop.run)
        return self._held is None and known is not None and known.ended is None and stop.exit_status == "success"

    def _is_known(self, held: _Held) -> bool:
        if self._has_ended or time.monotonic() >= held.until or held.nbytes > MAX_HELD_BYTES:
            return True
        if isinstance(held.first, RunStop):
            return self._taken[held.first.run].ended is not None
        found = self._match(held.first, held.idle)
        if found is None or not (found.is_described and found.was_open(held.idle)):
            return False
        # One that names no detectors may be around that which does, and whose start is late.
        return found.facts.has_detectors or any(found.facts.run in text for text in _said(held.first))

    def _match(self, start: RunStart, idle: float) -> _Known | None:
        said = _said(start)
        for uid, known in self._known.items():
            if any(uid in text for text in said):
                return known
        if any(_UID.search(text) for text in said[1:]):
            return None
        were_open = [known for known in self._known.values() if known.was_open(idle)]
        with_detectors = [known for known in were_open if known.facts.has_detectors]
        return next(iter([*with_detectors, *were_open, *reversed(self._known.values())]), None)

    def _release(self) -> Iterator[Message]:
        held, self._held = self._held, None
        if held is None:
            return
        if isinstance(held.first, RunStart):
            self._pair(held.first, held.idle)
        for message, self._position in held.messages:
            named = self._named(message)
            if named is not None:
                yield named

    def _pair(self, start: RunStart, idle: float) -> None:
        found = self._match(start, idle)
        # Of a name that comes again this is another run.
        self._taken.pop(start.run, None)
        if found is None:
            _log.warning("run %s: Bluesky said nothing of it within %g s", start.run, self._within)
        else:
            self._taken[start.run] = self._known.pop(found.facts.run)

    def _named(self, message: Message | None) -> Message | None:
        if message is None or isinstance(message, Rejected) or (known := self._taken.get(message.run)) is None:
            return message
        if isinstance(message, RunStart):
            return merged(message, known.facts)
        if isinstance(message, RunStop):
            del self._taken[message.run]
            if message.exit_status == "success" and known.ended is not None:
                message = replace(message, exit_status=known.exit_status)
        return replace(message, run=known.facts.run)


def _said(start: RunStart) -> list[str]:
    """Return where a detector may tell of a uid: first its name of the run."""
    return [start.run, *(value for value in start.metadata.values() if isinstance(value, str))]


def _nbytes(batch: FrameBatch) -> int:
    match batch.frames:
        case Chunks(chunks=chunks):
            return sum(map(len, chunks))
        case Events() as events:
            return events.pixels.nbytes + events.counts.nbytes
        case frames:
            return frames.nbytes
