"""The pixels of a map in tiles, and kernels run over them on several threads.

The kernels release the GIL, so plain threads do: no threading layer of numba's is involved, which could not be entered
from two pipelines at once.
"""

import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from stream.operators.kernels.layout import LANES, TILE, Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Runs of `TILE` neighbouring pixels that hold at least one pixel of the map.

    The last one begins before the multiple of `TILE` if the pixels end before it does, and leaves out those that the
    one before holds.
    """

    first: NDArray[np.int64]
    """(n_tile,) first pixel of each."""
    bins: NDArray[np.int32]
    """(n_tile, TILE) bin of each pixel, from 0; -1 where it is not in the map."""

    tile: NDArray[np.int32]
    """(n,) the tile of each `TILE` pixels of a frame; -1 if none of them is in the map."""

    @classmethod
    def of(cls, static_roi_map: NDArray[np.int32]) -> Self:
        """Cut a map (rows, cols), 0 outside and bins from 1, into tiles."""
        flat = np.zeros(-(-static_roi_map.size // TILE) * TILE, np.int32)
        flat[: static_roi_map.size] = static_roi_map.ravel()
        rows = flat.reshape(-1, TILE)
        used = np.flatnonzero(rows.any(axis=1))
        first, bins = used * TILE, rows[used] - 1
        beyond = first[-1] + TILE - max(static_roi_map.size, TILE) if len(used) else 0
        if beyond > 0:
            first[-1] -= beyond
            bins[-1] = np.concatenate([np.full(beyond, -1, np.int32), bins[-1][:-beyond]])
        tile = np.full(len(rows), -1, np.int32)
        tile[used] = np.arange(len(used))
        return cls(first=first, bins=bins, tile=tile)

    def region(self, bins: NDArray[np.int32]) -> Region:
        """Return what the kernels need, with bins (n_tile, TILE) like those of the map."""
        flat = bins.ravel()
        starts = np.ones(len(flat), np.bool_)
        starts[1:] = flat[1:] != flat[:-1]
        starts[::LANES] = True
        begin = np.flatnonzero(starts)
        end = np.append(begin[1:], len(flat))
        inside = flat[begin] >= 0
        begin, end = begin[inside], end[inside]
        return Region(
            first=self.first,
            tile=self.tile,
            live=(flat >= 0).astype(np.uint8),
            left=np.zeros(len(flat), np.uint16),
            runs=np.searchsorted(begin, np.arange(0, len(flat) + 1, LANES)),
            begin=(begin % LANES).astype(np.uint8),
            end=((end - 1) % LANES + 1).astype(np.uint8),
            bin=flat[begin].astype(np.int32),
        )

    def pixels(self) -> NDArray[np.int64]:
        """Return the flat index of the pixel of each column (n_tile * TILE,)."""
        return (self.first[:, None] + np.arange(TILE)).ravel()


def flat(frames: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Return frames (n, rows, cols) as (n, n_pixel), read-only: numba compiles for writable arrays once more."""
    rows = frames.reshape(len(frames), math.prod(frames.shape[1:])).view()
    rows.flags.writeable = False
    return rows


SLICES = 8
"""Slices per thread."""

T = TypeVar("T")


class Threads:
    """Runs a kernel over slices of a range."""

    def __init__(self, n: int | None) -> None:
        self.n = n if n is not None else len(os.sched_getaffinity(0))
        if self.n < 1:
            raise ValueError(f"threads: {self.n} is not a number of threads")
        self._pool = ThreadPoolExecutor(self.n, "kernel") if self.n > 1 else None

    def run(self, slice_kernel: Callable[[int, int, int], T], total: int) -> list[T]:
        """Call ``slice_kernel(thread, begin, end)`` for slices that cover range(total); return what they return.

        There are more slices than threads, which take one after the other: a thread that another process has held up
        does not hold up all.
        """
        n = min(total, self.n * SLICES)
        edges = [total * i // n for i in range(n + 1)] if n else []
        slices = iter(list(itertools.pairwise(edges)))

        def work(thread: int) -> list[T]:
            return [slice_kernel(thread, begin, end) for begin, end in slices]

        if self._pool is None:
            return work(0)
        working = [self._pool.submit(work, thread) for thread in range(self.n)]
        wait(working)  # for all of them, also where one has failed
        return [result for done in working for result in done.result()]
