"""Our wire (`stream.wire`) over Kafka, sending end."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from stream.errors import SinkError
from stream.kafka import ANSWER, Cluster, address
from stream.messages import FrameBatch, Output, Result, RunStart
from stream.sinks.pieces import HEADER_BYTES, Pieces, payload_ends
from stream.wire import encode

_log = logging.getLogger(__name__)

QUEUE_KBYTES = 256 * 1024
"""What is held until Kafka has it: then `KafkaSink.write` waits. Memory is bounded by it."""

QUEUE_RECORDS = 100_000
"""As many records at most, since small ones cost more than their bytes."""

RECORD_BYTES = 1_000_000
"""Batches of frames are cut into records of at most this: larger ones make Kafka slow, not fast."""

FRAMING_BYTES = 256
"""What Kafka puts around the key, the header and the payload of a record, and then some."""

POLL = 0.1
"""How often a wait looks whether it was stopped (s)."""

GRACE = 2.0
"""How long Kafka may still take something once the sink is stopped, or closed after an error (s)."""


class KafkaSink:
    """Sends everything to one topic. A `stream.protocols.Sink`.

    Partition = region; the header is the record's header ``h``, the payload its value. The key is the region, of
    results ``run/region/operator/n_frames``. Frames that are more than one record may carry are cut into several.

    Kafka has a record once all replicas that are in sync have it; it has it once, and in the order of writing, whatever
    was sent again on the way. A cluster that is away is waited for.

    Parameters
    ----------
    bootstrap, topic, properties
        See `stream.kafka.Cluster`. The topic is there, with a partition per region.
    max_record_bytes
        What the topic takes; None = it is asked for its ``max.message.bytes``.
    timeout
        How long Kafka may take for anything (s): a record that it has not taken then has failed.
    stop
        Once it is set, nothing is waited for longer than 2 s.

    Attributes
    ----------
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
        properties: Mapping[str, str] | None = None,
        max_record_bytes: int | None = None,
        timeout: float = 300.0,
        stop: threading.Event | None = None,
    ) -> None:
        self.delivered = self.failed = 0
        self._cluster = Cluster(bootstrap, properties, SinkError)
        self._topic = topic
        self._where = address(self._cluster, topic)
        self._timeout = timeout
        self._stop = stop
        self._failure = ""
        within = min(timeout, ANSWER)
        self._n_regions = self._cluster.n_partitions(topic, within)
        self._limit = max_record_bytes or self._cluster.max_record_bytes(topic, within)
        self._pieces = Pieces(min(self._limit, RECORD_BYTES))
        self._producer = self._cluster.client(
            Producer,
            fixed={
                "acks": "all",
                "enable.idempotence": True,
                "compression.type": "none",  # detectors did it, where it is worth it
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

    def write(self, output: Output) -> None:
        """Take one output; wait while there is no room. An interim result for which there is none is not waited for.

        Raises
        ------
        SinkError
            It does not fit our wire, the topic or a record, there was no room for `timeout` or until `stop`, or
            something written before was not delivered.
        """
        self._check()
        if output.region >= self._n_regions:
            raise SinkError(f"{self._where} has {self._n_regions} partitions: none for region {output.region}")
        for piece in self._pieces.cut(output):
            self._send(piece)

    def flush(self) -> None:
        """Return once Kafka has everything.

        Raises
        ------
        SinkError
            Something was not delivered, or not within `timeout` or until `stop`.
        """
        self._flush(self._timeout)

    def _flush(self, timeout: float) -> None:
        self._wait(lambda: self._producer.flush(POLL) == 0, timeout)

    def _send(self, output: Output) -> None:
        what = _name(output)
        try:
            _, header, payload = encode(output)
        except ValueError as error:
            raise SinkError(f"{self._where}: {error}") from error
        key = f"{output.region}"
        if isinstance(output, Result):
            key = f"{output.run}/{output.region}/{output.operator}/{output.n_frames}"
        key_bytes = key.encode()
        n_bytes = len(header) + len(payload) + len(key_bytes) + FRAMING_BYTES
        if n_bytes > self._limit:
            raise SinkError(
                f"{self._where}: {what}: {n_bytes:,} bytes are more than the {self._limit:,} of a record"
                f"{_remedy(output, self._limit)}"
            )
        is_interim = isinstance(output, Result) and not output.final
        produce = partial(
            self._producer.produce,
            self._topic,
            partition=output.region,
            key=key_bytes,
            value=bytes(payload),
            headers=[("h", bytes(header))],
            on_delivery=partial(self._report, what, is_interim),
        )
        if not self._taken(produce):
            if is_interim:
                raise SinkError(f"{self._where}: no room for {what}{self._because()}")
            self._wait(partial(self._taken, produce, POLL), self._timeout)
        self._producer.poll(0)

    def _taken(self, produce: Callable[[], None], within: float = 0.0) -> bool:
        try:
            produce()
        except BufferError:
            self._producer.poll(within)
            return False
        except KafkaException as error:
            raise SinkError(f"{self._where}: {self._cluster.words(error)}") from None
        return True

    def _wait(self, is_done: Callable[[], bool], timeout: float) -> None:
        deadline, why = time.monotonic() + timeout, f"Kafka did not take everything in {timeout:g} s"
        has_stopped = False
        while not is_done():
            self._check()
            now = time.monotonic()
            if self._stop is not None and self._stop.is_set() and not has_stopped:
                has_stopped = True
                if now + GRACE < deadline:
                    deadline, why = now + GRACE, "stopped while Kafka had not taken everything"
            if now >= deadline:
                raise SinkError(f"{self._where}: {why}{self._because()}")
        self._check()

    def _because(self) -> str:
        return f" ({self._cluster.complaint})" if self._cluster.complaint else ""

    def _check(self) -> None:
        self._cluster.check()
        if self._failure:
            raise SinkError(f"{self._where}: {self._failure}")

    def _report(self, what: str, is_interim: bool, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self.delivered += 1
            self._cluster.went_well()
            return
        self.failed += 1
        failure = f"{what} was not delivered: {self._cluster.words(error)}{self._because()}"
        if is_interim:
            _log.warning("%s: %s", self._where, failure)
        else:
            self._failure = self._failure or failure


def _name(output: Output) -> str:
    match output:
        case RunStart(run=run):
            return f"the start of run {run!r}"
        case FrameBatch(run=run, first=first, frames=frames):
            return f"frames {first} to {first + len(frames) - 1} of run {run!r}"
        case Result(run=run, operator=operator, n_frames=n_frames):
            return f"the result of {operator!r} after {n_frames} frames of run {run!r}"
        case _:
            return f"the end of run {output.run!r}"


def _remedy(output: Output, limit: int) -> str:
    if not isinstance(output, FrameBatch):
        return "; raise max.message.bytes of the topic"
    _, rows, _ = output.frames.shape
    n_bytes = int(payload_ends(output)[-1])
    rows_each = rows * (limit - HEADER_BYTES) // n_bytes
    return f"; cut into {-(-rows // rows_each)} regions they would fit" if rows_each else ""
