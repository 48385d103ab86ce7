"""Our wire (`stream.wire`) over Kafka, receiving end."""

import logging
from collections.abc import Callable, Iterator, Mapping
from operator import methodcaller
from typing import Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition
from confluent_kafka import Message as Record

from stream.errors import DecodeError, NotSeekable, SourceError
from stream.ingest.chunks import Unpacking, frames_of, results_of
from stream.kafka import ANSWER, Cluster, address
from stream.messages import Message, Output, Position, Rejected, Result, RunStart, RunStop
from stream.wire import decode

_log = logging.getLogger(__name__)

POLL = 0.05
"""How long one look for a record takes (s)."""

QUEUE_KBYTES = 64 * 1024
"""What librdkafka fetches ahead; a receiver slower than its detector falls behind in Kafka, not in memory."""

FETCH_BYTES = 8 * 2**20
"""What one request fetches, and by how much the queue may be larger."""


class KafkaSource:
    """Frames of one region, sent by a `stream.sinks.kafka.KafkaSink`. A `stream.protocols.Source`.

    Reads one partition, from the oldest record that Kafka still has or from where it is told to. There is no consumer
    group: how far it came is known to who reads. What Kafka has twice is yielded twice.

    A cluster that is away is waited for. Records that Kafka kept no longer are logged, and their frames are lost.

    Parameters
    ----------
    bootstrap, topic, properties
        See `stream.kafka.Cluster`.
    region
        Which partition.
    group
        Under whose name it is told how far we are, for those who watch the lag: nobody joins it.
    timeout
        How long the cluster may take for its first answer (s).

    Raises
    ------
    SourceError
        The topic or the region is unknown, or the cluster does not let us in or does not answer.
    ConfigError
        The properties cannot be meant.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        region: int,
        *,
        properties: Mapping[str, str] | None = None,
        group: str = "xpcs-stream",
        timeout: float = ANSWER,
    ) -> None:
        self._records = _Records(bootstrap, topic, region, properties, group, timeout)
        self._unpack = Unpacking()
        self._position: Position = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._records.close()

    def __iter__(self) -> Iterator[Message | None]:
        """Yield messages as they come, `Rejected` for what is not one, None when nothing came for 0.05 s.

        Raises
        ------
        SourceError
            The topic is gone, or we are not let in any more.
        """
        for message, position in frames_of(self._records, self._unpack):
            self._position = position
            yield message

    def position(self) -> Position:
        """Return ``{"topic:region": offset}`` of the record that comes next; {} before the first.

        A record of `stream.messages.Chunks` of which some are damaged becomes several messages: it is passed with the
        last one.
        """
        return self._position

    def seek(self, position: Position) -> None:
        """Go to a `position` before iterating.

        Raises
        ------
        NotSeekable
            It is of another topic or region.
        """
        self._records.seek(position)
        self._position = position

    def begin(self, start: RunStart) -> None:
        """Tell which run the frames at a position are of."""
        self._unpack.begin(start)

    def acknowledge(self, position: Position) -> None:
        """Tell that nothing before a position will be asked for again. For any thread."""
        self._records.acknowledge(position)


class KafkaResults:
    """Results sent by a `stream.sinks.kafka.KafkaSink`, of all regions and operators; otherwise as `KafkaSource`.

    In order within a region, in none between regions.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        *,
        properties: Mapping[str, str] | None = None,
        group: str = "xpcs-stream",
        timeout: float = ANSWER,
    ) -> None:
        self._records = _Records(bootstrap, topic, None, properties, group, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._records.close()

    def __iter__(self) -> Iterator[RunStart | RunStop | Result | Rejected | None]:
        """Yield messages as they come, `Rejected` for what is not one, None when nothing came for 0.05 s."""
        return results_of(self._records)

    def position(self) -> Position:
        """Return ``{"topic:region": offset}`` of every region of which something was yielded."""
        return self._records.position()

    def seek(self, position: Position) -> None:
        """Go to a `position` before iterating; regions that it does not name begin with their oldest record.

        Raises
        ------
        NotSeekable
            It is of another topic, or of regions that this one does not have.
        """
        self._records.seek(position)

    def acknowledge(self, position: Position) -> None:
        """See `KafkaSource.acknowledge`."""
        self._records.acknowledge(position)


class _Records:
    """Some partitions of a topic, and our wire on them."""

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        region: int | None,
        properties: Mapping[str, str] | None,
        group: str,
        timeout: float,
    ) -> None:
        self._cluster = Cluster(bootstrap, properties, SourceError)
        self._topic = topic
        self._where = address(self._cluster, topic)
        n = self._cluster.n_partitions(topic, timeout)
        if region is not None and not 0 <= region < n:
            raise SourceError(f"{self._where} has {n} partitions: none for region {region}")
        self._regions = list(range(n)) if region is None else [region]
        self._next: dict[int, int] = {}
        self._lost: set[int] = set()
        """Regions of which the next record is no longer there."""
        self._consumer = self._cluster.client(
            Consumer,
            fixed={
                "enable.auto.commit": False,
                "auto.offset.reset": "error",  # never silently
                "queued.max.messages.kbytes": max(1024, QUEUE_KBYTES // len(self._regions)),  # counts per partition
                "queued.min.messages": 1000,
                "fetch.message.max.bytes": max(2**20, FETCH_BYTES // len(self._regions)),
                "fetch.max.bytes": 2 * FETCH_BYTES,
            },
            defaults={
                "group.id": group,
                "fetch.queue.backoff.ms": 10,  # when the queue was full
            },
        )

    def position(self) -> Position:
        return {f"{self._topic}:{region}": offset for region, offset in self._next.items()}

    def seek(self, position: Position) -> None:
        regions = {f"{self._topic}:{region}": region for region in self._regions}
        for place, offset in position.items():
            if place not in regions or offset < 0:
                raise NotSeekable(f"{self._where} cannot go to {place} = {offset}")
        self._next = {regions[place]: offset for place, offset in position.items()}

    def acknowledge(self, position: Position) -> None:
        regions = {f"{self._topic}:{region}": region for region in self._regions}
        reached = [TopicPartition(self._topic, regions[place], offset) for place, offset in position.items()]
        if reached:
            self._consumer.commit(offsets=reached, asynchronous=True)

    def __iter__(self) -> Iterator[tuple[str, Output | Rejected | None]]:
        """Yield messages, and where they stand."""
        self._assign()
        while True:
            record = self._consumer.poll(POLL)
            self._cluster.check()
            if record is None:
                yield "", None
                continue
            where = f"{self._where}: region {record.partition()}, offset {record.offset()}"
            error = record.error()
            if error is not None:
                yield where, self._stumble(error, record.partition() or 0, where)
            else:
                self._cluster.went_well()
                self._count(record.partition() or 0, record.offset() or 0)
                yield where, _read(record, where)

    def _assign(self) -> None:
        offsets = self._next | dict.fromkeys(self._lost, OFFSET_BEGINNING)
        self._consumer.assign(
            [TopicPartition(self._topic, region, offsets.get(region, OFFSET_BEGINNING)) for region in self._regions]
        )

    def _count(self, region: int, offset: int) -> None:
        if region in self._lost:
            self._lost.remove(region)
            _log.warning(
                "%s: region %d goes on at offset %d: %d records are gone",
                self._where,
                region,
                offset,
                max(0, offset - self._next.get(region, offset)),
            )
        self._next[region] = offset + 1

    def _stumble(self, error: KafkaError, region: int, where: str) -> Rejected | None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            _log.warning("%s is no longer there; going on with the oldest record", where)
            self._lost.add(region)
            self._assign()
            return None
        is_damaged = not self._cluster.passes(error, self._where)
        return Rejected(reason=f"{where}: {self._cluster.words(error)}") if is_damaged else None

    def close(self) -> None:
        self._consumer.close()


_headers: Callable[[Record], list[tuple[str, bytes | None]] | None] = methodcaller("headers")
"""Where the name of a header is not UTF-8, confluent-kafka returns a broken list with its exception set: a SystemError.

Called as record.headers() it is not noticed once Python 3.11 and later have specialised the call: a segmentation fault.
"""


def _read(record: Record, where: str) -> Output | Rejected:
    try:
        named = _headers(record) or []
    except SystemError as error:
        return Rejected(reason=f"{where}: {error.__cause__ or error}")
    headers = [value for name, value in named if name == "h" and value is not None]
    if len(headers) != 1:
        return Rejected(reason=f"{where}: a record has one header h, not {len(headers)}")
    try:
        message = decode([b"", headers[0], record.value() or b""])
    except DecodeError as error:
        return Rejected(reason=f"{where}: {error}")
    if message.region != record.partition():
        return Rejected(reason=f"{where}: it is of region {message.region}")
    return message
