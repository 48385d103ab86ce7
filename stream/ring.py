"""Records that are kept in memory until they are safe elsewhere, and as long after as there is room."""

import time
import uuid
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import merge

from stream.wire import Buffer

EACH = 512
"""Bytes that it takes to keep a record, besides its own."""

MOST_RUNS = 200
"""Of which it is known how many records were lost."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A record in a ring."""

    parts: Sequence[Buffer]
    n_bytes: int
    must_stay: bool
    run: int
    at: float
    """When it came, `time.monotonic`."""


class Ring:
    """Numbered records, of which the oldest go when there is no room: those that are safe before all others.

    Records that must stay (starts and ends of runs, final results: without them the others mean nothing) go, while they
    are not safe, only when nothing else is left. The newest record is always there.

    Parameters
    ----------
    n_bytes
        Room for records, of which each takes `EACH` more than its own bytes.

    Attributes
    ----------
    name
        Another one in every life: offsets mean nothing in the next.
    end
        Offset of the record that comes next.
    safe
        Records before it are not needed any more.
    limit
        Bytes that there is room for.
    lost
        How many went before they were safe.
    lost_of
        The same by the number of their run.
    """

    def __init__(self, n_bytes: int) -> None:
        self.name = uuid.uuid4().hex
        self.end = self.safe = self.lost = 0
        self.lost_of: Counter[int] = Counter()
        self.limit = self._room = n_bytes
        self._records: dict[int, Kept] = {}
        self._passing: deque[int] = deque()
        self._staying: deque[int] = deque()

    @property
    def room(self) -> int:
        """Bytes that are free."""
        return self._room

    def has_room(self, n_bytes: int) -> bool:
        """Tell whether a record can be appended while nothing goes that is not safe."""
        missing = n_bytes + EACH - self._room
        for offset in merge(self._passing, self._staying):
            if missing <= 0 or offset >= self.safe:
                return missing <= 0
            missing -= self._records[offset].n_bytes + EACH
        return True

    @property
    def unsafe(self) -> Kept | None:
        """The oldest record that is there and not safe; None if all are safe."""
        found = self.at(self.safe)
        return found[1] if found is not None else None

    def append(self, parts: Sequence[Buffer], *, must_stay: bool, run: int = 0) -> None:
        """Take a record of a run that has a number, for which the oldest go."""
        record = Kept(parts, sum(memoryview(part).nbytes for part in parts), must_stay, run, time.monotonic())
        self._room -= record.n_bytes + EACH
        while self._room < 0 and self._records:
            self._drop()
        self._records[self.end] = record
        (self._staying if must_stay else self._passing).append(self.end)
        self.end += 1

    def at(self, offset: int) -> tuple[int, Kept] | None:
        """Return the first record from an offset on that is there, and its own offset; None at the end."""
        if offset >= self.end:
            return None
        if offset not in self._records:
            after = (kept[i] for kept in (self._passing, self._staying) if (i := bisect_left(kept, offset)) < len(kept))
            offset = min(after)
        return offset, self._records[offset]

    def release(self, offset: int) -> None:
        """Take note that records before an offset are safe."""
        self.safe = max(self.safe, min(offset, self.end))

    def _drop(self) -> None:
        oldest = min((kept for kept in (self._passing, self._staying) if kept), key=lambda kept: kept[0])
        offset = (oldest if oldest[0] < self.safe else self._passing or self._staying).popleft()
        gone = self._records.pop(offset)
        self._room += gone.n_bytes + EACH
        if offset >= self.safe:
            self.lost += 1
            self.lost_of[gone.run] += 1
            while len(self.lost_of) > MOST_RUNS:
                del self.lost_of[min(self.lost_of)]
