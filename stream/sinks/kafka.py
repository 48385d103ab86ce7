"""Our wire (`stream.wire`) over Kafka, sending end."""

import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from stream.errors import SinkError
from stream.messages import FrameBatch, Output, Result, RunStart
from stream.outbox import Outbox, Report
from stream.sinks.pieces import HEADER_BYTES, Pieces, payload_ends
from stream.wire import encode

RECORD_BYTES = 1_000_000
"""Batches of frames are cut into records of at most this: larger ones make Kafka slow, not fast."""

FRAMING_BYTES = 256
"""What Kafka puts around the key, the header and the payload of a record, and then some."""


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
        How long Kafka may take for anything (s): a record that it has not taken then has failed. Infinite: none fails
        because of time.
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
        max_record_bytes: int | None = None,
        timeout: float = 300.0,
        stop: threading.Event | None = None,
    ) -> None:
        self._outbox = Outbox(
            bootstrap,
            topic,
            properties=properties,
            max_record_bytes=max_record_bytes,
            timeout=timeout,
            stop=stop,
            fixed={"compression.type": "none"},  # detectors did it, where it is worth it
        )
        self._pieces = Pieces(min(self._outbox.max_record_bytes, RECORD_BYTES))

    @property
    def delivered(self) -> int:
        """Records that Kafka has."""
        return self._outbox.delivered

    @property
    def failed(self) -> int:
        """Records that Kafka will never have."""
        return self._outbox.failed

    @property
    def waiting(self) -> int:
        """Records that Kafka does not have yet."""
        return self._outbox.waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for what Kafka does not yet have: `timeout` at most, 2 s after an error."""
        self._outbox.close(error)

    def write(self, output: Output) -> None:
        """Take one output; wait while there is no room. An interim result for which there is none is not waited for.

        Raises
        ------
        SinkError
            It does not fit our wire, the topic or a record, there was no room for `timeout` or until `stop`, or
            something written before was not delivered.
        """
        for piece in self.pieces(output):
            self._send(piece, may_be_lost=isinstance(piece, Result) and not piece.final)

    def pieces(self, output: Output) -> Iterator[Output]:
        """Yield what one output becomes, a record each.

        Raises
        ------
        SinkError
            The topic has no place for it, or something written before was not delivered.
        """
        self._outbox.check()
        n_regions = self._outbox.n_partitions
        if output.region >= n_regions:
            raise SinkError(f"{self._outbox.where} has {n_regions} partitions: none for region {output.region}")
        yield from self._pieces.cut(output)

    def offer(self, piece: Output, report: Report) -> None:
        """Take what becomes one record, if there is room now; tell later, while something is taken or heard, its fate.

        Raises
        ------
        SinkError
            There is no room, or it does not fit our wire or a record. Its fate is not told then.
        """
        self._send(piece, may_be_lost=True, report=report)

    def hear(self) -> None:
        """Take what Kafka has said by now; wait for nothing."""
        self._outbox.hear()

    def flush(self) -> None:
        """Return once Kafka has everything.

        Raises
        ------
        SinkError
            Something was not delivered, or not within `timeout` or until `stop`.
        """
        self._outbox.flush()

    def _send(self, output: Output, *, may_be_lost: bool, report: Report | None = None) -> None:
        what, where, limit = _name(output), self._outbox.where, self._outbox.max_record_bytes
        try:
            _, header, payload = encode(output)
        except ValueError as error:
            raise SinkError(f"{where}: {error}") from error
        key = f"{output.region}"
        if isinstance(output, Result):
            key = f"{output.run}/{output.region}/{output.operator}/{output.n_frames}"
        key_bytes = key.encode()
        n_bytes = len(header) + len(payload) + len(key_bytes) + FRAMING_BYTES
        if n_bytes > limit:
            raise SinkError(
                f"{where}: {what}: {n_bytes:,} bytes are more than the {limit:,} of a record{_remedy(output, limit)}"
            )
        self._outbox.send(
            what,
            may_be_lost=may_be_lost,
            report=report,
            partition=output.region,
            key=key_bytes,
            value=bytes(payload),
            headers=[("h", bytes(header))],
        )


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
