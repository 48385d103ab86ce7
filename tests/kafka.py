"""A real Kafka broker for tests, and its topics."""

import random
import shutil
import socket
import uuid
from contextlib import contextmanager, suppress

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from stream.broker import Broker
from stream.errors import BrokerError

DEADLINE = 30


def free_ports(n):
    """Return ports of 127.0.0.1 where nobody listens, of those that the system gives to nobody by itself.

    So nobody is given the port of a broker that is down for a while.
    """
    ports = []
    for port in random.sample(range(20000, 32000), 500):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == n:
            return ports
    raise AssertionError("no ports are free")


def need_java():
    # .ci/run looks for these words.
    if missing := [name for name in ("java", "mvn") if shutil.which(name) is None]:
        pytest.skip(f"no Kafka without {' and '.join(missing)}")


@contextmanager
def started(directory, n_ports=1, properties=lambda *ports: {}):
    """Start a broker on the first of some free ports; the properties are made from all of them."""
    need_java()
    broker = _bound(directory, n_ports, properties)
    try:
        yield broker
    finally:
        broker.stop()


def _bound(directory, n_ports, properties, tries=3):
    ports = free_ports(n_ports)
    broker = Broker(directory, port=ports[0], properties=properties(*ports))
    try:
        broker.start()
    except BrokerError as error:
        if tries == 1 or "Address already in use" not in str(error):
            raise
        return _bound(directory, n_ports, properties, tries - 1)
    return broker


def admin(broker):
    return AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0})


def new_topic(broker, n_partitions=1, **config):
    """Return the name of a topic that nobody else has."""
    name = f"topic-{uuid.uuid4()}"
    topic = NewTopic(name, n_partitions, 1, config={key: str(value) for key, value in config.items()})
    client = admin(broker)  # what it was asked for ends with it
    client.create_topics([topic])[name].result(DEADLINE)
    return name
