"""Frames through the ZeroMQ plane into one merged g2: how many per second, how late, and how soon after a kill.

The bare client pushes the same bytes to another process that pulls them; see `bench.plane`.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zmq

from bench.data import poisson
from bench.measure import Figure
from bench.plane import BATCH, REGIONS, SHAPE, Beamline
from stream.zmq_plane import ZmqPlane

FAILOVER = 3.0


def figures() -> Iterator[Figure]:
    """Measure what `bench.plane` does."""
    with tempfile.TemporaryDirectory() as folder:
        yield from Beamline(Path(folder), _new).figures("ZeroMQ", _bare, failover=FAILOVER)


def _new() -> tuple[str, ZmqPlane]:
    with zmq.Context() as context, context.socket(zmq.PULL) as probe:
        address = f"tcp://127.0.0.1:{probe.bind_to_random_port('tcp://127.0.0.1')}"
    return f"{address.replace('tcp', 'zmq')}/bench", ZmqPlane(address, "bench")


def _bare(n: int) -> float:
    """Return the seconds from the first record sent to the last one received by another process."""
    record = poisson(SHAPE, BATCH, 1)[:, : SHAPE[0] // REGIONS].tobytes()
    n_record = REGIONS * n // BATCH
    with zmq.Context() as context, context.socket(zmq.PUSH) as sender, context.socket(zmq.PULL) as done:
        sender.sndhwm = 8
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (sender, done)]
        command = [sys.executable, "-m", "bench.zmq", *map(str, ports), str(n_record)]
        with subprocess.Popen(command):
            done.recv()
            begin = time.perf_counter()
            for _ in range(n_record):
                sender.send(record, copy=False)
            done.recv()
            return time.perf_counter() - begin


def _receive(data: str, done: str, n: str) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as receiver, context.socket(zmq.PUSH) as told:
        receiver.rcvhwm = 8
        receiver.connect(f"tcp://127.0.0.1:{data}")
        told.connect(f"tcp://127.0.0.1:{done}")
        told.send(b"ready")
        for _ in range(int(n)):
            receiver.recv(copy=False)
        told.send(b"done")


if __name__ == "__main__":
    _receive(*sys.argv[1:])
