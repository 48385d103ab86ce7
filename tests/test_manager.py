"""A manager of nodes, from outside: what people ask for, what run engines tell, what goes wrong at sites."""

import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import pytest
import yaml

from hpc_bridge.config import Site
from hpc_bridge.control import NoManager, ask
from hpc_bridge.desk import Desk
from stream.curve import make
from stream.sinks.bluesky_zmq import ZmqDocuments
from tests.bridge import HERE, Bridge, processes, stand_in
from tests.kafka import free_ports
from tests.test_bluesky_transport import proxy

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def bridge_of(tmp_path):
    """Makes a `Bridge` on this machine."""
    with ExitStack() as stack:
        yield lambda command, **options: stack.enter_context(closing(Bridge(tmp_path, command, **options)))


def test_the_start_of_a_run_asks_for_nodes_and_some_time_after_its_stop_they_go(bridge_of):
    with proxy() as (into, out), ZmqDocuments(into) as documents:
        engine = out.replace("tcp", "zmq+bluesky")
        bridge = bridge_of(stand_in(), nodes=2, idle_nodes=1, max_nodes=2, linger="1 s", run_engine=engine)
        bridge.up()
        bridge.until_serving(1)
        documents.publish("one", "start", {"uid": "one"}, may_be_lost=False)
        bridge.until_serving(2)
        assert bridge.status()["runs"] == ["one"]
        documents.publish("one", "stop", {"run_start": "one"}, may_be_lost=False)
        bridge.until_serving(1)
        assert bridge.status()["runs"] == []


def test_a_run_that_began_before_a_manager_was_killed_still_has_its_nodes(bridge_of):
    with proxy() as (into, out), ZmqDocuments(into) as documents:
        engine = out.replace("tcp", "zmq+bluesky")
        bridge = bridge_of(stand_in(), nodes=1, max_nodes=1, run_engine=engine)
        manager = bridge.up()
        # Again until it is heard: the Proxy may not know of the manager yet.
        start = ("one", "start", {"uid": "one"})
        bridge.until(lambda: documents.publish(*start, may_be_lost=False) or bridge.status()["runs"] == ["one"])
        bridge.until_serving(1)
        manager.kill()
        manager.wait()
        bridge.up()
        bridge.until(lambda: bridge.status()["runs"] == ["one"] and bridge.status()["wanted"] == 1)


def test_a_site_that_cannot_be_reached_is_passed_by_for_the_next_one(bridge_of):
    bridge = bridge_of(stand_in(), nodes=1, max_nodes=1)
    away = bridge.site | {"site": "away", "scheduler": "slurm", "submit_through": ["false"]}
    bridge.beamline["sites"] = ["away", "here"]
    bridge.up("--site", bridge.write("away.yaml", away))
    [pilot] = bridge.until_serving(1)
    assert pilot["site"] == "here"
    assert "away cannot be reached" in bridge.run("status").stdout


def test_several_beamlines_have_nodes_of_one_site_and_one_is_let_go_without_the_other(bridge_of):
    bridge = bridge_of(stand_in(), nodes=2, max_nodes=2)
    manager = bridge.up()
    bridge.until_serving(2)
    other = bridge.beamline | {"beamline": "other", "nodes": 1}
    bridge.run("up", bridge.write("other.yaml", other), "--site", bridge.folder / "site.yaml")
    bridge.until(lambda: "serving" in bridge.run("status", "--json").stdout.split('"other"')[-1])
    bridge.run("down", bridge.name)
    reported = json.loads(bridge.run("status", "--json").stdout)["beamlines"]
    assert [len(each["pilots"]) for name, each in reported.items()] == [1]
    bridge.run("down")
    assert manager.wait(90) == 0


def test_there_is_one_manager_of_a_state_directory(bridge_of):
    bridge = bridge_of(stand_in(), nodes=0, max_nodes=1)
    manager = bridge.up()
    manager.send_signal(signal.SIGSTOP)  # it does not answer, and is there
    second = bridge.run("up", check=False)
    manager.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert "its manager did not answer" in second.stderr


def test_pilots_that_lag_behind_get_help_up_to_the_maximum(bridge_of):
    late = stand_in(lag=60.0)
    bridge = bridge_of(late, nodes=1, max_nodes=3, grow_at_lag="10 s", grow_after="1 s")
    bridge.up()
    bridge.until_serving(3)


def test_a_command_that_fails_again_and_again_is_not_tried_for_a_while_and_said(bridge_of):
    bridge = bridge_of(("false",), nodes=1, max_nodes=1)
    bridge.up()
    bridge.until(lambda: bridge.status()["passed_by"])
    [told] = bridge.status()["passed_by"]
    assert "3 pilots in a row did not last: the pilot ended with 1" in told["why"]
    assert str(bridge.folder / "jobs") in told["why"]
    assert bridge.log().count("asked of preemptable") == 3


def test_pilots_whose_manager_is_gone_for_good_end_by_themselves(bridge_of):
    bridge = bridge_of(stand_in(), nodes=2, max_nodes=2, site={"alone": "3 s"})
    manager = bridge.up()
    bridge.until_serving(2)
    manager.kill()
    manager.wait()
    bridge.until(lambda: not processes(f"--manager {bridge.site['heartbeats']['address']}"))


def with_keys(folder, heartbeats, dials):
    """Return what a site says of heartbeats that go this way, with keys."""
    for name in ("manager", "pilot"):
        make(folder / "keys", name)
    (folder / "keys/allowed").mkdir()
    (folder / "keys/allowed/pilot.key").write_bytes((folder / "keys/pilot.key").read_bytes())
    files = {"secret_key": "manager.key_secret", "manager_key": "manager.key", "pilot_secret_key": "pilot.key_secret"}
    told = {name: str(folder / "keys" / file) for name, file in (files | {"allowed": "allowed"}).items()}
    way = {name: heartbeats[name] for name in ("bind", "address") if dials == "pilots"}
    times = {name: heartbeats[name] for name in ("every", "lost_after")}
    return {"dials": dials, **told, **way, **times}


@pytest.mark.parametrize("dials", ["pilots", "manager"])
def test_a_manager_that_ends_leaves_its_pilots_to_the_next_one(bridge_of, dials):
    bridge = bridge_of(stand_in(), nodes=2, max_nodes=2)
    bridge.site["heartbeats"] = with_keys(bridge.folder, bridge.site["heartbeats"], dials)
    manager = bridge.up()
    before = {pilot["lease"] for pilot in bridge.until_serving(2)}
    manager.terminate()
    assert manager.wait(90) == 0
    bridge.up()
    assert {pilot["lease"] for pilot in bridge.until_serving(2)} == before


@pytest.mark.parametrize("dials", ["pilots", "manager"])
def test_whoever_dials_a_pilot_that_is_lost_is_replaced_and_at_the_end_nothing_is_left(bridge_of, dials):
    bridge = bridge_of(stand_in(), nodes=2, max_nodes=3, lost_after="3 s")
    bridge.site["heartbeats"] = with_keys(bridge.folder, bridge.site["heartbeats"], dials)
    bridge.up()
    lost, left = bridge.until_serving(2)
    for process in processes(f"--lease {lost['lease']}"):
        with suppress(ProcessLookupError):  # one of them may end with another
            os.kill(process, signal.SIGKILL)
    bridge.until(lambda: {pilot["lease"] for pilot in bridge.pilots()} - {lost["lease"], left["lease"]})
    bridge.until_serving(2)
    jobs = bridge.folder / "jobs"
    bridge.until(lambda: not list(jobs.glob(f"{lost['lease']}.address*")))
    bridge.down()
    assert list(jobs.glob("*.address*")) == []
    # On a busy machine this one may have been taken for lost, too: then nobody waits for its end.
    bridge.until(lambda: not processes(f"--lease {left['lease']}"))


@pytest.mark.parametrize(
    ("dials", "told"), [("pilots", "pilots dial tcp://127.0.0.1:"), ("manager", "the manager dials pilots")]
)
def test_a_site_is_proved_in_the_direction_in_which_it_dials(bridge_of, dials, told):
    bridge = bridge_of(stand_in(), nodes=1, max_nodes=1)
    bridge.site["heartbeats"] = with_keys(bridge.folder, bridge.site["heartbeats"], dials)
    files = (bridge.write("site.yaml", bridge.site), "--beamline", bridge.write("beamline.yaml", bridge.beamline))
    done = bridge.run("check", *files, "--run", "echo well", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert told in done.stdout
    assert "its node is heard of" in done.stdout
    assert list((bridge.folder / "jobs").glob("*.address*")) == []


@pytest.mark.parametrize(
    ("heartbeats", "words"),
    [
        ({"bind": "tcp://127.0.0.1:5570"}, "pilots dial: bind, where the manager listens, and address"),
        ({"dials": "manager", "address": "tcp://here:5570"}, "the manager dials: bind and address are for pilots"),
        ({"dials": "nobody"}, "heartbeats.dials: Input should be 'pilots' or 'manager'"),
        ({"dials": "manager", "listen": "tcp://hsn0:5570"}, "heartbeats.listen: String should match"),
    ],
)
def test_who_dials_is_said_unmistakably(bridge_of, heartbeats, words):
    bridge = bridge_of(stand_in(), nodes=1, max_nodes=1, site={"heartbeats": heartbeats})
    files = (bridge.write("beamline.yaml", bridge.beamline), "--site", bridge.write("site.yaml", bridge.site))
    done = bridge.run("up", *files, check=False)
    assert done.returncode == 1
    assert words in done.stderr


def test_in_the_background_it_is_the_same(bridge_of):
    bridge = bridge_of(stand_in(), nodes=1, max_nodes=1)
    files = (bridge.write("beamline.yaml", bridge.beamline), "--site", bridge.write("site.yaml", bridge.site))
    assert "writes" in bridge.run("up", "--detach", *files).stderr
    bridge.until_serving(1)
    watching = subprocess.Popen(bridge.words("watch", "--json", "--every", "0.1"), stdout=subprocess.PIPE, text=True)
    told = [json.loads(watching.stdout.readline()) for _ in range(2)]
    watching.terminate()
    watching.communicate()
    assert all(each["beamlines"][bridge.name]["wanted"] == 1 for each in told)
    bridge.down()
    assert bridge.status() is None


def test_no_job_knows_what_its_manager_knows(bridge_of, monkeypatch):
    key = os.urandom(8).hex()
    monkeypatch.setenv("SECRET_OF_THE_BEAMLINE", key)
    tell = "import os, sys; print(dict(os.environ), file=sys.stderr, flush=True); import signal; signal.pause()"
    bridge = bridge_of((HERE / "python", "-c", tell), nodes=1, max_nodes=1, environment={"GREETING": "hello world"})
    bridge.up()
    jobs = bridge.folder / "jobs"
    bridge.until(lambda: any("GREETING" in file.read_text() for file in jobs.glob("*.err")))
    assert not any(key in file.read_text(errors="replace") for file in jobs.iterdir())
    assert any("hello world" in file.read_text() for file in jobs.glob("*.err"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_nodes": 0}, "max_nodes: Input should be greater than or equal to 1"),
        ({"nodes": 5}, "nodes + spares (5) are more than max_nodes (2)"),
        ({"sites": ["nowhere"]}, "nothing is said of site nowhere"),
        (
            {"accounts": {"here": {"account": "a", "since": "last spring"}}},
            "accounts.here.since: Input should be a valid",
        ),
        ({"comand": "x"}, "comand: Extra inputs are not permitted"),
    ],
)
def test_a_mistake_in_a_file_is_named(bridge_of, change, words):
    bridge = bridge_of(stand_in(), nodes=1, max_nodes=2)
    bridge.beamline |= change
    files = (bridge.write("beamline.yaml", bridge.beamline), "--site", bridge.write("site.yaml", bridge.site))
    done = bridge.run("up", *files, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_credentials_that_others_may_read_are_refused(bridge_of, tmp_path):
    file = tmp_path / "key"
    file.write_text("secret")
    file.chmod(0o644)
    bridge = bridge_of(stand_in(), nodes=1, max_nodes=1, site={"credentials": [str(file)]})
    files = (bridge.write("beamline.yaml", bridge.beamline), "--site", bridge.write("site.yaml", bridge.site))
    done = bridge.run("up", *files, check=False)
    assert done.returncode == 1
    assert f"{file}: others may read them" in done.stderr


def test_a_manager_that_is_killed_when_the_account_is_nearly_spent_still_adopts_its_pilots(bridge_of):
    bridge = bridge_of(stand_in(), nodes=3, max_nodes=3, accounts={"here": {"account": "a", "node_hours": 0.5}})
    manager = bridge.up()
    lost, *_ = bridge.until_serving(3)
    manager.kill()
    manager.wait()
    for process in processes(f"--lease {lost['lease']}"):
        with suppress(ProcessLookupError):  # one of them may end with another
            os.kill(process, signal.SIGKILL)
    bridge.up_again()
    bridge.until(lambda: bridge.pilots())
    bridge.down()


def test_a_manager_that_begins_anew_in_the_middle_of_growth_lets_nobody_go(bridge_of):
    bridge = bridge_of(stand_in(lag=60.0), nodes=1, max_nodes=3, grow_at_lag="10 s", grow_after="0.5 s")
    manager = bridge.up()
    before = {pilot["lease"] for pilot in bridge.until_serving(3)}
    manager.kill()
    manager.wait()
    bridge.up_again()
    assert {pilot["lease"] for pilot in bridge.until_serving(3)} == before
    assert "no more wanted" not in bridge.log()


def test_a_site_may_be_held_with_other_settings_once_nobody_holds_it(bridge_of):
    bridge = bridge_of(stand_in(), nodes=1, max_nodes=1)
    bridge.up()
    other = bridge.beamline | {"beamline": "other", "sites": ["there"], "nodes": 0}
    [port] = free_ports(1)
    heartbeats = bridge.site["heartbeats"] | {"bind": f"tcp://127.0.0.1:{port}"}
    there = bridge.site | {"site": "there", "heartbeats": heartbeats, "directory": str(bridge.folder / "there")}
    for alone in ("30 s", "31 s"):
        files = (bridge.write("other.yaml", other), "--site", bridge.write("there.yaml", there | {"alone": alone}))
        bridge.run("up", *files)
        bridge.run("down", "other")


def test_two_sites_that_share_an_address_share_its_keys(bridge_of, tmp_path):
    bridge = bridge_of(stand_in(), nodes=1, max_nodes=1)
    subprocess.run([HERE / "xpcs-stream", "keys", "manager"], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "allowed").mkdir()
    keys = {"secret_key": "manager.key_secret", "manager_key": "manager.key", "pilot_secret_key": "manager.key_secret"}
    keys = {name: str(tmp_path / file) for name, file in keys.items()} | {"allowed": str(tmp_path / "allowed")}
    there = bridge.site | {"site": "there", "heartbeats": bridge.site["heartbeats"] | keys}
    bridge.beamline["sites"] = ["here", "there"]
    files = (bridge.write("beamline.yaml", bridge.beamline), "--site", bridge.write("site.yaml", bridge.site))
    done = bridge.run("up", *files, "--site", bridge.write("there.yaml", there), check=False)
    assert done.returncode == 1
    assert "share" in done.stderr
    assert "and not its keys" in done.stderr


def test_a_scheduler_that_hangs_does_not_keep_a_manager_from_ending():
    done = Event()

    class Hangs:
        def list(self, prefixes):
            done.wait()

    document = yaml.safe_load(Path("docs/site.example.yaml").read_text()) | {"command_timeout": 0.1}
    desk = Desk(Site(**document), Hangs(), SimpleQueue())
    desk.list()
    began = time.monotonic()
    desk.close()
    done.set()
    assert time.monotonic() - began < 20


def test_a_manager_that_ends_before_it_answers_is_none(tmp_path):
    with socket.socket(socket.AF_UNIX) as manager, ThreadPoolExecutor(1) as executor:
        manager.bind(str(tmp_path / "control"))
        manager.listen()
        told = executor.submit(ask, tmp_path, {"do": "status"}, within=60)
        for _ in range(2):  # once to look whether it is there, and once to ask
            manager.accept()[0].close()
        manager.close()
        (tmp_path / "control").unlink()
        began = time.monotonic()
        with pytest.raises(NoManager):
            told.result(90)
        assert time.monotonic() - began < 20


def test_what_goes_wrong_in_a_scheduler_is_an_answer_too(tmp_path):
    class Broken:
        def fail(self, what):
            raise OSError(28, "No space left on device")

        list = submit = cancel = fail

    answers = SimpleQueue()
    desk = Desk(Site(**yaml.safe_load(Path("docs/site.example.yaml").read_text())), Broken(), answers)
    desk.list()
    desk.submit("lease", None)
    desk.cancel("7")
    listed, submitted = answers.get(timeout=60), answers.get(timeout=60)
    desk.close()
    assert listed.jobs is None
    assert "No space left on device" in listed.why
    assert (submitted.lease, submitted.job_id, submitted.refused) == ("lease", None, "")
