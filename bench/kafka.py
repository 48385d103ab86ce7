"""Frames through Kafka into one merged g2: how many per second, how late, and how soon after a worker is killed.

The bare client sends and receives records of the same size, to and from the same broker; see `bench.plane`.
"""

import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition

from bench.data import poisson
from bench.measure import Figure, compare
from bench.plane import BATCH, REGIONS, ROUNDS, SHAPE, Beamline
from stream.broker import Broker
from stream.kafka import create_topic
from stream.kafka_plane import KafkaPlane

PORT = 29192
FAILOVER = 10.0
KIP_848 = """
from stream import kafka_group
from stream.__main__ import app

kafka_group.GROUP = {"group.protocol": "consumer", "enable.auto.commit": False, "auto.offset.reset": "earliest"}
app()
"""


def figures() -> Iterator[Figure]:
    """Measure what `bench.plane` does, and what the newer group protocol would make of a killed worker."""
    with tempfile.TemporaryDirectory() as folder, Broker(Path(folder) / "kafka", port=PORT) as broker:

        def new() -> tuple[str, KafkaPlane]:
            where = f"{broker.bootstrap}/bench-{uuid.uuid4().hex}"
            return f"kafka://{where}", KafkaPlane(where, {})

        beamline = Beamline(Path(folder), new)
        yield from beamline.figures("Kafka", lambda n: _bare(broker.bootstrap, n), failover=FAILOVER)
        kills = [(beamline.failover(), beamline.failover("-c", KIP_848)) for _ in range(ROUNDS)]
        against = "the group protocol of KIP-848, broker as it comes"
        yield compare("worker killed to its regions served", "s", against, kills, target=1, less_is_better=True)


def _bare(bootstrap: str, n: int) -> float:
    """Return the seconds from the first record sent to the last one received by another process."""
    topic = f"bench-{uuid.uuid4().hex}"
    create_topic(bootstrap, topic, REGIONS)
    region = poisson(SHAPE, BATCH, 1)[:, : SHAPE[0] // REGIONS]
    per_record = 900_000 // region[0].nbytes
    record = region[:per_record].tobytes()
    n_record = REGIONS * -(-n // per_record)
    command = [sys.executable, "-m", "bench.kafka", bootstrap, topic, str(n_record)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None  # noqa: S101 - for the type checker
        receiver.stdout.readline()
        producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "enable.idempotence": True})
        begin = time.perf_counter()
        for i in range(n_record):
            while True:
                try:
                    producer.produce(topic, record, partition=i % REGIONS)
                    break
                except BufferError:
                    producer.poll(0.01)
        producer.flush()
        receiver.wait()
        return time.perf_counter() - begin


def _receive(bootstrap: str, topic: str, n: str) -> None:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, region, OFFSET_BEGINNING) for region in range(REGIONS)])
    print("ready", flush=True)
    received = 0
    while received < int(n):
        received += sum(record.error() is None for record in consumer.consume(100, 0.1))
    consumer.close()


if __name__ == "__main__":
    _receive(*sys.argv[1:])
