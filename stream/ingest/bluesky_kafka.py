"""Bluesky documents over Kafka, as bluesky_kafka's Publisher sends them."""

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from stream.documents import MAX_BYTES, unpack
from stream.errors import DecodeError, NotSeekable, SourceError
from stream.kafka import ANSWER, Cluster, address
from stream.messages import Position, Rejected

_log = logging.getLogger(__name__)

POLL = 0.05
"""How long one look for a record takes (s)."""

QUEUE_KBYTES = 64 * 1024
"""What librdkafka fetches ahead, of all partitions; who is slower falls behind in Kafka, not in memory."""

_NO_LEADER = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)


class KafkaDocuments:
    """From a topic of Kafka: `stream.ingest.bluesky_messages.Documents`.

    In order within a run if it was sent with one key, as NSLS-II does; in none between partitions. There is no consumer
    group: how far it came is known to who reads. A cluster that is away is waited for, and logged.

    Parameters
    ----------
    bootstrap, topic, properties
        See `stream.kafka.Cluster`. By convention ``<beamline>.bluesky.runengine.documents``.
    begin
        "end": with what is sent once this is made; "beginning": with the oldest that Kafka has. A `seek` wins.
    group
        A name for those who watch the cluster: nobody joins it.
    wait
        How long to wait for a document before None is yielded (s).
    timeout
        How long the cluster may take for its first answer (s).

    Raises
    ------
    SourceError
        The topic is unknown, or the cluster does not let us in or does not answer.
    ConfigError
        The properties cannot be meant.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        *,
        properties: Mapping[str, str] | None = None,
        begin: Literal["beginning", "end"] = "end",
        group: str = "xpcs-stream",
        wait: float = POLL,
        timeout: float = ANSWER,
    ) -> None:
        self._cluster = Cluster(bootstrap, properties, SourceError)
        self._topic, self._wait = topic, wait
        self._where = address(self._cluster, topic)
        n = self._cluster.n_partitions(topic, timeout)
        self._consumer = self._cluster.client(
            Consumer,
            fixed={
                "enable.auto.commit": False,
                "auto.offset.reset": "error",  # never silently
                "queued.max.messages.kbytes": max(1024, QUEUE_KBYTES // n),  # counts per partition
                "fetch.message.max.bytes": 2**20,
                "receive.message.max.bytes": 4 * MAX_BYTES,
                "fetch.max.bytes": 2 * MAX_BYTES,
            },
            defaults={"group.id": group},
        )
        try:
            # Known now: what is sent before the first look is not missed, and a position tells of all partitions.
            limits = {each: self._limits(each, timeout) for each in range(n)}
        except SourceError:
            self._consumer.close()
            raise
        self._next = {each: limit[0 if begin == "beginning" else 1] for each, limit in limits.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._consumer.close()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]] | Rejected | None]:
        """Yield name and document as they come, `Rejected` for what is none, None when nothing came for `wait`.

        Raises
        ------
        SourceError
            The topic is gone, or we are not let in any more.
        """
        self._assign()
        while True:
            record = self._consumer.poll(self._wait)
            self._cluster.check()
            if record is None:
                yield None
                continue
            partition, offset = record.partition() or 0, record.offset() or 0
            if (error := record.error()) is not None:
                yield self._stumble(error, partition, f"{self._where}: partition {partition}, offset {offset}")
                continue
            self._cluster.went_well()
            self._next[partition] = offset + 1
            try:
                yield unpack(record.value() or b"")
            except DecodeError as undecodable:
                yield Rejected(reason=f"{self._where}: partition {partition}, offset {offset}: {undecodable}")

    def position(self) -> Position:
        """Return ``{"topic:partition": offset}`` of what comes next."""
        return {f"{self._topic}:{partition}": max(0, offset) for partition, offset in self._next.items()}

    def seek(self, position: Position) -> None:
        """Go to a `position` before iterating.

        Raises
        ------
        NotSeekable
            It is of another topic, or of partitions that this one does not have.
        """
        partitions = {f"{self._topic}:{partition}": partition for partition in self._next}
        for place, offset in position.items():
            if place not in partitions or offset < 0:
                raise NotSeekable(f"{self._where} cannot go to {place} = {offset}")
            self._next[partitions[place]] = offset

    def _limits(self, partition: int, timeout: float) -> tuple[int, int]:
        """Return the offsets of the oldest document and of the next one."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                limits = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), timeout=left)
            except KafkaException as error:
                # A topic that was just made has no leader for a moment.
                if not (error.args[0].code() in _NO_LEADER and left):
                    raise SourceError(f"{self._where}: {self._cluster.words(error)}") from None
                self._consumer.poll(POLL)
                continue
            if limits is None:
                raise SourceError(f"{self._where}: partition {partition} did not answer within {timeout:g} s")
            return limits

    def _assign(self) -> None:
        self._consumer.assign(
            [TopicPartition(self._topic, partition, next_) for partition, next_ in self._next.items()]
        )

    def _stumble(self, error: KafkaError, partition: int, where: str) -> Rejected | None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            _log.warning("%s is no longer there; going on with the oldest document", where)
            self._next[partition] = OFFSET_BEGINNING
            self._assign()
            return None
        is_damaged = not self._cluster.passes(error, self._where)
        return Rejected(reason=f"{where}: {self._cluster.words(error)}") if is_damaged else None
