"""Files that people hand in, from outside: a real manager, its pilots on this machine, and files that really move.

Globus is the FAKE of tests/fake_globus.py, its library is not.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_bridge.control import NoManager, ask
from tests.bridge import HERE, Bridge, stand_in
from tests.fake_globus import CLIENT, SECRET, FakeGlobus
from tests.test_command_line import GEOMETRY

pytestmark = pytest.mark.timeout(400)

BEAMLINE = "c5a1b2c3-0000-4000-8000-00000000000a"
CENTRE = "c5a1b2c3-0000-4000-8000-00000000000b"

TURNED = """
import os, pathlib, sys, time
source, result, go = map(pathlib.Path, sys.argv[1:])
while not go.exists():
    time.sleep(0.05)
result.with_suffix(".new").write_bytes(source.read_bytes()[::-1])
os.rename(result.with_suffix(".new"), result)
"""
"""What a node makes of a file, once it may."""


class Files(Bridge):
    """A beamline whose runs go by file."""

    def __init__(self, folder, *, route=None, beamline=None, sites=None, **files):
        (folder / "data").mkdir()
        self.go = folder / "go"
        self.go.touch()
        command = [sys.executable, "-c", TURNED, "{file}", "{result}", str(self.go)]
        self.route = {"by": "copy", "there": {"path": str(folder / "there")}, "command": command, **(route or {})}
        files = {"results": str(folder / "results"), "sites": sites or {"here": self.route}, **files}
        super().__init__(folder, stand_in(), **{"nodes": 0, "max_nodes": 1, "files": files, **(beamline or {})})

    def file(self, name="one.h5", size=100_000):
        path = self.folder / "data" / name
        path.write_bytes(os.urandom(size))
        return path

    def submit(self, *arguments, check=True, beamline=None):
        return self.run("submit", *arguments, "--beamline", beamline or self.name, check=check)

    def file_status(self):
        """Of the runs of all beamlines."""
        try:
            beamlines = ask(self.state, {"do": "status"})["beamlines"].values()
        except NoManager:
            return {}
        return {run["run"]: run for beamline in beamlines for run in beamline["files"]["runs"]}

    def until_stage(self, stage, run="one"):
        def is_so():
            told = self.file_status().get(run)
            return told is not None and told["stage"] == stage

        self.until(is_so)
        return self.file_status()[run]

    def n_handed_out(self):
        """How often a task was given to a node."""
        return self.log().count(" goes to ")

    def is_turned(self, file, results="results"):
        result = self.folder / results / f"{file.stem}_result.h5"
        return result.read_bytes() == file.read_bytes()[::-1]


@pytest.fixture
def files_of(tmp_path):
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(Files(tmp_path, **options)))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "centre").mkdir()
    with FakeGlobus({BEAMLINE: tmp_path, CENTRE: tmp_path / "centre"}) as fake:
        for name, value in fake.environment.items():
            monkeypatch.setenv(name, value)
        yield fake


@pytest.fixture
def by_globus(tmp_path):
    """A route; what arrives at the centre can be read here."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    globus = tmp_path / "globus.yaml"
    mounted = {BEAMLINE: str(tmp_path), CENTRE: str(tmp_path / "centre")}
    settings = {"client_id": CLIENT, "client_secret": str(secret), "timeout": "2 s", "poll": "0.1 s"}
    globus.write_text(json.dumps({**settings, "mounted": mounted}))
    there = {"endpoint": CENTRE, "path": "/xpcs"}
    return {
        "by": "globus",
        "globus": str(globus),
        "here": BEAMLINE,
        "there": there,
        "path": str(tmp_path / "centre/xpcs"),
    }


def test_a_file_is_brought_to_a_node_and_its_result_comes_back(files_of):
    files = files_of()
    files.up()
    file = files.file()
    done = files.submit(file, "--wait")
    assert done.stdout == f"{files.folder}/results/one_result.h5\n"
    assert "one computing at here" in done.stderr
    assert files.is_turned(file)
    assert (files.folder / "there" / files.name / "one/one.h5").read_bytes() == file.read_bytes()
    told = files.until_stage("done")
    assert list(told["seconds"]) == ["hash", "wait", "transfer", "start", "compute", "return"]
    assert all(seconds >= 0 for seconds in told["seconds"].values())
    assert "one" in files.run("status").stdout
    assert files.submit(file, "--wait").stdout == done.stdout
    assert files.n_handed_out() == 1


def test_g2_of_a_file_that_went_to_a_node_is_that_of_the_file(files_of, tmp_path):
    qmap, frames = tmp_path / "qmap.h5", tmp_path / "data.h5"
    subprocess.run([HERE / "xpcs-stream", "qmap", *GEOMETRY, "--out", qmap], check=True)
    with h5py.File(frames, "w") as file:
        counts = np.random.default_rng(1).poisson(3.0, (200, 40, 50)).astype("u2")
        file.create_dataset("entry/data/data", data=counts, chunks=(1, 40, 50))
        file["entry/instrument/detector/frame_time"] = 5e-4
        file["entry/instrument/detector/count_time"] = 4e-4
    run = [HERE / "xpcs-stream", "run", "--qmap", qmap, "--quiet"]
    subprocess.run([*run, "--source", frames, "--out", tmp_path / "here.h5"], check=True)
    words = [*map(str, run), "--source", "{file}", "--out", "{result}"]
    files = files_of(route={"command": words})
    files.up()
    [result] = files.submit(frames, "--wait").stdout.splitlines()
    assert g2_of(result) == g2_of(tmp_path / "here.h5")


def g2_of(result):
    with h5py.File(result) as file:
        return file["xpcs/multitau/normalized_g2"][()].tobytes()


@pytest.mark.parametrize("stage", ["sending", "computing", "returning"])
def test_a_manager_killed_at_any_stage_goes_on_with_one_transfer_and_one_task(files_of, fake, by_globus, stage):
    files = files_of(route=by_globus)
    manager = files.up()
    file = files.file()
    if stage == "sending":
        fake.going.clear()
    else:
        files.go.unlink()
    files.submit(file)
    if stage == "sending":
        files.until(lambda: fake.documents)
    if stage in ("computing", "returning"):
        files.until(lambda: files.n_handed_out() == 1)
    if stage == "returning":
        fake.going.clear()
        files.go.touch()
        files.until(lambda: len(fake.documents) == 2)
    manager.kill()
    manager.wait()
    files.go.touch()  # what runs ends without a manager
    files.up()
    fake.going.set()
    files.until_stage("done")
    assert files.is_turned(file)
    assert [document["destination_endpoint"] for document in fake.documents] == [CENTRE, BEAMLINE]
    assert files.n_handed_out() == 1


def test_twenty_runs_of_three_beamlines_one_identity_in_the_order_of_priority(files_of, fake, by_globus):
    files = files_of(route=by_globus)
    files.up()
    names = {files.name: 0, "second": 5, "third": 9}
    for name in ("second", "third"):
        results = str(files.folder / f"results of {name}")
        other = files.beamline | {"beamline": name, "files": files.beamline["files"] | {"results": results}}
        told = files.run("up", files.write(f"{name}.yaml", other), "--site", files.folder / "site.yaml", check=False)
        assert told.returncode == 0, told.stderr + files.log()
    runs = {
        name: [files.file(f"{name}_{n}.h5", 1000) for n in range(count)]
        for name, count in zip(names, (7, 7, 6), strict=True)
    }
    fake.going.clear()
    for name, of_beamline in runs.items():
        files.submit(*of_beamline, "--priority", names[name], beamline=name)
    files.until(lambda: all(run["stage"] == "sending" for run in files.file_status().values()))
    assert len(fake.documents) == 3
    fake.going.set()
    files.until(lambda: all(run["stage"] == "done" for run in files.file_status().values()))
    assert len(files.file_status()) == 20
    for name, of_beamline in runs.items():
        results = "results" if name == files.name else f"results of {name}"
        assert all(files.is_turned(file, results) for file in of_beamline)
    out = [document for document in fake.documents if document["destination_endpoint"] == CENTRE]
    priorities = [names[name] for document in out for name in names if f" {name} " in document["label"]]
    # Three are sent at once, so that neighbours may arrive in either order.
    assert all(one >= later for n, one in enumerate(priorities[3:]) for later in priorities[3:][n + 3 :])
    assert len({document["label"] for document in fake.documents}) == len(fake.documents) == 40
    assert fake.most_active <= 3
    assert files.n_handed_out() == 20


def test_a_byte_that_changed_on_the_way_is_sent_again_and_until_then_the_spool_keeps_the_run(
    files_of, fake, by_globus, tmp_path
):
    spool, status = tmp_path / "spool", tmp_path / "gateway.json"
    run = spool / "one"
    run.mkdir(parents=True)
    for name in ("one_master.h5", "one_data_000001.h5"):
        (run / name).write_bytes(os.urandom(1000))
    seen = tmp_path / "seen"
    repair = [sys.executable, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(' '.join(sys.argv[2:]))"]
    files = files_of(route=by_globus | {"repair": [*repair, str(seen), "{run}", "{file}"]}, gateway=str(status))
    told = {
        "run": "one", "path": str(run), "files": ["one_data_000001.h5", "one_master.h5"],
        "ended": True, "lost": 3, "planes": ["stream"], "safe": False,
    }  # fmt: skip
    fake.behaviours.append("corrupt unseen")
    fine = {**told, "run": "fine", "path": str(spool / "fine"), "lost": 0}
    status.write_text(json.dumps({"spool": {"directory": str(spool), "lost": 0}, "runs": [told, fine]}))
    files.up()
    files.until(
        lambda: len(fake.documents) == 1 and fake.tasks and all(t["status"] != "ACTIVE" for t in fake.tasks.values())
    )
    fake.going.clear()
    files.until(lambda: len(fake.documents) == 2)
    assert not (run / "safe").exists()
    fake.going.set()
    told = files.until_stage("done")
    assert (run / "safe").exists()
    assert sorted(files.file_status()) == ["one"]
    assert seen.read_text() == f"one {tmp_path}/centre/xpcs/{files.name}/one/one_master.h5"
    for name in ("one_master.h5", "one_data_000001.h5"):
        assert (tmp_path / "centre/xpcs" / files.name / "one" / name).read_bytes() == (run / name).read_bytes()


def test_a_site_that_cannot_be_reached_is_passed_by_for_the_next_one(files_of, tmp_path):
    there = {
        "by": "rsync",
        "there": {"endpoint": "nobody@127.0.0.1", "path": "/nowhere"},
        "command": ["false", "{file}"],
    }
    files = files_of(patience="1 s", deadline="5 min")
    files.beamline["sites"] = ["away", "here"]
    files.beamline["files"]["sites"] = {"away": there, "here": files.route}
    away = files.site | {"site": "away", "directory": str(tmp_path / "away")}
    files.up("--site", files.write("away.yaml", away))
    file = files.file()
    assert files.submit(file, "--wait").returncode == 0
    assert files.is_turned(file)
    assert files.file_status()["one"]["site"] == "here"


def test_after_its_deadline_a_run_has_failed_and_is_not_safe(files_of):
    files = files_of(deadline="3 s")
    files.go.unlink()
    files.up()
    failed = files.submit(files.file(), "--wait", check=False)
    assert failed.returncode == 1
    assert "its deadline has passed while it was " in failed.stderr


def test_a_command_that_fails_says_what_it_said(files_of):
    files = files_of(
        route={"command": [sys.executable, "-c", "import sys; sys.exit('no such map')", "{file}"]}, retry_after="0.1 s"
    )
    files.up()
    failed = files.submit(files.file(), "--wait", check=False)
    assert failed.returncode == 1
    assert "one failed: at here:" in failed.stderr
    assert files.n_handed_out() == 3


def test_who_cancels_a_run_ends_its_command(files_of):
    files = files_of()
    files.go.unlink()
    files.up()
    files.submit(files.file())
    files.until(lambda: files.n_handed_out() == 1)
    files.run("cancel", "one", "--beamline", files.name)
    assert files.until_stage("canceled")["why"] == "canceled by hpc-bridge cancel"
    files.until(lambda: not any(pilot["task"] for pilot in files.pilots()))
    assert "no run one goes by file" in files.run("cancel", "one", "--beamline", files.name, check=False).stderr


def test_what_is_put_into_the_drop_folder_is_taken_once(files_of, tmp_path):
    (tmp_path / "drop").mkdir()
    files = files_of(drop=str(tmp_path / "drop"))
    manager = files.up()
    file = tmp_path / "drop/one.h5"
    hidden = tmp_path / "drop/.one.h5"
    hidden.write_bytes(os.urandom(1000))
    hidden.rename(file)
    (tmp_path / "drop/notes.txt").write_text("no run")
    files.until_stage("done")
    assert files.is_turned(file)
    manager.kill()
    manager.wait()
    files.up()
    other = tmp_path / "drop/two_master.h5"
    (tmp_path / "drop/two_data_000001.h5").write_bytes(b"part")
    other.write_bytes(os.urandom(1000))
    files.until_stage("done", "two")
    assert (tmp_path / "there" / files.name / "two/two_data_000001.h5").read_bytes() == b"part"
    assert sorted(files.file_status()) == ["one", "two"]
    assert files.n_handed_out() == 2


def test_whoever_waits_may_leave_and_the_manager_goes_on(files_of):
    files = files_of()
    files.go.unlink()
    files.up()
    file = files.file()
    waiting = subprocess.Popen(
        files.words("submit", file, "--beamline", files.name, "--wait"), stderr=subprocess.PIPE, text=True
    )
    files.until(lambda: files.n_handed_out() == 1)
    waiting.send_signal(signal.SIGINT)
    assert "the manager goes on with it" in waiting.communicate(timeout=120)[1]
    assert waiting.returncode == 130
    files.go.touch()
    files.until_stage("done")


def test_the_gateway_is_told_that_nodes_are_wanted_and_none_serves(files_of, tmp_path):
    status, plane = tmp_path / "gateway.json", tmp_path / "8idi.plane"
    told = {"ack_lag_s": 0.0, "lost_in_all": 0, "spool": {"directory": "/spool", "lost": 0, "full_in_s": 1e6}}
    status.write_text(json.dumps(told))
    files = files_of(
        gateway=str(status),
        plane=str(plane),
        switch={"wait": "1 s", "wait_file": "2 s", "look": "0.1 s"},
        beamline={"nodes": 1},
    )
    files.beamline["command"] = ["sh", "-c", "exec sleep 1000", "{status}"]  # it never says that it is ready
    manager = files.up()
    files.until(lambda: os.utime(status) or (plane.exists() and json.loads(plane.read_text())["plane"] == "file"))
    told = json.loads(plane.read_text())
    assert "none serves" in told["why"]
    assert told["since"] > 0
    assert 'frames go by "file"' in files.run("status").stdout
    manager.kill()
    manager.wait()
    files.up()
    assert files.status()["files"]["plane"]["plane"] == "file"


def test_what_cannot_be_done_is_said_at_once(files_of):
    files = files_of()
    files.up()
    file = files.file()
    for arguments, why in (
        ((file.with_name("missing.h5"), "--beamline", files.name), "No such file"),
        ((file, "--beamline", files.name, "--site", "moon"), "go to here, not to moon"),
        ((file, "--beamline", "other"), "no such beamline is held with a section `files`"),
    ):
        refused = files.run("submit", *arguments, check=False)
        assert refused.returncode == 1
        assert why in refused.stderr


def test_an_identity_that_is_described_in_two_ways_is_refused(files_of, fake, by_globus, tmp_path):
    files = files_of(route=by_globus)
    files.up()
    other = json.loads(Path(by_globus["globus"]).read_text()) | {"timeout": "3 s"}
    (tmp_path / "other.yaml").write_text(json.dumps(other))
    beamline = files.beamline | {"beamline": "other"}
    told = files.run("up", files.write("o.yaml", beamline), "--site", files.folder / "site.yaml", check=False)
    assert f"is that of beamline {files.name}" in told.stderr
    route = files.route | {"globus": str(tmp_path / "other.yaml")}
    beamline["files"] = beamline["files"] | {"sites": {"here": route}, "results": str(tmp_path / "others")}
    refused = files.run("up", files.write("o.yaml", beamline), "--site", files.folder / "site.yaml", check=False)
    assert "other beamlines say something else of it" in refused.stderr
    assert files.status() is not None
