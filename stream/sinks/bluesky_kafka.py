"""Bluesky documents over Kafka, as bluesky_kafka's Publisher sends them."""

import logging
import math
import threading
import time
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from stream.documents import pack
from stream.errors import SinkError
from stream.kafka import ANSWER, Cluster, address

_log = logging.getLogger(__name__)

QUEUE_RECORDS = 10_000
"""Documents held until Kafka has them; so many small ones, or `QUEUE_KBYTES` of large ones."""

QUEUE_KBYTES = 64 * 1024

POLL = 0.1
"""How often a wait looks whether it was stopped (s)."""

GRACE = 2.0
"""How long Kafka may still take something once we are stopped, or closed after an error (s)."""


class KafkaDocuments:
    """To a topic of Kafka, for bluesky_kafka's consumers. A `stream.sinks.bluesky.Publisher`.

    The value is MessagePack of name and document, the key the uid of the run: so documents of a run stay in order.

    Parameters
    ----------
    bootstrap, topic, properties
        See `stream.kafka.Cluster`. The topic is there; ``<beamline>.xpcs.live.documents`` by convention.
    timeout
        How long Kafka may take for a document (s). One that may be lost is given up then, of others it is an error.
    stop
        Once it is set, nothing is waited for longer than 2 s.

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
        properties: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        stop: threading.Event | None = None,
    ) -> None:
        self._cluster = Cluster(bootstrap, properties, SinkError)
        self._topic = topic
        self._where = address(self._cluster, topic)
        self._timeout = timeout
        self._stop = stop
        self._stopped = math.inf
        self._failure = ""
        within = min(timeout, ANSWER)
        self._cluster.n_partitions(topic, within)
        self._limit = self._cluster.max_record_bytes(topic, within)
        self._producer = self._cluster.client(
            Producer,
            fixed={
                "acks": "all",
                "enable.idempotence": True,
                "message.max.bytes": self._limit,
                "delivery.timeout.ms": round(1000 * timeout),
                "queue.buffering.max.kbytes": max(QUEUE_KBYTES, self._limit // 1024 + 1),
                "queue.buffering.max.messages": QUEUE_RECORDS,
            },
            defaults={"linger.ms": 5},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for what Kafka does not yet have: `timeout` at most, 2 s after an error."""
        try:
            self._flush(self._timeout if error is None else GRACE)
        except SinkError as failure:
            if error is None:
                raise
            _log.warning("%s", failure)
        finally:
            self._producer.purge()  # else closing would wait for ever
            self._producer.close()

    def publish(self, run: str, name: str, document: Mapping[str, Any], *, may_be_lost: bool) -> None:
        """Take a document; see `stream.sinks.bluesky.Publisher`."""
        self._check()
        what = f"{name} of run {run}"
        try:
            value = pack(name, document)
        except ValueError as error:
            raise SinkError(f"{self._where}: {what}: {error}") from error
        report = partial(self._report, what, may_be_lost)
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                self._producer.produce(self._topic, key=run.encode(), value=value, on_delivery=report)
            except BufferError:
                self._check()
                if may_be_lost or self._is_over(deadline):
                    raise SinkError(f"{self._where}: no room for {what}{self._because()}") from None
                self._producer.poll(POLL)
            except KafkaException as error:
                words = f"{what}: {self._cluster.words(error)}; {len(value):,} bytes of at most {self._limit:,}"
                raise SinkError(f"{self._where}: {words}") from None
            else:
                self._producer.poll(0)
                return

    def flush(self) -> None:
        """Return once Kafka has everything; see `stream.sinks.bluesky.Publisher`."""
        self._flush(self._timeout)

    def _flush(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._producer.flush(POLL):
            self._check()
            if self._is_over(deadline):
                raise SinkError(f"{self._where}: Kafka did not take everything{self._because()}")
        self._check()

    def _is_over(self, deadline: float) -> bool:
        now = time.monotonic()
        if self._stop is not None and self._stop.is_set():
            self._stopped = min(self._stopped, now)
        return now >= min(deadline, self._stopped + GRACE)

    def _because(self) -> str:
        return f" ({self._cluster.complaint})" if self._cluster.complaint else ""

    def _check(self) -> None:
        self._cluster.check()
        if self._failure:
            raise SinkError(f"{self._where}: {self._failure}")

    def _report(self, what: str, may_be_lost: bool, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self._cluster.went_well()
            return
        failure = f"{what} was not delivered: {self._cluster.words(error)}{self._because()}"
        if may_be_lost:
            _log.warning("%s: %s", self._where, failure)
        else:
            self._failure = self._failure or failure
