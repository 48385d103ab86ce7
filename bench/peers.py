"""What others offer for the same counts: pixel-frames per second, each as fast as it was found to run on a CPU.

All get the same frames from memory, as numpy arrays of uint16, and the same map; reading files is not measured.

plain numpy
    What is usually written, below. A fresh run of 16 frames each time, 4 levels.
scikit-beam
    `lazy_one_time` with 8 buffers, thus as many delays per level as ours with 4, and 8 levels. The static bins are its
    labels. One run that goes on. It has no threads.
boost_corr
    `MultitauCorrelator` fed with torch tensors that share the frames' memory, in blocks of its queue; one run that goes
    on. A fixed queue of 32 frames (of 8 to 512, and its own choice). ``max_count`` chooses the types: with the default
    7 levels 0 to 4 are bfloat16, which is exact up to 128 counts; with 128 all are float32.
    Its temporary arrays are larger than what malloc keeps, so that by default most of its time is spent by the kernel
    in clearing pages. `MALLOC` avoids that, which makes it up to 5 times as fast.

The g2 of all three is ours on the same data: numpy's in `tests/test_bench.py`; scikit-beam 0.0.27 to 1e-14 (at delays
8, 16, 32, ... it has another number, since it takes them from the level above), boost_corr 0.1.7 to 1e-7 in float32 and
1e-3 in bfloat16, each over 512 frames of Poisson counts with a correlation time of 10 frames.

They live in a process of their own, so that neither their allocator nor torch's threads reach ours:
``python -m bench.peers ROWS COLUMNS MEAN THREADS`` prints their names, then for each name it reads the rate.
"""

import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bench.data import Shape, poisson, rings
from bench.measure import rate
from stream.operators.roimap import RoiMap

Frames = NDArray[np.uint16]
Rate = Callable[[], float]
"""Correlates once more, and returns pixel-frames per second."""

N_FRAMES = 64
FEW = 16
"""Frames for the slow ones: all 4 levels of numpy, and those of scikit-beam in proportion."""
QUEUE = 32
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


class Peers:
    """The peers that are installed, at work on Poisson counts of a mean."""

    def __init__(self, shape: Shape, mean: float, threads: int) -> None:
        arguments = [sys.executable, "-m", "bench.peers", *map(str, (*shape, mean, threads))]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | MALLOC
        )
        self.names: list[str] = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def rates(self) -> dict[str, Rate]:
        """Return how to measure each."""
        return {name: lambda name=name: self._rate(name) for name in self.names}  # type: ignore[misc]

    def _rate(self, name: str) -> float:
        print(name, file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        return json.loads(self._process.stdout.readline())


def numpy_multitau(frames: Frames, roimap: RoiMap, *, d: int = 4, levels: int = 4) -> NDArray[np.float64]:
    """Do what is usually written: past frames in a list, G2 per pixel, IP and IF per bin; (n_delay, n_static) g2."""
    static = roimap.static_roi_map.ravel()
    n_bin = roimap.n_static + 1
    past: list[list[NDArray[np.float32]]] = [[] for _ in range(levels)]
    sums: list[list[NDArray[Any]]] = [[] for _ in range(levels)]
    G2 = [np.zeros((2 * d + 1, static.size), np.float32) for _ in range(levels)]
    for i, frame in enumerate(frames.reshape(len(frames), -1)):
        coarse = frame.astype(np.float32)
        for level in range(levels):
            for k in range(1 if level == 0 else d + 1, min(len(past[level]), 2 * d) + 1):
                G2[level][k] += coarse * past[level][-k]
            past[level] = [*past[level][1 - 2 * d :], coarse]
            sums[level].append(np.bincount(static, coarse, n_bin))
            if (i + 1) % 2 ** (level + 1):
                break
            coarse = past[level][-1] + past[level][-2]
    g2 = []
    pixels = np.bincount(static, minlength=n_bin)
    for level, bins in enumerate(map(np.array, sums)):
        for k in range(1 if level == 0 else d + 1, min(len(bins) - 1, 2 * d) + 1):
            pooled = np.bincount(static, G2[level][k], n_bin) * (len(bins) - k) * pixels
            g2.append(pooled[1:] / (bins[:-k].sum(axis=0) * bins[k:].sum(axis=0))[1:])
    return np.array(g2)


def _numpy(frames: Frames, roimap: RoiMap, _: int) -> dict[str, Rate]:
    few = frames[:FEW]
    return {"plain numpy, 1 thread": lambda: rate(few.size, lambda: numpy_multitau(few, roimap))}


def _scikit_beam(frames: Frames, roimap: RoiMap, _: int) -> dict[str, Rate]:
    correlation = import_module("skbeam.core.correlation")
    run = correlation.lazy_one_time(itertools.cycle(frames), num_levels=8, num_bufs=8, labels=roimap.static_roi_map)
    few = FEW * roimap.static_roi_map.size
    return {"scikit-beam, 1 thread": lambda: rate(few, lambda: list(itertools.islice(run, FEW)))}


def _boost_corr(frames: Frames, roimap: RoiMap, threads: int) -> dict[str, Rate]:
    torch = import_module("torch")
    torch.set_num_threads(threads)
    blocks = torch.from_numpy(frames.reshape(len(frames), -1).view(np.int16)).split(QUEUE)

    def correlating(max_count: int) -> Rate:
        correlator = import_module("boost_corr").MultitauCorrelator(
            roimap.static_roi_map.shape, frame_num=2**20, max_count=max_count, auto_queue=False, queue_size=QUEUE
        )
        return lambda: rate(frames.size, lambda: [correlator.process(block) for block in blocks])

    return {f"boost_corr {name}, {threads} threads": correlating(n) for name, n in (("bfloat16", 7), ("float32", 128))}


def _serve(rows: str, columns: str, mean: str, threads: str) -> None:
    warnings.simplefilter("ignore")  # theirs: bins without light are divided by 0
    shape = int(rows), int(columns)
    frames, roimap = poisson(shape, N_FRAMES, float(mean)), rings(shape)
    rates: dict[str, Rate] = {}
    for name, peer in (("numpy", _numpy), ("scikit-beam", _scikit_beam), ("boost_corr", _boost_corr)):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                rates |= peer(frames, roimap, int(threads))
        except ImportError as error:
            logging.warning("%s is left out: %s", name, error)
    print(json.dumps(list(rates)), flush=True)
    for line in sys.stdin:
        print(rates[line.strip()](), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
