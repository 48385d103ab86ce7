"""Multi-tau correlation of frames as they come, in exact integer arithmetic.

Level l works on coarse frames: sums of 2**l neighbours, aligned at frame 0. With d delays per level, level 0 has the
delays 1..2d, level l >= 1 has d+1..2d in units of its coarse frames (boost_corr and xpcs-eigen; K. Schatzel, Quantum
Opt. 2, 287 (1990)). Every level keeps its last 2d coarse frames, oldest first; a half complete one needs no memory of
its own, since its first half is the newest one of the level below.

Pixels are worked on in tiles of `TILE` neighbours in memory order, so that a block of frames goes through all levels
while the tile is in cache. Columns are the pixels of those tiles that hold at least one pixel of the map.
"""

from typing import Any

import numpy as np
from numba import njit

from stream.operators.kernels.wide import add, add_product

TILE = 256
"""Pixels worked on together: 17 rows of float32 stay in 32 KiB of L1."""

BLOCK = 128
"""Frames pushed together at most: with them a tile fills about half of an L2 of 512 KiB."""

# A sum of products of integers in floating point is exact as long as it stays under these.
EXACT_32 = 2.0**24
EXACT_64 = 2.0**53


@njit(nogil=True, cache=True)
def first_above(frames: Any, limit: int, tiles: Any, live: Any, begin: int, end: int) -> Any:
    """Return the first frame in which a live pixel of tiles begin..end-1 reads more than `limit`, else their number.

    frames (n, n_pixel); tiles (n_tile,) first pixel of each; live (n_tile, TILE) 1 or 0.
    """
    n, n_pixel = frames.shape
    first = n
    for tile in range(begin, end):
        left = tiles[tile]
        width = min(TILE, n_pixel - left)
        for t in range(first):
            row = frames[t, left : left + width]
            above = 0
            for p in range(width):
                above |= (row[p] > limit) & live[tile, p]
            if above:
                first = t
                break
    return first


@njit(nogil=True, cache=True)
def correlate(
    frames: Any,
    n_new: Any,
    n_old: Any,
    delays_per_level: int,
    tiles: Any,
    live: Any,
    bins: Any,
    history: Any,
    G2: Any,
    sums: Any,
    begin: int,
    end: int,
) -> None:
    """Fold a block of frames, or a gap, into the tiles begin..end-1.

    Parameters
    ----------
    frames : (n <= BLOCK, n_pixel) unsigned
        n = 0 stands for a gap of n_new[0] frames, which count as dark and without weight.
    n_new, n_old : (n_level,) int64
        Coarse frames that become complete on each level, and how many there were before.
    tiles : (n_tile,) int64
        First pixel of each tile.
    live : (n_tile, TILE) uint8
        1 where a pixel counts.
    bins : (n_tile, TILE) int64
        Bin of each pixel; any for pixels that do not count.
    history : (n_level, 2 d, n_tile * TILE) int32 or int64
        Last coarse frames of every level, oldest first; updated.
    G2 : (2, n_delay, n_bin) int64
        Sums of products over pixels and pairs, see `wide`; updated.
    sums : (n, n_bin) int64
        Counts per bin and frame; updated.
    """
    n, n_pixel = frames.shape
    n_row = 2 * delays_per_level
    n_level = history.shape[0]
    fine = np.empty((n_row + BLOCK, TILE), history.dtype)
    coarse = np.empty((n_row + BLOCK, TILE), history.dtype)
    single = np.empty((n_row + BLOCK, TILE), np.float32)
    double = np.empty((n_row + BLOCK, TILE), np.float64)
    single_sum = np.empty((n_row, TILE), np.float32)
    double_sum = np.empty((n_row, TILE), np.float64)

    for tile in range(begin, end):
        left = tiles[tile]
        width = min(TILE, n_pixel - left)
        column = tile * TILE
        rows = n
        for t in range(n):
            source = frames[t, left : left + width]
            row = fine[n_row + t]
            for p in range(width):
                row[p] = source[p] * live[tile, p]
            row[width:] = 0
        bin_sums(fine[n_row : n_row + n], bins[tile], sums)

        for level in range(n_level):
            new = n_new[level]
            if new == 0:
                break
            # After a gap only the first coarse frame can hold counts: more than n_row zeros behind it say nothing new.
            needed = min(new, n_row + n)
            for t in range(rows, needed):
                fine[n_row + t] = 0
            rows = needed
            for r in range(n_row):
                copy(history[level, r, column : column + TILE], fine[r])

            first = 1 if level == 0 else delays_per_level + 1
            top = largest(fine[: n_row + rows])
            bound = float(top) * float(top) * rows
            base = 0 if level == 0 else n_row + (level - 1) * delays_per_level
            if bound <= EXACT_32:
                products(fine, single, single_sum, n_row, rows, first)
                collect(single_sum, bins[tile], first, n_row, base, G2)
            elif bound <= EXACT_64:
                products(fine, double, double_sum, n_row, rows, first)
                collect(double_sum, bins[tile], first, n_row, base, G2)
            else:
                wide_products(fine, bins[tile], n_row, rows, first, base, G2)

            for r in range(n_row):
                # Beyond the rows there are, those of a gap are dark.
                copy(fine[min(r + new, n_row + rows - 1)], history[level, r, column : column + TILE])

            # Coarse frame j of the next level is 2j + 2j+1 of this one; 2j may be the newest of the history.
            odd = n_old[level] & 1
            rows = (rows + odd) // 2
            for t in range(rows):
                a = fine[n_row + 2 * t - odd]
                b = fine[n_row + 2 * t - odd + 1]
                row = coarse[n_row + t]
                for p in range(TILE):
                    row[p] = a[p] + b[p]
            fine, coarse = coarse, fine


@njit(nogil=True, cache=True)
def copy(source: Any, target: Any) -> None:
    """Copy TILE elements; numba's assignment of slices takes some ten times as long."""
    for p in range(TILE):
        target[p] = source[p]


@njit(nogil=True, cache=True)
def bin_sums(rows: Any, bins: Any, sums: Any) -> None:
    """Add up rows (n, TILE) per bin into sums (n, n_bin). Runs of one bin are added in a register."""
    for t in range(rows.shape[0]):
        row = rows[t]
        run = bins[0]
        value = np.int64(0)
        for p in range(TILE):
            if bins[p] != run:
                sums[t, run] += value
                value = np.int64(0)
                run = bins[p]
            value += row[p]
        sums[t, run] += value


@njit(nogil=True, cache=True)
def largest(rows: Any) -> Any:
    """Return the largest element of rows (n, TILE)."""
    top = rows[0, 0]
    for t in range(rows.shape[0]):
        row = rows[t]
        for p in range(TILE):
            top = max(top, row[p])
    return top


@njit(nogil=True, cache=True, fastmath={"contract"})
def products(fine: Any, real: Any, product: Any, n_row: int, rows: int, first: int) -> None:
    """Sum over the new rows t of row(t) * row(t - k) for k = first..n_row into product[k - 1], exactly.

    Four rows by two delays at a time: eight products for nine rows read and two sums kept, a third of the memory
    traffic of one by one.
    """
    for t in range(n_row + rows):
        source = fine[t]
        row = real[t]
        for p in range(TILE):
            row[p] = source[p]
    product[first - 1 :] = 0
    fours = n_row + rows // 4 * 4
    twos = first + (n_row - first + 1) // 2 * 2
    for t in range(n_row, fours, 4):
        a, b, c, d = real[t], real[t + 1], real[t + 2], real[t + 3]
        for k in range(first, twos, 2):
            v, w, x, y, z = real[t - k - 1], real[t - k], real[t - k + 1], real[t - k + 2], real[t - k + 3]
            near, far = product[k - 1], product[k]
            for p in range(TILE):
                near[p] += a[p] * w[p] + b[p] * x[p] + c[p] * y[p] + d[p] * z[p]
                far[p] += a[p] * v[p] + b[p] * w[p] + c[p] * x[p] + d[p] * y[p]
    for t in range(n_row, n_row + rows):
        later = real[t]
        for k in range(twos if t < fours else first, n_row + 1):
            earlier = real[t - k]
            into = product[k - 1]
            for p in range(TILE):
                into[p] += later[p] * earlier[p]


@njit(nogil=True, cache=True)
def collect(product: Any, bins: Any, first: int, n_row: int, base: int, G2: Any) -> None:
    """Add product (n_row, TILE) of the delays first..n_row to the bins of G2."""
    for k in range(first, n_row + 1):
        row = product[k - 1]
        run = bins[0]
        value = np.int64(0)
        for p in range(TILE):
            if bins[p] != run:
                add(G2, base + k - first, run, value)
                value = np.int64(0)
                run = bins[p]
            value += np.int64(row[p])
        add(G2, base + k - first, run, value)


@njit(nogil=True, cache=True)
def wide_products(fine: Any, bins: Any, n_row: int, rows: int, first: int, base: int, G2: Any) -> None:
    """Do what `products` and `collect` do, for counts too high for exact floating point."""
    for t in range(n_row, n_row + rows):
        for k in range(first, n_row + 1):
            for p in range(TILE):
                add_product(G2, base + k - first, bins[p], np.int64(fine[t, p]), np.int64(fine[t - k, p]))


@njit(nogil=True, cache=True)
def weigh(n: int, n_new: Any, n_old: Any, delays_per_level: int, history: Any, pairs: Any) -> Any:
    """Follow how many frames came in each coarse frame, over n frames that came or, with n = 0, over a gap.

    Parameters
    ----------
    n_new, n_old : (n_level,) int64
        As in `correlate`.
    history : (n_level, 2 d) int64
        Weights of the last coarse frames of every level; updated.
    pairs : (n_delay,) int64
        Sum of w(i) w(i+k); updated.

    Returns
    -------
    (n_level, row) int64
        Weights of the old (2 d) and new coarse frames of every level.
    """
    n_row = 2 * delays_per_level
    n_level = history.shape[0]
    weights = np.zeros((n_level, 2 * n_row + n), np.int64)
    weights[0, n_row : n_row + n] = 1
    rows = n
    for level in range(n_level):
        new = n_new[level]
        if new == 0:
            break
        rows = min(new, n_row + n)
        w = weights[level]
        w[:n_row] = history[level]
        first = 1 if level == 0 else delays_per_level + 1
        base = 0 if level == 0 else n_row + (level - 1) * delays_per_level
        for t in range(n_row, n_row + rows):
            for k in range(first, n_row + 1):
                pairs[base + k - first] += w[t] * w[t - k]
        for r in range(n_row):
            history[level, r] = w[r + new] if r + new < n_row + rows else 0
        if level + 1 < n_level:
            odd = n_old[level] & 1
            for t in range((rows + odd) // 2):
                i = n_row + 2 * t - odd
                weights[level + 1, n_row + t] = w[i] + w[i + 1]
    return weights


@njit(nogil=True, cache=True)
def normalise(
    sums: Any,
    weights: Any,
    n_new: Any,
    n_old: Any,
    delays_per_level: int,
    history: Any,
    IP: Any,
    IF: Any,
    begin: int,
    end: int,
) -> None:
    """Fold the counts per bin of a block of frames, or a gap, into the bins begin..end-1.

    Over the pairs (i, i+k) of coarse frames, with c the counts of a bin and w the number of frames that came:
    IP = sum of c(i) w(i+k), IF = sum of w(i) c(i+k).

    Parameters
    ----------
    sums : (n, n_bin) int64
        Counts per frame; n = 0 stands for a gap.
    weights : (n_level, row) int64
        From `weigh`.
    n_new, n_old : (n_level,) int64
        As in `correlate`.
    history : (n_level, 2 d, n_bin) int64
        Counts of the last coarse frames of every level; updated.
    IP, IF : (2, n_delay, n_bin) int64
        See `wide`; updated.
    """
    n = sums.shape[0]
    n_row = 2 * delays_per_level
    fine = np.zeros((2 * n_row + n, end - begin), np.int64)
    coarse = np.zeros_like(fine)
    fine[n_row : n_row + n] = sums[:, begin:end]
    rows = n
    for level in range(history.shape[0]):
        new = n_new[level]
        if new == 0:
            break
        needed = min(new, n_row + n)
        fine[n_row + rows : n_row + needed] = 0
        rows = needed
        fine[:n_row] = history[level, :, begin:end]
        w = weights[level]

        first = 1 if level == 0 else delays_per_level + 1
        base = 0 if level == 0 else n_row + (level - 1) * delays_per_level
        for t in range(n_row, n_row + rows):
            for k in range(first, n_row + 1):
                delay = base + k - first
                if w[t] > 0:
                    for b in range(end - begin):
                        add_product(IP, delay, begin + b, fine[t - k, b], w[t])
                if w[t - k] > 0:
                    for b in range(end - begin):
                        add_product(IF, delay, begin + b, fine[t, b], w[t - k])

        for r in range(n_row):
            if r + new < n_row + rows:
                history[level, r, begin:end] = fine[r + new]
            else:
                history[level, r, begin:end] = 0

        odd = n_old[level] & 1
        rows = (rows + odd) // 2
        for t in range(rows):
            i = n_row + 2 * t - odd
            coarse[n_row + t] = fine[i] + fine[i + 1]
        fine, coarse = coarse, fine


@njit(nogil=True, cache=True)
def outer(pairs: Any, alive: Any, product: Any) -> None:
    """Add pairs (n_delay,) times alive (n_bin,) to the wide product (2, n_delay, n_bin)."""
    for delay in range(len(pairs)):
        for b in range(len(alive)):
            add_product(product, delay, b, pairs[delay], alive[b])


@njit(nogil=True, cache=True)
def pool(sums: Any, group: Any, pooled: Any) -> None:
    """Add up wide sums (2, n_delay, n_bin) of the bins of a group into pooled (2, n_delay, n_group)."""
    for delay in range(sums.shape[1]):
        for b in range(sums.shape[2]):
            pooled[0, delay, group[b]] += sums[0, delay, b]
            add(pooled, delay, group[b], sums[1, delay, b])
