"""Poisson counts on a detector, and rings around a beam in its centre."""

import numpy as np
from numpy.typing import NDArray

from stream.messages import Events
from stream.operators.qmap import ring_map
from stream.operators.roimap import RoiMap

Shape = tuple[int, int]
EIGER2_500K: Shape = (512, 1024)
EIGER2_4M: Shape = (2167, 2070)
N_STATIC = 320
N_DYNAMIC = 8


def rings(shape: Shape, *, first_row: int = 0) -> RoiMap:
    """Return a map of 320 static rings in 8 dynamic ones; rows before `first_row` are masked."""
    mask = np.ones(shape, np.bool_)
    mask[:first_row] = False
    rows, columns = shape
    return ring_map(
        shape=shape, beam_center_x=columns / 2, beam_center_y=rows / 2, detector_distance=5, pixel_size=75e-6,
        incident_energy=10, mask=mask, n_static=N_STATIC, n_dynamic=N_DYNAMIC,
    )  # fmt: skip


def poisson(shape: Shape, n: int, mean: float) -> NDArray[np.uint16]:
    """Return n frames, (n, *shape)."""
    rng = np.random.default_rng(0)
    frames = np.empty((n, *shape), "<u2")
    for frame in frames:  # one by one: the generator gives int64
        frame[:] = rng.poisson(mean, shape)
    return frames


def photons(shape: Shape, n: int, mean: float) -> Events:
    """Return n frames of few photons; the cost is that of the photons, not of the pixels."""
    rng = np.random.default_rng(0)
    n_pixel = shape[0] * shape[1]
    frames = [
        np.unique(rng.integers(0, n_pixel, rng.poisson(mean * n_pixel), np.uint32), return_counts=True)
        for _ in range(n)
    ]
    return Events(
        shape=(n, *shape),
        offsets=np.cumsum([0, *(len(pixels) for pixels, _ in frames)]),
        pixels=np.concatenate([pixels for pixels, _ in frames]),
        counts=np.concatenate([counts for _, counts in frames]).astype("<u2"),
    )
