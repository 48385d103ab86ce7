"""Our wire over Kafka, with a real broker."""

import gc
import logging
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from crc32c import crc32c

from stream.errors import ConfigError, NotSeekable, SinkError, SourceError
from stream.ingest.kafka import KafkaResults, KafkaSource
from stream.kafka import Cluster, create_topic
from stream.messages import Events, FrameBatch, Rejected, Result, RunStart, RunStop
from stream.operators.multitau import MultiTau
from stream.outbox import QUEUE_KBYTES
from stream.pipeline import Pipeline
from stream.sinks.kafka import KafkaSink
from stream.wire import encode
from tests import hostile, kafka
from tests.conftest import chunks_of, events_of, make_roimap
from tests.kafka import PASSWORD, USER

pytestmark = pytest.mark.timeout(400)

DEADLINE = 120
SHAPE = (6, 50)


def start(run="a", region=0, shape=SHAPE, dtype="<u2"):
    return RunStart(run=run, region=region, shape=shape, dtype=dtype, frame_time=0.001, count_time=0.0009)


def counts(n, shape=SHAPE, dtype="<u2", high=3, seed=0):
    return np.random.default_rng(seed).integers(0, high, (n, *shape)).astype(dtype)


def batch(first, frames, run="a", region=0):
    return FrameBatch(run=run, region=region, first=first, frames=frames, timestamp_ns=10**18 + first * 10**6)


def stop(n_frames, run="a", region=0):
    return RunStop(run=run, region=region, n_frames=n_frames, exit_status="success")


def result(n_frames, run="a", region=0, final=False, n_bytes=24):
    arrays = {"g2": np.full(n_bytes // 8, n_frames, "<f8")}
    return Result(run=run, region=region, operator="multitau", n_frames=n_frames, final=final, arrays=arrays)


def take(n, source):
    """Return the next n messages, waiting for them."""
    deadline = time.monotonic() + DEADLINE
    messages = []
    stream = iter(source)
    while len(messages) < n:
        message = next(stream)
        if message is not None:
            messages.append(message)
        assert time.monotonic() < deadline, f"{len(messages)} of {n} messages came"
    return messages


def send(broker, topic, *outputs, **options):
    with KafkaSink(broker.bootstrap, topic, **options) as sink:
        for output in outputs:
            sink.write(output)


def send_raw(broker, topic, *records):
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    for headers, value in records:
        producer.produce(topic, value, partition=0, headers=headers)
    assert producer.flush(DEADLINE) == 0


def same(one, other):
    """Tell whether two messages say the same, whatever the cuts of memory."""
    [(_, header, payload), (_, other_header, other_payload)] = encode(one), encode(other)
    return (header, bytes(payload)) == (other_header, bytes(other_payload))


def assert_same(came, sent):
    assert len(came) == len(sent)
    for one, other in zip(came, sent, strict=True):
        assert same(one, other), (one, other)


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
def test_a_run_arrives_as_it_was_sent(broker, topic, dtype):
    frames = counts(7, dtype=dtype)
    run = [start(dtype=dtype), batch(0, frames[:4]), batch(4, events_of(frames[4:])), stop(7)]

    send(broker, topic, *run)
    with KafkaSource(broker.bootstrap, topic, 0) as source:
        came = take(len(run), source)
    assert_same(came, run)


def test_results_of_all_regions_arrive_each_region_in_its_order(broker):
    topic = kafka.new_topic(broker, 3)
    sent = [[start(region=r), *(result(n, region=r) for n in range(20)), stop(20, region=r)] for r in range(3)]

    send(broker, topic, *(output for outputs in zip(*sent, strict=True) for output in outputs))
    with KafkaResults(broker.bootstrap, topic) as source:
        came = take(3 * 22, source)
    for region in range(3):
        assert_same([message for message in came if message.region == region], sent[region])


def test_each_region_is_a_partition_and_the_key_tells_what_a_record_is(broker):
    topic = kafka.new_topic(broker, 2)
    send(broker, topic, start(region=1), result(8, region=1))
    with KafkaSource(broker.bootstrap, topic, 0) as source:
        assert next(iter(source)) is None
    with kafka_reader(broker, topic, 1) as reader:
        assert [reader.poll(DEADLINE).key() for _ in range(2)] == [b"1", b"a/1/multitau/8"]


@contextmanager
def kafka_reader(broker, topic, partition):
    reader = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "test", "enable.auto.commit": False})
    reader.assign([TopicPartition(topic, partition, 0)])
    try:
        yield reader
    finally:
        reader.close()


def test_frames_are_cut_into_records_with_their_numbers_and_their_times(broker, topic):
    frames = counts(12, (300, 300), high=60000)

    send(broker, topic, start(shape=(300, 300)), batch(5, frames))
    with KafkaSource(broker.bootstrap, topic, 0) as source:
        _, *pieces = take(4, source)
    assert [(piece.first, len(piece.frames)) for piece in pieces] == [(5, 5), (10, 5), (15, 2)]
    assert [piece.timestamp_ns - 10**18 for piece in pieces] == [5_000_000, 10_000_000, 15_000_000]
    assert np.array_equal(np.concatenate([piece.frames for piece in pieces]), frames)


def test_events_are_cut_where_they_fill_a_record(broker, topic):
    frames = counts(40, (300, 300))
    frames[:20] = frames[:20] > 1  # a third of the pixels, then two thirds
    send(broker, topic, start(shape=(300, 300)), batch(0, events_of(frames)))
    pieces = []
    with KafkaSource(broker.bootstrap, topic, 0) as source:
        for message in source:
            if isinstance(message, FrameBatch):
                pieces.append(message)
                if message.first + len(message.frames) == 40:
                    break
    assert all(isinstance(piece.frames, Events) for piece in pieces)
    assert len({len(piece.frames) for piece in pieces[:-1]}) > 1
    assert np.array_equal(np.concatenate([piece.frames.dense() for piece in pieces]), frames)


def test_a_frame_larger_than_a_record_says_how_many_regions_would_do(broker):
    topic = kafka.new_topic(broker, 3)
    frames = counts(1, (1030, 1030))
    with KafkaSink(broker.bootstrap, topic) as sink:
        sink.write(start(shape=(1030, 1030)))
        with pytest.raises(SinkError, match=r"frames 7 to 7 of run 'a': 2,12.* more than the 1,048,588.* 3 regions"):
            sink.write(batch(7, frames))
        for region, rows in enumerate(np.array_split(np.arange(1030), 3)):
            sink.write(batch(7, frames[:, rows], region=region))
        sink.flush()
        assert sink.delivered == 4


def test_results_may_be_as_large_as_the_topic_takes(broker):
    large = kafka.new_topic(broker, **{"max.message.bytes": 8_000_000})
    send(broker, large, result(1, n_bytes=7_900_000))
    with KafkaResults(broker.bootstrap, large) as source:
        assert_same(take(1, source), [result(1, n_bytes=7_900_000)])
    with pytest.raises(SinkError, match=r"after 1 frames of run 'a': 8,.* more than the 8,000,000.*max.message.bytes"):
        send(broker, large, result(1, n_bytes=8_100_000))


def test_every_record_that_the_sink_takes_for_small_enough_kafka_takes(broker, topic):
    with KafkaSink(broker.bootstrap, topic) as sink:
        n_bytes = 1_048_588 // 8 * 8
        refused = 0
        while True:
            try:
                sink.write(result(1, n_bytes=n_bytes))
                break
            except SinkError:
                n_bytes -= 8
                refused += 1
        sink.flush()
        assert (sink.delivered, sink.failed) == (1, 0)
    assert 0 < refused < 100


def test_a_region_without_a_partition_is_named(broker, topic):
    with KafkaSink(broker.bootstrap, topic) as sink, pytest.raises(SinkError, match=r"has 1 partitions.* region 1"):
        sink.write(start(region=1))
    with pytest.raises(SourceError, match="has 1 partitions: none for region 1"):
        KafkaSource(broker.bootstrap, topic, 1)


def test_a_poison_record_is_rejected_with_its_place_and_the_next_is_read(broker, topic):
    poison = [([("h", header)], payload) for _, (_, header, payload) in readable(hostile.CORPUS)]
    poison += [([], b"x"), (None, None), ([("h", b"x"), ("h", b"x")], b"x"), ([("h", None)], b"")]
    send_raw(broker, topic, *poison)
    send_header_name(broker, topic, b"\xff\xfe")
    send_raw(broker, topic, *[([("h", bytes(h))], bytes(p)) for _, h, p in [encode(start(region=3))]])
    send(broker, topic, result(1), start())

    with KafkaSource(broker.bootstrap, topic, 0) as source:
        *rejected, good = take(len(poison) + 4, source)
    assert same(good, start())
    for offset, message in enumerate(rejected):
        assert isinstance(message, Rejected), offset
        assert message.reason.startswith(f"kafka://{broker.bootstrap}/{topic}: region 0, offset {offset}: ")
    assert "codec can't decode byte 0xff" in rejected[-3].reason
    assert "it is of region 3" in rejected[-2].reason
    assert "a result of 'multitau' stands where frames are expected" in rejected[-1].reason


def readable(corpus):
    """Leave out what is no record of a header and a payload, or too large for one."""
    return [(name, parts) for name, parts, _ in corpus if len(parts) == 3 and len(parts[1]) < 2**19]


def send_header_name(broker, topic, name):
    """Send a record with a header of any name; no client does that (Kafka protocol: record batch 2, Produce 3)."""

    def short(text):
        return struct.pack(">h", len(text)) + text

    body = bytes([0, 0, 0, 1, 2]) + b"v" + bytes([2, 2 * len(name)]) + name + bytes([2]) + b"x"
    records = struct.pack(">hiqqqhii", 0, 0, 0, 0, -1, -1, -1, 1) + bytes([2 * len(body)]) + body
    versioned = struct.pack(">ibI", 0, 2, crc32c(records)) + records
    batch = struct.pack(">qi", 0, len(versioned)) + versioned
    api = struct.pack(">hhi", 0, 3, 1) + short(b"test") + struct.pack(">hhi", -1, -1, 30000)
    sent = api + struct.pack(">i", 1) + short(topic.encode()) + struct.pack(">iii", 1, 0, len(batch)) + batch
    host, port = broker.bootstrap.split(":")
    with socket.create_connection((host, int(port)), DEADLINE) as connection:
        connection.sendall(struct.pack(">i", len(sent)) + sent)
        assert connection.recv(1000)


def test_what_is_safe_shows_as_the_committed_offset_of_a_group_that_nobody_joins(broker, topic):
    with KafkaSink(broker.bootstrap, topic) as sink:
        for n in range(3):
            sink.write(RunStop(run=f"run-{n}", n_frames=0, exit_status="success"))
    with KafkaSource(broker.bootstrap, topic, 0, group="8idi.xpcs.safe") as source:
        take(2, source)
        source.acknowledge(source.position())
    watching = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "8idi.xpcs.safe"})
    [committed] = watching.committed([TopicPartition(topic, 0)], timeout=30)
    watching.close()
    assert committed.offset == source.position()[f"{topic}:0"] == 2


def test_a_source_goes_on_exactly_where_its_position_says(broker, topic):
    run = [start(), *(batch(i, counts(1, seed=i)) for i in range(30)), stop(30)]
    send(broker, topic, *run)
    came, position = [], {}
    for n in (1, 12, 19):
        with KafkaSource(broker.bootstrap, topic, 0) as source:
            source.seek(position)
            came += take(n, source)
            position = source.position()
            assert position == {f"{topic}:0": len(came)}
    assert_same(came, run)


def test_a_record_that_becomes_several_messages_is_passed_with_the_last_of_them(broker, topic):
    frames = counts(5)
    chunks = chunks_of(frames)
    spoilt = chunks.chunks[2][:16] + b"\xff" * (len(chunks.chunks[2]) - 16)
    sent = replace(chunks, chunks=(*chunks.chunks[:2], spoilt, *chunks.chunks[3:]))
    send(broker, topic, start(), batch(0, sent), stop(5))
    with KafkaSource(broker.bootstrap, topic, 0) as source:
        messages = (message for message in source if message is not None)
        came = [(message, source.position()) for message in islice(messages, 5)]
    assert [type(message) for message, _ in came] == [RunStart, FrameBatch, Rejected, FrameBatch, RunStop]
    assert [position for _, position in came] == [{f"{topic}:0": offset} for offset in (1, 1, 1, 2, 3)]
    assert_same([came[1][0], came[3][0]], [batch(0, frames[:2]), batch(3, frames[3:])])


def test_results_go_on_exactly_where_their_position_says(broker):
    topic = kafka.new_topic(broker, 2)
    send(broker, topic, *(result(n, region=n % 2) for n in range(10)))
    with KafkaResults(broker.bootstrap, topic) as source:
        assert source.position() == {}
        first = take(4, source)
        position = source.position()
    with KafkaResults(broker.bootstrap, topic) as source:
        source.seek(position)
        rest = take(6, source)
    assert sorted(message.n_frames for message in first + rest) == list(range(10))


@pytest.mark.parametrize("place", ["{topic}:1", "other:0", "frame"])
def test_a_position_of_something_else_is_refused(broker, topic, place):
    place = place.format(topic=topic)
    with KafkaSource(broker.bootstrap, topic, 0) as source, pytest.raises(NotSeekable, match=f"{place} = 3"):
        source.seek({place: 3})


@pytest.mark.parametrize("kept", [20, 32])
def test_records_that_kafka_no_longer_has_are_told_and_reading_goes_on(broker, topic, caplog, kept):
    run = [start(), *(batch(i, counts(1, seed=i)) for i in range(30)), stop(30)]
    send(broker, topic, *run)
    client = kafka.admin(broker)
    [asked] = client.delete_records([TopicPartition(topic, 0, kept)]).values()
    assert asked.result(DEADLINE).low_watermark == kept
    with KafkaSource(broker.bootstrap, topic, 0) as source:
        source.seek({f"{topic}:0": 5})
        if kept == 32:  # all of them
            deadline = time.monotonic() + DEADLINE
            for _ in source:
                if "no longer there" in caplog.text:
                    break
                assert time.monotonic() < deadline
            run.append(start(run="b"))
            send(broker, topic, run[-1])
        came = take(len(run) - kept, source)
        assert source.position() == {f"{topic}:0": len(run)}
    assert_same(came, run[kept:])
    assert "region 0, offset 5 is no longer there" in caplog.text
    assert f"region 0 goes on at offset {kept}: {kept - 5} records are gone" in caplog.text


def test_what_comes_twice_or_again_changes_no_result(broker):
    frames = counts(64)
    batches = [batch(i, frames[i : i + 8]) for i in range(0, 64, 8)]
    clean = [start(), *batches, stop(64)]
    again = [start(), *batches[:3], *batches[:3], start(), *batches[1:5], batches[4], *batches, *batches[6:], stop(64)]

    states = [final_results(broker, outputs) for outputs in (clean, again)]
    assert states[0]["ledger"]["received"] == states[1]["ledger"]["received"] == 64
    assert (states[0]["ledger"]["duplicate"], states[1]["ledger"]["duplicate"]) == (0, 8 * 13)
    for name, array in states[0]["multitau"].items():
        assert np.array_equal(array, states[1]["multitau"][name], equal_nan=True), name


def final_results(broker, outputs):
    topic = kafka.new_topic(broker)
    send(broker, topic, *outputs)
    results = {}

    class Keep:
        def write(self, output):
            if isinstance(output, Result):
                results[output.operator] = output.arrays

        def flush(self):
            pass

    with KafkaSource(broker.bootstrap, topic, 0) as source:
        Pipeline(source, lambda start: [MultiTau(start, make_roimap())], [Keep()], runs=1).run()
    return results


def test_while_kafka_is_away_both_ends_wait_and_nothing_is_lost(broker, topic, caplog):
    frame = counts(1, (500, 950), high=60000)
    n, enough = QUEUE_KBYTES * 1024 // frame.nbytes + 20, 10
    came, written = [], []

    def write():
        with KafkaSink(broker.bootstrap, topic) as sink:
            sink.write(start(shape=(500, 950)))
            for i in range(n):
                sink.write(batch(i, frame))
                written.append(i)
            sink.write(stop(n))

    def read():
        with KafkaSource(broker.bootstrap, topic, 0) as source:
            for message in source:
                if message is not None:
                    came.append(message.first if isinstance(message, FrameBatch) else message)
                if isinstance(message, RunStop) or time.monotonic() > deadline:
                    return

    deadline = time.monotonic() + 2 * DEADLINE
    threads = [threading.Thread(target=target, daemon=True) for target in (write, read)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(written) > enough)
    broker.stop()
    try:
        wait_until(lambda: unchanged(written, 1.0))
        assert len(written) < n  # there is no more room
    finally:
        broker.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert same(came[0], start(shape=(500, 950)))
    assert came[1:-1] == list(range(n))
    assert same(came[-1], stop(n))
    assert 1 <= caplog.text.count("is away") <= 2  # once for each end
    assert "is back" in caplog.text


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def unchanged(things, seconds):
    n = len(things)
    threading.Event().wait(seconds)
    return len(things) == n


def test_a_slow_reader_falls_behind_and_needs_no_more_memory(broker, topic):
    frame = counts(1, (500, 950), high=60000)
    with KafkaSink(broker.bootstrap, topic) as sink:
        sink.write(start(shape=(500, 950)))
        for i in range(210):
            sink.write(batch(i, frame))
    gc.collect()
    with KafkaSource(broker.bootstrap, topic, 0) as source:
        before = memory()
        stream = iter(source)
        take(1, stream)
        most = 0
        for _ in range(20):
            assert next(stream) is not None
            most = max(most, memory() - before)
            threading.Event().wait(0.1)
        assert most < 120e6
        assert [message.first for message in take(190, stream)] == list(range(20, 210))


def memory():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def test_an_unknown_topic_is_told_at_once(broker):
    for refused, use in [
        (SourceError, lambda: KafkaSource(broker.bootstrap, "nobody-made-it", 0)),
        (SourceError, lambda: KafkaResults(broker.bootstrap, "nobody-made-it")),
        (SinkError, lambda: KafkaSink(broker.bootstrap, "nobody-made-it")),
    ]:
        began = time.monotonic()
        with pytest.raises(refused, match=f"kafka://{broker.bootstrap}/nobody-made-it: .*Unknown topic"):
            use()
        assert time.monotonic() - began < 15  # not 30


def test_a_broker_that_never_answers_is_named():
    [port] = kafka.free_ports(1)
    there = f"127.0.0.1:{port}"
    for refused, use in [
        (SourceError, lambda: KafkaSource(there, "frames", 0, timeout=1)),
        (SinkError, lambda: KafkaSink(there, "frames", timeout=1)),
        (ConfigError, lambda: create_topic(there, "frames", 1, timeout=1)),
    ]:
        with pytest.raises(refused, match=f"kafka://{there}/frames: .*Connection refused"):
            use()


def test_what_kafka_refuses_fails_the_next_write_and_every_flush(broker, topic):
    sink = KafkaSink(broker.bootstrap, topic, max_record_bytes=2_000_000)
    sink.write(result(7, final=True, n_bytes=1_500_000))
    for fails in (sink.flush, sink.flush, lambda: sink.write(stop(7)), lambda: sink.__exit__(None, None, None)):
        with pytest.raises(SinkError, match="the result of 'multitau' after 7 frames of run 'a' was not delivered"):
            fails()
    assert (sink.delivered, sink.failed) == (0, 1)


def test_an_interim_result_that_does_not_arrive_is_told_and_the_final_one_still_goes(broker, topic, caplog):
    with KafkaSink(broker.bootstrap, topic, max_record_bytes=2_000_000) as sink:
        sink.write(result(7, n_bytes=1_500_000))
        sink.flush()
        assert "the result of 'multitau' after 7 frames of run 'a' was not delivered" in caplog.text
        sink.write(result(8, final=True))
        sink.flush()
        assert (sink.delivered, sink.failed) == (1, 1)


def test_without_kafka_a_sink_fails_after_its_timeout_and_soon_once_it_is_stopped(broker, topic):
    told = threading.Event()
    late = KafkaSink(broker.bootstrap, topic, timeout=4)
    stopped = KafkaSink(broker.bootstrap, topic, stop=told)
    broker.stop()
    try:
        began = time.monotonic()
        late.write(start())
        with pytest.raises(SinkError, match=f"kafka://{broker.bootstrap}/{topic}: .*Connection refused"):
            late.flush()
        wait_until(lambda: "the start of run 'a' was not delivered" in failure_of(late.flush))
        assert "was not delivered" in failure_of(lambda: late.__exit__(None, None, None))
        stopped.write(start())
        told.set()
        for fails in (stopped.flush, lambda: stopped.__exit__(None, None, None)):
            with pytest.raises(SinkError, match="stopped while Kafka had not taken everything"):
                fails()
        assert time.monotonic() - began < 30  # not 300
    finally:
        broker.start()


def failure_of(call):
    with pytest.raises(SinkError) as error:
        call()
    return str(error.value)


def test_a_topic_is_made_once_and_must_have_as_many_partitions_as_there_are_regions(broker):
    name = f"made-{time.time_ns()}"
    for _ in range(2):
        create_topic(broker.bootstrap, name, 4, config={"max.message.bytes": "2000000"})
    send(broker, name, result(1, region=3, n_bytes=1_900_000))
    with pytest.raises(ConfigError, match=f"/{name} is there and has 4 partitions, not 5"):
        create_topic(broker.bootstrap, name, 5)
    with pytest.raises(ConfigError, match="nonsense"):
        create_topic(broker.bootstrap, f"{name}-too", 1, config={"nonsense": "1"})


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({"acks": "0"}, "property acks is not for you to set"),
        ({"nonsense": "1"}, 'No such configuration property: "nonsense"'),
        ({"sasl.password": "hunter2"}, "property sasl.password: write file:PATH or env:NAME"),
        ({"sasl.password": "env:NOBODY_SET_IT"}, "there is nothing in env:NOBODY_SET_IT"),
        ({"ssl.key.password": "file:/nowhere"}, "property ssl.key.password: /nowhere: No such file"),
    ],
)
def test_properties_that_cannot_be_meant_are_named(broker, topic, properties, says):
    with pytest.raises(ConfigError, match=says) as error:
        KafkaSink(broker.bootstrap, topic, properties=properties)
    assert "hunter2" not in str(error.value)


@pytest.fixture
def doors(secured):
    return secured


def through(door, **secrets):
    """Return where a door is, and properties that say where its secrets stand."""
    properties = dict(door) | secrets
    return properties.pop("bootstrap.servers"), properties


def test_runs_go_through_the_door_for_passwords_and_the_door_for_certificates(doors, tmp_path, monkeypatch):
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    (tmp_path / "key.pem").write_text(doors.mtls["ssl.key.pem"])
    scram, with_password = through(doors.scram, **{"sasl.password": "env:KAFKA_PASSWORD"})
    mtls, with_key = through(doors.mtls, **{"ssl.key.pem": f"file:{tmp_path / 'key.pem'}"})

    create_topic(scram, "secured", 1, properties=with_password)
    with KafkaSink(scram, "secured", properties=with_password) as sink:
        sink.write(start())
    with KafkaSource(mtls, "secured", 0, properties=with_key) as source:
        assert_same(take(1, source), [start()])


def test_a_wrong_password_names_the_user_and_nowhere_the_password(doors, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    secret = tmp_path / "password"
    secret.write_text("hunter2\n")
    there, properties = through(doors.scram, **{"sasl.password": f"file:{secret}", "debug": "security"})
    for refused, use in [
        (SourceError, lambda: KafkaSource(there, "secured", 0, properties=properties)),
        (SinkError, lambda: KafkaSink(there, "secured", properties=properties)),
    ]:
        began = time.monotonic()
        with pytest.raises(refused, match=f"{USER} cannot log in: .*invalid credentials") as error:
            use()
        assert time.monotonic() - began < 20  # not 30
        assert "hunter2" not in str(error.value)
    assert "SASL" in caplog.text
    assert "hunter2" not in caplog.text


def test_who_shows_no_certificate_is_told_so(doors):
    there, properties = through(doors.mtls)
    properties = {name: value for name, value in properties.items() if name == "security.protocol" or "ca" in name}
    with pytest.raises(SourceError, match=r"we cannot log in: .*certificate"):
        KafkaSource(there, "secured", 0, properties={"ssl.ca.location": doors.scram["ssl.ca.location"]} | properties)


def test_no_repr_and_no_log_shows_a_secret(doors, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    there, properties = through(doors.scram, **{"sasl.password": "env:KAFKA_PASSWORD", "debug": "conf,security,broker"})
    create_topic(there, "unsaid", 1, properties=properties)
    with KafkaSink(there, "unsaid", properties=properties) as sink:
        sink.write(start())
        sink.flush()
        with KafkaSource(there, "unsaid", 0, properties=properties) as source:
            take(1, source)
            shown = [repr(part) for end in (sink, source) for part in (end, vars(end), *vars(end).values())]
    assert len(caplog.text) > 1000
    for text in (caplog.text, *shown):
        assert PASSWORD not in text


def test_a_secret_that_librdkafka_might_tell_is_masked(monkeypatch, caplog):
    monkeypatch.setenv("KAFKA_PASSWORD", "hunter2")
    cluster = Cluster("127.0.0.1:9092", {"sasl.password": "env:KAFKA_PASSWORD"}, SourceError)
    cluster.log(logging.WARNING, "%s [%s] %s", "CONF", "rdkafka#1", "sasl.password=hunter2 is short")
    assert "sasl.password=*** is short" in caplog.text
    assert "hunter2" not in cluster.words(ValueError("hunter2"))


def test_closing_delivers_what_was_written(broker, topic):
    sink = KafkaSink(broker.bootstrap, topic)
    with sink:
        for i in range(100):
            sink.write(replace(start(), run=f"run {i}"))
    assert (sink.delivered, sink.failed) == (100, 0)


@pytest.mark.parametrize(
    "code", [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError._TRANSPORT]
)
def test_what_passes_is_waited_for_and_told_once_though_librdkafka_does_not_call_it_retriable(caplog, code):
    cluster, error = Cluster("127.0.0.1:9092", {}, SourceError), KafkaError(code)
    assert not error.retriable()
    assert cluster.passes(error, "there")
    assert cluster.passes(error, "there")
    cluster.went_well()
    assert [record.message for record in caplog.records] == [
        f"there: {error.str()}; waiting",
        "kafka://127.0.0.1:9092 is back",
    ]


@pytest.mark.parametrize("code", [KafkaError._BAD_MSG, KafkaError._BAD_COMPRESSION, KafkaError.INVALID_MSG])
def test_only_what_is_wrong_with_a_record_itself_rejects_it(code):
    assert not Cluster("127.0.0.1:9092", {}, SourceError).passes(KafkaError(code), "there")


@pytest.mark.parametrize(
    "error", [KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED), KafkaError(KafkaError._TIMED_OUT, "too late", True)]
)
def test_what_does_not_pass_ends_the_source(error):
    with pytest.raises(SourceError, match=f"there: {error.str()}"):
        Cluster("127.0.0.1:9092", {}, SourceError).passes(error, "there")
