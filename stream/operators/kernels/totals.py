"""Sums of counts over frames and over pixels, in exact integers.

`alive` (n_pixel,) uint8 is 1 for pixels that count; one that reads more than `limit` leaves for good, that frame
included. Hardly any pixel ever leaves. So what is summed up are the counts; how many pixels and frames are in a sum
follows from how many there would be, less those that left.

`tally` (3, n_bin) int64 is added to per bin (n_pixel,): counts; pixel-frames that did not come, since their pixel left;
pixels that left. Frames come as (n, n_pixel), or as the events of n frames (see `stream.messages.Events`), of which the
kernels do those at pixels begin..end-1.
"""

from typing import Any

import numpy as np

from stream.operators.kernels.jit import kernel

TILE = 4096
"""Pixels whose sums stay in the first cache while frame after frame is read."""
BLOCK = 1 << 16
"""Frames of 16 bit of which 32 bit hold the sum."""


def limit(dtype: str, saturation_value: int | None) -> int:
    """Return the largest value of a dtype that is a count."""
    top = int(np.iinfo(dtype).max)
    return top if saturation_value is None else min(saturation_value, top)


def tile_of_sums(dtype: Any) -> Any:
    """Return room for `over_frames` to sum up `BLOCK` frames of a dtype."""
    return np.empty(TILE, np.uint64 if dtype.itemsize == 4 else np.uint32)


@kernel
def over_frames(
    frames: Any, limit: int, bins: Any, alive: Any, totals: Any, tally: Any, sums: Any, begin: int, end: int
) -> None:
    """Add frames to totals (n_pixel,) int64 and to the tally; sums (TILE,) are uint32, for frames of uint32 uint64."""
    thresholds = np.empty(TILE, frames.dtype)
    n = frames.shape[0]
    for left in range(begin, end, TILE):
        right = min(left + TILE, end)
        alive_tile, totals_tile, bins_tile = alive[left:right], totals[left:right], bins[left:right]
        for p in range(right - left):
            thresholds[p] = limit | (np.int64(alive_tile[p]) - 1)  # those of pixels that left are never passed
        for block in range(0, n, BLOCK):
            sums[:] = 0
            for t in range(block, min(block + BLOCK, n)):
                row = frames[t, left:right]
                above = False
                for p in range(right - left):
                    sums[p] += row[p]
                    above |= row[p] > thresholds[p]
                if above:
                    for p in range(right - left):
                        if row[p] > thresholds[p]:
                            thresholds[p] = limit | -1
                            alive_tile[p] = 0
                            totals_tile[p] += np.int64(sums[p] - row[p])
                            tally[0, bins_tile[p]] += np.int64(sums[p] - row[p])
                            tally[1, bins_tile[p]] += n - t
                            tally[2, bins_tile[p]] += 1
            for p in range(right - left):
                came = np.int64(sums[p]) * np.int64(alive_tile[p])
                totals_tile[p] += came
                tally[0, bins_tile[p]] += came


@kernel
def over_frames_of_events(
    offsets: Any, pixels: Any, counts: Any, limit: int, bins: Any, alive: Any, totals: Any, tally: Any,
    begin: int, end: int,
) -> None:  # fmt: skip
    """Add events to totals (n_pixel,) int64 and to the tally."""
    n = len(offsets) - 1
    for t in range(n):
        first, last = within(pixels, offsets[t], offsets[t + 1], begin, end)
        for event in range(first, last):
            p, count = pixels[event], np.int64(counts[event])
            if count > limit:
                tally[1, bins[p]] += np.int64(alive[p]) * (n - t)
                tally[2, bins[p]] += alive[p]
                alive[p] = 0
            count *= alive[p]
            totals[p] += count
            tally[0, bins[p]] += count


@kernel
def over_pixels(frames: Any, limit: int, alive: Any, sums: Any, left_at: Any, begin: int, end: int) -> None:
    """Add the pixels of each frame to sums (n,) int64, and those that leave in it to left_at (n,) int64."""
    thresholds = np.empty(TILE, frames.dtype)
    masks = np.empty(TILE, frames.dtype)
    for left in range(begin, end, TILE):
        right = min(left + TILE, end)
        alive_tile = alive[left:right]
        for p in range(right - left):
            thresholds[p] = limit | (np.int64(alive_tile[p]) - 1)  # those of pixels that left are never passed
            masks[p] = -np.int64(alive_tile[p])
        for t in range(frames.shape[0]):
            row = frames[t, left:right]
            above = False
            for p in range(right - left):
                above |= row[p] > thresholds[p]
            if above:
                for p in range(right - left):
                    if row[p] > thresholds[p]:
                        thresholds[p], masks[p] = limit | -1, 0
                        alive_tile[p] = 0
                        left_at[t] += 1
            value = np.uint64(0)
            for p in range(right - left):
                value += row[p] & masks[p]
            sums[t] += np.int64(value)


@kernel
def over_pixels_of_events(
    offsets: Any, pixels: Any, counts: Any, limit: int, alive: Any, sums: Any, left_at: Any, begin: int, end: int
) -> None:
    """Add the events of each frame to sums (n,) int64, and the pixels that leave in it to left_at (n,) int64."""
    for t in range(len(offsets) - 1):
        first, last = within(pixels, offsets[t], offsets[t + 1], begin, end)
        value = np.int64(0)
        for event in range(first, last):
            p, count = pixels[event], np.int64(counts[event])
            if count > limit:
                left_at[t] += alive[p]
                alive[p] = 0
            value += count * alive[p]
        sums[t] += value


@kernel
def within(pixels: Any, first: int, last: int, begin: int, end: int) -> Any:
    """Return which of the events first..last-1 of one frame are at pixels begin..end-1."""
    return (
        first + np.searchsorted(pixels[first:last], begin),
        first + np.searchsorted(pixels[first:last], end),
    )
