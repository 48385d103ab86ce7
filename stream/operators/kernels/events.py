"""Frames as events, read where they lie; see `layout.Block`."""

from typing import Any

from stream.operators.kernels.jit import inlined, part
from stream.operators.kernels.lanes import read_u1, read_u2, read_u4


@inlined
def pixel_of(block: Any, t: int, event: int) -> Any:
    """Return the pixel of an event of frame t."""
    return read_u4(block.pixels[t], event)


@inlined
def count_of(block: Any, t: int, event: int) -> Any:
    """Return the count of an event of frame t."""
    if block.itemsize == 1:
        return read_u1(block.counts[t], event)
    if block.itemsize == 2:
        return read_u2(block.counts[t], event)
    return read_u4(block.counts[t], event)


@part
def seek(block: Any, t: int, pixel: int, n_pixel: int) -> Any:
    """Return the first event of frame t that is not before a pixel of n_pixel, begun where it is in even light."""
    low, high = 0, block.lengths[t]
    guess = high * min(pixel, n_pixel) // n_pixel
    step = 8
    while guess > low and pixel_of(block, t, guess - 1) >= pixel:
        high = guess
        guess = max(low, guess - step)
        step *= 2
    low = guess
    step = 8
    while low + step < high and pixel_of(block, t, low + step) < pixel:
        low += step + 1
        step *= 2
    high = min(high, low + step)
    while low < high:
        middle = (low + high) // 2
        if pixel_of(block, t, middle) < pixel:
            low = middle + 1
        else:
            high = middle
    return low
