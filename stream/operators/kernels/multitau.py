"""Multi-tau correlation of frames as they come, in exact integer arithmetic.

Level l works on coarse frames: sums of 2**l neighbours, aligned at frame 0. With d delays per level, level 0 has the
delays 1..2d, level l >= 1 has d+1..2d in units of its coarse frames (boost_corr and xpcs-eigen; K. Schatzel, Quantum
Opt. 2, 287 (1990)). A block of frames goes through all levels, strip by strip (see `layout`):

    frames      rows of level 0     rows of level 1     rows of level 2
    ....#....   [ 2d old | new ] -> [ 2d old | new ] -> [ 2d old | new ] -> ...
    ....#....          |                   |                   |
    ....#....       products            products            products      per pixel, then added up per bin
    ....#....          |                   |                   |
                       +---- 2d rows (d+1 above level 0) go back to the state

Each lane of a row holds the counts of two frames, its own and the next, so that one instruction forms two products of a
pixel. That is exact while the sums stay below 2**31 (`narrow`); a strip with higher counts goes on in `broad`.
"""

from typing import Any

import numpy as np

from stream.operators.kernels import broad, narrow, sparse
from stream.operators.kernels.jit import inlined, kernel, part
from stream.operators.kernels.lanes import add as add_lanes
from stream.operators.kernels.lanes import add_shifted, any_bits, load
from stream.operators.kernels.layout import BLOCK, CHUNK, LANES, MOST, PAD, STRIPS, TILE, place, slots
from stream.operators.kernels.wide import BITS, MASK, add, add_product

NONE = np.int64(0)
"""A number written out in a call would have what is called compiled once more."""


@kernel
def correlate(block: Any, state: Any, begin: int, end: int) -> Any:
    """Fold a block of frames, or a gap, into the tiles begin..end-1.

    Parameters
    ----------
    block
        See `layout`.
    state
        See `space`; updated.

    Returns
    -------
    top : int64
        The bits of all counts.
    n_left : int64
        Pixels that left, since they read more than the limit.
    bound : float64
        No more than LANES times this was added to any of `sums.narrow`.
    """
    space = state.space
    space.tally[0] = space.tally[1] = 0
    space.bound[0] = 0
    nothing = np.zeros(0, np.uint64)
    for tile in range(begin, end):
        by_row(block, NONE, len(block.addresses), state, tile, nothing)
    return space.tally[0], space.tally[1], space.bound[0]


@kernel
def correlate_events(block: Any, state: Any, begin: int, end: int) -> Any:
    """Do the same where the frames are events."""
    space = state.space
    space.tally[0] = space.tally[1] = 0
    space.bound[0] = 0
    n = len(block.addresses)
    first, last = sparse.edges(block, state.region, begin, end)
    if sparse.are_many((last - first).sum(), end - begin, n):
        photons = np.empty(TILE * n, np.uint64)
        for tile in range(begin, end):
            found = photons[: sparse.gather(block, state.region, tile, first, photons)]
            by_row(block, NONE, n, state, tile, found)
    else:
        photons, starts = sparse.sort(block, state.region, begin, end, first, last)
        for tile in range(begin, end):
            found = photons[starts[tile - begin] : starts[tile - begin + 1]]
            by_photon(block, state, tile, found)
    return space.tally[0], space.tally[1], space.bound[0]


@part
def by_row(block: Any, start: Any, stop: int, state: Any, tile: int, found: Any) -> None:
    """Take the frames start..stop-1 of a block through all levels of a tile, row by row.

    If they are events, the photons of the tile are `found` (see `sparse.sort`).
    """
    region, space = state.region, state.space
    d = block.delays_per_level
    while start < stop:
        until = min(stop, start + BLOCK)
        is_above = take(block, start, until, region, tile, found, space)
        if is_above:
            if len(block.lengths):
                until = sparse.first_above(found, start, until, region, tile, block.limit)
            else:
                until = narrow.first_above(block, start, until, region, tile)
            take(block, start, until, region, tile, found, space)
        for strip in range(STRIPS if start < until else 0):
            bits = any_bits(load(space.bits, strip * LANES))
            space.tally[0] |= bits
            narrow.pack(space.taken, strip * BLOCK * LANES, until - start, space.fine, (PAD + 2 * d) * LANES)
            levels(block, start, until, NONE, until - start, bits, state, tile * STRIPS + strip)
        if is_above:
            space.tally[1] += leave(block, until, region, state.history, tile, space.fine)
        start = until


@part
def take(block: Any, start: int, stop: int, region: Any, tile: int, found: Any, space: Any) -> Any:
    """Take frames start..stop-1 of a block into the work space; return whether a pixel is above the limit."""
    if len(block.lengths):
        return sparse.scatter(found, start, stop, region, tile, block.limit, space.taken, space.bits)
    return narrow.take(block, start, stop, region, tile, space.taken, space.bits)


@part
def by_photon(block: Any, state: Any, tile: int, found: Any) -> None:
    """Take the photons found in a tile through all levels, one by one through the low levels if there are few."""
    region, history, space = state.region, state.history, state.space
    n = len(block.addresses)
    top = sparse.choose(block, len(found), history, tile)
    begin, end = sparse.inner(block, top) if top else (n, n)
    by_row(block, NONE, begin, state, tile, found)
    if top:
        most = sparse.take(found, begin, end, region, tile, block.limit, space.photons)
        if most > sparse.BRIGHTEST or not sparse.usual(block, top, history, tile):
            end = begin
        else:
            for i in range(STRIPS):
                strip = tile * STRIPS + i
                bits = sparse.fold(block, end - begin, top, i * LANES, history, strip, space)
                levels(block, begin, end, top, end - begin >> top, bits, state, strip)
            space.tally[0] |= most
            space.bound[0] += float(most + sparse.OLD) * max(most, sparse.OLD, 1 << top)
    by_row(block, end, n, state, tile, found)


@part
def levels(block: Any, start: int, stop: int, lowest: Any, n: int, bits: int, state: Any, strip: int) -> None:
    """Take frames start..stop-1 of a block through the levels of a strip from `lowest` on.

    space.fine holds the n new packed rows of that level, above level 0 also the old ones that the level below keeps.
    """
    region, history, sums, space = state.region, state.history, state.sums, state.space
    d = block.delays_per_level
    n_row = 2 * d
    n_kept, n_derived = (n_row, 0) if lowest == 0 else (d + 1, d - 1)
    n_level, n_strip = history.kind.shape
    first = block.first + start
    frames = stop - start if block.span == len(block.addresses) else block.span
    most = max(n, n_row)
    is_narrow = True
    fine, coarse, spare, counts = space.fine, space.coarse, space.spare, space.counts
    oldest, newest = PAD * LANES, (PAD + n_row) * LANES
    for level in range(lowest, n_level):
        old = first >> level
        new = (first + frames >> level) - old
        if new == 0:
            break
        # In a gap only the first coarse frame can hold counts: more than n_row dark ones behind it say nothing new.
        wanted = min(new, most)
        at, kind = place(level, strip, n_strip, d), int(history.kind[level, strip])
        size, top = 0, 0
        if is_narrow:
            if kind < 2 and bits <= narrow.LOW:
                narrow.darken(fine, newest + n * LANES, newest + wanted * LANES + LANES)
                bits |= any_bits(narrow.load_rows(history, at, n_kept, kind, fine, oldest))
                top = narrow.largest(bits)
                size = narrow.piece(top, level, block.full[level], wanted)
            if size == 0:
                is_narrow = False
                broad.widen(fine, oldest, n_row - n_derived, n_row + n, counts[0])
                if level == 0 and bits > narrow.LOW:
                    broad.take(block, start, n, region, strip, fine, counts[0], n_row)
        if not is_narrow:
            broad.darken(counts[0], n_row + n, n_row + wanted)
        n = wanted
        lead, odd = old - (block.first >> level), old & 1
        row, last = min(new, n_row + n - 1), n_row + n - 1
        if is_narrow:
            if top:
                correlate_narrow(block, level, lead, fine, n, size, region, strip, sums, space.chunks)
                space.bound[0] += float(top) * float(max(top, 1 << level)) * n
            saved = narrow.save_rows(history, at, n_kept, fine, oldest + row * LANES, oldest + last * LANES)
            bits = narrow.next_level(fine, coarse, oldest, newest, d, odd, n)
            fine, coarse, spare = coarse, spare, coarse
        else:
            broad.load_rows(history, at, n_kept, kind, counts[0])
            correlate_broad(block, level, lead, counts, n, region, strip, sums.wide)
            saved = broad.save_rows(history, at, n_kept, counts[0], row, last)
            broad.next_level(counts, n_row, d, odd, n)
        history.kind[level, strip] = saved
        n, n_kept, n_derived = (n + odd) // 2, d + 1, d - 1
    collect(space.chunks, region, strip, sums)


@inlined
def correlate_narrow(
    block: Any,
    level: int,
    lead: int,
    rows: Any,
    n: int,
    size: int,
    region: Any,
    strip: int,
    sums: Any,
    chunks: Any,
) -> None:
    """Form the products of n new packed rows of a level, `size` of them at a time; `lead` is the first one's number."""
    d = block.delays_per_level
    slot = (0 if level == 0 else level + 1) * slots(d)
    full = block.full[level]
    for k in range(0 if level == 0 else d, 2 * d, d):
        for delay in range(k, k + d, CHUNK):
            for begin in range(0, n, size):
                m = min(size, n - begin)
                at = (PAD + 2 * d + begin) * LANES
                if chunks.n[0] == MOST:
                    collect(chunks, region, strip, sums)
                into = chunks.n[0] * LANES * LANES
                if full:
                    narrow.full_products(rows, at, m, delay, chunks.sums, into)
                else:
                    first = PAD + 2 * d + lead + begin
                    narrow.weighted_products(rows, at, m, delay, block.pairs[level], first, chunks.sums, into)
                chunks.slot[chunks.n[0]] = slot
                chunks.level[chunks.n[0]] = level if full else 0
                chunks.n[0] += 1
            slot += LANES


@inlined
def collect(chunks: Any, region: Any, strip: int, sums: Any) -> None:
    """Add what the chunks hold to the bins."""
    n_slot = sums.wide.shape[2]
    for run in range(region.runs[strip], region.runs[strip + 1]):
        begin, end = region.begin[run] * LANES, region.end[run] * LANES
        into = region.bin[run] * n_slot
        for chunk in range(chunks.n[0]):
            base = chunk * LANES * LANES
            total = load(chunks.sums, base + begin)
            for at in range(base + begin + LANES, base + end, LANES):
                total = add_lanes(total, load(chunks.sums, at))
            add_shifted(total, load(chunks.shifts, chunks.level[chunk] * LANES), sums.narrow, into + chunks.slot[chunk])
    chunks.n[0] = 0


@part
def correlate_broad(block: Any, level: int, lead: int, counts: Any, n: int, region: Any, strip: int, wide: Any) -> None:
    """Add the products of n new rows of a level, one delay after the other."""
    d = block.delays_per_level
    weights = block.weights[level, lead:]
    for group in range(0 if level == 0 else level + 1, level + 2):
        for j in range(d):
            k = (d if group else 0) + j + 1
            slot = group * slots(d) + j // CHUNK * LANES + j % CHUNK
            broad.products(counts[0], counts[2], 2 * d, n, k, weights, region, strip, wide, slot)


@part
def leave(block: Any, t: int, region: Any, history: Any, tile: int, row: Any) -> Any:
    """Let go of the pixels of a tile that are above the limit in frame t of the block; return how many there are.

    Their counts go out of the state: none of them is in a pair that is not complete.
    """
    n = 0
    for strip in range(tile * STRIPS, (tile + 1) * STRIPS):
        narrow.fetch(block, t, region, strip, row)
        for lane in range(LANES):
            if np.int64(row[lane]) & 0xFFFFFFFF > block.limit:
                n += 1
                region.live[strip * LANES + lane] = 0
                region.left[strip * LANES + lane] = t + 1
                forget(history, block.delays_per_level, strip, lane)
    return n


@part
def forget(history: Any, delays_per_level: int, strip: int, lane: int) -> None:
    """Set the counts of a pixel to zero."""
    n_level, n_strip = history.kind.shape
    for level in range(n_level):
        at = place(level, strip, n_strip, delays_per_level) + lane
        for row in range(2 * delays_per_level if level == 0 else delays_per_level + 1):
            history.low[at + row * LANES] = 0
            if history.kind[level, strip] > 0:
                history.middle[at + row * LANES] = 0
            if history.kind[level, strip] > 1:
                history.high[at + row * LANES] = 0


@kernel
def weigh(came: Any, first: int, span: int, last: Any, totals: Any) -> Any:
    """Follow how many frames came in each coarse frame, over a block of frames.

    Parameters
    ----------
    came : (n,) uint8
        1 for each frame that came; of a gap longer than `BLOCK`, its first 2d frames, none of which came.
    first, span : int
        The first frame, and how many there are.
    last : (n_level, 2d) int64
        Weights of the last coarse frames of every level; updated.
    totals : (n_level, 2d) int64
        Sum of w(i) w(i+k) for k = 1..2d; updated.

    Returns
    -------
    weights, pairs, full
        See `layout.Block`.
    """
    n_level, n_row = last.shape
    n = len(came)
    most = max(n, n_row)
    weights = np.zeros((n_level, n_row + most + 1), np.int64)
    pairs = np.zeros((n_level, PAD + n_row + most), np.int32)
    full = np.zeros(n_level, np.bool_)
    for t in range(n):
        weights[0, n_row + t] = came[t]
    for level in range(n_level):
        old = first >> level
        new = (first + span >> level) - old
        if new == 0:
            break
        n = min(new, most)
        w = weights[level]
        for row in range(n_row):
            w[row] = last[level, row]
        full[level] = True
        for row in range(n_row + n):
            full[level] &= w[row] == 1 << level
        for row in range(n_row + most):
            pairs[level, PAD + row] = w[row] & 0xFFFF | w[row + 1] << 16
        for t in range(n_row, n_row + n):
            for k in range(1, n_row + 1):
                totals[level, k - 1] += w[t] * w[t - k]
        for row in range(n_row):
            last[level, row] = w[min(row + new, n_row + n - 1)]
        if level + 1 < n_level:
            odd = old & 1
            n = (n + odd) // 2
            for t in range(n):
                i = n_row + 2 * t - odd
                weights[level + 1, n_row + t] = w[i] + w[i + 1]
    return weights, pairs, full


@kernel
def settle(narrow_sums: Any, wide: Any) -> None:
    """Move what stands in narrow (n_bin * n_slot,) into wide (2, n_bin, n_slot)."""
    _, n_bin, n_slot = wide.shape
    for b in range(n_bin):
        for slot in range(n_slot):
            value = narrow_sums[b * n_slot + slot]
            wide[0, b, slot] += value >> BITS
            add(wide, b, slot, value & MASK)
            narrow_sums[b * n_slot + slot] = 0


@kernel
def outer(pairs: Any, alive: Any, product: Any) -> None:
    """Add pairs (n_delay,) times alive (n_bin,) to the wide product (2, n_delay, n_bin)."""
    for delay in range(len(pairs)):
        for b in range(len(alive)):
            add_product(product, delay, b, pairs[delay], alive[b])


@kernel
def pool(sums: Any, group: Any, pooled: Any) -> None:
    """Add up wide sums (2, n_delay, n_bin) of the bins of a group into pooled (2, n_delay, n_group)."""
    for delay in range(sums.shape[1]):
        for b in range(sums.shape[2]):
            pooled[0, delay, group[b]] += sums[0, delay, b]
            add(pooled, delay, group[b], sums[1, delay, b])
