"""Gateway, workers and merger with nothing between them but ZeroMQ: rings of memory, and keys."""

from contextlib import ExitStack

import pytest

from tests.plane import DEADLINE, REGIONS, Plane, until_said
from tests.test_command_line import finished, xpcs_stream
from tests.test_kill import COUNTS, N_FRAMES, assert_identical, frames, free, qmap, result_of_frames
from tests.test_planes import undisturbed

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap", "undisturbed"]


@pytest.fixture
def plane(tmp_path, qmap):
    with ExitStack() as stack:
        yield Plane(f"zmq://{free()}/beamline", stack, tmp_path, qmap)


def test_what_the_ring_no_longer_holds_is_a_counted_loss(plane, frames, tmp_path, qmap):
    """All frames go by before there is a worker: only the newest are still there."""
    frame_bytes = COUNTS[0].nbytes // REGIONS
    address = f"zmq://{free()}"
    plane.start(
        *("gateway", "--source", address, "--to", plane.address, "--regions", REGIONS),
        *("--keep", 500 * frame_bytes / 1e9),
    )
    finished(plane.start("replay", frames, "--to", address, "--as-fast-as-possible"))
    plane.worker()
    result = plane.result(plane.merger())
    kept = int(result["xpcs/ledger/received"])
    assert 300 < kept <= 500
    assert result["xpcs/ledger/lost"] == N_FRAMES - kept
    newest = result_of_frames(tmp_path, qmap, range(N_FRAMES - kept, N_FRAMES))
    newest["xpcs/ledger/undecodable"] = 0  # a file of frames has places for those that are missing
    assert_identical(result, newest)


def test_workers_and_mergers_wait_for_a_gateway_that_comes_anew(plane, frames, undisturbed):
    worker, merger = plane.worker(), plane.merger()
    first = plane.gateway(f"zmq://{free()}")
    until_said(worker, "region 3 begins")
    first.kill()
    first.wait(DEADLINE)
    plane.gateway(frames)
    assert_identical(plane.result(merger), undisturbed)
    assert worker.poll() is None


def test_with_keys_the_result_is_the_same_and_who_has_no_key_is_refused(plane, frames, undisturbed, tmp_path):
    allowed = tmp_path / "allowed"
    for name in ("gateway", "node", "stranger"):
        assert xpcs_stream("keys", name, "--directory", tmp_path).exit_code == 0
    allowed.mkdir()
    (tmp_path / "node.key").rename(allowed / "node.key")
    gateway = plane.start(
        *("gateway", "--source", frames, "--to", plane.address, "--regions", REGIONS),
        *("--secret-key", "gateway.key_secret", "--allowed", "allowed"),
    )
    stranger = plane.worker("--secret-key", "stranger.key_secret", "--gateway-key", "gateway.key")
    _, complaint = stranger.communicate(timeout=DEADLINE)
    assert stranger.returncode == 1
    assert "the gateway does not know our key" in complaint
    until_said(gateway, "was refused")
    key = ("--secret-key", "node.key_secret", "--gateway-key", "gateway.key")
    plane.worker(*key)
    assert_identical(plane.result(plane.merger(*key)), undisturbed)
