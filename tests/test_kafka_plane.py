"""Gateway, workers and merger with Kafka between them: what befalls Kafka."""

import time
import uuid
from contextlib import ExitStack

import numpy as np
import pytest
from confluent_kafka import Producer

from stream.checkpoint import Epochs
from stream.kafka_plane import FRAMES_BYTES, frames_topic
from stream.messages import FrameBatch, RunStart, RunStop
from stream.sinks.zmq import ZmqSink
from tests.plane import DEADLINE, REGIONS, Plane, until_said
from tests.test_backfill import ledger_of, of_frames, result_of
from tests.test_command_line import finished, xpcs_stream
from tests.test_gateway_status import Gateway
from tests.test_kill import GEOMETRY, assert_identical, frames, qmap
from tests.test_planes import undisturbed

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap", "undisturbed"]


@pytest.fixture
def beamline():
    return f"beamline-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def plane(tmp_path, broker, beamline, qmap):
    with ExitStack() as stack:
        yield Plane(f"kafka://{broker.bootstrap}/{beamline}", stack, tmp_path, qmap)


def test_a_worker_goes_on_with_its_regions_after_somebody_else_took_them_over_by_mistake(
    plane, beamline, frames, undisturbed
):
    worker = plane.worker()
    plane.replay(frames, "200 Hz")
    until_said(worker, "region 3 begins")
    checkpoints = plane.folder / "checkpoints"
    deadline = time.monotonic() + DEADLINE
    while len({path.parts[-3] for path in checkpoints.glob("*/*/*")}) < REGIONS:
        assert time.monotonic() < deadline, "there is no checkpoint of every region"
    for region in range(REGIONS):
        Epochs(checkpoints / f"{beamline}.{region:04d}")
    until_said(worker, "another owner has taken over", REGIONS)
    assert_identical(plane.result(plane.merger()), undisturbed)


def test_a_broker_that_is_away_for_a_while_loses_nothing(plane, broker, frames, undisturbed):
    worker = plane.worker()
    plane.replay(frames, "150 Hz")
    until_said(worker, "region 3 begins")
    merger = plane.merger()
    until_said(merger, "taking partial sums")
    broker.kill()
    time.sleep(10)  # longer than a session of a worker
    broker.start()
    assert_identical(plane.result(merger), undisturbed)
    assert worker.poll() is None


LARGE = (256, 512)
BATCH = np.random.default_rng(3).poisson(1, (64, *LARGE)).astype("<u2")
"""17 MB."""


def send(detector, run, n_batches, *, after=0):
    """Send batches of a run, and its start unless some were sent before."""
    if not after:
        told = {"start_time": "2026-11-22T10:00:00+00:00"}
        detector.write(RunStart(run=run, shape=LARGE, dtype="<u2", frame_time=0.002, count_time=0.001, metadata=told))
    for first in range(after * len(BATCH), n_batches * len(BATCH), len(BATCH)):
        detector.write(FrameBatch(run=run, first=first, frames=BATCH, timestamp_ns=time.time_ns()))


def end(detector, run, n_batches):
    detector.write(RunStop(run=run, n_frames=n_batches * len(BATCH), exit_status="success"))


def test_a_broker_that_is_away_too_long_holds_up_no_detector_and_later_runs_are_streamed(tmp_path, broker, beamline):
    qmap = tmp_path / "qmap.h5"
    assert xpcs_stream("qmap", *GEOMETRY[2:], "--shape", "256x512", "--out", qmap).exit_code == 0
    with ExitStack() as stack:
        plane = Plane(f"kafka://{broker.bootstrap}/{beamline}", stack, tmp_path, qmap)
        gateway = Gateway(plane, "--spool", "spool")
        detector = stack.enter_context(ZmqSink(gateway.address.replace("zmq", "tcp"), pattern="push"))
        plane.worker("--checkpoint-every", "0.2 s")
        command = ("merge", "--source", plane.address, "--qmap", qmap, "--out", "{run}.h5", "--quiet", "--runs", 3)
        merger = plane.start(*command, "--repair-within", "200 s")
        send(detector, "long", 2)
        gateway.until(lambda told: told["frames"] == 2 * len(BATCH))

        broker.kill()
        n_batches = 4 + FRAMES_BYTES // BATCH.nbytes
        send(detector, "long", n_batches, after=2)
        end(detector, "long", n_batches)
        n_frames = n_batches * len(BATCH)
        [long] = gateway.until(lambda told: told["runs"][0]["ended"] and told["runs"][0]["spooled"] == n_frames)["runs"]
        assert long["unsafe"]
        assert long["lost"] > 0
        send(detector, "unseen", 1)
        end(detector, "unseen", 1)
        gateway.until(lambda told: len(told["runs"]) == 2 and told["runs"][1]["spooled"] == len(BATCH))

        broker.start()
        gateway.until(lambda told: told["ack_lag_s"] == 0 and not told["runs"][1]["unsafe"])
        send(detector, "later", 2)
        end(detector, "later", 2)
        status = gateway.until(lambda told: len(told["runs"]) == 3 and told["runs"][2]["ended"])
        assert [run["lost"] > 0 for run in status["runs"]] == [True, True, False]
        assert status["spool"]["lost"] == 0
        for run in ("long", "unseen"):
            finished(plane.start("backfill", run, "--source", "spool", "--qmap", qmap, "--plane", plane.address))
        out, err = merger.communicate(timeout=DEADLINE)
        assert merger.returncode == 0, err
        assert sorted(out.split()) == ["later.h5", "long.h5", "unseen.h5"]
        said = gateway.end()
        assert "frames are not streamed until Kafka takes them" in said
        assert "frames are streamed again" in said
    for run, from_file in (("long", True), ("unseen", True), ("later", False)):
        ledger = ledger_of(tmp_path / f"{run}.h5")
        assert (ledger["lost"], ledger["from_file"] > 0) == (0, from_file)
        whole = result_of(tmp_path / f"spool/{run}/{run}_master.h5", qmap, tmp_path / f"whole-{run}.h5")
        assert_identical(of_frames(tmp_path / f"{run}.h5"), whole)


def test_poison_among_the_frames_is_counted_and_skipped(plane, broker, beamline, frames, undisturbed):
    finished(plane.gateway(frames))
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    for value in (b"", b"\xff" * 1000):
        producer.produce(frames_topic(beamline), value, headers=[("h", b"\x93nonsense")], partition=1)
    assert producer.flush(DEADLINE) == 0
    finished(plane.gateway(frames))
    plane.worker()
    result = plane.result(plane.merger())
    assert_identical(result, undisturbed)


def test_a_worker_whose_name_another_one_takes_ends_and_says_so(plane, frames):
    plane.gateway(frames)
    first = plane.worker("--name", "node17")
    until_said(first, "region 3 begins")
    until_said(plane.worker("--name", "node17"), "region 3 begins")
    _, err = first.communicate(timeout=DEADLINE)
    assert first.returncode == 1
    assert "fenced by other consumer with same group.instance.id" in err.splitlines()[-1]
