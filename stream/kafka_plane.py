"""The plane over Kafka: everything stays in topics, whoever comes and goes. A `stream.plane.Plane`.

<beamline>.xpcs.frames      one partition per region
<beamline>.xpcs.partials    the same
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Self

from stream.delivery import Delivery, KafkaState
from stream.errors import SinkError, SourceError
from stream.ingest.kafka import KafkaResults, KafkaSource
from stream.kafka import ANSWER, Cluster, create_topic
from stream.kafka_group import KafkaGroup
from stream.kafka_lag import KafkaLag
from stream.messages import FrameBatch, Output, RunStart
from stream.outbox import QUEUE_KBYTES, QUEUE_RECORDS
from stream.sinks.kafka import KafkaSink
from stream.sinks.pieces import payload_ends

_log = logging.getLogger(__name__)

Properties = Mapping[str, str]
"""Settings of librdkafka, see `stream.kafka.Cluster`."""

LOOK = 0.5
"""Seconds between looks for a topic."""

PARTIALS_BYTES = 2**24
"""Of a record of partial sums: those of a mean image are as large as a region."""

PATIENCE = 300.0
"""How long Kafka may be away where it is waited for (s)."""

FRAMES_BYTES = 1024 * QUEUE_KBYTES * 3 // 4
"""Of frames that Kafka does not have yet, where it is not waited for: the rest is room for starts and ends of runs."""

FRAMES_RECORDS = QUEUE_RECORDS * 3 // 4
"""The same, of records."""


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

    Where Kafka is not waited for, whoever writes is never held up, nor is anything raised before the end: frames for
    which there is no room are counted as lost. Starts and ends of runs still find room then, and nothing that found
    room is given up, however long Kafka is away.

    Parameters
    ----------
    sink
        Where they go; closed with this.
    lag
        Of the workers.
    waits
        Whether Kafka is waited for.
    """

    def __init__(self, sink: KafkaSink, lag: KafkaLag, *, waits: bool) -> None:
        self._sink, self._lag, self._waits = sink, lag, waits
        self._n_starts: Counter[int] = Counter()
        self._waiting: Counter[int] = Counter()
        """Records that Kafka does not have yet, by the number of their run."""
        self._n_bytes = 0
        """Of frames among them."""
        self._lost: Counter[int] = Counter()
        self._lost_before: int | None = None
        """Records that were lost before those that are being lost now; None: none are."""

    def __enter__(self) -> Self:
        self._sink.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sink.__exit__(kind, error, traceback)

    def write(self, output: Output) -> None:
        """Take one message; see `KafkaSink`."""
        if isinstance(output, RunStart):
            self._n_starts[output.region] += 1
        if self._waits:
            self._sink.write(output)
        else:
            self._offer(output, self._n_starts[output.region])

    def flush(self) -> None:
        """Return once Kafka has everything, or at once where it is not waited for."""
        if self._waits:
            self._sink.flush()
        else:
            self._sink.hear()

    def delivery(self) -> Delivery:
        """Return how far the frames are; what Kafka no longer keeps is not known."""
        waiting, lost = dict(self._waiting), None if self._waits else dict(self._lost)
        return Delivery(
            lag=self._lag.lag(),
            lost=lost,
            unsafe_run=min((run for run, n in waiting.items() if n > 0), default=None),
            n_lost=None if lost is None else sum(lost.values()),
            through=KafkaState(
                delivered=self._sink.delivered,
                failed=self._sink.failed,
                waiting=self._sink.waiting,
                waiting_bytes=self._n_bytes,
            ),
        )

    def _offer(self, output: Output, run: int) -> None:
        try:
            for piece in self._sink.pieces(output):
                n_bytes = int(payload_ends(piece)[-1]) if isinstance(piece, FrameBatch) else 0
                if n_bytes and not self._has_room(n_bytes):
                    self._lose(run, f"{self._n_bytes / 1e6:.0f} MB wait for Kafka")
                    continue
                self._sink.offer(piece, partial(self._told, run, n_bytes))
                self._waiting[run] += 1
                self._n_bytes += n_bytes
                if n_bytes:
                    self._go_on()
        except SinkError as error:
            self._lose(run, f"{error}")
        self._sink.hear()

    def _has_room(self, n_bytes: int) -> bool:
        """Tell whether frames are taken; once some were lost, only when half of the others are gone."""
        share = 1.0 if self._lost_before is None else 0.5
        has_bytes = self._n_bytes + n_bytes <= share * FRAMES_BYTES
        return has_bytes and self._waiting.total() < share * FRAMES_RECORDS

    def _told(self, run: int, n_bytes: int, failure: str) -> None:
        self._waiting[run] -= 1
        self._n_bytes -= n_bytes
        if failure:
            self._lose(run, failure)

    def _lose(self, run: int, why: str) -> None:
        if self._lost_before is None:
            self._lost_before = self._lost.total()
            _log.warning("frames are not streamed until Kafka takes them: %s", why)
        self._lost[run] += 1

    def _go_on(self) -> None:
        if self._lost_before is not None:
            _log.warning("frames are streamed again: %d records were not", self._lost.total() - self._lost_before)
            self._lost_before = None


class KafkaPlane:
    """Everything in Kafka, on disk.

    Parameters
    ----------
    where
        ``host:port/beamline``
    properties
        Settings of librdkafka, see `stream.kafka.Cluster`.
    """

    partial_bytes = PARTIALS_BYTES - 2**12  # names, checksums and framing

    def __init__(self, where: str, properties: Properties) -> None:
        self._where = where
        self._bootstrap, self.beamline = where.rsplit("/", 1)
        self._safe = f"{self.beamline}.xpcs.safe"
        self._properties = properties

    def gateway(self, n_regions: int, *, ring_bytes: int, waits: bool, stop: threading.Event) -> KafkaFrames:
        """Make the topics, and return where frames of all regions go; see `stream.plane.Plane`."""
        create_topics(self._where, self._properties, n_regions, retention_bytes=ring_bytes)
        topic = frames_topic(self.beamline)
        patience = PATIENCE if waits else math.inf
        sink = KafkaSink(self._bootstrap, topic, properties=self._properties, timeout=patience, stop=stop)
        cluster = Cluster(self._bootstrap, self._properties, SinkError)
        return KafkaFrames(sink, KafkaLag(cluster, topic, n_regions, group=self._safe), waits=waits)

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
