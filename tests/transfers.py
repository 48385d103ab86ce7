"""Files of runs to be moved, and a mover that is driven by hand: its clock is ours."""

import hashlib
import os
import time
from pathlib import PurePosixPath

from hpc_bridge.transfer import File, Place, Request, State
from hpc_bridge.transfer_mover import Mover, carry_out
from hpc_bridge.transfer_record import Moves

WITHIN = 30


def make_request(folder, run="42", *, beamline="8idi", source=None, destination=None, sizes=(100_000, 3), within=1e5):
    """A request whose files are in `folder`/data/RUN."""
    files = []
    for number, size in enumerate(sizes):
        name = f"raw/{run}_{number}.h5" if number else f"{run}.h5"
        content = os.urandom(size)
        (folder / "data" / run / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / run / name).write_bytes(content)
        files.append(File(name=name, size=size, sha256=hashlib.sha256(content).hexdigest()))
    return Request(
        beamline=beamline,
        run=run,
        source=source or Place(path=PurePosixPath(folder / "data" / run)),
        destination=destination or Place(path=PurePosixPath(folder / "arrived" / run)),
        files=tuple(files),
        deadline=time.time() + within,
    )


class Driven:
    """A mover whose orders are carried out one after another."""

    def __init__(self, path, transfer):
        self.transfer = transfer
        self.moves = Moves.open(path)
        self.mover = Mover(self.moves, transfer.most_active, poll=0, backoff=1)
        self.now = time.time()
        self.seen = []

    def add(self, request, priority=0):
        return self.mover.add(request, priority, self.now).move

    def step(self, seconds=0.1):
        """Let time pass, and carry out what is due; returns what was asked."""
        self.now += seconds
        orders = self.mover.orders(self.now)
        for order in orders:
            self.mover.answered(order, carry_out(order, self.transfer), self.now)
        self.seen.extend((move.state, move.nice_status, move.message) for move in self.mover.open_moves)
        return [order.do for order in orders]

    def until(self, condition, seconds=0.1):
        end = time.monotonic() + WITHIN
        while not condition():
            assert time.monotonic() < end, [(move.state, move.message) for move in self.moves.all()]
            self.step(seconds)

    def until_over(self, move):
        self.until(lambda: self.moves.get(move).state.is_final)
        return self.moves.get(move)

    def until_done(self, move):
        over = self.until_over(move)
        assert over.state is State.DONE, over.message
        assert over.may_release
        return over

    def until_said(self, move, *words):
        self.until(lambda: all(word in self.moves.get(move).message for word in words))
        return self.moves.get(move)
