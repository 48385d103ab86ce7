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


@dataclass(slots=True)
class _Held:
    """A run of the detector that waits for its documents."""

    start: RunStart
    until: float
    messages: deque[tuple[Message, Position]] = field(default_factory=deque)
    nbytes: int = 0


class BlueskySource:
    """A `stream.protocols.Source`: a detector's, its runs by the uid that Bluesky gave them, with what Bluesky knows.

    A RunStart of the detector waits until start and descriptor of its run came. These are found by the uid, where the
    detector's stream carries one (as its run, or anywhere in its metadata, such as Dectris user_data); else by arming
    order: of the runs that are open and not yet taken, the oldest one. What did not come within a while is done
    without: the descriptor, or all of it; then the run goes on by the detector's own name.

    Where both state something, the detector's value counts; conflicts are reported (`stream.ingest.bluesky_facts`).

    Parameters
    ----------
    documents, detector
        Open; closed with this. `documents` is asked with every message of the detector: make it with ``wait=0``.
    within
        How long a run of the detector waits (s).
    """

    def __init__(self, documents: Documents, detector: Source, *, within: float = 2.0) -> None:
        self._documents, self._detector, self._within = documents, detector, within
        self._runs = Runs()
        self._known: dict[str, _Known] = {}
        """By uid, in the order of their starts; those that are taken are not there."""
        self._taken: dict[str, _Known] = {}
        """By the detector's name."""
        self._held: _Held | None = None
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
            yield from self._listen(documents)
            if isinstance(message, RunStart):
                yield from self._release()
                self._held = _Held(message, time.monotonic() + self._within)
            if self._held is None:
                self._position = self._detector.position()
                yield self._named(message)
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
        yield from self._take(self._runs.expire(now), now)
        # A run may have been too short for us to see it open.
        for uid in [u for u, k in self._known.items() if k.ended is not None and k.ended + self._within < now]:
            del self._known[uid]

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

    def _is_known(self, held: _Held) -> bool:
        found = self._match(held.start)
        is_over = time.monotonic() >= held.until or held.nbytes > MAX_HELD_BYTES
        return is_over or (found is not None and found.is_described and found.ended is None)

    def _match(self, start: RunStart) -> _Known | None:
        said = [start.run, *(value for value in start.metadata.values() if isinstance(value, str))]
        for uid, known in self._known.items():
            if any(uid in text for text in said):
                return known
        if any(_UID.search(text) for text in said[1:]):
            return None
        still_open = [known for known in self._known.values() if known.ended is None]
        return next(iter([*still_open, *self._known.values()]), None)

    def _release(self) -> Iterator[Message]:
        held, self._held = self._held, None
        if held is None:
            return
        found = self._match(held.start)
        # Of a name that comes again this is another run.
        self._taken.pop(held.start.run, None)
        if found is None:
            _log.warning("run %s: Bluesky said nothing of it within %g s", held.start.run, self._within)
        else:
            self._taken[held.start.run] = self._known.pop(found.facts.run)
        for message, self._position in held.messages:
            named = self._named(message)
            if named is not None:
                yield named

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


def _nbytes(batch: FrameBatch) -> int:
    match batch.frames:
        case Chunks(chunks=chunks):
            return sum(map(len, chunks))
        case Events() as events:
            return events.pixels.nbytes + events.counts.nbytes
        case frames:
            return frames.nbytes
