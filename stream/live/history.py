"""Runs that are over, to lay over the one that is on."""

from collections import deque
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
    """The newest runs that are over, in bounded memory."""

    def __init__(self) -> None:
        self._runs: deque[Past] = deque()
        self._n = 0
        self._bytes = 0

    def add(self, facts: dict[str, Any], g2: bytes) -> Past:
        """Take the end of a run; forget the oldest if there is no room."""
        self._n += 1
        past = Past(number=self._n, facts=facts, g2=g2)
        self._runs.append(past)
        self._bytes += len(g2)
        while len(self._runs) > MOST_RUNS or (self._bytes > MOST_BYTES and len(self._runs) > 1):
            self._bytes -= len(self._runs.popleft().g2)
        return past

    def g2(self, number: int) -> bytes | None:
        """Return the curves of a run, None if it is not known."""
        return next((past.g2 for past in self._runs if past.number == number), None)

    def facts(self) -> list[dict[str, Any]]:
        """Return what is to be told of every run, the newest first."""
        return [{"number": past.number, **past.facts} for past in reversed(self._runs)]
