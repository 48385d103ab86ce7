"""Bluesky's documents in and out of Kafka where it asks everybody who they are, through the commands."""

import time
import uuid
from contextlib import ExitStack

import h5py
import pytest
from bluesky_kafka import Publisher, RemoteDispatcher

from stream.kafka import create_topic, read_properties
from tests.kafka import PASSWORD, USER
from tests.plane import Plane, until_said
from tests.test_bluesky_runs import documents
from tests.test_command_line import finished, started
from tests.test_kill import frames, free, qmap
from tests.test_proxy_keys import written

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap"]

DEADLINE = 120
WRONG = "hunter2"


@pytest.fixture
def at(secured):
    return secured.scram["bootstrap.servers"]


@pytest.fixture
def login(secured, tmp_path):
    """Write the file of properties for a password; return the option that names it."""

    def write(password):
        (tmp_path / "password").write_text(password)
        properties = {name: value for name, value in secured.scram.items() if name != "bootstrap.servers"}
        properties["sasl.password"] = f"file:{tmp_path / 'password'}"
        (tmp_path / "kafka.properties").write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        return ("--kafka-properties", "kafka.properties")

    return write


@pytest.fixture
def topic(at, login, tmp_path):
    """A topic for documents of a run engine."""
    login(PASSWORD)
    name = f"{uuid.uuid4().hex[:8]}.bluesky.runengine.documents"
    create_topic(at, name, 1, properties=read_properties(tmp_path / "kafka.properties"))
    return name


@pytest.fixture
def publish(secured, topic):
    """Publish as a run engine does, with bluesky_kafka and the same login."""
    config = {name: value for name, value in secured.scram.items() if name != "bootstrap.servers"}

    def send(given):
        publisher = Publisher(topic, secured.scram["bootstrap.servers"], "key", config)
        for each in given:
            publisher(*each)
        publisher.flush()

    return send


def derived(secured, beamline):
    """What bluesky_kafka's own receiver with the same login gives, until a run stopped."""
    documents = []
    options = {name: value for name, value in secured.scram.items() if name != "bootstrap.servers"}
    dispatcher = RemoteDispatcher(
        [f"{beamline}.xpcs.live.documents"],
        secured.scram["bootstrap.servers"],
        str(uuid.uuid4()),
        {"auto.offset.reset": "earliest", **options},
    )
    dispatcher.subscribe(lambda name, document: documents.append((name, document)))
    deadline = time.monotonic() + DEADLINE
    dispatcher.start(lambda: time.monotonic() < deadline and not (documents and documents[-1][0] == "stop"))
    return documents


def test_a_run_takes_documents_and_publishes_its_own_with_a_login(secured, at, login, topic, publish, qmap, tmp_path):
    source = ("--source", f"kafka+bluesky://{at}/{topic}", "--root", f"/data={tmp_path}", "--qmap", qmap)
    sinks = ("--out", "result.h5", "--documents", f"kafka://{at}/beamline-1", "--quiet", "--runs", 1)
    with started("-v", "run", *source, *sinks, *login(PASSWORD), cwd=tmp_path) as process:
        until_said(process, "taking frames from")
        publish(written(tmp_path, "a"))
        said = "".join(finished(process))
    came = derived(secured, "beamline-1")
    assert came[0][1]["original_run_uid"] == "a"
    assert came[-1][1]["exit_status"] == "success"
    with h5py.File(tmp_path / "result.h5") as file:
        assert file["xpcs/ledger/received"][()] == 5
        said += file["xpcs/configuration"].asstr()[()]
    assert PASSWORD not in said


def test_facts_of_a_run_come_with_a_login(at, login, topic, publish, frames, qmap, tmp_path):
    address = f"zmq://{free()}"
    source = ("--source", address, "--run-engine", f"kafka+bluesky://{at}/{topic}", "--qmap", qmap)
    with started("run", *source, "--out", "result.h5", "-q", "--runs", 1, *login(PASSWORD), cwd=tmp_path) as process:
        until_said(process, "taking frames from")
        *told, _ = documents("b")
        publish(told)
        with started("replay", frames, "--to", address, "--as-fast-as-possible", cwd=tmp_path) as replay:
            finished(replay)
            finished(process)
    with h5py.File(tmp_path / "result.h5") as file:
        assert file["entry/entry_identifier"].asstr()[()] == "b"


def test_documents_go_through_kafka_with_a_login_where_frames_do_not(
    secured, at, login, topic, publish, qmap, tmp_path
):
    with ExitStack() as stack:
        plane = Plane(f"zmq://{free()}/beamline", stack, tmp_path, qmap)
        address = f"kafka+bluesky://{at}/{topic}"
        gateway = plane.gateway(address, "--root", f"/data={tmp_path}", *login(PASSWORD))
        until_said(gateway, "taking frames from")
        publish(written(tmp_path, "c"))
        plane.worker()
        plane.result(plane.merger("--documents", f"kafka://{at}/beamline-2", *login(PASSWORD)))
    assert derived(secured, "beamline-2")[0][1]["original_run_uid"] == "c"


@pytest.mark.parametrize("what", ["--source", "--run-engine", "--documents"])
def test_a_wrong_password_ends_the_command_with_one_line_that_does_not_tell_it(
    at, login, topic, frames, qmap, tmp_path, what
):
    options = {"--source": frames, what: f"kafka+bluesky://{at}/{topic}"}
    if what == "--documents":
        options[what] = f"kafka://{at}/beamline-3"
    command = [word for option in options.items() for word in option]
    root = ("--root", f"/data={tmp_path}") if what == "--source" else ()
    others = ("--qmap", qmap, "--out", "result.h5", "--quiet", *root, *login(WRONG))
    with started("-v", "run", *command, *others, cwd=tmp_path) as process:
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    [line] = [line for line in err.splitlines() if line.startswith("xpcs-stream: ")]
    assert f"{USER} cannot log in: " in line
    assert "Traceback" not in err
    assert WRONG not in out + err
