"""A run engine measures until a verdict on live results, and the run's stop document says why it ended."""

import signal
import subprocess
import sys
import threading
from concurrent.futures import Future

import bluesky.plan_stubs as bps
import h5py
import numpy as np
import pytest
from bluesky import RunEngine
from bluesky.utils import FailedStatus, RunEngineInterrupted

from stream.bluesky_precision import fly_until_precise, until_precise
from stream.errors import ConfigError
from stream.operators.qmap import ring_map
from stream.operators.roimap_file import write
from stream.precision import Goal
from tests.kafka import free_ports

DEADLINE = 60
COUNT_TIME = 1e-3
SHAPE = (48, 48)
RATE = 100.0
NEVER = 1e-6


@pytest.fixture(scope="module")
def roimap():
    return ring_map(
        shape=SHAPE,
        beam_center_x=-20,
        beam_center_y=-20,
        detector_distance=5,
        pixel_size=75e-6,
        incident_energy=11,
        n_static=40,
        n_dynamic=4,
    )


@pytest.fixture(scope="module")
def qmap(roimap, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "qmap.h5"
    write(path, roimap)
    return path


def free_address():
    [port] = free_ports(1)
    return f"127.0.0.1:{port}"


def started(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "stream", *arguments], **options)


def ended(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(DEADLINE)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def beamline(qmap):
    """Address of a detector that is not there yet, and of the live results of what it will send."""
    detector, results = free_address(), free_address()
    options = ("--qmap", str(qmap), "--publish", f"zmq://{results}", "--publish-every", "0.1 s", "--quiet")
    correlating = started("run", "--source", f"zmq+dectris://{detector}", *options, stderr=subprocess.PIPE, text=True)
    with correlating.stderr as said:
        # Kernels may have to be compiled first.
        assert any("taking frames" in line for line in said), "it ended at once"
        yield detector, f"tcp://{results}"
        ended(correlating)


class Done:
    """A Bluesky Status."""

    def __init__(self, future):
        self.future = future
        self.exception = future.exception

    def add_callback(self, callback):
        self.future.add_done_callback(lambda _: callback(self))

    done = property(lambda self: self.future.done())
    success = property(lambda self: self.done and self.exception() is None)


class Detector:
    """A flyer: a process that sends frames."""

    name = "detector"
    parent = None

    def __init__(self, *arguments):
        self.arguments = arguments
        self.process = None
        self.kicked_off = 0

    def kickoff(self):
        self.kicked_off += 1
        self.process = started(*self.arguments)
        future = Future()
        future.set_result(None)
        return Done(future)

    def stop(self, success=True):
        self.process.send_signal(signal.SIGINT)

    def complete(self):
        future = Future()
        threading.Thread(target=lambda: future.set_result(self.process.wait(DEADLINE))).start()
        return Done(future)


class StagedDetector:
    """One without `stop`, as ophyd-async makes them."""

    name, parent = Detector.name, Detector.parent

    def __init__(self, *arguments):
        self.inside = Detector(*arguments)

    def stage(self):
        return [self]

    def kickoff(self):
        return self.inside.kickoff()

    def complete(self):
        return self.inside.complete()

    def unstage(self):
        if self.inside.process is not None and self.inside.process.poll() is None:
            ended(self.inside.process)
        return [self]


@pytest.fixture
def simulate(beamline, qmap, roimap):
    q = roimap.dynamic_q[1]
    detectors = []

    def make(frames=1_000_000, kind=Detector, seed=0):
        options = {"--frames": frames, "--rate": f"{1 / COUNT_TIME} Hz", "--mean-counts": 1, "--contrast": 0.5}
        options |= {
            "--seed": seed,
            "--diffusion": f"{RATE / q**2} angstrom^2/s",
            "--to": f"zmq+dectris://{beamline[0]}",
        }
        texts = [str(text) for option in options.items() for text in option]
        detectors.append(kind("simulate", "--qmap", str(qmap), *texts))
        return detectors[-1]

    yield make
    for detector in detectors:
        process = getattr(detector, "inside", detector).process
        if process is not None and process.poll() is None:
            ended(process)


@pytest.fixture
def engine():
    """A run engine, and the documents it emits."""
    engine = RunEngine(context_managers=[])
    documents = []
    engine.subscribe(lambda name, document: documents.append((name, document)))
    return engine, documents


def goal(roimap, **changes):
    return Goal(**{"q": roimap.dynamic_q[1], "relative_error": NEVER} | changes)


def stop_of(documents):
    (stop,) = [document for name, document in documents if name == "stop"]
    return stop


def test_a_run_ends_once_its_rate_is_known_as_well_as_wanted(engine, beamline, simulate, roimap):
    run, documents = engine
    detector = simulate()
    run(fly_until_precise(detector, beamline[1], goal(roimap, relative_error=0.05), roimap, within=DEADLINE))
    stop = stop_of(documents)
    assert stop["exit_status"] == "success"
    assert stop["reason"].startswith("precise: rate at q")
    assert "of 5.00% wanted" in stop["reason"]
    assert abs(float(stop["reason"].split(" is ")[1].split(" ±")[0]) / RATE - 1) < 4 * 0.05
    assert detector.process.wait(DEADLINE) is not None


def test_a_run_ends_once_its_dose_is_spent(engine, beamline, simulate, roimap):
    run, documents = engine
    wanted = goal(roimap, max_dose=0.25, transmission=0.5)
    run(fly_until_precise(simulate(), beamline[1], wanted, roimap, within=DEADLINE))
    assert stop_of(documents)["reason"].startswith("dose spent: rate at q")
    n_frames = int(stop_of(documents)["reason"].split("after ")[1].split(" frames")[0])
    assert 0.25 / 0.5 / COUNT_TIME <= n_frames < 10_000


def test_a_run_ends_once_its_sample_is_damaged(engine, beamline, roimap, tmp_path):
    n = 4000
    dying = np.linspace(0, 0.5, n)[:, None, None] * (roimap.dynamic_roi_map == 1)
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["entry/data/data"] = np.random.default_rng(3).poisson(2 * (1 - dying)).astype(np.uint16)
    to = f"zmq+dectris://{beamline[0]}"
    detector = Detector("replay", str(tmp_path / "frames.h5"), "--to", to, "--rate", "1 kHz")
    run, documents = engine
    try:
        run(fly_until_precise(detector, beamline[1], goal(roimap, max_damage=0.02), roimap, within=DEADLINE))
    finally:
        if detector.process.poll() is None:
            ended(detector.process)
    assert stop_of(documents)["reason"].startswith("radiation damage: scattering changed by -")
    assert "2.00% allowed" in stop_of(documents)["reason"]


def test_a_run_ends_when_its_detector_is_done(engine, beamline, simulate, roimap):
    run, documents = engine
    run(fly_until_precise(simulate(frames=700), beamline[1], goal(roimap), roimap, within=DEADLINE))
    assert stop_of(documents)["reason"].startswith("detector done: rate at q")
    assert "after 700 frames" in stop_of(documents)["reason"]


def test_a_detector_without_stop_is_unstaged(engine, beamline, simulate, roimap):
    run, documents = engine
    detector = simulate(kind=StagedDetector)
    run(fly_until_precise(detector, beamline[1], goal(roimap, max_dose=0.3), roimap, within=DEADLINE))
    assert stop_of(documents)["reason"].startswith("dose spent")
    assert detector.inside.process.wait(DEADLINE) is not None


def test_a_plan_that_is_paused_goes_on_with_the_same_run_of_the_detector(engine, beamline, simulate, roimap):
    run, documents = engine
    detector = simulate()
    run.subscribe(lambda *_: threading.Timer(0.5, run.request_pause).start(), "start")
    wanted = goal(roimap, max_dose=2.0)
    with pytest.raises(RunEngineInterrupted):
        run(fly_until_precise(detector, beamline[1], wanted, roimap, within=DEADLINE))
    run.resume()
    assert stop_of(documents)["reason"].startswith("dose spent")
    assert detector.kicked_off == 1


def test_a_plan_that_is_aborted_stops_the_detector(engine, beamline, simulate, roimap):
    run, documents = engine
    detector = simulate()
    run.subscribe(lambda *_: threading.Timer(0.5, run.request_pause).start(), "start")
    with pytest.raises(RunEngineInterrupted):
        run(fly_until_precise(detector, beamline[1], goal(roimap), roimap, within=DEADLINE))
    run.abort("beam lost")
    assert (stop_of(documents)["exit_status"], stop_of(documents)["reason"]) == ("abort", "beam lost")
    assert detector.process.wait(DEADLINE) is not None


def test_a_run_without_results_says_so(engine, simulate, roimap):
    run, documents = engine
    nobody = f"tcp://{free_address()}"
    run(fly_until_precise(simulate(), nobody, goal(roimap), roimap, within=0.3))
    assert stop_of(documents)["exit_status"] == "fail"
    assert stop_of(documents)["reason"] == f"no results: none for 0.3 s from {nobody}; before: no run was announced"


def test_an_address_that_cannot_be_used_fails_the_plan(engine, simulate, roimap):
    run, documents = engine
    detector = simulate()
    with pytest.raises(FailedStatus):
        run(fly_until_precise(detector, "tcp://nowhere", goal(roimap), roimap))
    assert stop_of(documents)["exit_status"] == "fail"
    assert "tcp://nowhere" in stop_of(documents)["reason"]
    assert detector.process.wait(DEADLINE) is not None


def test_results_of_another_map_fail_the_plan(engine, beamline, simulate, roimap):
    run, documents = engine
    detector = simulate()
    geometry = {"beam_center_x": -20, "beam_center_y": -20, "detector_distance": 5, "pixel_size": 75e-6}
    other = ring_map(shape=SHAPE, **geometry, incident_energy=11, n_static=20, n_dynamic=4)
    with pytest.raises(FailedStatus):
        run(fly_until_precise(detector, beamline[1], goal(roimap), other, within=DEADLINE))
    assert "results have 40 static bins, the map 20" in stop_of(documents)["reason"]
    assert detector.process.wait(DEADLINE) is not None


def test_a_goal_that_does_not_suit_the_map_is_refused_before_the_detector_starts(engine, simulate, roimap):
    run, _ = engine
    detector = simulate()
    with pytest.raises(ConfigError, match="outside of the map"):
        run(fly_until_precise(detector, "tcp://127.0.0.1:1", goal(roimap, q=1.0), roimap))
    assert detector.kicked_off == 0


def test_a_plan_of_ones_own_gets_the_verdict(engine, beamline, simulate, roimap):
    run, documents = engine

    def two_at_once():
        verdicts = []
        for seed in range(2):
            yield from bps.open_run()
            verdict = yield from until_precise(
                simulate(seed=seed), beamline[1], goal(roimap, max_dose=0.3), roimap, within=DEADLINE
            )
            yield from bps.close_run(reason=verdict.reason)
            verdicts.append(verdict)
        assert [verdict.outcome for verdict in verdicts] == ["dose spent"] * 2
        assert verdicts[0].value != verdicts[1].value, "that of the first run again"

    run(two_at_once())
    assert len([name for name, _ in documents if name == "stop"]) == 2
