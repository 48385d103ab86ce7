"""Runs that are over, to lay over the one that is on."""

import threading
from dataclasses import dataclass
from typing import Any

MOST_RUNS = 500
MOST_BYTES = 2**26


@dataclass(slots=True, kw_only=True)
class Past:
    """A run that is over."""

    number: int
    """Its name here; names of runs may come again."""
    facts: dict[str, Any]
    g2: bytes
    """Its `section`."""


class History:
    """The newest runs that are over, in bounded memory. For any thread."""

    def __init__(self) -> None:
        self._runs: list[Past] = []
        self._n = 0
        self._lock = threading.Lock()

    def add(self, facts: dict[str, Any], g2: bytes) -> Past:
        """Take the end of a run; forget the oldest if there is no room, and what was told of this run before."""
        with self._lock:
            self._n += 1
            past = Past(number=self._n, facts=facts, g2=g2)
            kept = [each for each in self._runs if not _same(each.facts, facts)]
            self._runs = sorted([*kept, past], key=lambda each: str(each.facts["ended"]))[-MOST_RUNS:]
            while sum(len(each.g2) for each in self._runs) > MOST_BYTES and len(self._runs) > 1:
                del self._runs[0]
        return past

    def g2(self, number: int) -> bytes | None:
        """Return the curves of a run, None if it is not known."""
        with self._lock:
            return next((past.g2 for past in self._runs if past.number == number), None)

    def facts(self) -> list[dict[str, Any]]:
        """Return what is to be told of every run, the newest first."""
        with self._lock:
            return [{"number": past.number, **past.facts} for past in reversed(self._runs)]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["start_time"]) and all(one[name] == other[name] for name in ("run", "start_time"))
