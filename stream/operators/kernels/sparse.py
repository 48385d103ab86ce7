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

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.operators.kernels import narrow
from stream.operators.kernels.jit import inlined, kernel, part
from stream.operators.kernels.lanes import add, any_bits, both, either, left, load, splat, store, subtract, transpose
from stream.operators.kernels.layout import BLOCK, CHUNK, LANES, MOST, PAD, STRIPS, TILE, place, slots

LOWEST, HIGHEST = 4, 9
"""The levels that `top` may be."""

ROOM = 1 << 16
"""Photons at most of a tile in a block."""

SPARSEST = 24
"""Pixels and frames per photon from which on photons are looked at one by one."""

BRIGHTEST = (1 << 13) - 1
"""Counts at most of a pixel in a block: products of their sums then stay in 32 bits."""

OLD = 1 << 15
"""More than the counts that `usual` lets the old rows of a pixel have together."""

U = np.uint64
FRAME, PIXEL, COUNT = U(48), U(32), U((1 << 32) - 1)
"""A photon is one number: where the frame in the block, the pixel in the tile, and its counts stand in it."""


class Photons(NamedTuple):
    """The photons of a tile in a span of frames, pixel by pixel in order of time."""

    begin: NDArray[np.uint64]
    """(TILE + 1,) first photon of each pixel, and one past the last."""
    frame: NDArray[np.uint32]
    """(ROOM,) from the begin of the span."""
    counts: NDArray[np.uint32]
    """(ROOM,)"""
    total: NDArray[np.int32]
    """(TILE,) counts of each pixel."""
    place: NDArray[np.uint32]
    """(HIGHEST, 2d + 2) where in `Chunks.sums` the sum of a level and delay stands; that of no delay is never read."""
    level: NDArray[np.uint8]
    """(2, 2d * 2**HIGHEST) the lowest level with a delay for a distance in frames, and one past the highest."""


@kernel
def photons(delays_per_level: int) -> Any:
    """Return the working memory of a thread."""
    n_row = 2 * delays_per_level
    chunks = slots(delays_per_level) // LANES
    # Products of no delay go to a spare sum.
    place = np.full((HIGHEST, n_row + 2), LANES - 1, np.uint32)
    level = np.zeros((2, (n_row + 1) << HIGHEST - 1), np.uint8)
    for i in range(HIGHEST):
        for k in range(1 if i == 0 else delays_per_level + 1, n_row + 1):
            group = 0 if i == 0 and k <= delays_per_level else i + 1
            j = (k - 1) % delays_per_level
            place[i, k] = (group * chunks + j // CHUNK) * LANES * LANES + j % CHUNK
    for distance in range(level.shape[1]):
        lowest = 0
        while distance >> lowest > n_row:
            lowest += 1
        end = max(lowest, 1)
        while end < HIGHEST and distance >= delays_per_level << end:
            end += 1
        level[0, distance], level[1, distance] = lowest, end
    integers = np.empty((2, ROOM), np.uint32)
    return Photons(np.zeros(TILE + 1, U), integers[0], integers[1], narrow.aligned(TILE), place, level)


@kernel
def sort(block: Any, region: Any, begin: int, end: int) -> Any:
    """Return the photons of tiles begin..end-1, tile by tile in order of time, and where those of each begin."""
    n = len(block.addresses)
    last = len(region.first) - 1
    cursor, stop = np.empty(n, np.int64), np.empty(n, np.int64)
    n_pixel = region.first[last] + TILE
    seek(block, region.first[begin], n_pixel, cursor)
    seek(block, region.first[end - 1] + TILE, n_pixel, stop)
    starts = np.zeros(end - begin + 2, np.int64)
    for t in range(n):
        for event in range(cursor[t], stop[t]):
            tile = region.tile[block.pixels[event] // TILE] - begin
            if 0 <= tile < end - begin:
                starts[tile + 2] += 1
    for tile in range(end - begin):
        starts[tile + 2] += starts[tile + 1]
    sorted_photons = np.empty(starts[end - begin + 1], U)
    for t in range(n):
        for event in range(cursor[t], stop[t]):
            pixel = block.pixels[event]
            tile = region.tile[pixel // TILE] - begin
            if 0 <= tile < end - begin:
                p = pixel - region.first[begin + tile]
                sorted_photons[starts[tile + 1]] = U(t) << FRAME | U(p) << PIXEL | U(block.counts[event])
                starts[tile + 1] += 1
    return sorted_photons, starts


@part
def seek(block: Any, pixel: int, n_pixel: int, cursor: Any) -> None:
    """Find the first event of each frame that is not before a pixel, beginning where it is in even light."""
    for t in range(len(cursor)):
        low, high = block.offsets[t], block.offsets[t + 1]
        guess = low + (high - low) * pixel // n_pixel
        step = 8
        while guess > low and block.pixels[guess - 1] >= pixel:
            high = guess
            guess = max(low, guess - step)
            step *= 2
        low = guess
        step = 8
        while low + step < high and block.pixels[low + step] < pixel:
            low += step + 1
            step *= 2
        high = min(high, low + step)
        while low < high:
            middle = (low + high) // 2
            if block.pixels[middle] < pixel:
                low = middle + 1
            else:
                high = middle
        cursor[t] = low


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
    for at in range(0, STRIPS * LANES, LANES):
        store(splat(0), bits, at)
    for strip in range(STRIPS):
        for t in range(stop - start):
            store(splat(0), taken, (strip * BLOCK + t) * LANES)
    is_above: Any = False
    for i in range(since(found, start), since(found, stop)):
        p = np.int64(found[i] >> PIXEL & U(0xFFFF))
        count = np.int64(found[i] & COUNT)
        if region.live[tile * TILE + p]:
            row = np.int64(found[i] >> FRAME) - start
            taken[(p // LANES * BLOCK + row) * LANES + p % LANES] = count
            bits[p // LANES * LANES] |= count
            is_above |= count > limit
    return is_above


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
    if n * SPARSEST > TILE * n_frames:
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
def fold(block: Any, n: int, top: int, seen: Any, pixel: int, history: Any, strip: int, space: Any) -> Any:
    """Take the photons of a strip in n frames through the levels below `top`; return the bits of the rows of `top`.

    Its first pixel in the tile is `pixel`.
    The rows, old ones and new ones, are left in space.fine as `multitau.levels` wants them, the sums in space.chunks.
    """
    d = block.delays_per_level
    n_row = 2 * d
    n_strip = history.kind.shape[1]
    fine, coarse, ends, chunks = space.fine, space.coarse, space.spare, space.chunks
    oldest, newest = PAD * LANES, (PAD + n_row) * LANES
    for level in range(top):
        kept = n_row if level == 0 else d + 1
        at = place(level, strip, n_strip, d)
        store(splat(0), fine, newest)
        narrow.load_rows(history, at, kept, 0, fine, oldest)
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
