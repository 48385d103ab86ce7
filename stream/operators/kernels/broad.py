"""What `narrow` does, for counts too high for it: rows (row, LANES) of int64, sums in `wide` integers.

Seldom needed, and several times slower: a hot pixel, the beam itself, levels so high that a coarse frame holds more
than some thousand counts.
"""

from typing import Any

import numpy as np

from stream.operators.kernels import narrow
from stream.operators.kernels.jit import part
from stream.operators.kernels.layout import CHUNK, LANES
from stream.operators.kernels.wide import BITS, add, add_product


@part
def take(block: Any, start: int, n: int, region: Any, strip: int, rows: Any, counts: Any, row: int) -> None:
    """Take n frames of a block as rows from `row` on, by way of rows[0:LANES]."""
    for t in range(n):
        narrow.fetch(block, start + t, region, strip, rows)
        for p in range(LANES):
            counts[row + t, p] = np.int64(rows[p]) & 0xFFFFFFFF


@part
def widen(rows: Any, at: int, begin: int, end: int, counts: Any) -> None:
    """Take over packed rows begin..end-1, counted from rows[at]."""
    for row in range(begin, end):
        for p in range(LANES):
            counts[row, p] = rows[at + row * LANES + p] & narrow.LOW


@part
def darken(counts: Any, begin: int, end: int) -> None:
    """Set rows to zero."""
    for row in range(begin, end):
        for p in range(LANES):
            counts[row, p] = 0


@part
def copy(source: Any, target: Any, begin: int, end: int) -> None:
    """Copy rows."""
    for row in range(begin, end):
        for p in range(LANES):
            target[row, p] = source[row, p]


@part
def load_rows(history: Any, place: int, n: int, kind: int, counts: Any) -> None:
    """Load n rows of `History` as the first ones."""
    for row in range(n):
        for p in range(LANES):
            i = place + row * LANES + p
            value = np.int64(history.low[i])
            if kind > 0:
                value |= np.int64(history.middle[i]) << 8
            if kind > 1:
                value |= np.int64(history.high[i]) << 16
            counts[row, p] = value


@part
def save_rows(history: Any, place: int, n: int, counts: Any, row: int, last: int) -> Any:
    """Save n rows from `row` on, or the last one where there are no more; return their kind."""
    any_bits = np.int64(0)
    for i in range(n):
        for p in range(LANES):
            any_bits |= counts[min(row + i, last), p]
    kind = 2 if any_bits >> 16 else 1 if any_bits >> 8 else 0
    for i in range(n):
        for p in range(LANES):
            value = counts[min(row + i, last), p]
            history.low[place + i * LANES + p] = value & 0xFF
            if kind > 0:
                history.middle[place + i * LANES + p] = value >> 8 & 0xFF
            if kind > 1:
                history.high[place + i * LANES + p] = value >> 16
    return kind


@part
def coarsen(fine: Any, coarse: Any, n_row: int, odd: int, begin: int, end: int) -> None:
    """Make rows begin..end-1 of the next level; see `narrow.coarsen`."""
    for row in range(begin, end):
        pair = 2 * (row - n_row) + n_row - odd
        for p in range(LANES):
            coarse[row, p] = fine[pair, p] + fine[pair + 1, p]


@part
def next_level(counts: Any, n_row: int, d: int, odd: int, n: int) -> None:
    """Replace the rows in counts[0] by those of the next level, by way of counts[1]; see `narrow.next_level`."""
    begin, end = n_row - d + 1, n_row + (n + odd) // 2
    coarsen(counts[0], counts[1], n_row, odd, begin, end)
    copy(counts[1], counts[0], begin, end)


@part
def products(
    counts: Any, sums: Any, n_row: int, n: int, k: int, weights: Any, region: Any, strip: int, wide: Any, slot: int
) -> None:
    """Add the sums of c(t) c(t-k), c(t-k) w(t) and c(t) w(t-k) over n rows from n_row on to the bins of wide."""
    for p in range(LANES):
        sums[0, p] = sums[1, p] = sums[2, p] = 0
    top = np.int64(0)
    for t in range(n_row + n):
        top = max(top, weights[t])
        for p in range(LANES):
            top = max(top, counts[t, p])
    exact = top < 1 << 31 and top * top < (1 << BITS) // (LANES * n)
    for t in range(n_row, n_row + n if exact else n_row):
        for p in range(LANES):
            sums[0, p] += counts[t, p] * counts[t - k, p]
            sums[1, p] += counts[t - k, p] * weights[t]
            sums[2, p] += counts[t, p] * weights[t - k]
    for run in range(region.runs[strip], region.runs[strip + 1]):
        b = region.bin[run]
        for p in range(region.begin[run], region.end[run]):
            for i in range(3):
                add(wide, b, slot + i * CHUNK, sums[i, p])
            for t in range(n_row, n_row if exact else n_row + n):
                add_product(wide, b, slot, counts[t, p], counts[t - k, p])
                add_product(wide, b, slot + CHUNK, counts[t - k, p], weights[t])
                add_product(wide, b, slot + 2 * CHUNK, counts[t, p], weights[t - k])
