"""Gateway, workers and merger in processes of their own, and a real Kafka: kills and pauses change nothing."""

import random
import signal
import time
import uuid
from contextlib import ExitStack

import pytest
from confluent_kafka import Producer

from stream.checkpoint import Epochs
from stream.kafka_plane import frames_topic
from tests.test_command_line import finished, started
from tests.test_kill import N_FRAMES, assert_identical, contents, frames, free, qmap, result_of_frames

pytestmark = pytest.mark.timeout(240)

__all__ = ["frames", "qmap"]

REGIONS = 4
DEADLINE = 120


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, qmap):
    return result_of_frames(tmp_path_factory.mktemp("undisturbed"), qmap, range(N_FRAMES))


class Plane:
    """The processes of one beamline."""

    def __init__(self, stack, folder, broker, qmap):
        self.stack, self.folder, self.qmap = stack, folder, qmap
        self.broker = broker
        self.beamline = f"beamline-{uuid.uuid4().hex[:8]}"
        self.address = f"kafka://{broker.bootstrap}/{self.beamline}"

    def start(self, *arguments):
        return self.stack.enter_context(started(*arguments, cwd=self.folder))

    def gateway(self, source):
        return self.start("gateway", "--source", source, "--to", self.address, "--regions", REGIONS)

    def worker(self, *options):
        command = ("worker", "--source", self.address, "--qmap", self.qmap, "--checkpoints", "checkpoints")
        return self.start("-v", *command, "--threads", 1, "--publish-every", "0.2 s", *options)

    def merger(self, *options):
        command = ("merge", "--source", self.address, "--qmap", self.qmap, "--out", "result.h5", "--quiet")
        return self.start(*command, "--runs", 1, "--publish-every", "0.2 s", *options)

    def replay(self, frames, rate):
        """Send frames at a rate to a gateway."""
        address = f"zmq://{free()}"
        self.gateway(address)
        return self.start("replay", frames, "--to", address, "--rate", rate)

    def result(self, merger):
        """Wait for the result file, and return what is in it."""
        out, err = merger.communicate(timeout=DEADLINE)
        assert merger.returncode == 0, err
        assert out.strip() == "result.h5"
        result = contents(self.folder / "result.h5")
        assert result.pop("xpcs/ledger/missing_regions").size == 0
        return result


@pytest.fixture
def plane(tmp_path, broker, qmap):
    with ExitStack() as stack:
        yield Plane(stack, tmp_path, broker, qmap)


def until_said(process, what):
    """Wait for a line of a process that has certain words; return all lines so far."""
    lines = []
    while True:
        line = process.stderr.readline()
        assert line, f"it ended before it said {what!r}: {lines}"
        lines.append(line)
        if what in line:
            return lines


def test_regions_of_workers_that_come_at_any_time_merge_into_the_result_of_one_process(plane, frames, undisturbed):
    early = plane.worker()
    gateway = plane.gateway(frames)
    until_said(early, "region 3 begins")
    plane.worker()
    assert f"sent {N_FRAMES:,} frames to {REGIONS} regions" in finished(gateway)[1]
    assert_identical(plane.result(plane.merger()), undisturbed)


def test_workers_and_mergers_killed_again_and_again_give_the_identical_result(plane, frames, undisturbed):
    dice = random.Random(4)
    sender = plane.replay(frames, "120 Hz")
    names = ["one", "other"]
    workers = {name: plane.worker("--name", name) for name in names}
    merger = plane.merger("--position", "position")
    kills = 0
    for line in workers.values():
        until_said(line, "taking regions")
    while sender.poll() is None or kills < 10:
        time.sleep(dice.uniform(0.3, 2.0))  # a random moment is what is wanted
        name = dice.choice(names)
        workers[name].kill()
        assert workers[name].wait(DEADLINE) == -signal.SIGKILL
        workers[name] = plane.worker("--name", name)
        kills += 1
        if kills % 4 == 0:
            merger.kill()
            merger.wait(DEADLINE)
            merger = plane.merger("--position", "position")
    assert kills >= 10
    result = plane.result(merger)
    assert (result["xpcs/ledger/sent"], result["xpcs/ledger/received"]) == (N_FRAMES, N_FRAMES)
    assert_identical(result, undisturbed)


def test_a_paused_worker_whose_regions_others_took_over_changes_nothing_when_it_wakes(plane, frames, undisturbed):
    zombie = plane.worker()
    plane.replay(frames, "150 Hz")
    until_said(zombie, "region 3 begins")
    zombie.send_signal(signal.SIGSTOP)
    heir = plane.worker()
    for _ in range(REGIONS):
        until_said(heir, "begins here")
    zombie.send_signal(signal.SIGCONT)
    assert_identical(plane.result(plane.merger()), undisturbed)
    assert zombie.poll() is None, "it is a worker again"


def test_a_worker_goes_on_with_its_regions_after_somebody_else_took_them_over_by_mistake(plane, frames, undisturbed):
    worker = plane.worker()
    plane.replay(frames, "200 Hz")
    until_said(worker, "region 3 begins")
    checkpoints = plane.folder / "checkpoints"
    deadline = time.monotonic() + DEADLINE
    while len({path.parts[-3] for path in checkpoints.glob("*/*/*")}) < REGIONS:
        assert time.monotonic() < deadline, "there is no checkpoint of every region"
    for region in range(REGIONS):
        Epochs(checkpoints / f"{plane.beamline}.{region:04d}")
    for _ in range(REGIONS):
        until_said(worker, "another owner has taken over")
    assert_identical(plane.result(plane.merger()), undisturbed)


def test_a_broker_that_is_away_for_a_while_loses_nothing(plane, frames, undisturbed):
    worker = plane.worker()
    plane.replay(frames, "150 Hz")
    until_said(worker, "region 3 begins")
    merger = plane.merger()
    until_said(merger, "taking partial sums")
    plane.broker.kill()
    time.sleep(20)  # that it is away that long is what is tested
    plane.broker.start()
    assert_identical(plane.result(merger), undisturbed)
    assert worker.poll() is None


def test_poison_among_the_frames_is_counted_and_skipped(plane, frames, undisturbed):
    finished(plane.gateway(frames))
    producer = Producer({"bootstrap.servers": plane.broker.bootstrap})
    for value in (b"", b"\xff" * 1000):
        producer.produce(frames_topic(plane.beamline), value, headers=[("h", b"\x93nonsense")], partition=1)
    assert producer.flush(DEADLINE) == 0
    finished(plane.gateway(frames))
    plane.worker()
    result = plane.result(plane.merger())
    assert_identical(result, undisturbed)


def test_told_to_stop_a_worker_hands_its_regions_over_at_once(plane, frames, undisturbed):
    leaving = plane.worker()
    plane.replay(frames, "200 Hz")
    until_said(leaving, "region 3 begins")
    heir = plane.worker()
    until_said(heir, "taking regions")
    leaving.terminate()
    asked = time.monotonic()
    finished(leaving)
    until_said(heir, "region")
    assert time.monotonic() - asked < 5, "long before a session would have ended"
    assert_identical(plane.result(plane.merger()), undisturbed)
