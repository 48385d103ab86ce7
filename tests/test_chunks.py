"""Frames go to the workers as their detector compressed them, and arrive as if they had been decompressed before."""

import json
from dataclasses import replace

import h5py
import hdf5plugin
import numpy as np
import pytest
from cbor2 import CBORTag
from hypothesis import given
from hypothesis import strategies as st

from stream import wire
from stream.ingest.chunks import Unpacking
from stream.ingest.dectris import DectrisDecoder
from stream.ingest.dectris_messages import Pixels
from stream.ingest.hdf5 import Hdf5Source
from stream.ingest.packed import is_packable
from stream.ingest.recording import RecordingSource
from stream.messages import Chunks, Events, FrameBatch, Rejected, RunStart, RunStop
from stream.regions import Regions
from stream.sinks.pieces import Pieces
from stream.wire import MAX_LENGTH
from tests import dectris_hostile
from tests.conftest import chunks_of, make_start
from tests.test_dectris import end_message, image_messages, start_message

SHAPE = (67, 131)
"""Three blocks of uint16, of which the last is not whole, and pixels that are no group of eight."""

BANDS = [(0, 16), (16, 33), (33, 50), (50, 67)]
"""Rows of 4 regions."""

START = make_start(SHAPE, saturation_value=65534, metadata={"n_frames": 10})
STOP = RunStop(run=START.run, n_frames=10, exit_status="success")


def counts(n=8, mean=3.0, shape=SHAPE, dtype="<u2", seed=0):
    return np.random.default_rng(seed).poisson(mean, (n, *shape)).astype(dtype)


def batch(frames, first=5):
    return FrameBatch(run=START.run, first=first, frames=frames, timestamp_ns=10**18)


def carried(messages, n_regions=1):
    """Cut messages into regions, send them over our wire, and unpack them: a list per region."""
    unpack = [Unpacking() for _ in range(n_regions)]
    arrived = [[] for _ in range(n_regions)]
    regions = Regions(n_regions)
    for message in messages:
        for part in regions.cut(message):
            arrived[part.region] += unpack[part.region](wire.decode([bytes(each) for each in wire.encode(part)]))
    return arrived


def frames_of(messages):
    """The frames by number, dense."""
    batches = [(m.first, m.frames) for m in messages if isinstance(m, FrameBatch)]
    assert not any(isinstance(frames, Chunks) for _, frames in batches)
    return {first + i: frame for first, frames in batches for i, frame in enumerate(frames)}


def assert_frames(found, expected, first=5):
    assert list(found) == list(range(first, first + len(expected)))
    np.testing.assert_array_equal(list(found.values()), expected)


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(["|u1", "<u2", "<u4"]),
    counts_per_block=st.sampled_from([0, 8, 64, 4096, 2**18]),
    n=st.integers(1, 7),
    mean=st.sampled_from([0, 0.005, 0.02, 2, 100]),
)
def test_every_region_has_the_rows_of_the_frames(shape, dtype, counts_per_block, n, mean):
    frames = counts(3, mean, shape, dtype)
    n = min(n, shape[0])
    sent = [make_start(shape, dtype=dtype), batch(chunks_of(frames, counts_per_block))]
    arrived = carried(sent, n)
    assert all(isinstance(start, RunStart) and part.frames.dtype == dtype for start, part in arrived)
    bands = [[frame for _, frame in sorted(frames_of(messages).items())] for messages in arrived]
    np.testing.assert_array_equal(np.concatenate(bands, axis=1), frames)


@pytest.mark.parametrize(("mean", "kind"), [(0.01, Events), (1, np.ndarray)])
def test_frames_arrive_as_events_where_they_are_dim(mean, kind):
    frames = counts(mean=mean)
    for messages, rows in zip(
        carried([START, batch(chunks_of(frames))], 4), [frames[:, a:b] for a, b in BANDS], strict=True
    ):
        _, arrived = messages
        assert isinstance(arrived.frames, kind)
        assert (arrived.first, arrived.timestamp_ns) == (5, 10**18)
        if kind is Events:
            wire.check_events(arrived.frames)
            np.testing.assert_array_equal(arrived.frames.dense(), rows)
        else:
            assert arrived.frames.flags.c_contiguous
            assert not arrived.frames.flags.writeable
            np.testing.assert_array_equal(arrived.frames, rows)


def test_pixels_masked_in_the_first_of_dim_frames_are_events_of_that_one_only():
    frames = counts(mean=0.01)
    frames[:, 20:40] = 65535
    [[_, arrived]] = carried([START, batch(chunks_of(frames))])
    assert isinstance(arrived.frames, Events)
    frames[1:, 20:40] = 0
    np.testing.assert_array_equal(arrived.frames.dense(), frames)


@pytest.mark.parametrize("start", [[], [replace(START, run="other")], [replace(START, saturation_value=None)]])
def test_where_nobody_told_the_largest_count_every_value_is_one(start):
    frames = counts(mean=0.01)
    frames[:, 20] = 65535
    [[*_, arrived]] = carried([*start, batch(chunks_of(frames))])
    assert_frames(frames_of([arrived]), frames)


def test_all_other_messages_pass_as_they_are():
    unpack = Unpacking()
    for message in (START, batch(counts()), STOP, Rejected(reason="odd")):
        [passed] = unpack(message)
        assert passed is message


def spoilt(chunk):
    """A chunk of which the first block is as long as it was, and can no longer be decompressed."""
    return chunk[:16] + b"\xff" * 40 + chunk[56:]


@pytest.mark.parametrize("mean", [0.01, 3])
@pytest.mark.parametrize("numbers", [{0}, {7}, {3}, {3, 4}, {0, 1, 5, 7}, set(range(8))])
def test_damaged_frames_are_rejected_by_name_and_all_others_are_kept(mean, numbers):
    frames = counts(mean=mean)
    chunks = chunks_of(frames)
    chunks = replace(chunks, chunks=tuple(spoilt(c) if i in numbers else c for i, c in enumerate(chunks.chunks)))
    [[_, *arrived]] = carried([START, batch(chunks)])
    rejected = [m.reason for m in arrived if isinstance(m, Rejected)]
    assert [reason.split(": ")[:2] for reason in rejected] == [
        [f"frame {5 + i} of run run-1", "bslz4"] for i in sorted(numbers)
    ]
    found = frames_of(arrived)
    assert set(found) == {5 + i for i in range(8) if i not in numbers}
    for number, frame in found.items():
        np.testing.assert_array_equal(frame, frames[number - 5])
    for part in (m for m in arrived if isinstance(m, FrameBatch)):
        assert part.timestamp_ns == 10**18 + (part.first - 5) * 10_000_000


@pytest.mark.parametrize("mean", [0.01, 3])
def test_whatever_bits_are_flipped_the_frames_beside_them_are_kept(mean):
    rng = np.random.default_rng(1)
    frames = counts(3, mean)
    chunks = chunks_of(frames)
    n_rejected = 0
    for _ in range(200):
        flipped = bytearray(chunks.chunks[1])
        flipped[rng.integers(16, len(flipped))] ^= 1 << rng.integers(8)
        sent = replace(chunks, chunks=(chunks.chunks[0], bytes(flipped), chunks.chunks[2]))
        if not is_packable(image_of(flipped)):
            continue  # refused where it is read, since a block has another length now
        for messages, rows in zip(
            carried([START, batch(sent)], 3), (slice(0, 22), slice(22, 44), slice(44, 67)), strict=True
        ):
            found = frames_of(messages)
            n_rejected += sum(isinstance(m, Rejected) for m in messages)
            assert len(found) + sum(isinstance(m, Rejected) for m in messages) == 3
            for i in (0, 2):
                np.testing.assert_array_equal(found[5 + i], frames[i, rows])
    assert n_rejected > 20


@pytest.mark.parametrize("mean", [0, 0.01, 3])
def test_chunks_cut_anywhere_by_a_liar_are_rejected(mean):
    frames = counts(2, mean)
    good, bad = chunks_of(frames).chunks
    shortest = -(-frames[0].nbytes // 255)
    for end in range(shortest, len(bad), 7):
        sent = batch(replace(chunks_of(frames[:1]), shape=(2, *SHAPE), chunks=(good, bad[:end])))
        [kept, rejected] = Unpacking()(wire.decode(wire.encode(sent)))
        assert_frames(frames_of([kept]), frames[:1])
        assert isinstance(rejected, Rejected)


def image_of(data, shape=SHAPE, dtype="<u2", codec="bslz4"):
    return Pixels(shape=shape, dtype=dtype, codec=codec, data=bytes(data))


def test_images_whose_blocks_do_not_add_up_are_not_taken_on():
    [chunk] = chunks_of(counts(1)).chunks
    assert is_packable(image_of(chunk))
    for wrong in (chunk[:-1], chunk + b"x", chunk[:12], chunk[:8] + bytes(4) + chunk[12:]):
        assert not is_packable(image_of(wrong))
    assert not is_packable(image_of(chunk, codec="lz4"))


def dectris(messages, **options):
    decoder = DectrisDecoder(**options)
    return [m for parts in messages for m in decoder.feed(parts)] + list(decoder.idle())


def dectris_start(version, n=10):
    return start_message(version, replace(START, run="series-1", metadata={"n_frames": n}))


def kinds(messages):
    return [(m.first, type(m.frames).__name__, len(m.frames)) for m in messages if isinstance(m, FrameBatch)]


@pytest.mark.parametrize("version", [1, 2])
def test_a_detector_s_images_are_taken_on_as_they_are(version):
    frames = counts(10)
    images = image_messages(version, frames)
    messages = [dectris_start(version), *images, end_message(version)]
    given_on, decoded = dectris(messages, batch=4, give="chunks"), dectris(messages, batch=4)
    assert kinds(given_on) == [(0, "Chunks", 4), (4, "Chunks", 4), (8, "Chunks", 2)]
    assert [type(m) for m in given_on] == [type(m) for m in decoded]
    assert given_on[0] == decoded[0]
    [arrived] = carried(given_on)
    assert_frames(frames_of(arrived), frames, 0)


@pytest.mark.parametrize("compression", ["lz4", "none"])
def test_images_in_another_codec_are_decoded_and_those_after_are_not(compression):
    frames = counts(9)
    images = [
        *image_messages(2, frames[:3]),
        *image_messages(2, frames[3:6], first=3, compression=compression),
        *image_messages(2, frames[6:], first=6),
    ]
    messages = dectris([dectris_start(2), *images], batch=3, give="chunks")
    assert kinds(messages) == [(0, "Chunks", 3), (3, "ndarray", 3), (6, "Chunks", 3)]
    [arrived] = carried(messages)
    assert_frames(frames_of(arrived), frames, 0)


def test_images_of_another_kind_begin_another_batch():
    wide = counts(2, dtype="<u4")
    images = [*image_messages(2, counts(2)), *image_messages(2, wide, first=2)]
    messages = dectris([dectris_start(2), *images], give="chunks")
    assert kinds(messages) == [(0, "Chunks", 2), (2, "Chunks", 2)]


def test_images_that_the_detector_left_to_us_to_mask_are_masked():
    mask = np.zeros(SHAPE, "<u4")
    mask[3, 4:90] = 1
    start = dectris_hostile.v2_start(
        pixel_mask={"threshold_1": CBORTag(40, [list(SHAPE), CBORTag(70, mask.tobytes())])},
        pixel_mask_enabled=False,
        series_unique_id="series-1",
    )
    frames = counts(4)
    [_, masked] = dectris([start, *image_messages(2, frames)], give="chunks")
    frames[:, mask != 0] = 65535
    np.testing.assert_array_equal(masked.frames, frames)


@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: data + b"x"])
def test_a_damaged_image_is_rejected_where_it_is_read(change):
    images = image_messages(1, counts(9))
    described = json.loads(images[4][1])
    images[4][2] = change(bytes(images[4][2]))
    images[4][1] = json.dumps(described | {"size": len(images[4][2])}).encode()
    messages = dectris([dectris_start(1), *images], give="chunks")
    [rejected] = [message for message in messages if isinstance(message, Rejected)]
    assert rejected.reason.startswith("image 4 of series-1: bslz4: ")
    assert kinds(messages) == [(0, "Chunks", 4), (5, "Chunks", 4)]


@pytest.mark.parametrize("name", ["eiger1m_stream_v1.cbors.xz", "eiger1m_stream_v2.cbors.xz"])
def test_a_real_detector_s_images_arrive_as_they_were(shared_data, name):
    frames = np.concatenate([m.frames for m in RecordingSource(shared_data / name) if isinstance(m, FrameBatch)])
    messages = list(RecordingSource(shared_data / name, give="chunks"))
    assert {kind for _, kind, _ in kinds(messages)} == {"Chunks"}
    arrived = carried(messages, 4)
    # dim, so that pixels masked in the first frame of a batch are not told again
    first = frames[0] > np.iinfo(frames.dtype).max - 1
    expected = frames.copy()
    expected[1:, first] = 0
    bands = [list(frames_of(region).values()) for region in arrived]
    np.testing.assert_array_equal(np.concatenate(bands, axis=1), expected)


def write(path, frames, **storage):
    with h5py.File(path, "w") as file:
        file["entry/instrument/detector/frame_time"] = 0.01
        options = {"chunks": (1, *frames.shape[1:]), **hdf5plugin.Bitshuffle()} | storage
        file.create_dataset("entry/data/data", data=frames, **options)
    return path


def read(path, **options):
    with Hdf5Source(path, give="chunks", **options) as source:
        return list(source)


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4", "<i2", "<i4"])
def test_frames_of_a_file_are_taken_on_as_they_are(tmp_path, dtype):
    frames = counts(10, dtype=dtype)
    messages = read(write(tmp_path / "x.h5", frames), batch=4)
    assert kinds(messages) == [(0, "Chunks", 4), (4, "Chunks", 4), (8, "Chunks", 2)]
    [arrived] = carried(messages)
    assert_frames(frames_of(arrived), frames, 0)


@pytest.mark.parametrize(
    "storage",
    [
        {"chunks": (2, *SHAPE)},
        {"chunks": (1, 30, 40)},
        dict(hdf5plugin.LZ4()),
        {"compression": None, "compression_opts": None},
        dict(hdf5plugin.Bitshuffle(cname="zstd")),
    ],
)
def test_frames_of_a_file_that_are_stored_in_another_way_are_decoded(tmp_path, storage):
    frames = counts(4)
    messages = read(write(tmp_path / "x.h5", frames, **storage))
    assert kinds(messages) == [(0, "ndarray", 4)]
    np.testing.assert_array_equal(messages[1].frames, frames)


def test_frames_that_an_eiger_left_to_us_to_mask_are_masked(tmp_path):
    mask = np.zeros(SHAPE, "<u4")
    mask[3, 4:90] = 1
    frames = counts(4)
    path = write(tmp_path / "x.h5", frames)
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/detectorSpecific/nimages"] = 4
        file["entry/instrument/detector/detectorSpecific/pixel_mask"] = mask
    messages = read(path)
    frames[:, mask != 0] = 65535
    assert kinds(messages) == [(0, "ndarray", 4)]
    np.testing.assert_array_equal(messages[1].frames, frames)


def test_big_endian_frames_of_a_file_are_decoded(tmp_path):
    frames = counts(4, dtype=">u2")
    messages = read(write(tmp_path / "x.h5", frames))
    assert kinds(messages) == [(0, "ndarray", 4)]
    np.testing.assert_array_equal(messages[1].frames, frames)


def test_bad_frames_of_a_file_are_rejected_and_the_others_of_their_batch_decoded(tmp_path):
    frames = counts(12)
    path = write(tmp_path / "x.h5", frames)
    with h5py.File(path, "r+") as file:
        dataset = file["entry/data/data"].id
        chunk = dataset.read_direct_chunk((1, 0, 0))[1]
        dataset.write_direct_chunk((1, 0, 0), chunk[:-3])
        dataset.write_direct_chunk((9, 0, 0), frames[9].tobytes(), filter_mask=1)
    messages = read(path, batch=4)
    assert kinds(messages) == [(0, "ndarray", 1), (2, "ndarray", 2), (4, "Chunks", 4), (8, "ndarray", 4)]
    [arrived] = carried([m for m in messages if not isinstance(m, Rejected)])
    found = frames_of(arrived)
    assert list(found) == [0, *range(2, 12)]
    np.testing.assert_array_equal(list(found.values()), np.delete(frames, 1, axis=0))


def test_batches_are_no_longer_than_a_header_has_lengths_for(tmp_path):
    path = write(tmp_path / "x.h5", counts(MAX_LENGTH + 4, shape=(1, 3)))
    assert kinds(read(path, batch=2 * MAX_LENGTH)) == [(0, "Chunks", MAX_LENGTH), (MAX_LENGTH, "Chunks", 4)]


def test_the_lengths_of_many_small_chunks_count_for_the_size_of_a_piece():
    sent = batch(chunks_of(counts(4000, shape=(1, 3))))
    limit = 2048 + 3000 * len(sent.frames.chunks[0])
    pieces = list(Pieces(limit).cut(sent))
    assert len(pieces) == 2
    assert all(sum(len(part) for part in wire.encode(piece)) <= limit for piece in pieces)


def test_chunks_are_cut_into_pieces_of_limited_size():
    frames = counts(8)
    sent = batch(chunks_of(frames))
    limit = 2048 + 2 * max(map(len, sent.frames.chunks)) + 20
    pieces = list(Pieces(limit).cut(sent))
    assert [(piece.first, len(piece.frames)) for piece in pieces] == [(5, 2), (7, 2), (9, 2), (11, 2)]
    assert all(sum(len(part) for part in wire.encode(piece)) <= limit for piece in pieces)
    [arrived] = carried(pieces)
    assert_frames(frames_of(arrived), frames)
