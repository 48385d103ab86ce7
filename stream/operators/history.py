"""The state of multi-tau in memory and in a snapshot: the last coarse frames of every pixel, see `layout`."""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.messages import Arrays
from stream.operators.kernels.layout import History, place

COUNT_BITS = 48
"""Bits of a coarse count."""


def empty_planes(n_strip: int, delays_per_level: int, n_level: int) -> History:
    """Return the planes of all levels. They take memory as strips and levels come to need it."""
    size = place(n_level, 0, n_strip, delays_per_level)
    return History(
        low=_untouched(size, np.uint8),
        middle=_untouched(size, np.uint8),
        high=_untouched(size, np.uint32),
        kind=np.zeros((n_level, n_strip), np.uint8),
    )


def _untouched(size: int, dtype: Any) -> NDArray[Any]:
    """Return zeros that take memory page by page as they are written to; numpy's own come in huge pages."""
    memory = mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize))
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, size)


def saved_planes(history: History, delays_per_level: int, n_level: int) -> Arrays:
    """Return a copy of the first levels: `low`, and of `middle` and `high` only the strips that use them."""
    kind = history.kind[:n_level]
    size = place(n_level, 0, kind.shape[1], delays_per_level) if n_level else 0
    used: dict[str, list[NDArray[Any]]] = {"middle": [], "high": []}
    for level in range(n_level):
        for least, (name, strips) in enumerate(used.items(), 1):
            strips.append(_strips(getattr(history, name), level, delays_per_level, kind)[kind[level] >= least].ravel())
    return {
        "kind": kind.copy(),
        "low": history.low[:size].copy(),
        "middle": np.concatenate([np.zeros(0, np.uint8), *used["middle"]]),
        "high": np.concatenate([np.zeros(0, np.uint32), *used["high"]]),
    }


def restore_planes(history: History, delays_per_level: int, state: Arrays) -> None:
    """Take over such a copy."""
    kind = state["kind"]
    history.kind[:] = 0
    history.kind[: len(kind)] = kind
    history.low[: len(state["low"])] = state["low"]
    history.low[len(state["low"]) :] = 0
    for least, name in enumerate(("middle", "high"), 1):
        begin = 0
        for level in range(len(kind)):
            strips = _strips(getattr(history, name), level, delays_per_level, kind)
            used = kind[level] >= least
            end = begin + np.count_nonzero(used) * strips.shape[1]
            strips[used] = state[name][begin:end].reshape(-1, strips.shape[1])
            begin = end


def _strips(plane: NDArray[Any], level: int, delays_per_level: int, kind: NDArray[np.uint8]) -> NDArray[Any]:
    """Return the rows of a level, (n_strip, row * LANES)."""
    n_strip = kind.shape[1]
    begin, end = (place(each, 0, n_strip, delays_per_level) for each in (level, level + 1))
    return plane[begin:end].reshape(n_strip, -1)
