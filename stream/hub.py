"""What a gateway is to its workers and mergers over ZeroMQ, and Kafka otherwise is: logs, and who reads which.

Workers and mergers come here, since compute nodes cannot be gone to. The hub keeps what they write and read in rings of
memory (`stream.ring`): frames of every region until the checkpoint of a worker has them, partial sums until a merger is
done with them. It is one thread with one ROUTER; a reader gets what its own window has room for, so that one that is
stalled slows nobody else.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import zmq

from stream.curve import GatewayKeys
from stream.delivery import Delivery, HubState, LogState
from stream.errors import DecodeError, SinkError
from stream.hub_wire import MAX_BYTES, OVERHEAD, Had, Here, Put, Read, Record, Refused, Said, pack, unpack
from stream.ring import Ring
from stream.sharing import SESSION, Group
from stream.wire import Buffer

_log = logging.getLogger(__name__)

PARTIALS = "partials"
"""The log of partial sums."""

PARTIALS_BYTES = 2**26
"""Room for them at least: of a few runs, the final ones."""

TICK = 0.1
"""Seconds in which a silent worker is noticed."""

SILENT = 10.0
"""Seconds after which it is tried whether a reader that says nothing is still there."""

MOST_READERS = 8192
MOST_WRITERS = 4096

MOST_QUEUED = 10_000
"""Messages for one who does not take them, or of one that we do not come to take: more than a usual window holds."""

READ_AT_ONCE = 2**13
"""Bytes that ZeroMQ reads into one buffer, ZMQ_IN_BATCH_SIZE."""

AT_ONCE = 100
"""Messages that are taken before something is sent again."""


def frames_log(region: int) -> str:
    """Return the name of the log of the frames of a region."""
    return f"frames/{region}"


@dataclass(slots=True)
class _Reader:
    log: str
    next: int
    heard_at: float
    window: int = 1
    on_its_way: deque[tuple[int, int]] = field(default_factory=deque)
    """Offset and bytes of what is sent and not yet read."""
    n_bytes: int = 0
    """Of these."""

    def has_read(self, offset: int) -> None:
        while self.on_its_way and self.on_its_way[0][0] < offset:
            self.n_bytes -= self.on_its_way.popleft()[1]


class Hub:
    """Logs in memory, for those who come over ZeroMQ.

    Parameters
    ----------
    address
        ``tcp://host:port`` to listen on.
    beamline
        Clients of another one are refused.
    n_regions
        Of the detector: a log of frames for each, which `append` writes.
    ring_bytes
        Room for the frames of each region, and as much for partial sums, but not less than `PARTIALS_BYTES`.
    keys
        Who may come; None: everybody who can reach the address.

    Attributes
    ----------
    address
        The same, with the port that was found where ``tcp://host:*`` was asked for.

    Raises
    ------
    SinkError
        The address cannot be used.
    """

    def __init__(
        self, address: str, beamline: str, n_regions: int, *, ring_bytes: int, keys: GatewayKeys | None = None
    ) -> None:
        self.ring_bytes = ring_bytes
        self._beamline = beamline
        self._rings = {frames_log(region): Ring(ring_bytes) for region in range(n_regions)}
        self._rings[PARTIALS] = Ring(max(ring_bytes, PARTIALS_BYTES))
        self._changed = threading.Condition()
        """Of the rings, and of who reads them."""
        self._group = Group(n_regions)
        self._readers: dict[bytes, _Reader] = {}
        self._writers: dict[str, int] = {}
        """The number that is wanted next of each."""
        self._n_bad = self._told_lost = 0
        self._failure = ""
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.rcvhwm = self._router.sndhwm = MOST_QUEUED  # for those who do not keep to their windows
        self._router.maxmsgsize = MAX_BYTES
        self._router.linger = 0  # who still waits for something comes again
        self._router.router_mandatory = True  # tells of readers that are gone
        self._router.heartbeat_ivl = 1000  # ms
        self._router.heartbeat_timeout = (
            20_000  # ms; only whole parts count as a sign of life, and slow links take long for them
        )
        self._authenticator = keys.use(self._router) if keys is not None else None
        try:
            self._router.bind(address)
        except zmq.ZMQError as error:
            self._close()
            raise SinkError(f"{address}: {error}") from error
        self.address = self._router.get_string(zmq.LAST_ENDPOINT)
        self._alarm, self._bell = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._alarm.rcvhwm = self._bell.sndhwm = 1  # once is enough
        self._alarm.bind("inproc://alarm")
        self._bell.connect("inproc://alarm")
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closing = True
        self._ring_bell()
        self._thread.join()
        self._close()

    def append(self, log: str, parts: Sequence[Buffer], *, must_stay: bool, run: int = 0) -> None:
        """Take a record that is not changed afterwards, of a run that has a number; the oldest go for it.

        Raises
        ------
        SinkError
            The hub has failed.
        """
        with self._changed:
            self._check()
            self._rings[log].append(parts, must_stay=must_stay, run=run)
            self._ring_bell()

    def wait_for_room(self, log: str, n_bytes: int, within: float) -> bool:
        """Return once a record of so many bytes has room while nothing goes that is not safe; False if it did not come.

        Raises
        ------
        SinkError
            The hub has failed.
        """
        with self._changed:
            found = self._changed.wait_for(lambda: self._failure or self._rings[log].has_room(n_bytes), within)
            self._check()
            return bool(found)

    def wait_until_safe(self, within: float) -> Mapping[str, int]:
        """Return the records of every log that are not safe, once there are none or after `within` seconds.

        Raises
        ------
        SinkError
            The hub has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._unsafe(), within)
            self._check()
            return self._unsafe()

    def lost(self, log: str) -> int:
        """Return how many records of a log went before they were safe."""
        return self._rings[log].lost

    def delivery(self) -> Delivery:
        """Return how far the frames of all regions are."""
        with self._changed:
            rings = [ring for log, ring in self._rings.items() if log != PARTIALS]
            unsafe = [kept for ring in rings if (kept := ring.unsafe) is not None]
            lost = sum((ring.lost_of for ring in rings), Counter[int]())
            through = self._state()
        since = min((kept.at for kept in unsafe), default=None)
        return Delivery(
            lag=0.0 if since is None else time.monotonic() - since,
            lost=lost,
            unsafe_run=min((kept.run for kept in unsafe), default=None),
            n_lost=sum(log.lost for log in through.logs if log.region is not None),
            through=through,
        )

    def _state(self) -> HubState:
        windows: dict[str, list[int]] = {log: [0, 0, 0] for log in self._rings}
        for reader in self._readers.values():
            for i, more in enumerate((1, reader.window, reader.n_bytes)):
                windows[reader.log][i] += more
        return HubState(
            logs=[
                LogState(
                    region=region if log != PARTIALS else None,
                    appended=ring.end,
                    safe=ring.safe,
                    lost=ring.lost,
                    held_bytes=ring.limit - ring.room,
                    room_bytes=ring.room,
                    readers=windows[log][0],
                    window_bytes=windows[log][1],
                    used_bytes=windows[log][2],
                )
                for region, (log, ring) in enumerate(self._rings.items())
            ],
            workers=self._group.n_workers,
            served=len(self._group.owners),
        )

    def _unsafe(self) -> dict[str, int]:
        return {log: ring.end - ring.safe for log, ring in self._rings.items() if ring.safe < ring.end}

    def _check(self) -> None:
        if self._failure:
            raise SinkError(f"{self.address}: {self._failure}")

    def _ring_bell(self) -> None:
        with suppress(zmq.Again):  # it is ringing
            self._bell.send(b"", zmq.NOBLOCK)

    def _close(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._alarm, zmq.POLLIN)
        try:
            looked_at, has_sent = 0.0, False
            while not self._is_closing:
                ready = dict(poller.poll(0 if has_sent else round(1000 * TICK)))
                if self._alarm in ready:
                    self._alarm.recv()
                if self._router in ready:
                    self._take_some()
                if (now := time.monotonic()) - looked_at > TICK:
                    self._look_for_the_silent(now)
                    looked_at = now
                has_sent = self._send_round()
        except Exception as error:  # noqa: BLE001 - of a thread: told to who uses the hub
            _log.exception("the hub failed")
            with self._changed:
                self._failure = f"the hub failed: {error}"
                self._changed.notify_all()

    def _take_some(self) -> None:
        for _ in range(AT_ONCE):
            try:
                who, *parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._take(who.bytes, [part.buffer for part in parts])
            except DecodeError as error:
                self._n_bad += 1
                if self._n_bad & (self._n_bad - 1) == 0:
                    _log.warning("%s: rejected: %s (%d so far)", self.address, error, self._n_bad)

    def _take(self, who: bytes, parts: Sequence[Buffer]) -> None:
        said = unpack(parts)
        if not isinstance(said, Read | Put | Here):
            raise DecodeError(f"a {type(said).__name__.lower()} is for clients")
        if said.beamline != self._beamline:
            self._say(who, Refused(reason=f"this is the gateway of {self._beamline}, not of {said.beamline}"))
        elif isinstance(said, Here):
            self._share(who, said)
        elif said.log not in self._rings:
            self._say(who, Refused(reason=f"there is no log {said.log}; there are {len(self._rings) - 1} regions"))
        elif isinstance(said, Read):
            self._take_note(who, said)
        elif said.log != PARTIALS:
            self._say(who, Refused(reason=f"the log {said.log} is not yours to write"))
        else:
            self._write(who, said, parts[1:])

    def _write(self, who: bytes, put: Put, parts: Sequence[Buffer]) -> None:
        wanted = self._writers.pop(put.writer, put.oldest)
        if put.number == wanted:
            # A small part is a view of all that ZeroMQ read at once, which it would keep.
            kept = [part if memoryview(part).nbytes > READ_AT_ONCE else bytes(part) for part in parts]
            with self._changed:
                ring = self._rings[put.log]
                ring.append(kept, must_stay=put.must_stay)
            if ring.lost > 2 * self._told_lost:
                self._told_lost = ring.lost
                _log.warning(
                    "%s: %d records of partial sums are gone before a merger was done with them: it is away, or waits "
                    "for the files of runs; if it is started again it lacks them",
                    self.address,
                    ring.lost,
                )
            wanted += 1
        self._writers[put.writer] = wanted  # behind all others: the one that has been silent longest goes
        while len(self._writers) > MOST_WRITERS:
            del self._writers[next(iter(self._writers))]
        self._say(who, Had(number=wanted))

    def _share(self, who: bytes, here: Here) -> None:
        owners = dict(self._group.owners)
        yours = self._group.hear(here, time.monotonic())
        self._tell_owners(owners)
        namesake = Refused(reason=f"another worker has come under the name {here.name}")
        self._say(who, yours if yours is not None else namesake)

    def _tell_owners(self, before: Mapping[int, str]) -> None:
        after = self._group.owners
        if after != before:
            counts = [list(after.values()).count(name) for name in dict.fromkeys(after.values())]
            _log.info("regions are shared out among %d workers: %s", len(counts), " + ".join(map(str, counts)))

    def _take_note(self, who: bytes, read: Read) -> None:
        with self._changed:
            reader = self._readers.pop(who, None)
            ring = self._rings[read.log]
            is_of_ring = read.ring == ring.name
            if is_of_ring and read.safe > ring.safe:
                ring.release(read.safe)
                self._changed.notify_all()
            if reader is None or reader.log != read.log:
                reader = _Reader(read.log, read.next if is_of_ring else 0, 0.0)
            elif read.again and is_of_ring:
                reader.on_its_way.clear()
                reader.next, reader.n_bytes = read.next, 0
            if is_of_ring:
                reader.has_read(read.next)
            reader.window, reader.heard_at = read.window, time.monotonic()
            self._readers[who] = reader  # behind all others: the one that has been silent longest goes
            while len(self._readers) > MOST_READERS:
                del self._readers[next(iter(self._readers))]

    def _send_round(self) -> bool:
        """Send every reader one record at most; tell whether there was anything to send."""
        has_sent = False
        for who, reader in list(self._readers.items()):
            with self._changed:
                ring = self._rings[reader.log]
                found = ring.at(reader.next)
            if found is None:
                continue
            offset, kept = found
            n_bytes = kept.n_bytes + OVERHEAD
            if reader.n_bytes and reader.n_bytes + n_bytes > reader.window:
                continue
            record = Record(log=reader.log, ring=ring.name, offset=offset, follows=reader.next)
            if self._say(who, record, kept.parts):
                reader.next = offset + 1
                reader.on_its_way.append((offset, n_bytes))
                reader.n_bytes += n_bytes
                has_sent = True
        return has_sent

    def _say(self, who: bytes, said: Said, parts: Sequence[Buffer] = ()) -> bool:
        try:
            self._router.send_multipart([who, pack(said), *parts], zmq.NOBLOCK, copy=False)
        except zmq.Again:  # it takes nothing
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            with self._changed:
                self._readers.pop(who, None)
            return False
        return True

    def _look_for_the_silent(self, now: float) -> None:
        owners = dict(self._group.owners)
        for name in self._group.expire(now):
            _log.warning("worker %s has said nothing for %g s: others get its regions", name, SESSION)
        self._tell_owners(owners)
        for who in [who for who, reader in self._readers.items() if now - reader.heard_at > SILENT]:
            # Only one that is gone is forgotten: what is on its way to the others still counts.
            self._readers[who].heard_at = now
            self._say(who, Had(number=0))
