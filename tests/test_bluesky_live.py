"""A run engine is given result files by a process beside it, which never holds it up."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from bluesky import RunEngine
from bluesky import plan_stubs as bps
from bluesky import plans as bp
from bluesky.preprocessors import set_run_key_wrapper
from ophyd_async.core import AsyncStatus, StandardReadable, StaticPathProvider, UUIDFilenameProvider, init_devices
from ophyd_async.sim import SimBlobDetector

from stream import bluesky
from stream.bluesky import Live
from stream.errors import ConfigError
from stream.messages import FrameBatch, RunStop
from stream.sinks.dectris import DectrisSink
from tests.conftest import make_start
from tests.test_bluesky_runs import documents

pytestmark = pytest.mark.timeout(400)

DEADLINE = 120
GEOMETRY = (
    *("--shape", "40x50", "--beam-center-x", "-20", "--beam-center-y", "-30", "--detector-distance", "5 m"),
    *("--pixel-size", "75 um", "--incident-energy", "11 keV", "--n-dynamic", "3", "--n-static", "12"),
)


def xpcs_stream(*arguments):
    subprocess.run([sys.executable, "-m", "stream", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def qmap(tmp_path_factory):
    path = tmp_path_factory.mktemp("qmap") / "qmap.h5"
    xpcs_stream("qmap", *GEOMETRY, "--out", path)
    return path


@pytest.fixture
def frames(tmp_path):
    """What a detector wrote of run a, by its documents."""
    counts = np.random.default_rng(1).poisson(3.0, (200, 40, 50)).astype("u2")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("entry/data/data", data=counts, chunks=(1, 40, 50))
        file["entry/det"] = file["entry/data/data"]
    return tmp_path / "a.h5"


def live(qmap, tmp_path, **options):
    return Live(qmap, tmp_path / "{run}.result.h5", roots={"/data": tmp_path}, threads=1, **options)


def test_a_result_file_is_that_of_xpcs_stream_run_bit_for_bit(qmap, frames, tmp_path):
    with live(qmap, tmp_path) as callback:
        for each in documents("a", 200):
            callback(*each)
    theirs = tmp_path / "theirs.h5"
    xpcs_stream("run", "--source", frames, "--qmap", qmap, "--out", theirs, "--frame-time", "2 ms", "--quiet")
    with h5py.File(tmp_path / "a.result.h5") as file, h5py.File(theirs) as other:
        assert file["entry/entry_identifier"][()] == b"a"
        compared = []

        def compare(name, dataset):
            # When frames came is not what was in them.
            if name != "ledger/lag" and isinstance(dataset, h5py.Dataset) and dataset.dtype.kind in "fiu":
                np.testing.assert_array_equal(dataset[()], other["xpcs"][name][()], strict=True, err_msg=name)
                compared.append(name)

        file["xpcs"].visititems(compare)
    assert {"multitau/normalized_g2", "temporal_mean/scattering_2d", "n_frames"} <= {*compared}


def test_what_is_wrong_is_said_before_anything_is_subscribed(qmap, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'absent.h5'}: no such file")):
        live(tmp_path / "absent.h5", tmp_path)
    with pytest.raises(ConfigError, match="no directory"):
        Live(qmap, tmp_path / "r.h5")


def test_a_plan_goes_on_when_the_process_is_gone_and_a_lost_stop_is_an_error(qmap, tmp_path, caplog):
    with live(qmap, tmp_path) as callback:
        os.kill(callback._process.pid, signal.SIGKILL)
        callback._process.wait(DEADLINE)
        deadline = time.monotonic() + DEADLINE
        while "stop of run b is not handed over" not in caplog.text:
            begin = time.monotonic()
            for each in documents("b"):
                callback(*each)
            assert time.monotonic() - begin < 20
            assert time.monotonic() < deadline
    assert "the process that correlates is gone (-9); the plan goes on" in caplog.text


def test_a_plan_goes_on_when_the_process_is_slow_and_what_is_dropped_is_said(
    qmap, frames, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(bluesky, "MAX_QUEUED", 10)
    with live(qmap, tmp_path) as callback:
        os.kill(callback._process.pid, signal.SIGSTOP)
        slow = [each for i in range(10) for each in documents(f"slow-{i}", 500)]
        for i in range(10):
            (tmp_path / f"slow-{i}.h5").hardlink_to(frames)
        for each in slow:
            callback(*each)
        os.kill(callback._process.pid, signal.SIGCONT)
        assert "stream_datum is not handed over" in caplog.text
        # There is room for stops: none is lost.
        assert "stop of run" not in caplog.text


def test_a_document_that_nobody_can_send_is_said_and_passed_over(qmap, frames, tmp_path, caplog):
    with live(qmap, tmp_path) as callback:
        callback("event", {"data": object()})
        for each in documents("a", 200):
            callback(*each)
    assert "event is not handed over" in caplog.text
    assert (tmp_path / "a.result.h5").exists()


class Eiger(StandardReadable):
    """Sends the frames of a run when it is triggered, and says that all went well."""

    def __init__(self, stream, name=""):
        self.stream = stream
        super().__init__(name=name)

    @AsyncStatus.wrap
    async def trigger(self):
        start = make_start(shape=(40, 50), metadata={"n_frames": 200})
        counts = np.random.default_rng(1).poisson(3.0, (200, 40, 50)).astype("<u2")
        sent = [
            start,
            *(FrameBatch(run=start.run, first=i, frames=counts[i : i + 10], timestamp_ns=0) for i in range(0, 200, 10)),
            RunStop(run=start.run, n_frames=200, exit_status="success"),
        ]
        for message in sent:
            await asyncio.to_thread(self.stream.write, message)


@pytest.fixture
def engine():
    engine = RunEngine({}, context_managers=[])
    yield engine
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join(DEADLINE)
    engine.loop.close()


@pytest.fixture
def eiger(engine):
    with DectrisSink("tcp://127.0.0.1:*", timeout=DEADLINE) as stream:
        with init_devices():
            eiger = Eiger(stream, name="eiger")
        yield eiger


@pytest.fixture
def beside(qmap, tmp_path, eiger, engine):
    """A callback that receives what the detector streams."""
    address = eiger.stream.address.replace("tcp", "zmq+dectris")
    with Live(qmap, tmp_path / "{run}.nxs", detector=address, threads=1) as callback:
        engine.subscribe(callback)
        yield callback


def test_frames_that_a_detector_streams_are_those_of_the_run_that_armed_it(engine, eiger, beside, tmp_path):
    uids = [*engine(bp.count([eiger], md={"sample": "silica"})), *engine(bp.count([eiger], md={"sample": "gold"}))]
    # Whatever is under way is waited for.
    beside.close()
    for uid, sample in zip(uids, (b"silica", b"gold"), strict=True):
        with h5py.File(tmp_path / f"{uid}.nxs") as file:
            assert file["entry/entry_identifier"].asstr()[()] == uid
            assert file["entry/sample/name"][()] == sample
            assert file["xpcs/ledger/received"][()] == 200
            assert file["xpcs/ledger/lost"][()] == 0


def test_a_plan_around_others_is_not_taken_for_the_run_of_the_detector(engine, eiger, beside, tmp_path):
    def adaptive():
        yield from bps.open_run(md={"plan_name": "optimize"})
        yield from set_run_key_wrapper(bp.count([eiger]), "first")
        yield from set_run_key_wrapper(bp.count([eiger]), "second")
        yield from bps.close_run()

    _, *inner = engine(set_run_key_wrapper(adaptive(), "around"))
    beside.close()
    assert {path.stem for path in tmp_path.glob("*.nxs")} == {*inner}


def test_a_plan_that_fails_after_the_detector_was_done_is_told_in_its_result(engine, eiger, beside, tmp_path):
    def failing():
        yield from bps.open_run(md={"detectors": ["eiger"]})
        yield from bps.trigger(eiger, wait=True)
        raise ZeroDivisionError

    uids = []
    engine.subscribe(lambda _, start: uids.append(start["uid"]), "start")
    with pytest.raises(ZeroDivisionError):
        engine(failing())
    beside.close()
    with h5py.File(tmp_path / f"{uids[0]}.nxs") as file:
        assert file["xpcs/exit_status"].asstr()[()] == "fail"
        assert file["xpcs/ledger/received"][()] == 200


PIXELS = ("--shape", "240x320", *GEOMETRY[2:])


def test_a_run_engine_is_given_the_result_of_its_run(engine, tmp_path):
    with init_devices():
        detector = SimBlobDetector(StaticPathProvider(UUIDFilenameProvider(), tmp_path))
    xpcs_stream("qmap", *PIXELS, "--out", tmp_path / "qmap.h5")

    def plan():
        yield from bps.stage(detector)
        yield from bps.open_run(md={"acquire_period": 0.1, "sample": "silica"})
        for i in range(20):
            detector.pattern_generator.set_x(float(i))
            yield from bps.trigger_and_read([detector])
        yield from bps.close_run()
        yield from bps.unstage(detector)

    with Live(tmp_path / "qmap.h5", tmp_path / "{run}.nxs", roots={str(tmp_path): tmp_path}, threads=1) as callback:
        (uid,) = engine(plan(), callback)
    with h5py.File(tmp_path / f"{uid}.nxs") as file:
        assert file["entry/sample/name"][()] == b"silica"
        assert file["xpcs/n_frames"][()] == 20
        assert file["xpcs/ledger/lost"][()] == 0
