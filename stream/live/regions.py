"""The regions of a detector, and who correlates them, for the page."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from stream.heartbeat import Region, node_of, regions_of
from stream.messages import Arrays

SILENT = 5.0
"""Seconds after which a region that says nothing is told as silent."""

MOST_ROWS = 16
"""Regions that are told one by one; of more the worst."""

MOST_BANDS = 256
"""Regions of which the image shows where they lie."""


@dataclass(frozen=True, slots=True)
class Regions:
    """As they were when they were heard of last."""

    known: tuple[Region, ...]
    heard: float
    """When; monotonic."""
    node: str = ""
    """Of the one process, where there are no regions."""
    checkpoint: int = -1

    @classmethod
    def of(cls, arrays: Arrays) -> Self:
        """Take a result of a merger; KeyError, IndexError, TypeError or ValueError if it is none of its."""
        return cls(tuple(regions_of(arrays)), time.monotonic())

    @classmethod
    def of_one(cls, ledger: Arrays) -> Self | None:
        """Take the ledger of one process; None if it is of a merger, or does not tell who made it."""
        node = node_of(ledger)
        return cls((), time.monotonic(), node, int(ledger.get("checkpoint", -1))) if node else None

    def facts(self, missing: Collection[int], *, is_on: bool) -> list[dict[str, Any]]:
        """Return what is known now of every region, numbers that are unknown as NaN or None.

        The ``state`` is "missing" (from the result, or never heard of), "ended", "silent" or "well".
        """
        missing, since = set(missing), time.monotonic() - self.heard
        newest = max((region.frames for region in self.known), default=0)
        return [
            {
                "region": i,
                "rows": list(region.rows),
                "node": region.node,
                "frames": region.frames,
                "behind": newest - region.frames,
                "lost": region.lost,
                "lag": region.lag,
                "checkpoint": region.checkpoint if region.checkpoint >= 0 else None,
                "age": region.age + since if is_on and not region.ended else None,
                "state": _state(region, since, is_missing=i in missing, is_on=is_on),
            }
            for i, region in enumerate(self.known)
        ]

    def section(self, missing: Collection[int], *, is_on: bool) -> tuple[dict[str, Any], Arrays]:
        """Return facts and arrays for browsers: the worst regions, in their order, and the rows of all."""
        every = self.facts(missing, is_on=is_on)
        worst = sorted(every, key=_badness)[:MOST_ROWS]
        facts = {
            "regions": sorted(worst, key=lambda region: int(region["region"])),
            "n": len(every),
            "n_nodes": len({region["node"] for region in every} - {""}),
            "silent_after": SILENT,
            "node": self.node,
            "checkpoint": self.checkpoint if self.checkpoint >= 0 else None,
        }
        bands = np.array([region["rows"] for region in every[:MOST_BANDS]], "<f8").reshape(-1, 2)
        return facts, {"rows": bands}


def _state(region: Region, since: float, *, is_missing: bool, is_on: bool) -> str:
    if is_missing or (is_on and np.isnan(region.age)):
        return "missing"
    if region.ended or not is_on:
        return "ended"
    return "silent" if region.age + since > SILENT else "well"


def _badness(region: dict[str, Any]) -> tuple[int, int, float]:
    order = ("missing", "silent", "well", "ended").index(region["state"])
    age = region["age"]
    return order, -int(region["behind"]), -(age if age is not None and np.isfinite(age) else 0.0)
