"""How many pixel-frames per second are correlated, against other programs and against what the machine can do at most.

Poisson counts in 320 static and 8 dynamic rings, correlated from memory over 16 levels in runs that go on and on, so
that the higher levels are reached. A pixel-frame is one pixel of one frame, dark or not.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import memory, start
from bench.data import EIGER2_4M, EIGER2_500K, Shape, photons, poisson, rings
from bench.limits import multiply_add_rate, read_rate
from bench.measure import Figure, asked_for, compare, in_turn, rate
from bench.peers import Peers, Rate
from stream.messages import Events, FrameBatch, RunStart
from stream.operators.multitau import MultiTau
from stream.operators.roimap import RoiMap

ROUNDS = 5
THREADS = 2
MULTIPLY_ADDS = 12
"""Of one pixel-frame: 8 delays at level 0, 4 (1/2 + 1/4 + ...) above."""


def figures() -> Iterator[Figure]:
    """Measure everything that was promised of the kernels."""
    yield from dense(EIGER2_500K, 256)
    yield from large(EIGER2_4M, 32)
    yield from sparse(EIGER2_500K, 256, mean=0.1, target=0.9)
    yield from sparse(EIGER2_500K, 256, mean=0.03, target=0.9)
    yield from sparse(EIGER2_500K, 1024, mean=0.01, target=3.5, photon_rate=70e6)
    yield from sparse(EIGER2_500K, 4096, mean=0.001, target=20)
    yield from start.figures()
    yield from memory.figures()


def dense(shape: Shape, n: int, rounds: int = ROUNDS) -> Iterator[Figure]:
    """Correlate many photons: types, threads, batches, masks, peers, limits."""
    roimap, lower_half = rings(shape), rings(shape, first_row=shape[0] // 2)
    frames = poisson(shape, n, 1)
    ours = {
        "uint16, 2 threads": _Run(frames, roimap),
        "uint16, 1 thread": _Run(frames, roimap, threads=1),
        "uint8, 2 threads": _Run(frames.astype("u1"), roimap),
        "uint32, 2 threads": _Run(frames.astype("<u4"), roimap),
        "mean 10, 2 threads": _Run(poisson(shape, n, 10), roimap),
        "frame by frame, 2 threads": _Run(frames, roimap, batch=1),
        "half masked, 2 threads": _Run(frames, lower_half),
    }
    with Peers(shape, 1, THREADS) as peers:
        rates = {name: run.rate for name, run in ours.items()} | _limits(frames) | peers.rates()
        measured = in_turn(rates, rounds)

    versus = partial(_versus, measured, "dense ")
    for peer in peers.names:
        target = 250 if "scikit" in peer else 20 if "boost" in peer else None
        yield versus("uint16, 2 threads", peer, target)
    yield versus("uint16, 2 threads", "multiply-add peak, 2 threads", 0.3)
    yield versus("uint16, 2 threads", "reading, 2 threads")
    yield versus("uint16, 1 thread", "uint16, 2 threads", 0.6)
    yield versus("uint16, 1 thread", "multiply-add peak, 1 thread")
    yield versus("uint16, 1 thread", "reading, 1 thread")
    yield versus("uint8, 2 threads", "uint16, 2 threads", 1)
    yield versus("uint32, 2 threads", "uint16, 2 threads", 0.7)
    yield versus("mean 10, 2 threads", "uint16, 2 threads")
    yield versus("frame by frame, 2 threads", "uint16, 2 threads", 0.6)
    yield versus("half masked, 2 threads", "uint16, 2 threads", 1.6)


def large(shape: Shape, n: int, rounds: int = ROUNDS) -> Iterator[Figure]:
    """Correlate a large detector, many photons and few."""
    roimap, frames, events = rings(shape), poisson(shape, n, 1), photons(shape, 8 * n, 0.01)
    ours: dict[str, Rate] = {
        "uint16, 2 threads": _Run(frames, roimap).rate,
        "uint16, 1 thread": _Run(frames, roimap, threads=1).rate,
        "mean 0.01 as events, 2 threads": _Run(events, roimap).rate,
    }
    measured = in_turn(ours | _limits(frames), rounds)
    versus = partial(_versus, measured, "4M ")
    yield versus("uint16, 2 threads", "multiply-add peak, 2 threads")
    yield versus("uint16, 2 threads", "reading, 2 threads")
    yield versus("uint16, 1 thread", "uint16, 2 threads")
    yield versus("mean 0.01 as events, 2 threads", "uint16, 2 threads")


def sparse(
    shape: Shape, n: int, *, mean: float, target: float, photon_rate: float | None = None, rounds: int = ROUNDS
) -> Iterator[Figure]:
    """Correlate the same few photons as events and as frames, the latter at most 256 at a time."""
    roimap, events = rings(shape), photons(shape, n, mean)
    frames = events[:256].dense()
    rates: dict[str, Rate] = {
        "events, 2 threads": _Run(events, roimap).rate,
        "events, 1 thread": _Run(events, roimap, threads=1).rate,
        "frames, 2 threads": _Run(frames, roimap).rate,
        "reading the events, 2 threads": partial(_read_events, events),
    }
    with Peers(shape, mean, THREADS) as peers:
        measured = in_turn(rates | peers.rates(), rounds)

    versus = partial(_versus, measured, f"mean {mean:g} ")
    yield versus("events, 2 threads", "frames, 2 threads", target)
    yield versus("events, 1 thread", "events, 2 threads")
    yield versus("events, 2 threads", "reading the events, 2 threads")
    for peer in peers.names:
        yield versus("events, 2 threads", peer)
    photons_per_pixel = float(events.counts.sum()) / math.prod(events.shape)
    found, theirs = (
        [each * photons_per_pixel for each in measured[f"{form}, 2 threads"]] for form in ("events", "frames")
    )
    name = f"mean {mean:g} events, 2 threads"
    if photon_rate is not None:
        yield asked_for(name, "photons/s", found, photon_rate)
    else:
        yield compare(name, "photons/s", "frames, 2 threads", list(zip(found, theirs, strict=True)))


class _Run:
    """One run that goes on and on, as at a beamline."""

    def __init__(
        self, frames: NDArray[Any] | Events, roimap: RoiMap, *, threads: int = THREADS, batch: int | None = None
    ) -> None:
        begin = RunStart(
            run="bench",
            shape=roimap.shape,
            dtype=frames.dtype.str,
            saturation_value=int(np.iinfo(frames.dtype).max) - 1,
            frame_time=1e-3,
            count_time=1e-3,
        )
        self._operator = MultiTau(begin, roimap, threads=threads)
        step = batch or len(frames)
        self._batches = [frames[i : i + step] for i in range(0, len(frames), step)]
        self._pixel_frames = len(frames) * roimap.shape[0] * roimap.shape[1]

    def rate(self) -> float:
        """Return pixel-frames per second."""
        return rate(self._pixel_frames, self._push)

    def _push(self) -> None:
        for frames in self._batches:
            first = self._operator.n_frames
            self._operator.push(FrameBatch(run="bench", first=first, frames=frames, timestamp_ns=0))


def _versus(
    measured: dict[str, list[float]], prefix: str, figure: str, against: str, target: float | None = None
) -> Figure:
    both = list(zip(measured[figure], measured[against], strict=True))
    return compare(prefix + figure, "pixel-frames/s", against, both, target=target)


def _limits(frames: NDArray[Any]) -> dict[str, Rate]:
    """Return how fast this machine could be if it only read the frames, or only multiplied and added."""
    return {
        "reading, 1 thread": lambda: read_rate(frames, 1) / frames.itemsize,
        "reading, 2 threads": lambda: read_rate(frames, 2) / frames.itemsize,
        "multiply-add peak, 1 thread": lambda: multiply_add_rate(1) / MULTIPLY_ADDS,
        "multiply-add peak, 2 threads": lambda: multiply_add_rate(2) / MULTIPLY_ADDS,
    }


def _read_events(events: Events) -> float:
    """Return pixel-frames per second of a kernel that only reads pixels and counts."""
    duration = sum(row.nbytes / read_rate(row, THREADS) for row in (events.pixels, events.counts))
    return math.prod(events.shape) / duration
