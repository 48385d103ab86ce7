"""Standard error for machines: one JSON object a line, that says of which run, region, beamline or site it is."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, closing
from datetime import UTC, datetime

import pytest

from tests.bridge import Bridge, stand_in
from tests.plane import REGIONS, Plane
from tests.test_command_line import ROOT, finished
from tests.test_kill import DEADLINE, frames, free, qmap, start, until

pytestmark = pytest.mark.timeout(200)

__all__ = ["frames", "qmap", "start"]

FIELDS = {"timestamp", "level", "logger", "event", "process", "pid", "node"}


@pytest.fixture
def as_json(monkeypatch):
    monkeypatch.setenv("XPCS_STREAM_LOG_FORMAT", "json")
    monkeypatch.setenv("HPC_BRIDGE_LOG_FORMAT", "json")


def lines(text):
    """What is on every line, and all of them have it."""
    told = [json.loads(line) for line in text.splitlines()]
    for line in told:
        assert line.keys() >= FIELDS
        assert datetime.fromisoformat(line["timestamp"]).tzinfo == UTC
        assert line["node"] == os.uname().nodename
    return told


def has_regions(status):
    return status.exists() and len(json.loads(status.read_text())["regions"]) == REGIONS


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_what_cannot_be_read_of_a_run_is_told_with_the_name_of_the_run(start, qmap, as_json):
    address = f"zmq+dectris://{free()}"
    run = start("-v", "run", "--source", address, "--qmap", qmap, "--out", "result.h5", "--runs", "1")
    finished(start("simulate", "--qmap", qmap, "--to", address, "--frames", 500, "--truncate", 0.1))
    out, said = finished(run)
    assert out == "result.h5\n"
    told = lines(said)
    assert {(line["process"], line["pid"]) for line in told} == {("xpcs-stream run", run.pid)}
    assert told[0]["event"] == f"taking frames from {address}" or "kernels" in told[0]["event"]
    rejected = [line for line in told if line["event"].startswith("rejected")]
    assert {line["level"] for line in rejected} == {"warning"}
    assert {line["logger"] for line in rejected} == {"stream.pipeline"}
    assert len({line["run"] for line in rejected if "run" in line}) == 1  # one came before the run began


def test_gateway_worker_and_merger_tell_of_which_run_and_region_they_speak(tmp_path, frames, qmap, as_json):
    with ExitStack() as stack:
        plane = Plane(f"zmq://{free()}/beamline", stack, tmp_path, qmap)
        address = f"zmq://{free()}"
        gateway = plane.start(
            *("-v", "gateway", "--source", address, "--to", plane.address, "--regions", REGIONS, "--status", "gateway")
        )
        worker = plane.worker("--status", "worker")
        merger = plane.merger()
        until(worker, lambda: has_regions(tmp_path / "worker"))
        finished(plane.start("replay", frames, "--to", address, "--rate", "5 kHz"))
        lines(finished(merger)[1])
        for process in (gateway, worker):
            process.send_signal(signal.SIGTERM)
        of_gateway, of_worker = (lines(process.communicate(timeout=DEADLINE)[1]) for process in (gateway, worker))
    assert {line["process"] for line in of_gateway} == {"xpcs-stream gateway"}
    of_run = [line["event"].partition(":")[0] for line in of_gateway if line.get("run") == "scan-7"]
    assert of_run[:1] + of_run[-1:] == ["run scan-7 begins", "run scan-7 ends"]
    begun = [line["region"] for line in of_worker if "begins here" in line["event"]]
    assert sorted(begun) == list(range(REGIONS))


def test_why_a_command_ends_is_an_error_on_one_line_and_the_option_goes_before_the_environment(start, as_json):
    why = ("run", "--source", "nowhere.h5", "--qmap", "nowhere.h5")
    [line] = lines(start(*why).communicate(timeout=DEADLINE)[1])
    assert (line["level"], line["event"]) == ("error", "nowhere.h5: no such file")
    _, said = start("--log-format", "text", *why).communicate(timeout=DEADLINE)
    assert said == "xpcs-stream: nowhere.h5: no such file\n"


@pytest.mark.parametrize("package", ["stream", "hpc_bridge"])
@pytest.mark.parametrize(
    "fails",
    [
        "1 / 0",
        "import threading; threading.Thread(target=lambda: 1 / 0).start()",
        "try: 1 / 0\n  except ZeroDivisionError: logging.getLogger(f'{package}.x').exception('it\\nfailed')",
    ],
)
def test_an_exception_is_a_field_also_when_nobody_caught_it(package, fails):
    said = python(f"""
import logging
from {package} import logs
package = {package!r}
logs.configure("command", how="json")
with logs.bound(run="scan-7"):
  {fails}
""").stderr
    [line] = lines(said)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ZeroDivisionError: division by zero")


def test_what_python_itself_warns_of_is_json_too():
    said = python("""
import warnings
from stream import logs
logs.configure("command", how="json")
warnings.warn("old")
""").stderr
    [line] = lines(said)
    assert "UserWarning: old" in line["event"]


def test_what_is_bound_is_told_until_it_is_let_go_and_by_no_other_thread():
    said = python("""
import logging, threading
from stream import logs
logs.configure("command", how="json", level=logging.INFO)
log = logging.getLogger("stream.x")
logs.bind(run="one")
with logs.bound(region=3):
    log.info("a")
threading.Thread(target=log.info, args=("b",)).start()
logs.bind(run=None)
log.info("c")
""").stderr
    assert [(line["event"], line.get("run"), line.get("region")) for line in lines(said)] == [
        ("a", "one", 3),
        ("b", None, None),
        ("c", None, None),
    ]


def test_a_manager_and_its_pilots_tell_of_which_beamline_site_and_lease_they_speak(tmp_path, as_json):
    environment = {"HPC_BRIDGE_LOG_FORMAT": "json"}
    with closing(Bridge(tmp_path, stand_in(), nodes=1, max_nodes=1, environment=environment)) as bridge:
        manager = bridge.up()
        [pilot] = bridge.until_serving(1)
        bridge.down()
        manager.wait(DEADLINE)
    told = lines(bridge.log())
    assert {(line["process"], line["pid"]) for line in told} == {("hpc-bridge up", manager.pid)}
    [asked] = [line for line in told if "asked of" in line["event"]]
    assert (asked["beamline"], asked["site"], asked["level"]) == (bridge.name, "here", "info")
    of_pilot = [
        line
        for path in (tmp_path / "jobs").rglob("*")
        if path.is_file()
        for line in path.read_text(errors="replace").splitlines()
        if '"process": "hpc-bridge pilot"' in line
    ]
    assert {line["lease"] for line in lines("\n".join(of_pilot))} == {pilot["lease"]}


def test_nothing_of_this_is_loaded_before_it_is_asked_for():
    loaded = python("import sys, stream.__main__, hpc_bridge.__main__; print(*sys.modules)").stdout.split()
    assert {"structlog", "prometheus_client", "asyncio"} & set(loaded) == set()
    assert "hpc_bridge.logs" in loaded
