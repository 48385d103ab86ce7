"""Many processes that are one: gateway, workers and merger, with Kafka between them.

    gateway ──> <beamline>.xpcs.frames ──> workers ──> <beamline>.xpcs.partials ──> merger
                 one partition per region               the same

Made of concrete classes here, as `stream.assembly` makes a run of one process.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from stream import checkpoint
from stream.assembly import Make
from stream.errors import ConfigError, SourceError
from stream.ingest.kafka import KafkaResults, KafkaSource
from stream.kafka import ANSWER, Cluster, create_topic
from stream.ledger import Ledger
from stream.merger import Merger
from stream.merging import merge, saved
from stream.messages import FrameBatch, Rejected, RunStart, RunStop
from stream.pipeline import Pipeline
from stream.protocols import Sink, Source
from stream.regions import Regions
from stream.sinks.kafka import KafkaSink
from stream.worker import Worker

_log = logging.getLogger(__name__)

Properties = Mapping[str, str]
"""Settings of librdkafka, see `stream.kafka.Cluster`."""

LOOK = 0.5
"""Seconds between looks for a topic."""

PARTIALS_BYTES = 2**24
"""Of a record of partial sums: those of a mean image are as large as a region."""


def read_properties(path: Path | None) -> Properties:
    """Read settings of librdkafka, a ``name=value`` a line, as Kafka's own tools do; none if there is no file.

    Raises
    ------
    ConfigError
        The file cannot be read; names the line that is not one.
    """
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from None
    properties: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if name and not name.startswith("#"):
            if not equals:
                raise ConfigError(f"{path}:{number}: not a name=value")
            properties[name] = value
    return properties


def frames_topic(beamline: str) -> str:
    """Return the topic of the frames of a beamline."""
    return f"{beamline}.xpcs.frames"


def partials_topic(beamline: str) -> str:
    """Return the topic of the partial sums."""
    return f"{beamline}.xpcs.partials"


def create_topics(where: str, properties: Properties, regions: int, *, retention_bytes: int) -> None:
    """Make the topics of a beamline, ``host:port/beamline``, unless they are there.

    Parameters
    ----------
    retention_bytes
        Of frames of one region that Kafka keeps.

    Raises
    ------
    ConfigError
        They are there with another number of regions, or cannot be made.
    """
    bootstrap, beamline = where.rsplit("/", 1)
    keep = {"retention.bytes": str(retention_bytes)}
    create_topic(bootstrap, frames_topic(beamline), regions, properties=properties, config=keep)
    large = {"max.message.bytes": str(PARTIALS_BYTES)}
    create_topic(bootstrap, partials_topic(beamline), regions, properties=properties, config=large)


def gateway(source: Source, sink: Sink, regions: Regions, stop: threading.Event) -> Ledger:
    """Send what comes to the regions until the source ends or `stop` is set; return the ledger of the last run.

    Raises
    ------
    SourceError, SinkError
        One of them is gone.
    """
    ledger = Ledger()
    for message in source:
        if isinstance(message, RunStart | FrameBatch | RunStop):
            try:
                parts = list(regions.cut(message))
            except ConfigError as error:
                if isinstance(message, RunStart):
                    raise
                _log.warning("stray: %s of run %s: %s", type(message).__name__, message.run, error)
                continue
            for part in parts:
                sink.write(part)
        match message:
            case RunStart():
                ledger = Ledger()
                _log.info("run %s begins", message.run)
                sink.flush()
            case FrameBatch():
                ledger.admit(message.first, len(message.frames))
            case RunStop():
                ledger.close(max(message.n_frames, ledger.next_frame))
                _log.info("run %s ends: %d frames, %d lost before us", message.run, ledger.sent, ledger.lost)
                sink.flush()
            case Rejected():
                ledger.undecodable += 1
                _log.warning("rejected: %s", message.reason)
        if stop.is_set():
            break
    sink.flush()
    return ledger


def frames_sink(where: str, properties: Properties, stop: threading.Event) -> KafkaSink:
    """Return where a gateway sends frames."""
    bootstrap, beamline = where.rsplit("/", 1)
    return KafkaSink(bootstrap, frames_topic(beamline), properties=properties, stop=stop)


def wait_for_topics(where: str, properties: Properties, stop: threading.Event) -> None:
    """Return once a gateway has made the topics, or `stop` is set.

    Raises
    ------
    SourceError
        Kafka does not answer, or does not let us in.
    """
    bootstrap, beamline = where.rsplit("/", 1)
    cluster = Cluster(bootstrap, properties, SourceError)
    for topic in (frames_topic(beamline), partials_topic(beamline)):
        is_told = False
        while not cluster.knows(topic, ANSWER):
            if not is_told:
                _log.warning("waiting for a gateway to make the topic %s", topic)
                is_told = True
            if stop.wait(LOOK):
                return


def worker(
    where: str,
    properties: Properties,
    make: Make,
    *,
    checkpoints: Path,
    name: str | None,
    publish_every: float,
    checkpoint_every: float,
) -> Worker:
    """Return a worker of a beamline; the checkpoints of its regions lie in a directory that all workers reach."""
    bootstrap, beamline = where.rsplit("/", 1)

    def serve(region: int, stop: threading.Event) -> None:
        with (
            KafkaSource(bootstrap, frames_topic(beamline), region, properties=properties) as source,
            KafkaSink(bootstrap, partials_topic(beamline), properties=properties, stop=stop) as sink,
        ):
            Pipeline(
                source,
                make,
                [sink],
                partials=True,
                publish_every=publish_every,
                checkpoints=checkpoint.Epochs(checkpoints / f"{beamline}.{region:04d}"),
                checkpoint_every=checkpoint_every,
                stop=stop,
            ).run()

    cluster = Cluster(bootstrap, properties, SourceError)
    return Worker(cluster, frames_topic(beamline), group=f"{beamline}.xpcs", serve=serve, name=name)


def merging(
    where: str,
    properties: Properties,
    make: Make,
    sinks: Sequence[Sink],
    *,
    position: Path | None,
    publish_every: float,
    patience: float,
    runs: int | None,
    stop: threading.Event,
) -> None:
    """Merge the partial sums of a beamline, see `stream.merging.merge`."""
    bootstrap, beamline = where.rsplit("/", 1)
    begin, ended = saved(position)
    with KafkaResults(bootstrap, partials_topic(beamline), properties=properties) as source:
        if begin:
            source.seek(begin)
        merge(
            source,
            Merger(make, patience=patience, ended=ended),
            sinks,
            position=position,
            publish_every=publish_every,
            runs=runs,
            stop=stop,
        )
