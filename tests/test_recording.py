import lzma
import threading

import cbor2
import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import DecodeError, SourceError
from stream.ingest.hdf5 import Hdf5Source
from stream.ingest.recording import RecordingSource, messages, record
from stream.messages import FrameBatch, Rejected, RunStart, RunStop
from stream.sending import send_recorded

V1, V2 = "eiger1m_stream_v1.cbors.xz", "eiger1m_stream_v2.cbors.xz"

PARTS = st.lists(st.lists(st.binary(max_size=300), max_size=9), max_size=5)
SHAPE = (1065, 1030)


def everything(source):
    return [owned(message) for message in source]


def owned(message):
    if isinstance(message, FrameBatch):
        return (message.run, message.first, message.timestamp_ns, message.frames.shape, message.frames.tobytes())
    return message


def frames_of(source):
    return np.concatenate([m.frames for m in source if isinstance(m, FrameBatch)])


def small_series(n_frames=7):
    """The messages of a DECTRIS Stream V2 series of 2 x 3 pixels; a header, `n_frames` images, an end."""
    common = {"series_id": 1, "series_unique_id": "series-one"}
    pixels = {"threshold_1": cbor2.CBORTag(40, [[2, 3], cbor2.CBORTag(64, bytes([0, 0, 0, 0, 0, 1]))])}
    header = {
        "type": "start",
        **common,
        "arm_date": cbor2.CBORTag(0, "2026-11-21T12:00:00+00:00"),
        "channels": ["threshold_1"],
        "count_time": 0.1,
        "frame_time": 0.1,
        "image_size_x": 3,
        "image_size_y": 2,
        "number_of_images": n_frames,
        "pixel_mask": pixels,
        "pixel_mask_enabled": False,
    }
    yield [cbor2.dumps(header)]
    for i in range(n_frames):
        counts = cbor2.CBORTag(40, [[2, 3], cbor2.CBORTag(64, bytes([i, 1, 2, 3, 4, 5]))])
        image = {
            "type": "image",
            **common,
            "image_id": i,
            "series_date": cbor2.CBORTag(0, "2026-11-21T12:00:01+00:00"),
            "start_time": [i, 10],
            "stop_time": [i + 1, 10],
            "real_time": [1, 10],
            "data": {"threshold_1": counts},
        }
        yield [cbor2.dumps(image)]
    yield [cbor2.dumps({"type": "end", **common})]


# The file


@given(PARTS)
@pytest.mark.parametrize("name", ["x.cbors", "x.cbors.xz"])
def test_what_is_recorded_is_read(tmp_path_factory, name, parts):
    path = tmp_path_factory.getbasetemp() / name
    record(parts, path)
    assert list(messages(path)) == parts


def test_a_recording_is_a_cbor_sequence_in_xz_if_its_name_says_so(tmp_path):
    record([[b"a", b"bc"], [b"d"]], tmp_path / "x.cbors")
    record([[b"a", b"bc"], [b"d"]], tmp_path / "x.cbors.xz")
    plain = (tmp_path / "x.cbors").read_bytes()
    assert plain == cbor2.dumps([b"a", b"bc"]) + cbor2.dumps([b"d"])
    assert lzma.decompress((tmp_path / "x.cbors.xz").read_bytes()) == plain


WHOLE = [[b"a" * 20, b"b" * 300], [b"c"], [b"d" * 70]]
BOUNDARIES = np.cumsum([0, *(len(cbor2.dumps(message)) for message in WHOLE)]).tolist()


@pytest.mark.parametrize("compress", [bytes, lzma.compress])
@given(data=st.data())
def test_a_recording_that_is_cut_yields_what_is_whole_and_then_names_itself(tmp_path_factory, compress, data):
    path = tmp_path_factory.getbasetemp() / "cut.cbors"
    content = compress(b"".join(cbor2.dumps(message) for message in WHOLE))
    lengths = [n for n in range(1, len(content)) if compress is not bytes or n not in BOUNDARIES]
    path.write_bytes(content[: data.draw(st.sampled_from(lengths))])
    found = []
    with pytest.raises(DecodeError, match=r"cut\.cbors: message"):
        found.extend(messages(path))
    assert found == WHOLE[: len(found)]


GARBAGE = {
    "text": b"not a recording",
    "a map": cbor2.dumps({"a": 1}),
    "a number": cbor2.dumps(1),
    "an array of text": cbor2.dumps(["text"]),
    "an array of arrays": b"\x81" * 5000,
    "an array of unknown length": b"\x9f\x41a\xff",
    "bytes of unknown length": b"\x81\x5f\x41a\xff",
    "a reserved length": b"\x9c" + bytes(16),
    "too many parts": b"\x98\x41" + b"\x40" * 65,
    "2**60 parts": b"\x9b\x10" + bytes(7),
    "a part of 2**60 bytes": b"\x81\x5b\x10" + bytes(7),
    "a part just too large": b"\x81\x5a\x10\x00\x00\x01" + bytes(99),
    "a length that is cut": b"\x81\x5b\x10",
    "xz of something else": lzma.compress(b"not a recording"),
    "xz that is damaged": lzma.compress(b"\x81\x41a")[:20] + b"\x00" * 20,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_what_is_no_recording_is_a_decode_error_that_names_file_and_message(tmp_path, garbage):
    path = tmp_path / "x.cbors"
    path.write_bytes(garbage)
    with pytest.raises(DecodeError, match=r"x\.cbors: message 0 of the recording: "):
        list(messages(path))


def test_a_missing_recording_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"missing\.cbors: no such file"):
        RecordingSource(tmp_path / "missing.cbors")


# The source


def test_a_recorded_series_is_a_run(tmp_path):
    record(small_series(), tmp_path / "x.cbors")
    with RecordingSource(tmp_path / "x.cbors", batch=3) as source:
        run_start, *batches, run_stop = everything(source)
    assert (run_start.run, run_start.shape, run_start.frame_time) == ("series-one", (2, 3), 0.1)
    assert [(first, shape) for _, first, _, shape, _ in batches] == [(0, (3, 2, 3)), (3, (3, 2, 3)), (6, (1, 2, 3))]
    assert run_stop == RunStop(run="series-one", n_frames=7, exit_status="success")


@given(st.integers(1, 9), st.data())
def test_after_a_seek_the_rest_is_as_without_interruption(tmp_path_factory, batch, data):
    path = tmp_path_factory.getbasetemp() / "seek.cbors"
    if not path.exists():
        record([*small_series(), [b"garbage"], *small_series(2)], path)
    source = RecordingSource(path, batch=batch)
    whole = [(owned(message), source.position()) for message in source]
    n = data.draw(st.integers(0, len(whole) - 1))
    again = RecordingSource(path, batch=batch)
    again.seek(whole[n][1])
    assert [(owned(message), again.position()) for message in again] == whole[n + 1 :]


def test_frames_before_the_damage_come_and_then_a_rejected(tmp_path):
    path = tmp_path / "x.cbors"
    record(small_series(), path)
    path.write_bytes(path.read_bytes()[:-80])
    *_, batch, rejected = RecordingSource(path)
    assert batch.frames[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert isinstance(rejected, Rejected)
    assert "message 7 of the recording" in rejected.reason


@pytest.mark.parametrize("damage", [b"", bytes(5000)])
@pytest.mark.parametrize("size", [100, 30_000])
def test_all_messages_before_the_damage_of_an_xz_come(tmp_path, size, damage):
    path = tmp_path / "x.cbors.xz"
    sent = [[np.random.default_rng(i).bytes(size)] for i in range(50)]
    record(sent, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10] + damage)
    came = []
    with pytest.raises(DecodeError, match=r"x\.cbors\.xz: message \d+ of the recording"):
        came.extend(messages(path))
    assert came[:28] == sent[:28]


def test_a_text_that_calls_itself_a_recording_is_rejected(tmp_path):
    (tmp_path / "x.cbors.xz").write_text("not a recording")
    [rejected] = RecordingSource(tmp_path / "x.cbors.xz")
    assert "x.cbors.xz: message 0 of the recording" in rejected.reason


def test_a_position_of_another_recording_is_refused(tmp_path):
    for name in ("x.cbors", "y.cbors"):
        record(small_series(), tmp_path / name)
    source = RecordingSource(tmp_path / "x.cbors")
    next(iter(source))
    assert source.position() == {"x.cbors:message": 1}
    with pytest.raises(SourceError, match=r"y\.cbors: \{'x\.cbors:message': 1\} is a position of another source"):
        RecordingSource(tmp_path / "y.cbors").seek(source.position())


@pytest.mark.parametrize(("name", "n_frames"), [(V1, 9), (V2, 10)])
def test_a_recording_of_a_real_detector_has_all_its_frames(shared_data, name, n_frames):
    run_start, *batches = [m for m in RecordingSource(shared_data / name, batch=4) if not isinstance(m, RunStop)]
    assert isinstance(run_start, RunStart)
    assert run_start.dtype == "<u4"
    assert [b.first for b in batches] == [0, 4, 8]
    assert sum(len(b.frames) for b in batches) == n_frames


def test_the_recording_that_holds_the_end_of_its_run_ends_with_a_stop(shared_data):
    *_, run_stop = RecordingSource(shared_data / V2)
    assert run_stop == RunStop(run="01HRCJF83SA63WH8M5X1VBKFJM", n_frames=10, exit_status="success")
    assert not any(isinstance(m, RunStop) for m in RecordingSource(shared_data / V1))


def test_the_detectors_chunks_in_a_file_are_the_frames_of_its_stream(shared_data, tmp_path):
    images = [m for m in map(cbor2.loads, (parts[0] for parts in messages(shared_data / V2))) if m["type"] == "image"]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset(
            "entry/data/data", (10, *SHAPE), "<u4", chunks=(1, *SHAPE), **hdf5plugin.Bitshuffle(cname="lz4")
        )
        for i, image in enumerate(images):
            shape, typed = image["data"]["threshold_1"].value
            assert tuple(shape) == SHAPE
            dataset.id.write_direct_chunk((i, 0, 0), typed.value.value[2])
    with Hdf5Source(tmp_path / "x.h5", frame_time=1) as source:
        from_file = frames_of(source)
    np.testing.assert_array_equal(from_file, frames_of(RecordingSource(shared_data / V2)))
    with h5py.File(tmp_path / "x.h5") as file:
        np.testing.assert_array_equal(from_file, file["entry/data/data"][:])


def test_recorded_messages_that_cannot_be_read_are_sent_all_the_same():
    sent = []
    recorded = [[], [b"{"], [b"\xff"], *small_series()]
    send_recorded(recorded, sent.append, threading.Event(), rate=None)
    assert sent == recorded
