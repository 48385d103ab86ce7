"""Raw frames go to files beside streaming, and come back as they were; what the disk does not take never ends it."""

import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import h5py
import numpy as np
import pytest

from stream.errors import SinkError
from stream.ingest.bluesky_facts import Facts
from stream.ingest.hdf5 import Hdf5Source
from stream.ingest.hdf5_growing import GrowingFrames
from stream.messages import FrameBatch, Rejected, RunStart, RunStop
from stream.sinks.spool import Spool
from stream.sinks.spool_room import Room
from stream.sinks.spool_run import SpooledRun
from tests.conftest import chunks_of, events_of, make_start
from tests.plane import DEADLINE, REGIONS, Plane, until_said
from tests.test_command_line import finished, xpcs_stream
from tests.test_kill import N_FRAMES, assert_identical, contents, frames, free, qmap, result_of_frames

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap"]

SHAPE = (67, 131)
COUNTS = np.random.default_rng(3).poisson(0.3, (40, *SHAPE)).astype("<u2")
START = make_start(SHAPE, saturation_value=65534, metadata={"n_frames": 40})
CHUNKS = chunks_of(COUNTS)
GB = 10**9


def batch(first, end, run=START.run, make=chunks_of):
    return FrameBatch(run=run, first=first, frames=make(COUNTS[first:end]), timestamp_ns=10**18)


def stop(n=40, run=START.run, exit_status="success"):
    return RunStop(run=run, n_frames=n, exit_status=exit_status)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "spool"


def write(spool, *messages):
    for message in messages:
        spool.write(message)
    spool.flush()


def spooled(directory, *messages, keep_bytes=GB):
    """Spool messages; return the master files, in order."""
    with Spool(directory, keep_bytes=keep_bytes) as spool:
        write(spool, *messages)
    return masters(directory)


def masters(directory):
    return sorted(directory.glob("*/[!.]*_master.h5"))


def read(path, **options):
    with Hdf5Source(path, **options) as source:
        return list(source)


def frames_in(messages):
    """The frames by number, which are what the detector sent."""
    batches = [m for m in messages if isinstance(m, FrameBatch)]
    found = {m.first + i: frame for m in batches for i, frame in enumerate(m.frames)}
    for number, frame in found.items():
        np.testing.assert_array_equal(frame, COUNTS[number])
    return list(found)


def test_a_detector_s_chunks_are_in_the_file_byte_for_byte(directory):
    sent = [batch(0, 25), batch(25, 40)]
    [path] = spooled(directory, START, *sent, stop())
    chunks = [chunk for m in read(path, give="chunks")[1:-1] for chunk in m.frames.chunks]
    assert chunks == [chunk for m in sent for chunk in m.frames.chunks]
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["entry/data/data_000001"], COUNTS)


def test_frames_of_every_kind_come_back(directory):
    kinds = [batch(0, 10), batch(10, 20, make=events_of), batch(20, 30, make=np.copy), batch(30, 40)]
    [path] = spooled(directory, START, *kinds, stop())
    messages = read(path)
    assert frames_in(messages) == list(range(40))
    assert messages[-1] == stop()
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < COUNTS.nbytes / 2, "all are compressed"


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
@pytest.mark.parametrize("saturation_value", [None, 200])
def test_what_the_detector_said_comes_back(directory, dtype, saturation_value):
    said = {
        "n_frames": 10,
        "start_time": "2026-11-22T12:00:00+00:00",
        "incident_energy": 11.0,
        "detector_distance": 5.0,
        "beam_center_x": 12.5,
        "beam_center_y": -3.5,
        "x_pixel_size": 75e-6,
        "y_pixel_size": 75e-6,
        "sample": "silica µ",
        "scan_number": 7,
        "detector": "Eiger2 4M",
    }
    start = replace(START, run="0b7a-4", dtype=dtype, saturation_value=saturation_value, metadata=said)
    frames = batch(0, 10, run=start.run, make=lambda counts: chunks_of(counts.astype(dtype)))
    [path] = spooled(directory, start, frames, stop(10, run=start.run))
    assert read(path)[0] == start
    assert path.parent.name == "0b7a-4"


def test_lost_frames_are_lost_when_they_are_read_and_never_dark(directory):
    [path] = spooled(directory, START, batch(3, 10), batch(14, 20), stop())
    messages = read(path, batch=4)
    assert frames_in(messages) == [*range(3, 10), *range(14, 20)]
    assert all("never written" in m.reason for m in messages if isinstance(m, Rejected))
    assert messages[-1].n_frames == 40
    with h5py.File(path) as file:
        ledger = {name: value[()].tolist() for name, value in file["entry/ledger"].items()}
        assert file["entry/exit_status"].asstr()[()] == "success"
    assert [ledger[name] for name in ("sent", "received", "lost", "spooled")] == [40, 13, 27, 13]
    assert ledger["lost_spans"] == [[0, 3], [10, 14], [20, 40]]


def test_frames_that_come_late_or_twice_are_left_out_as_they_are_of_the_stream(directory):
    other = FrameBatch(run=START.run, first=5, frames=chunks_of(COUNTS[30:40]), timestamp_ns=0)
    [path] = spooled(directory, START, batch(10, 20), other, batch(15, 30), stop(30))
    assert frames_in(read(path)) == list(range(10, 30))


def test_a_run_that_lost_all_its_frames_is_a_file_without_any(directory):
    [path] = spooled(directory, START, stop())
    assert [type(m) for m in read(path)] == [RunStart, Rejected, RunStop]


def test_frames_planned_without_end_that_never_came_are_not_looked_for_one_by_one(directory):
    [path] = spooled(directory, START, batch(0, 10), stop(2 * 10**9, exit_status="abort"))
    assert read(path)[-1].n_frames == 10
    with h5py.File(path) as file:
        assert file["entry/ledger/sent"][()] == 2 * 10**9


def test_whoever_comes_while_a_run_goes_on_reads_it_as_far_as_it_is(directory):
    with Spool(directory, keep_bytes=GB) as spool:
        for end in (10, 20, 30):
            write(spool, *([START] if end == 10 else []), batch(end - 10, end))
            [path] = masters(directory)
            messages = read(path)
            assert frames_in(messages) == list(range(end))
            assert messages[-1] == stop(end, exit_status="abort"), "nobody knows yet how it will end"
            name = f"/entry/data/data_{end // 10:06d}"
            growing = GrowingFrames.begin(path, name, Facts(run=START.run), frame_time=None, give="frames")
            [(_, part)] = growing.read(path, name, 0, 100, 64)
            np.testing.assert_array_equal(part, COUNTS[end - 10 : end])
        write(spool, stop(30))
    assert read(path)[-1] == stop(30)


@pytest.mark.parametrize("exit_status", ["abort", "fail"])
def test_a_run_that_did_not_end_well_is_not_read_as_one_that_did(directory, exit_status):
    [path] = spooled(directory, START, batch(0, 40), stop(exit_status=exit_status))
    messages = read(path)
    assert frames_in(messages) == list(range(40))
    assert messages[-1].exit_status == "abort"
    with h5py.File(path) as file:
        assert file["entry/exit_status"].asstr()[()] == exit_status


@pytest.mark.parametrize("run", ["../../etc/passwd", "", ".", "a/b", "x\0y", "ü" * 200, "1_master.h5"])
def test_whatever_a_run_is_called_it_stays_in_the_spool(directory, run):
    [path] = spooled(directory, replace(START, run=run), batch(0, 10, run=run), stop(10, run=run))
    assert path.parent.parent == directory
    assert frames_in(read(path)) == list(range(10))


def test_a_name_that_comes_again_is_another_run(directory):
    again = [START, batch(0, 10), stop(10)]
    first, second = spooled(directory, *again, START, batch(0, 20), stop(20))
    assert [read(path)[-1].n_frames for path in (first, second)] == [10, 20]


def test_only_frames_of_the_run_and_of_its_kind_are_taken(directory, caplog):
    alien = FrameBatch(run=START.run, first=20, frames=chunks_of(COUNTS[:5, :9]), timestamp_ns=0)
    cut = FrameBatch(run=START.run, first=25, frames=replace(chunks_of(COUNTS[:5]), skip=8), timestamp_ns=0)
    with Spool(directory, keep_bytes=GB) as spool:
        write(spool, batch(0, 3, run="earlier"), START, batch(0, 10), alien, cut, batch(30, 40), stop())
        assert spool.lost == 13
    [path] = masters(directory)
    assert frames_in(read(path)) == [*range(10), *range(30, 40)]
    assert "run earlier streams on without this fallback: the start of the run was not seen" in caplog.text
    assert "frames are ((9, 131), '<u2'), not ((67, 131), '<u2') as was told" in caplog.text


def test_a_disk_that_does_not_answer_holds_up_nobody_and_its_loss_is_told(directory, caplog):
    with Spool(directory, keep_bytes=GB, queue_bytes=5 * len(CHUNKS.chunks[0])) as spool:
        write(spool, START, batch(0, 2))
        with h5py._objects.phil:  # whoever writes by HDF5 waits
            begin = time.monotonic()
            for i in range(2, 30):
                spool.write(batch(i, i + 1, make=lambda counts, i=i: CHUNKS[i : i + 1]))
            assert time.monotonic() - begin < 10
            lost = spool.lost
            assert 20 < lost < 28
        spool.flush()
        write(spool, batch(30, 32), stop())
        assert spool.lost == lost
    [path] = masters(directory)
    assert len(frames_in(read(path))) == 32 - lost
    assert caplog.text.count("streams on without this fallback") == 1
    assert f"goes on; {lost} frames are not in it" in caplog.text
    with h5py.File(path) as file:
        assert file["entry/ledger/received"][()] - file["entry/ledger/spooled"][()] == lost


@contextmanager
def no_file_above(n_bytes):
    """The system refuses to write more to a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_costs_its_part_and_nothing_else(directory, caplog):
    with Spool(directory, keep_bytes=GB) as spool:
        write(spool, START, batch(0, 10))
        with no_file_above(25_000):
            spool.write(batch(10, 15))  # there is room for these in the part, and none for the next
            write(spool, batch(15, 25))
        assert spool.lost == 15
        write(spool, batch(25, 40), stop())
    [path] = masters(directory)
    assert frames_in(read(path)) == [*range(10), *range(25, 40)]
    assert "run run-1 streams on without this fallback: [Errno 27] File too large" in caplog.text
    assert not [*directory.glob("*/.*")]


def test_wherever_in_a_file_a_write_fails_every_frame_is_in_it_or_counted(directory, caplog):
    lost = set()
    for limit in range(0, 60_000, 1500):
        with Spool(directory / str(limit), keep_bytes=GB) as spool:
            write(spool, START, batch(0, 10))
            with no_file_above(limit):
                write(spool, batch(10, 20))
            write(spool, batch(20, 30))
            with no_file_above(limit):
                write(spool, stop())
            lost.add(spool.lost)
            [path] = masters(directory / str(limit))
            assert frames_in(read(path)) == [i for i in range(30) if not (10 <= i < 20 and spool.lost)]
        assert not [*directory.glob("*/*/.*_data_*")]
    assert lost == {0, 10}
    told = [record.message for record in caplog.records if "without this fallback" in record.message]
    assert all(text.endswith("[Errno 27] File too large") for text in told)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_a_hole_and_the_run_goes_on_once_there_is_room(small_disk, caplog):
    other = small_disk / "other"
    with Spool(small_disk / "spool", keep_bytes=GB) as spool:
        write(spool, START, batch(0, 10))
        other.write_bytes(bytes(8 * 2**20))
        write(spool, batch(10, 20))
        assert spool.lost == 10
        other.unlink()
        write(spool, batch(20, 40), stop())
        assert spool.lost == 10
    [path] = masters(small_disk / "spool")
    assert frames_in(read(path)) == [*range(10), *range(20, 40)]
    assert "no room, and no run in it is proven safe" in caplog.text


def fill(disk, leave):
    """Leave so many bytes free."""
    free = shutil.disk_usage(disk).free
    (disk / "filling").write_bytes(bytes(free - leave))


def test_a_part_that_can_be_seen_is_whole_however_little_room_there_was_for_its_end(small_disk):
    """Where its frames are is written at its end."""
    chunks = chunks_of(COUNTS[:1, :8, :8]).chunks * 30_000
    seen = set()
    for pages in range(0, 60, 12):
        run = SpooledRun(small_disk, replace(START, run=f"with-{pages}", shape=(8, 8)))
        run.write(0, chunks)
        fill(small_disk, leave=4096 * pages)
        try:
            run.settle()
        except OSError:
            run.discard()
        (small_disk / "filling").unlink()
        is_there = (run.path / f"with-{pages}_data_000001.h5").exists()
        seen.add(is_there)
        if is_there:
            messages = read(run.path / f"with-{pages}_master.h5", batch=30_000)
            assert [len(m.frames) for m in messages if isinstance(m, FrameBatch)] == [30_000]
    assert seen == {False, True}


def run_of(name, n=40):
    return replace(START, run=name), batch(0, n, run=name), stop(n, run=name)


def test_the_oldest_run_that_is_safe_makes_room_and_one_that_is_not_never_does(directory, caplog):
    one = sum(map(len, CHUNKS.chunks))
    with Spool(directory, keep_bytes=4 * one) as spool:  # with what HDF5 adds, room for three
        for i, name in enumerate("abc"):
            write(spool, *run_of(name))
            os.utime(directory / name / f"{name}_master.h5", (i, i))
        (directory / "b" / "safe").touch()
        (directory / "c" / "safe").touch()
        write(spool, *run_of("d"))
        assert [path.stem for path in masters(directory)] == ["a_master", "c_master", "d_master"]
        assert not (directory / "b").exists()
        write(spool, *run_of("e"))
        assert spool.lost == 0
        write(spool, *run_of("f"))
        assert spool.lost == 40
    assert [len(frames_in(read(path))) for path in masters(directory)] == [40, 40, 40, 0]
    assert "run f streams on without this fallback: no room, and no run in it is proven safe" in caplog.text


def test_a_full_spool_is_not_looked_through_for_every_frame(directory):
    for run in ("a", "b"):
        (directory / run).mkdir(parents=True)
        for number in range(500):
            (directory / run / f"{run}_data_{number:06d}.h5").write_bytes(bytes(10))
    room = Room(directory, 10_000)
    begin = time.thread_time()  # others run meanwhile
    room.count()
    once = time.thread_time() - begin
    assert not any(room.make(1, None) for _ in range(50))
    assert time.thread_time() - begin < 20 * once


def test_a_run_that_goes_on_is_not_removed_whatever_is_said_of_it(directory):
    with Spool(directory, keep_bytes=sum(map(len, CHUNKS.chunks))) as spool:
        write(spool, START, batch(0, 20))
        (directory / START.run / "safe").touch()
        write(spool, batch(20, 40), stop())
        assert spool.lost == 20
    assert frames_in(read(masters(directory)[0])) == list(range(20))


def test_what_others_put_into_the_spool_is_left_alone(directory):
    spooled(directory, *run_of("a"))
    (directory / "a" / "safe").touch()
    (directory / "a" / "notes.txt").write_text("mine")
    (directory / "mine").mkdir()
    for name in ("safe", "thesis.h5"):
        (directory / "mine" / name).touch()
    spooled(directory, *run_of("b"), keep_bytes=1)
    assert (directory / "a" / "notes.txt").read_text() == "mine"
    assert (directory / "mine" / "thesis.h5").exists()


def test_what_a_killed_process_left_and_nobody_can_read_takes_no_room(directory):
    spooled(directory, *run_of("a"))
    unfinished, other = directory / "a/.a_data_000002.h5", directory / "a/.hidden"
    for path in (unfinished, other):
        path.touch()
    spooled(directory)
    assert not unfinished.exists()
    assert other.exists()


def test_a_directory_is_the_spool_of_one_process(directory):
    with Spool(directory, keep_bytes=GB), pytest.raises(SinkError, match=r"spool .*: another process spools there"):
        Spool(directory, keep_bytes=GB)
    spooled(directory, *run_of("a"))


def test_a_spool_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match=r"spool .*file/spool: Not a directory"):
        Spool(tmp_path / "file/spool", keep_bytes=GB)


@pytest.fixture
def plane(tmp_path, qmap):
    with ExitStack() as stack:
        yield Plane(f"zmq://{free()}/beamline", stack, tmp_path, qmap)


def gateway(plane, *options):
    address = f"zmq+dectris://{free()}"
    return address, plane.gateway(address, "--spool", "spool", "--keep", 1, *options)


def result_of_spool(folder, qmap):
    [master] = masters(folder / "spool")
    out = folder / "of_spool.h5"
    said = xpcs_stream("run", "--source", master, "--qmap", qmap, "--out", out, "--quiet")
    assert said.exit_code == 0, said.output
    return contents(out)


def without(result, *names):
    return {name: value for name, value in result.items() if not name.startswith(names)}


def test_the_result_of_the_spooled_run_is_that_of_the_stream_bit_for_bit(plane, frames, tmp_path, qmap):
    address, process = gateway(plane)
    until_said(process, "taking frames")
    plane.worker()
    merger = plane.merger()
    finished(plane.start("replay", frames, "--to", address, "--rate", "1 kHz"))
    streamed = plane.result(merger)
    spool = result_of_spool(tmp_path, qmap)
    assert streamed["xpcs/ledger/received"] == N_FRAMES
    assert_identical(without(spool, "xpcs/metadata"), without(streamed, "xpcs/metadata"))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=DEADLINE)
    assert "0 frames are not in the spool" in said


def test_when_the_disk_is_full_streaming_goes_on_and_the_gateway_ends_well(plane, frames, tmp_path, qmap):
    address, process = gateway(plane)
    until_said(process, "taking frames")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    plane.worker()
    merger = plane.merger()
    finished(plane.start("replay", frames, "--to", address, "--rate", "1 kHz"))
    assert plane.result(merger)["xpcs/ledger/received"] == N_FRAMES
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert "run scan-7 streams on without this fallback: [Errno 27] File too large" in said
    assert f"{N_FRAMES:,} frames are not in the spool" in said


def test_when_the_gateway_is_killed_the_run_is_readable_as_far_as_it_was_completed(plane, frames, tmp_path, qmap):
    address, process = gateway(plane)
    until_said(process, "taking frames")
    sender = plane.start("replay", frames, "--to", address, "--rate", "400 Hz")
    deadline = time.monotonic() + DEADLINE
    while not (tmp_path / "spool/scan-7/scan-7_data_000001.h5").exists():
        assert time.monotonic() < deadline
        assert sender.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait(DEADLINE)
    found = result_of_spool(tmp_path, qmap)
    n = int(found["xpcs/n_frames"])
    assert 400 < n < N_FRAMES
    assert found["xpcs/exit_status"] == b"abort"
    expected = result_of_frames(tmp_path, qmap, range(n))
    told = ("xpcs/metadata", "xpcs/exit_status", "entry/instrument")  # the stream tells more than the file of frames
    assert_identical(without(found, *told), without(expected, *told))


def test_a_file_is_its_own_spool(frames, tmp_path):
    plane = ("--to", "zmq://127.0.0.1:5555/x", "--regions", REGIONS)
    said = xpcs_stream("gateway", "--source", frames, *plane, "--spool", tmp_path / "spool")
    assert said.exit_code == 2
    assert "own spool" in said.output
    said = xpcs_stream("gateway", "--source", "zmq+dectris://127.0.0.1:1", *plane, "--spool-keep", 3)
    assert said.exit_code == 2
    assert "--spool-keep is for --spool" in said.output
