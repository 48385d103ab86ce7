"""Kernels alone, on arrays: against numpy and Python's own integers."""

from math import isqrt

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numba import njit

from stream.operators.history import empty_planes, restore_planes, saved_planes
from stream.operators.kernels import broad, lanes, multitau, narrow, sparse, wide
from stream.operators.kernels import events as events_kernel
from stream.operators.kernels.layout import BLOCK, CHUNK, HIGHEST, LANES, ROOM, STRIPS, TILE, Block, Sums, place, slots
from stream.operators.kernels.space import State, work_space
from stream.operators.tiles import Tiles
from tests.conftest import events_of

counts = st.integers(0, 2**62 - 1)
words = arrays(np.int32, LANES, elements=st.integers(-(2**31), 2**31 - 1))
halves = arrays(np.int16, (LANES, 2), elements=st.sampled_from([-(2**15), -1, 0, 1, 2**15 - 1]) | st.integers(-9, 9))


def value(number):
    return int(number[0]) * 2**62 + int(number[1])


@given(st.lists(st.tuples(counts, counts), max_size=20))
def test_wide_sums_of_products_are_exact(pairs):
    assume(sum(a * b for a, b in pairs) < 2**125)
    number = np.zeros((2, 1, 1), np.int64)
    for a, b in pairs:
        wide.add_product(number, 0, 0, np.int64(a), np.int64(b))
    assert value(number[:, 0, 0]) == sum(a * b for a, b in pairs)
    assert 0 <= number[1, 0, 0] < 2**62


@given(st.lists(counts, max_size=20))
def test_wide_sums_are_exact(values):
    number = np.zeros((2, 1, 1), np.int64)
    for v in values:
        wide.add(number, 0, 0, np.int64(v))
    assert value(number[:, 0, 0]) == sum(values)


@given(st.lists(st.tuples(st.integers(0, 2**40), counts), min_size=1, max_size=20))
def test_totals_of_wide_numbers_are_exact(numbers):
    array = np.array(numbers, np.int64).T.reshape(2, 1, -1)
    total = wide.total(array, 2)
    assert value(total[:, 0]) == sum(high * 2**62 + low for high, low in numbers)
    assert 0 <= total[1, 0] < 2**62


@given(st.integers(0, 2**40), counts)
def test_wide_numbers_become_the_nearest_doubles(high, low):
    exact = high * 2**62 + low
    assert wide.to_float(np.array([[high], [low]], np.int64))[0] == pytest.approx(exact, rel=3e-16)


@given(st.integers(0, 2**100), st.integers(0, 2**100))
def test_differences_of_wide_numbers_are_exact(less, difference):
    whole, less = (np.array([[n >> 62], [n & wide.MASK]], np.int64) for n in (less + difference, less))
    assert value(wide.difference(whole, less)[:, 0]) == difference


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), counts), min_size=6, max_size=6))
def test_narrow_sums_settle_in_wide_ones(numbers):
    narrow_sums, wide_sums = np.array([n for n, _ in numbers]), np.zeros((2, 2, 3), np.int64)
    wide_sums[1] = np.array([w for _, w in numbers]).reshape(2, 3)
    multitau.settle(narrow_sums, wide_sums)
    assert [value(each) for each in wide_sums.reshape(2, 6).T] == [n + w for n, w in numbers]
    assert (narrow_sums == 0).all()


def of_two(operation):
    """The operation on the lanes of two arrays."""

    @njit
    def stored(x, y, out):
        lanes.store(operation(lanes.load(x, 0), lanes.load(y, 0)), out, 0)

    def run(x, y):
        out = np.empty(LANES, np.int32)
        stored(x, y, out)
        return out

    return run


ELEMENTWISE = [
    (of_two(lanes.add), lambda x, y: x + y),
    (of_two(lanes.subtract), lambda x, y: x - y),
    (of_two(lanes.either), lambda x, y: x | y),
    (of_two(lanes.both), lambda x, y: x & y),
    (of_two(lanes.above), lambda x, y: np.where(x.view(np.uint32) > y.view(np.uint32), -1, 0)),
]
shifted_left, shifted_right = of_two(lanes.left), of_two(lanes.right)


@given(words, words)
def test_lanes_are_32_bit_integers_that_wrap_and_compare_as_unsigned_ones(x, y):
    for operation, expected in ELEMENTWISE:
        np.testing.assert_array_equal(operation(x, y), expected(x, y))


@given(words, arrays(np.int32, LANES, elements=st.integers(0, 31)))
def test_lanes_are_shifted_as_unsigned_integers(x, by):
    np.testing.assert_array_equal(shifted_left(x, by), x << by)
    np.testing.assert_array_equal(shifted_right(x, by), (x.view(np.uint32) >> by.astype(np.uint32)).view(np.int32))


@njit
def move(source, begin, target, into):
    lanes.store(lanes.load(source, begin), target, into)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4"])
def test_lanes_are_loaded_as_unsigned_integers_from_any_place(dtype):
    source = np.random.default_rng(0).integers(0, 2**31, 40).astype(dtype)
    source[:5] = np.iinfo(dtype).max
    for begin in range(len(source) - LANES + 1):
        target = np.empty(LANES, np.int32)
        move(source, begin, target, 0)
        np.testing.assert_array_equal(target, source[begin : begin + LANES])


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4"])
def test_the_low_bits_of_lanes_are_stored_in_any_place_and_nothing_beside_them(dtype):
    source = np.random.default_rng(1).integers(-(2**31), 2**31, LANES).astype(np.int32)
    for begin in range(20):
        target = np.full(40, 7, dtype)
        move(source, 0, target, begin)
        expected = np.full(40, 7, dtype)
        expected[begin : begin + LANES] = source.astype(dtype)
        np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("load", [lanes.load_u1, lanes.load_u2, lanes.load_u4])
def test_lanes_are_loaded_from_an_address(load):
    @njit
    def loaded(address, begin, out):
        lanes.store(load(address, begin), out, 0)

    dtype = {lanes.load_u1: np.uint8, lanes.load_u2: np.uint16, lanes.load_u4: np.uint32}[load]
    source = np.random.default_rng(2).integers(0, np.iinfo(dtype).max, 40, dtype, endpoint=True)
    for begin in range(20):
        out = np.empty(LANES, np.int32)
        loaded(source.ctypes.data, begin, out)
        np.testing.assert_array_equal(out.view(np.uint32), source[begin : begin + LANES])


@njit
def splatted(number, out):
    lanes.store(lanes.splat(number), out, 0)


@given(st.integers(-(2**31), 2**32 - 1))
def test_every_lane_of_a_splat_is_the_low_32_bits_of_the_number(number):
    out = np.empty(LANES, np.int32)
    splatted(number, out)
    assert (out.view(np.uint32) == number % 2**32).all()


@njit
def bits_of(x):
    return lanes.any_bits(lanes.load(x, 0))


@given(words)
def test_the_bits_of_all_lanes_are_found(x):
    assert bits_of(x) == np.bitwise_or.reduce(x.view(np.uint32))


@pytest.mark.parametrize("lane", range(LANES))
def test_a_bit_of_any_lane_is_found(lane):
    x = np.zeros(LANES, np.int32)
    x[lane] = -(2**31)
    assert bits_of(x) == 2**31


def dot_of(total, x, y):
    """Python's own: the sum of two products of int16, in 32 bits."""
    exact = total.astype(np.int64) + (x.astype(np.int64) * y).sum(axis=1)
    return exact.astype(np.int32)


@njit
def dotted(total, x, y, out):
    lanes.store(lanes.dot(lanes.load(total, 0), lanes.load(x, 0), lanes.load(y, 0)), out, 0)


@given(words, halves, halves)
def test_a_dot_adds_two_products_of_16_bits_to_each_lane(total, x, y):
    out = np.empty(LANES, np.int32)
    dotted(total, x.view(np.int32).ravel(), y.view(np.int32).ravel(), out)
    np.testing.assert_array_equal(out, dot_of(total, x, y))


@njit
def dotted_with_rows(totals, x, rows, row, out):
    a, b, c = (
        lanes.load(totals, 0),
        lanes.load(totals, LANES),
        lanes.load(totals, 2 * LANES),
    )
    sums = lanes.dots((a, b, c), lanes.load(x, 0), rows, row * LANES)
    sums = lanes.adds(sums, (lanes.splat(1), lanes.splat(2), lanes.splat(3)))
    for j, total in enumerate(sums):
        lanes.store(total, out, j * LANES)


@given(st.integers(0, 2**32), halves)
def test_dots_are_taken_with_a_row_and_those_before_it(seed, x):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-(2**15), 2**15, (5, LANES, 2)).astype(np.int16)
    totals = rng.integers(-(2**31), 2**31, (3, LANES)).astype(np.int32)
    out = np.empty((3, LANES), np.int32)
    dotted_with_rows(totals.ravel(), x.view(np.int32).ravel(), rows.view(np.int32).ravel(), 3, out.ravel())
    for j in range(3):
        np.testing.assert_array_equal(out[j], dot_of(totals[j], x, rows[3 - j]) + np.int32(j + 1))


@njit
def transposed(m, out):
    rows = (
        lanes.load(m, 0 * LANES), lanes.load(m, 1 * LANES), lanes.load(m, 2 * LANES), lanes.load(m, 3 * LANES),
        lanes.load(m, 4 * LANES), lanes.load(m, 5 * LANES), lanes.load(m, 6 * LANES), lanes.load(m, 7 * LANES),
        lanes.load(m, 8 * LANES), lanes.load(m, 9 * LANES), lanes.load(m, 10 * LANES), lanes.load(m, 11 * LANES),
        lanes.load(m, 12 * LANES), lanes.load(m, 13 * LANES), lanes.load(m, 14 * LANES), lanes.load(m, 15 * LANES),
    )  # fmt: skip
    lanes.transpose(rows, out, 3)


def test_rows_and_columns_are_exchanged():
    matrix = np.arange(LANES**2, dtype=np.int32).reshape(LANES, LANES)
    out = np.full(LANES**2 + 5, -1, np.int32)
    transposed(matrix.ravel(), out)
    np.testing.assert_array_equal(out[3:-2].reshape(LANES, LANES), matrix.T)
    assert (out[:3] == -1).all()
    assert (out[-2:] == -1).all()


@njit
def added(x, shift, sums, into):
    lanes.add_shifted(lanes.load(x, 0), lanes.load(shift, 0), sums, into)


@given(words, arrays(np.int32, LANES, elements=st.integers(0, 27)))
def test_unsigned_lanes_are_added_to_64_bits_after_a_shift(x, shift):
    sums = np.arange(20, dtype=np.int64) << 40
    added(x, shift, sums, 2)
    expected = np.arange(20, dtype=np.int64) << 40
    expected[2 : 2 + LANES] += x.view(np.uint32).astype(np.int64) << shift
    np.testing.assert_array_equal(sums, expected)


OLD = 40
"""Rows before the new ones in what follows."""


def packed(rows):
    """Rows (n, LANES) of counts as `narrow` has them: each count beside that of the next row."""
    following = np.vstack([rows[1:], np.zeros((1, LANES), np.int64)])
    return (rows | following << 16).astype(np.int32).ravel()


def narrow_sums(rows, weights, n, k):
    """(LANES, LANES) what `full_products` and `weighted_products` say they store, in Python's integers."""
    rows, weights = rows.astype(object), weights.astype(object)
    new = slice(OLD, OLD + n)
    expected = np.zeros((LANES, LANES), object)
    for j in range(CHUNK):
        old = slice(OLD - k - 1 - j, OLD - k - 1 - j + n)
        expected[:, j] = (rows[new] * rows[old]).sum(axis=0)
        expected[:, CHUNK + j] = (rows[old] * weights[new, None]).sum(axis=0)
        expected[:, 2 * CHUNK + j] = (rows[new] * weights[old, None]).sum(axis=0)
    return expected


def new_rows(n, seed, top):
    """Old rows and n new ones. More follow if n is even, as those of another piece do."""
    return np.random.default_rng(seed).integers(0, top, (OLD + n + (5 if n % 2 == 0 else 0), LANES), endpoint=True)


lengths = pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 64, 253, 254, 255, 256])
first_delays = pytest.mark.parametrize("k", [0, 4, 8, 28])


@lengths
@first_delays
def test_narrow_products_are_those_of_rows_and_earlier_rows(n, k):
    rows = new_rows(n, seed=n, top=min(2**15 - 1, isqrt((2**31 - 1) // n)))
    stored = np.empty(LANES**2, np.int32)
    narrow.full_products(packed(rows), OLD * LANES, n, k, stored, 0)
    np.testing.assert_array_equal(stored.reshape(LANES, LANES), narrow_sums(rows, np.ones(len(rows)), n, k))


@lengths
@first_delays
def test_narrow_products_of_rows_with_missing_frames_are_weighted(n, k):
    top = min(2**15 - 1, isqrt((2**31 - 1) // n))
    rows, weights = new_rows(n, seed=n, top=top), np.random.default_rng(0).integers(0, top, OLD + n + 6, endpoint=True)
    stored = np.empty(LANES**2, np.int32)
    pairs = (weights[:-1] | weights[1:] << 16).astype(np.int32)
    narrow.weighted_products(packed(rows), OLD * LANES, n, k, pairs, OLD, stored, 0)
    np.testing.assert_array_equal(stored.reshape(LANES, LANES), narrow_sums(rows, weights, n, k))


@given(st.integers(0, 2**16), st.integers(0, 27), st.booleans(), st.integers(1, 2**14))
@example(1, 14, False, 8)
@example(1, 15, False, 8)
def test_a_piece_is_so_short_that_the_sums_of_a_strip_fit_into_31_bits(top, level, full, n):
    size = narrow.piece(top, level, full, n)
    factor = max(top, 1 if full else 2**level)
    assert size * LANES * top * factor < 2**31
    assert size == n or size == 0 or (size < n and size % 2 == 0)
    assert size == 0 or factor < 2**15


@pytest.mark.parametrize(("top", "n"), [(0, 256), (255, 256), (724, 256), (2047, 30), (4095, 8)])
def test_counts_that_fit_stay_narrow(top, n):
    assert narrow.piece(top, 0, True, n) > 0


@given(st.integers(0, 2**20))
def test_a_count_is_at_most_the_largest_of_its_bits(bits):
    assert narrow.largest(bits) == 2 ** bits.bit_length() - 1


@pytest.mark.parametrize("n", [1, 2, 7])
def test_raw_rows_are_packed(n):
    raw = np.random.default_rng(3).integers(0, 2**16, (n, LANES))
    taken = np.concatenate([np.full(5, 9), raw.ravel(), np.full(LANES, 9)]).astype(np.uint16)
    rows = np.full((n + 3) * LANES, 5, np.int32)
    narrow.pack(taken, 5, n, rows, LANES)
    np.testing.assert_array_equal(rows[LANES:-LANES].view(np.uint32), packed(np.vstack([raw, 0 * raw[:1]])).view("u4"))


@njit
def load_rows(history, begin, n, kind, rows, at):
    return lanes.any_bits(narrow.load_rows(history, begin, n, kind, rows, at))


@pytest.mark.parametrize(("top", "kind"), [(0, 0), (255, 0), (256, 1), (2**16 - 1, 1)])
def test_packed_rows_come_back_from_the_state(top, kind):
    history = empty_planes(5, 4, 3)
    history.middle[:] = 77
    raw = np.random.default_rng(4).integers(0, top, (9, LANES), endpoint=True)
    raw[3, 2] = top
    rows, loaded = packed(raw), packed(raw)
    assert narrow.save_rows(history, 32, 5, rows, 2 * LANES, 8 * LANES) == kind
    loaded[2 * LANES : 7 * LANES] = 5
    bits = load_rows(history, 32, 5, kind, loaded, 2 * LANES)
    np.testing.assert_array_equal(loaded, rows)
    assert bits == np.bitwise_or.reduce(raw[2:7], axis=None)


def test_where_rows_end_the_last_one_is_saved():
    history = empty_planes(5, 4, 3)
    rows = packed(np.arange(6 * LANES).reshape(6, LANES))
    narrow.save_rows(history, 0, 4, rows, 3 * LANES, 4 * LANES)
    np.testing.assert_array_equal(history.low[: 4 * LANES].reshape(4, LANES)[:, 0], [48, 64, 64, 64])


@njit
def coarsen(fine, pair, coarse, begin, end):
    return lanes.any_bits(narrow.coarsen(fine, pair, coarse, begin, end))


def test_packed_rows_of_the_next_level_are_sums_of_two():
    fine = np.random.default_rng(5).integers(0, 2**15, (14, LANES))
    coarse = np.full((9, LANES), 5, np.int32)
    bits = coarsen(packed(fine), 3 * LANES, coarse.ravel(), 2 * LANES, 7 * LANES)
    expected = fine[3:13:2] + fine[4:14:2]
    np.testing.assert_array_equal(
        coarse[2:8].view("u4").ravel(), packed(np.vstack([expected, 0 * fine[:1]])).view("u4")
    )
    assert (coarse[[0, 1, 8]] == 5).all()
    assert bits == np.bitwise_or.reduce(expected, axis=None)


def strip_of_bins(*bins):
    """A region of one tile, whose first strip has bins from 0, -1 outside."""
    flat = np.full(TILE, -1, np.int32)
    flat[: len(bins)] = bins
    tiles = Tiles.of(np.arange(1, TILE + 1, dtype=np.int32).reshape(1, TILE))
    return tiles.region(flat.reshape(1, TILE))


@given(
    st.sampled_from([1, 2**13, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**47]),
    st.sampled_from([1, 2**20, 2**27, 2**30]),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(0, 2**32),
)
def test_broad_products_are_exact(top, top_weight, n, k, seed):
    rng = np.random.default_rng(seed)
    bins = [0, 0, -1, 1, *[2] * 12]
    region, n_row = strip_of_bins(*bins), 8
    rows = rng.integers(top - top // 8, top, (n_row + n, LANES), endpoint=True)
    weights = rng.integers(top_weight - top_weight // 8, top_weight, n_row + n, endpoint=True)
    sums = np.zeros((2, 3, 32), np.int64)
    broad.products(rows, np.full((n_row + n, LANES), 5), n_row, n, k, weights, region, 0, sums, 17)
    rows, weights = rows.astype(object), weights.astype(object)[:, None]
    new, old = slice(n_row, n_row + n), slice(n_row - k, n_row - k + n)
    for b in range(3):
        c = rows[:, np.array(bins) == b]
        expected = [(c[new] * c[old]).sum(), (c[old] * weights[new]).sum(), (c[new] * weights[old]).sum()]
        assert [value(sums[:, b, slot]) for slot in (17, 21, 25)] == expected
    assert np.count_nonzero(sums[1].any(axis=0)) <= 3


@pytest.mark.parametrize(
    ("top", "kind"), [(0, 0), (255, 0), (256, 1), (2**16 - 1, 1), (2**16, 2), (2**31, 2), (2**48 - 1, 2)]
)
def test_broad_rows_come_back_from_the_state(top, kind):
    history = empty_planes(5, 4, 3)
    history.middle[:], history.high[:] = 77, 77
    rows = np.random.default_rng(6).integers(0, top, (9, LANES), endpoint=True)
    rows[3, 2] = top
    assert broad.save_rows(history, 32, 5, rows, 2, 8) == kind
    loaded = np.zeros_like(rows)
    broad.load_rows(history, 32, 5, kind, loaded)
    np.testing.assert_array_equal(loaded[:5], rows[2:7])


@pytest.mark.parametrize("odd", [0, 1])
def test_broad_rows_of_the_next_level_are_sums_of_two(odd):
    n_row = 8
    fine = np.random.default_rng(7).integers(0, 2**46, (n_row + 7, LANES))
    coarse = np.full_like(fine, 5)
    broad.coarsen(fine, coarse, n_row, odd, n_row - 3, n_row + 3)
    first = n_row - odd - 6
    np.testing.assert_array_equal(
        coarse[n_row - 3 : n_row + 3], fine[first : first + 12 : 2] + fine[first + 1 : first + 12 : 2]
    )
    assert (coarse[: n_row - 3] == 5).all()
    assert (coarse[n_row + 3 :] == 5).all()


@pytest.mark.parametrize(("d", "n_level", "n_strip"), [(1, 3, 5), (4, 16, 3), (8, 1, 2)])
def test_the_rows_of_strips_and_levels_follow_each_other_without_gap_or_overlap(d, n_level, n_strip):
    end = 0
    for level in range(n_level):
        for strip in range(n_strip):
            assert place(level, strip, n_strip, d) == end
            end += (2 * d if level == 0 else d + 1) * LANES
    assert place(n_level, 0, n_strip, d) == end


def test_the_state_comes_back_from_a_snapshot_whatever_was_there_before():
    d, n_level, n_strip = 3, 4, 5
    rng = np.random.default_rng(8)
    history, other = empty_planes(n_strip, d, n_level), empty_planes(n_strip, d, n_level)
    for planes in (history, other):
        for level in range(n_level):
            for strip in range(n_strip):
                rows = rng.integers(0, 2 ** rng.choice([8, 16, 48]), (2 * d, LANES))
                n = 2 * d if level == 0 else d + 1
                at = place(level, strip, n_strip, d)
                planes.kind[level, strip] = broad.save_rows(planes, at, n, rows, 0, 2 * d - 1)
    saved = saved_planes(history, d, 3)
    restore_planes(other, d, saved)
    for level in range(n_level):
        for strip in range(n_strip):
            n, at = 2 * d if level == 0 else d + 1, place(level, strip, n_strip, d)
            there, back = np.zeros((2, 2 * d, LANES), np.int64)
            broad.load_rows(history, at, n, history.kind[level, strip] if level < 3 else 0, there)
            broad.load_rows(other, at, n, other.kind[level, strip], back)
            np.testing.assert_array_equal(back, there if level < 3 else 0)
    again = saved_planes(other, d, 3)
    for name in saved:
        np.testing.assert_array_equal(again[name], saved[name])


def map_of(draw):
    n_pixel = draw(st.sampled_from([1, 2, 15, 16, 17, 255, 256, 257, 300, 512, 700, 1100]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    static = np.repeat(rng.integers(0, 4, n_pixel), rng.integers(1, 40, n_pixel))[:n_pixel].astype(np.int32)
    for begin in draw(st.lists(st.integers(0, 4), max_size=3)):
        static[begin * TILE : (begin + 1) * TILE] = 0
    static[draw(st.integers(0, n_pixel - 1))] = 5
    return static.reshape(1, -1)


static_maps = st.composite(map_of)()


@given(static_maps)
def test_every_pixel_of_a_map_is_in_one_run_of_its_bin_and_no_other_is(static):
    tiles = Tiles.of(static)
    region = tiles.region(tiles.bins)
    pixels = tiles.pixels()
    found = []
    for strip in range(len(region.runs) - 1):
        for run in range(region.runs[strip], region.runs[strip + 1]):
            assert 0 <= region.begin[run] < region.end[run] <= LANES
            columns = strip * LANES + np.arange(region.begin[run], region.end[run])
            assert region.live[columns].all()
            found += [(pixel, region.bin[run] + 1) for pixel in pixels[columns]]
    assert region.runs[-1] == len(region.bin)
    assert sorted(found) == [(pixel, bin_) for pixel, bin_ in enumerate(static[0]) if bin_]
    assert region.live.sum() == np.count_nonzero(static)


@given(static_maps)
def test_tiles_lie_in_the_frame_and_hold_every_pixel_once(static):
    tiles = Tiles.of(static)
    size = static.size
    assert (tiles.first >= 0).all()
    assert (tiles.first + TILE <= max(size, TILE)).all()
    assert (np.diff(tiles.first) > 0).all()
    for pixel in np.flatnonzero(static[0]):
        tile = tiles.tile[pixel // TILE]
        assert tiles.bins[tile, pixel - tiles.first[tile]] == static[0, pixel] - 1
    assert len(tiles.tile) == -(-size // TILE)


def block_of(frames, *, limit=2**32 - 1, first=0, missing=(), d=4, levels=8):
    """A block of frames (n, n_pixel), or of them as Events, after `first` others. It does not keep them alive."""
    addresses, lengths = np.ones(len(frames), np.int64), np.zeros(0, np.int64)
    pixels = photons = lengths
    if isinstance(frames, np.ndarray):
        addresses = frames.ctypes.data + np.arange(len(frames)) * frames.strides[0]
    else:
        lengths, begins = np.diff(frames.offsets), frames.offsets[:-1]
        pixels = frames.pixels.ctypes.data + 4 * begins
        photons = frames.counts.ctypes.data + frames.counts.itemsize * begins
    last, totals = np.zeros((2, levels, 2 * d), np.int64)
    multitau.weigh(~np.isin(np.arange(first), missing), 0, first, last, totals)
    weights, pairs, full = multitau.weigh(np.ones(len(frames), bool), first, len(frames), last, totals)
    return Block(
        first=first,
        span=len(frames),
        addresses=addresses,
        lengths=lengths,
        pixels=pixels,
        counts=photons,
        itemsize=frames.dtype.itemsize,
        limit=limit,
        weights=weights,
        pairs=pairs,
        full=full,
        delays_per_level=d,
    )


def everywhere(n_pixel):
    """A region of all pixels of a frame, each its own bin."""
    tiles = Tiles.of(np.arange(1, n_pixel + 1, dtype=np.int32).reshape(1, -1))
    return tiles.region(tiles.bins)


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
def test_frames_are_taken_strip_by_strip_without_pixels_that_left(dtype):
    rng = np.random.default_rng(9)
    frames = rng.integers(0, 2**16, (11, 600)).astype(dtype)
    region = everywhere(600)
    region.live[rng.integers(0, 2 * TILE, 200)] = 0
    taken, bits = np.full(STRIPS * BLOCK * LANES, 9, np.uint16), np.full(STRIPS * LANES, 9, np.int32)
    assert not narrow.take(block_of(frames), 3, 10, region, 1, taken, bits)
    expected = frames[3:10, TILE : 2 * TILE] * region.live[TILE : 2 * TILE]
    by_strip = expected.reshape(7, STRIPS, LANES).swapaxes(0, 1)
    np.testing.assert_array_equal(taken.reshape(STRIPS, BLOCK, LANES)[:, :7], by_strip)
    np.testing.assert_array_equal(bits.reshape(STRIPS, LANES), np.bitwise_or.reduce(by_strip, axis=1))


def saturated_frames():
    """In the tiles that begin with pixels 0, 256 and, as the frame ends with it, 344."""
    frames = np.zeros((9, 600), "<u2")
    frames[3, 5] = frames[6, 30] = frames[7, 599] = 65535
    frames[:, 200] = 65534
    return frames


def sorted_photons(block, region, begin, end):
    return sparse.sort(block, region, begin, end, *sparse.edges(block, region, begin, end))


@pytest.mark.parametrize("dense", [True, False])
def test_the_first_frame_with_a_live_saturated_pixel_is_found(dense):
    frames = saturated_frames()
    events = events_of(frames[:, None])
    block = block_of(frames if dense else events, limit=65534)
    region = everywhere(600)
    assert region.first.tolist() == [0, 256, 344]
    region.live[5] = 0

    def first_above(start, stop, tile):
        if dense:
            return narrow.first_above(block, start, stop, region, tile)
        found, starts = sorted_photons(block, region, 0, 3)
        own = found[starts[tile] : starts[tile + 1]]
        return sparse.first_above(own, start, stop, region, tile, block.limit)

    assert first_above(0, 9, 0) == 6
    assert first_above(0, 6, 0) == 6
    assert first_above(7, 9, 0) == 9
    assert first_above(0, 9, 1) == 9
    assert first_above(0, 9, 2) == 7


def test_frames_with_a_live_saturated_pixel_are_noticed():
    block = block_of(frames := saturated_frames(), limit=65534)
    region = everywhere(frames.shape[1])
    space = work_space(4, 8)
    assert narrow.take(block, 0, 9, region, 0, space.taken, space.bits)
    assert not narrow.take(block, 0, 3, region, 0, space.taken, space.bits)
    assert not narrow.take(block, 0, 9, region, 1, space.taken, space.bits)
    region.live[[5, 30]] = 0
    assert not narrow.take(block, 0, 9, region, 0, space.taken, space.bits)


def thin_frames(n, n_pixel, mean, seed=0):
    """Few photons, more of them on some pixels than on others and none on many."""
    rng = np.random.default_rng(seed)
    rate = mean * rng.exponential(1, n_pixel) * (rng.random(n_pixel) < 0.7)
    return rng.poisson(rate, (n, n_pixel)).astype("<u2")


@given(
    n_pixel=st.integers(TILE, 1500),
    mapped=st.floats(0, 1),
    where=st.floats(0, 1),
    mean=st.sampled_from([0, 1e-3, 0.05, 1]),
    seed=st.integers(0, 2**32),
)
def test_the_first_event_of_every_frame_from_a_pixel_on_is_found(n_pixel, mapped, where, mean, seed):
    frames = thin_frames(20, n_pixel, mean, seed)
    block = block_of(events := events_of(frames[:, None]))
    last = round(TILE + mapped * (n_pixel - TILE))
    pixel = round(where * last)
    found = [events_kernel.seek(block, t, pixel, last) for t in range(len(events))]
    np.testing.assert_array_equal(found, (frames[:, :pixel] > 0).sum(axis=1))


@pytest.mark.parametrize(("begin", "end"), [(0, 3), (0, 1), (1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize("mean", [0, 0.01, 1])
def test_photons_are_sorted_by_tiles_and_then_in_order_of_time(begin, end, mean):
    static = np.ones((1, 900), np.int32)
    static[0, TILE : 2 * TILE] = 0
    tiles = Tiles.of(static)
    region = tiles.region(tiles.bins)
    frames = thin_frames(30, 900, mean)
    assert tiles.first.tolist() == [0, 2 * TILE, 900 - TILE]
    events = events_of(frames[:, None])
    found, starts = sorted_photons(block_of(events), region, begin, end)
    assert starts[0] == 0
    assert starts[end - begin] == len(found)
    for tile in range(begin, end):
        # The last tile begins in the one before, whose pixels it leaves out.
        held = slice(3 * TILE if tile == 2 else tiles.first[tile], tiles.first[tile] + TILE)
        t, p = np.nonzero(frames[:, held])
        expected = [t, p + held.start - tiles.first[tile], frames[:, held][t, p]]
        own = found[starts[tile - begin] : starts[tile - begin + 1]]
        np.testing.assert_array_equal([own >> 48, own >> 32 & 0xFFFF, own & 0xFFFFFFFF], expected)


def found_in(frames):
    """The photons of frames (n, TILE) as `sparse.sort` returns them."""
    t, p = np.nonzero(frames)
    return t.astype(np.uint64) << 48 | p.astype(np.uint64) << 32 | frames[t, p].astype(np.uint64)


def test_photons_of_a_span_are_taken_pixel_by_pixel_in_order_of_time():
    frames = thin_frames(100, TILE, 0.2)
    region, seen = everywhere(TILE), work_space(4, 8).photons
    region.live[::7] = 0
    most = sparse.take(found_in(frames), 20, 90, region, 0, 65534, seen)
    here = frames[20:90] * region.live
    p, t = np.nonzero(here.T)
    np.testing.assert_array_equal(seen.begin, np.cumsum([0, *(here > 0).sum(axis=0)]))
    np.testing.assert_array_equal(seen.frame[: len(t)], t)
    np.testing.assert_array_equal(seen.counts[: len(t)], here[t, p])
    np.testing.assert_array_equal(seen.total, here.sum(axis=0))
    assert most == here.sum(axis=0).max()


@pytest.mark.parametrize("count", [sparse.BRIGHTEST + 1, 2**32 - 1])
def test_photons_of_a_bright_pixel_are_not_taken_unless_it_left(count):
    frames = np.zeros((10, TILE), np.int64)
    frames[4, 3] = count
    region, seen = everywhere(TILE), work_space(4, 8).photons
    assert sparse.take(found_in(frames), 0, 10, region, 0, 2**32 - 1, seen) > sparse.BRIGHTEST
    assert sparse.take(found_in(frames), 5, 10, region, 0, 2**32 - 1, seen) == 0
    region.live[3] = 0
    assert sparse.take(found_in(frames), 0, 10, region, 0, 2**32 - 1, seen) == 0


def test_photons_of_a_pixel_that_leaves_are_not_taken():
    frames = np.zeros((10, TILE), np.int64)
    frames[4, 3] = 255
    region, seen = everywhere(TILE), work_space(4, 8).photons
    assert sparse.take(found_in(frames), 0, 10, region, 0, 255, seen) == 255
    assert sparse.take(found_in(frames), 0, 10, region, 0, 254, seen) > sparse.BRIGHTEST


def test_photons_that_are_bright_only_together_are_told():
    frames = np.zeros((10, TILE), np.int64)
    frames[2:4, 3] = sparse.BRIGHTEST // 2 + 1
    most = sparse.take(found_in(frames), 0, 10, everywhere(TILE), 0, 65534, work_space(4, 8).photons)
    assert most == sparse.BRIGHTEST + 1


@pytest.mark.parametrize(("n", "fits"), [(ROOM, True), (ROOM + 1, False)])
def test_more_photons_than_there_is_room_for_are_not_taken(n, fits):
    found = np.arange(n, dtype=np.uint64) // TILE << 48 | np.arange(n, dtype=np.uint64) % TILE << 32 | np.uint64(1)
    most = sparse.take(found, 0, 300, everywhere(TILE), 0, 65534, work_space(4, 8).photons)
    assert (most <= sparse.BRIGHTEST) == fits


def test_photons_scattered_over_rows_are_what_dense_frames_are():
    frames = thin_frames(40, TILE, 0.3)
    frames[30, 9] = 65535
    region, dense, thin = everywhere(TILE), work_space(4, 8), work_space(4, 8)
    region.live[::5] = 0
    for begin, end in ((0, 40), (3, 29)):
        above = narrow.take(block_of(frames, limit=65534), begin, end, region, 0, dense.taken, dense.bits)
        above_too = sparse.scatter(found_in(frames), begin, end, region, 0, 65534, thin.taken, thin.bits)
        assert above == above_too == (end == 40)
        rows, rows_too = (each.taken.reshape(STRIPS, BLOCK, LANES)[:, : end - begin] for each in (dense, thin))
        np.testing.assert_array_equal(rows, rows_too)
        bits, bits_too = (np.bitwise_or.reduce(each.bits.reshape(STRIPS, LANES), axis=1) for each in (dense, thin))
        np.testing.assert_array_equal(bits, bits_too)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8])
def test_two_photons_meet_on_the_levels_whose_delays_their_distance_has(d):
    """Their frames may lie anywhere in coarse frames, so that a distance has up to two delays of a level."""
    seen = work_space(d, 8).photons
    spare = LANES - 1
    for distance in range(1, 2 * d + 1 << HIGHEST - 1):
        lowest, end = seen.level[:, distance]
        for level in range(HIGHEST):
            delays = {distance >> level, -(-distance // 2**level)}
            wanted = {k for k in delays if (1 if level == 0 else d + 1) <= k <= 2 * d}
            assert not wanted or lowest <= level < end
            if lowest <= level < end:
                assert all((seen.place[level, k] != spare) == (k in wanted) for k in delays)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8])
def test_every_level_and_delay_of_photons_has_a_sum_of_its_own(d):
    seen = work_space(d, 8).photons
    places = [seen.place[level, k] for level in range(HIGHEST) for k in range(2 * d + 2)]
    real = [each for each in places if each != LANES - 1]
    assert len(set(real)) == len(real) == (HIGHEST + 1) * d
    assert all(each % LANES < CHUNK and each % LANES**2 < LANES for each in real)


def chosen(first, n, n_photon=10, *, state=None, tile=0, **options):
    """The level from which on n frames are taken as rows, after `first` others of few counts; 0: they all are."""
    block = block_of(np.zeros((n, 1), "<u2"), first=first, **options)
    state = state or empty_planes(2 * STRIPS, block.delays_per_level, len(block.full))
    return sparse.choose(block, n_photon, state, tile)


@pytest.mark.parametrize(("mean", "top"), [(0, 9), (1e-3, 7), (0.003, 6), (0.01, 4), (0.022, 4), (0.023, 0), (1, 0)])
def test_photons_are_looked_at_one_by_one_below_a_level_that_falls_with_their_number(mean, top):
    assert chosen(4096, 4096, round(mean * 4096 * TILE), levels=16) == top


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8])
def test_photons_are_looked_at_one_by_one_after_enough_frames_without_a_break(d):
    enough = 2 * d << sparse.LOWEST - 1
    assert chosen(1024, 1024, d=d) >= sparse.LOWEST
    assert chosen(enough, 1024, d=d) >= sparse.LOWEST
    assert chosen(enough // 2, 1024, d=d) == 0
    assert chosen(1024, enough // 2, d=d) == 0
    assert chosen(1024, 1024, missing=[1024 - enough], d=d) == 0


def test_photons_after_high_counts_in_their_tile_are_taken_as_rows():
    state = empty_planes(2 * STRIPS, 4, 8)
    state.kind[0, STRIPS] = 1
    assert chosen(1024, 1024, state=state, tile=0) >= sparse.LOWEST
    assert chosen(1024, 1024, state=state, tile=1) == 0


@pytest.mark.parametrize(("levels", "top"), [(3, 0), (4, 4), (5, 5)])
def test_photons_are_taken_as_rows_where_levels_are_few(levels, top):
    assert chosen(1024, 1024, levels=levels) == top


@pytest.mark.parametrize("levels", [4, 8])
@pytest.mark.parametrize(("past", "mean"), [(0, 0.02), (255, 0.02), (255, 0)])
@pytest.mark.parametrize("kind", [np.asarray, lambda frames: events_of(frames[:, None])])
def test_no_more_is_added_to_a_narrow_sum_than_the_bound_of_a_pixel_times_the_pixels_of_a_strip(
    levels, past, mean, kind
):
    tiles = Tiles.of(np.ones((1, TILE), np.int32))
    n_slot = (levels + 1) * slots(4)
    sums = Sums(np.zeros(n_slot, np.int64), np.zeros((2, 1, n_slot), np.int64))
    frames = kind(thin_frames(1024, TILE, mean))
    block = block_of(frames, first=1024, levels=levels)
    history = empty_planes(STRIPS, 4, levels)
    history.low[:] = past
    correlate = multitau.correlate_events if len(block.lengths) else multitau.correlate
    _, _, bound = correlate(block, State(tiles.region(tiles.bins), history, sums, work_space(4, levels)), 0, 1)
    assert 0 < sums.narrow.max() <= bound * LANES
