"""The whole chain, with nobody who does anything by hand: frames are lost, their file goes, the result is repaired.

A manager, its pilots of both kinds, gateway, spool, merger and `xpcs-stream backfill` are real. Globus, where it is
that, is the FAKE of tests/fake_globus.py.
"""

import json
import resource
import signal
from contextlib import ExitStack, closing

import pytest

from tests.bridge import HERE, Bridge
from tests.link import Link
from tests.plane import DEADLINE, REGIONS
from tests.test_backfill import LAST_LOOK, N_FRAMES, SLOW, Beamline, documents_of, frames, ledger_of, live, undisturbed
from tests.test_bulk_manager import by_globus, fake
from tests.test_command_line import finished
from tests.test_ingest_bluesky import proxy
from tests.test_kill import assert_identical, free, qmap, until

pytestmark = pytest.mark.timeout(400)

__all__ = ["by_globus", "fake", "frames", "qmap", "undisturbed"]


class Fallback(Beamline):
    """A beamline as people set it up: workers are on nodes behind a link, and files go there by another way."""

    def __init__(self, link, hub, stack, folder, qmap, *, route=None, switch=None, worker=None):
        super().__init__(f"zmq://{hub}/beamline", link, stack, folder, qmap)
        self.status_file, self.told = folder / "gateway.json", folder / "told.json"
        xpcs_stream = str(HERE / "xpcs-stream")
        here = {
            "by": "copy", "there": {"path": str(folder / "there")}, **(route or {}),
            "repair": [
                xpcs_stream, "backfill", "{run}", "--source", "{file}", "--qmap", str(qmap), "--plane", self.address,
                "--regions", str(REGIONS), "--threads", "1",
            ],
        }  # fmt: skip
        files = {
            "results": str(folder / "results"),
            "sites": {"here": here},
            "gateway": str(self.status_file),
            "plane": str(self.told),
            "switch": {"look": "0.2 s", "silent": "60 s", "silent_file": "90 s", **(switch or {})},
        }
        worker = worker or [
            xpcs_stream, "-v", "worker", "--source", f"zmq://{link.address}/beamline", "--qmap", qmap,
            "--checkpoints", folder / "checkpoints", "--checkpoint-every", "0.2 s", "--threads", 1,
            "--publish-every", "0.2 s", "--name", "{name}", "--status", "{status}",
        ]  # fmt: skip
        self.bridge = stack.enter_context(closing(Bridge(folder, worker, nodes=2, max_nodes=2, files=files)))
        self.bridge.site["heartbeats"]["lost_after"] = self.bridge.site["alone"] = "2 min"  # this machine may be busy
        self.results = f"zmq://{free()}"

    def gateway(self, *options):
        return super().gateway("--status", self.status_file, "--plane", self.told, *options)

    def merger(self, *options):
        within = ("--repair-within", "200 s", "--plane", self.told, "--publish", self.results)
        return super().merger(*within, *options)

    def send(self, frames, rate=SLOW):
        return self.start("replay", frames, "--to", self.detector, "--rate", rate)

    @property
    def status(self):
        """What the gateway tells."""
        return json.loads(self.status_file.read_text())

    @property
    def sent(self):
        """The run, as the manager tells of it; None: it does not go by file."""
        return next(iter((self.bridge.status() or {"files": {"runs": []}})["files"]["runs"]), None)

    def until_stage(self, stage):
        return self.bridge.until(lambda: (run := self.sent) is not None and run["stage"] == stage and run)

    @property
    def is_safe(self):
        return (self.folder / "spool/scan-7/safe").exists()

    def repaired(self, merger):
        """Return the ledger of the repaired result, and all that is known of the frames."""
        result = self.result(merger)
        return ledger_of(self.folder / "result.h5"), result

    def lose(self, frames, wait, *, for_good=False):
        """Send a run of which frames are lost, since the link to the workers is cut at full rate."""
        sender = self.send(frames)
        wait(lambda ledger: ledger["received"] > 100)
        self.link.cut()
        enough = min(self.status["frames"] + 700, LAST_LOOK)  # more than a ring has room for
        until(sender, lambda: self.status["frames"] > enough)
        if not for_good:
            sender.send_signal(signal.SIGSTOP)  # so that the run is not over before anybody has looked
            self.link.restore()
            during = wait(lambda ledger: ledger["lost"] > 0 and ledger["awaits_file"] == 0)
            assert during.n_frames < N_FRAMES, "live results go on"
            sender.send_signal(signal.SIGCONT)
        return sender


@pytest.fixture
def fallback_of(tmp_path, qmap):
    with ExitStack() as stack:
        hub = free()
        link = stack.enter_context(Link(hub))
        yield lambda **options: Fallback(link, hub, stack, tmp_path, qmap, **options)


def test_a_link_cut_for_seconds_is_repaired_by_the_file_without_anybody(fallback_of, frames, undisturbed):
    beamline = fallback_of()
    with proxy() as (into, out), documents_of(out) as documents, live(beamline.results) as wait:
        gateway = beamline.gateway()
        merger = beamline.merger("--documents", into.replace("tcp", "zmq+bluesky"))
        beamline.bridge.up()
        beamline.bridge.until_serving(2)
        sender = beamline.lose(frames, wait)
        held = wait(lambda ledger: ledger["awaits_file"] == 1)
        assert not held.final
        lost = int(held.arrays["lost"])
        assert lost > 0
        finished(sender)
        assert beamline.until_stage("done")["origin"] == "stream"
        assert "scan-7" in beamline.bridge.run("status").stdout
        ledger, result = beamline.repaired(merger)
        assert_identical(result, undisturbed)
        assert (ledger["sent"], ledger["received"], ledger["lost"]) == (N_FRAMES, N_FRAMES, 0)
        assert ledger["plane"] == 1
        assert ledger["from_file"] >= lost
        assert beamline.is_safe
        until(gateway, lambda: beamline.status["runs"][0]["safe"])
        until(gateway, lambda: [name for name, _ in documents].count("stop"))
        names = [name for name, _ in documents]
        assert (names.count("start"), names.count("stop")) == (1, 1)
    assert beamline.bridge.log().count(" goes to ") == 1


def test_with_a_link_cut_for_good_frames_go_by_file_only_and_the_result_is_the_same(fallback_of, frames, undisturbed):
    beamline = fallback_of(switch={"losing_file": "0.1 s", "spool_back": "2.1 min", "dwell": "10 min"})
    with live(beamline.results) as wait:
        gateway = beamline.gateway()
        merger = beamline.merger()
        beamline.bridge.up()
        beamline.bridge.until_serving(2)
        sender = beamline.lose(frames, wait, for_good=True)
        until(gateway, lambda: beamline.status["plane"] == "file")
        assert "lost on the way to the workers" in beamline.status["why"]
        finished(sender)
        beamline.until_stage("done")
        assert beamline.status["runs"][0]["unsent"] > 0
        ledger, result = beamline.repaired(merger)
        assert_identical(result, undisturbed)
        assert ledger["plane"] == 2
    assert 'frames go by "file"' in beamline.bridge.run("status").stdout


def test_where_no_worker_ever_comes_a_run_is_computed_from_its_file(fallback_of, frames, undisturbed):
    never_ready = ["sh", "-c", "exec sleep 1000", "{status}"]
    beamline = fallback_of(switch={"wait": "0.5 s", "wait_file": "1 s"}, worker=never_ready)
    gateway = beamline.gateway()
    merger = beamline.merger()
    beamline.bridge.up()
    until(gateway, lambda: beamline.status["plane"] == "file")
    assert "none serves" in beamline.status["why"]
    finished(beamline.send(frames, "1 kHz"))
    assert beamline.until_stage("done")["why"] == ""
    assert beamline.status["runs"][0]["unsent"] == N_FRAMES
    ledger, result = beamline.repaired(merger)
    assert_identical(result, undisturbed)
    assert (ledger["plane"], ledger["from_file"]) == (2, N_FRAMES)


@pytest.mark.parametrize("killed", ["manager", "gateway"])
def test_whoever_is_killed_during_the_transfer_there_is_one_and_the_result_is_the_same(
    fallback_of, fake, by_globus, frames, undisturbed, killed
):
    beamline = fallback_of(route=by_globus)
    fake.going.clear()
    with live(beamline.results) as wait:
        gateway = beamline.gateway()
        merger = beamline.merger()
        manager = beamline.bridge.up()
        beamline.bridge.until_serving(2)
        sender = beamline.lose(frames, wait)
        finished(sender)
        beamline.bridge.until(lambda: fake.documents)
        process = manager if killed == "manager" else gateway
        process.kill()
        process.wait(DEADLINE)
        if killed == "manager":
            beamline.bridge.up()
        else:
            beamline.gateway()
        fake.going.set()
        beamline.until_stage("done")
        ledger, result = beamline.repaired(merger)
        assert_identical(result, undisturbed)
        assert ledger["received"] == N_FRAMES
    assert beamline.is_safe
    assert len(fake.documents) == 1
    assert beamline.bridge.log().count(" goes to ") == 1


def test_with_the_disk_of_the_spool_full_streaming_goes_on_and_all_say_that_there_is_no_fallback(
    fallback_of, frames, undisturbed
):
    beamline = fallback_of()
    gateway = beamline.gateway("--keep", 1)
    resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    merger = beamline.merger()
    beamline.bridge.up()
    beamline.bridge.until_serving(2)
    sender = beamline.send(frames, "400 Hz")
    until(gateway, lambda: beamline.status["spool"]["lost"] > 0)
    beamline.bridge.until(lambda: "the spool loses frames" in beamline.bridge.run("status").stdout)
    assert beamline.status["plane"] == "stream"
    finished(sender)
    ledger, result = beamline.repaired(merger)
    assert_identical(result, undisturbed)
    assert (ledger["received"], ledger["plane"], ledger["from_file"]) == (N_FRAMES, 0, 0)
    assert beamline.sent is None
    assert "the spool loses frames" in beamline.bridge.log()
