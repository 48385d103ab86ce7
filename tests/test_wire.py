import contextlib
import subprocess
import sys
import tracemalloc
from dataclasses import fields, replace
from io import BytesIO

import h5py
import hdf5plugin
import msgpack
import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stream.errors import DecodeError
from stream.messages import Chunks, Events, FrameBatch, Result, RunStart, RunStop
from stream.wire import MAX_COUNT, MAX_FRAME_BYTES, MAX_LENGTH, check_start, decode, encode, pack_arrays, unpack_arrays
from tests import hostile
from tests.conftest import chunks_of, events_of


def same(one, other):
    """Equal in type, dtype and every value, NaN included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, RunStart | FrameBatch | Events | Chunks | RunStop | Result):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


RUN = "9f3c"
COUNTS = np.arange(24, dtype="<u2").reshape(2, 3, 4)
FEW = np.array([[[0, 0, 7], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 258]]], "<u2")
BAND = Chunks(shape=(2, 2, 4), dtype=np.dtype("<u2"), skip=4, chunks=chunks_of(COUNTS).chunks)
T0 = 1_750_000_000_000_000_000

TABLE = [
    (
        RunStart(
            run=RUN,
            region=2,
            shape=(3, 4),
            origin=(6, 0),
            detector_shape=(9, 4),
            dtype="<u2",
            saturation_value=65534,
            frame_time=0.001,
            count_time=0.0005,
            metadata={"sample": "latex", "truth": {"rate": [1.5, 2]}},
        ),
        b"start/2",
        {
            "s": "start",
            "v": 1,
            "run": RUN,
            "region": 2,
            "shape": [3, 4],
            "origin": [6, 0],
            "detector_shape": [9, 4],
            "dtype": "<u2",
            "saturation_value": 65534,
            "frame_time": 0.001,
            "count_time": 0.0005,
            "metadata": {"sample": "latex", "truth": {"rate": [1.5, 2]}},
        },
        "",
    ),
    (
        FrameBatch(run=RUN, region=2, first=7, frames=COUNTS, timestamp_ns=T0),
        b"frames/2",
        {
            "s": "frames",
            "v": 1,
            "run": RUN,
            "region": 2,
            "first": 7,
            "n": 2,
            "shape": [3, 4],
            "dtype": "<u2",
            "codec": "raw",
            "nbytes": 48,
            "crc32c": 0x05D7793D,
            "timestamp_ns": T0,
        },
        "0000010002000300040005000600070008000900 0a000b000c000d000e000f001000110012001300140015001600 1700",
    ),
    (
        FrameBatch(run=RUN, region=2, first=7, frames=events_of(FEW), timestamp_ns=T0),
        b"frames/2",
        {
            "s": "frames",
            "v": 1,
            "run": RUN,
            "region": 2,
            "first": 7,
            "n": 3,
            "shape": [2, 3],
            "dtype": "<u2",
            "codec": "events",
            "nbytes": 50,
            "crc32c": 0x1C40E3BE,
            "timestamp_ns": T0,
        },
        "0000000000000000 0100000000000000 0100000000000000 030000000000000002000000 00000000 050000000700 0100 0201",
    ),
    (
        FrameBatch(run=RUN, region=2, first=7, frames=BAND, timestamp_ns=T0),
        b"frames/2",
        {
            "s": "frames",
            "v": 1,
            "run": RUN,
            "region": 2,
            "first": 7,
            "n": 2,
            "shape": [2, 4],
            "dtype": "<u2",
            "codec": "bslz4-frames",
            "nbytes": 79,
            "crc32c": 0x4B6DDCFC,
            "timestamp_ns": T0,
            "skip": 4,
            "lengths": [37, 42],
        },
        "0000000000000018 00002000 0000000d 43aaccf0000100500000000000 08000900 0a000b00"
        "0000000000000018 00002000 00000012 f001aacc0f0ff0 0000000000000000000000 14001500 16001700",
    ),
    (
        RunStop(run=RUN, region=2, n_frames=1000, exit_status="abort"),
        b"stop/2",
        {"s": "stop", "v": 1, "run": RUN, "region": 2, "n_frames": 1000, "exit_status": "abort"},
        "",
    ),
    (
        Result(
            run=RUN,
            region=2,
            operator="multitau",
            n_frames=9,
            final=True,
            arrays={"n_pairs": np.array([8, 7], "<i4"), "contrast": np.array(1.5)},
        ),
        b"result/multitau/2",
        {
            "s": "result",
            "v": 1,
            "run": RUN,
            "region": 2,
            "operator": "multitau",
            "n_frames": 9,
            "final": True,
            "arrays": [
                {"name": "n_pairs", "dtype": "<i4", "shape": [2], "nbytes": 8, "crc32c": 0xD7130E9A},
                {"name": "contrast", "dtype": "<f8", "shape": [], "nbytes": 8, "crc32c": 0x3B562AD9},
            ],
        },
        "0800000007000000 000000000000f83f",
    ),
]

kinds = pytest.mark.parametrize(("message", "route", "header", "payload"), TABLE, ids=lambda v: type(v).__name__)


@kinds
def test_a_message_is_written_as_the_table_says(message, route, header, payload):
    parts = encode(message)
    assert [bytes(parts[0]), msgpack.unpackb(parts[1]), bytes(parts[2])] == [route, header, bytes.fromhex(payload)]


@kinds
def test_what_the_table_says_is_read_as_the_message(message, route, header, payload):
    assert same(decode([route, msgpack.packb(header), bytes.fromhex(payload)]), message)


@kinds
def test_unknown_fields_are_ignored(message, route, header, payload):
    packed = msgpack.packb(header | {"temperature": 293.0, "extra": {"a": [1]}})
    assert same(decode([route, packed, bytes.fromhex(payload)]), message)


@kinds
def test_an_unknown_version_is_refused_by_name(message, route, header, payload):
    with pytest.raises(DecodeError, match=f"{header['s']}: version v = 2 is unknown; known are 1"):
        decode([route, msgpack.packb(header | {"v": 2}), bytes.fromhex(payload)])


@kinds
def test_every_field_of_the_table_but_the_optional_is_needed(message, route, header, payload):
    for name in header.keys() - {"detector_shape"}:
        fewer = {key: value for key, value in header.items() if key != name}
        with pytest.raises(DecodeError):
            decode([route, msgpack.packb(fewer), bytes.fromhex(payload)])


def test_the_checksum_is_crc32c_castagnoli():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
counts = st.integers(0, MAX_COUNT)
regions = st.integers(0, 2**31 - 1)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
times = st.floats(1e-7, 1e4)
starts = st.builds(
    lambda longer, shorter, **rest: RunStart(frame_time=max(longer, shorter), count_time=min(longer, shorter), **rest),
    longer=times,
    shorter=times,
    run=names,
    region=regions,
    shape=st.tuples(st.integers(1, 8000), st.integers(1, 8000)),
    origin=st.tuples(regions, regions),
    dtype=st.sampled_from(["|u1", "<u2", "<u4"]),
    saturation_value=st.none() | st.integers(0, 2**32 - 1),
    metadata=st.dictionaries(names, plain, max_size=4),
)
batches = st.builds(
    FrameBatch,
    run=names,
    region=regions,
    first=st.integers(0, MAX_COUNT - 5),
    frames=(
        counted := hnp.arrays(
            st.sampled_from(["|u1", "<u2", "<u4"]), hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=5)
        )
    )
    | counted.map(events_of)
    | counted.map(chunks_of),
    timestamp_ns=st.integers(0, 2**63 - 1),
)
stops = st.builds(
    RunStop, run=names, region=regions, n_frames=counts, exit_status=st.sampled_from(["success", "abort", "fail"])
)
arrays = st.dictionaries(
    names,
    hnp.arrays(
        st.sampled_from(["|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f4", "<f8"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    max_size=5,
)
results = st.builds(
    Result,
    run=names,
    region=regions,
    operator=st.text("abcxyz_-.0189", min_size=1, max_size=20),
    n_frames=counts,
    final=st.booleans(),
    arrays=arrays,
)


@given(starts | batches | stops | results)
def test_every_message_comes_back_the_same(message):
    assert same(decode([bytes(part) for part in encode(message)]), message)


@given(counted)
def test_events_are_the_frames(frames):
    events = events_of(frames)
    assert (len(events), events.shape, events.dtype) == (len(frames), frames.shape, frames.dtype)
    assert same(events.dense(), frames)
    assert same(np.array(list(events)), frames)


@given(counted, st.integers(0, 6), st.integers(0, 6))
def test_a_part_of_events_is_that_part_of_the_frames(frames, first, end):
    events = events_of(frames)
    part = events[first:end]
    assert same(part, events_of(frames[first:end]))
    assert not part.pixels.size or np.shares_memory(part.pixels, events.pixels)


def test_events_are_not_copied_on_the_way_in_and_cannot_be_written_to():
    parts = hostile.events()
    frames = decode(parts).frames
    for array in (frames.offsets, frames.pixels, frames.counts):
        assert np.shares_memory(array, np.frombuffer(parts[2], "u1"))
        assert array.flags.aligned
        assert not array.flags.writeable


def test_many_frames_of_few_events_may_be_larger_than_a_message_of_dense_frames():
    events = Events(
        shape=(5000, 2**14, 2**14),
        offsets=np.minimum(np.arange(5001), 1),
        pixels=np.array([2**28 - 1], "u4"),
        counts=np.array([3], "u1"),
    )
    assert same(decode(encode(FrameBatch(run=RUN, first=0, frames=events, timestamp_ns=T0))).frames, events)


@given(arrays)
def test_every_array_comes_back_the_same_aligned_and_read_only(arrays):
    table, buffers = pack_arrays(arrays)
    table = msgpack.unpackb(msgpack.packb(table))
    back = unpack_arrays(table, b"".join(buffers))
    assert same(back, arrays)
    assert all(array.flags.aligned and not array.flags.writeable for array in back.values())


@given(st.lists(st.binary(max_size=40), min_size=3, max_size=3))
def test_random_bytes_are_refused(parts):
    with pytest.raises(DecodeError):
        decode(parts)


@given(st.sampled_from(hostile.ALIVE), st.data())
def test_a_header_with_any_byte_changed_is_read_or_refused(parts, data):
    packed = bytearray(parts[1])
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DecodeError):
        decode([parts[0], packed, parts[2]])


def test_what_the_hostile_corpus_is_made_from_is_well_formed():
    assert [type(decode(parts)) for parts in hostile.ALIVE] == [
        RunStart,
        FrameBatch,
        RunStop,
        Result,
        FrameBatch,
        FrameBatch,
    ]


def test_every_hostile_message_is_refused_in_a_line_that_names_the_thing():
    for name, parts, says in hostile.CORPUS:
        with pytest.raises(DecodeError) as refused:
            decode(parts)
        reason = str(refused.value)
        assert says in reason, name
        assert "\n" not in reason, name
        assert len(reason) < 400, name


def test_hostile_messages_cannot_make_us_allocate_much():
    tracemalloc.start()
    try:
        for _, parts, _ in hostile.CORPUS:
            with pytest.raises(DecodeError):
                decode(parts)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**26


def chunk(counts, compression):
    with h5py.File(BytesIO(), "w") as file:
        dataset = file.create_dataset("counts", data=counts, chunks=counts.shape, compression=compression)
        return dataset.id.read_direct_chunk((0, 0, 0))[1]


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
@pytest.mark.parametrize(("codec", "compression"), [("bslz4", hdf5plugin.Bitshuffle()), ("lz4", hdf5plugin.LZ4())])
def test_frames_compressed_by_the_hdf5_filters_are_read(codec, compression, dtype):
    counts = np.random.default_rng(7).poisson(0.5, (3, 61, 83)).astype(dtype)
    payload = chunk(counts, compression)
    assert len(payload) < counts.nbytes
    batch = decode(
        hostile.frames(
            payload, n=3, shape=[61, 83], dtype=dtype, codec=codec, nbytes=len(payload), crc32c=crc32c(payload)
        )
    )
    assert same(batch.frames, counts)
    assert not batch.frames.flags.writeable


def test_frames_are_not_copied_on_the_way_in():
    payload = bytes(hostile.PAYLOAD)
    batch = decode(hostile.frames(payload))
    assert np.shares_memory(batch.frames, np.frombuffer(payload, "u1"))


def test_frames_are_not_copied_on_the_way_out():
    payload = encode(FrameBatch(run=RUN, first=0, frames=COUNTS, timestamp_ns=T0))[2]
    assert np.shares_memory(COUNTS, np.frombuffer(payload, "u1"))


def test_frames_cannot_be_written_to_even_if_the_payload_can():
    assert not decode(hostile.frames(bytearray(hostile.PAYLOAD))).frames.flags.writeable


def test_frames_at_an_odd_address_are_aligned():
    payload = memoryview(b"\0" + hostile.PAYLOAD)[1:]
    assert not np.frombuffer(payload, "<u2").flags.aligned
    batch = decode(hostile.frames(payload))
    assert batch.frames.flags.aligned
    assert same(batch.frames, COUNTS)


@pytest.mark.parametrize(
    "frames",
    [COUNTS[:, :, ::2], COUNTS.transpose(0, 2, 1), np.asfortranarray(COUNTS), np.broadcast_to(COUNTS[0], (5, 3, 4))],
)
def test_frames_that_are_not_contiguous_are_written_in_order(frames):
    assert same(decode(encode(FrameBatch(run=RUN, first=0, frames=frames, timestamp_ns=T0))).frames, frames.copy("C"))


def test_big_endian_arrays_arrive_as_little_endian():
    table, buffers = pack_arrays({"q": np.arange(3, dtype=">f8")})
    assert same(unpack_arrays(table, buffers[0]), {"q": np.arange(3, dtype="<f8")})


EVENTS = events_of(COUNTS)


def a_start(**changes):
    given = {"run": RUN, "shape": (3, 4), "dtype": "<u2", "frame_time": 0.001, "count_time": 0.001}
    return RunStart(**given | changes)


def test_count_time_may_exceed_frame_time_by_single_precision():
    start = a_start(frame_time=0.001, count_time=float(np.nextafter(np.float32(0.001), 1, dtype="f4")))
    assert start.count_time > start.frame_time
    assert same(decode(encode(start)), a_start(count_time=start.count_time))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (a_start(run=""), "run = ''"),
        (a_start(frame_time=float("nan")), "frame_time = nan"),
        (a_start(shape=(MAX_FRAME_BYTES, 1)), "bytes a frame, more than"),
        (a_start(metadata={"a": np.ones(2)}), "metadata.a = array"),
        (a_start(metadata={"a": 2**64}), "metadata.a = 18446744073709551616"),
        (a_start(metadata={"a": 10**5000}), "metadata.a = .int too long to show. is not a number of 64 bits"),
        (a_start(metadata={"detector_distance": float("inf")}), "metadata.detector_distance = inf"),
        (a_start(metadata={"a": "x" * 2**20}), "a header of"),
        (FrameBatch(run=RUN, first=0, frames=COUNTS[0], timestamp_ns=T0), r"shape \(3, 4\)"),
        (FrameBatch(run=RUN, first=0, frames=COUNTS[:0], timestamp_ns=T0), "n = 0"),
        (FrameBatch(run=RUN, first=0, frames=events_of(COUNTS)[:0], timestamp_ns=T0), "n = 0"),
        (
            FrameBatch(run=RUN, first=0, frames=replace(EVENTS, pixels=EVENTS.pixels + 9), timestamp_ns=T0),
            "at pixel 12",
        ),
        (FrameBatch(run=RUN, first=0, frames=replace(EVENTS, shape=(3, 3, 4)), timestamp_ns=T0), "of 3 frames"),
        (FrameBatch(run=RUN, first=0, frames=COUNTS.astype(">u2"), timestamp_ns=T0), "dtype = '>u2'"),
        (FrameBatch(run=RUN, first=0, frames=COUNTS.astype("f8"), timestamp_ns=T0), "dtype = '<f8'"),
        (RunStop(run=RUN, n_frames=-1, exit_status="success"), "n_frames = -1"),
        *(
            (Result(run=RUN, operator="multitau", n_frames=1, final=True, arrays={"x": array}), says)
            for array, says in [
                (np.array([None]), "'x' is of Python objects"),
                (np.array(["text"]), "dtype = '<U4'"),
                (np.array([1j]), "dtype = '<c16'"),
                (np.array([(1, 2)], "u2,u2"), "dtype = '|V4'"),
                (np.array(["2025-01-01"], "M8[D]"), "dtype = '<M8"),
            ]
        ),
    ],
)
def test_what_could_not_be_read_is_not_written(message, says):
    with pytest.raises(ValueError, match=says):
        encode(message)


def test_a_start_that_leaves_no_room_for_what_a_pipeline_adds_is_refused():
    entries = {f"k{i}": i for i in range(MAX_LENGTH)}
    check_start(a_start(metadata=dict([*entries.items()][:-10])))
    check_start(a_start(metadata={"a": "x" * (2**20 - 5000)}))
    for full, says in (({"a": "x" * (2**20 - 300)}, "a header of"), (entries, "entries, more than 4096")):
        encode(a_start(metadata=full))
        with pytest.raises(ValueError, match=says):
            check_start(a_start(metadata=full))


def test_a_table_that_does_not_add_up_to_its_payload_is_refused():
    table, buffers = pack_arrays({"a": np.ones(3), "b": np.arange(4)})
    payload = b"".join(buffers)
    for wrong in (payload[:-1], payload + b"x", b""):
        with pytest.raises(DecodeError, match=f"the table has 56 bytes, the payload {len(wrong)}"):
            unpack_arrays(table, wrong)


def test_a_damaged_array_is_named():
    table, buffers = pack_arrays({"a": np.ones(3), "b": np.arange(4)})
    payload = bytearray(b"".join(buffers))
    payload[-1] ^= 1
    with pytest.raises(DecodeError, match="array 'b': crc32c is 0x"):
        unpack_arrays(table, payload)


PATCHED = """
import msgpack

def unpickles(*args, **kwargs):
    raise SystemExit("the patched msgpack was called")

# what msgpack_numpy.patch() replaces; importing bluesky_kafka calls it
for name in ("Packer", "Unpacker", "load", "loads", "dump", "dumps", "pack", "packb", "unpack", "unpackb"):
    setattr(msgpack, name, unpickles)

from stream.messages import RunStop
from stream.wire import decode, encode

stop = RunStop(run="9f3c", n_frames=1, exit_status="success")
assert decode(encode(stop)) == stop
"""


def test_our_wire_does_not_use_a_msgpack_that_was_patched_to_unpickle():
    done = subprocess.run([sys.executable, "-c", PATCHED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
