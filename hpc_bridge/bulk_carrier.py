"""Moves the files of all runs that go by one identity, in a thread of its own: a service may not answer."""

import logging
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from hpc_bridge.bulk import DAY, KEPT, Wanted
from hpc_bridge.errors import RecordError
from hpc_bridge.transfer import Transfer
from hpc_bridge.transfer_mover import Mover
from hpc_bridge.transfer_record import Move, Moves
from hpc_bridge.transfer_run import run

_log = logging.getLogger(__name__)

_AGAIN = 10.0
"""Before a mover that broke down begins again (s)."""


@dataclass(frozen=True, slots=True)
class _Wish:
    wanted: Mapping[str, Wanted]
    kept: AbstractSet[str]


class Carrier:
    """A mover that is told again and again what is wanted, and tells how far it is.

    Parameters
    ----------
    path
        Of its record.
    transfer
        Used in this thread and those of the mover only, and closed at the end.
    poll
        Between looks at a task (s).

    Attributes
    ----------
    seen
        What is wanted, as it was a moment ago, by its name.
    """

    def __init__(self, path: Path, transfer: Transfer, closing: AbstractContextManager[object], *, poll: float) -> None:
        self.seen: Mapping[str, Move] = {}
        self._path, self._transfer, self._closing, self._poll = path, transfer, closing, poll
        self._wish: _Wish | None = None
        self._added: dict[str, tuple[int, float, float]] = {}
        self._over: dict[str, Move] = {}
        self._pruned = 0.0
        self._stop = Event()
        self._error: RecordError | None = None
        self._thread = Thread(target=self._run, name=path.stem, daemon=True)
        self._thread.start()

    def wish(self, wanted: Mapping[str, Wanted], kept: AbstractSet[str]) -> None:
        """Say what is to be moved; whatever else is open on record and not among the `kept` is canceled.

        Raises
        ------
        RecordError
            The record cannot be written.
        """
        if self._error is not None:
            raise self._error
        self._wish = _Wish(wanted, kept)

    def stop(self) -> None:
        """Begin to close."""
        self._stop.set()

    def close(self) -> None:
        """Move nothing more; tasks of a service go on, and are known again."""
        self.stop()
        self._thread.join(10)

    def _run(self) -> None:
        try:
            with self._closing:
                while not self._stop.is_set():
                    self._move()
                    self._stop.wait(_AGAIN)
        except RecordError as error:
            self._error = error

    def _move(self) -> None:
        try:
            with Moves.open(self._path) as moves:
                self._pruned = 0.0
                mover = Mover(moves, self._transfer.most_active, poll=self._poll)
                self._added.clear()
                self._over.clear()
                run(mover, self._transfer, self._stop, between=lambda now: self._look(moves, mover, now))
        except RecordError:
            raise
        except Exception:  # noqa: BLE001 - the manager, and who streams, go on
            _log.exception("%s: this is our own mistake; it begins again", self._path.stem)

    def _look(self, moves: Moves, mover: Mover, now: float) -> None:
        if now - self._pruned > DAY:
            moves.prune(now - KEPT)
            self._pruned = now
        wish = self._wish
        if wish is None:
            return
        for name, each in wish.wanted.items():
            added = each.priority, each.since, each.request.deadline
            if self._added.get(name) != added:
                move = mover.add(each.request, each.priority, now, each.since)
                self._added[name] = added
                self._over.pop(name, None)
                if move.ended is not None:
                    self._over[name] = move
        for name in [name for name in self._added if name not in wish.wanted]:
            del self._added[name]
            self._over.pop(name, None)
        still = {move.move: move for move in mover.open_moves}
        for name in still.keys() - wish.kept - wish.wanted.keys():
            mover.cancel(name, "nobody wants it any more")
        for name in self._added.keys() - still.keys() - self._over.keys():
            if (over := moves.get(name)) is not None:
                self._over[name] = over
        self.seen = {name: still.get(name) or self._over[name] for name in self._added if name in still | self._over}
