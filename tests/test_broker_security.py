"""Who comes in where a broker asks: with a password (SCRAM) or a certificate (mTLS), both over TLS."""

import time

import pytest
import trustme
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

DEADLINE = 120


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
