"""Kernels alone, on arrays: wide integers against Python's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.operators.kernels import multitau, wide
from stream.operators.kernels.multitau import TILE

counts = st.integers(0, 2**62 - 1)


def value(number):
    return int(number[0]) * 2**62 + int(number[1])


@given(st.lists(st.tuples(counts, counts), max_size=20))
def test_wide_sums_of_products_are_exact(pairs):
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


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_products_agree_with_wide_products(real):
    rows, n_row, first = 20, 8, 5
    fine = np.random.default_rng(0).integers(0, 100, (n_row + rows, TILE)).astype(np.int32)
    bins = np.sort(np.random.default_rng(1).integers(0, 4, TILE))
    narrow, wide_ = np.zeros((2, 2, 9, 4), np.int64)
    product = np.empty((n_row, TILE), real)
    multitau.products(fine, np.empty((n_row + rows, TILE), real), product, n_row, rows, first)
    multitau.collect(product, bins, first, n_row, 2, narrow)
    multitau.wide_products(fine, bins, n_row, rows, first, 2, wide_)
    np.testing.assert_array_equal(narrow, wide_)
    assert narrow[1, 2:6].all()
    assert not narrow[1, :2].any()


def test_the_first_frame_with_a_live_saturated_pixel_is_found():
    frames = np.zeros((9, 600), "<u2")
    frames[3, 5] = frames[6, 300] = frames[7, 599] = 65535
    live = np.ones((3, TILE), np.uint8)
    tiles = np.array([0, 256, 512])
    live[0, 5] = 0
    assert multitau.first_above(frames, 65534, tiles, live, 0, 3) == 6
    assert multitau.first_above(frames, 65534, tiles, live, 2, 3) == 7
    assert multitau.first_above(frames, 65534, tiles, live, 0, 1) == 9
