"""The manager's ear: which pilots live. They come here, or it goes to them."""

import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import zmq

from hpc_bridge import heartbeat as wire
from hpc_bridge.curve import ManagerKeys
from hpc_bridge.errors import ConfigError
from hpc_bridge.heartbeat import Answer, Assignment, Do, Heard

_log = logging.getLogger(__name__)

LOOPBACK = ("tcp://127.", "tcp://localhost:", "tcp://[::1]:")

AT_ONCE = 1000
"""Heartbeats taken in one poll."""

ANEW = 5.0
"""Seconds without a heartbeat after which a pilot is dialled anew: ZeroMQ does not after a handshake that failed."""

MOST_LEASES = 10_000
"""Of which the newest heartbeat is kept; those that were silent for longest are forgotten."""


class Hearing:
    """Hears heartbeats, and answers each at once.

    Where two pilots have one lease, since a scheduler started its job once more, the one that began later has it; the
    other one is told to end.

    Parameters
    ----------
    address
        Where to listen, ``tcp://host:port``. None: nowhere, see `dial`.
    answer
        Is given the lease and returns what its pilot is to do, and why. Called from `poll`.
    keys
        Ours, and who may come. None: neither encrypted nor authenticated.
    task
        Is given a heartbeat and what its pilot is to do, and returns which task it has. Called from `poll`.

    Attributes
    ----------
    address
        Where it listens, with the port that it got.
    n_rejected
        Messages that were no heartbeats.

    Raises
    ------
    ConfigError
        The address cannot be listened on.
    """

    def __init__(
        self,
        address: str | None,
        answer: Callable[[str], tuple[Do, str]],
        *,
        keys: ManagerKeys | None = None,
        task: Callable[[Heard, Do], Assignment | None] = lambda heard, do: None,  # noqa: ARG005 - it has none
    ) -> None:
        self.n_rejected = 0
        self._answer = answer
        self._task = task
        self._heard: dict[str, Heard] = {}
        self._dialled: dict[str, float] = {}
        """When, monotonic, by address."""
        if keys is None and address is not None and not address.startswith(LOOPBACK):
            _log.warning("whoever reaches %s may claim to be a pilot: see xpcs-stream keys", address)
        self._context = zmq.Context()
        router = self._router = self._context.socket(zmq.ROUTER)
        router.maxmsgsize = wire.MAX_BYTES
        router.linger = 0  # who still waits for an answer asks again
        router.router_handover = True  # who comes again under its identity need not wait until its old connection dies
        self._authenticator = keys.use(router) if keys is not None else None
        self.address = "whom we dial"
        if address is not None:
            try:
                router.bind(address)
            except zmq.ZMQError as error:
                self.close()
                raise ConfigError(f"{address}: {error}") from None
            self.address = router.get_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hear no more."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)

    @property
    def heard(self) -> Mapping[str, Heard]:
        """The newest heartbeat of each lease."""
        return self._heard

    def dial(self, addresses: Mapping[str, str]) -> None:
        """Be connected to the pilots of these leases, at these addresses, and to nobody else."""
        now = time.monotonic()
        spoke: dict[str, float] = {}
        for lease, address in addresses.items():
            heard = self._heard.get(lease)
            spoke[address] = max(spoke.get(address, 0.0), 0.0 if heard is None else heard.monotonic)
        for address, at in list(self._dialled.items()):
            if address not in spoke or now - max(at, spoke[address]) > ANEW:
                del self._dialled[address]
                self._router.disconnect(address)
        for address in spoke.keys() - self._dialled.keys():
            try:
                self._router.connect(address)
            except zmq.ZMQError as error:
                _log.debug("%s: %s", address, error)
            else:
                self._dialled[address] = now

    def poll(self, within: float) -> list[Heard]:
        """Return what was heard since the last time, in order; wait for it `within` seconds if there is nothing.

        What a pilot says whose lease another one has now is not among it.
        """
        found: list[Heard] = []
        if not self._router.poll(round(1000 * within)):
            return found
        for _ in range(AT_ONCE):
            try:
                who, *parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                if len(parts) != 1:
                    raise ValueError(f"{len(parts)} parts, not 1")  # noqa: TRY301
                beat = wire.heartbeat(parts[0])
            except ValueError as error:
                self._reject(error)
                continue
            heard = Heard(heartbeat=beat, at=time.time(), monotonic=time.monotonic())
            newest = self._heard.get(beat.lease)
            if newest is not None and _is_older(heard, newest):
                why = f"the pilot on {newest.heartbeat.node} has this lease now"
                _log.warning("pilot %d on %s is told to end: %s", beat.pid, beat.node, why)
                self._say(who, Answer(n=beat.n, do=Do.END, why=why))
                continue
            do, why = self._answer(beat.lease)
            self._say(who, Answer(n=beat.n, do=do, why=why, task=self._task(heard, do)))
            self._keep(heard)
            found.append(heard)
        return found

    def _keep(self, heard: Heard) -> None:
        self._heard.pop(heard.heartbeat.lease, None)
        self._heard[heard.heartbeat.lease] = heard  # behind all others: the one that has been silent longest goes
        while len(self._heard) > MOST_LEASES:
            del self._heard[next(iter(self._heard))]

    def _say(self, who: bytes, answer: Answer) -> None:
        try:
            self._router.send_multipart([who, wire.pack(answer)], zmq.NOBLOCK)
        except zmq.Again:
            _log.debug("an answer was not taken")

    def _reject(self, error: ValueError) -> None:
        self.n_rejected += 1
        if self.n_rejected & (self.n_rejected - 1) == 0:
            _log.warning("%s: rejected: %s (%d so far)", self.address, error, self.n_rejected)


def _is_older(heard: Heard, newest: Heard) -> bool:
    one, other = heard.heartbeat, newest.heartbeat
    return (one.node, one.pid, one.started) != (other.node, other.pid, other.started) and heard.began < newest.began
