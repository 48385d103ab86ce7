"""`xpcs-stream run` follows a real RunEngine, whatever becomes of its runs and of their documents on the way."""

import pickle
import random
import signal
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from itertools import zip_longest

import bluesky_kafka
import h5py
import msgpack
import numpy as np
import pytest
import zmq
from bluesky import plan_stubs as bps
from bluesky.callbacks.zmq import Publisher
from bluesky.utils import RunEngineInterrupted
from confluent_kafka import Consumer
from ophyd_async.core import TriggerInfo, init_devices

from stream.documents import frame, unpack
from stream.ingest.zmq import ZmqResults
from stream.kafka import create_topic
from stream.messages import RunStart
from stream.operators.qmap import ring_map
from stream.operators.roimap_file import write
from tests.bluesky import assert_valid
from tests.kafka import free_ports
from tests.ophyd_detector import DATASET, FRAME_TIME, SpeckleDetector
from tests.plane import until_said
from tests.run_engine import connected, engine
from tests.test_command_line import started
from tests.test_ingest_bluesky import proxy

pytestmark = pytest.mark.timeout(400)

__all__ = ["engine"]

DEADLINE = 120
N_FRAMES = 200


@pytest.fixture(scope="module")
def roimap():
    return ring_map(
        shape=(48, 48),
        beam_center_x=-20,
        beam_center_y=-20,
        detector_distance=5,
        pixel_size=75e-6,
        incident_energy=11,
        n_static=12,
        n_dynamic=3,
    )


@pytest.fixture(scope="module")
def folder(roimap, tmp_path_factory):
    folder = tmp_path_factory.mktemp("beamline")
    write(folder / "qmap.h5", roimap)
    return folder


@pytest.fixture(scope="module")
def beamline(folder):
    """Where documents go that the command follows, where live results are, and what it says."""
    results = f"127.0.0.1:{free_ports(1)[0]}"
    options = ("--qmap", "qmap.h5", "--out", "{run}.result.h5", "--publish", f"zmq://{results}", "--quiet")
    with proxy() as (into, out):
        source = ("--source", out.replace("tcp", "zmq+bluesky"), "--root", f"{folder}={folder}")
        with started("run", *source, *options, cwd=folder) as process:
            publisher = Publisher(into, serializer=msgpack.dumps)
            listener, said = connected(process, publisher)
            yield into, publisher, f"tcp://{results}", said
            publisher.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == 0
            listener.join()


@pytest.fixture
def detector(engine, folder, roimap):
    with init_devices():
        detector = SpeckleDetector(folder, roimap, name="detector")
    return detector  # noqa: RET504 - it is connected when the context ends


def flying(detector, n_frames=N_FRAMES, then=None):
    """Let the detector take frames, and tell of them as they come; and do something in the middle."""
    yield from bps.stage(detector, wait=True)
    yield from bps.open_run(md={"acquire_period": FRAME_TIME, "acquire_time": FRAME_TIME, "detectors": ["detector"]})
    for part in range(2):
        yield from bps.prepare(detector, TriggerInfo(number_of_events=n_frames // 2), wait=True)
        if not part:
            yield from bps.declare_stream(detector, name="primary", collect=True)
        yield from bps.kickoff(detector, wait=True)
        yield from bps.collect_while_completing([detector], [detector], flush_period=0.1, stream_name="primary")
        yield from bps.checkpoint()
        if not part and then is not None:
            yield from then()
    yield from bps.close_run()
    yield from bps.unstage(detector, wait=True)


def run(engine, plan, *ends):
    """Run a plan as far as it goes, then what ends it; return its documents."""
    kept = []
    token = engine.subscribe(lambda *each: kept.append(each))
    for do in [lambda: engine(plan), *ends]:
        with suppress(RunEngineInterrupted, ZeroDivisionError):
            do()
    engine.unsubscribe(token)
    return kept


def result(folder, documents):
    """What is in the result file, once it is there; the detector's file has what it should have."""
    uid = documents[0][1]["uid"]
    path = folder / f"{uid}.result.h5"
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < deadline, f"no result of {uid}"
        threading.Event().wait(0.05)
    with h5py.File(path) as file:
        return {
            "run": file["entry/entry_identifier"].asstr()[()],
            "status": file["xpcs/exit_status"].asstr()[()],
            **{name: int(file[f"xpcs/ledger/{name}"][()]) for name in ("received", "lost", "undecodable")},
            "mean": file["xpcs/temporal_mean/scattering_2d"][0],
        }


def assert_is_of(found, documents, n_frames, status):
    (uri,) = {document["uri"] for name, document in documents if name == "stream_resource"}
    with h5py.File(uri.removeprefix("file://localhost")) as file:
        mean = file[DATASET][:n_frames].mean(axis=0)
    inside = found.pop("mean")
    assert found == found | {"run": documents[0][1]["uid"], "status": status, "received": n_frames, "lost": 0}
    np.testing.assert_allclose(inside, mean, rtol=1e-6)


def failing():
    yield from bps.null()
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("then", "end", "n_frames", "status"),
    [
        (None, None, N_FRAMES, "success"),
        (bps.pause, "resume", N_FRAMES, "success"),
        (bps.pause, "abort", N_FRAMES // 2, "abort"),
        (bps.pause, "stop", N_FRAMES // 2, "success"),
        (failing, None, N_FRAMES // 2, "fail"),
    ],
)
def test_a_run_ends_as_the_run_engine_says_with_all_frames_until_then(
    engine, detector, beamline, folder, then, end, n_frames, status
):
    engine.subscribe(beamline[1])
    documents = run(engine, flying(detector, then=then), *([getattr(engine, end)] if end else []))
    assert_is_of(result(folder, documents), documents, n_frames, status)


def test_runs_that_are_interleaved_are_told_apart(engine, detector, beamline, folder):
    one, other = (run(engine, flying(detector, n)) for n in (N_FRAMES, 300))
    for pair in zip_longest(one, other):
        for each in filter(None, pair):
            beamline[1](*each)
    assert_is_of(result(folder, one), one, N_FRAMES, "success")
    assert_is_of(result(folder, other), other, 300, "success")


def test_documents_that_come_in_any_order_and_twice_make_the_same_run(engine, detector, beamline, folder):
    documents = run(engine, flying(detector))
    mixed = [*documents, *random.Random(1).choices(documents, k=5)]
    random.Random(2).shuffle(mixed)
    for each in mixed:
        beamline[1](*each)
    assert_is_of(result(folder, documents), documents, N_FRAMES, "success")


def nested(depth):
    return [nested(depth - 1)] if depth else []


def objects():
    return {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": pickle.dumps([1])}


HOSTILE = {
    "a pickle, as is bluesky's default": b" start " + pickle.dumps({"uid": "x"}),
    "an array of objects": b" start " + msgpack.packb({"uid": objects()}),
    "lists in lists": b" start " + msgpack.packb({"uid": "x", "more": nested(100)}),
    "more than there is": b" start \x81\xa3uid\xdd\xff\xff\xff\xff",
    "no name": b" beginning " + msgpack.packb({}),
    "no document": b"what is this",
    "wrong types": frame("descriptor", {"uid": 1, "run_start": [], "data_keys": 3}),
}
HUGE = b" start " + msgpack.packb({"uid": "x", "more": bytes(17 * 2**20)})


@contextmanager
def stranger(into):
    """Anybody who sends to a Proxy."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.linger = 1000 * DEADLINE
        socket.connect(into)
        # What is sent before it subscribes is lost.
        assert socket.poll(1000 * DEADLINE)
        yield socket


def test_hostile_documents_are_counted_and_harm_neither_their_run_nor_later_ones(engine, detector, beamline, folder):
    into, publisher, address, said = beamline
    *opening, stop = documents = run(engine, flying(detector))
    with stranger(into) as socket:
        for each in opening:
            socket.send(frame(*each))
        with ZmqResults(address) as results:
            assert any(isinstance(each, RunStart) and each.run == documents[0][1]["uid"] for each in results)
        for message in [*HOSTILE.values(), frame(*stop)]:
            socket.send(message)
        found = result(folder, documents)
        assert found["undecodable"] == len(HOSTILE)
        assert_is_of(found, documents, N_FRAMES, "success")
        # libzmq hangs up on who sends that.
        socket.send(HUGE)
        deadline = time.monotonic() + DEADLINE
        while not any("is back" in line for line in said):
            assert time.monotonic() < deadline, "".join(said[-6:])
            threading.Event().wait(0.05)
    later = run(engine, flying(detector))
    for each in later:
        publisher(*each)
    assert_is_of(result(folder, later), later, N_FRAMES, "success")


def events_of(broker, topic, is_enough):
    """Documents of a topic from its beginning until there are enough."""
    consumer = Consumer(
        {"bootstrap.servers": broker.bootstrap, "group.id": str(uuid.uuid4()), "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic])
    documents, deadline = [], time.monotonic() + DEADLINE
    try:
        while not is_enough([name for name, _ in documents]):
            assert time.monotonic() < deadline, documents
            record = consumer.poll(0.2)
            if record is not None and record.error() is None:
                documents.append(unpack(record.value()))
    finally:
        consumer.close()
    return documents


def test_a_command_that_is_killed_in_the_middle_publishes_one_run(engine, detector, folder, broker, topic, tmp_path):
    beamline = f"beamline-{uuid.uuid4().hex[:8]}"
    derived = f"{beamline}.xpcs.live.documents"
    create_topic(broker.bootstrap, derived, 1)
    source = ("--source", f"kafka+bluesky://{broker.bootstrap}/{topic}", "--root", f"{folder}={folder}")
    options = ("--qmap", folder / "qmap.h5", "--out", "result.h5", "--checkpoint", "checkpoint", "--quiet")
    documents = ("--documents", f"kafka://{broker.bootstrap}/{beamline}", "--publish-every", "0.2 s")
    command = ("run", *source, *options, *documents, "--runs", 1)
    engine.subscribe(bluesky_kafka.Publisher(topic, broker.bootstrap, key="key", flush_on_stop_doc=True))
    raw = []
    plan = threading.Thread(target=lambda: raw.extend(run(engine, flying(detector, 4000))))
    with started(*command, cwd=tmp_path) as process:
        until_said(process, "taking frames from")
        plan.start()
        events_of(broker, derived, lambda names: names.count("event") >= 5)
        process.kill()
    with started(*command, cwd=tmp_path) as process:
        _, said = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, said
    plan.join()
    published = events_of(broker, derived, lambda names: "stop" in names)
    once = {document["uid"]: (name, document) for name, document in published}
    # From its checkpoint on the second one goes through some frames again.
    furthest = 0
    for uid, (name, document) in list(once.items()):
        if name == "event":
            furthest = max(furthest, document["data"]["xpcs_frames"])
            if document["data"]["xpcs_frames"] < furthest:
                del once[uid]
    assert_valid([*once.values()])
    start, *_, (_, last), _ = [each for each in once.values() if each[0] in ("start", "event", "stop")]
    assert start[1]["original_run_uid"] == raw[0][1]["uid"]
    assert last["data"]["xpcs_frames"] == 4000
    assert last["data"]["xpcs_frames_dropped"] == 0
