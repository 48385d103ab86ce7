"""Partial sums recomputed from a file, beside those of the stream on the same logs: how they are told apart.

They come as those of a worker do, RunStart, Results, RunStop of a region, but under a name of their own: a worker may
write amid them, of this run or of another one of that name. Their RunStart says in its metadata which run they repair::

    source      "file"
    repairs     the name of the run; its start_time stands there as ever
    is_all      whether the file has every frame that the gateway had: then nothing better can come

A region of which the file has no frame that the stream lost has no results but the ledger.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stream.messages import Result, RunStart, RunStop

OURS = ("source", "repairs", "is_all")
"""Names in the metadata of such a RunStart."""

MOST = 2**14
"""Regions of repairs that did not end, and are remembered."""

Key = tuple[str, str]
"""Name of a run and when it began: a detector that was restarted counts its runs anew."""


def key_of(start: RunStart) -> Key:
    """Return which run begins, or is repaired."""
    run = start.metadata["repairs"] if is_repair(start) else start.run
    return str(run), str(start.metadata.get("start_time", ""))


def is_repair(start: RunStart) -> bool:
    """Tell whether what follows is from a file."""
    return start.metadata.get("source") == "file" and isinstance(start.metadata.get("repairs"), str)


def repair(start: RunStart, name: str, *, is_all: bool) -> RunStart:
    """Return the start of a repair under a name, from that of its run."""
    told = {"source": "file", "repairs": start.run, "is_all": is_all}
    return replace(start, run=name, metadata={**start.metadata, **told})


def metadata_of_run(start: RunStart) -> Mapping[str, Any]:
    """Return what a RunStart says of its run, without what is of regions and repairs."""
    ours = ("regions", *OURS) if is_repair(start) else ("regions",)
    return {name: value for name, value in start.metadata.items() if name not in ours}


class Origins:
    """Which run the messages of all regions are of, and whether they are from a file."""

    def __init__(self) -> None:
        self._streamed: dict[int, Key] = {}
        """By region, the run that its worker is in."""
        self._repaired: dict[tuple[str, int], Key] = {}

    def of(self, message: RunStart | Result | RunStop) -> tuple[Key, bool] | None:
        """Return the run, and whether it is from a file; None for a run that did not begin here."""
        name = message.run, message.region
        if isinstance(message, RunStart):
            key = key_of(message)
            if not is_repair(message):
                self._streamed[message.region] = key
                return key, False
            self._repaired[name] = key
            while len(self._repaired) > MOST:
                del self._repaired[next(iter(self._repaired))]
            return key, True
        if (repaired := self._repaired.get(name)) is not None:
            if isinstance(message, RunStop):
                del self._repaired[name]
            return repaired, True
        streamed = self._streamed.get(message.region)
        return (streamed, False) if streamed is not None and streamed[0] == message.run else None
