"""Who comes in where a broker asks: with a password (SCRAM) or a certificate (mTLS), both over TLS."""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import trustme
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from tests import kafka

DEADLINE = 60


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

    with kafka.started(directory / "kafka", 3, properties) as broker:
        credentials = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(USER, credentials, PASSWORD.encode())
        administrator = kafka.admin(broker)
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


@pytest.fixture(scope="session")
def secured(tmp_path_factory):
    with started_secured(tmp_path_factory.mktemp("secured")) as doors:
        yield doors


def assert_refused(words, settings):
    told = []
    client = AdminClient(settings | {"error_cb": lambda error: told.append(error.str()), "log_level": 0})
    deadline = time.monotonic() + DEADLINE
    while not any(words in text for text in told):
        client.poll(0.1)
        assert time.monotonic() < deadline, told
    with pytest.raises(KafkaException):
        client.list_topics(timeout=1)


@pytest.mark.parametrize("door", ["scram", "mtls"])
def test_who_shows_a_password_or_a_certificate_comes_in(secured, door):
    assert AdminClient(getattr(secured, door)).list_topics(timeout=DEADLINE).brokers


def test_a_wrong_password_is_refused(secured):
    assert_refused("invalid credentials", secured.scram | {"sasl.password": "guessed"})


def test_who_shows_no_certificate_is_refused(secured):
    assert_refused("bad certificate", {k: v for k, v in secured.mtls.items() if not k.endswith(".pem")})


def test_a_certificate_of_an_unknown_authority_is_refused(secured):
    other = trustme.CA().issue_cert("beamline@example.org")
    pems = {"ssl.certificate.pem": other.cert_chain_pems[0], "ssl.key.pem": other.private_key_pem}
    assert_refused("bad certificate", secured.mtls | {name: pem.bytes().decode() for name, pem in pems.items()})


def test_a_password_is_not_taken_without_encryption(secured):
    bare = AdminClient(secured.scram | {"security.protocol": "SASL_PLAINTEXT", "log_level": 0})
    with pytest.raises(KafkaException):
        bare.list_topics(timeout=2)
