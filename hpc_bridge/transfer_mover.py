"""Sees to it that every request to move files comes to an end, and its source is kept until all of it has arrived.

All that must outlive the process is in the record before it is done; the rest is asked for again. The mover only says
what is to be asked of a transfer, and takes the answers, in any order; it may be killed between any two of them::

    mover = Mover(moves, transfer.most_active, now=time.time())
    mover.add(request, priority, now)
    for order in mover.orders(now):  # each carried out anywhere, and answered once
        mover.answered(order, carry_out(order, transfer), now)
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from hpc_bridge.errors import BridgeError, ConfigError
from hpc_bridge.transfer import Progress, Request, State, Transfer, TransferRefused, TransferUnreachable, UnknownTask
from hpc_bridge.transfer_record import Move, Moves

_log = logging.getLogger(__name__)

LONGEST_BACKOFF = 60.0
"""Between two tries of a service that does not answer (s)."""

LONGEST_REST = 600.0
"""Before a task that came to nothing is tried once more, and one that was refused for something that can be mended."""

FLAT = 60.0
"""A task with faults whose bytes have not changed for so long (s) is stalled."""

ARRIVED = "arrived; reads it again"
"""What is said of a request whose task is done while what arrived is verified."""

_BEYOND = 1e-3
"""After which a deadline has passed (s)."""


class Do(StrEnum):
    """What may be asked of a transfer."""

    PREPARE = "prepare"
    SUBMIT = "submit"
    LOOK = "look"
    CANCEL = "cancel"
    VERIFY = "verify"


@dataclass(frozen=True, slots=True)
class Order:
    """Something to be asked, on account of a request."""

    do: Do
    move: Move


@dataclass(frozen=True, slots=True)
class Found:
    """The id of the task of a document; None: it has none."""

    task: str | None


Answer = str | Progress | Found | Sequence[str] | BridgeError
"""Document or task; how far; after CANCEL, or if another task than ours was found; what is missing; what went wrong."""


def carry_out(order: Order, transfer: Transfer) -> Answer:
    """Ask a transfer, and return what it answered."""
    move = order.move
    try:
        match order.do:
            case Do.PREPARE:
                return transfer.prepare(move.request, move.name)
            case Do.SUBMIT:
                return _submit(transfer, move.document or "")
            case Do.LOOK:
                return _look(transfer, move.task or "", move.document or "")
            case Do.CANCEL:
                task = move.task or transfer.find(move.document or "")
                if task is not None:
                    transfer.cancel(task)
                return Found(task)
            case Do.VERIFY:
                return tuple(transfer.missing(move.request))
    except (TransferUnreachable, TransferRefused, UnknownTask) as error:
        return error


def _submit(transfer: Transfer, document: str) -> str:
    try:
        return transfer.submit(document)
    except TransferRefused as refused:
        # An earlier POST of it may have been taken all the same, and its answer lost.
        try:
            task = transfer.find(document)
        except TransferRefused:
            raise refused from None
        if task is None:
            raise
        return task


def _look(transfer: Transfer, task: str, document: str) -> Progress | Found:
    try:
        return transfer.progress(task)
    except UnknownTask:
        other = transfer.find(document)
        if other is None:
            raise
        if other == task:
            raise TransferUnreachable(f"task {task} is said to be unknown, and is listed") from None
        return Found(other)


class Mover:
    """The requests of one identity: as many tasks at once as it may have, the highest priority first, then the oldest.

    Parameters
    ----------
    moves
        The record, which nobody else writes.
    most_active
        Tasks at once.
    poll
        Between two looks at a task (s).
    backoff
        Before the first new try (s), which doubles from then on.
    """

    def __init__(self, moves: Moves, most_active: int, *, poll: float = 5.0, backoff: float = 1.0) -> None:
        if most_active < 1 or poll < 0 or backoff <= 0:
            raise ConfigError(f"most_active, poll, backoff: {most_active}, {poll}, {backoff} cannot be")
        self._moves = moves
        self._most_active = most_active
        self._poll = poll
        self._backoff = backoff
        self._open = {move.move: move for move in moves.open_moves()}
        self._asked: set[str] = set()
        """Requests with an order that is not answered."""
        self._arrived: set[str] = set()
        """Whose task is done; now they are read again."""
        self._canceled: set[str] = set()
        """Whose task was told to end."""
        self._not_before: dict[str, float] = {}
        self._tries: Counter[str] = Counter()
        """Of each request since something came of it."""
        self._moved: dict[str, tuple[int, float]] = {}
        """Bytes, and since when they are so many."""
        self._silent_until = 0.0
        self._silences = 0

    @property
    def open_moves(self) -> Sequence[Move]:
        """What is not over."""
        return tuple(self._open.values())

    def add(self, request: Request, priority: int, now: float, since: float | None = None) -> Move:
        """Take a request; it is on record when this returns. The same again is no other; see `Moves.add`."""
        move = self._moves.add(request, priority, now, since)
        if move.ended is None:
            self._open[move.move] = move
        return move

    def cancel(self, move: str, why: str) -> None:
        """Let a request go. What has all arrived meanwhile is done all the same."""
        if move in self._open:
            self._put(self._moves.ending(move, why))
            self._not_before.pop(move, None)

    def orders(self, now: float) -> list[Order]:
        """Return what is to be asked now; no second thing of a request before the first is answered."""
        orders = []
        for move in sorted(self._open.values(), key=lambda move: (-move.priority, move.created, move.move)):
            if move.move in self._asked or now < self._not_before.get(move.move, now):
                continue
            do = self._next(move, now)
            if do is not None and (do is Do.VERIFY or now >= self._silent_until):
                self._asked.add(move.move)
                orders.append(Order(do, move))
        return orders

    def answered(self, order: Order, answer: Answer, now: float) -> None:
        """Take what came of an order."""
        name = order.move.move
        self._asked.discard(name)
        if not isinstance(answer, TransferUnreachable) and order.do is not Do.VERIFY:
            self._silences = 0
        match order.do, answer:
            case _, TransferUnreachable():
                self._unreachable(order, answer, now)
            case Do.PREPARE, str():
                self._put(self._moves.prepared(name, answer))
            case Do.SUBMIT, str():
                self._submitted(name, answer, now)
            case Do.LOOK, Found(task=str() as task):
                self._submitted(name, task, now)
            case Do.LOOK, Progress():
                self._seen(self._open[name], answer, now)
            case Do.CANCEL, Found(task=str() as task):
                self._canceled.add(name)
                self._submitted(name, task, now)
            case Do.CANCEL, Found():
                self._end(self._open[name], now)
            case Do.VERIFY, tuple():
                self._verified(self._open[name], answer, now)
            case _, TransferRefused():
                self._refused(order.do, self._open[name], answer, now)
            case _, UnknownTask():
                self._came_to_nothing(self._open[name], str(answer), now)
            case _:
                raise TypeError(f"{answer!r} is no answer to {order.do}")

    def _next(self, move: Move, now: float) -> Do | None:
        if move.move in self._arrived:
            return Do.VERIFY
        if self._ends(move, now) and move.move not in self._canceled:
            if move.document is not None:
                return Do.CANCEL
            self._end(move, now)
            return None
        if move.document is None:
            return Do.PREPARE if self._n_active() < self._most_active else None
        return Do.SUBMIT if move.task is None else Do.LOOK

    def _n_active(self) -> int:
        return sum(
            move.move not in self._arrived and (move.document is not None or move.move in self._asked)
            for move in self._open.values()
        )

    def _ends(self, move: Move, now: float) -> bool:
        return move.ending is not None or now > move.request.deadline

    def _submitted(self, name: str, task: str, now: float) -> None:
        self._put(self._moves.submitted(name, task, now))
        self._wait(self._open[name], self._poll, now)
        self._moved.pop(name, None)

    def _seen(self, move: Move, progress: Progress, now: float) -> None:
        name = move.move
        self._wait(move, self._poll, now)
        match progress.state:
            case State.DONE:
                self._put(self._moves.seen(name, _arrived(progress), now))
                self._arrived.add(name)
                self._not_before.pop(name)
            case State.CANCELED if not self._ends(move, now):
                self._over(move, State.CANCELED, progress.message or "canceled by somebody else", now)
            case State.CANCELED:
                self._end(move, now)
            case State.FAILED:
                self._came_to_nothing(move, progress.message, now)
            case _:
                judged = self._judged(name, progress, now)
                if judged != _on_record(move):
                    self._put(self._moves.seen(name, judged, now))

    def _judged(self, name: str, progress: Progress, now: float) -> Progress:
        n_bytes, since = self._moved.get(name, (-1, now))
        if n_bytes != progress.bytes or not progress.faults:
            self._moved[name] = progress.bytes, now
        elif progress.state is State.ACTIVE and now - since >= FLAT:
            message = f"{progress.faults} faults and no byte for {now - since:.0f} s"
            return Progress(
                state=State.STALLED,
                bytes=progress.bytes,
                files=progress.files,
                faults=progress.faults,
                nice_status=progress.nice_status,
                message=message,
            )
        return progress

    def _verified(self, move: Move, missing: Sequence[str], now: float) -> None:
        if missing:
            self._arrived.discard(move.move)
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            self._came_to_nothing(move, f"on arrival: {missing[0]}{more}", now)
        else:
            self._over(move, State.DONE, "", now)

    def _came_to_nothing(self, move: Move, why: str, now: float) -> None:
        if self._ends(move, now):
            self._end(move, now)
            return
        rest = self._rest(move.move, LONGEST_REST)
        self._wait(move, rest, now)
        _log.warning("%s %s: attempt %d: %s", move.request.beamline, move.request.run, move.attempt, why)
        self._put(self._moves.again(move.move, f"attempt {move.attempt}: {why}; next in {rest:.0f} s"))

    def _refused(self, do: Do, move: Move, refused: TransferRefused, now: float) -> None:
        if refused.is_final and do not in (Do.LOOK, Do.CANCEL):
            self._over(move, State.FAILED, str(refused), now)
            return
        _log.error("%s %s: %s", move.request.beamline, move.request.run, refused)
        if do is Do.SUBMIT:  # there is no task, and others may have their turn
            self._moves.again(move.move, str(refused))
        self._wait(move, LONGEST_REST, now)
        self._put(self._moves.waits(move.move, State.STALLED, str(refused), now))

    def _unreachable(self, order: Order, error: TransferUnreachable, now: float) -> None:
        move = self._open[order.move.move]
        if order.do is Do.VERIFY:
            self._wait(move, error.retry_after or self._rest(move.move, LONGEST_BACKOFF), now)
        elif error.retry_after is not None:
            self._silent_until = max(self._silent_until, now + error.retry_after)
        elif now >= self._silent_until:  # what was asked at the same time tells no more
            self._silent_until = now + min(self._backoff * 2.0 ** min(self._silences, 16), LONGEST_BACKOFF)
            self._silences += 1
        _log.warning("%s %s: %s", move.request.beamline, move.request.run, error)
        self._put(self._moves.waits(move.move, move.state, str(error), now))

    def _wait(self, move: Move, seconds: float, now: float) -> None:
        """Ask nothing of a request for so long, but see to its deadline when it passes."""
        deadline = move.request.deadline
        self._not_before[move.move] = min(now + seconds, deadline + _BEYOND) if now <= deadline else now + seconds

    def _rest(self, name: str, longest: float) -> float:
        self._tries[name] += 1
        return min(self._backoff * 2.0 ** min(self._tries[name] - 1, 16), longest)

    def _end(self, move: Move, now: float) -> None:
        if move.ending is not None:
            self._over(move, State.CANCELED, move.ending, now)
        else:
            why = f"its deadline has passed; {move.message}" if move.message else "its deadline has passed"
            self._over(move, State.FAILED, why, now)

    def _over(self, move: Move, state: State, why: str, now: float) -> None:
        _log.info("%s %s: %s %s", move.request.beamline, move.request.run, state, why)
        self._moves.ended(move.move, state, why, now)
        for known in (self._open, self._not_before, self._moved, self._tries):
            known.pop(move.move, None)
        self._arrived.discard(move.move)
        self._canceled.discard(move.move)

    def _put(self, move: Move) -> Move:
        self._open[move.move] = move
        return move


def _on_record(move: Move) -> Progress:
    return Progress(
        state=move.state,
        bytes=move.bytes,
        files=move.files,
        faults=move.faults,
        nice_status=move.nice_status,
        message=move.message,
    )


def _arrived(progress: Progress) -> Progress:
    """Return what is shown of a task that is done while what arrived is read again."""
    return Progress(
        state=State.ACTIVE,
        bytes=progress.bytes,
        files=progress.files,
        faults=progress.faults,
        message=ARRIVED,
    )
