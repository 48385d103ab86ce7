"""A Dectris stream is decoded to the counts that were sent, and nothing sent stops it."""

import contextlib
import functools
import json
import lzma
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import replace

import cbor2
import h5py
import hdf5plugin
import lz4.block
import numpy as np
import pytest
from cbor2 import CBORTag
from dectris.compression import decompress

from stream import wire
from stream.errors import ConfigError, NotSeekable, SinkError, SourceError
from stream.ingest.dectris import LATENCY, DectrisDecoder, DectrisSource
from stream.messages import Events, FrameBatch, Rejected, RunStart, RunStop
from stream.operators.multitau import MultiTau
from stream.sinks import dectris_v1, dectris_v2
from stream.sinks.dectris import DectrisSink
from stream.sinks.dectris_image import CompressedImage, Compressor
from stream.sinks.faults import Faults
from tests import dectris_hostile as hostile
from tests.conftest import events_of, make_roimap

RECORDINGS = [(1, "eiger1m_stream_v1.cbors.xz", 9), (2, "eiger1m_stream_v2.cbors.xz", 10)]
ARMED = "2026-03-01T12:00:00.250000+00:00"
ARMED_NS = 1_772_366_400_250_000_000
METADATA = {
    "n_frames": 10,
    "start_time": ARMED,
    "incident_energy": 7.35,
    "detector_distance": 5.1,
    "beam_center_x": 12.25,
    "beam_center_y": -3.5,
    "x_pixel_size": 75e-6,
    "y_pixel_size": 75e-6,
    "detector": "Dectris EIGER2 Si 500K",
    "sample": "silica in water",
    "truth": {"contrast": 0.2, "rate": [1.0, 10.0], "nested": {"a": [1, 2]}},
}
START = RunStart(
    run="series-1",
    shape=(5, 7),
    dtype="<u2",
    saturation_value=2**16 - 2,
    frame_time=0.01,
    count_time=0.009,
    metadata=METADATA,
)
STOP = RunStop(run="series-1", n_frames=10, exit_status="success")


def counts(n=10, shape=START.shape, dtype=START.dtype, seed=0):
    return np.random.default_rng(seed).poisson(3, (n, *shape)).astype(dtype)


def batch(frames, first=0, run=START.run):
    return FrameBatch(run=run, first=first, frames=frames, timestamp_ns=ARMED_NS + first * 10_000_000)


def start_message(version, start=START):
    if version == 1:
        return dectris_v1.encode_start(start, series=1, compression="bslz4")
    return dectris_v2.encode_start(start, series=1)


def end_message(version, run=START.run):
    return dectris_v1.encode_end(series=1) if version == 1 else dectris_v2.encode_end(run=run, series=1)


def image_messages(version, frames, *, first=0, run=START.run, compression="bslz4"):
    with contextlib.closing(Compressor(compression, framed=version == 2)) as compressor:
        images = [
            CompressedImage(
                number=number,
                timestamp_ns=ARMED_NS + number * 10_000_000,
                series_ns=ARMED_NS,
                count_time=0.009,
                shape=frame.shape,
                dtype=frame.dtype.str,
                compression=compression,
                data=compressor.compress(frame),
            )
            for number, frame in enumerate(frames, first)
        ]
    if version == 1:
        return [dectris_v1.encode_image(image, series=int(run.removeprefix("series-"))) for image in images]
    return [dectris_v2.encode_image(image, run=run, series=1) for image in images]


def decode(messages, **options):
    decoder = DectrisDecoder(**options)
    return [kept(message) for parts in messages for message in decoder.feed(parts)] + [
        kept(message) for message in decoder.idle()
    ]


def kept(message):
    """Copy frames, which are valid until the next message only."""
    if isinstance(message, FrameBatch) and not isinstance(message.frames, Events):
        return replace(message, frames=message.frames.copy())
    return message


def shown(message):
    """Make a message comparable."""
    if isinstance(message, FrameBatch):
        return (message.run, message.first, message.timestamp_ns, message.frames.dtype, message.frames.tolist())
    return message


def frames_of(messages):
    return np.concatenate([rows(message.frames) for message in messages if isinstance(message, FrameBatch)])


def rows(frames):
    return frames.dense() if isinstance(frames, Events) else frames


def marked_once(frames, batch):
    """Pixels that are masked in the first frame of a batch are dark in its others, if they come as events."""
    once = frames.copy()
    for i in range(len(frames)):
        if i % batch:
            once[i, frames[i - i % batch] == np.iinfo(frames.dtype).max] = 0
    return once


def numbers_of(messages):
    return [
        number
        for message in messages
        if isinstance(message, FrameBatch)
        for number in range(message.first, message.first + len(message.frames))
    ]


def receive(source, until=RunStop, seconds=60):
    deadline = time.monotonic() + seconds
    messages = []
    for message in source:
        assert time.monotonic() < deadline, f"no {until.__name__} within {seconds} s, but {messages}"
        if message is not None:
            messages.append(kept(message))
        if isinstance(message, until):
            break
    return messages


@functools.cache
def recorded(path):
    messages = []
    with lzma.open(path) as file, contextlib.suppress(cbor2.CBORDecodeEOF):
        while True:
            messages.append(cbor2.load(file))
    return messages


def read_by_hdf5(chunk, shape, dtype, codec=hdf5plugin.Bitshuffle):
    """Decompress by the filter of HDF5."""
    with h5py.File("chunk", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("a", shape, dtype, chunks=shape, compression=codec())
        dataset.id.write_direct_chunk((0, 0), chunk)
        return dataset[()]


@pytest.mark.parametrize(("version", "name", "n"), RECORDINGS)
def test_a_real_recording_decodes_to_the_counts_that_hdf5_reads(shared_data, version, name, n):
    messages = recorded(shared_data / name)
    if version == 1:
        chunks = [parts[2] for parts in messages if b"dimage-1.0" in parts[0]]
    else:
        images = [fields for fields in (cbor2.loads(parts[0]) for parts in messages) if fields["type"] == "image"]
        chunks = [fields["data"]["threshold_1"].value[1].value.value[2] for fields in images]

    decoded = decode(messages, batch=4)
    dim = decode(messages, batch=4, give="photons")

    assert not [message for message in decoded if isinstance(message, Rejected)]
    assert numbers_of(decoded) == list(range(n))
    expected = np.stack([read_by_hdf5(chunk, (1065, 1030), "<u4") for chunk in chunks])
    np.testing.assert_array_equal(frames_of(decoded), expected)
    assert {type(message.frames) for message in dim if isinstance(message, FrameBatch)} == {Events}
    np.testing.assert_array_equal(frames_of(dim), marked_once(expected, 4))


def test_a_real_v1_header_is_understood(shared_data):
    start, first, *_ = decode(recorded(shared_data / "eiger1m_stream_v1.cbors.xz"))
    assert (start.run, start.shape, start.dtype, start.saturation_value) == (
        "series-14",
        (1065, 1030),
        "<u4",
        2**32 - 2,
    )
    assert (start.frame_time, start.count_time) == (1.0000029000000001, 0.9999999)
    assert start.metadata["n_frames"] == 100_000
    assert start.metadata["incident_energy"] == 8.0
    assert start.metadata["x_pixel_size"] == 75e-6
    assert start.metadata["rotate"] == 0  # from the appendix
    assert "detector_distance" not in start.metadata  # sent as 0
    assert first.timestamp_ns == 1_727_691_293_853_000_000  # the data_collection_date


def test_a_real_v2_start_is_understood(shared_data):
    start, first, stop = decode(recorded(shared_data / "eiger1m_stream_v2.cbors.xz"))
    assert (start.run, start.shape, start.dtype) == ("01HRCJF83SA63WH8M5X1VBKFJM", (1065, 1030), "<u4")
    assert start.metadata["start_time"] == "2024-03-07T14:43:31.193000+01:00"
    assert start.metadata["source_name"] == "Swiss Light Source"  # from the user data
    assert first.timestamp_ns == 1_709_819_015_200_000_000  # the series_date
    assert stop == RunStop(run=start.run, n_frames=10, exit_status="success")


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
@pytest.mark.parametrize("compression", ["bslz4", "lz4", "none"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_run_sent_over_zeromq_comes_out_as_it_went_in(version, compression, dtype):
    frames = counts(shape=(31, 70), dtype=dtype)
    frames[3] = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, frames[3].shape, dtype)  # does not compress
    start = replace(START, dtype=dtype, shape=(31, 70), saturation_value=np.iinfo(dtype).max - 1)
    with (
        DectrisSink("tcp://127.0.0.1:*", version=version, compression=compression, timeout=10) as sink,
        DectrisSource(sink.address, batch=10) as source,
    ):
        for message in (start, batch(frames[:6]), batch(frames[6:], first=6), STOP):
            sink.write(message)
        sink.flush()
        told, sent, stop = receive(source)
    assert told == replace(start, metadata={"series_id": 1, **METADATA})
    assert shown(sent) == shown(batch(frames))
    assert stop == STOP


def test_versions_tell_the_same_run_alike():
    frames = counts()
    first, second = (
        decode([start_message(version), *image_messages(version, frames), end_message(version)]) for version in (1, 2)
    )
    assert [shown(message) for message in first] == [shown(message) for message in second]


@pytest.mark.parametrize("compression", ["bslz4", "lz4", "none"])
def test_v2_messages_are_read_by_the_decoder_that_dectris_documents(compression):
    def tag_hook(tag, _):
        if tag.tag == 56500:
            algorithm, elem_size, encoded = tag.value
            return decompress(encoded, algorithm, elem_size=elem_size)
        if tag.tag == 69:
            return np.frombuffer(tag.value, "<u2")
        return tag.value[1].reshape(tag.value[0]) if tag.tag == 40 else tag

    frames = counts()
    [start] = start_message(2)
    fields = cbor2.loads(start, tag_hook=tag_hook)
    assert (fields["type"], fields["image_size_x"], fields["image_size_y"]) == ("start", 7, 5)
    assert (fields["number_of_images"], fields["incident_energy"]) == (10, 7350.0)
    for frame, [message] in zip(frames, image_messages(2, frames, compression=compression), strict=True):
        image = cbor2.loads(message, tag_hook=tag_hook)
        np.testing.assert_array_equal(image["data"]["threshold_1"], frame)
    assert (image["image_id"], image["start_time"], image["real_time"]) == (9, (90_000_000, 10**9), (9_000_000, 10**9))


def test_v1_messages_have_the_shape_as_columns_then_rows_and_bare_lz4():
    [frame] = counts(1)
    [[first, described, blob, exposure]] = image_messages(1, [frame], compression="lz4")
    described = json.loads(described)
    assert described == {
        "htype": "dimage_d-1.0",
        "shape": [7, 5],
        "type": "uint16",
        "encoding": "lz4<",
        "size": len(blob),
    }
    assert lz4.block.decompress(blob, uncompressed_size=frame.nbytes) == frame.tobytes()
    first = json.loads(first)
    assert len(first.pop("hash")) == 32  # LiberTEM refuses an empty one
    assert first == {"htype": "dimage-1.0", "series": 1, "frame": 0}
    assert json.loads(exposure)["real_time"] == 9_000_000


def test_bslz4_images_are_chunks_of_the_hdf5_filter():
    [frame] = counts(1, shape=(300, 77), dtype="<u4")
    [parts] = image_messages(1, [frame])
    assert json.loads(parts[1])["encoding"] == "bs32-lz4<"
    np.testing.assert_array_equal(read_by_hdf5(parts[2], frame.shape, frame.dtype), frame)


def test_v2_lz4_images_are_chunks_of_the_hdf5_filter_even_where_they_do_not_compress():
    noise = np.random.default_rng(0).integers(0, 2**16, (2, 40, 30), "<u2")
    for frame in (noise[0], np.zeros_like(noise[1])):
        [[message]] = image_messages(2, [frame], compression="lz4")
        chunk = cbor2.loads(message)["data"]["threshold_1"].value[1].value.value[2]
        np.testing.assert_array_equal(read_by_hdf5(chunk, frame.shape, frame.dtype, hdf5plugin.LZ4), frame)
        assert len(chunk) <= 16 + frame.nbytes


@pytest.mark.parametrize("version", [1, 2])
def test_every_frame_has_the_time_the_detector_gave_it(version):
    frames = counts()
    with (
        DectrisSink("tcp://127.0.0.1:*", version=version, timeout=10) as sink,
        DectrisSource(sink.address, batch=1) as source,
    ):
        for message in (START, batch(frames), STOP):
            sink.write(message)
        messages = receive(source)
    times = [message.timestamp_ns for message in messages if isinstance(message, FrameBatch)]
    assert times == [ARMED_NS + i * 10_000_000 for i in range(10)]


def test_v1_frames_are_timed_from_arming_though_the_first_was_lost():
    _, frames = decode([start_message(1), *image_messages(1, counts(2), first=3)])
    assert (frames.first, frames.timestamp_ns) == (3, ARMED_NS + 30_000_000)


def test_v1_frames_without_a_header_are_timed_from_their_arrival():
    before = time.time_ns()
    first, later = decode(image_messages(1, counts(2), first=3), batch=1)
    assert before <= first.timestamp_ns <= time.time_ns()
    assert later.timestamp_ns == first.timestamp_ns + 10_000_000


def two_channels(**options):
    first, second = np.arange(6, dtype="<u2").reshape(2, 3), np.arange(6, 12, dtype="<u2").reshape(2, 3)
    data = {
        name: CBORTag(40, [[2, 3], CBORTag(69, array.tobytes())])
        for name, array in (("threshold_2", second), ("threshold_1", first))
    }
    return decode([hostile.v2_start(channels=["threshold_2", "threshold_1"]), hostile.v2_image(data=data)], **options)


def test_a_channel_is_chosen_by_name():
    assert frames_of(two_channels(channel="threshold_1")).tolist() == [[[0, 1, 2], [3, 4, 5]]]


def test_the_first_channel_that_the_detector_names_is_the_default():
    assert frames_of(two_channels()).tolist() == [[[6, 7, 8], [9, 10, 11]]]


def test_a_channel_that_is_not_there_is_refused_with_those_that_are():
    [rejected] = two_channels(channel="difference")
    assert "difference" in rejected.reason
    assert "threshold_2, threshold_1" in rejected.reason


MASK = np.array([[0, 1, 0], [0, 0, 2**31]], "<u4")


@pytest.mark.parametrize(("applied", "expected"), [(True, [1] * 6), (False, [1, 65535, 1, 1, 1, 65535])])
def test_pixels_that_v1_left_to_us_to_mask_have_the_largest_value(applied, expected):
    described = hostile.encode({"htype": "dpixelmask-1.0", "shape": [3, 2], "type": "uint32"})
    flat = hostile.encode({"htype": "dflatfield-1.0", "shape": [3, 2], "type": "float32"})
    header = [*hostile.v1_header(pixel_mask_applied=applied), flat, bytes(24), described, MASK.tobytes()]
    _, frames = decode([header, hostile.v1_image(np.ones(6, "<u2").tobytes())])
    assert frames.frames.ravel().tolist() == expected


@pytest.mark.parametrize(("applied", "expected"), [(True, [1] * 6), (False, [1, 65535, 1, 1, 1, 65535])])
def test_pixels_that_v2_left_to_us_to_mask_have_the_largest_value(applied, expected):
    mask = {"threshold_1": CBORTag(40, [[2, 3], CBORTag(70, MASK.tobytes())])}
    start = hostile.v2_start(pixel_mask=mask, pixel_mask_enabled=applied)
    _, frames = decode([start, hostile.v2_image(np.ones(6, "<u2").tobytes())])
    assert frames.frames.ravel().tolist() == expected


DIM = (67, 131)
DIM_START = replace(START, shape=DIM, metadata={**METADATA, "n_frames": 200})


def dim(n=200, mean=0.01, dtype="<u2"):
    """Frames of few photons, with gaps, a pixel that overflows in frame 90 and some brighter ones from frame 120 on."""
    frames = np.random.default_rng(3).poisson(mean, (n, *DIM)).astype(dtype)
    frames[:, 20:24] = np.iinfo(dtype).max
    frames[90:91, 50, 60] = np.iinfo(dtype).max
    frames[120:130, 5, 6:9] = 300, 1, 7
    return frames


def g2_of(messages, start):
    multitau = MultiTau(start, make_roimap(DIM))
    for message in messages:
        if isinstance(message, FrameBatch):
            multitau.push(message)
    return multitau.result()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_dim_stream_comes_as_events_that_end_in_the_g2_of_its_frames(version, dtype):
    frames = dim(dtype=dtype)
    start = replace(DIM_START, dtype=dtype, saturation_value=np.iinfo(dtype).max - 1)
    with (
        DectrisSink("tcp://127.0.0.1:*", version=version, timeout=10) as sink,
        DectrisSource(sink.address, give="photons") as source,
    ):
        stream, messages = iter(source), []
        sink.write(start)
        for i in range(0, 200, 20):  # fewer than the sockets hold
            sink.write(batch(frames[i : i + 20], first=i))
            messages += receive(stream, until=FrameBatch)
        sink.write(replace(STOP, n_frames=200))
        messages += receive(stream)
    assert numbers_of(messages) == list(range(200))
    assert {type(message.frames) for message in messages if isinstance(message, FrameBatch)} == {Events}
    expected = g2_of([batch(frames)], start)
    assert np.isfinite(expected["g2"]).any()
    for name, array in g2_of(messages, start).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_every_batch_of_events_tells_the_masked_pixels_in_its_first_frame(version, size):
    frames = dim(20)
    decoded = decode([start_message(version, DIM_START), *image_messages(version, frames)], batch=size, give="photons")
    np.testing.assert_array_equal(frames_of(decoded), marked_once(frames, size))


def test_pixels_left_to_us_to_mask_are_told_in_the_first_frame_of_a_batch_of_events():
    mask = np.zeros(DIM, "<u4")
    mask[3, 4:90] = 1
    start = hostile.v2_start(
        pixel_mask={"threshold_1": CBORTag(40, [list(DIM), CBORTag(70, mask.tobytes())])},
        pixel_mask_enabled=False,
        series_unique_id="series-1",
        number_of_images=20,
    )
    frames = dim(20)
    decoded = decode([start, *image_messages(2, frames)], batch=8, give="photons")
    frames[:, mask != 0] = 65535
    assert isinstance(decoded[1].frames, Events)
    np.testing.assert_array_equal(frames_of(decoded), marked_once(frames, 8))


def test_images_of_another_shape_than_the_mask_are_not_masked():
    mask = {"threshold_1": CBORTag(40, [[2, 3], CBORTag(70, MASK.tobytes())])}
    start = hostile.v2_start(pixel_mask=mask, pixel_mask_enabled=False)
    small = hostile.v2_image(bytes(2), shape=(1, 1), image_id=1)
    _, _, frames = decode([start, hostile.v2_image(), small])
    assert frames.frames.tolist() == [[[0]]]


@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: data + b"x", lambda data: data[:30] * 20])
def test_a_damaged_image_between_dim_ones_is_refused_by_name_and_only_it_is_lost(change):
    frames = dim(9)
    images = image_messages(1, frames)
    described = json.loads(images[4][1])
    images[4][2] = change(bytes(images[4][2]))
    images[4][1] = json.dumps(described | {"size": len(images[4][2])}).encode()
    decoded = decode([start_message(1, DIM_START), *images], give="photons")
    [rejected] = [message for message in decoded if isinstance(message, Rejected)]
    assert rejected.reason.startswith("image 4 of series-1: bslz4: ")
    assert [(m.first, len(m.frames)) for m in decoded if isinstance(m, FrameBatch)] == [(0, 4), (5, 4)]
    expected = np.concatenate([marked_once(frames[:4], 4), marked_once(frames[5:], 4)])
    np.testing.assert_array_equal(frames_of(decoded), expected)


def test_frames_come_as_they_are_where_nobody_asked_for_photons():
    frames = dim(20)
    [_, rows] = decode([start_message(2, DIM_START), *image_messages(2, frames)])
    np.testing.assert_array_equal(rows.frames, frames)


def test_a_stream_that_brightens_goes_on_as_rows_from_the_next_batch_on():
    frames = np.concatenate([dim(12), dim(12, mean=0.2), dim(12, mean=0.022), dim(12)])
    decoded = decode([start_message(2, DIM_START), *image_messages(2, frames)], batch=8, give="photons")
    is_events = [isinstance(message.frames, Events) for message in decoded[1:]]
    assert is_events == [True, True, False, False, False, True]
    expected = np.concatenate([marked_once(frames[:16], 8), frames[16:40], marked_once(frames[40:], 8)])
    np.testing.assert_array_equal(frames_of(decoded), expected)


def test_geometry_that_is_not_finite_is_left_out_with_a_warning(caplog):
    start, _ = decode([hostile.v2_start(beam_center_x=float("nan"), beam_center_y=4.0), hostile.v2_image()])
    assert "beam_center_x" not in start.metadata
    assert start.metadata["beam_center_y"] == 4.0
    assert "left out of what the detector says: {'beam_center_x': nan}" in caplog.text


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, 2**63, 1e300, "8 keV", [1]], ids=type)
@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ("incident_energy", "incident_energy"),
        ("beam_center_x", "beam_center_x"),
        ("pixel_size_y", "y_pixel_size"),
        ("user_data", "detector_distance"),
    ],
)
def test_geometry_that_no_detector_has_is_left_out_whatever_it_is(sent, told, value):
    given = {told: value} if sent == "user_data" else value
    start, _ = decode([hostile.v2_start(**{sent: given}, detector_description="Eiger"), hostile.v2_image()])
    wire.check_start(start)
    assert told not in start.metadata
    assert start.metadata["detector"] == "Eiger"


@pytest.mark.parametrize("key", ["photon_energy", "beam_center_x", "x_pixel_size"])
def test_v1_geometry_that_no_detector_has_is_left_out(key):
    start, _ = decode([hostile.v1_header(**{key: 10**400}), hostile.v1_image()])
    assert {*start.metadata} == {"series_id", "n_frames"}


def test_a_description_too_long_to_keep_is_left_out_and_the_rest_stays(caplog):
    described = hostile.v2_start(detector_description="x" * 2**21, incident_energy=8000, user_data={"sample": "gel"})
    start, _ = decode([described, hostile.v2_image()])
    assert start.metadata == {"series_id": 1, "incident_energy": 8.0, "sample": "gel", "n_frames": 4}
    assert "left out of what the detector says: {'detector': 'xxx" in caplog.text


@pytest.mark.parametrize("n", [4085, 4092])
def test_user_data_that_leaves_no_room_for_what_a_pipeline_adds_is_left_out(n):
    start, _ = decode([hostile.v2_start(user_data={f"k{i}": i for i in range(n)}), hostile.v2_image()])
    wire.check_start(start)
    assert ("k0" in start.metadata) is (n == 4085)


@pytest.mark.parametrize("header", [hostile.v1_header, hostile.v2_start])
def test_an_exposure_longer_than_frame_time_becomes_frame_time(header, caplog):
    image = hostile.v1_image if header is hostile.v1_header else hostile.v2_image
    start, _ = decode([header(frame_time=0.01, count_time=0.02), image()])
    assert (start.frame_time, start.count_time) == (0.01, 0.01)
    assert "count_time 0.02 s is longer than frame_time, 0.01 s" in caplog.text


def test_the_distance_is_told_whichever_way_the_translation_points():
    start, _ = decode([hostile.v2_start(detector_translation=[0.0, 0.0, -0.15]), hostile.v2_image()])
    assert start.metadata["detector_distance"] == 0.15


@pytest.mark.parametrize("user", ['{"sample": "gel"}', {"sample": "gel"}])
def test_user_data_is_a_map_or_its_json(user):
    start, _ = decode([hostile.v2_start(user_data=user), hostile.v2_image()])
    assert start.metadata["sample"] == "gel"


@pytest.mark.parametrize("user", [b"raw", [1, 2], "words", 7, {"big": "x" * 2**21}, {"bytes": b"x"}])
def test_user_data_that_is_no_plain_map_does_no_harm(user):
    start, frames = decode([hostile.v2_start(user_data=user), hostile.v2_image()])
    assert {*start.metadata} == {"series_id", "n_frames"}
    assert frames.first == 0


@pytest.mark.parametrize("version", [1, 2])
def test_images_left_over_from_an_abort_stay_with_their_own_run(version):
    old, new = counts(4, seed=1), counts(9, seed=2)
    left = image_messages(version, old, first=5, run="series-9")  # goes on just where the new run is
    images = image_messages(version, new)
    decoded = decode([start_message(version), *images[:5], *left, *images[5:], end_message(version)])
    ours = [message for message in decoded if message.run == "series-1"]
    theirs = [message for message in decoded if message.run == "series-9"]
    assert numbers_of(ours) == list(range(9))
    np.testing.assert_array_equal(frames_of(ours), new)
    assert numbers_of(theirs) == [5, 6, 7, 8]
    np.testing.assert_array_equal(frames_of(theirs), old)
    assert decoded[-1] == RunStop(run="series-1", n_frames=10, exit_status="abort")


@pytest.mark.parametrize("version", [1, 2])
def test_a_process_restarted_within_a_run_goes_on_without_its_start(version):
    frames = counts(6)
    decoded = decode([*image_messages(version, frames, first=4), end_message(version)])
    assert [type(message) for message in decoded] == [FrameBatch, RunStop]
    assert numbers_of(decoded) == [4, 5, 6, 7, 8, 9]
    assert decoded[-1] == RunStop(run="series-1", n_frames=0, exit_status="success")  # 0: only the start tells how many


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_that_ends_before_its_last_planned_image_is_aborted(version):
    decoded = decode([start_message(version), *image_messages(version, counts(9)), end_message(version)])
    assert decoded[-1] == RunStop(run="series-1", n_frames=10, exit_status="abort")


def test_a_series_without_images_is_not_told():
    assert decode([start_message(2), end_message(2), start_message(1), end_message(1)]) == []


def test_a_batch_ends_when_full_or_when_a_frame_is_not_the_next_one():
    images = image_messages(2, counts(9))
    decoded = decode([*images[:5], *images[6:], images[6]], batch=3)
    assert [(message.first, len(message.frames)) for message in decoded] == [(0, 3), (3, 2), (6, 3), (6, 1)]


def test_a_batch_ends_when_dtype_or_shape_change():
    changed = [counts(2), counts(2, dtype="<u4"), counts(2, dtype="<u4", shape=(7, 5))]
    decoded = decode([parts for i, frames in enumerate(changed) for parts in image_messages(2, frames, first=2 * i)])
    assert [shown(message) for message in decoded] == [shown(batch(frames, 2 * i)) for i, frames in enumerate(changed)]


def test_frames_are_read_only():
    [message] = decode(image_messages(2, counts(1)))
    [view] = [m for parts in image_messages(2, counts(1)) for m in DectrisDecoder(batch=1).feed(parts)]
    with pytest.raises(ValueError, match="read-only"):
        view.frames[0, 0, 0] = 1
    assert message.frames.shape == (1, 5, 7)


@pytest.mark.parametrize(("name", "parts", "words"), hostile.CORPUS, ids=[name for name, _, _ in hostile.CORPUS])
def test_a_malformed_message_is_refused_by_name_between_good_frames(name, parts, words):
    before, after = image_messages(2, counts(4))[:2], image_messages(2, counts(4))[2:]
    decoder = DectrisDecoder()
    for good in before:
        assert list(decoder.feed(good)) == []
    tracemalloc.start()
    kept_frames, rejected = map(kept, decoder.feed(parts))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert numbers_of([kept_frames]) == [0, 1]
    assert isinstance(rejected, Rejected)
    assert words in rejected.reason
    assert len(rejected.reason.splitlines()) == 1
    assert len(rejected.reason) < 500
    assert peak < 2**24
    for good in after:
        assert list(decoder.feed(good)) == []
    [rest] = decoder.idle()
    np.testing.assert_array_equal(rest.frames, counts(4)[2:])


@pytest.mark.parametrize("message", [hostile.v1_header, hostile.v1_image, hostile.v2_start, hostile.v2_image])
def test_a_message_cut_anywhere_is_refused(message):
    for parts in hostile.truncated(message()):
        [rejected] = decode([parts])
        assert isinstance(rejected, Rejected), parts


@pytest.mark.parametrize("version", [1, 2])
def test_bytes_flipped_anywhere_raise_nothing(version):
    rng = np.random.default_rng(version)
    [good] = image_messages(version, counts(1))
    for message in (good, start_message(version), end_message(version)):
        for _ in range(1000):
            parts = [bytearray(part) for part in message]
            part = parts[rng.integers(len(parts))]
            part[rng.integers(len(part))] = rng.integers(256)
            for told in decode([[bytes(part) for part in parts]]):
                assert isinstance(told, FrameBatch | RunStop | Rejected)


def test_a_source_goes_on_after_a_malformed_message():
    frames = counts()
    images = image_messages(2, frames)
    with DectrisSink("tcp://127.0.0.1:*", timeout=10) as sink, DectrisSource(sink.address) as source:
        for parts in (start_message(2), *images[:5], [b"{}"], *images[5:], end_message(2)):
            sink.send(parts)
        messages = receive(source)
    assert [type(message) for message in messages] == [RunStart, FrameBatch, Rejected, FrameBatch, RunStop]
    np.testing.assert_array_equal(frames_of(messages), frames)


def test_a_source_closes_the_batch_and_says_so_when_nothing_comes():
    with DectrisSink("tcp://127.0.0.1:*", timeout=10) as sink, DectrisSource(sink.address) as source:
        for parts in image_messages(2, counts(3)):
            sink.send(parts)
        stream = iter(source)
        messages = receive(stream, until=FrameBatch)
        assert numbers_of(messages) == [0, 1, 2]
        assert next(stream) is None


def test_images_that_come_slowly_do_not_wait_for_their_batch_to_fill():
    n, sent, stop = 400, [], threading.Event()

    def send():
        for parts in image_messages(2, counts(n)):
            sent.append(time.monotonic())
            sink.send(parts)
            stop.wait(0.008)  # faster than a source finds that nothing came

    with DectrisSink("tcp://127.0.0.1:*", timeout=10) as sink, DectrisSource(sink.address, batch=n) as source:
        sender = threading.Thread(target=send)
        sender.start()
        received, sizes = 0, []
        for message in source:
            if message is not None:
                late = time.monotonic() - sent[received]
                assert late < LATENCY + 2, f"image {received} came {late} s late, in a batch of {len(message.frames)}"
                sizes.append(len(message.frames))
                received += sizes[-1]
            if received == n:
                break
        stop.set()
        sender.join()
    assert max(sizes) > 1


def test_a_source_cannot_go_back():
    with DectrisSource("tcp://127.0.0.1:9") as source:
        assert source.position() == {}
        source.seek({})
        with pytest.raises(NotSeekable, match="frame"):
            source.seek({"frame": 3})


def test_an_address_that_is_none_is_named():
    with pytest.raises(SourceError, match="nonsense"):
        DectrisSource("nonsense")
    with pytest.raises(SinkError, match="nonsense"):
        DectrisSink("nonsense")


def test_a_sink_that_nobody_receives_from_says_so():
    with (
        DectrisSink("tcp://127.0.0.1:*", timeout=0.05) as sink,
        pytest.raises(SinkError, match=f"{sink.address}: nobody took anything for 0.05 s"),
    ):
        sink.write(START)


@pytest.mark.parametrize("version", [1, 2])
def test_events_are_sent_as_the_images_they_are(version):
    frames = counts() * (counts(seed=1) > 4)
    with DectrisSink("tcp://127.0.0.1:*", version=version) as sink, DectrisSource(sink.address) as source:
        for output in (START, batch(events_of(frames)), replace(STOP, run="series-1")):
            sink.write(output)
        assert frames_of(receive(source)).tolist() == frames.tolist()


def test_a_sink_refuses_frames_of_a_run_that_was_not_started():
    with DectrisSink("tcp://127.0.0.1:*", timeout=0.05) as sink, pytest.raises(SinkError, match="series-1"):
        sink.write(batch(counts(1)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "metadata", [{}, {"n_frames": 10, "x": object()}, {"n_frames": 10, "incident_energy": "8 keV"}]
)
def test_a_sink_refuses_metadata_that_cannot_be_told(version, metadata):
    with (
        DectrisSink("tcp://127.0.0.1:*", version=version, timeout=0.05) as sink,
        pytest.raises(SinkError, match="series-1: metadata"),
    ):
        sink.write(replace(START, metadata=metadata))


def faulty(n=1000, **faults):
    spoil = Faults(**faults)
    return [
        [bytes(part) for part in message] for i in range(n) for message in spoil.apply([b"%04d" % i, b"payload"])
    ] + [list(message) for message in spoil.flush()]


def sent_numbers(messages):
    return [int(message[0]) for message in messages]


def test_no_faults_change_nothing():
    assert faulty(50) == [[b"%04d" % i, b"payload"] for i in range(50)]


def test_faults_lose_messages():
    numbers = sent_numbers(faulty(lose=0.1))
    assert numbers == sorted(set(numbers))
    assert 860 < len(numbers) < 940


def test_faults_duplicate_messages():
    numbers = sent_numbers(faulty(duplicate=0.1))
    assert sorted(set(numbers)) == list(range(1000))
    assert numbers == sorted(numbers)
    assert 1060 < len(numbers) < 1140


def test_faults_send_a_message_after_the_next_one():
    numbers = sent_numbers(faulty(reorder=0.1))
    assert sorted(numbers) == list(range(1000))
    moved = [i for i, number in enumerate(numbers) if number != i]
    assert 120 < len(moved) < 220
    assert all(abs(numbers[i] - i) <= 1 for i in moved)


def test_the_message_kept_back_last_is_flushed():
    assert sent_numbers(faulty(2, reorder=1.0)) == [1, 0]
    assert sent_numbers(faulty(3, reorder=1.0)) == [1, 0, 2]


def test_faults_cut_messages_short():
    whole = [b"0000", b"payload"]
    for message in faulty(200, truncate=1.0):
        assert b"".join(message) != b"".join(whole)
        assert len(b"".join(message)) < len(b"".join(whole))
        assert 1 <= len(message) <= 2
    assert len({len(b"".join(message)) for message in faulty(200, truncate=1.0)}) == 11


def test_faults_stall():
    began = time.monotonic()
    assert sent_numbers(faulty(3, delay=1.0, delay_seconds=0.02)) == [0, 1, 2]
    assert time.monotonic() - began >= 0.06


def test_faults_are_the_same_for_the_same_seed():
    some = {"lose": 0.1, "duplicate": 0.1, "reorder": 0.1, "truncate": 0.1}
    assert faulty(seed=5, **some) == faulty(seed=5, **some)
    assert faulty(seed=5, **some) != faulty(seed=6, **some)


def test_faults_of_one_kind_hit_the_same_messages_whatever_the_others():
    def twice(messages):
        return {number for number, n in Counter(sent_numbers(messages)).items() if n == 2}

    lossy = faulty(duplicate=0.1, lose=0.3)
    assert twice(lossy) == twice(faulty(duplicate=0.1)) & {*sent_numbers(lossy)}


@pytest.mark.parametrize(
    "faults", [{"lose": 1.1}, {"delay": -0.1}, {"truncate": float("nan")}, {"delay_seconds": -1.0}]
)
def test_faults_that_are_no_probabilities_are_named(faults):
    with pytest.raises(ConfigError, match=next(iter(faults))):
        Faults(**faults)


@pytest.mark.parametrize("version", [1, 2])
def test_frames_that_get_through_a_bad_line_are_the_right_ones(version):
    frames = counts(200)
    start = replace(START, metadata={**METADATA, "n_frames": 200})
    faults = Faults(lose=0.05, duplicate=0.05, reorder=0.05, truncate=0.05, seed=3)
    with (
        DectrisSink("tcp://127.0.0.1:*", version=version, faults=faults, timeout=10) as sink,
        DectrisSource(sink.address) as source,
    ):
        sink.write(start)
        stream, messages = iter(source), []
        for i in range(0, 200, 20):  # fewer than the sockets hold
            sink.write(batch(frames[i : i + 20], first=i))
            messages += receive(stream, until=FrameBatch)
        sink.write(replace(STOP, n_frames=200))
        messages += receive(stream)
    numbers = numbers_of(messages)
    np.testing.assert_array_equal(frames_of(messages), frames[numbers])
    assert 160 < len(set(numbers)) < 199
    assert any(isinstance(message, Rejected) for message in messages)


def test_an_image_kept_back_is_sent_before_the_end():
    frames = counts(3)
    with (
        DectrisSink("tcp://127.0.0.1:*", faults=Faults(reorder=1.0), timeout=10) as sink,
        DectrisSource(sink.address) as source,
    ):
        for message in (START, batch(frames[:1]), replace(STOP, n_frames=10)):
            sink.write(message)
        messages = receive(source)
    assert [type(message) for message in messages] == [RunStart, FrameBatch, RunStop]


def test_a_detector_that_nobody_listens_to_ends_soon_once_it_is_stopped():
    stop = threading.Event()
    timer = threading.Timer(0.2, stop.set)
    began = time.monotonic()
    timer.start()
    with (
        DectrisSink("tcp://127.0.0.1:*", stop=stop) as sink,
        pytest.raises(SinkError, match=f"{sink.address}: stopped while nobody received"),
    ):
        sink.write(START)
    assert 0.2 <= time.monotonic() - began < 10  # not 60
    timer.join()
