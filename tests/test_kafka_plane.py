"""Gateway, workers and merger with Kafka between them: what befalls Kafka."""

import time
import uuid
from contextlib import ExitStack

import pytest
from confluent_kafka import Producer

from stream.checkpoint import Epochs
from stream.kafka_plane import frames_topic
from tests.plane import DEADLINE, REGIONS, Plane, until_said
from tests.test_command_line import finished
from tests.test_kill import assert_identical, frames, qmap
from tests.test_planes import undisturbed

pytestmark = pytest.mark.timeout(240)

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
    time.sleep(20)  # that it is away that long is what is tested
    broker.start()
    assert_identical(plane.result(merger), undisturbed)
    assert worker.poll() is None


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
