"""Many processes that are one: gateway, workers and merger, with a plane between them.

    gateway ──> frames, a log per region ──> workers ──> partial sums ──> merger

What is between them differs (`stream.kafka_plane`, `stream.zmq_plane`); what they do and what comes out does not.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from stream import checkpoint
from stream.correlators import Make
from stream.delivery import Delivery
from stream.errors import ConfigError
from stream.ledger import Ledger
from stream.logs import bind
from stream.merger import Merger
from stream.merging import Results, merge, saved
from stream.messages import FrameBatch, Message, Position, Rejected, RunStart, RunStop
from stream.pipeline import Pipeline
from stream.protocols import Sink, Source
from stream.regions import Regions
from stream.serving import Serving

_log = logging.getLogger(__name__)


class Frames(AbstractContextManager["Frames"], Protocol):
    """A `Source` of one region, to which a worker tells what it has safe."""

    def __iter__(self) -> Iterator[Message | None]:
        """Yield messages; see `Source`."""

    def position(self) -> Position:
        """Return where to go on; see `Source`."""

    def seek(self, position: Position) -> None:
        """Go to a position; see `Source`."""

    def begin(self, start: RunStart) -> None:
        """Tell which run the frames at a position are of."""

    def acknowledge(self, position: Position) -> None:
        """Tell that nothing before a position will be asked for again. For any thread."""


class Sent(Sink, Protocol):
    """Where a gateway's frames of all regions go."""

    def delivery(self) -> Delivery:
        """Return how far they are; runs are numbered as they were begun here, from 1. For any thread."""


class Group(Protocol):
    """A member of a group of workers, among whom regions are shared out."""

    def take_part(self, serving: Serving, stop: threading.Event) -> None:
        """Serve the regions that are ours until `stop` is set."""


class Plane(Protocol):
    """What is between the processes of a beamline."""

    beamline: str
    partial_bytes: int
    """Of the partial sums of an operator, at most."""

    def gateway(self, n_regions: int, *, ring_bytes: int, waits: bool, stop: threading.Event) -> Sent:
        """Return where frames of all regions go.

        Parameters
        ----------
        ring_bytes
            Of frames of each region that are kept.
        waits
            Wait where there is no room for frames, as a file can; else some are lost.
        """

    def wait(self, stop: threading.Event) -> None:
        """Return once a gateway was there, or `stop` is set; where that does not matter, at once."""

    def group(self, name: str | None) -> Group:
        """Return a member of the group of workers."""

    def frames(self, region: int) -> Frames:
        """Return the frames of a region."""

    def partials(self, stop: threading.Event) -> Sink:
        """Return where workers publish their partial sums."""

    def results(self) -> Results:
        """Return all partial sums."""

    def n_logs(self) -> int:
        """Return in how many logs partial sums are, each in order: those of region 0, 1, ..., or one for all."""


Watch = Callable[[int, Frames], AbstractContextManager[Frames]]
"""Is given the frames of a region, open; returns those that are to be taken in their place."""


def send(
    source: Source,
    sinks: Sequence[Sink],
    regions: Regions,
    stop: threading.Event,
    is_sent: Callable[[RunStart | FrameBatch | RunStop], bool] = lambda _: True,
) -> Ledger:
    """Send what comes to the regions until the source ends or `stop` is set; return the ledger of the last run.

    Parameters
    ----------
    is_sent
        Is shown what comes, once it is known to be sound, and tells whether it is sent.

    Raises
    ------
    SourceError, SinkError
        One of them is gone.
    """
    ledger = Ledger()
    for message in source:
        if isinstance(message, RunStart):
            bind(run=message.run)
        if isinstance(message, RunStart | FrameBatch | RunStop):
            try:
                parts = list(regions.cut(message))
            except ConfigError as error:
                if isinstance(message, RunStart):
                    raise
                _log.warning("stray: %s of run %s: %s", type(message).__name__, message.run, error)
                continue
            if is_sent(message):
                for sink in sinks:
                    for part in parts:
                        sink.write(part)
        match message:
            case RunStart():
                ledger = Ledger()
                _log.info("run %s begins", message.run)
                _flush(sinks)
            case FrameBatch():
                ledger.admit(message.first, len(message.frames))
            case RunStop():
                ledger.close(max(message.n_frames, ledger.next_frame))
                _log.info("run %s ends: %d frames, %d lost before us", message.run, ledger.sent, ledger.lost)
                _flush(sinks)
                bind(run=None)
            case Rejected():
                ledger.undecodable += 1
                _log.warning("rejected: %s", message.reason)
            case None:
                _flush(sinks)
        if stop.is_set():
            break
    _flush(sinks)
    return ledger


def _flush(sinks: Sequence[Sink]) -> None:
    for sink in sinks:
        sink.flush()


def work(
    plane: Plane,
    make: Make,
    *,
    checkpoints: Path,
    name: str | None,
    publish_every: float,
    checkpoint_every: float,
    stop: threading.Event,
    watch: Watch = lambda _, frames: nullcontext(frames),
) -> None:
    """Correlate the regions that are ours until `stop` is set; their checkpoints lie where all workers reach them.

    Raises
    ------
    XpcsStreamError
        The plane does not let us take part, or a region could not be correlated.
    """

    def serve(region: int, stop: threading.Event) -> None:
        with plane.frames(region) as frames, watch(region, frames) as source, plane.partials(stop) as sink:
            epochs = checkpoint.Epochs(checkpoints / f"{plane.beamline}.{region:04d}")
            Pipeline(
                source,
                make,
                [sink],
                partials=True,
                publish_every=publish_every,
                checkpoints=checkpoint.Acknowledged(epochs, source),
                checkpoint_every=checkpoint_every,
                stop=stop,
            ).run()

    plane.group(name).take_part(Serving(serve), stop)


def merge_partials(
    source: Results,
    make: Make,
    sinks: Sequence[Sink],
    *,
    position: Path | None,
    publish_every: float,
    patience: float,
    repair_within: float,
    went: Callable[[], int],
    runs: int | None,
    stop: threading.Event,
) -> None:
    """Merge the partial sums of a beamline, see `stream.merging.merge`."""
    begin, ended = saved(position)
    if begin:
        source.seek(begin)
    merge(
        source,
        Merger(make, patience=patience, repair_within=repair_within, plane=went, ended=ended),
        sinks,
        position=position,
        publish_every=publish_every,
        runs=runs,
        stop=stop,
    )
