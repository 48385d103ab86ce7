"""Bluesky runs that point to files go by file once they are over: from the files alone, and with a real manager."""

import os
import subprocess
import time
from contextlib import ExitStack, closing
from pathlib import PurePosixPath

import bluesky_kafka
import msgpack
import pytest
from bluesky.callbacks.zmq import Publisher
from event_model import compose_run
from ophyd_async.core import init_devices

from hpc_bridge import bulk_pointed
from hpc_bridge.bulk import Bulk, Noticed
from hpc_bridge.bulk_config import Files as BulkFiles
from hpc_bridge.bulk_files import known
from hpc_bridge.bulk_pointed import MAX_RUNS, MAX_URIS, PointedFiles
from hpc_bridge.bulk_record import Known, Origin, Runs
from hpc_bridge.config import Beamline, checked
from hpc_bridge.errors import ConfigError, RecordError
from hpc_bridge.tasks import Tasks
from stream.operators.roimap_file import write
from tests.bridge import HERE
from tests.ophyd_detector import SpeckleDetector
from tests.run_engine import engine
from tests.test_bluesky_command import flying, roimap, run
from tests.test_bluesky_transport import proxy
from tests.test_bulk_manager import Files, g2_of

pytestmark = pytest.mark.timeout(400)

__all__ = ["engine", "roimap"]

WITHIN = 30


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def pointed_of(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(bulk_pointed, "_EVERY", 0.05)
    with ExitStack() as stack:

        def pointed_of(still=0.0, within=1e6):
            record = tmp_path / "record.json"
            made = PointedFiles("8idi", {"/nsls2/data": folder}, record, within=within, still=still)
            return stack.enter_context(closing(made))

        yield pointed_of


def of(name):
    return f"file://localhost/nsls2/data/{name}"


def tell(pointed, name, *uris, ended=True):
    for uri in uris:
        pointed.points(name, uri)
    if ended:
        pointed.ended(name, 0.0)
    pointed.keep()


def first(pointed):
    """The first run that is complete."""
    deadline = time.monotonic() + WITHIN
    while not (found := pointed.look(0.0)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def test_a_run_goes_by_file_once_it_is_over(pointed_of, folder):
    (folder / "a b.h5").write_bytes(b"frames")
    (folder / "other.h5").write_bytes(b"frames")
    pointed = pointed_of()
    tell(pointed, "on", of("other.h5"), ended=False)
    tell(pointed, "over", of("a%20b.h5"), of("a%20b.h5"))
    found = first(pointed)
    assert (found.run, found.origin, found.folder) == ("over", Origin.RUN_ENGINE, PurePosixPath(folder))
    assert found.files == (known(folder / "a b.h5"),)
    pointed.taken("over")
    tell(pointed, "on")
    assert first(pointed).run == "on"


def test_a_file_that_grows_or_is_not_there_yet_is_waited_for(pointed_of, folder):
    pointed = pointed_of(still=0.5)
    tell(pointed, "one", of("a.h5"))
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        with (folder / "a.h5").open("ab") as file:
            file.write(b"more")
        assert not pointed.look(0.0)
        time.sleep(0.05)
    assert first(pointed).files == (known(folder / "a.h5"),)


def test_files_of_several_folders_are_one_run_and_a_master_brings_its_parts(pointed_of, folder):
    names = ["eiger/x_master.h5", "eiger/x_data_000001.h5", "panda/a.h5"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    pointed = pointed_of()
    tell(pointed, "one", of("eiger/x_master.h5"), of("panda/a.h5"))
    found = first(pointed)
    assert found.folder == PurePosixPath(folder)
    assert [(file.name, file.size) for file in found.files] == [(name, len(name)) for name in names]


@pytest.mark.parametrize(
    "uri",
    [
        of("../secret.h5"),
        of("%2e%2e/secret.h5"),
        of("link.h5"),
        of("folder.h5"),
        of("beyond/secret.h5"),
        of("loop_master.h5"),
        "file://localhost/nsls2/database/a.h5",
        "file://elsewhere/nsls2/data/b.h5",
        "https://localhost/nsls2/data/b.h5",
        "file://[/nsls2/data/b.h5",
        of("a%00.h5"),
        of("a%0a.h5"),
        "",
    ],
)
def test_what_is_not_a_file_below_a_root_is_never_taken(pointed_of, folder, uri):
    (folder.parent / "secret.h5").write_bytes(b"secret")
    (folder / "link.h5").symlink_to(folder.parent / "secret.h5")
    (folder / "beyond").symlink_to(folder.parent)
    (folder / "folder.h5").mkdir()
    (folder / "folder.h5/a.h5").write_bytes(b"frames")
    (folder / "loop_master.h5").write_bytes(b"frames")
    (folder / "loop_data_1.h5").symlink_to(folder.parent / "secret.h5")
    for name in ("a.h5", "b.h5"):
        (folder / name).write_bytes(b"frames")
    pointed = pointed_of()
    tell(pointed, "one", uri, of("a.h5"))
    names = {file.name for file in first(pointed).files}
    assert names == ({"loop_master.h5", "a.h5"} if "loop" in uri else {"a.h5"})


def test_a_run_of_which_no_file_may_be_taken_is_forgotten(pointed_of, folder, tmp_path):
    (folder / "folder.h5").mkdir()
    pointed = pointed_of()
    tell(pointed, "one", of("folder.h5"))
    deadline = time.monotonic() + WITHIN
    while "one" in (tmp_path / "record.json").read_text():
        assert not pointed.look(0.0)
        pointed.keep()
        assert time.monotonic() < deadline


def test_the_next_manager_knows_what_was_told_to_the_one_before(pointed_of, folder):
    (folder / "a.h5").write_bytes(b"frames")
    before = pointed_of(still=1e6)
    tell(before, "ended", of("a.h5"))
    tell(before, "on", of("a.h5"), ended=False)
    before.close()
    pointed = pointed_of()
    assert first(pointed).run == "ended"
    pointed.taken("ended")
    tell(pointed, "on")
    assert first(pointed).run == "on"


def test_a_record_that_is_none_is_named(pointed_of, tmp_path):
    (tmp_path / "record.json").write_text("{]")
    with pytest.raises(RecordError, match=r"record\.json: it is no record"):
        pointed_of()


def test_what_is_told_is_bounded(pointed_of, folder):
    pointed = pointed_of()
    for n in range(MAX_URIS + 5):
        (folder / f"{n:03}.h5").write_bytes(b"frames")
        pointed.points("one", of(f"{n:03}.h5"))
    tell(pointed, "one")
    assert len(first(pointed).files) == MAX_URIS
    for n in range(MAX_RUNS):
        pointed.points(f"run {n}", of("000.h5"))
    tell(pointed, "run 0")
    assert first(pointed).run == "run 0"  # "one", the oldest, is forgotten


def test_files_that_never_come_are_given_up(pointed_of, caplog):
    pointed = pointed_of(within=60.0)
    tell(pointed, "one", of("a.h5"))
    assert not pointed.look(59.0)
    assert not pointed.look(61.0)
    assert "run one: its files did not come: file://localhost/nsls2/data/a.h5" in caplog.text
    caplog.clear()
    assert not pointed.look(62.0)
    assert not caplog.text


def test_a_run_is_known_by_its_uid_and_not_by_its_file(tmp_path):
    route = {"by": "copy", "there": {"path": "/there"}}
    files = BulkFiles(results="/results", sites={"here": route}, priority=7)

    def noticed(run, mtime_ns):
        file = Known("a.h5", 10, mtime_ns)
        return Noticed(beamline="8idi", run=run, origin=Origin.RUN_ENGINE, folder=PurePosixPath("/data"), files=(file,))

    with Runs.open(tmp_path / "bulk.sqlite") as runs, Tasks.open(tmp_path / "tasks.sqlite") as tasks:
        bulk = Bulk(runs, tasks)
        names = [bulk.notice(noticed(*each), files, 0.0).name for each in (("one", 1), ("one", 2), ("two/../x", 1))]
        assert names == ["one", "one", "two_.._x"]
        assert {run.priority for run in bulk.open_runs} == {7}


@pytest.mark.parametrize(
    ("roots", "engine", "why"),
    [
        ({"/data": "/data"}, None, "is told by a run_engine"),
        ({"data": "/data"}, "zmq+bluesky://host:5578", "not two absolute paths"),
        ({"/data": "data"}, "zmq+bluesky://host:5578", "not two absolute paths"),
        ({"/data/../etc": "/data"}, "zmq+bluesky://host:5578", "not two absolute paths"),
    ],
)
def test_roots_that_cannot_be_meant_are_refused(roots, engine, why):
    route = {"by": "copy", "there": {"path": "/there"}}
    files = {"results": "/results", "sites": {"here": route}, "roots": roots}
    beamline = {"beamline": "8idi", "sites": ["here"], "command": ["worker"], "max_nodes": 1, "files": files}
    with pytest.raises(ConfigError, match=why):
        checked({**beamline, "run_engine": engine}, Beamline)


@pytest.fixture
def files_of(tmp_path):
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(Files(tmp_path, **options)))


def follow(files, publish):
    """Begin to follow, and see that documents come."""
    manager = files.up()
    files.until(lambda: publish("start", {"uid": "probe"}) or "run probe begins" in files.log())
    publish("stop", {"run_start": "probe"})
    return manager


def test_g2_of_a_run_of_ophyd_async_comes_back_without_anybody(files_of, engine, roimap, tmp_path):
    qmap = tmp_path / "qmap.h5"
    write(qmap, roimap)
    words = [HERE / "xpcs-stream", "run", "--qmap", qmap, "--quiet", "--frame-time", "1 ms"]
    command = [*map(str, words), "--source", "{file}", "--out", "{result}"]
    with proxy() as (into, out):
        beamline = {"run_engine": out.replace("tcp", "zmq+bluesky")}
        roots = {str(tmp_path / "data"): str(tmp_path / "data")}
        files = files_of(route={"command": command}, roots=roots, beamline=beamline)
        publisher = Publisher(into, serializer=msgpack.dumps)
        follow(files, publisher)
        with init_devices():
            detector = SpeckleDetector(tmp_path / "data", roimap, name="detector")
        token = engine.subscribe(publisher)
        documents = run(engine, flying(detector))
        engine.unsubscribe(token)
        uid = documents[0][1]["uid"]
        told = files.until_stage("done", uid)
        assert told["origin"] == "run engine"
        os.utime(detector.path)
        for each in documents:  # once more
            publisher(*each)
        files.until(lambda: files.log().count(f"run {uid} ended") == 2)
        [record] = files.state.glob("files-of-runs-*.json")
        files.until(lambda: uid in record.read_text())
        files.until(lambda: uid not in record.read_text())
        publisher.close()
    assert list(files.file_status()) == [uid]
    assert files.n_handed_out() == 1
    subprocess.run([*words, "--source", detector.path, "--out", tmp_path / "here.h5"], check=True)
    assert g2_of(tmp_path / "results" / f"{uid}_result.h5") == g2_of(tmp_path / "here.h5")


def test_a_run_that_failed_while_no_manager_was_there_goes_when_there_is_one(files_of, broker, topic, tmp_path):
    roots = {"/nsls2/data": str(tmp_path / "data")}
    files = files_of(roots=roots, beamline={"run_engine": f"kafka+bluesky://{broker.bootstrap}/{topic}"})
    publisher = bluesky_kafka.Publisher(topic, broker.bootstrap, key="k", flush_on_stop_doc=True)

    def publish(*document):
        publisher(*document)
        publisher.flush()

    manager = follow(files, publish)
    bundle = compose_run()
    uid = bundle.start_doc["uid"]
    resources = [
        bundle.compose_stream_resource(
            mimetype="application/x-hdf5", uri=uri, data_key="detector", parameters={"dataset": "/entry/data/data"}
        ).stream_resource_doc
        for uri in ("file://localhost/etc/passwd", "file://localhost/nsls2/data/one.h5")
    ]
    publish("start", bundle.start_doc)
    for resource in resources:
        publish("stream_resource", resource)
    files.until(lambda: any(uid in path.read_text() for path in files.state.glob("files-of-runs-*.json")))
    manager.terminate()  # how far Kafka was read is known then at once, not only within 5 s
    manager.wait()
    file = files.file("one.h5")
    publish("stop", bundle.compose_stop(exit_status="fail", reason="beam dump"))
    files.up()
    files.until_stage("done", uid)
    result = tmp_path / "results" / f"{uid}_result.h5"
    assert result.read_bytes() == file.read_bytes()[::-1]
    there = tmp_path / "there" / files.name / uid
    assert [path.name for path in there.glob("*") if "result" not in path.name] == ["one.h5"]
    assert "'file://localhost/etc/passwd' is in no directory of roots" in files.log()
