"""Documents of a derived run on their way: Kafka, ZeroMQ and Tiled, with the receivers that Bluesky's users have."""

import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiled.client
import zmq
from bluesky_kafka import RemoteDispatcher
from bluesky_tiled_plugins import TiledWriter, subscribe_to_streams
from confluent_kafka import Consumer
from tiled.queries import Eq

from stream import curve
from stream.documents import pack, unframe, unpack
from stream.errors import SinkError
from stream.sinks.bluesky_kafka import KafkaDocuments
from stream.sinks.bluesky_tiled import TiledDocuments
from stream.sinks.bluesky_zmq import ZmqDocuments
from stream.sinks.hdf5 import Hdf5Sink
from tests import bluesky, kafka
from tests.bluesky import N_UPDATES, Kept, assert_valid
from tests.kafka import free_ports

pytestmark = pytest.mark.timeout(400)

DEADLINE = 120
HERE = Path(__file__).parents[1]


def publish(*publishers, given=None, **options):
    """Send a run, and return its documents as they were made."""
    kept = Kept()
    with bluesky.sink(kept, *publishers, **options) as sink:
        for output in given or bluesky.outputs()[1]:
            sink.write(output)
        sink.flush()
    return kept.documents


def received(broker, topic, callback=lambda name, document: None):
    """What bluesky_kafka's own receiver gives, until a run stopped."""
    documents = []
    dispatcher = RemoteDispatcher([topic], broker.bootstrap, str(uuid.uuid4()), {"auto.offset.reset": "earliest"})
    dispatcher.subscribe(lambda name, document: documents.append((name, document)))
    dispatcher.subscribe(callback)
    deadline = time.monotonic() + DEADLINE
    dispatcher.start(lambda: time.monotonic() < deadline and not (documents and documents[-1][0] == "stop"))
    return documents


def records(broker, topic, n):
    consumer = Consumer(
        {"bootstrap.servers": broker.bootstrap, "group.id": str(uuid.uuid4()), "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic])
    try:
        return consumer.consume(n, timeout=DEADLINE)
    finally:
        consumer.close()


def test_bluesky_kafka_receives_the_run(broker, topic):
    sent = publish(KafkaDocuments(broker.bootstrap, topic))
    np.testing.assert_equal(received(broker, topic), [unpack(pack(*each)) for each in sent])


def test_the_key_of_a_record_is_the_uid_of_the_run(broker, topic):
    sent = publish(KafkaDocuments(broker.bootstrap, topic))
    keys = {record.key() for record in records(broker, topic, len(sent))}
    assert keys == {sent[0][1]["uid"].encode()}


def test_a_topic_that_is_not_there_is_an_error(broker):
    with pytest.raises(SinkError, match=r"nowhere.*Unknown topic"):
        KafkaDocuments(broker.bootstrap, "nowhere")


def test_a_document_that_is_too_large_for_the_topic_is_an_error_that_says_so(broker):
    topic = kafka.new_topic(broker, **{"max.message.bytes": 2000})
    with pytest.raises(SinkError, match=r"descriptor of run .* bytes of at most 2,000"):
        publish(KafkaDocuments(broker.bootstrap, topic))


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """Two publishers whose broker is gone: one that waits for 3 s, and one that is stopped by an event."""
    stop = threading.Event()
    with kafka.started(tmp_path_factory.mktemp("gone")) as broker, suppress(SinkError):
        topic = kafka.new_topic(broker)
        with (
            KafkaDocuments(broker.bootstrap, topic, timeout=3) as patient,
            KafkaDocuments(broker.bootstrap, topic, timeout=60, stop=stop) as stopped,
        ):
            broker.kill()
            yield patient, stopped, stop


def test_a_broker_that_is_away_costs_time_only_for_what_must_not_be_lost(cut_off):
    patient, _, _ = cut_off
    began = time.monotonic()
    for _ in range(100):
        patient.publish("run", "event", {"data": {}}, may_be_lost=True)
    assert time.monotonic() - began < 30  # not 100 times 3
    patient.publish("run", "stop", {}, may_be_lost=False)
    with pytest.raises(SinkError, match=r"stop of run run was not delivered|did not take everything"):
        patient.flush()
    assert 2 < time.monotonic() - began < 60


def test_a_stopped_sink_does_not_wait_for_a_broker_that_is_away(cut_off):
    _, publisher, stop = cut_off
    publisher.publish("run", "stop", {}, may_be_lost=False)
    stop.set()
    began = time.monotonic()
    with pytest.raises(SinkError, match="stopped while Kafka had not taken everything"):
        publisher.flush()
    assert time.monotonic() - began < 30  # not 60


def go(bootstrap, topic, memory, n):
    """Publish the run up to update n, say so, and wait to be killed."""
    updates = bluesky.outputs()[1]
    with bluesky.sink(KafkaDocuments(bootstrap, topic), memory=Path(memory)) as sink:
        for output in updates[: 1 + 4 * n]:
            sink.write(output)
        print("there", flush=True)  # noqa: T201
        sys.stdin.read()


def test_a_sink_that_was_killed_goes_on_with_the_same_run(broker, topic, tmp_path):
    code = "import sys; from tests.test_bluesky_transport import go; go(*sys.argv[1:4], int(sys.argv[4]))"
    given = bluesky.outputs()[1]
    for n in (1, 3):
        process = subprocess.Popen(
            [sys.executable, "-c", code, broker.bootstrap, topic, str(tmp_path / "m.json"), str(n)],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout.readline() == b"there\n"
            process.send_signal(signal.SIGKILL)
            process.stdin.close()
    publish(KafkaDocuments(broker.bootstrap, topic), given=[given[0], *given[-9:]], memory=tmp_path / "m.json")
    documents = received(broker, topic)
    assert_valid(documents)
    numbers = [document["seq_num"] for name, document in documents if name == "event"]
    assert numbers[-1] == 6  # 1, then 1 to 3 again, the last and the end; what the killed had not sent is missing


PROXY = """
import sys
from pathlib import Path
from bluesky.callbacks.zmq import Proxy, ServerCurve
into, out, *keys = sys.argv[1:]
curve = ServerCurve(Path(keys[0]), Path(keys[1]), None) if keys else None
proxy = Proxy(into, out, in_curve=curve)
print("there", flush=True)
proxy.start()
"""

DISPATCHER = """
import sys
from bluesky.callbacks.zmq import RemoteDispatcher
from stream.documents import pack, read
dispatcher = RemoteDispatcher(sys.argv[1], prefix=sys.argv[2].encode(), deserializer=read, strict=True)
dispatcher.subscribe(lambda name, document: print(pack(name, document).hex(), flush=True))
dispatcher.start()
"""


@contextmanager
def started(code, *arguments):
    """Another process; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def proxy(*keys):
    """A Proxy of bluesky; yields where to send and where to receive."""
    into, out = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    with started(PROXY, into, out, *keys) as process:
        assert process.stdout.readline() == "there\n"
        yield into, out


@contextmanager
def dispatcher(out, publisher, prefix=""):
    """A RemoteDispatcher of bluesky that has begun to receive; yields what gives its documents."""
    with started(DISPATCHER, out, prefix) as process:
        is_there = threading.Event()

        def probe():
            while not is_there.wait(0.05):
                publisher.publish("probe", "event", {"uid": "probe"}, may_be_lost=True)

        def documents():
            for line in process.stdout:
                name, document = unpack(bytes.fromhex(line))
                if document["uid"] == "probe":
                    continue
                yield name, document
                if name == "stop":
                    return

        prober = threading.Thread(target=probe)
        publisher.publish("probe", "event", {"uid": "probe"}, may_be_lost=False)
        prober.start()
        try:
            assert unpack(bytes.fromhex(process.stdout.readline()))[1] == {"uid": "probe"}
        finally:
            is_there.set()
            prober.join()
        yield documents


def test_a_dispatcher_behind_a_proxy_receives_the_run():
    with proxy() as (into, out), ZmqDocuments(into) as publisher, dispatcher(out, publisher) as documents:
        sent = publish(publisher)
        np.testing.assert_equal(list(documents()), [unpack(pack(*each)) for each in sent])


def test_a_dispatcher_receives_what_has_its_prefix():
    with (
        proxy() as (into, out),
        ZmqDocuments(into, prefix=b"a") as ours,
        ZmqDocuments(into, prefix=b"b") as others,
        dispatcher(out, ours, "a") as documents,
    ):
        publish(others, fitted=1)
        sent = publish(ours)
        assert [document["uid"] for _, document in documents()] == [document["uid"] for _, document in sent]


def test_the_first_document_after_connecting_reaches_the_proxy():
    into = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    came, is_sent = [], threading.Event()

    def receive():
        with zmq.Context() as context, context.socket(zmq.SUB) as receiver:
            receiver.subscribe(b"")
            receiver.bind(into)
            if receiver.poll(1000 * DEADLINE):
                came.append(unframe(receiver.recv()))
            is_sent.wait(DEADLINE)  # else nobody would be there for the second one

    late = threading.Timer(0.3, receive)
    late.start()
    with ZmqDocuments(into) as publisher:
        publisher.publish("run", "start", {"uid": "1"}, may_be_lost=False)
        publisher.publish("run", "stop", {"uid": "2"}, may_be_lost=False)
        is_sent.set()
        late.join()
    assert came == [(b"", "start", {"uid": "1"})]


def test_a_proxy_that_was_killed_is_noticed_and_one_in_its_place_is_used():
    into, out = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))

    def offer():
        publisher.publish("run", "event", {}, may_be_lost=True)

    with ZmqDocuments(into, timeout=0.5) as publisher:
        for _ in range(2):
            with pytest.raises(SinkError, match="nobody took"):
                publisher.publish("run", "start", {}, may_be_lost=False)
            with started(PROXY, into, out) as process:
                assert process.stdout.readline() == "there\n"
                wait_for(lambda: not fails(offer))
            # Not only when as much waits for it as may wait.
            assert wait_for(lambda: fails(offer)) < 500


def fails(call):
    try:
        call()
    except SinkError:
        return True
    return False


def wait_for(condition):
    """Return how often it was asked, every 10 ms."""
    deadline, n = time.monotonic() + DEADLINE, 1
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)
        n += 1
    return n


def test_a_proxy_that_is_not_there_costs_time_only_for_what_must_not_be_lost():
    with ZmqDocuments(f"tcp://127.0.0.1:{free_ports(1)[0]}", timeout=4) as publisher:
        began = time.monotonic()
        with pytest.raises(SinkError, match="nobody took event of run r"):
            publisher.publish("r", "event", {}, may_be_lost=True)
        assert time.monotonic() - began < 4
        with pytest.raises(SinkError, match="nobody took stop of run r"):
            publisher.publish("r", "stop", {}, may_be_lost=False)
        assert 4 <= time.monotonic() - began < 30


def test_a_proxy_with_keys_takes_those_it_knows_only(tmp_path):
    curve.make(tmp_path, "proxy")
    for name in ("known", "unknown"):
        curve.make(tmp_path / name, "client")
    with proxy(tmp_path / "proxy.key_secret", tmp_path / "known") as (into, out):
        keys = {
            name: curve.ClientKeys.read(tmp_path / name / "client.key_secret", tmp_path / "proxy.key")
            for name in ("known", "unknown")
        }
        with ZmqDocuments(into, keys=keys["known"]) as publisher, dispatcher(out, publisher) as documents:
            sent = publish(publisher)
            assert len(list(documents())) == len(sent)
        with (
            ZmqDocuments(into, keys=keys["unknown"], timeout=10) as publisher,
            pytest.raises(SinkError, match="the Proxy does not know our key"),
        ):
            publisher.publish("r", "stop", {}, may_be_lost=False)


def test_an_address_that_cannot_be_is_an_error():
    with pytest.raises(SinkError, match="tcp://nowhere"):
        ZmqDocuments("tcp://nowhere")


@pytest.fixture(scope="module")
def tiled_server(tmp_path_factory):
    """A Tiled server, with leave to read the result files."""
    files = tmp_path_factory.mktemp("results")
    port = free_ports(1)[0]
    command = [Path(sys.executable).with_name("tiled"), "serve", "catalog", "--temp", "--api-key", "secret"]
    process = subprocess.Popen(
        [*command, "--read", str(files), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    is_up = threading.Event()

    def listen():
        for line in process.stdout:
            said.append(line)
            if "startup complete" in line:
                is_up.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert is_up.wait(DEADLINE), "".join(said)
        client = tiled.client.from_uri(f"http://127.0.0.1:{port}", api_key="secret")
        yield client, files
        client.context.close()
    finally:
        process.terminate()
        listener.join()
        with process:
            pass


# tiled 0.2.20 calls the client of websockets 17.1 as that of 16 was to be called.
@pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning")
def test_tiled_keeps_the_run_and_tells_every_update_when_it_comes(broker, topic, tiled_server):
    client, files = tiled_server
    updates = queue.Queue()
    with (
        subscribe_to_streams(client, updates.put, streams={"primary": "xpcs_g2"}),
        Hdf5Sink(files / "r.h5", qmap=bluesky.outputs()[0]) as file,
    ):
        for output in bluesky.outputs()[1]:
            file.write(output)
        kept = Kept()
        with bluesky.sink(kept, KafkaDocuments(broker.bootstrap, topic)) as sink:
            sink.written(files / "r.h5")
            for output in bluesky.outputs()[1]:
                sink.write(output)
        received(broker, topic, TiledWriter(client, batch_size=1))
        live = [updates.get(timeout=DEADLINE) for _ in range(N_UPDATES + 1)]
    run = client[kept.documents[0][1]["uid"]]
    events = [document["data"] for name, document in kept.documents if name == "event"]
    for key in ("xpcs_g2", "xpcs_g2_err", "xpcs_saxs_1d", "xpcs_n_pairs", "xpcs_frames", "xpcs_relaxation_rate"):
        np.testing.assert_array_equal(run["primary"][key].read(), [event[key] for event in events])
    assert {update.run_uid for update in live} == {kept.documents[0][1]["uid"]}
    for update, event in zip(sorted(live, key=lambda update: update.sequence), events, strict=True):
        np.testing.assert_array_equal(np.reshape(update.data(), (4, -1)), event["xpcs_g2"])
    with h5py.File(files / "r.h5") as result:
        np.testing.assert_array_equal(
            run["result"]["xpcs_result_g2"].read()[0], result["xpcs/multitau/normalized_g2"][()]
        )
        np.testing.assert_array_equal(
            run["result"]["xpcs_result_scattering_2d"].read(), result["xpcs/temporal_mean/scattering_2d"][()]
        )
    np.testing.assert_array_equal(run["result"]["xpcs_result_g2"].read()[0].T, events[-1]["xpcs_g2"])


@pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning")
def test_a_client_of_tiled_is_told_every_update_before_the_next_one(tiled_server, monkeypatch):
    client, _ = tiled_server
    monkeypatch.setenv("TILED_API_KEY", "secret")
    updates, kept = queue.Queue(), Kept()
    with (
        subscribe_to_streams(client, updates.put, streams={"primary": "xpcs_g2"}),
        bluesky.sink(kept, stores=[TiledDocuments(str(client.uri))]) as sink,
    ):
        for output in (replace(output, run="raw-3") for output in bluesky.outputs()[1]):
            n_events = [name for name, _ in kept.documents].count("event")
            sink.write(output)
            sink.flush()
            events = [document for name, document in kept.documents if name == "event"]
            for event in events[n_events:]:
                while (update := updates.get(timeout=DEADLINE)).run_uid != kept.documents[0][1]["uid"]:
                    pass  # of runs that were there before
                np.testing.assert_array_equal(np.reshape(update.data(), (4, -1)), event["data"]["xpcs_g2"])
    assert len(events) == N_UPDATES + 1


def test_an_agent_finds_the_outcome_by_the_uid_of_the_raw_run(tiled_server):
    client, _ = tiled_server
    writer = TiledWriter(client, batch_size=1)
    given = [replace(output, run="raw-2") for output in bluesky.outputs()[1]]
    for name, document in bluesky.documents_of([*given[:-1], replace(given[-1], exit_status="abort")]):
        writer(name, dict(document))
    run = client.search(Eq("start.original_run_uid", "raw-2")).values().last()
    assert run.metadata["stop"]["raw_exit_status"] == "abort"
    assert run["primary"].read()["xpcs_relaxation_rate"].values[-1] > 0
