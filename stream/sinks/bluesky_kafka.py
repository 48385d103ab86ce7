"""Bluesky documents over Kafka, as bluesky_kafka's Publisher sends them."""

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from stream.documents import pack
from stream.errors import SinkError
from stream.outbox import Outbox


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
        self._outbox = Outbox(bootstrap, topic, properties=properties, timeout=timeout, stop=stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for what Kafka does not yet have: `timeout` at most, 2 s after an error."""
        self._outbox.close(error)

    def publish(self, run: str, name: str, document: Mapping[str, Any], *, may_be_lost: bool) -> None:
        """Take a document; see `stream.sinks.bluesky.Publisher`."""
        what = f"{name} of run {run}"
        try:
            value = pack(name, document)
        except ValueError as error:
            raise SinkError(f"{self._outbox.where}: {what}: {error}") from error
        self._outbox.send(what, may_be_lost=may_be_lost, key=run.encode(), value=value)

    def flush(self) -> None:
        """Return once Kafka has everything; see `stream.sinks.bluesky.Publisher`."""
        self._outbox.flush()
