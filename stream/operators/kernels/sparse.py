"""Multi-tau of frames of few photons: the low levels by pairs of photons, the others by rows as `multitau` does.

Below level `top` a coarse frame is mostly dark, so that it costs less to look, for each photon of a pixel, at those
before it. From `top` on the coarse frames have filled. A span of frames is cut so that it begins and ends with a coarse
frame of that level:

        span
    old |  .   ..     .    . |      photons of a pixel
    ----+--------------------+
    old rows   pairs with old rows, and of photons       levels 0..top-1
        |  photons, coarse   |      ordinary rows        levels top...

What comes out is the same sums and the same state, bit for bit.
"""

from typing import Any

import numpy as np

from stream.operators.kernels import narrow
from stream.operators.kernels.events import count_of, pixel_of, seek
from stream.operators.kernels.jit import inlined, kernel, part
from stream.operators.kernels.lanes import (
    add,
    any_bits,
    both,
    either,
    left,
    load,
    prefetch,
    splat,
    store,
    subtract,
    transpose,
)
from stream.operators.kernels.layout import (
    BLOCK,
    CACHE_LINE,
    CHUNK,
    HIGHEST,
    LANES,
    MOST,
    PAD,
    ROOM,
    STRIPS,
    TILE,
    place,
    slots,
)

LOWEST = 4
"""The least that `top` may be; the most is `HIGHEST`."""

SPARSEST = 44
"""Pixels and frames per photon from which on photons are looked at one by one."""

BRIGHTEST = (1 << 13) - 1
"""Counts at most of a pixel in a block: products of their sums then stay in 32 bits."""

OLD = 1 << 15
"""More than the counts that `usual` lets the old rows of a pixel have together."""

U = np.uint64
FRAME, PIXEL, COUNT = U(48), U(32), U((1 << 32) - 1)
"""A photon is one number: where the frame in the block, the pixel in the tile, and its counts stand in it."""


@kernel
def edges(block: Any, region: Any, begin: int, end: int) -> Any:
    """Return which events of each frame may be in tiles begin..end-1: the first, and one past the last."""
    n = len(block.addresses)
    first, last = np.empty(n, np.int64), np.empty(n, np.int64)
    n_pixel = region.first[len(region.first) - 1] + TILE
    for t in range(n):
        first[t] = seek(block, t, region.first[begin], n_pixel)
        last[t] = seek(block, t, region.first[end - 1] + TILE, n_pixel)
    return first, last


@part
def are_many(n: int, n_tile: int, n_frames: int) -> Any:
    """Tell whether n photons are better taken as rows."""
    return n * SPARSEST > n_tile * TILE * n_frames


@part
def gather(block: Any, region: Any, tile: int, cursor: Any, found: Any) -> Any:
    """Put the photons of a tile in `found`, in order of time, and return how many there are.

    Those of frame t are at event cursor[t] or behind it; it is moved behind them.
    """
    n: Any = 0
    begin = region.first[tile]
    for t in range(len(cursor)):
        event, last = cursor[t], block.lengths[t]
        while event < last and pixel_of(block, t, event) < begin:
            event += 1
        while event < last and pixel_of(block, t, event) < begin + TILE:
            found[n] = photon(block, begin, t, event)
            n += 1
            event += 1
        cursor[t] = event
        # Where the next tile will go on in this frame.
        for line in range(event, event + TILE // 8, CACHE_LINE // 4):
            prefetch(block.pixels[t] + line * 4)
            prefetch(block.counts[t] + line * block.itemsize)
    return n


@inlined
def photon(block: Any, begin: int, t: int, event: int) -> Any:
    """Return an event of frame t as a photon of the tile that begins at a pixel."""
    return U(t) << FRAME | U(pixel_of(block, t, event) - begin) << PIXEL | U(count_of(block, t, event))


@kernel
def sort(block: Any, region: Any, begin: int, end: int, first: Any, last: Any) -> Any:
    """Return the photons of tiles begin..end-1, tile by tile in order of time, and where those of each begin.

    Those of frame t are among the events first[t]..last[t]-1.
    """
    starts = np.zeros(end - begin + 2, np.int64)
    for t in range(len(first)):
        for event in range(first[t], last[t]):
            tile = region.tile[pixel_of(block, t, event) // TILE] - begin
            if 0 <= tile < end - begin:
                starts[tile + 2] += 1
    for tile in range(end - begin):
        starts[tile + 2] += starts[tile + 1]
    found = np.empty(starts[end - begin + 1], U)
    for t in range(len(first)):
        for event in range(first[t], last[t]):
            tile = region.tile[pixel_of(block, t, event) // TILE] - begin
            if 0 <= tile < end - begin:
                found[starts[tile + 1]] = photon(block, region.first[begin + tile], t, event)
                starts[tile + 1] += 1
    return found, starts


@part
def since(found: Any, t: int) -> Any:
    """Return the first of photons in order of time that is not before frame t."""
    low, high = 0, len(found)
    while low < high:
        middle = (low + high) // 2
        if found[middle] < U(t) << FRAME:
            low = middle + 1
        else:
            high = middle
    return low


@part
def scatter(found: Any, start: int, stop: int, region: Any, tile: int, limit: int, taken: Any, bits: Any) -> Any:
    """Do what `narrow.take` does, with the photons found in a tile."""
    for strip in range(STRIPS):
        for t in range(stop - start):
            store(splat(0), taken, (strip * BLOCK + t) * LANES)
    first, last = since(found, start), since(found, stop)
    top: Any = np.int64(0)
    for i in range(first, last):
        p = np.int64(found[i] >> PIXEL & U(0xFFFF))
        count = np.int64(found[i] & COUNT) * region.live[tile * TILE + p]
        row = np.int64(found[i] >> FRAME) - start
        taken[(p // LANES * BLOCK + row) * LANES + p % LANES] = count
        top = max(top, count)
    for strip in range(STRIPS):
        every = splat(0)
        for t in range(stop - start):
            every = either(every, load(taken, (strip * BLOCK + t) * LANES))
        store(every, bits, strip * LANES)
    for i in range(first, last if top > narrow.LOW else first):
        p = np.int64(found[i] >> PIXEL & U(0xFFFF))
        bits[p] |= np.int64(found[i] & COUNT) * region.live[tile * TILE + p]
    return top > limit


@part
def first_above(found: Any, start: int, stop: int, region: Any, tile: int, limit: int) -> Any:
    """Return the first of the frames start..stop-1 in which a pixel is above the limit."""
    for i in range(since(found, start), since(found, stop)):
        if np.int64(found[i] & COUNT) > limit and region.live[U(tile * TILE) + (found[i] >> PIXEL & U(0xFFFF))]:
            return np.int64(found[i] >> FRAME)
    return stop


@part
def take(found: Any, begin: int, end: int, region: Any, tile: int, limit: int, seen: Any) -> Any:
    """Take the photons of a tile in frames begin..end-1 from those `found`, pixel by pixel.

    Returns the counts of the brightest pixel; more than `BRIGHTEST` if they cannot be taken.
    """
    first, last = since(found, begin), since(found, end)
    if last - first > ROOM:
        return BRIGHTEST + 1
    for p in range(TILE):
        seen.begin[p + 1] = U(0)
        seen.total[p] = 0
    seen.begin[0] = U(0)
    for i in range(first, last):
        p = found[i] >> PIXEL & U(0xFFFF)
        count = np.int64(found[i] & COUNT)
        if region.live[U(tile * TILE) + p]:
            if count > min(BRIGHTEST, limit):
                return BRIGHTEST + 1
            seen.begin[p + U(1)] += U(1)
            seen.total[p] += count
    most: Any = 0
    for p in range(TILE):
        seen.begin[p + 1] += seen.begin[p]
        most = max(most, seen.total[p])
    for i in range(first, last):
        p = found[i] >> PIXEL & U(0xFFFF)
        if region.live[U(tile * TILE) + p]:
            to = seen.begin[p]
            seen.frame[to], seen.counts[to] = (found[i] >> FRAME) - U(begin), found[i] & COUNT
            seen.begin[p] = to + U(1)
    for p in range(TILE, 0, -1):
        seen.begin[p] = seen.begin[p - 1]
    seen.begin[0] = U(0)
    return most


@part
def choose(block: Any, n: int, history: Any, tile: int) -> Any:
    """Return `top` for n photons of a tile in a block; 0 if they are better taken as rows."""
    d, n_frames = block.delays_per_level, len(block.addresses)
    if are_many(n, 1, n_frames):
        return 0
    top = LOWEST
    while top < HIGHEST and n << top + 3 <= TILE * n_frames:
        top += 1
    while top >= LOWEST:
        begin, end = inner(block, top)
        fits = end - begin >= 2 * d << top - 1 and end - begin <= BLOCK << top and top <= history.kind.shape[0]
        if fits and (top + 1) * slots(d) <= MOST * LANES and usual(block, top, history, tile):
            return top
        top -= 1
    return 0


@inlined
def inner(block: Any, top: int) -> Any:
    """Return begin and end of the part of a block that consists of whole coarse frames of a level."""
    n, size = len(block.addresses), 1 << top
    return -block.first % size, n - (block.first + n) % size


@part
def usual(block: Any, top: int, history: Any, tile: int) -> Any:
    """Tell whether no frame is missing below a level, and all that is kept there of a tile fits into 8 bits."""
    for level in range(top):
        if not block.full[level]:
            return False
        for strip in range(tile * STRIPS, (tile + 1) * STRIPS):
            if history.kind[level, strip]:
                return False
    return True


@part
def fold(block: Any, n: int, top: int, pixel: int, history: Any, strip: int, space: Any) -> Any:
    """Take the photons of a strip in n frames through the levels below `top`; return the bits of the rows of `top`.

    Its first pixel in the tile is `pixel`.
    The rows, old ones and new ones, are left in space.fine as `multitau.levels` wants them, the sums in space.chunks.
    """
    d = block.delays_per_level
    n_row = 2 * d
    n_strip = history.kind.shape[1]
    fine, coarse, ends, chunks, seen = space.fine, space.coarse, space.spare, space.chunks, space.photons
    oldest, newest = PAD * LANES, (PAD + n_row) * LANES
    for level in range(top):
        kept = n_row if level == 0 else d + 1
        at = place(level, strip, n_strip, d)
        store(splat(0), fine, newest)
        narrow.load_rows(history, at, kept, int(history.kind[level, strip]), fine, oldest)
        last_rows(seen, n, level, n_row, pixel, ends)
        history.kind[level, strip] = narrow.save_rows(history, at, kept, ends, 0, (n_row - 1) * LANES)
        begin_chunks(level, d, seen, pixel, fine, newest, ends, chunks)
        old_pairs(level, n_row, seen, pixel, fine, newest, chunks.sums)
        narrow.coarsen(fine, oldest + 2 * LANES, coarse, newest - (d - 1) * LANES, newest)
        fine, coarse = coarse, fine
    horizon = n_row + 1 << top - 1
    pairs(top, horizon, seen.begin, pixel, seen.frame, seen.counts, seen.level, seen.place, chunks.sums)
    return new_rows(n, top, seen, pixel, coarse, fine, newest - (d - 1) * LANES, newest, space.fine)


@inlined
def last_rows(seen: Any, n: int, level: int, n_row: int, pixel: int, ends: Any) -> None:
    """Make the last n_row raw rows of a level from the photons of a strip in n frames."""
    narrow.darken(ends, 0, n_row * LANES)
    begin = n - (n_row << level)
    for lane in range(LANES):
        first, i = seen.begin[pixel + lane], seen.begin[pixel + lane + 1]
        while i > first and seen.frame[i - U(1)] >= begin:
            i -= U(1)
            ends[(seen.frame[i] - begin >> level) * LANES + lane] += seen.counts[i]


@inlined
def begin_chunks(level: int, d: int, seen: Any, pixel: int, fine: Any, newest: int, ends: Any, chunks: Any) -> None:
    """Begin the chunks of a level: the sums of c(t-k) and of c(t) of each pixel, and none of products."""
    zero, low = splat(0), splat(narrow.LOW)
    total = load(seen.total, pixel)
    slot = (0 if level == 0 else level + 1) * slots(d)
    for k in range(0 if level == 0 else d, 2 * d, d):
        for delay in range(k, k + d, CHUNK):
            past = total
            for j in range(1, delay + 1):
                past = earlier(past, fine, newest, ends, 2 * d, j, low)
            one = earlier(past, fine, newest, ends, 2 * d, delay + 1, low)
            two = earlier(one, fine, newest, ends, 2 * d, delay + 2, low)
            three = earlier(two, fine, newest, ends, 2 * d, delay + 3, low)
            four = earlier(three, fine, newest, ends, 2 * d, delay + 4, low)
            into = chunks.n[0]
            transpose(
                (zero, zero, zero, zero, one, two, three, four, total, total, total, total, zero, zero, zero, zero),
                chunks.sums,
                into * LANES * LANES,
            )
            chunks.slot[into], chunks.level[into] = slot, level
            chunks.n[0] += 1
            slot += LANES


@inlined
def earlier(total: Any, fine: Any, newest: int, ends: Any, n_row: int, j: int, low: Any) -> Any:
    """Return a total with the j-th last old row instead of the j-th last new one; there are n_row of each."""
    if j > n_row:
        return total
    return subtract(add(total, both(load(fine, newest - j * LANES), low)), load(ends, (n_row - j) * LANES))


@inlined
def old_pairs(level: int, n_row: int, seen: Any, pixel: int, fine: Any, newest: int, sums: Any) -> None:
    """Add the products of photons with the old rows of a level."""
    for lane in range(LANES):
        i, end = seen.begin[pixel + lane], seen.begin[pixel + lane + 1]
        while i < end and seen.frame[i] >> level < n_row:
            row = np.int64(seen.frame[i] >> level)
            for k in range(row + 1, n_row + 1):
                old = fine[newest + (row - k) * LANES + lane] & narrow.LOW
                sums[seen.place[level, k] + lane * LANES] += seen.counts[i] * old
            i += U(1)


@part
def pairs(
    top: int, horizon: int, begin: Any, pixel: int, frame: Any, count: Any, level: Any, place: Any, sums: Any
) -> None:
    """Add the products of all photons of a pixel on all levels below `top`.

    Unsigned numbers throughout: numba would ask of every signed index whether it counts from the end.
    """
    one = U(1)
    for lane in range(U(LANES)):
        first, end = begin[U(pixel) + lane], begin[U(pixel) + lane + one]
        for i in range(first + one, end):
            later = U(frame[i])
            j: Any = i
            while j > first:
                j -= one
                before = U(frame[j])
                if later - before >= U(horizon):
                    break
                product = count[i] * count[j]
                for at in range(U(level[0, later - before]), min(U(top), U(level[1, later - before]))):
                    sums[U(place[at, (later >> at) - (before >> at)]) + lane * U(LANES)] += product


@inlined
def new_rows(
    n: int, top: int, seen: Any, pixel: int, work: Any, derived: Any, begin: int, newest: int, rows: Any
) -> Any:
    """Make the packed new rows of a level from photons, behind the derived ones; return the bits of both."""
    last = newest + (n >> top) * LANES
    narrow.darken(work, newest, last)
    for lane in range(LANES):
        for i in range(seen.begin[pixel + lane], seen.begin[pixel + lane + 1]):
            work[newest + np.int64(seen.frame[i] >> top) * LANES + lane] += seen.counts[i]
    found = following = splat(0)
    store(following, rows, last)
    for at in range(last - LANES, begin - LANES, -LANES):
        x = load(work, at) if at >= newest else both(load(derived, at), splat(narrow.LOW))
        found = either(found, x)
        store(either(x, left(following, splat(16))), rows, at)
        following = x
    return any_bits(found)
