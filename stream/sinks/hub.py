"""Our wire (`stream.wire`) to the hub of a gateway (`stream.hub`): frames within its process, results from workers."""

import logging
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from stream.dealer import Dealer
from stream.dealer import Hub as Address
from stream.delivery import Delivery
from stream.errors import SinkError
from stream.hub import Hub, frames_log
from stream.hub_wire import MAX_BYTES, Had, Put
from stream.messages import FrameBatch, Output, Result, RunStart
from stream.sinks.pieces import Pieces
from stream.wire import Buffer, encode

_log = logging.getLogger(__name__)

POLL = 0.1
"""How often a wait looks whether it was stopped (s)."""

TELL = 10.0
"""How often a long wait says what it waits for (s)."""

RECORD_BYTES = 2**22
"""Batches of frames are cut into records of at most this: readers give room for several."""

QUEUE_BYTES = 2**26
"""What is held until the hub has it: then interim results are dropped, and others waited for."""

GRACE = 2.0
"""How long the hub may still take something once the sink is stopped, or closed after an error (s)."""


class HubFrames:
    """Frames of all regions, to the hub in this process. A `stream.protocols.Sink`.

    Parameters
    ----------
    hub
        Open; closed with the sink, which waits for all that is not yet safe before.
    waits
        Wait for room where a ring is full of what is not yet safe, as a file can; else the oldest is lost.
    stop
        Once it is set, nothing is waited for.
    """

    def __init__(self, hub: Hub, *, waits: bool, stop: threading.Event) -> None:
        self._hub = hub
        self._waits = waits
        self._stop = stop
        self._pieces = Pieces(RECORD_BYTES)
        self._told: dict[int, int] = {}
        """Lost records of each region that were told of."""
        self._n_starts: Counter[int] = Counter()

    def __enter__(self) -> Self:
        self._hub.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait until workers and a merger are done with everything."""
        try:
            if error is None:
                self._wait_until_safe()
        finally:
            self._hub.__exit__(kind, error, traceback)

    def write(self, output: Output) -> None:
        """Put one message into the ring of its region.

        Raises
        ------
        SinkError
            It does not fit our wire, a frame does not fit into the ring, there was no room until `stop`, or the hub
            failed.
        """
        log = frames_log(output.region)
        if isinstance(output, RunStart):
            self._check_fits(output)
            self._n_starts[output.region] += 1
        run = self._n_starts[output.region]
        for piece in self._pieces.cut(output):
            try:
                parts = encode(piece)
            except ValueError as error:
                raise SinkError(f"{self._hub.address}: {error}") from error
            if self._waits:
                self._wait_for_room(log, sum(memoryview(part).nbytes for part in parts))
            self._hub.append(log, parts, must_stay=not isinstance(piece, FrameBatch), run=run)
        lost = self._hub.lost(log)
        if lost > 2 * self._told.get(output.region, 0):
            self._told[output.region] = lost
            _log.warning(
                "region %d: %d records are lost before a worker has them safe: it is slow or away", output.region, lost
            )

    def flush(self) -> None:
        """Return at once: the ring has everything."""

    def delivery(self) -> Delivery:
        """Return how far the frames are on their way; runs are numbered as they are begun here, from 1."""
        return self._hub.delivery()

    def _check_fits(self, start: RunStart) -> None:
        n_bytes = 2 * math.prod(start.shape) * np.dtype(start.dtype).itemsize
        if n_bytes > self._hub.ring_bytes:
            raise SinkError(
                f"{self._hub.address}: two frames of region {start.region} of run {start.run!r} are {n_bytes:,} bytes, "
                f"more than the {self._hub.ring_bytes:,} that are kept of each region"
            )

    def _wait_for_room(self, log: str, n_bytes: int) -> None:
        told_at = time.monotonic()
        while not self._hub.wait_for_room(log, n_bytes, POLL):
            if self._stop.is_set():
                raise SinkError(f"{self._hub.address}: stopped while {log} waited for a worker")
            if time.monotonic() - told_at > TELL:
                told_at = time.monotonic()
                _log.warning("waiting for a worker to take %s", log)

    def _wait_until_safe(self) -> None:
        told_at = time.monotonic()
        while unsafe := self._hub.wait_until_safe(POLL):
            waiting = ", ".join(f"{n} records of {log}" for log, n in unsafe.items())
            if self._stop.is_set():
                raise SinkError(f"{self._hub.address}: stopped while workers or a merger had still to take {waiting}")
            if time.monotonic() - told_at > TELL:
                told_at = time.monotonic()
                _log.warning("waiting for workers or a merger to take %s", waiting)


@dataclass(frozen=True, slots=True)
class _Sent:
    parts: Sequence[Buffer]
    n_bytes: int
    must_stay: bool


class HubSink:
    """Partial sums, to a hub elsewhere. A `stream.protocols.Sink`.

    A hub that is away is waited for. It has everything once and in order, unless it was another one meanwhile.

    Parameters
    ----------
    hub
        Where the gateway is.
    log
        Which one.
    timeout
        How long the hub may take for anything (s).
    stop
        Once it is set, nothing is waited for longer than 2 s.

    Raises
    ------
    SinkError
        The address cannot be used.
    """

    def __init__(self, hub: Address, log: str, *, timeout: float = 300.0, stop: threading.Event | None = None) -> None:
        self._hub = hub
        self._log = log
        self._timeout = timeout
        self._stop = stop
        self._dealer = Dealer(hub, SinkError)
        self._writer = uuid.uuid4().hex
        self._number = 0
        self._sent: dict[int, _Sent] = {}
        """By number, what the hub may not have."""
        self._n_bytes = 0
        self._said_over = 0
        """The connection over which all of these were said."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for what the hub does not have yet: `timeout` at most, 2 s after an error."""
        try:
            self._wait(0, self._timeout if error is None else GRACE)
        except SinkError as failure:
            if error is None:
                raise
            _log.warning("%s", failure)
        finally:
            self._dealer.close()

    def write(self, output: Output) -> None:
        """Take one output; wait while there is no room. An interim result for which there is none is not waited for.

        Raises
        ------
        SinkError
            It does not fit our wire, there was no room for `timeout` or until `stop`, or the gateway refuses us.
        """
        try:
            parts = encode(output)
        except ValueError as error:
            raise SinkError(f"{self._hub}: {error}") from error
        self._hear(0)
        is_interim = isinstance(output, Result) and not output.final
        largest = max(memoryview(part).nbytes for part in parts)
        if largest > MAX_BYTES:
            raise SinkError(f"{self._hub}: {largest:,} bytes of {output.run} are more than the {MAX_BYTES:,} of a part")
        sent = _Sent(parts, sum(memoryview(part).nbytes for part in parts), not is_interim)
        if self._n_bytes + sent.n_bytes > QUEUE_BYTES:
            if is_interim and self._sent:
                raise SinkError(f"{self._hub}: no room")
            self._wait(max(0, QUEUE_BYTES - sent.n_bytes), self._timeout)
        self._sent[self._number] = sent
        self._n_bytes += sent.n_bytes
        if not self._say(self._number):
            self._said_over = -1
        self._number += 1

    def flush(self) -> None:
        """Return once the hub has everything.

        Raises
        ------
        SinkError
            It did not take it within `timeout` or until `stop`.
        """
        self._wait(0, self._timeout)

    def _say(self, number: int) -> bool:
        put = Put(
            beamline=self._hub.beamline,
            log=self._log,
            writer=self._writer,
            number=number,
            oldest=next(iter(self._sent)),
            must_stay=self._sent[number].must_stay,
        )
        return self._dealer.say(put, self._sent[number].parts)

    def _hear(self, within: float) -> None:
        """Take what the hub says; say everything again over a new connection."""
        while isinstance(had := self._dealer.hear(within)[0], Had):
            within = 0
            for number in [number for number in self._sent if number < had.number]:
                self._n_bytes -= self._sent.pop(number).n_bytes
        connection = self._dealer.connections
        if connection != self._said_over and all(self._say(number) for number in self._sent):
            self._said_over = connection

    def _wait(self, n_bytes: int, timeout: float) -> None:
        """Wait until no more than so many bytes are not known to be there."""
        deadline, why = time.monotonic() + timeout, f"the gateway did not take everything in {timeout:g} s"
        has_stopped = False
        while self._n_bytes > n_bytes:
            self._hear(POLL)
            now = time.monotonic()
            if self._stop is not None and self._stop.is_set() and not has_stopped:
                has_stopped = True
                if now + GRACE < deadline:
                    deadline, why = now + GRACE, "stopped while the gateway had not taken everything"
            if now >= deadline:
                raise SinkError(f"{self._hub}: {why}")
