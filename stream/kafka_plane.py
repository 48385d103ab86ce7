"""The plane over Kafka: everything stays in topics, whoever comes and goes. A `stream.plane.Plane`.

<beamline>.xpcs.frames      one partition per region
<beamline>.xpcs.partials    the same
"""

import logging
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from stream.delivery import Delivery
from stream.errors import SinkError, SourceError
from stream.ingest.kafka import KafkaResults, KafkaSource
from stream.kafka import ANSWER, Cluster, create_topic
from stream.kafka_group import KafkaGroup
from stream.kafka_lag import KafkaLag
from stream.messages import Output
from stream.sinks.kafka import KafkaSink

_log = logging.getLogger(__name__)

Properties = Mapping[str, str]
"""Settings of librdkafka, see `stream.kafka.Cluster`."""

LOOK = 0.5
"""Seconds between looks for a topic."""

PARTIALS_BYTES = 2**24
"""Of a record of partial sums: those of a mean image are as large as a region."""


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


class KafkaFrames:
    """Frames of all regions, to Kafka. A `stream.plane.Sent`.

    Parameters
    ----------
    sink
        Where they go; closed with this.
    lag
        Of the workers.
    """

    def __init__(self, sink: KafkaSink, lag: KafkaLag) -> None:
        self._sink, self._lag = sink, lag

    def __enter__(self) -> Self:
        self._sink.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sink.__exit__(kind, error, traceback)

    def write(self, output: Output) -> None:
        """Take one message; see `KafkaSink`."""
        self._sink.write(output)

    def flush(self) -> None:
        """Return once Kafka has everything."""
        self._sink.flush()

    def delivery(self) -> Delivery:
        """Return how far the frames are; what Kafka no longer keeps is not known."""
        return Delivery(lag=self._lag.lag(), lost=None)


class KafkaPlane:
    """Everything in Kafka, on disk.

    Parameters
    ----------
    where
        ``host:port/beamline``
    properties
        Settings of librdkafka, see `stream.kafka.Cluster`.
    """

    def __init__(self, where: str, properties: Properties) -> None:
        self._where = where
        self._bootstrap, self.beamline = where.rsplit("/", 1)
        self._safe = f"{self.beamline}.xpcs.safe"
        self._properties = properties

    def gateway(self, n_regions: int, *, ring_bytes: int, waits: bool, stop: threading.Event) -> KafkaFrames:  # noqa: ARG002 - Kafka is waited for always
        """Make the topics, and return where frames of all regions go; see `stream.plane.Plane`."""
        create_topics(self._where, self._properties, n_regions, retention_bytes=ring_bytes)
        topic = frames_topic(self.beamline)
        sink = KafkaSink(self._bootstrap, topic, properties=self._properties, stop=stop)
        cluster = Cluster(self._bootstrap, self._properties, SinkError)
        return KafkaFrames(sink, KafkaLag(cluster, topic, n_regions, group=self._safe))

    def wait(self, stop: threading.Event) -> None:
        """Return once a gateway has made the topics, or `stop` is set.

        Raises
        ------
        SourceError
            Kafka does not answer, or does not let us in.
        """
        cluster = Cluster(self._bootstrap, self._properties, SourceError)
        for topic in (frames_topic(self.beamline), partials_topic(self.beamline)):
            is_told = False
            while not cluster.knows(topic, ANSWER):
                if not is_told:
                    _log.warning("waiting for a gateway to make the topic %s", topic)
                    is_told = True
                if stop.wait(LOOK):
                    return

    def group(self, name: str | None) -> KafkaGroup:
        """Return a member of the group of workers."""
        cluster = Cluster(self._bootstrap, self._properties, SourceError)
        return KafkaGroup(cluster, frames_topic(self.beamline), group=f"{self.beamline}.xpcs", name=name)

    def frames(self, region: int) -> KafkaSource:
        """Return the frames of a region. Those who watch its lag find it as the group ``<beamline>.xpcs.safe``."""
        return KafkaSource(
            self._bootstrap, frames_topic(self.beamline), region, properties=self._properties, group=self._safe
        )

    def partials(self, stop: threading.Event) -> KafkaSink:
        """Return where workers publish their partial sums."""
        return KafkaSink(self._bootstrap, partials_topic(self.beamline), properties=self._properties, stop=stop)

    def results(self) -> KafkaResults:
        """Return all partial sums."""
        group = f"{self.beamline}.xpcs.merged"
        return KafkaResults(self._bootstrap, partials_topic(self.beamline), properties=self._properties, group=group)

    def n_logs(self) -> int:
        """Return how many regions there are.

        Raises
        ------
        SourceError
            Kafka does not answer, or does not know the topic.
        """
        cluster = Cluster(self._bootstrap, self._properties, SourceError)
        return cluster.n_partitions(partials_topic(self.beamline), ANSWER)
