"""Bands of rows cut out of compressed frames are the rows, and need no block that they do not lie in."""

import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from dectris.compression import decompress
from hypothesis import given
from hypothesis import strategies as st

from stream import blocks
from tests.conftest import chunks_of


def counts(shape, dtype="<u2", mean=0.5, n=2, seed=0):
    return np.random.default_rng(seed).poisson(mean, (n, *shape)).astype(dtype)


def read(frames):
    """Decompress all that a chunk holds, and return the counts that are its frame's."""
    _, rows, columns = frames.shape
    wholes = [decompress(chunk, "bslz4", elem_size=frames.dtype.itemsize) for chunk in frames.chunks]
    flat = [np.frombuffer(whole, frames.dtype)[frames.skip :][: rows * columns] for whole in wholes]
    return np.array(flat).reshape(frames.shape)


def borders(n_rows, n):
    return list(pairwise(n_rows * i // n for i in range(n + 1)))


cases = given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(["|u1", "<u2", "<u4"]),
    counts_per_block=st.sampled_from([0, 8, 16, 24, 128, 1024, 4096]),
    n=st.integers(1, 7),
    mean=st.sampled_from([0, 0.01, 2, 100]),
)


@cases
def test_a_band_is_the_rows_of_the_frames(shape, dtype, counts_per_block, n, mean):
    frames = counts(shape, dtype, mean)
    rows = borders(shape[0], min(n, shape[0]))
    for (begin, end), band in zip(rows, blocks.bands(chunks_of(frames, counts_per_block), rows), strict=True):
        blocks.check(band)
        assert (band.shape, band.dtype) == ((2, end - begin, shape[1]), frames.dtype)
        np.testing.assert_array_equal(read(band), frames[:, begin:end])


@cases
def test_a_band_of_a_band_is_its_rows(shape, dtype, counts_per_block, n, mean):
    frames = counts(shape, dtype, mean)
    begin, end = borders(shape[0], min(n, shape[0]))[-1]
    [band] = blocks.bands(chunks_of(frames, counts_per_block), [(begin, end)])
    [part] = blocks.bands(band, [(end - begin - 1, end - begin)])
    blocks.check(part)
    np.testing.assert_array_equal(read(part), frames[:, end - 1 : end])


def test_two_neighbours_have_one_block_in_common_at_most():
    whole = chunks_of(counts((100, 101), n=1), 64)
    size, block = 100 * 101 * 2, 128
    for band, (begin, end) in zip(blocks.bands(whole, borders(100, 9)), borders(100, 9), strict=True):
        held, of = blocks.HEADER.unpack_from(band.chunks[0])
        first, last = begin * 202 // block * block, min(size, -(-end * 202 // block) * block)
        assert (held, of, band.skip) == (last - first, block, (begin * 202 - first) // 2)


def test_all_rows_are_the_chunk_as_it_was():
    whole = chunks_of(counts((67, 131)))
    [band] = blocks.bands(whole, [(0, 67)])
    assert band == whole


@pytest.mark.parametrize("shape", [(1, 5), (64, 64), (65, 64), (67, 131)])
@pytest.mark.parametrize("change", [lambda chunk: chunk[:-1], lambda chunk: chunk + b"x", lambda chunk: chunk[:12]])
def test_a_chunk_of_which_the_blocks_do_not_add_up_is_refused(shape, change):
    whole = chunks_of(counts(shape))
    first, second = whole.chunks
    blocks.places(whole)
    with pytest.raises(ValueError, match="do not add up to chunks of"):
        blocks.places(replace(whole, chunks=(first, change(second))))


@pytest.mark.parametrize("length", [0, 1, 2**31 - 1, 2**32 - 1])
def test_a_chunk_of_which_a_block_has_a_false_length_is_refused(length):
    whole = chunks_of(counts((67, 131), n=1))
    [chunk] = whole.chunks
    false = chunk[:12] + struct.pack(">I", length) + chunk[16:]
    with pytest.raises(ValueError, match="do not add up to chunks of"):
        list(blocks.bands(replace(whole, chunks=(false,)), [(0, 30), (30, 67)]))


def test_a_chunk_with_a_block_that_cannot_be_so_small_is_refused():
    """As a whole it could be packed into so few bytes; a band of it could not."""
    size, block = 3 * 8192, 8192
    parts = [bytes(200), b"\0", bytes(200)]
    chunk = blocks.HEADER.pack(size, block) + b"".join(struct.pack(">I", len(part)) + part for part in parts)
    frames = replace(chunks_of(counts((3, 4096)), 4096), chunks=(chunk, chunk))
    blocks.check(frames)
    with pytest.raises(ValueError, match="cannot be packed into so few"):
        blocks.places(frames)
