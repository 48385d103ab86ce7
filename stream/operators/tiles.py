"""The pixels of a map in tiles, and kernels run over them on several threads.

The kernels release the GIL, so plain threads do: no threading layer of numba's is involved, which could not be entered
from two pipelines at once.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from stream.operators.kernels.multitau import TILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Runs of `TILE` neighbouring pixels that hold at least one pixel of the map."""

    first: NDArray[np.int64]
    """(n_tile,) first pixel of each."""
    live: NDArray[np.uint8]
    """(n_tile, TILE) 1 where a pixel is in the map. A pixel that leaves the map later is set to 0."""
    bins: NDArray[np.int64]
    """(n_tile, TILE) bin of each pixel, from 0; for pixels outside that of the pixel before, which keeps runs long."""

    @classmethod
    def of(cls, static_roi_map: NDArray[np.int32]) -> Self:
        """Cut a map (rows, cols), 0 outside and bins from 1, into tiles."""
        flat = np.zeros(-(-static_roi_map.size // TILE) * TILE, np.int64)
        flat[: static_roi_map.size] = static_roi_map.ravel()
        rows = flat.reshape(-1, TILE)
        used = np.flatnonzero(rows.any(axis=1))
        bins = rows[used]
        inside = bins > 0
        last_inside = np.maximum.accumulate(np.where(inside, np.arange(TILE), 0), axis=1)
        filled = np.take_along_axis(bins, last_inside, axis=1)
        return cls(first=used * TILE, live=inside.astype(np.uint8), bins=np.maximum(filled - 1, 0))


def flat(frames: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Return frames (n, rows, cols) as (n, n_pixel), read-only: numba compiles for writable arrays once more."""
    rows = frames.reshape(len(frames), math.prod(frames.shape[1:])).view()
    rows.flags.writeable = False
    return rows


class Threads:
    """Runs a kernel over slices of a range, one slice per thread."""

    def __init__(self, n: int | None) -> None:
        self.n = n if n is not None else len(os.sched_getaffinity(0))
        if self.n < 1:
            raise ValueError(f"threads: {self.n} is not a number of threads")
        self._pool = ThreadPoolExecutor(self.n, "kernel") if self.n > 1 else None

    def run(self, slice_kernel: Callable[[int, int, int], int | None], total: int) -> list[int | None]:
        """Call ``slice_kernel(part, begin, end)`` for `n` slices that cover range(total); return what they return."""
        edges = [total * part // self.n for part in range(self.n + 1)]
        slices = [(part, edges[part], edges[part + 1]) for part in range(self.n) if edges[part] < edges[part + 1]]
        if self._pool is None or len(slices) == 1:
            return [slice_kernel(*s) for s in slices]
        return [future.result() for future in [self._pool.submit(slice_kernel, *s) for s in slices]]
