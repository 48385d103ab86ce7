"""A link to the workers that is cut, for a while or for good: the file repairs the run, bit for bit."""

import json
import signal
import threading
import time
import uuid
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.backfill import published
from stream.backfill_file import RunFile, find, look
from stream.backfill_result import recompute
from stream.errors import ConfigError, SinkError, SourceError
from stream.hub import PARTIALS, Hub
from stream.ingest.bluesky_zmq import ZmqDocuments
from stream.ingest.hub import HubResults
from stream.ingest.zmq import ZmqResults
from stream.messages import Result
from stream.operators.intensity import Intensity
from stream.operators.multitau import MultiTau
from stream.operators.roimap_file import read
from stream.operators.scattering import Scattering
from stream.regions import Regions
from stream.sinks.hdf5 import Hdf5Sink
from stream.wire import encode
from stream.zmq_plane import ZmqPlane
from tests.conftest import make_start
from tests.link import Link
from tests.plane import DEADLINE, REGIONS, Plane, until_said
from tests.sources import ListSink
from tests.test_command_line import finished, xpcs_stream
from tests.test_ingest_bluesky import proxy
from tests.test_kill import assert_identical, contents, free, qmap, until, until_saved

pytestmark = pytest.mark.timeout(400)

__all__ = ["qmap"]

N_FRAMES = 2500
RATE = "300 Hz"
SLOW, LAST_LOOK = "150 Hz", N_FRAMES - 300
"""Where a link is cut and restored amid a run, of which results are seconds late on a busy machine."""
COUNTS = np.random.default_rng(2).integers(0, 50_000, (N_FRAMES, 64, 64), "<u2")
"""Which do not compress: a ring has room for a second of them."""

HOW = ("xpcs/ledger/", "xpcs/metadata", "entry/instrument")
"""What a result says of how its frames came: the detector told more than there is in a file of frames."""


def write_frames(path, lost=()):
    with h5py.File(path, "w") as file:
        file["entry/entry_identifier"] = "scan-7"
        file["entry/start_time"] = "2025-03-01T12:00:00+00:00"
        file["entry/instrument/detector/frame_time"] = 2e-3
        data = file.create_dataset("entry/data/data", COUNTS.shape, COUNTS.dtype, chunks=(1, 64, 64))
        for n in range(N_FRAMES):
            if n not in lost:
                data.id.write_direct_chunk((n, 0, 0), COUNTS[n].tobytes())
    return path


def result_of(frames, qmap, out):
    said = xpcs_stream("run", "--source", frames, "--qmap", qmap, "--out", out, "--quiet")
    assert said.exit_code == 0, said.output
    return of_frames(out)


def of_frames(path):
    return {name: value for name, value in contents(path).items() if not name.startswith(HOW)}


def ledger_of(path):
    with h5py.File(path) as file:
        return {name: dataset[()] for name, dataset in file["xpcs/ledger"].items()}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return write_frames(tmp_path_factory.mktemp("frames") / "frames.h5")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, qmap, frames):
    return result_of(frames, qmap, tmp_path_factory.mktemp("undisturbed") / "result.h5")


@pytest.fixture
def beamline(tmp_path, qmap):
    """A plane over ZeroMQ of which the workers are behind a link."""
    with ExitStack() as stack:
        hub = free()
        link = stack.enter_context(Link(hub))
        yield Beamline(f"zmq://{hub}/beamline", link, stack, tmp_path, qmap)


class Beamline(Plane):
    def __init__(self, address, link, stack, folder, qmap):
        super().__init__(address, stack, folder, qmap)
        self.link = link
        self.detector = f"zmq+dectris://{free()}"

    def gateway(self, *options):
        gateway = super().gateway(self.detector, "--spool", "spool", "--keep", 0.001, *options)
        until_said(gateway, "taking frames")
        return gateway

    def workers(self, n=2):
        direct, self.address = self.address, self.address.replace(self.address.split("/")[2], self.link.address)
        workers = [self.worker("--checkpoint-every", "0.2 s") for _ in range(n)]
        self.address = direct
        for worker in workers:
            until_said(worker, "taking regions")
        return workers

    def send(self, frames, rate=RATE):
        return self.start("replay", frames, "--to", self.detector, "--rate", rate)

    def backfill(self, *options):
        to = ("--plane", self.address) if "--out" not in options else ()
        return self.start("backfill", "scan-7", "--source", "spool", "--qmap", self.qmap, *to, "--threads", 1, *options)

    def result(self, merger):
        out, err = merger.communicate(timeout=DEADLINE)
        assert merger.returncode == 0, err
        assert out.strip() == "result.h5"
        return of_frames(self.folder / "result.h5")

    def until_spooled(self):
        deadline = time.monotonic() + DEADLINE
        while not self.is_spooled():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def n_sent(self):
        return json.loads((self.folder / "status").read_text())["frames"]

    def is_spooled(self):
        try:
            with h5py.File(self.folder / "spool/scan-7/scan-7_master.h5", locking=False) as file:
                return "entry/exit_status" in file
        except OSError:
            return False


@contextmanager
def live(address):
    """Yield what waits for a ledger that is published live."""
    with ZmqResults(address.replace("zmq", "tcp")) as results:

        def wait(until):
            deadline = time.monotonic() + DEADLINE
            for message in results:
                assert time.monotonic() < deadline, "it did not come about"
                if isinstance(message, Result) and message.operator == "ledger" and until(message.arrays):
                    return message
            raise AssertionError("it ended")

        yield wait


@contextmanager
def documents_of(address):
    """Yield the documents that a Proxy gives out, as they come."""
    found, is_over = [], threading.Event()

    def listen():
        with ZmqDocuments(address) as documents:
            for document in documents:
                if document is not None:
                    found.append(document)
                if is_over.is_set():
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def test_a_link_cut_for_seconds_leaves_a_hole_that_the_spool_fills_bit_for_bit(beamline, frames, undisturbed):
    results = f"zmq://{free()}"
    with proxy() as (into, out), documents_of(out) as documents, live(results) as wait:
        options = ("--repair-within", "100 s", "--publish", results, "--documents", into.replace("tcp", "zmq+bluesky"))
        merger = beamline.merger(*options)
        gateway = beamline.gateway("--status", "status")
        beamline.workers()
        sender = beamline.send(frames, SLOW)
        wait(lambda ledger: ledger["received"] > 100)
        beamline.link.cut()
        enough = min(beamline.n_sent() + 900, LAST_LOOK)  # more than a ring has room for
        until(gateway, lambda: beamline.n_sent() > enough)
        sender.send_signal(signal.SIGSTOP)  # so that the run is not over before anybody has looked
        beamline.link.restore()
        after = wait(lambda ledger: ledger["lost"] > 0 and ledger["awaits_file"] == 0)
        assert after.n_frames < N_FRAMES, "live results go on"
        sender.send_signal(signal.SIGCONT)
        held = wait(lambda ledger: ledger["awaits_file"] == 1)
        assert not held.final
        finished(sender)
        assert merger.poll() is None
        assert not (beamline.folder / "result.h5").exists()
        lost = int(held.arrays["lost"])
        assert lost > 0
        assert held.arrays["received"] == N_FRAMES - lost
        beamline.until_spooled()
        _, said = finished(beamline.backfill("--checkpoint", "checkpoint"))
        assert f"of {REGIONS} from spool/scan-7/scan-7_master.h5, 2,500 frames" in said
        assert not (beamline.folder / "checkpoint").exists()
        assert_identical(beamline.result(merger), undisturbed)
        ledger = ledger_of(beamline.folder / "result.h5")
        assert (ledger["sent"], ledger["received"], ledger["lost"]) == (N_FRAMES, N_FRAMES, 0)
        assert ledger["plane"] == 1
        assert ledger["from_file"] >= lost
        assert ledger["repaired_regions"].size
        until(beamline.worker(), lambda: [name for name, _ in documents].count("stop"))
        names = [name for name, _ in documents]
        assert (names.count("start"), names.count("stop")) == (1, 1)


def test_with_a_link_cut_for_good_the_file_alone_gives_the_same_result(beamline, frames, undisturbed):
    results = f"zmq://{free()}"
    with live(results) as wait:
        merger = beamline.merger("--repair-within", "100 s", "--publish", results)
        beamline.gateway()
        beamline.workers()
        sender = beamline.send(frames)
        wait(lambda ledger: ledger["received"] > 300)
        beamline.link.cut()
        finished(sender)
        beamline.until_spooled()
        finished(beamline.backfill())
        assert_identical(beamline.result(merger), undisturbed)
        assert ledger_of(beamline.folder / "result.h5")["missing_regions"].size == 0


@pytest.mark.parametrize("kind", ["kafka", "zmq"])
def test_a_run_by_file_only_is_computed_from_its_spool(request, tmp_path, qmap, frames, undisturbed, kind):
    where = request.getfixturevalue("broker").bootstrap if kind == "kafka" else free()
    told = {"plane": "file", "why": "no nodes", "since": time.time()}
    (tmp_path / "plane").write_text(json.dumps(told))
    with ExitStack() as stack:
        address = f"{kind}://{where}/beamline-{uuid.uuid4().hex[:8]}"
        beamline = Beamline(address, stack.enter_context(Link(where)), stack, tmp_path, qmap)
        beamline.gateway("--plane", "plane")
        beamline.worker()
        merger = beamline.merger("--repair-within", "100 s", "--plane", "plane")
        finished(beamline.send(frames))
        beamline.until_spooled()
        finished(beamline.backfill("--regions", REGIONS))
        assert_identical(beamline.result(merger), undisturbed)
    ledger = ledger_of(tmp_path / "result.h5")
    assert (ledger["plane"], ledger["from_file"]) == (2, N_FRAMES)
    assert ledger["repaired_regions"].tolist() == list(range(REGIONS))


def test_frames_that_the_detector_lost_stay_lost_and_hold_up_nothing(beamline, tmp_path, qmap):
    frames = write_frames(tmp_path / "frames.h5", lost=range(700, 720))
    expected = result_of(frames, qmap, tmp_path / "expected.h5")
    merger = beamline.merger("--repair-within", "100 s")
    beamline.gateway("--keep", 1)
    beamline.workers()
    finished(beamline.send(frames))
    beamline.until_spooled()
    until_said(merger, "run scan-7 lost frames: held open")
    _, said = finished(beamline.backfill())
    assert "spool/scan-7/scan-7_master.h5 has no more frames than came of region 0, 1, 2, 3" in said
    assert_identical(beamline.result(merger), expected)
    ledger = ledger_of(tmp_path / "result.h5")
    assert ledger["lost_spans"].tolist() == [[700, 720]]
    assert ledger["repaired_regions"].size == 0


def test_killed_and_started_again_a_backfill_goes_on_and_gives_the_same_result(beamline, frames, undisturbed):
    merger = beamline.merger("--repair-within", "100 s")
    beamline.gateway()
    sender = beamline.send(frames)
    finished(sender)
    beamline.until_spooled()
    options = ("--regions", REGIONS, "--checkpoint", "checkpoint", "--checkpoint-every", "1 ms")
    killed = beamline.backfill(*options)
    until_saved(killed, beamline.folder / "checkpoint", 100)
    killed.kill()
    assert killed.wait(DEADLINE) == -signal.SIGKILL
    _, said = finished(beamline.backfill(*options))
    assert "goes on at frame" in said
    assert_identical(beamline.result(merger), undisturbed)


def test_told_to_stop_it_publishes_nothing_and_says_that_it_is_not_done(beamline, frames):
    beamline.gateway()
    finished(beamline.send(frames))
    beamline.until_spooled()
    options = ("--regions", REGIONS, "--checkpoint", "checkpoint", "--checkpoint-every", "1 ms")
    stopped = beamline.backfill(*options)
    until_saved(stopped, beamline.folder / "checkpoint", 100)
    stopped.terminate()
    _, err = stopped.communicate(timeout=DEADLINE)
    assert stopped.returncode == 75
    assert "stopped before it was repaired" in err


def test_a_result_file_with_a_hole_is_replaced_by_one_of_all_frames_and_then_left_alone(
    tmp_path, qmap, frames, undisturbed
):
    holey = write_frames(tmp_path / "holey.h5", lost=range(100, 900))
    out = tmp_path / "result.h5"
    result_of(holey, qmap, out)
    command = ("backfill", "scan-7", "--source", frames, "--qmap", qmap, "--out", out)
    said = xpcs_stream(*command)
    assert said.exit_code == 0, said.output
    assert "1,700 frames before, 2,500 of 2,500 now" in said.output
    assert_identical(of_frames(out), undisturbed)
    ledger = ledger_of(out)
    assert (ledger["plane"], ledger["from_file"], ledger["lost"]) == (2, 800, 0)
    before = out.read_bytes()
    said = xpcs_stream(*command)
    assert said.exit_code == 0
    assert "nothing to repair" in said.output
    assert xpcs_stream("backfill", "scan-7", "--source", holey, *command[4:]).exit_code == 0
    assert out.read_bytes() == before


def test_a_file_with_fewer_frames_than_a_result_does_not_replace_it(tmp_path, qmap):
    streamed = write_frames(tmp_path / "streamed.h5", lost=range(100, 200))
    fewer = write_frames(tmp_path / "fewer.h5", lost=range(1000, 2000))
    out = tmp_path / "result.h5"
    result_of(streamed, qmap, out)
    before = out.read_bytes()
    said = xpcs_stream("backfill", "scan-7", "--source", fewer, "--qmap", qmap, "--out", out)
    assert said.exit_code == 0, said.output
    assert "nothing to repair" in said.output
    assert out.read_bytes() == before


def test_a_sink_that_was_away_has_the_repaired_result_after_a_restart_though_the_file_is_there(tmp_path, qmap, frames):
    out = tmp_path / "result.h5"
    result_of(write_frames(tmp_path / "holey.h5", lost=range(100, 900)), qmap, out)
    roimap = read(qmap)
    make = lambda start: [MultiTau(start, roimap), Scattering(start, roimap), Intensity(start, roimap)]  # noqa: E731

    def repair(sink):
        with Hdf5Sink(out, qmap=roimap.arrays()) as to_file:
            return recompute(
                "scan-7",
                look(frames, "scan-7"),
                out,
                make,
                [to_file, sink],
                saved=tmp_path / "checkpoint",
                checkpoint_every=30,
                publish_every=1,
                say=lambda _: None,
                stop=threading.Event(),
            )

    with pytest.raises(SinkError):
        repair(ListSink(refuse=lambda output: getattr(output, "final", False)))
    assert ledger_of(out)["received"] == N_FRAMES
    sink = ListSink()
    assert repair(sink)
    assert [type(each).__name__ for each in (sink.outputs[0], sink.outputs[-1])] == ["RunStart", "RunStop"]
    for ledger in (ledger_of(out), sink.results(final=True)["scan-7", "ledger"]):
        assert (ledger["received"], ledger["from_file"]) == (N_FRAMES, 800)
    assert repair(ListSink())
    assert not (tmp_path / "checkpoint").exists()


def test_a_result_without_a_ledger_is_not_replaced_but_named(tmp_path, qmap, frames):
    out = tmp_path / "result.h5"
    result_of(frames, qmap, out)
    with h5py.File(out, "a") as file:
        del file["xpcs/ledger/received"]
    said = xpcs_stream("backfill", "scan-7", "--source", frames, "--qmap", qmap, "--out", out)
    assert said.exit_code == 1
    assert "result.h5: its ledger cannot be read" in said.output


def test_a_log_that_is_gone_with_its_gateway_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr("stream.backfill.PATIENCE", 0.5)
    address = f"tcp://{free()}"

    def gateway():
        return Hub(address, "beamline", 1, ring_bytes=10**6)

    first = gateway()

    class Results(HubResults):
        def __iter__(self):
            first.__exit__(None, None, None)
            with gateway() as second:
                for part in Regions(1).cut(make_start()):
                    second.append(PARTIALS, encode(part), must_stay=True)
                yield from super().__iter__()

    class Replaced(ZmqPlane):
        def results(self):
            return Results(self._hub(), PARTIALS)

    with pytest.raises(SourceError, match="plane of beamline: the end of the log"):
        published(Replaced(address, "beamline"), "run-1", threading.Event())


def test_of_a_spool_the_file_of_the_run_is_found(tmp_path, frames):
    for run in ("scan-7", "scan-8"):
        (tmp_path / run).mkdir()
        master = tmp_path / run / f"{run}_master.h5"
        with h5py.File(master, "w") as file:
            file["entry/entry_identifier"] = run
        (tmp_path / run / f".{master.name}").write_bytes(b"of a gateway that was killed while it wrote")
        assert find(tmp_path / run, run) == master
        assert find(tmp_path, run) == master
    assert find(frames, "scan-7") == frames
    with pytest.raises(ConfigError, match="one file of run scan-9 is needed: there is none"):
        find(tmp_path, "scan-9")


spans = st.sets(st.integers(0, 30)).map(
    lambda edges: np.array(sorted(edges)[: len(edges) // 2 * 2], int).reshape(-1, 2)
)


@given(spans, st.integers(31, 40))
def test_the_ledger_of_a_file_is_of_the_frames_that_are_in_it(of_file, n_frames):
    def frames_in(ranges):
        return {frame for first, stop in ranges.tolist() for frame in range(first, stop)}

    file = RunFile(path=Path("file"), start=make_start(), n_frames=n_frames, lost=of_file, is_all=True)
    assert file.received == n_frames - len(frames_in(of_file))
    ledger = file.ledger()
    assert (ledger["sent"], ledger["received"], ledger["lost"]) == (n_frames, file.received, len(frames_in(of_file)))
    assert frames_in(ledger["lost_spans"]) == frames_in(of_file)


def test_a_file_of_another_run_is_refused(tmp_path, qmap, frames):
    said = xpcs_stream("backfill", "scan-8", "--source", frames, "--qmap", qmap, "--out", tmp_path / "out.h5")
    assert said.exit_code == 1
    assert "is of run scan-7, not of scan-8" in said.output
    said = xpcs_stream("backfill", "scan-8", "--source", tmp_path, "--qmap", qmap, "--out", tmp_path / "out.h5")
    assert "one file of run scan-8 is needed: there is none" in said.output
    said = xpcs_stream("backfill", "scan-7", "--source", frames, "--qmap", qmap)
    assert said.exit_code == 2
