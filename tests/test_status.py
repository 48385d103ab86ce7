"""What a worker tells of itself, and how soon it is gone when it is told to go."""

import json
import time
import uuid
from contextlib import ExitStack

import numpy as np
import pytest

from stream import checkpoint
from stream.messages import FrameBatch
from stream.status import LONGEST_LAG, Status, Watched
from tests.conftest import make_start
from tests.plane import REGIONS, Plane
from tests.test_kill import N_FRAMES, frames, free, qmap, until

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap"]

START = make_start(frame_time=0.01, count_time=0.009)


class Frames:
    """What came, as a source has it."""

    def __init__(self, *messages):
        self.messages = messages

    def __iter__(self):
        return iter(self.messages)


def batch(age, n=301):
    """Frames of which the last one ended so many seconds ago."""
    begin = time.time() - age - 0.01 * (n - 1) - 0.009
    return FrameBatch(run="run-1", first=0, frames=np.zeros((n, 6, 50), "<u2"), timestamp_ns=round(1e9 * begin))


def lags(*messages):
    """Return the lag once each message is taken, and after the last."""
    watched = Watched(Frames(*messages))
    return [watched.lag() for _ in watched], watched.lag()


def test_the_lag_is_how_long_ago_the_frames_ended_that_were_taken_last():
    at_work, after = lags(START, batch(50), batch(30))
    assert at_work == [None, pytest.approx(50, abs=5), pytest.approx(30, abs=5)]
    assert after == pytest.approx(30, abs=5)


def test_a_worker_that_does_not_come_along_with_its_frames_lags_more_and_more():
    watched = Watched(Frames(START, batch(1)))
    taking = iter(watched)
    next(taking), next(taking)
    before = watched.lag()
    time.sleep(0.05)  # the time that it takes
    assert watched.lag() >= before + 0.05


def test_with_nothing_left_to_take_there_is_no_lag():
    assert lags(START, batch(5), None)[1] == 0


def test_nothing_is_known_of_a_lag_before_there_were_frames():
    assert lags(None, START, None)[1] is None


def test_frames_that_were_measured_long_ago_tell_no_lag():
    assert lags(START, batch(LONGEST_LAG + 1))[1] is None


def test_frames_count_once_they_are_correlated():
    watched = Watched(Frames(START, batch(0, n=3), batch(0, n=4)))
    assert [watched.n_frames for _ in watched] == [0, 0, 3]
    assert watched.n_frames == 7


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def waited_for(path, reached):
    deadline = time.monotonic() + 60
    while not reached(status := read(path)):
        assert time.monotonic() < deadline, status
    return status


def test_a_region_that_comes_or_goes_is_told_at_once_and_its_frames_stay_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("stream.status.EVERY", 1000.0)
    path = tmp_path / "status"
    with Status(path) as status:
        status.say("waiting")
        assert waited_for(path, bool) == {
            "ready": False,
            "regions": [],
            "frames": 0,
            "lag_s": None,
            "message": "waiting",
        }
        status.say("", ready=True)
        with status.watch(2, Frames(START, batch(0))) as one, status.watch(0, Frames(START, batch(4))) as other:
            assert waited_for(path, lambda told: told["regions"] == [0, 2])["ready"]
            assert len([*one, *other]) == 4
        told = waited_for(path, lambda told: not told["regions"])
        assert told["frames"] == 602


def test_a_worker_that_is_gone_is_not_ready(tmp_path):
    path = tmp_path / "status"
    with Status(path) as status:
        status.say("", ready=True)
        waited_for(path, lambda told: told.get("ready"))
    assert (read(path)["ready"], read(path)["message"]) == (False, "gone")


def test_a_status_that_cannot_be_written_is_told_once_and_stops_nobody(tmp_path, caplog):
    with Status(tmp_path / "none" / "status") as status:
        for _ in range(3):
            status.say("")
            time.sleep(0.05)  # for several of them
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.fixture(params=["kafka", "zmq"])
def plane(request, tmp_path, qmap):
    """All that is different is the address."""
    where = request.getfixturevalue("broker").bootstrap if request.param == "kafka" else free()
    with ExitStack() as stack:
        yield Plane(f"{request.param}://{where}/beamline-{uuid.uuid4().hex[:8]}", stack, tmp_path, qmap)


def test_a_worker_is_ready_once_it_takes_part_and_tells_how_far_it_is(plane, frames):
    path = plane.folder / "status"
    worker = plane.worker("--status", path)
    until(worker, lambda: read(path).get("message") == "waiting for a gateway" or read(path).get("ready"))
    plane.replay(frames, "1 kHz")
    until(worker, lambda: read(path).get("regions") == [0, 1, 2, 3])
    assert read(path)["ready"]
    until(worker, lambda: read(path)["frames"] > 0)
    assert abs(read(path)["lag_s"]) < 30, "near 0 where nothing else runs"
    until(worker, lambda: read(path)["frames"] == REGIONS * N_FRAMES)
    until(worker, lambda: read(path)["lag_s"] == 0)


def test_told_to_go_again_and_again_a_worker_has_saved_all_and_is_gone_soon(plane, frames):
    path = plane.folder / "status"
    leaving = plane.worker("--status", path)
    plane.replay(frames, "100 Hz")
    until(leaving, lambda: read(path).get("frames", 0) > 500)
    asked = time.monotonic()
    while leaving.poll() is None:
        leaving.terminate()
        time.sleep(0.01)  # as schedulers do, but for longer
    assert leaving.returncode == 0
    assert time.monotonic() - asked < 30  # 0.4 s where little else runs
    told = read(path)
    assert told["regions"] == []
    # On a busy machine a region may not have begun when the others have frames.
    newest = [max(found) for region in (plane.folder / "checkpoints").iterdir() if (found := list(region.glob("*/*")))]
    saved = [int(checkpoint.load(path).running.ledger["received"]) for path in newest]
    assert sum(saved) == told["frames"] > 500
