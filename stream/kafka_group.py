"""Regions of a Kafka topic shared out among workers by a consumer group.

When a worker vanishes the broker gives its regions to the others, which go on from the region's last checkpoint. The
consumer of the group only takes part in that, it reads nothing: each region reads its own partition, from where its
checkpoint stands.
"""

import logging
import threading
from collections.abc import Mapping, Sequence

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from stream.errors import SourceError
from stream.kafka import Cluster, address
from stream.serving import Serving

_log = logging.getLogger(__name__)

POLL = 0.1
"""Seconds in which a worker notices that a region ended, or that it is told to stop."""

SESSION = 6.0
"""Seconds after which the broker takes a worker for dead: the least that Kafka allows unless told otherwise."""

GROUP: Mapping[str, str | int | bool] = {
    # With the newer one of KIP-848 it is the broker's configuration that says when a worker is dead, after 45 s by
    # default, and until then one that was killed is not let in again under its name.
    "group.protocol": "classic",
    # Regions stay where they are when a worker comes or goes.
    "partition.assignment.strategy": "cooperative-sticky",
    "session.timeout.ms": round(1000 * SESSION),
    "heartbeat.interval.ms": 1000,
    "enable.auto.commit": False,
    "auto.offset.reset": "earliest",
}


class KafkaGroup:
    """A member of a group of workers. A `stream.plane.Group`.

    Parameters
    ----------
    cluster
        Kafka.
    topic
        Frames, a region in each partition.
    group
        Name of the group.
    name
        Makes it a static member: no two alive may have the same name. One that is started again within `SESSION` gets
        its regions back and nobody else notices; one that leaves keeps them from the others for as long. None: the
        others have them at once when it leaves, as is right for nodes that come and go.
    """

    def __init__(self, cluster: Cluster, topic: str, *, group: str, name: str | None = None) -> None:
        self._cluster = cluster
        self._where = address(cluster, topic)
        self._topic = topic
        member = {"group.id": group} | ({"group.instance.id": name} if name else {})
        self._consumer = cluster.client(Consumer, fixed={**GROUP, **member})

    def take_part(self, serving: Serving, stop: threading.Event) -> None:
        """Serve the regions that are ours until `stop` is set.

        Raises
        ------
        SourceError
            Kafka takes no part in it: authentication, another worker of this name.
        XpcsStreamError
            A region could not be correlated.
        """

        def given(consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
            consumer.incremental_assign(list(partitions))
            consumer.pause(list(partitions))
            for partition in partitions:
                serving.begin(partition.partition)

        def taken(consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
            serving.leave([partition.partition for partition in partitions])
            consumer.incremental_unassign(list(partitions))

        self._consumer.subscribe([self._topic], on_assign=given, on_revoke=taken, on_lost=taken)
        try:
            while not stop.is_set():
                self._heed(self._consumer.poll(POLL))
                serving.tend()
            serving.leave(serving.regions)
            serving.tend()
        finally:
            serving.leave(serving.regions)
            self._consumer.close()

    def _heed(self, message: Message | None) -> None:
        self._cluster.check()
        error = message.error() if message is not None else None
        if error is not None and (error.fatal() or error.code() in _HOPELESS):
            raise SourceError(f"{self._where}: {self._cluster.words(error)}")
        if error is not None:
            _log.info("%s: %s", self._where, self._cluster.words(error))


_HOPELESS = (
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError._FATAL,  # how librdkafka tells the last one to who polls; its fatal() is False there
)
