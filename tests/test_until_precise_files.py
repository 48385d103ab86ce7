"""Until precise with a detector of ophyd-async: its files are followed by `xpcs-stream run`, by way of documents."""

import os
import signal
import threading
import time

import h5py
import msgpack
import pytest
from bluesky.callbacks.zmq import Publisher
from bluesky.utils import RunEngineInterrupted
from ophyd_async.core import TriggerInfo, init_devices

from stream import bluesky_precision
from stream.bluesky import Goal, Live, fly_until_precise
from stream.ingest.zmq import ZmqResults
from stream.messages import Result
from stream.operators.qmap import ring_map
from stream.operators.roimap_file import write
from tests.kafka import free_ports
from tests.ophyd_detector import DATASET, FRAME_TIME, RATE, SpeckleDetector
from tests.run_engine import connected, engine
from tests.test_command_line import started
from tests.test_ingest_bluesky import proxy

__all__ = ["engine"]

pytestmark = pytest.mark.timeout(300)

DEADLINE = 90
NEVER = 1e-6


@pytest.fixture(scope="module")
def roimap():
    return ring_map(
        shape=(48, 48),
        beam_center_x=-20,
        beam_center_y=-20,
        detector_distance=5,
        pixel_size=75e-6,
        incident_energy=11,
        n_static=40,
        n_dynamic=4,
    )


@pytest.fixture(scope="module")
def folder(roimap, tmp_path_factory):
    folder = tmp_path_factory.mktemp("beamline")
    write(folder / "qmap.h5", roimap)
    return folder


@pytest.fixture(scope="module")
def beamline(folder):
    """Where documents go, and where live results are."""
    results = f"127.0.0.1:{free_ports(1)[0]}"
    options = ("--qmap", "qmap.h5", "--out", "{run}.result.h5", "--publish", f"zmq://{results}", "--quiet")
    with proxy() as (into, out):
        address = out.replace("tcp", "zmq+bluesky")
        source = ("--source", address, "--root", f"{folder}={folder}", "--publish-every", "0.1 s")
        with started("run", *source, *options, cwd=folder) as process:
            publisher = Publisher(into, serializer=msgpack.dumps)
            listener, _ = connected(process, publisher)
            yield publisher, f"tcp://{results}"
            publisher.close()
            process.send_signal(signal.SIGINT)
            process.wait(DEADLINE)
            listener.join()


@pytest.fixture
def documents(engine):
    kept = []
    engine.subscribe(lambda *each: kept.append(each))
    return kept


@pytest.fixture
def detector(engine, folder, roimap):
    with init_devices():
        detector = SpeckleDetector(folder, roimap, name="detector")
    return detector  # noqa: RET504 - it is connected when the context ends


def measure(detector, results, roimap, *, n_frames=100_000, within=DEADLINE, **goal):
    goal = Goal(**{"q": roimap.dynamic_q[1], "relative_error": NEVER} | goal)
    metadata = {"acquire_period": FRAME_TIME, "acquire_time": FRAME_TIME}
    info = TriggerInfo(number_of_events=n_frames)
    return fly_until_precise(detector, results, goal, roimap, within=within, prepare=info, md=metadata)


def one(documents, name):
    (document,) = [document for kind, document in documents if kind == name]
    return document


def n_told(documents):
    """Frames that the documents tell of, each once."""
    ranges = [document["indices"] for name, document in documents if name == "stream_datum"]
    assert [each["start"] for each in ranges] == [0, *(each["stop"] for each in ranges[:-1])]
    return ranges[-1]["stop"]


def assert_at_rest(detector, documents):
    """Nothing is taken any more, and documents tell of all that was written."""
    assert (detector.task, detector.file) == (None, None)
    with h5py.File(detector.path) as file:
        assert len(file[DATASET]) == n_told(documents)
    assert one(documents, "stop")["num_events"] == {"primary": n_told(documents)}


def received(path):
    """How many frames a result file has of those that were sent, once it is there."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)
    with h5py.File(path) as file:
        return file["xpcs/ledger/received"][()], file["xpcs/ledger/sent"][()]


def test_a_run_ends_once_its_rate_is_known_and_its_result_has_all_frames(
    engine, documents, detector, beamline, roimap, folder
):
    publisher, results = beamline
    engine.subscribe(publisher)
    engine(measure(detector, results, roimap, relative_error=0.1))
    stop = one(documents, "stop")
    assert (stop["exit_status"], stop["reason"].split(":")[0]) == ("success", "precise")
    assert abs(float(stop["reason"].split(" is ")[1].split(" ±")[0]) / RATE - 1) < 4 * 0.1
    assert_at_rest(detector, documents)
    n = n_told(documents)
    assert received(folder / f"{stop['run_start']}.result.h5") == (n, n)


def test_a_detector_that_is_done_before_anything_is_known_ends_the_run(engine, documents, detector, beamline, roimap):
    publisher, results = beamline
    engine.subscribe(publisher)
    engine(measure(detector, results, roimap, n_frames=300, within=5.0))
    stop = one(documents, "stop")
    assert stop["exit_status"] == "success"
    assert stop["reason"].startswith("detector done: no more frames")
    assert "after 300 frames" in stop["reason"]
    assert_at_rest(detector, documents)


def pausing(engine, plan, after=0.5):
    """Run a plan until it is paused, some time after the first frames were told of."""
    timer = threading.Timer(after, engine.request_pause)
    token = engine.subscribe(lambda *_: timer.start(), "stream_resource")
    with pytest.raises(RunEngineInterrupted):
        engine(plan)
    engine.unsubscribe(token)
    timer.join()


def test_a_pause_is_no_silence_and_no_frame_is_told_of_twice(
    engine, documents, detector, beamline, roimap, folder, monkeypatch
):
    monkeypatch.setattr(bluesky_precision, "EVERY", 0.1)
    publisher, results = beamline
    engine.subscribe(publisher)
    pausing(engine, measure(detector, results, roimap, max_dose=3.0, within=3.0))
    threading.Event().wait(5.0)  # longer than results may be silent
    engine.resume()
    stop = one(documents, "stop")
    assert (stop["exit_status"], stop["reason"].split(":")[0]) == ("success", "dose spent")
    assert_at_rest(detector, documents)
    n = n_told(documents)
    assert n >= 3000
    assert received(folder / f"{stop['run_start']}.result.h5") == (n, n)


def test_a_plan_that_is_aborted_leaves_a_detector_at_rest_and_a_result(
    engine, documents, detector, beamline, roimap, folder
):
    publisher, results = beamline
    engine.subscribe(publisher)
    pausing(engine, measure(detector, results, roimap))
    engine.abort("beam lost")
    stop = one(documents, "stop")
    assert (stop["exit_status"], stop["reason"]) == ("abort", "beam lost")
    assert_at_rest(detector, documents)
    n = n_told(documents)
    assert received(folder / f"{stop['run_start']}.result.h5") == (n, n)
    # And the next one is as if nothing had been.
    documents.clear()
    engine(measure(detector, results, roimap, max_dose=0.3))
    assert one(documents, "stop")["reason"].startswith("dose spent")


def kill_amid_results(process, address):
    n, deadline = 0, time.monotonic() + DEADLINE
    with ZmqResults(address) as results:
        for message in results:
            n += isinstance(message, Result) and message.operator == "ledger"
            if n == 5 or time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
                return


def test_a_correlator_that_dies_ends_the_run_in_time_and_the_plan_says_so(
    engine, documents, detector, roimap, folder, tmp_path, caplog
):
    results = f"127.0.0.1:{free_ports(1)[0]}"
    options = {"roots": {str(folder): folder}, "publish": f"zmq://{results}", "publish_every": 0.1, "threads": 1}
    with Live(folder / "qmap.h5", tmp_path / "{run}.h5", **options) as live:
        engine.subscribe(live)
        killer = threading.Thread(target=kill_amid_results, args=(live._process.pid, f"tcp://{results}"))
        killer.start()
        began = time.monotonic()
        engine(measure(detector, f"tcp://{results}", roimap, within=6.0))
        assert time.monotonic() - began < DEADLINE
        killer.join()
    stop = one(documents, "stop")
    assert stop["exit_status"] == "fail"
    assert stop["reason"].startswith(f"no results: none for 6 s from tcp://{results}; before: go on: rate at q")
    assert_at_rest(detector, documents)
    assert "the process that correlates is gone (-9); the plan goes on" in caplog.text
    assert f"stop of run {stop['run_start']} is not handed over" in caplog.text


def test_a_plan_whose_detector_is_not_prepared_fails_at_once(engine, documents, detector, beamline, roimap):
    goal = Goal(q=roimap.dynamic_q[1], relative_error=NEVER)
    with pytest.raises(RuntimeError, match="Prepare not run"):
        engine(fly_until_precise(detector, beamline[1], goal, roimap))
    assert one(documents, "stop")["exit_status"] == "fail"
