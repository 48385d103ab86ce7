"""Records on their way to a topic of Kafka."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from stream.errors import SinkError
from stream.kafka import ANSWER, Cluster, address

_log = logging.getLogger(__name__)

QUEUE_KBYTES = 256 * 1024
"""What is held until Kafka has it: then `Outbox.send` waits. Memory is bounded by it."""

QUEUE_RECORDS = 100_000
"""As many records at most, since small ones cost more than their bytes."""

POLL = 0.1
"""How often a wait looks whether it was stopped (s)."""

GRACE = 2.0
"""How long Kafka may still take something once we are stopped, or closed after an error (s)."""

Report = Callable[[str], None]
"""Told what became of a record: why Kafka will never have it, or "" if Kafka has it."""


class Outbox:
    """Sends records to one topic; bounded in memory and in time.

    Kafka has a record once all replicas that are in sync have it; it has it once, and in the order of sending, whatever
    was sent again on the way. A cluster that is away is waited for.

    Parameters
    ----------
    bootstrap, topic, properties
        See `stream.kafka.Cluster`. The topic is there.
    max_record_bytes
        What the topic takes; None = it is asked for its ``max.message.bytes``.
    timeout
        How long Kafka may take for anything (s): a record that it has not taken then has failed. Infinite: none fails
        because of time.
    stop
        Once it is set, nothing is waited for longer than 2 s.
    fixed
        More settings of librdkafka that the properties may not change.

    Attributes
    ----------
    where
        How the topic is called in errors.
    n_partitions, max_record_bytes
        Of the topic.
    delivered, failed
        How many records Kafka has, and how many it will never have.

    Raises
    ------
    SinkError
        The topic is unknown, or the cluster does not let us in or does not answer within 30 s.
    ConfigError
        The properties cannot be meant.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        *,
        properties: Mapping[str, str] | None,
        max_record_bytes: int | None = None,
        timeout: float,
        stop: threading.Event | None,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        self.delivered = self.failed = self._n_taken = 0
        self._cluster = Cluster(bootstrap, properties, SinkError)
        self._topic = topic
        self.where = address(self._cluster, topic)
        self._timeout = timeout
        self._stop = stop
        self._stopped = math.inf
        """When that was noticed."""
        self._failure = ""
        within = min(timeout, ANSWER)
        self.n_partitions = self._cluster.n_partitions(topic, within)
        self.max_record_bytes = max_record_bytes or self._cluster.max_record_bytes(topic, within)
        self._producer = self._cluster.client(
            Producer,
            fixed={
                "acks": "all",
                "enable.idempotence": True,
                "message.max.bytes": self.max_record_bytes,
                "delivery.timeout.ms": round(1000 * timeout) if math.isfinite(timeout) else 0,
                "queue.buffering.max.kbytes": max(QUEUE_KBYTES, self.max_record_bytes // 1024 + 1),
                "queue.buffering.max.messages": QUEUE_RECORDS,
                **(fixed or {}),
            },
            defaults={"linger.ms": 5},
        )

    @property
    def waiting(self) -> int:
        """Records that Kafka does not have yet."""
        return self._n_taken - self.delivered - self.failed

    def close(self, error: BaseException | None) -> None:
        """Wait for what Kafka does not yet have: `timeout` at most, 2 s after an error. That one is not replaced."""
        try:
            self._flush(self._timeout if error is None else GRACE)
        except SinkError as failure:
            if error is None:
                raise
            _log.warning("%s", failure)
        finally:
            self._producer.purge()  # else closing would wait for ever
            self._producer.close()

    def send(self, what: str, *, may_be_lost: bool, report: Report | None = None, **record: Any) -> None:
        """Take a record. While there is no room one is waited for, unless it may be lost.

        Parameters
        ----------
        what
            How it is called in errors.
        report
            Of what may be lost: told what became of it, if it was taken, instead of a log.
        record
            What `confluent_kafka.Producer.produce` takes.

        Raises
        ------
        SinkError
            Kafka cannot take it, there was no room for `timeout` or until `stop`, or something that was not to be lost
            was not delivered.
        """
        self.check()
        record["on_delivery"] = partial(self._report, what, may_be_lost, report)
        if not self._taken(what, record):
            if may_be_lost:
                raise SinkError(f"{self.where}: no room for {what}{self._because()}")
            self._wait(lambda: self._taken(what, record, POLL), self._timeout)
        self._producer.poll(0)

    def flush(self) -> None:
        """Return once Kafka has everything.

        Raises
        ------
        SinkError
            Something was not delivered, or not within `timeout` or until `stop`.
        """
        self._flush(self._timeout)

    def hear(self) -> None:
        """Take what Kafka has said by now; wait for nothing."""
        self._producer.poll(0)

    def check(self) -> None:
        """Raise SinkError if we are not let in, or something that was not to be lost was not delivered."""
        self._cluster.check()
        if self._failure:
            raise SinkError(f"{self.where}: {self._failure}")

    def _flush(self, timeout: float) -> None:
        self._wait(lambda: self._producer.flush(POLL) == 0, timeout)

    def _taken(self, what: str, record: Mapping[str, Any], within: float = 0.0) -> bool:
        try:
            self._producer.produce(self._topic, **record)
        except BufferError:
            self._producer.poll(within)
            return False
        except KafkaException as error:
            is_large = error.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE
            size = f"; {len(record['value']):,} bytes of at most {self.max_record_bytes:,}" if is_large else ""
            raise SinkError(f"{self.where}: {what}: {self._cluster.words(error)}{size}") from None
        self._n_taken += 1
        return True

    def _wait(self, is_done: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not is_done():
            self.check()
            now = time.monotonic()
            if self._stop is not None and self._stop.is_set():
                self._stopped = min(self._stopped, now)
            if now >= min(deadline, self._stopped + GRACE):
                why = f"Kafka did not take everything in {timeout:g} s"
                if now < deadline:
                    why = "stopped while Kafka had not taken everything"
                raise SinkError(f"{self.where}: {why}{self._because()}")
        self.check()

    def _because(self) -> str:
        return f" ({self._cluster.complaint})" if self._cluster.complaint else ""

    def _report(
        self, what: str, may_be_lost: bool, report: Report | None, error: KafkaError | None, _: Message
    ) -> None:
        failure = ""
        if error is None:
            self.delivered += 1
            self._cluster.went_well()
        else:
            self.failed += 1
            failure = f"{what} was not delivered: {self._cluster.words(error)}{self._because()}"
        if report is not None:
            report(failure)
        elif not failure:
            return
        elif may_be_lost:
            _log.warning("%s: %s", self.where, failure)
        else:
            self._failure = self._failure or failure
