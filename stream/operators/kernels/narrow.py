"""Rows of a strip as vectors, and sums of products in 32 bits: exact because `piece` says how far they can go.

A packed row has beside each count that of the next row, 16 bits each. Places in `rows` are elements: the next row is
LANES further.
"""

from typing import Any

from stream.operators.kernels.events import count_of, pixel_of, seek
from stream.operators.kernels.jit import inlined, part
from stream.operators.kernels.lanes import (
    LANES,
    above,
    add,
    adds,
    any_bits,
    both,
    dot,
    dots,
    either,
    left,
    load,
    load_u1,
    load_u2,
    load_u4,
    prefetch,
    right,
    splat,
    store,
    subtract,
    transpose,
)
from stream.operators.kernels.layout import BLOCK, CACHE_LINE, STRIPS, TILE

PAIR = 1 << 16
LOW = PAIR - 1

SOON = 6
"""Strips ahead for which the state is fetched."""

SHORTEST = 8
"""Rows below which the sums of a piece are not worth their collection."""


@part
def take(block: Any, start: int, stop: int, region: Any, tile: int, taken: Any, bits: Any) -> Any:
    """Take the low 16 bits of frames start..stop-1 of a block; return whether a pixel is above the limit.

    taken (STRIPS * BLOCK * LANES,) uint16, each strip from its own multiple of BLOCK * LANES on; bits (STRIPS * LANES,)
    become those of each strip.
    """
    limit = splat(block.limit)
    any_above = splat(0)
    for strip in range(STRIPS):
        store(splat(0), bits, strip * LANES)
    for t in range(start, stop):
        ahead(block.addresses[t], (region.first[tile] + TILE) * block.itemsize, TILE * block.itemsize)
        for strip in range(STRIPS):
            x = counts(block, t, region, tile * STRIPS + strip)
            store(either(x, load(bits, strip * LANES)), bits, strip * LANES)
            any_above = either(any_above, above(x, limit))
            store(x, taken, (strip * BLOCK + t - start) * LANES)
    return any_bits(any_above) != 0


@inlined
def counts(block: Any, t: int, region: Any, strip: int) -> Any:
    """Return the counts of a strip in frame t of a block; none for pixels that do not count."""
    address = block.addresses[t]
    pixel = region.first[strip // STRIPS] + strip % STRIPS * LANES
    if address == 0:
        x = splat(0)
    elif block.itemsize == 1:
        x = load_u1(address, pixel)
    elif block.itemsize == 2:
        x = load_u2(address, pixel)
    else:
        x = load_u4(address, pixel)
    return both(x, subtract(splat(0), load(region.live, strip * LANES)))


@inlined
def ahead(address: int, begin: int, size: int) -> None:
    """Have the same row of the next tile fetched while this one is worked on."""
    if address:
        for line in range(begin, begin + size, CACHE_LINE):
            prefetch(address + line)


@part
def fetch(block: Any, t: int, region: Any, strip: int, row: Any) -> None:
    """Store the counts of a strip in frame t of a block, of 32 bits, in row[0:LANES]."""
    if len(block.lengths) == 0:
        store(counts(block, t, region, strip), row, 0)
        return
    store(splat(0), row, 0)
    first = region.first[strip // STRIPS] + strip % STRIPS * LANES
    event = seek(block, t, first, first + LANES)
    while event < block.lengths[t] and pixel_of(block, t, event) < first + LANES:
        lane = pixel_of(block, t, event) - first
        row[lane] = count_of(block, t, event) * region.live[strip * LANES + lane]
        event += 1


@part
def first_above(block: Any, start: int, stop: int, region: Any, tile: int) -> Any:
    """Return the first of the frames start..stop-1 of a block in which a pixel of a tile is above the limit."""
    for t in range(start, stop):
        for strip in range(tile * STRIPS, (tile + 1) * STRIPS):
            if any_bits(above(counts(block, t, region, strip), splat(block.limit))):
                return t
    return stop


@inlined
def darken(rows: Any, begin: int, end: int) -> None:
    """Set rows to zero."""
    for at in range(begin, end, LANES):
        store(splat(0), rows, at)


@inlined
def pack(taken: Any, begin: int, n: int, rows: Any, at: int) -> None:
    """Make packed rows of n raw ones."""
    following = splat(0)
    store(following, rows, at + n * LANES)
    for i in range((n - 1) * LANES, -LANES, -LANES):
        x = load(taken, begin + i)
        store(either(x, left(following, splat(16))), rows, at + i)
        following = x


@inlined
def load_rows(history: Any, place: int, n: int, kind: int, rows: Any, at: int) -> Any:
    """Load n rows of `History` of a kind below 2, packed, before a packed row; return their bits."""
    found = splat(0)
    following = load(rows, at + n * LANES)
    soon = history.low.ctypes.data + place + SOON * n * LANES
    for line in range(soon, soon + n * LANES, CACHE_LINE):
        prefetch(line)
    for i in range((n - 1) * LANES, -LANES, -LANES):
        x = load(history.low, place + i)
        if kind == 1:
            x = either(x, left(load(history.middle, place + i), splat(8)))
        found = either(found, x)
        store(either(x, left(following, splat(16))), rows, at + i)
        following = x
    return found


@inlined
def save_rows(history: Any, place: int, n: int, rows: Any, at: int, last: int) -> Any:
    """Save n packed rows from rows[at] on, or the one at `last` where there are no more; return their kind."""
    found = splat(0)
    for i in range(0, n * LANES, LANES):
        x = both(load(rows, min(at + i, last)), splat(LOW))
        found = either(found, x)
        store(x, history.low, place + i)
    kind = 1 if any_bits(found) >> 8 else 0
    if kind:
        for i in range(0, n * LANES, LANES):
            store(right(both(load(rows, min(at + i, last)), splat(LOW)), splat(8)), history.middle, place + i)
    return kind


@inlined
def coarsen(fine: Any, pair: int, coarse: Any, begin: int, end: int) -> Any:
    """Make packed rows of the next level from packed ones, the first from fine[pair]; return their bits."""
    found = following = splat(0)
    store(following, coarse, end)
    for at in range(end - LANES, begin - LANES, -LANES):
        two = load(fine, pair + 2 * (at - begin))
        x = add(both(two, splat(LOW)), right(two, splat(16)))
        found = either(found, x)
        store(either(x, left(following, splat(16))), coarse, at)
        following = x
    return found


@inlined
def next_level(fine: Any, coarse: Any, oldest: int, newest: int, d: int, odd: int, n: int) -> Any:
    """Make the rows of the next level of the n new ones of this one, and those derived from old ones; as `coarsen`."""
    pair = oldest + (2 - odd) * LANES
    begin, end = newest - (d - 1) * LANES, newest + (n + odd) // 2 * LANES
    return any_bits(coarsen(fine, pair, coarse, begin, end))


@part
def largest(any_bits: int) -> Any:
    """Return the largest number with no more bits."""
    top = 0
    while top < any_bits:
        top = 2 * top + 1
    return top


@part
def piece(top: int, level: int, full: bool, n: int) -> Any:
    """Return of how many rows at a time sums over `LANES` pixels stay below 2**31; 0 if 64 bits are better.

    top is the largest count, n the number of rows. Where frames are missing, weights up to 2**level are factors too.
    """
    factor = max(top, 1 if full else 1 << level)
    if factor >= PAIR // 2 or (top * n) << level >= 1 << 38:
        return 0
    fit = ((1 << 31) - 1) // (LANES * max(1, top) * factor) // 2 * 2
    return n if fit >= n else fit if fit >= SHORTEST else 0


@inlined
def full_products(rows: Any, at: int, n: int, k: int, products: Any, into: int) -> None:
    """Sum over n packed rows from rows[at] on, for delays k+1..k+CHUNK, where no frame is missing.

    Stores LANES sums for each pixel: CHUNK of c(t) c(t-k), then of c(t-k), then of c(t).
    """
    zero, ones, low = splat(0), splat(PAIR + 1), splat(LOW)
    even = odd = (zero, zero, zero, zero)
    later, later_odd = zero, zero
    end = at + n * LANES
    # Two sets of sums, since the next product of one has to wait for the last.
    for t in range(at, end - 2 * LANES, 4 * LANES):
        x = load(rows, t)
        even = dots(even, x, rows, t - (k + 1) * LANES)
        later = dot(later, x, ones)
        y = load(rows, t + 2 * LANES)
        odd = dots(odd, y, rows, t + (1 - k) * LANES)
        later_odd = dot(later_odd, y, ones)
    if n % 4 == 1 or n % 4 == 2:
        x = load(rows, end - (2 - n % 2) * LANES)
        even = dots(even, x, rows, end - (2 - n % 2 + k + 1) * LANES)
        later = dot(later, x, ones)
    sums = adds(even, odd)
    later = add(later, later_odd)
    # What is k rows earlier is the same sum with k rows more at its begin and k fewer at its end.
    earlier = later
    for j in range(1, k + 1):
        earlier = shifted(earlier, rows, at, n, j, low)
    one = shifted(earlier, rows, at, n, k + 1, low)
    two = shifted(one, rows, at, n, k + 2, low)
    three = shifted(two, rows, at, n, k + 3, low)
    four = shifted(three, rows, at, n, k + 4, low)
    transpose((*sums, one, two, three, four, later, later, later, later, zero, zero, zero, zero), products, into)


@inlined
def shifted(total: Any, rows: Any, at: int, n: int, j: int, low: Any) -> Any:
    """Return a total with the j-th row before the begin instead of the j-th before the end."""
    gained, lost = load(rows, at - j * LANES), load(rows, at + (n - j) * LANES)
    return subtract(add(total, both(gained, low)), both(lost, low))


@part
def weighted_products(rows: Any, at: int, n: int, k: int, weights: Any, first: int, products: Any, into: int) -> None:
    """Do the same with weights: c(t) c(t-k), c(t-k) w(t), c(t) w(t-k); weights[first] is that of rows[at]."""
    zero = splat(0)
    sums = (zero, zero, zero, zero)
    past = (zero, zero, zero, zero)
    one, two, three, four = sums
    for t in range(0, n, 2):
        begin = at + t * LANES
        x = load(rows, begin)
        sums = dots(sums, x, rows, begin - (k + 1) * LANES)
        w = weights[first + t] if t + 1 < n else weights[first + t] & LOW
        past = dots(past, splat(w), rows, begin - (k + 1) * LANES)
        one = dot(one, x, splat(weights[first + t - k - 1]))
        two = dot(two, x, splat(weights[first + t - k - 2]))
        three = dot(three, x, splat(weights[first + t - k - 3]))
        four = dot(four, x, splat(weights[first + t - k - 4]))
    transpose((*sums, *past, one, two, three, four, zero, zero, zero, zero), products, into)
