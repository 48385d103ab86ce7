"""What is made of the file in which a gateway tells how it is, whatever is in it, and what it is told."""

import json
import os
import time
from threading import Event

import pytest

from hpc_bridge.bulk_files import in_order, run_of
from hpc_bridge.bulk_gateway import MAX_BYTES, Gateway, Nodes, Watch
from hpc_bridge.errors import ConfigError
from hpc_bridge.switch import Switching
from stream.gateway_runs import GatewayRuns
from stream.gateway_status import GatewayStatus
from stream.sinks.spool import Spool
from tests.test_gateway_status import Elsewhere, shown
from tests.test_spool import run_of as messages_of

RUN = {"run": "one", "path": "/spool/one", "files": ["one_data_000001.h5", "one_master.h5"], "ended": True, "lost": 1}


class Told:
    """A gateway and its manager, by a clock of ours."""

    def __init__(self, folder, **settings):
        self.status, self.plane, self.settings = folder / "status.json", folder / "plane", settings
        self.now = 1e9
        self.new()

    def new(self, send="lost"):
        self.gateway = Gateway("8idi", self.status, self.plane, Switching(**self.settings), send)

    def tell(self, *runs, **more):
        spool = {"directory": "/spool", "lost": 0, "full_in_s": 1e6}
        told = {"ack_lag_s": 0.0, "lost_in_all": 0, "spool": spool, "runs": runs, **more}
        temporary = self.status.with_suffix(".new")
        temporary.write_text(json.dumps(told))
        temporary.replace(self.status)

    def look(self, heard_ago=0.0, *, seconds=1.0, is_wanted=True, fresh=True):
        self.now += seconds
        if fresh and self.status.exists():
            os.utime(self.status, (self.now, self.now))
        heard_at = None if heard_ago is None else self.now - heard_ago
        return self.gateway.look(self.now, heard_at=heard_at, is_wanted=is_wanted)

    def said(self):
        return json.loads(self.plane.read_text())


@pytest.fixture
def told(tmp_path):
    return Told(tmp_path)


@pytest.mark.parametrize(
    ("changes", "goes"),
    [
        ({}, True),
        ({"lost": 0}, False),
        ({"lost": None}, False),
        ({"lost": 0, "planes": ["stream"]}, False),
        ({"lost": 0, "planes": ["stream", "stream+file"]}, True),
        ({"lost": 0, "unsent": 0, "planes": ["stream", "stream+file"]}, False),
        ({"lost": 0, "unsent": 7, "planes": ["file"]}, True),
        ({"lost": None, "planes": ["file"]}, True),
        ({"lost": None, "unsent": 0, "planes": ["stream", "stream+file"]}, True),
        ({"lost": None, "unsent": 0, "planes": ["stream"]}, False),
        ({"lost": 0, "unsent": 0, "exit_status": "success"}, False),
        ({"lost": 0, "unsent": 0, "exit_status": None}, True),
        ({"lost": 0, "unsent": 0, "exit_status": None, "ended": False}, False),
        ({"ended": False}, False),
        ({"safe": True}, False),
        ({"path": None}, False),
        ({"files": []}, False),
        ({"path": "/etc/one"}, False),
        ({"path": "/spool/../etc"}, False),
        ({"path": "/spool"}, False),
        ({"path": "/spool/one\0"}, False),
        ({"files": ["/etc/passwd"]}, False),
        ({"files": ["one_master.h5", "../../etc/passwd"]}, False),
        ({"files": ["one\nmaster.h5"]}, False),
    ],
)
def test_runs_go_by_file_that_ended_and_did_not_all_come_through_the_stream(told, changes, goes):
    told.tell(RUN | changes)
    assert [noticed.run for noticed in told.look()] == (["one"] if goes else [])


def test_all_runs_go_where_all_are_sent_and_only_what_was_lost_is_repaired(told):
    told.new("always")
    told.tell(RUN, RUN | {"run": "two", "path": "/spool/two", "lost": 0})
    assert [(noticed.run, noticed.lost) for noticed in told.look()] == [("one", True), ("two", False)]


def test_a_run_is_told_of_once_and_once_more_when_a_loss_shows_later(told):
    told.new("always")
    told.tell(RUN | {"lost": 0})
    assert [noticed.lost for noticed in told.look()] == [False]
    assert told.look() == []
    told.tell(RUN)
    assert [noticed.lost for noticed in told.look()] == [True]
    assert told.look() == []


def test_a_loss_that_shows_once_a_run_was_sent_and_is_safe_is_still_told_of(told):
    told.new("always")
    told.tell(RUN | {"lost": 0})
    told.look()
    told.tell(RUN | {"safe": True})
    assert [noticed.lost for noticed in told.look()] == [True]


def test_what_workers_do_not_have_safe_waits_for_them_while_all_is_well_and_goes_by_file_when_they_are_gone(told):
    told.tell(RUN | {"lost": 0, "unsafe": True})
    assert told.look() == []
    assert [noticed.lost for noticed in told.look(6.0)] == [True]


def test_the_file_that_is_opened_comes_first(told):
    told.tell(RUN)
    [noticed] = told.look()
    assert [file.name for file in noticed.files] == ["one_master.h5", "one_data_000001.h5"]


def test_what_a_real_gateway_tells_is_understood(told, tmp_path):
    with Spool(tmp_path / "spool", keep_bytes=10**9) as spool:
        runs = GatewayRuns(None, spool)
        shown(spool, runs, *messages_of("a"))
        said = GatewayStatus(None, runs, [Elsewhere(0.0, {1: 3})], spool).told()
    told.status.write_text(json.dumps(said))
    [noticed] = told.look()
    assert (noticed.run, noticed.lost, str(noticed.folder)) == ("a", True, str(tmp_path / "spool/a"))
    assert [file.name for file in noticed.files] == ["a_master.h5", "a_data_000001.h5"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"ack_lag_s": NaN}', b'{"lost_in_all": -1}',
        b'{"runs": [{"run": 5}]}', b'{"spool": {"directory": "/spool"}}', b" " * (MAX_BYTES + 1),
        b'{"runs": [' + b",".join([b'{"run": "a"}'] * 1001) + b"]}",
    ],
    ids=range(12),
)  # fmt: skip
def test_what_cannot_be_meant_is_no_news_and_said_once(told, content, caplog):
    told.tell(RUN)
    assert len(told.look()) == 1
    told.status.write_bytes(content)
    for _ in range(3):
        assert told.look() == []
    assert sum(str(told.status) in record.message for record in caplog.records) == 1
    assert len(caplog.records[-1].message) < 1000


def test_a_gateway_that_is_not_there_or_a_folder_in_its_place_is_no_news(told):
    assert told.look() == []
    told.status.mkdir()
    assert told.look() == []


def test_the_gateway_is_told_when_something_changes_and_why(told):
    told.tell()
    told.look()
    assert not told.plane.exists()
    told.look(6.0)
    assert told.said() == {"plane": "stream+file", "why": "no pilot heard of for 6 s", "since": told.now}


def test_nodes_that_are_wanted_and_do_not_come_are_waited_for_from_when_they_were_wanted(told):
    told.tell()
    told.look(None, is_wanted=False, seconds=1000)
    told.look(None)
    told.look(None, seconds=29)
    assert not told.plane.exists()
    told.look(None, seconds=2)
    assert "nodes have been wanted for 31 s and none serves" in told.said()["why"]


def test_losses_count_from_look_to_look_and_not_when_the_gateway_begins_anew(told):
    told.tell(lost_in_all=500)
    told.look()
    told.tell(lost_in_all=3)
    told.look()
    assert not told.plane.exists()
    told.tell(lost_in_all=5)
    told.look()
    assert told.said()["why"] == "2 records lost on the way to the workers"


def test_what_a_gateway_told_long_ago_is_not_how_it_is(told):
    told.tell(ack_lag_s=1000.0)
    os.utime(told.status, (told.now, told.now))
    told.look(seconds=11, fresh=False)
    assert not told.plane.exists()
    told.look()
    assert "no worker has the frames" in told.said()["why"]


def test_a_status_that_cannot_be_read_makes_what_was_told_before_no_younger(told):
    told.tell(ack_lag_s=1000.0)
    os.utime(told.status, (told.now - 60, told.now - 60))
    told.look(fresh=False)
    for _ in range(20):
        told.status.write_bytes(b"{")
        told.look()
    assert not told.plane.exists()


def test_a_clock_of_a_file_server_that_is_ahead_does_not_keep_a_dead_gateway_alive(told):
    told.tell()
    os.utime(told.status, (told.now + 3600, told.now + 3600))
    told.look(None, fresh=False)
    told.look(None, seconds=200.0, fresh=False)
    assert told.said()["plane"] == "stream+file"
    assert "not known whether the spool takes the frames" in told.said()["why"]


def test_a_plane_file_that_could_not_be_written_is_written_as_soon_as_it_can_be(told, caplog):
    told.plane = told.plane.parent / "not yet" / "plane"
    told.new()
    told.tell()
    for _ in range(3):
        told.look(6.0)
    assert caplog.text.count(f"{told.plane}: No such file or directory") == 1
    told.plane.parent.mkdir()
    told.look(6.0)
    assert told.said()["plane"] == "stream+file"


def test_a_status_on_a_disk_that_hangs_holds_up_nobody(tmp_path):
    class Hangs:
        def __init__(self):
            self.at, self.is_back = Event(), Event()

        def look(self, now, *, heard_at, is_wanted):
            self.at.set()
            self.is_back.wait(60)
            return []

    gateway = Hangs()
    watch = Watch(gateway, "8idi")
    watch.see(1.0, Nodes(heard_at=None, is_wanted=False))
    assert gateway.at.wait(60)
    watch.see(2.0, Nodes(heard_at=None, is_wanted=False))
    began = time.monotonic()
    watch.close(let_go=False)
    assert time.monotonic() - began < 10
    gateway.is_back.set()


def test_a_gateway_is_looked_at_until_it_is_let_go(told):
    told.tell(RUN)
    watch = Watch(told.gateway, "8idi")
    watch.see(time.time(), Nodes(heard_at=None, is_wanted=False))
    assert watch.noticed.get(timeout=30).run == "one"
    told.plane.write_text("{}")
    watch.close(let_go=False)
    assert told.plane.exists()
    watch = Watch(told.gateway, "8idi")
    watch.close(let_go=True)
    assert not told.plane.exists()


def test_a_manager_that_starts_again_changes_nothing_by_that(told):
    told.tell()
    told.look(6.0)
    told.new()
    assert told.gateway.switch.plane == "stream+file"
    told.look(6.0)
    assert told.said()["plane"] == "stream+file"


def test_a_beamline_that_is_let_go_streams(told):
    told.gateway.let_go()
    told.tell()
    told.look(6.0)
    told.gateway.let_go()
    assert not told.plane.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"plane": "boat"}', b"\xff", b"[" * 10_000])
def test_a_plane_file_that_cannot_be_meant_is_as_none(told, content):
    told.plane.write_bytes(content)
    told.new()
    assert told.gateway.switch.plane == "stream"


def test_a_spool_that_loses_frames_is_not_relied_on(told):
    spool = {"directory": "/spool", "lost": 0, "full_in_s": 1e6}
    for lost in range(100):
        told.tell(spool=spool | {"lost": lost})
        told.look(60.0)
    assert told.said()["plane"] == "stream+file"
    assert "the spool loses frames" in told.said()["why"]


def test_a_master_comes_with_its_parts_and_a_folder_with_all_its_files(tmp_path):
    for name in ("a_master.h5", "a_data_000002.h5", "a_data_000001.h5", "ab_data_000001.h5", "b.h5", ".c.h5", "d.txt"):
        (tmp_path / name).write_bytes(b"1")
    run, folder, files = run_of(tmp_path / "a_master.h5")
    assert (run, str(folder)) == ("a", str(tmp_path))
    assert [file.name for file in files] == ["a_master.h5", "a_data_000001.h5", "a_data_000002.h5"]
    assert [file.name for file in run_of(tmp_path / "b.h5")[2]] == ["b.h5"]
    assert run_of(tmp_path)[2][0].name == "a_master.h5"
    assert len(run_of(tmp_path)[2]) == 5
    with pytest.raises(ConfigError, match="No such file"):
        run_of(tmp_path / "gone.h5")


def test_files_whose_names_look_like_patterns_are_taken_as_they_are():
    assert in_order(["x[1]_data_1.h5", "x[1]_master.h5"])[0] == "x[1]_master.h5"


@pytest.mark.parametrize(
    ("spool", "trouble"),
    [
        ({"directory": "/spool", "lost": 0, "full_in_s": 1e6}, ""),
        ({"directory": "/spool", "lost": 0, "full_in_s": None}, ""),
        ({"directory": "/spool", "lost": 1234, "full_in_s": 1e6}, "the spool loses frames: 1,234 are in no file"),
        ({"directory": "/spool", "lost": 0, "full_in_s": 119.0}, "the spool is full in 119 s"),
        (None, "the gateway has no spool"),
    ],
)
def test_where_no_file_can_be_relied_on_it_is_said_until_that_is_over(told, caplog, spool, trouble):
    told.tell(spool=spool)
    for _ in range(3):
        told.look()
    assert told.gateway.trouble == trouble
    assert caplog.text.count("there is no fallback") == bool(trouble)
    told.tell(spool={"directory": "/spool", "lost": 0 if spool is None else spool["lost"], "full_in_s": 1e6})
    told.look(seconds=61.0)
    assert told.gateway.trouble == ""
    assert caplog.text.count("there is a fallback again") == bool(trouble)
