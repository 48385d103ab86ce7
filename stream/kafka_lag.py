"""How far the readers of a topic are behind its writers, in time."""

import logging
import time
from collections import deque
from itertools import islice

from confluent_kafka import OFFSET_END, Consumer, KafkaException, TopicPartition

from stream.errors import SinkError
from stream.kafka import Cluster

_log = logging.getLogger(__name__)

EVERY = 3.0
"""Seconds between looks: Kafka is asked for the ends of all partitions, and for what is committed."""

ANSWER = 1.0
"""How long an answer may take (s)."""

MOST_ENDS = 1000
"""Of a partition that are known; of more every second one is forgotten."""


class KafkaLag:
    """How old the oldest record of a topic is that a group has not committed, since we look.

    Parameters
    ----------
    cluster, topic, n_partitions
        What is asked for.
    group
        Whose offsets say what is done with.
    """

    def __init__(self, cluster: Cluster, topic: str, n_partitions: int, *, group: str) -> None:
        self._topic, self._group, self._cluster = topic, group, cluster
        # Asking as an AdminClient ends the process if the cluster is away (librdkafka 2.16: an assertion).
        self._asking: Consumer | None = None
        self._ends: list[deque[tuple[float, int]]] = [deque() for _ in range(n_partitions)]
        """When which ends were seen, from the newest that is committed on."""
        self._due = 0.0
        self._since: float | None = None
        self._is_known = False

    def lag(self) -> float | None:
        """Return how old it is (s), or 0 if all are committed; None if Kafka does not tell."""
        now = time.monotonic()
        if now >= self._due:
            try:
                self._look(now)
                self._is_known = True
            except (KafkaException, SinkError) as error:
                if self._is_known:
                    _log.warning("how far workers are is not known: %s", self._cluster.words(error))
                self._is_known = False
            self._due = time.monotonic() + EVERY
        if not self._is_known:
            return None
        return 0.0 if self._since is None else time.monotonic() - self._since

    def _look(self, now: float) -> None:
        if self._asking is None:  # it never joins the group
            said = {"group.id": self._group, "enable.auto.commit": False}
            self._asking = self._cluster.client(Consumer, fixed=said)
        newest = [TopicPartition(self._topic, number, OFFSET_END) for number in range(len(self._ends))]
        ends = self._asking.offsets_for_times(newest, timeout=ANSWER)
        committed = self._asking.committed(newest, timeout=ANSWER)
        if failed := [each.error for each in [*ends, *committed] if each.error]:
            raise KafkaException(failed[0])
        offsets = {each.partition: each.offset for each in committed}
        oldest: float | None = None
        for answer in ends:
            end, done = answer.offset, max(0, offsets[answer.partition])
            seen = self._ends[answer.partition]
            if not seen or end != seen[-1][1]:
                seen.append((now, end))
            while seen and seen[0][1] <= done:
                seen.popleft()
            if len(seen) > MOST_ENDS:
                self._ends[answer.partition] = deque(islice(seen, 0, None, 2))
            if seen:
                oldest = seen[0][0] if oldest is None else min(oldest, seen[0][0])
        self._since = oldest
