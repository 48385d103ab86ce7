"""The Kafka broker that is started for tests, and by `xpcs-stream broker` for those who have none."""

import os
import select
import signal
import threading
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from stream.broker import Broker, jars, version
from stream.errors import BrokerError
from tests import kafka
from tests.test_command_line import finished, started, xpcs_stream

DEADLINE = 120
ROOT = Path(__file__).parents[1]


@pytest.fixture
def java():
    kafka.need_java()


def send(broker, topic, *values):
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    for value in values:
        producer.produce(topic, value)
    assert producer.flush(DEADLINE) == 0


def read(broker, topic, n, protocol="classic"):
    """Return the first records of a topic, as a group of one that is new."""
    consumer = Consumer(
        {
            "bootstrap.servers": broker.bootstrap,
            "group.id": f"{topic} {protocol} {n}",
            "group.protocol": protocol,
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([topic])
    try:
        return [record.value() for record in consumer.consume(n, DEADLINE)]
    finally:
        consumer.close()


def process_of(directory):
    """Return the id of the Kafka that works in a directory, None if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == directory and b"kafka.Kafka" in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:  # it is somebody else's, or gone
            continue
    return None


def listening(pid):
    """Return the addresses where a process listens, as the kernel writes them."""
    sockets = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def script(folder, name, text):
    """Write a program that stands for one of that name."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_what_is_sent_is_read_back(broker, topic):
    send(broker, topic, b"frame 0", b"frame 1")
    assert read(broker, topic, 2) == [b"frame 0", b"frame 1"]


def test_both_protocols_of_consumer_groups_are_spoken(broker, topic):
    send(broker, topic, b"frame 0")
    assert read(broker, topic, 1, "consumer") == read(broker, topic, 1, "classic") == [b"frame 0"]


def test_what_was_sent_outlives_a_broker_that_is_killed_and_started_again_at_the_same_address(broker, topic):
    address = broker.bootstrap
    send(broker, topic, b"frame 0")
    broker.kill()
    with pytest.raises(KafkaException):
        kafka.admin(broker).list_topics(timeout=1)
    broker.start()
    assert broker.bootstrap == address
    send(broker, topic, b"frame 1")
    assert read(broker, topic, 2) == [b"frame 0", b"frame 1"]


def test_no_other_machine_reaches_it(broker):
    addresses = listening(process_of(broker.directory))
    assert len(addresses) == 2  # for clients, and for itself
    assert all(address.endswith("0100007F") for address in addresses)  # 127.0.0.1


def test_a_topic_that_nobody_made_is_not_there(broker):
    failed = []
    producer = Producer({"bootstrap.servers": broker.bootstrap, "topic.metadata.propagation.max.ms": 2000})
    producer.produce("nobody-made-it", b"", on_delivery=lambda error, _: failed.append(error.code()))
    assert producer.flush(DEADLINE) == 0
    assert failed[0] in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)


def test_the_command_says_the_address_and_ends_on_sigterm_with_nothing_left(tmp_path, java):
    [port] = kafka.free_ports(1)
    with started("broker", "--directory", "kafka", "--port", port, cwd=tmp_path) as command:
        assert command.stdout.readline() == f"127.0.0.1:{port}\n"
        assert AdminClient({"bootstrap.servers": f"127.0.0.1:{port}"}).list_topics(timeout=DEADLINE).brokers
        assert process_of(tmp_path / "kafka") is not None
        command.terminate()
        _, err = finished(command)
    assert f"broker.log are in {tmp_path / 'kafka'}" in err
    assert process_of(tmp_path / "kafka") is None


def test_nothing_is_left_of_a_command_that_is_killed(tmp_path, java):
    [port] = kafka.free_ports(1)
    with started("broker", "--directory", "kafka", "--port", port, cwd=tmp_path) as command:
        assert command.stdout.readline() == f"127.0.0.1:{port}\n"
        broker = os.pidfd_open(process_of(tmp_path / "kafka"))
        command.kill()
        try:
            assert select.select([broker], [], [], DEADLINE)[0], "it lives on"
        finally:
            os.close(broker)


def test_the_command_ends_when_the_broker_does(tmp_path, java):
    [port] = kafka.free_ports(1)
    with started("broker", "--directory", "kafka", "--port", port, cwd=tmp_path) as command:
        assert command.stdout.readline() == f"127.0.0.1:{port}\n"
        os.kill(process_of(tmp_path / "kafka"), signal.SIGKILL)
        _, err = command.communicate(timeout=DEADLINE)
    assert command.returncode == 1
    assert "Kafka ended by itself" in err


def test_a_port_that_is_taken_is_named_even_by_another_broker_that_answers(tmp_path, broker):
    port = int(broker.bootstrap.partition(":")[2])
    with pytest.raises(BrokerError, match=rf"{broker.bootstrap}(?s:.*)Address already in use"):
        Broker(tmp_path, port=port).start()
    assert process_of(tmp_path) is None


def test_a_directory_that_another_broker_works_in_is_named(broker):
    [port] = kafka.free_ports(1)
    with pytest.raises(BrokerError, match=f"another broker works in {broker.directory}"):
        Broker(broker.directory, port=port).start()
    assert kafka.admin(broker).list_topics(timeout=DEADLINE).brokers


def test_without_java_it_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = xpcs_stream("broker", "--directory", tmp_path / "kafka")
    assert said.exit_code == 1
    assert said.stderr == (
        f"xpcs-stream: java is not there, which Kafka {version()} needs "
        "(Debian: apt-get install default-jre-headless maven)\n"
    )


def test_java_that_is_too_old_is_named(tmp_path, monkeypatch):
    java = script(tmp_path, "java", "echo openjdk 11.0.31 2026-04-21")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerError, match=rf"{java} is openjdk 11\.0\.31 2026-04-21; .* needs Java 17 or newer"):
        Broker(tmp_path).start()


def test_two_that_start_at_once_fetch_the_jars_once(tmp_path, monkeypatch):
    # In place of Maven: takes its time, and leaves a trace.
    script(tmp_path, "mvn", f'echo x >>{tmp_path}/fetched; sleep 0.3; for into; do :; done; mkdir "${{into#*=}}"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = []
    both = [threading.Thread(target=lambda: found.append(jars(print))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(DEADLINE)
    assert found == [tmp_path / "cache/xpcs-stream" / f"kafka-{version()}"] * 2
    assert found[0].is_dir()
    assert (tmp_path / "fetched").read_text() == "x\n"


def test_a_fetch_that_fails_says_why_and_leaves_nothing_behind(tmp_path, monkeypatch):
    script(tmp_path, "mvn", "echo '[ERROR] Failed to execute goal: Could not transfer artifact'; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BrokerError, match=r"mvn cannot fetch Kafka: .*Could not transfer artifact"):
        jars(print)
    assert [path.name for path in (tmp_path / "cache/xpcs-stream").iterdir()] == ["kafka.lock"]


def test_the_container_image_of_the_readme_is_of_the_same_version():
    assert f"apache/kafka:{version()}" in (ROOT / "docs/how-to/kafka-broker.md").read_text()
