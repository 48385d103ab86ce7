"""What a gateway tells of itself, and that it lets itself be told which way frames go."""

import json
import signal
import time
import uuid
from contextlib import ExitStack
from urllib.request import urlopen

import h5py
import pytest

from stream.delivery import Delivery
from stream.gateway_runs import GatewayRuns
from stream.gateway_status import MOST_RUNS, GatewayStatus
from stream.plane_file import MAX_BYTES, PlaneFile, Told
from stream.sinks.spool import Spool
from tests.kafka import free_ports
from tests.plane import DEADLINE, REGIONS, Plane, until_said
from tests.test_command_line import finished
from tests.test_kill import COUNTS, N_FRAMES, assert_identical, frames, free, qmap, result_of_frames, until
from tests.test_spool import CHUNKS, START, batch, run_of, stop, without

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap"]

FRAME_BYTES = COUNTS[0].nbytes // REGIONS
"""Of a region."""


def tell(path, plane, why="so", since=1.0):
    """Say which way frames go, as the manager does."""
    temporary = path.with_name("told.tmp")
    temporary.write_text(json.dumps({"plane": plane, "why": why, "since": since}))
    temporary.replace(path)


class Gateway:
    """A gateway in a process of its own, to which files are replayed."""

    def __init__(self, plane, *options, keep=1.0):
        self.plane, self.folder = plane, plane.folder
        self.told, self.path = self.folder / "told.json", self.folder / "gateway.json"
        self.address = f"zmq://{free()}"
        self.process = plane.gateway(
            self.address, "--status", self.path, "--plane", self.told, "--keep", keep, *options
        )
        until(self.process, lambda: self.path.exists())

    @property
    def status(self):
        return json.loads(self.path.read_text())

    def until(self, is_so):
        until(self.process, lambda: is_so(self.status))
        return self.status

    def replay(self, frames, *how):
        return self.plane.start("replay", frames, "--to", self.address, *(how or ("--rate", "2 kHz")))

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=DEADLINE)
        return said


@pytest.fixture
def plane(tmp_path, qmap):
    with ExitStack() as stack:
        yield Plane(f"zmq://{free()}/beamline", stack, tmp_path, qmap)


def test_a_gateway_tells_that_nothing_is_on(plane):
    assert Gateway(plane, "--spool", "spool").status == {
        "run": None,
        "frames": 0,
        "frames_per_s": 0.0,
        "bytes_per_s": 0.0,
        "plane": "stream",
        "why": "",
        "ack_lag_s": 0.0,
        "lost": 0,
        "lost_in_all": 0,
        "spool": {"directory": str(plane.folder / "spool"), "lost": 0, "full_in_s": None, "held_bytes": 0},
        "runs": [],
    }


def test_while_nobody_takes_frames_they_get_older_and_what_has_no_room_is_lost(plane, frames):
    gateway = Gateway(plane, "--spool", "spool", keep=500 * FRAME_BYTES / 1e9)
    sender = gateway.replay(frames, "--rate", "500 Hz")
    now = gateway.until(lambda told: told["run"] and told["frames_per_s"] > 0)
    assert now["run"] == "scan-7"
    assert now["bytes_per_s"] == pytest.approx(now["frames_per_s"] * COUNTS[0].nbytes)
    finished(sender)
    over = gateway.until(lambda told: told["runs"] and told["runs"][0]["ended"])
    assert over["run"] is None
    assert over["lost"] == over["lost_in_all"] > 0
    assert gateway.until(lambda told: told["ack_lag_s"] > 2)["ack_lag_s"] < DEADLINE
    [run] = over["runs"]
    directory = plane.folder / "spool/scan-7"
    assert {name: run[name] for name in run if name not in ("began", "bytes", "files")} == {
        "run": "scan-7",
        "path": str(directory),
        "ended": True,
        "exit_status": "success",
        "frames": N_FRAMES,
        "spooled": N_FRAMES,
        "unsent": 0,
        "lost": over["lost"],
        "planes": ["stream"],
        "unsafe": True,
        "safe": False,
    }
    assert sorted(run["files"]) == sorted(path.name for path in directory.glob("*.h5"))
    assert run["bytes"] == over["spool"]["held_bytes"] == sum(path.stat().st_size for path in directory.iterdir())
    (directory / "safe").touch()
    assert gateway.until(lambda told: told["runs"][0]["safe"])


def test_frames_that_a_killed_worker_had_not_safe_age_until_another_one_has_them(plane, frames):
    gateway = Gateway(plane)
    first = plane.worker("--checkpoint-every", "0.2 s")
    until_said(first, "taking regions")
    sender = gateway.replay(frames, "--rate", "300 Hz")
    gateway.until(lambda told: told["frames"] > 300 and told["ack_lag_s"] < 2)
    first.kill()
    gateway.until(lambda told: told["ack_lag_s"] > 4)
    plane.worker("--checkpoint-every", "0.2 s")
    finished(sender)
    over = gateway.until(lambda told: told["run"] is None and told["ack_lag_s"] == 0)
    assert (over["lost"], over["runs"][0]["unsafe"]) == (0, False)


def test_by_file_only_workers_hear_of_the_run_and_the_spool_has_its_frames(plane, frames, tmp_path, qmap):
    gateway = Gateway(plane, "--spool", "spool")
    tell(gateway.told, "file", "no pilot heard of for 31 s")
    assert gateway.until(lambda told: told["plane"] == "file")["why"] == "no pilot heard of for 31 s"
    plane.worker()
    merger = plane.merger()
    finished(gateway.replay(frames))
    result = plane.result(merger)
    assert (result["xpcs/ledger/sent"], result["xpcs/ledger/received"]) == (N_FRAMES, 0)
    [run] = gateway.until(lambda told: told["runs"] and told["runs"][0]["ended"])["runs"]
    assert (run["frames"], run["unsent"], run["spooled"]) == (N_FRAMES,) * 3
    assert run["planes"] == ["file"]
    assert 'frames go by "file": no pilot heard of for 31 s' in gateway.end()


def test_in_the_middle_of_a_run_frames_go_another_way_at_once_and_back(plane, frames, tmp_path, qmap):
    gateway = Gateway(plane, "--spool", "spool")
    plane.worker("--checkpoint-every", "0.2 s")
    merger = plane.merger()
    sender = gateway.replay(frames, "--rate", "300 Hz")
    gateway.until(lambda told: told["frames"] > 500)
    tell(gateway.told, "file")
    gateway.until(lambda told: told["runs"][0]["unsent"] > 300)
    assert gateway.until(lambda told: told["ack_lag_s"] == 0)["plane"] == "file", "nothing that was sent is not safe"
    gateway.told.unlink()
    gateway.until(lambda told: told["plane"] == "stream")
    finished(sender)
    result = plane.result(merger)
    [run] = gateway.until(lambda told: told["runs"][0]["ended"])["runs"]
    assert run["planes"] == ["stream", "file"]
    assert run["lost"] == 0
    assert result["xpcs/ledger/lost"] == run["unsent"] > 300
    [[begin, end]] = result["xpcs/ledger/lost_spans"]
    came = [*range(begin), *range(end, N_FRAMES)]
    assert len(came) > 1000
    expected = without(result_of_frames(tmp_path, qmap, came), "xpcs/ledger", "xpcs/metadata", "entry/instrument")
    assert_identical(without(result, "xpcs/ledger", "xpcs/metadata", "entry/instrument"), expected)


def test_without_a_spool_frames_are_streamed_whatever_is_told(plane, frames):
    gateway = Gateway(plane)
    tell(gateway.told, "file")
    now = gateway.until(lambda told: told["why"])
    assert (now["plane"], now["why"]) == ("stream", "told to go by file only, but there is no --spool")
    finished(gateway.replay(frames, "--as-fast-as-possible"))
    [run] = gateway.until(lambda told: told["runs"] and told["runs"][0]["ended"])["runs"]
    assert (run["path"], run["unsent"], run["planes"], run["exit_status"]) == (None, 0, ["stream"], "success")
    assert gateway.end().count("told to go by file only, but there is no --spool: frames are streamed") == 1


def test_what_an_earlier_gateway_spooled_is_told_of_and_which_way_it_went(plane, frames):
    first = Gateway(plane, "--spool", "spool")
    tell(first.told, "stream+file")
    finished(first.replay(frames, "--as-fast-as-possible"))
    first.until(lambda told: told["runs"] and told["runs"][0]["ended"])
    sender = first.replay(frames, "--rate", "300 Hz")
    before = first.until(lambda told: len(told["runs"]) == 2 and len(told["runs"][1]["files"]) > 1)
    first.process.kill()
    first.process.wait(DEADLINE)
    sender.kill()
    first.path.unlink()
    again = Gateway(Plane(f"zmq://{free()}/beamline", plane.stack, plane.folder, plane.qmap), "--spool", "spool")
    whole, broken = again.until(lambda told: len(told["runs"]) == 2)["runs"]
    assert before["runs"][0]["unsafe"]
    assert whole == before["runs"][0] | {"lost": 1, "unsafe": False}, "what no worker had safe is gone"
    assert whole["planes"] == ["stream+file"]
    assert (broken["ended"], broken["exit_status"], broken["planes"]) == (True, None, ["stream+file"])
    assert again.status["run"] is None


@pytest.fixture
def told(tmp_path):
    return tmp_path / "told.json"


def test_what_is_told_is_known_once_it_is_there_and_forgotten_with_it(told):
    file = PlaneFile(told, every=0.0)
    assert file.look() == Told("stream", "", 0.0)
    tell(told, "file", "because\nof  this", 12.5)
    assert file.look() == Told("file", "because of this", 12.5)
    told.unlink()
    assert file.look() == Told("stream", "", 0.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "Expecting value"),
        ("[1]", "not a JSON object"),
        ('{"plane": "train"}', "plane 'train' is not one of stream, stream+file, file"),
        ('{"plane": ["file"]}', "is not one of"),
        ('{"plane": "stream", "why": 7}', "why '7' is not text"),
        ('{"plane": "stream", "since": "now"}', "since 'now' is not a time"),
        ('{"plane": "stream", "since": NaN}', "since 'nan' is not a time"),
        ('{"plane": "stream", "since": true}', "since 'True' is not a time"),
        ("[" * 10_000, "recursion"),
        (" " * MAX_BYTES + '{"plane": "stream"}', "more than 16,384 bytes"),
        ('{"plane": "\udc80"}', "utf-8"),
    ],
)
def test_what_cannot_be_understood_changes_nothing_and_is_complained_of_once(told, caplog, text, complaint):
    file = PlaneFile(told, every=0.0)
    tell(told, "file")
    file.look()
    told.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert [file.look().plane for _ in range(5)] == ["file"] * 5
    [record] = caplog.records
    assert complaint in record.message
    tell(told, "stream+file")
    assert file.look().plane == "stream+file"


def test_a_folder_where_the_file_should_be_is_complained_of_once(told, caplog):
    told.mkdir()
    file = PlaneFile(told, every=0.0)
    assert [file.look().plane for _ in range(5)] == ["stream"] * 5
    assert [record.message for record in caplog.records] == [f'{told}: is not a file; frames still go by "stream"']


@pytest.fixture
def spool(tmp_path):
    with Spool(tmp_path / "spool", keep_bytes=10**9) as spool:
        yield spool


def shown(spool, runs, *messages):
    """Show messages to both, as a gateway does; return which were to be sent."""
    sent = []
    for message in messages:
        spool.write(message)
        sent.append(runs.is_sent(message))
    spool.flush()
    return sent


def test_a_spool_that_loses_frames_ends_file_only_until_that_is_told_anew(spool, told, caplog):
    runs = GatewayRuns(PlaneFile(told, every=0.0), spool)
    tell(told, "file")
    assert shown(spool, runs, START, batch(0, 10)) == [True, False]
    other = batch(10, 20, run="run-0")  # which the spool does not take
    shown(spool, runs, other)
    assert shown(spool, runs, batch(10, 20), batch(20, 30)) == [True, True]
    assert (runs.plane, runs.why) == ("stream+file", "told to go by file only, but the spool lost 10 frames")
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    tell(told, "file", since=2.0)
    assert shown(spool, runs, batch(30, 40), stop()) == [False, True]
    assert runs.runs[-1].unsent == 20
    assert runs.runs[-1].ways() == ["stream+file", "file"]


class Elsewhere:
    """Workers that have lost and not yet taken something."""

    def __init__(self, lag, lost):
        self.said = Delivery(lag=lag, lost=lost)

    def delivery(self):
        return self.said


def test_of_two_planes_the_longest_lag_is_told_and_all_losses(told):
    runs = GatewayRuns(None, None)
    runs.is_sent(START)
    status = GatewayStatus(None, runs, [Elsewhere(1.0, {1: 2}), Elsewhere(3.0, None), Elsewhere(None, {1: 5})], None)
    now = status.told()
    assert (now["ack_lag_s"], now["lost"], now["lost_in_all"]) == (3.0, 7, 7)
    runs.is_sent(stop())
    runs.is_sent(START)
    now = status.told()
    assert (now["lost"], now["lost_in_all"]) == (0, 7)
    assert [run["lost"] for run in now["runs"]] == [7, 0]
    now = GatewayStatus(None, runs, [Elsewhere(None, None)], None).told()
    assert (now["ack_lag_s"], now["lost"], now["lost_in_all"], now["runs"][0]["lost"]) == (None,) * 4


def test_a_run_that_never_stopped_is_over_when_another_one_begins(told):
    runs = GatewayRuns(None, None)
    for name in "ab":
        runs.is_sent(run_of(name)[0])
    first, second = GatewayStatus(None, runs, [], None).told()["runs"]
    assert (first["ended"], first["exit_status"], second["ended"]) == (True, None, False)


def test_a_spool_is_full_once_what_is_neither_free_nor_safe_is_written(tmp_path):
    one = sum(map(len, CHUNKS.chunks))
    with Spool(tmp_path / "spool", keep_bytes=10 * one) as spool:
        runs = GatewayRuns(None, spool)
        status = GatewayStatus(None, runs, [], spool)
        began = time.monotonic()
        for name in "ab":
            shown(spool, runs, *run_of(name))
        status.told()  # which way they went is written beside them
        now = status.told()["spool"]
        rate = spool.written / (time.monotonic() - began)
        assert now["full_in_s"] == pytest.approx((10 * one - now["held_bytes"]) / rate, rel=0.5)
        (tmp_path / "spool/a/safe").touch()
        later = status.told()["spool"]
        assert later["held_bytes"] == now["held_bytes"]
        assert later["full_in_s"] > now["full_in_s"] * 10 / 9


def test_more_runs_than_are_told_of_leave_out_the_oldest_that_are_safe(tmp_path, spool):
    runs = GatewayRuns(None, spool)
    status = GatewayStatus(None, runs, [], spool)
    for i in range(MOST_RUNS + 5):
        shown(spool, runs, *run_of(f"run-{i}", n=1))
        if i % 2:
            (tmp_path / f"spool/run-{i}/safe").touch()
    found = [run["run"] for run in status.told()["runs"]]
    assert found == [f"run-{i}" for i in range(MOST_RUNS + 5) if i % 2 == 0 or i > 9]


def test_what_others_put_into_the_spool_does_not_end_the_status(tmp_path, spool):
    for name, what in {"group": None, "list": ["x", "y"], "number": 7}.items():
        (spool.directory / name).mkdir()
        with h5py.File(spool.directory / name / f"{name}_master.h5", "w") as file:
            if what is None:
                file.create_group("entry/entry_identifier")
            else:
                file["entry/entry_identifier"] = what
    told = GatewayStatus(None, GatewayRuns(None, spool), [], spool).told()
    assert {run["path"] for run in json.loads(json.dumps(told))["runs"]} == {
        str(spool.directory / name) for name in ("group", "list", "number")
    }


def test_runs_are_told_of_though_nothing_can_be_written_beside_them(tmp_path, spool, caplog):
    runs = GatewayRuns(None, spool)
    for message in (START, batch(0, 40), stop()):
        runs.is_sent(message)
        spool.write(message)
    spool.flush()
    (spool.directory / START.run / f"{START.run}_way.json").mkdir()  # as good as a full disk
    status = GatewayStatus(None, runs, [], spool)
    for _ in range(2):
        told = status.told()
        assert [(run["run"], run["spooled"], run["planes"]) for run in told["runs"]] == [(START.run, 40, ["stream"])]
        assert told["spool"]["held_bytes"] > 0
    assert caplog.text.count("cannot be written") == 1


def test_a_run_that_is_being_written_is_not_over_and_its_files_change(tmp_path, spool):
    runs = GatewayRuns(None, spool)
    status = GatewayStatus(None, runs, [], spool)
    shown(spool, runs, START, batch(0, 10))
    [run] = status.told()["runs"]
    assert (run["ended"], run["frames"], len(run["files"])) == (False, 10, 2)
    shown(spool, runs, batch(10, 20))
    [run] = status.told()["runs"]
    assert (run["frames"], len(run["files"])) == (20, 3)
    shown(spool, runs, stop())
    [run] = status.told()["runs"]
    assert (run["ended"], run["exit_status"], run["spooled"]) == (True, "success", 20)
    with h5py.File(tmp_path / "spool/run-1" / run["files"][-1]) as master:
        assert "entry/ledger" in master


def test_a_spool_whose_disk_is_gone_is_full_and_stops_nobody(tmp_path, spool, caplog):
    runs = GatewayRuns(None, spool)
    status = GatewayStatus(None, runs, [], spool)
    (tmp_path / "spool").rename(tmp_path / "elsewhere")
    for _ in range(3):
        assert status.told()["spool"] | {"directory": ""} == {
            "directory": "", "lost": 0, "full_in_s": 0.0, "held_bytes": None
        }  # fmt: skip
    assert len(caplog.records) == 1


def test_over_kafka_the_lag_is_that_of_what_workers_have_committed(broker, frames, tmp_path, qmap):
    with ExitStack() as stack:
        there = Plane(f"kafka://{broker.bootstrap}/beamline-{uuid.uuid4().hex[:8]}", stack, tmp_path, qmap)
        [port] = free_ports(1)
        gateway = Gateway(there, "--metrics", port)
        finished(gateway.replay(frames))
        waiting = gateway.until(lambda told: told["run"] is None and (told["ack_lag_s"] or 0) > 4)
        assert waiting["lost"] is None
        there.worker("--checkpoint-every", "0.2 s")
        gateway.until(lambda told: told["ack_lag_s"] == 0)
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            told = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if "_kafka_" in line)
        of_kafka = f'{{to="{there.address}"}}'
        assert told[f"xpcs_gateway_kafka_failed_records_total{of_kafka}"] == "0.0"
        assert told[f"xpcs_gateway_kafka_waiting_records{of_kafka}"] == "0.0"
        assert float(told[f"xpcs_gateway_kafka_delivered_records_total{of_kafka}"]) > REGIONS
