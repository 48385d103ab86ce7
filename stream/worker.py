"""Regions of a Kafka topic shared out among workers, each region a pipeline of its own.

A consumer group says who has which region: when a worker vanishes the broker gives its regions to the others, which go
on from the region's last checkpoint. The consumer of the group only takes part in that, it reads nothing: each region
reads its own partition, from where its checkpoint stands.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from stream.errors import SinkError, SourceError, Superseded
from stream.kafka import Cluster, address

_log = logging.getLogger(__name__)

POLL = 0.1
"""Seconds in which a worker notices that a region ended, or that it is told to stop."""

SESSION = 6.0
"""Seconds after which the broker takes a worker for dead: the least that Kafka allows unless told otherwise."""

GROUP: Mapping[str, str | int | bool] = {
    # Regions stay where they are when a worker comes or goes; with the newer protocol of KIP-848 it is the broker's
    # configuration that says when a worker is dead, after 45 s by default.
    "partition.assignment.strategy": "cooperative-sticky",
    "session.timeout.ms": round(1000 * SESSION),
    "heartbeat.interval.ms": 1000,
    "enable.auto.commit": False,
    "auto.offset.reset": "earliest",
    "topic.metadata.refresh.interval.ms": 10_000,
}


AGAIN = 1.0
"""Seconds after which a region that ended is begun once more if it is still given to us."""

STEADY = 10.0
"""Seconds after which a region that loses its connections for good is begun once more, with new ones."""


@dataclass(slots=True)
class _Serving:
    thread: threading.Thread
    stop: threading.Event
    again: float | None = None
    """When to begin once more; monotonic."""


class Worker:
    """One member of a group of workers.

    Parameters
    ----------
    cluster
        Kafka.
    topic
        Frames, a region in each partition.
    group
        Name of the group.
    serve
        Correlates a region until its `stop` is set, and leaves it then so that another can go on. After `Superseded`,
        and after a SourceError or SinkError that comes late, it is begun again while the region is ours; any other
        error ends the worker.
    name
        Makes it a static member: no two alive may have the same name. One that is started again within `SESSION` gets
        its regions back and nobody else notices; one that leaves keeps them from the others for as long. None: the
        others have them at once when it leaves, as is right for nodes that come and go.
    """

    def __init__(
        self,
        cluster: Cluster,
        topic: str,
        *,
        group: str,
        serve: Callable[[int, threading.Event], None],
        name: str | None = None,
    ) -> None:
        self._cluster = cluster
        self._where = address(cluster, topic)
        self._topic = topic
        self._serve = serve
        self._serving: dict[int, _Serving] = {}
        self._failed: BaseException | None = None
        member = {"group.id": group} | ({"group.instance.id": name} if name else {})
        self._group = cluster.client(Consumer, fixed={**GROUP, **member})

    def run(self, stop: threading.Event) -> None:
        """Serve regions until `stop` is set.

        Raises
        ------
        SourceError
            Kafka takes no part in it: authentication, another worker of this name.
        XpcsStreamError
            A region could not be correlated.
        """
        self._group.subscribe([self._topic], on_assign=self._given, on_revoke=self._taken, on_lost=self._taken)
        try:
            while not stop.is_set() and self._failed is None:
                self._heed(self._group.poll(POLL))
                self._begin_again()
        finally:
            self._leave(list(self._serving))
            self._group.close()
        if self._failed is not None:
            raise self._failed

    def _heed(self, message: Message | None) -> None:
        self._cluster.check()
        error = message.error() if message is not None else None
        if error is not None and (error.fatal() or error.code() in _HOPELESS):
            raise SourceError(f"{self._where}: {self._cluster.words(error)}")
        if error is not None:
            _log.info("%s: %s", self._where, self._cluster.words(error))

    def _given(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        consumer.incremental_assign(list(partitions))
        consumer.pause(list(partitions))
        for partition in partitions:
            self._begin(partition.partition)

    def _taken(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._leave([partition.partition for partition in partitions])
        consumer.incremental_unassign(list(partitions))

    def _begin(self, region: int) -> None:
        stop = threading.Event()
        thread = threading.Thread(target=self._work, args=(region, stop), name=f"region {region}")
        self._serving[region] = _Serving(thread, stop)
        _log.info("region %d begins here", region)
        thread.start()

    def _begin_again(self) -> None:
        """Go on with regions that ended: a worker that was paused may have taken them when it woke, without a right."""
        for region, serving in list(self._serving.items()):
            if serving.thread.is_alive() or self._failed is not None:
                continue
            now = time.monotonic()
            if serving.again is None:
                serving.again = now + AGAIN
            elif now > serving.again:
                self._begin(region)

    def _leave(self, regions: Sequence[int]) -> None:
        """Return once others may go on with regions."""
        left = [self._serving.pop(region) for region in regions if region in self._serving]
        for serving in left:
            serving.stop.set()
        for serving in left:
            serving.thread.join()

    def _work(self, region: int, stop: threading.Event) -> None:
        begin = time.monotonic()
        try:
            self._serve(region, stop)
        except Superseded as error:
            _log.warning("region %d ends here: %s", region, error)
        except (SourceError, SinkError) as error:
            if time.monotonic() - begin < STEADY and not stop.is_set():
                self._failed = error
            else:
                _log.warning("region %d ends here: %s", region, error)
        except BaseException as error:  # noqa: BLE001 - of a thread: raised again by `run`
            self._failed = error


_HOPELESS = (
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.FENCED_INSTANCE_ID,
)
