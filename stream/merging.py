"""The straight line of a merger: partial sums of all regions in, results of the whole detector out."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ValidationError

from stream.errors import CheckpointError
from stream.logs import bound
from stream.merger import Merger
from stream.messages import Output, Position, Rejected, Result, RunStart, RunStop
from stream.pipeline import deliver, offer
from stream.protocols import Sink
from stream.repairs import Key

_log = logging.getLogger(__name__)

BEAT = 1.0
"""Seconds after which it is told again how the regions are."""


class Results(AbstractContextManager["Results"], Protocol):
    """Where partial sums come from: like a `stream.protocols.Source`."""

    def __iter__(self) -> Iterator[RunStart | RunStop | Result | Rejected | None]:
        """Yield what workers publish; None when nothing came for a while."""

    def position(self) -> Position:
        """Return where to go on; see `stream.protocols.Source`."""

    def seek(self, position: Position) -> None:
        """Go to a position before iterating."""

    def acknowledge(self, position: Position) -> None:
        """Tell that nothing before a position will be asked for again."""


def merge(
    source: Results,
    merger: Merger,
    sinks: Sequence[Sink],
    *,
    position: Path | None = None,
    publish_every: float = 1.0,
    runs: int | None = None,
    stop: threading.Event,
) -> None:
    """Merge until the source ends, `runs` runs are done, or `stop` is set.

    What is kept in the file `position` is only where the runs that are not done began: their partial sums are read
    again. It is written when a run is done.

    Raises
    ------
    SourceError
        The transport of the source is gone.
    SinkError
        A sink did not take a final result; the others have it.
    CheckpointError
        The position cannot be written.
    """
    began: dict[Key, Position] = {}
    before = acknowledged = source.position()
    due, beat_due = time.monotonic() + publish_every, 0.0
    for message in source:
        outputs: list[Output] = []
        match message:
            case Rejected(reason=reason):
                _log.warning("rejected: %s", reason)
            case RunStart() | Result() | RunStop():
                with bound(run=message.run):
                    outputs = list(merger.take(message))
        if time.monotonic() >= due:
            offer(merger.interim(), sinks)
            outputs += merger.given_up()
            due = time.monotonic() + publish_every
        began = {key: began.get(key, before) for key in merger.open_runs}
        before = source.position()
        if outputs:
            deliver(outputs, sinks)
        if time.monotonic() >= beat_due:
            offer(merger.heartbeats(), sinks)
            beat_due = time.monotonic() + BEAT
        n_ended = sum(isinstance(output, RunStop) for output in outputs)
        if n_ended or message is None:  # also of what came once more of runs that are done
            needed = _earliest([*began.values(), before])
            if n_ended and position is not None:
                _save(position, needed, merger.ended)
            if needed != acknowledged:
                source.acknowledge(needed)
                acknowledged = needed
        if runs is not None:
            runs -= n_ended
        if stop.is_set() or (runs is not None and runs <= 0):
            return


def saved(position: Path | None) -> tuple[Position, list[Key]]:
    """Return where to go on, and the runs that are done; nothing if the file is not there.

    Raises
    ------
    CheckpointError
        It cannot be read.
    """
    if position is None or not position.exists():
        return {}, []
    try:
        read = _Saved.model_validate_json(position.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{position}: not the position of a merger: {error}") from None
    return read.position, read.ended


class _Saved(BaseModel):
    position: dict[str, int]
    ended: list[Key]


def _save(path: Path, position: Position, ended: list[Key]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(_Saved(position=dict(position), ended=ended).model_dump_json())
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write the position: {error.strerror}") from error


def _earliest(positions: Sequence[Position]) -> Position:
    """Return the earliest place in every part of a source; a part that is missing once begins with what is oldest."""
    parts = set.intersection(*(set(position) for position in positions))
    return {part: min(position[part] for position in positions) for part in parts}
