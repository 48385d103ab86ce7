"""One run of Bluesky, as far as its documents came."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args

from stream.errors import DecodeError
from stream.ingest.bluesky_facts import Facts
from stream.ingest.bluesky_messages import Descriptor, Document, Master, Rows
from stream.messages import ExitStatus, Rejected
from stream.wire import MAX_COUNT, shown

_log = logging.getLogger(__name__)

MAX_WAITING = 2**14
"""Documents that wait for others."""


@dataclass(slots=True)
class Run:
    """What came of it, and what of that was told."""

    facts: Facts
    heard: float
    """When something of it came last."""
    described: Descriptor | None = None
    stop: Document | None = None
    until: float = 0.0
    """When it ends, though not all came."""
    seen: int = 0
    """Events of its stream."""
    next: int = 0
    """Frame, or event where each has a file, that is told of next."""
    ahead: dict[int, tuple[int, Rows | Master]] = field(default_factory=dict)
    """What comes after others that did not come yet: by its beginning, its end and what to tell."""
    offsets: dict[str, int] = field(default_factory=dict)
    """Of the frames of each stream_resource within the run."""

    @property
    def is_complete(self) -> bool:
        """Whether all came that the stop document counts."""
        if self.stop is None:
            return False
        counted = self.counted
        if self.described is None or self.described.data_key is None:
            return self.seen >= counted
        per_event = self.described.frames_per_event if self.described.is_streamed else 1
        return self.next >= counted * per_event and not self.ahead

    @property
    def counted(self) -> int:
        """Events of its stream, by the stop document."""
        counts = (self.stop or {}).get("num_events")
        n = counts.get("primary", 0) if isinstance(counts, Mapping) else 0
        return n if type(n) is int and 0 <= n <= MAX_COUNT else 0

    @property
    def exit_status(self) -> ExitStatus:
        """As the stop document says; "fail" if there is none."""
        told = "fail" if self.stop is None else self.stop.get("exit_status")
        known: tuple[ExitStatus, ...] = get_args(ExitStatus)
        return next((status for status in known if status == told), "fail")

    def in_order(self, begin: int, end: int, told: Rows | Master) -> Iterator[Rows | Master]:
        """Take what begins and ends there; yield what can be told. What came before is not told again.

        Raises
        ------
        DecodeError
            Too much waits for what is before it.
        """
        if begin < self.next or begin in self.ahead:
            return
        if len(self.ahead) >= MAX_WAITING:
            raise DecodeError(f"{begin} is too far ahead of {self.next}, which did not come")
        self.ahead[begin] = (end, told)
        while self.next in self.ahead:
            self.next, ready = self.ahead.pop(self.next)
            yield ready

    def rest(self) -> Iterator[Rows | Master | Rejected]:
        """Yield what is to be told at the end."""
        if not self.is_complete:
            what = "its stop" if self.stop is None else f"some of its {self.counted} events"
            yield Rejected(reason=f"run {shown(self.facts.run)}: {what} did not come")
        for begin in sorted(self.ahead):
            yield self.ahead[begin][1]
        told = self.described
        if told is not None and told.is_streamed and told.frames_per_event > 1 and self.counted > 1:
            _log.warning(
                "run %s: its %d events of %d frames each were taken as one series without gaps",
                self.facts.run,
                self.counted,
                told.frames_per_event,
            )
