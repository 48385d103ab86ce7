"""How many pixel-frames per second are correlated, against plain numpy and against reading the same bytes."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bench.measure import Figure, compare, pairs, seconds
from stream.messages import FrameBatch, RunStart
from stream.operators.multitau import MultiTau
from stream.operators.qmap import ring_map
from stream.operators.roimap import RoiMap

SHAPE = (512, 1024)
BATCH = 64
BATCHES = 8
NUMPY_FRAMES = 16
ROUNDS = 5


def figures() -> Iterator[Figure]:
    """Correlate Poisson counts (mean 1, uint16) in 320 static bins, from memory, in batches of 64 frames."""
    roimap = ring_map(
        shape=SHAPE, beam_center_x=512, beam_center_y=256, detector_distance=5, pixel_size=75e-6,
        incident_energy=10, mask=None, n_static=320, n_dynamic=8,
    )  # fmt: skip
    frames = np.random.default_rng(0).poisson(1, (BATCH, *SHAPE)).astype("<u2")
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        ours = _Ours(frames, roimap, threads)
        name = f"multi-tau, {threads} thread{'s' * (threads > 1)}"
        measured = pairs(ours.rate, lambda: _numpy_rate(frames[:NUMPY_FRAMES], roimap), ROUNDS)
        yield compare(name, "pixel-frames/s", "plain numpy multi-tau, 1 thread", measured, target=4)
        measured = pairs(ours.rate, lambda: _read_rate(frames, threads), ROUNDS)  # noqa: B023 - called at once
        yield compare(
            name,
            "pixel-frames/s",
            f"reading the same bytes, {threads} thread{'s' * (threads > 1)}",
            measured,
            target=0.02,
        )


class _Ours:
    """One run that goes on and on, as at a beamline: most batches reach the higher levels."""

    def __init__(self, frames: NDArray[np.uint16], roimap: RoiMap, threads: int) -> None:
        start = RunStart(
            run="bench", shape=SHAPE, dtype="<u2", saturation_value=65534, frame_time=1e-3, count_time=1e-3
        )
        self._operator = MultiTau(start, roimap, threads=threads)
        self._frames = frames

    def rate(self) -> float:
        return BATCHES * self._frames.size / seconds(self._push)

    def _push(self) -> None:
        for _ in range(BATCHES):
            first = self._operator.n_frames
            self._operator.push(FrameBatch(run="bench", first=first, frames=self._frames, timestamp_ns=0))


def _numpy_rate(frames: NDArray[np.uint16], roimap: RoiMap) -> float:
    return frames.size / seconds(lambda: numpy_multitau(frames, roimap))


def numpy_multitau(frames: NDArray[np.uint16], roimap: RoiMap, *, d: int = 4, levels: int = 4) -> NDArray[np.float64]:
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


@njit(nogil=True, cache=True)
def _read(words: Any) -> Any:
    total = np.uint64(0)
    for word in words:
        total ^= word
    return total


def _read_rate(frames: NDArray[np.uint16], threads: int) -> float:
    words = np.array_split(frames.reshape(-1).view(np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return BATCHES * frames.size / seconds(lambda: [list(pool.map(_read, words)) for _ in range(BATCHES)])
