"""A manager of nodes, from outside: what people ask for, what run engines tell, what goes wrong at sites."""

import json
import os
import signal
import subprocess
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from queue import SimpleQueue

import pytest
import yaml

from hpc_bridge.config import Site
from hpc_bridge.desk import Desk
from stream.sinks.bluesky_zmq import ZmqDocuments
from tests.bridge import HERE, Bridge, processes, stand_in
from tests.kafka import free_ports
from tests.test_bluesky_transport import proxy

pytestmark = pytest.mark.timeout(200)


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
        documents.publish("one", "start", {"uid": "one"}, may_be_lost=False)
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
    assert manager.wait(30) == 0


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


def test_a_manager_that_ends_leaves_its_pilots_to_the_next_one(bridge_of):
    bridge = bridge_of(stand_in(), nodes=2, max_nodes=2)
    manager = bridge.up()
    before = {pilot["lease"] for pilot in bridge.until_serving(2)}
    manager.terminate()
    assert manager.wait(30) == 0
    bridge.up()
    assert {pilot["lease"] for pilot in bridge.until_serving(2)} == before


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
    listed, submitted = answers.get(timeout=10), answers.get(timeout=10)
    desk.close()
    assert listed.jobs is None
    assert "No space left on device" in listed.why
    assert (submitted.lease, submitted.job_id, submitted.refused) == ("lease", None, "")
