"""Carries out what a mover orders."""

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Event, Thread

from hpc_bridge.errors import BridgeError
from hpc_bridge.logs import bound
from hpc_bridge.transfer import Transfer
from hpc_bridge.transfer_mover import Answer, Mover, Order, carry_out

_LOOK = 0.2
"""Between looks whether something has become due (s)."""


class _Broken(BridgeError):
    """An order broke down, by a defect of ours."""


def run(
    mover: Mover,
    transfer: Transfer,
    stop: Event,
    *,
    until_done: bool = False,
    between: Callable[[float], None] = lambda _: None,
) -> None:
    """Move files until `stop`, or until there is nothing left to be moved.

    What it leaves unanswered then is asked for again by the next one.

    Parameters
    ----------
    between
        Called again and again, with the time: may add requests, and cancel some.
    """
    answers: SimpleQueue[tuple[Order, Answer]] = SimpleQueue()
    while not stop.is_set() and not (until_done and not mover.open_moves):
        between(time.time())
        for order in mover.orders(time.time()):
            # Not waited for at the end: reading what arrived again may take its time.
            Thread(target=_carry_out, args=(order, transfer, answers), daemon=True).start()
        try:
            order, answer = answers.get(timeout=_LOOK)
        except Empty:
            continue
        if isinstance(answer, _Broken):
            raise answer
        with bound(beamline=order.move.request.beamline, run=order.move.request.run):
            mover.answered(order, answer, time.time())


def _carry_out(order: Order, transfer: Transfer, answers: "SimpleQueue[tuple[Order, Answer]]") -> None:
    answer: Answer = _Broken(f"{order.do} of {order.move.name} broke down: see the log")
    try:
        answer = carry_out(order, transfer)
    finally:
        answers.put((order, answer))
