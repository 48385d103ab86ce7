"""What holds with Kafka as with ZeroMQ between gateway, workers and merger: kills and pauses change nothing."""

import random
import signal
import time
import uuid
from contextlib import ExitStack

import pytest

from tests.plane import DEADLINE, REGIONS, Plane, until_said
from tests.test_command_line import finished
from tests.test_kill import N_FRAMES, assert_identical, frames, free, qmap, result_of_frames

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, qmap):
    return result_of_frames(tmp_path_factory.mktemp("undisturbed"), qmap, range(N_FRAMES))


@pytest.fixture(params=["kafka", "zmq"])
def plane(request, tmp_path, qmap):
    """All that is different is the address."""
    where = request.getfixturevalue("broker").bootstrap if request.param == "kafka" else free()
    with ExitStack() as stack:
        yield Plane(f"{request.param}://{where}/beamline-{uuid.uuid4().hex[:8]}", stack, tmp_path, qmap)


def test_regions_of_workers_that_come_at_any_time_merge_into_the_result_of_one_process(plane, frames, undisturbed):
    early = plane.worker()
    gateway = plane.gateway(frames)
    until_said(early, "region 3 begins")
    plane.worker()
    assert_identical(plane.result(plane.merger()), undisturbed)
    assert f"sent {N_FRAMES:,} frames to {REGIONS} regions" in finished(gateway)[1], "it ends when all is safe"


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
        if kills % 4 == 0 and sender.poll() is None:  # later it may be done
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
    until_said(heir, "begins here", REGIONS)
    zombie.send_signal(signal.SIGCONT)
    assert_identical(plane.result(plane.merger()), undisturbed)
    assert zombie.poll() is None, "it is a worker again"


def test_told_to_stop_a_worker_hands_its_regions_over_at_once(plane, frames, undisturbed):
    leaving = plane.worker()
    plane.replay(frames, "200 Hz")
    until_said(leaving, "region 3 begins")
    heir = plane.worker()
    until_said(heir, "taking regions")
    leaving.terminate()
    finished(leaving)
    ended = time.monotonic()
    until_said(heir, "region")
    assert time.monotonic() - ended < 5, "before a session would have ended"
    assert_identical(plane.result(plane.merger()), undisturbed)
