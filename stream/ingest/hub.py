"""Our wire (`stream.wire`) from the hub of a gateway (`stream.hub`), receiving end."""

import logging
import time
from collections.abc import Iterator
from typing import Self

from stream.dealer import Dealer, Hub
from stream.errors import DecodeError, SourceError
from stream.hub_wire import OVERHEAD, Read, Record
from stream.ingest.chunks import Unpacking, frames_of, results_of
from stream.messages import Message, Output, Position, Rejected, Result, RunStart, RunStop
from stream.wire import decode

_log = logging.getLogger(__name__)

POLL = 0.05
"""How long one look for a record takes (s)."""

BEAT = 0.25
"""Seconds between two words to the hub, where nothing happens."""

WINDOW = 2**25
"""Bytes that may be on their way to us."""


class HubSource:
    """Frames of one region. A `stream.protocols.Source`.

    Begins with the oldest record that the hub still has, or where it is told to; what it has no longer is logged, and
    its frames are lost. A hub that is away is waited for, and one that comes in its place is gone on with.

    Parameters
    ----------
    hub
        Where the gateway is.
    log
        Which one.

    Raises
    ------
    SourceError
        The address cannot be used.
    """

    def __init__(self, hub: Hub, log: str) -> None:
        self._records = _Records(hub, log)
        self._unpack = Unpacking()
        self._position: Position = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._records.close()

    def __iter__(self) -> Iterator[Message | None]:
        """Yield messages as they come, `Rejected` for what is not one, None when nothing came for 0.05 s.

        Raises
        ------
        SourceError
            The gateway refuses us.
        """
        for message, position in frames_of(self._records, self._unpack):
            self._position = position
            yield message

    def position(self) -> Position:
        """Return ``{"log of the hub in this life": offset}`` of the record that comes next; {} before the first."""
        return self._position

    def seek(self, position: Position) -> None:
        """Go to a `position` before iterating. That of a hub that is no more is where its successor begins."""
        self._records.seek(position)
        self._position = position

    def begin(self, start: RunStart) -> None:
        """Tell which run the frames at a position are of."""
        self._unpack.begin(start)

    def acknowledge(self, position: Position) -> None:
        """Tell that nothing before a position will be asked for again. For any thread."""
        self._records.acknowledge(position)


class HubResults:
    """Partial sums of all regions; otherwise as `HubSource`."""

    def __init__(self, hub: Hub, log: str) -> None:
        self._records = _Records(hub, log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._records.close()

    def __iter__(self) -> Iterator[RunStart | RunStop | Result | Rejected | None]:
        """Yield messages as they come, `Rejected` for what is not one, None when nothing came for 0.05 s."""
        return results_of(self._records)

    def position(self) -> Position:
        """See `HubSource.position`."""
        return self._records.position()

    def seek(self, position: Position) -> None:
        """See `HubSource.seek`."""
        self._records.seek(position)

    def acknowledge(self, position: Position) -> None:
        """See `HubSource.acknowledge`."""
        self._records.acknowledge(position)


class _Records:
    """A log of a hub, and our wire on it."""

    def __init__(self, hub: Hub, log: str) -> None:
        self._hub = hub
        self._log = log
        self._dealer = Dealer(hub, SourceError)
        self._ring = ""
        self._next = 0
        self._safe: Position = {}
        self._unread = 0
        """Bytes of records that the hub does not know that we have."""
        self._told_at = self._asked_again_at = 0.0

    def close(self) -> None:
        self._tell(again=False)
        self._dealer.close()

    def position(self) -> Position:
        return {f"{self._log} {self._ring}": self._next} if self._ring else {}

    def seek(self, position: Position) -> None:
        for place, offset in position.items():
            log, _, self._ring = place.partition(" ")
            if log != self._log or offset < 0:
                raise SourceError(f"{self._hub}: {self._log} cannot go to {place} = {offset}")
            self._next = offset
        # What is gone on from is safe, though the one who saved it may not have lived to say so.
        self._safe = position

    def acknowledge(self, position: Position) -> None:
        self._safe = position

    def __iter__(self) -> Iterator[tuple[str, Output | Rejected | None]]:
        """Yield messages, and where they stand."""
        while True:
            now = time.monotonic()
            if now - self._told_at > BEAT or self._unread > WINDOW // 4:
                self._tell(again=False)
            record, parts = self._dealer.hear(POLL)
            if not isinstance(record, Record) or not self._is_next(record):
                yield "", None
                continue
            where = f"{self._hub}: {self._log}, offset {record.offset}"
            self._unread += sum(memoryview(part).nbytes for part in parts) + OVERHEAD
            try:
                message: Output | Rejected = decode(parts)
            except DecodeError as error:
                message = Rejected(reason=f"{where}: {error}")
            yield where, message

    def _tell(self, *, again: bool) -> None:
        read = Read(
            beamline=self._hub.beamline,
            log=self._log,
            ring=self._ring,
            next=self._next,
            safe=self._safe.get(f"{self._log} {self._ring}", 0),
            window=WINDOW,
            again=again,
        )
        if self._dealer.say(read):
            self._unread = 0
            self._told_at = time.monotonic()

    def _ask_again(self) -> None:
        """Ask for what was on its way when a connection broke; what comes meanwhile will come once more."""
        if time.monotonic() - self._asked_again_at > BEAT:
            self._asked_again_at = time.monotonic()
            self._tell(again=True)

    def _is_next(self, record: Record) -> bool:
        """Tell whether a record is the one that we want, and go on behind it."""
        if record.ring != self._ring:
            if self._ring:
                _log.warning("%s: %s goes on at a gateway that has begun anew", self._hub, self._log)
            self._ring, self._next = record.ring, 0
        if record.offset < self._next:
            return False
        if record.follows > self._next:
            self._ask_again()
            return False
        if record.offset > self._next:
            gone = record.offset - self._next
            _log.warning("%s: %s: %d records are gone before offset %d", self._hub, self._log, gone, record.offset)
        self._next = record.offset + 1
        return True
