"""The straight line of a merger: partial sums of all regions in, results of the whole detector out."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from stream import checkpoint
from stream.merger import Merger
from stream.messages import Output, Position, Rejected, Result, RunStart, RunStop
from stream.pipeline import deliver, offer
from stream.protocols import Sink

_log = logging.getLogger(__name__)


class Results(Protocol):
    """Where partial sums come from: like a `stream.protocols.Source`."""

    def __iter__(self) -> Iterator[RunStart | RunStop | Result | Rejected | None]:
        """Yield what workers publish; None when nothing came for a while."""

    def position(self) -> Position:
        """Return where to go on; see `stream.protocols.Source`."""

    def seek(self, position: Position) -> None:
        """Go to a position before iterating."""


def merge(
    source: Results,
    merger: Merger,
    sinks: Sequence[Sink],
    *,
    store: checkpoint.Store | None = None,
    publish_every: float = 1.0,
    runs: int | None = None,
    stop: threading.Event,
) -> None:
    """Merge until the source ends, `runs` runs are done, or `stop` is set.

    What is kept in `store` is only where the runs that are not done began: their partial sums are read again.

    Raises
    ------
    SourceError
        The transport of the source is gone.
    SinkError
        A sink did not take a final result; the others have it.
    CheckpointError
        The position cannot be read or written.
    """
    saved = None if store is None else store.load()
    if saved is not None and saved.position:
        source.seek(saved.position)
    began: dict[str, Position] = {}
    before = source.position()
    due = time.monotonic() + publish_every

    def hand_on(outputs: Iterable[Output]) -> int:
        """Deliver what must arrive; return how many runs ended."""
        outputs = list(outputs)
        ended = [output.run for output in outputs if isinstance(output, RunStop)]
        began.update({output.run: before for output in outputs if isinstance(output, RunStart)})
        if outputs:
            deliver(outputs, sinks)
        for run in ended:
            began.pop(run, None)
        if ended and store is not None:
            store.save(checkpoint.Checkpoint(position=_earliest([*began.values(), source.position()]), running=None))
        return len(ended)

    for message in source:
        n_ended = 0
        match message:
            case Rejected(reason=reason):
                _log.warning("rejected: %s", reason)
            case RunStart() | Result() | RunStop():
                n_ended = hand_on(merger.take(message))
        before = source.position()
        if time.monotonic() >= due:
            offer(merger.interim(), sinks)
            n_ended += hand_on(merger.given_up())
            due = time.monotonic() + publish_every
        if runs is not None and n_ended:
            runs -= n_ended
        if stop.is_set() or (runs is not None and runs <= 0):
            return


def _earliest(positions: Sequence[Position]) -> Position:
    """Return the earliest place in every part of a source; a part that is missing once begins with what is oldest."""
    parts = set.intersection(*(set(position) for position in positions))
    return {part: min(position[part] for position in positions) for part in parts}
