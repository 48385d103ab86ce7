"""Dim frames become the events that they are made of, whatever their bytes, and bright ones do not."""

import re
import struct
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import DecodeError
from stream.ingest.dectris_messages import Pixels
from stream.ingest.photons import Photons, is_dim
from stream.sinks.dectris_image import Compressor
from tests.conftest import events_of

SHAPE = (67, 131)
"""Three blocks of uint16, of which the last is not whole, and pixels that are no group of eight."""


def image_of(frame, codec="bslz4"):
    with closing(Compressor(codec, framed=True)) as compressor:
        data = bytes(compressor.compress(frame))
    return Pixels(shape=frame.shape, dtype=frame.dtype.str, codec=codec, data=data)


def dim(n, mean=0.01, shape=SHAPE, dtype="<u2", seed=0):
    return np.random.default_rng(seed).poisson(mean, (n, *shape)).astype(dtype)


def photons_of(frames, limit=None):
    photons = Photons(frames[0], np.iinfo(frames.dtype).max - 1 if limit is None else limit)
    for frame in frames[1:]:
        image = image_of(frame)
        assert photons.fits(image)
        photons.append(image)
    return photons.frames()


def assert_same(events, expected):
    assert events.shape == expected.shape
    for name in ("offsets", "pixels", "counts"):
        found, wanted = getattr(events, name), getattr(expected, name)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted, err_msg=name)


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    dtype=st.sampled_from(["<u2", "<u4"]),
    mean=st.sampled_from([0, 1e-3, 0.01, 0.1, 1, 300]),
    seed=st.integers(0, 2**32),
)
def test_the_events_are_those_of_the_frames(shape, dtype, mean, seed):
    frames = dim(4, mean, shape, dtype, seed)
    assert_same(photons_of(frames), events_of(frames))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_counts_of_any_size_are_exact(dtype):
    frames = np.zeros((3, *SHAPE), dtype)
    largest = np.iinfo(dtype).max - 1
    frames[:, 3, ::2] = np.linspace(1, largest, frames[:, 3, ::2].size).astype(dtype).reshape(3, -1)
    frames[:, -1, -1] = 1, 255, largest
    assert_same(photons_of(frames), events_of(frames))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_pixels_masked_in_the_first_frame_are_events_of_that_one_only(dtype):
    frames = dim(5, dtype=dtype)
    frames[:, 20:24] = np.iinfo(dtype).max
    frames[:, :, 40] = np.iinfo(dtype).max
    expected = frames.copy()
    expected[1:, 20:24] = expected[1:, :, 40] = 0
    assert_same(photons_of(frames), events_of(expected))


def test_pixels_above_the_limit_are_masked_and_those_at_it_are_not():
    frames = dim(3)
    frames[:, 1, 1], frames[:, 2, 2] = 1000, 1001
    expected = frames.copy()
    expected[1:, 2, 2] = 0
    assert_same(photons_of(frames, limit=1000), events_of(expected))


def test_where_every_value_is_a_count_none_is_left_out():
    frames = dim(3)
    frames[:, 1, 1] = 65535
    assert_same(photons_of(frames, limit=65535), events_of(frames))


def test_pixels_that_overflow_later_are_events_as_they_are():
    frames = dim(4)
    frames[2:, 5, 6] = 65535
    assert_same(photons_of(frames), events_of(frames))


def test_a_frame_brighter_than_the_first_is_just_more_events():
    frames = dim(3)
    frames[1] = np.random.default_rng(1).integers(0, 65535, SHAPE)
    assert_same(photons_of(frames), events_of(frames))


def mutated(data, rng):
    """Bytes changed, lost, repeated or added, and sizes that lie."""
    data, at = bytearray(data), int(rng.integers(12, len(data)))
    match rng.integers(6):
        case 0:
            data[at] ^= 1 << rng.integers(8)
        case 1:
            data[at : at + rng.integers(1, 40)] = rng.integers(0, 256, rng.integers(1, 40), np.uint8).tobytes()
        case 2:
            del data[at:]
        case 3:
            data[at:at] = data[at : at + rng.integers(1, 40)]
        case 4:
            data += bytes(rng.integers(1, 40))
        case 5:
            data[12:16] = struct.pack(">I", rng.choice([0, 1, 8192, len(data), 2**31 - 1, 2**31, 2**32 - 1]))
    return bytes(data)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("mean", [0, 0.01, 1])
@pytest.mark.parametrize("shape", [SHAPE, (64, 80)])
def test_damaged_bytes_are_what_the_dense_decoder_reads_or_are_refused(dtype, mean, shape):
    rng = np.random.default_rng(2)
    first, frame = dim(2, mean, shape, dtype)
    good = image_of(frame)
    refused = 0
    for _ in range(500):
        image = Pixels(shape=shape, dtype=dtype, codec="bslz4", data=mutated(good.data, rng))
        photons = Photons(first, np.iinfo(dtype).max)
        try:
            expected = [first, image.decompress()]
        except DecodeError as error:
            with pytest.raises(DecodeError, match=f"^{re.escape(str(error))}$"):
                photons.append(image)
            expected = [first]
            refused += 1
        else:
            photons.append(image)
        assert_same(photons.frames(), events_of(np.stack(expected)))
    assert 200 < refused < 500


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_frame_cut_anywhere_is_refused(dtype):
    first, frame = dim(2, dtype=dtype)
    whole = image_of(frame).data
    photons = Photons(first, 1000)
    for end in range(12, len(whole)):
        with pytest.raises(DecodeError, match="bslz4: "):
            photons.append(Pixels(shape=SHAPE, dtype=dtype, codec="bslz4", data=whole[:end]))
    assert len(photons) == 1


def test_bytes_after_the_last_pixel_are_refused():
    first, frame = dim(2)
    with pytest.raises(DecodeError, match="bslz4: "):
        Photons(first, 1000).append(Pixels(shape=SHAPE, dtype="<u2", codec="bslz4", data=image_of(frame).data + b"x"))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4096, 8191, 16384])
def test_blocks_of_another_size_are_left_to_the_dense_decoder(size):
    first, frame = dim(2)
    data = bytearray(image_of(frame).data)
    data[8:12] = struct.pack(">I", size)
    image = Pixels(shape=SHAPE, dtype="<u2", codec="bslz4", data=bytes(data))
    assert not is_dim(image, frame, 1000, before=True)
    assert not Photons(first, 1000).fits(image)


@pytest.mark.parametrize("other", [dim(1, dtype="<u4")[0], dim(1, shape=SHAPE[::-1])[0]])
def test_frames_of_another_kind_do_not_fit(other):
    photons = Photons(dim(1)[0], 1000)
    assert photons.fits(image_of(dim(1)[0]))
    assert not photons.fits(image_of(other))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize(
    ("lit", "before", "expected"),
    [
        (0, False, True),
        (0.019, False, True),
        (0.021, False, False),
        (0.024, True, True),
        (0.026, True, False),
        (1, True, False),
    ],
)
def test_frames_are_dim_up_to_a_fortieth_of_pixels_that_are_lit_if_those_before_were(dtype, lit, before, expected):
    frame = np.zeros((200, 100), dtype)
    frame.ravel()[: int(lit * frame.size)] = 2000
    assert is_dim(image_of(frame), frame, 2000, before=before) is expected


def test_masked_pixels_are_not_lit():
    frame = dim(1)[0]
    frame[:30] = 65535
    assert is_dim(image_of(frame), frame, 65534, before=False)
    assert not is_dim(image_of(frame), frame, 65535, before=False)


@pytest.mark.parametrize(("dtype", "codec"), [("|u1", "bslz4"), ("<u2", "lz4"), ("<u4", "none")])
def test_frames_of_bytes_and_of_other_codecs_are_not_dim(dtype, codec):
    frame = dim(1, 0.001, dtype=dtype)[0]
    assert not is_dim(image_of(frame, codec), frame, 100, before=True)


def test_bytes_that_are_said_to_be_of_another_codec_are_not_taken_for_bitshuffle():
    [frame] = dim(1)
    assert not Photons(frame, 1000).fits(replace(image_of(frame), codec="lz4"))
