import os

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import ConfigError, SourceError
from stream.ingest.dectris import DectrisDecoder
from stream.ingest.hdf5 import Hdf5Source
from stream.messages import Events, FrameBatch, Rejected, RunStart, RunStop
from stream.operators.multitau import MultiTau
from tests import dectris_hostile as dectris
from tests.conftest import make_roimap

FRAMES = np.random.default_rng(7).poisson(3, (23, 6, 5)).astype("<u2")
BSLZ4 = hdf5plugin.Bitshuffle(cname="lz4")
FRAME = (1, 6, 5)


def write(
    path, frames=FRAMES, fields=(("entry/instrument/detector/frame_time", 0.01),), name="entry/data/data", **storage
):
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=frames, **storage)
        for field, value in fields:
            file[field] = value
    return path


def read(path, position=None, **options):
    """All messages of the file, frames copied, each with the position after it."""
    with Hdf5Source(path, **options) as source:
        if position is not None:
            source.seek(position)
        return [(owned(message), source.position()) for message in source]


def owned(message):
    if isinstance(message, FrameBatch):
        return ("FrameBatch", message.run, message.first, message.timestamp_ns, message.frames.tolist())
    return message


def start(path, **options):
    with Hdf5Source(path, **options) as source:
        return next(iter(source))


def batches(path, **options):
    """First frame and copied frames of each batch."""
    with Hdf5Source(path, **options) as source:
        return [(m.first, m.frames.copy()) for m in source if isinstance(m, FrameBatch)]


def frames_of(path, **options):
    return np.concatenate([frames for _, frames in batches(path, **options)])


def rejected(path, **options):
    with Hdf5Source(path, **options) as source:
        return [m.reason for m in source if isinstance(m, Rejected)]


def write_master(folder):
    """An EIGER master file with 3 data files of 10, 10 and 3 frames."""
    path = folder / "x_master.h5"
    fields = {
        "entry/instrument/detector/frame_time": np.float32(0.01),
        "entry/instrument/detector/count_time": np.float32(0.00999),
        "entry/instrument/detector/beam_center_x": np.float32(2.5),
        "entry/instrument/detector/beam_center_y": np.float32(3.5),
        "entry/instrument/detector/detector_distance": np.float32(4.5),
        "entry/instrument/detector/x_pixel_size": np.float32(7.5e-5),
        "entry/instrument/detector/y_pixel_size": np.float32(7.5e-5),
        "entry/instrument/detector/bit_depth_image": np.uint32(16),
        "entry/instrument/detector/description": "Dectris EIGER2 Si 500K",
        "entry/instrument/detector/detectorSpecific/photon_energy": np.float32(8000),
        "entry/instrument/detector/detectorSpecific/data_collection_date": "2026-11-21T12:00:00.5+01:00",
        "entry/instrument/beam/incident_wavelength": np.float32(1.5498),
    }
    with h5py.File(path, "w") as file:
        for field, value in fields.items():
            file[field] = value
        file["entry/instrument"].attrs["NX_class"] = np.bytes_("NXinstrument")
        file["entry/instrument/detector"].attrs["NX_class"] = np.bytes_("NXdetector")
        for i, first in enumerate((0, 10, 20), 1):
            write(folder / f"x_data_{i:06d}.h5", FRAMES[first : first + 10], (), chunks=FRAME, **BSLZ4)
            file[f"entry/data/data_{i:06d}"] = h5py.ExternalLink(f"x_data_{i:06d}.h5", "/entry/data/data")
    return path


@pytest.fixture
def master(tmp_path):
    return write_master(tmp_path)


STORAGES = {
    "contiguous": {},
    "bslz4 by frame, as a detector writes": {"chunks": FRAME, **BSLZ4},
    "bslz4 by many frames": {"chunks": (4, 6, 5), **BSLZ4},
    "bslz4 by tiles": {"chunks": (3, 4, 2), **BSLZ4},
    "bitshuffle and zstd by frame": {"chunks": FRAME, **hdf5plugin.Bitshuffle(cname="zstd")},
    "gzip": {"chunks": (5, 6, 5), "compression": "gzip"},
    "lz4": {"chunks": FRAME, **hdf5plugin.LZ4()},
    "shuffle and blosc": {"chunks": FRAME, "shuffle": True, **hdf5plugin.Blosc()},
}


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4", ">u2", ">u4"])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_every_frame_comes_once_in_order_however_it_is_stored(tmp_path, storage, dtype, batch):
    path = write(tmp_path / "x.h5", FRAMES.astype(dtype), **storage)
    found = batches(path, batch=batch)
    assert [first for first, _ in found] == np.cumsum([0, *(len(frames) for _, frames in found[:-1])]).tolist()
    frames = np.concatenate([frames for _, frames in found])
    np.testing.assert_array_equal(frames, FRAMES)
    assert frames.dtype.str == start(path).dtype == np.dtype(dtype).newbyteorder("<").str


def test_a_run_is_start_then_batches_then_stop(tmp_path):
    path = write(tmp_path / "x.h5")
    kinds = [type(m) for m in Hdf5Source(path, batch=10)]
    assert kinds == [RunStart, FrameBatch, FrameBatch, FrameBatch, RunStop]
    assert read(path)[-1][0] == RunStop(run="x", n_frames=23, exit_status="success")


def test_a_file_without_frames_is_a_run_without_frames(tmp_path):
    path = write(tmp_path / "x.h5", FRAMES[:0])
    assert [type(m) for m in Hdf5Source(path)] == [RunStart, RunStop]


def test_batches_are_read_only(tmp_path):
    with Hdf5Source(write(tmp_path / "x.h5", chunks=FRAME, **BSLZ4)) as source:
        _, batch, _ = source
        assert not batch.frames.flags.writeable


def test_batches_are_whole_chunks_of_the_file(tmp_path):
    path = write(tmp_path / "x.h5", chunks=(4, 6, 5), compression="gzip")
    assert [first for first, _ in batches(path, batch=10)] == [0, 8, 16]
    assert [first for first, _ in batches(path, batch=1)] == [0, 4, 8, 12, 16, 20]


def test_frames_are_read_from_the_dataset_that_is_named(tmp_path):
    path = write(tmp_path / "x.h5", name="exchange/frames")
    np.testing.assert_array_equal(frames_of(path, dataset="exchange/frames"), FRAMES)


def test_a_chunk_stored_without_its_filter_is_read(tmp_path):
    path = write(tmp_path / "x.h5", chunks=FRAME, **BSLZ4)
    with h5py.File(path, "r+") as file:
        file["entry/data/data"].id.write_direct_chunk((3, 0, 0), FRAMES[9].tobytes(), filter_mask=1)
    np.testing.assert_array_equal(frames_of(path)[3], FRAMES[9])


# Seeking


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """An EIGER master file; its frames 5, 6 and 13 of 23 cannot be read."""
    folder = tmp_path_factory.mktemp("damaged")
    path = write_master(folder)
    for file_number, frames in ((1, (5, 6)), (2, (3,))):
        with h5py.File(folder / f"x_data_{file_number:06d}.h5", "r+") as file:
            for frame in frames:
                file["entry/data/data"].id.write_direct_chunk((frame, 0, 0), b"garbage")
    return path


@given(batch=st.integers(1, 30), data=st.data())
def test_after_a_seek_the_rest_is_as_without_interruption(damaged, batch, data):
    whole = read(damaged, batch=batch)
    n = data.draw(st.integers(0, len(whole) - 1))
    assert read(damaged, whole[n][1], batch=batch) == whole[n + 1 :]


def test_the_position_before_the_first_message_leads_to_the_beginning(damaged):
    with Hdf5Source(damaged) as source:
        position = source.position()
    assert read(damaged, position) == read(damaged, {}) == read(damaged)


def test_a_position_outside_the_file_is_refused(damaged):
    with Hdf5Source(damaged) as source, pytest.raises(SourceError, match=r"position 99 .* 23 frames"):
        source.seek({"x_master:frame": 99})


def test_a_position_of_another_run_is_refused(damaged, tmp_path):
    with Hdf5Source(write(tmp_path / "other.h5")) as other, Hdf5Source(damaged) as source:
        assert other.position() == {"other:frame": -1}
        with pytest.raises(SourceError, match=r"x_master: \{'other:frame': -1\} is a position of another source"):
            source.seek(other.position())


# Frames that are not there


def test_frames_of_a_damaged_chunk_are_rejected_by_name_and_the_others_come(damaged):
    assert [(first, len(frames)) for first, frames in batches(damaged)] == [(0, 5), (7, 3), (10, 3), (14, 6), (20, 3)]
    reasons = rejected(damaged)
    assert len(reasons) == 2
    assert "x_data_000001.h5 /entry/data/data: frames 5 to 6:" in reasons[0]
    assert "x_data_000002.h5 /entry/data/data: frames 13 to 13:" in reasons[1]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00",
        b"\xff" * 8,
        b"\xff" * 40,
        b"\x00" * 40,
        (60).to_bytes(8, "big") + b"\x7f" * 40,
        (2**62).to_bytes(8, "big") + b"\x00\x00\x20\x00" * 9,
    ],
)
def test_whatever_a_chunk_holds_only_its_frame_is_lost(tmp_path, garbage):
    path = write(tmp_path / "x.h5", chunks=FRAME, **BSLZ4)
    with h5py.File(path, "r+") as file:
        file["entry/data/data"].id.write_direct_chunk((2, 0, 0), garbage)
    assert [(first, len(frames)) for first, frames in batches(path)] == [(0, 2), (3, 20)]


def test_a_damaged_chunk_of_many_frames_loses_just_those(tmp_path):
    path = write(tmp_path / "x.h5", chunks=(4, 6, 5), compression="gzip")
    with h5py.File(path, "r+") as file:
        file["entry/data/data"].id.write_direct_chunk((8, 0, 0), b"garbage")
    assert [(first, len(frames)) for first, frames in batches(path)] == [(0, 8), (12, 11)]
    assert "frames 8 to 11:" in rejected(path)[0]


@pytest.mark.parametrize(("tile", "storage"), [(FRAME, {}), (FRAME, BSLZ4), ((2, 6, 5), {}), ((2, 3, 5), {})])
def test_frames_that_were_never_written_are_lost_rather_than_zero(tmp_path, tile, storage):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("entry/data/data", FRAMES.shape, "<u2", chunks=tile, **storage)
        dataset[:8] = FRAMES[:8]
        dataset[10:] = FRAMES[10:]
    assert [(first, len(frames)) for first, frames in batches(path, frame_time=1)] == [(0, 8), (10, 13)]
    assert rejected(path, frame_time=1) == [f"{path} /entry/data/data: frames 8 to 9: never written"]


# EIGER master files


def test_a_master_file_is_read_through_its_data_files(master):
    np.testing.assert_array_equal(frames_of(master), FRAMES)
    assert read(master)[-1][0] == RunStop(run="x_master", n_frames=23, exit_status="success")


def test_batches_of_a_master_file_end_with_its_data_files(master):
    assert [first for first, _ in batches(master, batch=4)] == [0, 4, 8, 10, 14, 18, 20]


def test_a_master_file_tells_the_geometry_in_our_units(master):
    found = start(master)
    assert found.run == "x_master"
    assert (found.shape, found.dtype) == ((6, 5), "<u2")
    assert found.frame_time == pytest.approx(0.01)
    assert found.count_time == pytest.approx(0.00999)
    assert found.metadata == {
        "n_frames": 23,
        "start_time": "2026-11-21T12:00:00.5+01:00",
        "incident_energy": pytest.approx(8.0),
        "detector_distance": pytest.approx(4.5),
        "beam_center_x": pytest.approx(2.5),
        "beam_center_y": pytest.approx(3.5),
        "x_pixel_size": pytest.approx(7.5e-5),
        "y_pixel_size": pytest.approx(7.5e-5),
        "detector": "Dectris EIGER2 Si 500K",
    }


def test_a_master_file_of_an_aborted_run_is_read_as_far_as_it_goes(master, tmp_path, caplog):
    (tmp_path / "x_data_000002.h5").unlink()
    (tmp_path / "x_data_000003.h5").unlink()
    np.testing.assert_array_equal(frames_of(master), FRAMES[:10])
    assert read(master)[-1][0] == RunStop(run="x_master", n_frames=10, exit_status="abort")
    assert "x_data_000002.h5" in caplog.text


def test_a_data_file_missing_before_others_is_named(master, tmp_path):
    (tmp_path / "x_data_000002.h5").unlink()
    with pytest.raises(SourceError, match=r"x_master.h5 needs x_data_000002.h5, which is not there"):
        Hdf5Source(master)


def test_a_master_file_with_no_data_file_at_all_is_refused(master, tmp_path):
    for file in tmp_path.glob("x_data_*"):
        file.unlink()
    with pytest.raises(SourceError, match=r"x_data_000001\.h5"):
        Hdf5Source(master)


def test_data_files_that_do_not_fit_together_are_refused(master, tmp_path):
    write(tmp_path / "x_data_000002.h5", FRAMES.astype("<u4"), ())
    with pytest.raises(SourceError, match=r"data_000002 are \(6, 5\) uint32"):
        Hdf5Source(master)


def test_a_missing_file_of_a_virtual_dataset_is_named_rather_than_read_as_zeros(tmp_path):
    write(tmp_path / "raw.h5", FRAMES, ())
    layout = h5py.VirtualLayout(FRAMES.shape, "<u2")
    layout[:] = h5py.VirtualSource("raw.h5", "entry/data/data", FRAMES.shape)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_virtual_dataset("entry/data/data", layout)
    np.testing.assert_array_equal(frames_of(tmp_path / "x.h5", frame_time=1), FRAMES)
    (tmp_path / "raw.h5").unlink()
    with pytest.raises(SourceError, match=r"needs raw.h5"):
        Hdf5Source(tmp_path / "x.h5", frame_time=1)


# What a pixel can hold


@pytest.mark.parametrize(
    ("dtype", "fields", "expected"),
    [
        ("<u2", {}, None),
        ("<u2", {"saturation_value": 5000}, 5000),
        ("<u4", {"saturation_value": 2943293.0}, 2943293),
        ("<u2", {"saturation_value": 65534}, 65534),
        ("<u2", {"saturation_value": 65535}, 65534),
        ("<u2", {"saturation_value": 2**32 - 1}, 65534),
        ("<u2", {"saturation_value": -1}, None),
        ("<u2", {"saturation_value": 12.5}, None),
        ("<u2", {"detectorSpecific/nimages": 23}, 65534),
        ("<u4", {"detectorSpecific/nimages": 23}, 2**32 - 2),
        ("<u4", {"detectorSpecific/nimages": 23, "bit_depth_image": 16}, 65534),
        ("<u4", {"detectorSpecific/nimages": 23, "bit_depth_image": 10**9}, 2**32 - 2),
        ("<u4", {"detectorSpecific/nimages": 23, "saturation_value": 2943293}, 2**32 - 2),
        ("<i4", {"detectorSpecific/nimages": 23, "saturation_value": 2943293}, 2**31 - 1),
        ("<i4", {}, 2**31 - 1),
        (">i2", {}, 2**15 - 1),
        ("<i4", {"saturation_value": 10**6}, 10**6),
        ("<i4", {"saturation_value": 2**31 - 1}, 2**31 - 1),
    ],
)
def test_the_largest_count_is_the_stated_one_except_of_an_eiger_whose_marks_are_above_all_counts(
    tmp_path, dtype, fields, expected
):
    fields = [(f"entry/instrument/detector/{name}", value) for name, value in fields.items()]
    path = write(tmp_path / "x.h5", FRAMES.astype(dtype), fields)
    assert start(path, frame_time=1).saturation_value == expected


@pytest.mark.parametrize("dtype", ["|i1", "<i2", ">i2", "<i4", ">i4"])
@pytest.mark.parametrize("storage", [{}, {"chunks": FRAME, **BSLZ4}])
def test_negative_pixels_are_above_the_largest_count_and_the_others_unchanged(tmp_path, dtype, storage):
    frames = FRAMES.astype(dtype)
    frames[:, 2, 3], frames[:, 4, 1] = -1, -2
    path = write(tmp_path / "x.h5", frames, **storage)
    found = frames_of(path)
    assert found.dtype.str == start(path).dtype
    assert found.dtype.kind == "u"
    bad = found > start(path).saturation_value
    np.testing.assert_array_equal(bad, frames < 0)
    np.testing.assert_array_equal(found[~bad], frames[~bad])


MASK = np.zeros((6, 5), "<u4")
MASK[1, 2], MASK[5, 4] = 1, 2**31
MASK_AT = "entry/instrument/detector/detectorSpecific/pixel_mask"
APPLIED_AT = "entry/instrument/detector/pixel_mask_applied"


def write_masked(path, dtype="<u2", mask=MASK, mask_at=MASK_AT, applied=0, **storage):
    fields = [("entry/instrument/detector/detectorSpecific/nimages", 23)]
    fields += [("entry/instrument/detector/frame_time", 0.01), ("entry/instrument/detector/count_time", 0.009)]
    fields += [] if mask is None else [(mask_at, mask)]
    fields += [] if applied is None else [(APPLIED_AT, applied)]
    return write(path, FRAMES.astype(dtype), fields, **storage)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("dtype", ["|u1", "<u2", ">u4"])
@pytest.mark.parametrize("mask_at", [MASK_AT, "entry/instrument/detector/pixel_mask"])
def test_pixels_that_an_eiger_left_to_us_to_mask_have_the_largest_value_in_each_frame(
    tmp_path, storage, dtype, mask_at
):
    path = write_masked(tmp_path / "x.h5", dtype, mask_at=mask_at, **storage)
    found = frames_of(path, batch=4)
    assert (found[:, MASK != 0] == np.iinfo(dtype).max).all()
    np.testing.assert_array_equal(found[:, MASK == 0], FRAMES[:, MASK == 0])
    np.testing.assert_array_equal(found > start(path).saturation_value, np.broadcast_to(MASK != 0, FRAMES.shape))


@pytest.mark.parametrize(("applied", "is_ours"), [(0, True), (False, True), (None, True), (1, False), (True, False)])
def test_a_mask_is_ours_to_apply_unless_the_eiger_says_that_it_did(tmp_path, applied, is_ours):
    found = frames_of(write_masked(tmp_path / "x.h5", applied=applied))
    assert np.array_equal(found, FRAMES) is not is_ours


def test_an_eiger_without_a_mask_has_its_frames_unchanged(tmp_path):
    np.testing.assert_array_equal(frames_of(write_masked(tmp_path / "x.h5", mask=None)), FRAMES)


def test_a_mask_in_a_file_that_is_not_an_eigers_is_not_applied(tmp_path):
    path = write_masked(tmp_path / "x.h5", mask_at="entry/instrument/detector/pixel_mask")
    with h5py.File(path, "r+") as file:
        del file["entry/instrument/detector/detectorSpecific"]
    np.testing.assert_array_equal(frames_of(path), FRAMES)


@pytest.mark.parametrize(
    "mask", [np.ones((5, 6), "<u4"), np.ones((6, 5)), np.ones((2, 6, 5), "<u4"), 1, h5py.Empty("u4")]
)
def test_a_mask_that_does_not_fit_the_frames_is_not_applied_and_that_is_said(tmp_path, mask, caplog):
    path = write_masked(tmp_path / "x.h5", mask=mask)
    np.testing.assert_array_equal(frames_of(path), FRAMES)
    assert "does not fit frames (6, 5): not applied" in caplog.text


# Few photons


DIM = (67, 131)
SATURATED = 1000


def dim(dtype="<u2", n=100):
    """Frames of few photons, with a gap, a pixel at the limit and one that overflows in frame 50."""
    frames = np.random.default_rng(5).poisson(0.01, (n, *DIM)).astype(dtype)
    frames[:, 20:24] = np.iinfo(dtype).max
    frames[50:51, 50, 60] = SATURATED + 1
    frames[:, 50, 61] = SATURATED
    return frames


def write_dim(path, frames, stated=SATURATED):
    fields = [("entry/instrument/detector/frame_time", 0.01)]
    fields += [] if stated is None else [("entry/instrument/detector/saturation_value", stated)]
    return write(path, frames, fields, chunks=(1, *DIM), **BSLZ4)


def events_of(path, **options):
    """First frame and events of each batch; nothing else comes."""
    with Hdf5Source(path, give="photons", **options) as source:
        found = [(m.first, m.frames) for m in source if isinstance(m, FrameBatch)]
    assert {type(frames) for _, frames in found} == {Events}
    return found


def marked_once(frames, above=SATURATED):
    """Pixels that are masked in the first frame are dark in the others."""
    once = frames.copy()
    once[1:, frames[0] > above] = 0
    return once


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i2", "<i4"])
def test_dim_frames_come_as_events_that_end_in_the_g2_of_the_frames(tmp_path, dtype):
    frames = dim(dtype)
    path = write_dim(tmp_path / "x.h5", frames)
    rows = write(tmp_path / "rows.h5", frames, [("entry/instrument/detector/saturation_value", SATURATED)])
    begun = start(path)

    def g2(batches):
        multitau = MultiTau(begun, make_roimap(DIM))
        for first, part in batches:
            multitau.push(FrameBatch(run=begun.run, first=first, frames=part, timestamp_ns=0))
        return multitau.result()

    expected = g2(batches(rows, frame_time=0.01))
    assert np.isfinite(expected["g2"]).any()
    for name, array in g2(events_of(path, batch=30)).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_every_batch_of_events_tells_the_masked_pixels_in_its_first_frame(tmp_path):
    frames = dim()
    found = events_of(write_dim(tmp_path / "x.h5", frames), batch=30)
    assert [first for first, _ in found] == [0, 30, 60, 90]
    for first, events in found:
        np.testing.assert_array_equal(events.dense(), marked_once(frames[first : first + 30]))


def test_where_a_file_states_no_largest_count_every_value_is_one(tmp_path):
    frames = dim()
    frames[:, 20:24] = 0
    frames[:, 9, 9] = 65535
    path = write_dim(tmp_path / "x.h5", frames, stated=None)
    assert start(path).saturation_value is None
    [(_, events)] = events_of(path, batch=100)
    np.testing.assert_array_equal(events.dense(), frames)


def test_dim_frames_that_an_eiger_left_to_us_to_mask_have_its_mask_in_the_first(tmp_path):
    mask = np.zeros(DIM, "<u4")
    mask[7, 8:30] = 1
    frames = dim(n=10)
    path = write_dim(tmp_path / "x.h5", frames, stated=None)
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/detectorSpecific/nimages"] = 10
        file[MASK_AT] = mask
    frames[:, mask != 0] = 65535
    [(_, events)] = events_of(path)
    np.testing.assert_array_equal(events.dense(), marked_once(frames, 65534))


def test_bad_frames_between_dim_ones_are_rejected_and_those_after_tell_the_masked_pixels_again(tmp_path):
    frames = dim(n=30)
    path = write_dim(tmp_path / "x.h5", frames)
    with h5py.File(path, "r+") as file:
        dataset = file["entry/data/data"]
        dataset.id.write_direct_chunk((7, 0, 0), b"garbage")
        chunk = dataset.id.read_direct_chunk((8, 0, 0))[1]
        dataset.id.write_direct_chunk((8, 0, 0), chunk[:-3])
        dataset.id.write_direct_chunk((20, 0, 0), frames[20].tobytes(), filter_mask=1)
    found = events_of(path)
    assert [(first, len(events)) for first, events in found] == [(0, 7), (9, 11), (20, 10)]
    for first, events in found:
        np.testing.assert_array_equal(events.dense(), marked_once(frames[first : first + len(events)]))
    reasons = rejected(path, give="photons")
    assert [reason.split(": ")[1] for reason in reasons] == ["frames 7 to 7", "frames 8 to 8"]


def test_dim_frames_come_as_they_are_where_nobody_asked_for_photons(tmp_path):
    np.testing.assert_array_equal(frames_of(write_dim(tmp_path / "x.h5", dim())), dim())


def test_after_a_seek_into_dim_frames_the_rest_is_the_same(tmp_path):
    frames = dim()
    path = write_dim(tmp_path / "x.h5", frames)
    with Hdf5Source(path, batch=30, give="photons") as source:
        source.seek({f"{start(path).run}:frame": 45})
        found = [(m.first, m.frames) for m in source if isinstance(m, FrameBatch)]
    assert [first for first, _ in found] == [45, 60, 90]
    np.testing.assert_array_equal(found[0][1].dense(), marked_once(frames[45:60]))


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("cutoff", [3, 65535])
def test_a_run_read_from_its_master_file_is_as_its_stream_was(tmp_path, applied, cutoff):
    counts = np.array([[1, 2, 3], [4, 65535, 0]], "<u2")
    mask = np.array([[0, 0, 8], [1, 0, 0]], "<u4")
    described = dectris.encode({"htype": "dpixelmask-1.0", "shape": [3, 2], "type": "uint32"})
    flat = dectris.encode({"htype": "dflatfield-1.0", "shape": [3, 2], "type": "float32"})
    header = dectris.v1_header(pixel_mask_applied=applied, countrate_correction_count_cutoff=cutoff)
    decoder = DectrisDecoder()
    live = list(decoder.feed([*header, flat, bytes(24), described, mask.tobytes()]))
    live += [*decoder.feed(dectris.v1_image(counts.tobytes())), *decoder.idle()]
    path = write_masked(tmp_path / "x.h5", mask=mask, applied=applied)
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/saturation_value"] = cutoff
        del file["entry/data/data"]
        file["entry/data/data"] = counts[None]
    with Hdf5Source(path) as source:
        offline = [m for m in source if not isinstance(m, RunStop)]
    for from_stream, from_file in zip(live, offline, strict=True):
        assert type(from_stream) is type(from_file)
    names = ("shape", "dtype", "saturation_value", "frame_time", "count_time")
    assert [getattr(live[0], n) for n in names] == [getattr(offline[0], n) for n in names]
    np.testing.assert_array_equal(live[1].frames, offline[1].frames)


# When


def test_frame_time_is_taken_from_the_option_before_the_file(tmp_path):
    path = write(tmp_path / "x.h5")
    assert start(path).frame_time == 0.01
    assert start(path, frame_time=0.5).frame_time == 0.5


@pytest.mark.parametrize(("value", "unit", "expected"), [(20, "us", 2e-5), (0.5, b"ms", 5e-4), (3, "s", 3)])
def test_units_that_the_file_states_are_respected(tmp_path, value, unit, expected):
    path = write(tmp_path / "x.h5", fields=[("entry/instrument/detector/frame_time", value)])
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/frame_time"].attrs["units"] = unit
    assert start(path).frame_time == pytest.approx(expected)


def test_a_number_in_an_unknown_unit_is_left_out_with_a_warning(tmp_path, caplog):
    path = write(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/beam_center_x"] = 17.0
        file["entry/instrument/detector/beam_center_x"].attrs["units"] = "furlong"
    assert "beam_center_x" not in start(path).metadata
    assert "beam_center_x is 17.0 furlong" in caplog.text


@pytest.mark.parametrize("value", [None, np.nan, np.inf, 0.0, -1.0, 1e300, "soon", [0.1, 0.2]])
def test_without_a_usable_frame_time_the_message_says_where_to_give_it(tmp_path, value):
    path = write(tmp_path / "x.h5", fields=[] if value is None else [("entry/instrument/detector/frame_time", value)])
    with pytest.raises(ConfigError, match=r"x\.h5.* frame time.*: give --frame-time \(source\.frame_time\)"):
        Hdf5Source(path)


@pytest.mark.parametrize("count_time", [0.0, -1.0, 0.02])
def test_an_exposure_that_does_not_fit_into_frame_time_becomes_frame_time(tmp_path, count_time, caplog):
    path = write(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/count_time"] = count_time
    assert start(path).count_time == 0.01
    assert "count_time" in caplog.text


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01T00:00:01Z", 1_000_000_000),
        ("1970-01-01T01:00:00.000001+01:00", 1_000),
        ("2026-11-21T12:00:00.123456+00:00", 1_795_262_400_123_456_000),
    ],
)
def test_frames_are_timed_from_start_time(tmp_path, text, ns):
    path = write(tmp_path / "x.h5", fields=[("entry/start_time", text)])
    with Hdf5Source(path, frame_time=0.25, batch=8) as source:
        timestamps = [m.timestamp_ns for m in source if isinstance(m, FrameBatch)]
    assert timestamps == [ns, ns + 2_000_000_000, ns + 4_000_000_000]


BAD_DATES = ("Tue Feb 18 15:30:30 2020", "1066-10-14T09:00:00Z", "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00")


@pytest.mark.parametrize("fields", [[], *([("entry/start_time", date)] for date in BAD_DATES)])
def test_frames_are_timed_from_the_modification_time_where_there_is_no_start_time(tmp_path, fields):
    path = write(tmp_path / "x.h5", fields=fields)
    os.utime(path, ns=(5, 7_000_000_000))
    with Hdf5Source(path, frame_time=1) as source:
        assert [m.timestamp_ns for m in source if isinstance(m, FrameBatch)] == [7_000_000_000]


# Metadata beside the file


def write_aps_metadata(path):
    fields = {
        "entry/entry_identifier": "aps-8idi-0042",
        "entry/start_time": "2026-11-21T12:00:00",
        "entry/scan_number": 42,
        "entry/sample/name": "silica",
        "entry/instrument/detector_1/distance": 12.5,
        "entry/instrument/detector_1/x_pixel_size": 76e-6,
        "entry/instrument/detector_1/y_pixel_size": 76e-6,
        "entry/instrument/detector_1/beam_center_x": 2.0,
        "entry/instrument/detector_1/beam_center_y": 3.0,
        "entry/instrument/detector_1/frame_time": np.array([2e-5]),
        "entry/instrument/detector_1/count_time": np.array([1.9e-5]),
        "entry/instrument/incident_beam/incident_energy": 10.9,
    }
    with h5py.File(path, "w") as file:
        for field, value in fields.items():
            file[field] = value
    return path


@pytest.mark.parametrize(("name", "option"), [("x_metadata.hdf", False), ("elsewhere.hdf", True)])
def test_an_aps_metadata_file_is_found_beside_the_raw_one_or_given(tmp_path, name, option):
    beside = write_aps_metadata(tmp_path / name)
    path = write(tmp_path / "x.h5")
    found = start(path, **({"metadata": beside} if option else {}))
    assert (found.run, found.frame_time, found.count_time) == ("aps-8idi-0042", 2e-5, 1.9e-5)
    assert found.metadata == {
        "n_frames": 23,
        "start_time": "2026-11-21T12:00:00",
        "scan_number": 42,
        "sample": "silica",
        "incident_energy": 10.9,
        "detector_distance": 12.5,
        "beam_center_x": 2.0,
        "beam_center_y": 3.0,
        "x_pixel_size": 76e-6,
        "y_pixel_size": 76e-6,
    }


def test_a_detector_is_found_by_its_nexus_class_whatever_its_name(tmp_path):
    path = write(tmp_path / "x.h5", fields=[("entry/instrument/lambda2M/frame_time", 0.125)])
    with h5py.File(path, "r+") as file:
        file["entry/instrument/lambda2M"].attrs["NX_class"] = "NXdetector"
    assert start(path).frame_time == 0.125


def test_the_energy_follows_from_the_wavelength(tmp_path):
    path = write(tmp_path / "x.h5", fields=[("entry/instrument/beam/incident_wavelength", 1.5498024804150032)])
    assert start(path, frame_time=1).metadata["incident_energy"] == pytest.approx(8.0)


# Files that are something else


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i8", "<u8", "?"])
def test_frames_of_another_dtype_are_refused_by_its_name(tmp_path, dtype):
    path = write(tmp_path / "x.h5", FRAMES.astype(dtype))
    with pytest.raises(SourceError, match=rf"x.h5: /entry/data/data is {np.dtype(dtype).name}"):
        Hdf5Source(path)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 6, 5), ()])
def test_frames_of_another_shape_are_refused(tmp_path, shape):
    path = write(tmp_path / "x.h5", np.ones(shape, "<u2"))
    with pytest.raises(SourceError, match=r"not a dataset of \(n, rows, columns\)"):
        Hdf5Source(path)


@pytest.mark.parametrize("shape", [(2, 2**15, 2**13), (2, 64, 0)])
def test_frames_too_large_to_be_true_are_refused_before_room_is_made(tmp_path, shape):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("entry/data/data", shape, "<u4", chunks=(1, 64, 64) if 0 not in shape else None)
    with pytest.raises(SourceError, match=r"at most 268435456 bytes each"):
        Hdf5Source(tmp_path / "x.h5", frame_time=1)


@pytest.fixture
def room_for_3_frames(monkeypatch):
    monkeypatch.setattr("stream.ingest.hdf5_frames.MAX_READ_BYTES", 3 * FRAMES[0].nbytes)


@pytest.mark.usefixtures("room_for_3_frames")
def test_no_more_than_a_bounded_size_is_read_at_once_however_large_the_chunks(tmp_path):
    path = write(tmp_path / "x.h5", chunks=(8, 6, 5), compression="gzip")
    assert max(len(frames) for _, frames in batches(path)) == 3
    np.testing.assert_array_equal(frames_of(path), FRAMES)


@pytest.mark.usefixtures("room_for_3_frames")
def test_of_chunks_larger_than_a_read_just_the_frames_of_bad_ones_are_lost(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("entry/data/data", FRAMES.shape, "<u2", chunks=(5, 6, 5), compression="gzip")
        dataset[:5] = FRAMES[:5]
        dataset[10:] = FRAMES[10:]
        dataset.id.write_direct_chunk((15, 0, 0), b"garbage")
    found = batches(tmp_path / "x.h5", frame_time=1)
    assert [first + i for first, frames in found for i in range(len(frames))] == [*range(5), *range(10, 15), 20, 21, 22]


def test_a_file_without_frames_where_they_are_sought_says_how_to_name_them(tmp_path):
    path = write(tmp_path / "x.h5", name="elsewhere")
    with pytest.raises(ConfigError, match=r"no frames at /entry/data/data; say where they are with source\.dataset"):
        Hdf5Source(path)


def test_a_file_that_is_missing_or_not_hdf5_is_named(tmp_path):
    (tmp_path / "text.h5").write_text("not HDF5")
    for name, says in (("text.h5", "cannot be read as HDF5"), ("missing.h5", ": no such file")):
        with pytest.raises(SourceError, match=f"{name}{says}" if says[0] == ":" else f"{name} {says}"):
            Hdf5Source(tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("sample/name", "x" * 2**20, "a header of"),
        ("entry_identifier", "x" * 300, "run = 'xxx"),
    ],
)
def test_a_file_that_says_more_than_a_message_holds_is_refused(tmp_path, field, value, says):
    with pytest.raises(SourceError, match=rf"x\.h5: start: {says}"):
        Hdf5Source(write(tmp_path / "x.h5", fields=[(f"entry/{field}", value)]), frame_time=1)


def test_an_empty_identifier_is_none(tmp_path):
    assert start(write(tmp_path / "x.h5", fields=[("entry/entry_identifier", "")]), frame_time=1).run == "x"


@pytest.mark.parametrize("part", [b"TREE", b"SNOD", b"HEAP"])
def test_a_file_whose_structure_is_damaged_is_named(tmp_path, part):
    path = write(tmp_path / "x.h5", chunks=FRAME)
    path.write_bytes(path.read_bytes().replace(part, b"\xff" * 4))
    with pytest.raises(SourceError, match=r"x\.h5 is damaged: "):
        Hdf5Source(path)


def test_a_metadata_file_that_is_given_and_missing_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"no_metadata.hdf"):
        Hdf5Source(write(tmp_path / "x.h5"), metadata=tmp_path / "no_metadata.hdf")


def test_a_batch_of_no_frames_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch is 0"):
        Hdf5Source(write(tmp_path / "x.h5"), batch=0)
