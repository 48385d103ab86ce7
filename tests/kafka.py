"""A real Kafka broker for tests, and its topics."""

import itertools
import os
import random
import shutil
import socket
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
import trustme
from confluent_kafka.admin import (
    AdminClient,
    NewTopic,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from stream.broker import Broker
from stream.errors import BrokerError

DEADLINE = 120


def _ports():
    """All ports that the system gives to nobody by itself, in any order.

    Each worker of pytest-xdist has its own: what one has picked, and listens on later, no other picks meanwhile.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(20000 + worker, 32000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    return itertools.cycle(random.sample(ports, len(ports)))


_PORTS = _ports()


def free_ports(n):
    """Return ports of 127.0.0.1 where nobody listens, of those that the system gives to nobody by itself.

    So nobody is given the port of a broker that is down for a while.
    """
    ports = []
    for port in itertools.islice(_PORTS, 500):
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


@dataclass(frozen=True, kw_only=True)
class Doors:
    """How clients come in where a broker asks who they are: settings of librdkafka."""

    scram: dict[str, str]
    mtls: dict[str, str]


USER, PASSWORD = "beamline", "of the tests"


@contextmanager
def started_secured(directory):
    """Start a broker that has, beside the open door, one for a password and one for a certificate."""
    authority = trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("beamline@example.org")
    # Java reads keys in PKCS 8 only.
    key = load_pem_private_key(server.private_key_pem.bytes(), None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + server.cert_chain_pems[0].bytes()
    (directory / "server.pem").write_bytes(pem)
    authority.cert_pem.write_to_path(directory / "authority.pem")

    def properties(plain, scram, mtls):
        jaas = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        at = "127.0.0.1"
        return {
            "listeners": f"PLAINTEXT://{at}:{plain},CONTROLLER://{at}:0,SASL_SSL://{at}:{scram},SSL://{at}:{mtls}",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": jaas,
            "listener.name.ssl.ssl.client.auth": "required",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(directory / "server.pem"),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(directory / "authority.pem"),
        }

    with started(directory / "kafka", 3, properties) as broker:
        credentials = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(USER, credentials, PASSWORD.encode())
        administrator = admin(broker)
        administrator.alter_user_scram_credentials([change])[USER].result(DEADLINE)
        doors = dict(listener.split("://") for listener in broker.properties["listeners"].split(","))
        tls = {"ssl.ca.location": str(directory / "authority.pem")}
        yield Doors(
            scram={
                "bootstrap.servers": doors["SASL_SSL"],
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": USER,
                "sasl.password": PASSWORD,
            }
            | tls,
            mtls={
                "bootstrap.servers": doors["SSL"],
                "security.protocol": "SSL",
                "ssl.certificate.pem": client.cert_chain_pems[0].bytes().decode(),
                "ssl.key.pem": client.private_key_pem.bytes().decode(),
            }
            | tls,
        )
