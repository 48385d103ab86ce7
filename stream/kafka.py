"""A Kafka cluster, as both ends of our wire reach it: settings of librdkafka, secrets, topics. No records."""

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from stream.errors import ConfigError, XpcsStreamError

_log = logging.getLogger(__name__)

_Client = TypeVar("_Client")
_Answer = TypeVar("_Answer")

ANSWER = 30.0
"""How long a cluster may take for its first answer (s)."""

MAX_RECORD_BYTES = 1_048_588
"""What Kafka takes where nobody set ``max.message.bytes`` of a topic: a record with its key, headers and framing."""

_SECRET = re.compile(r"password|passphrase|secret|key\.pem|oauthbearer\.config|jaas")

_PATIENT: Mapping[str, Any] = {
    # What librdkafka tells of a cluster that is away waits in memory until we ask for it: not twenty times a second.
    "metadata.recovery.strategy": "none",
    "reconnect.backoff.ms": 500,
    "reconnect.backoff.max.ms": 2000,
    # One that begins while its cluster is away asks again only then, not after five minutes.
    "topic.metadata.refresh.interval.ms": 10_000,
}

_FORBIDDEN = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED)

_GONE = (
    *_FORBIDDEN,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.UNKNOWN_TOPIC_ID,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError._FATAL,
)

_DAMAGED = (
    KafkaError._BAD_MSG,
    KafkaError._BAD_COMPRESSION,
    KafkaError._NOT_IMPLEMENTED,  # a compression that this librdkafka was built without
    KafkaError.INVALID_MSG,
    KafkaError.MSG_SIZE_TOO_LARGE,
)
"""What is about a record. All else is about the cluster; librdkafka does not say which of that passes: most does."""


class Cluster:
    """A Kafka cluster, and who we are there.

    Parameters
    ----------
    bootstrap
        ``host:port`` of a broker, or of several with commas between.
    properties
        Settings of librdkafka, e.g. ``security.protocol``. A secret (a password, a private key) is never one of them:
        its value is ``file:PATH`` or ``env:NAME``, where it stands.
    error
        Raised where the cluster fails us.

    Attributes
    ----------
    complaint
        What the cluster said last, where nothing went well since.

    Raises
    ------
    ConfigError
        A secret is given itself, or is not where it should be.
    """

    def __init__(self, bootstrap: str, properties: Mapping[str, str] | None, error: type[XpcsStreamError]) -> None:
        self.bootstrap = bootstrap
        self.complaint = ""
        self._properties = dict(properties or {})
        self._secrets = {key: _secret(key, where) for key, where in self._properties.items() if _SECRET.search(key)}
        self._error = error
        self._refusal = ""
        self._has_answered = self._is_away = False

    def __str__(self) -> str:
        return f"kafka://{self.bootstrap}"

    def client(
        self,
        kind: Callable[[dict[str, Any]], _Client],
        *,
        fixed: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> _Client:
        """Make a client of librdkafka, with settings of ours that the properties may change, and some they may not.

        Raises
        ------
        ConfigError
            librdkafka refuses the properties, or one of them is fixed.
        """
        fixed = {"bootstrap.servers": self.bootstrap, **(fixed or {})}
        if unwanted := fixed.keys() & self._properties.keys():
            raise ConfigError(f"{self}: property {min(unwanted)} is not for you to set")
        settings = {**_PATIENT, **(defaults or {}), **self._properties, **self._secrets, **fixed}
        try:
            return kind({**settings, "error_cb": self._complained, "logger": self})
        except (KafkaException, TypeError) as error:
            raise ConfigError(f"{self}: {self.words(error)}") from None

    def n_partitions(self, topic: str, within: float) -> int:
        """Return how many a topic has, asking for at most `within` (s)."""
        admin = self.client(AdminClient)
        asked = admin.describe_topics(TopicCollection([topic]), request_timeout=within)
        return len(self._answer(admin, asked[topic], topic).partitions)

    def knows(self, topic: str, within: float) -> bool:
        """Tell whether there is such a topic."""
        admin = self.client(AdminClient)
        asked = admin.describe_topics(TopicCollection([topic]), request_timeout=within)
        answer = self._answer(admin, asked[topic], topic, expected=[KafkaError.UNKNOWN_TOPIC_OR_PART])
        return not isinstance(answer, KafkaError)

    def wait_for(self, topic: str, within: float) -> None:
        """Return once there is such a topic; at the latest after `within` seconds."""
        admin, deadline = self.client(AdminClient), time.monotonic() + within
        while not self.knows(topic, within) and time.monotonic() < deadline:
            admin.poll(0.05)

    def max_record_bytes(self, topic: str, within: float) -> int:
        """Return ``max.message.bytes`` of a topic, or Kafka's default where we may not ask."""
        admin = self.client(AdminClient)
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        asked = admin.describe_configs([resource], request_timeout=within)
        answer = self._answer(admin, asked[resource], topic, expected=_FORBIDDEN)
        return MAX_RECORD_BYTES if isinstance(answer, KafkaError) else int(answer["max.message.bytes"].value)

    def create(self, topic: NewTopic, within: float) -> bool:
        """Make a topic; return False if it is there."""
        admin = self.client(AdminClient)
        asked = admin.create_topics([topic], request_timeout=within, operation_timeout=within)
        answer = self._answer(admin, asked[topic.topic], topic.topic, expected=[KafkaError.TOPIC_ALREADY_EXISTS])
        return not isinstance(answer, KafkaError)

    def went_well(self) -> None:
        """Take note that the cluster took or gave something."""
        if self._is_away:
            _log.warning("%s is back", self)
        self._has_answered, self._is_away, self.complaint = True, False, ""

    def passes(self, error: KafkaError, where: str) -> bool:
        """Tell whether records will follow that came as an error; else this one is damaged.

        Raises
        ------
        XpcsStreamError
            `error` of the constructor: no more will come from `where`.
        """
        words = self.words(error)
        if error.code() in _GONE or error.fatal():
            raise self._error(f"{where}: {words}")
        if error.code() in _DAMAGED:
            return False
        if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            return True  # only those who watch how far we are miss something
        if words != self.complaint:
            _log.warning("%s: %s; waiting", where, words)
        self._is_away, self.complaint = True, words
        return True

    def check(self) -> None:
        """Raise `error` if the cluster did not let us in."""
        if self._refusal:
            raise self._error(f"{self}: {self._refusal}")

    def words(self, error: Exception | KafkaError) -> str:
        """Return what an error says, without secrets."""
        if isinstance(error, KafkaException):
            error = error.args[0]
        return self._masked(error.str() if isinstance(error, KafkaError) else str(error))

    def log(self, level: int, text: str, facility: str, *rest: Any) -> None:
        """Take a line of librdkafka's own log, as a `logging.Logger` does."""
        # What goes wrong is told to _complained, too; the last is about settings of the other kinds of clients.
        level = logging.DEBUG if facility in ("FAIL", "ERROR", "CONFWARN") else level
        _log.log(level, "%s: %s", self, self._masked(text % (facility, *rest)))

    def _masked(self, text: str) -> str:
        for secret in self._secrets.values():
            text = text.replace(secret, "***")
        return text

    def _complained(self, error: KafkaError) -> None:
        code, words = error.code(), self.words(error)
        _log.debug("%s: %s", self, words)
        if code == KafkaError._ALL_BROKERS_DOWN:
            if not self._is_away and self._has_answered:
                _log.warning("%s is away; waiting for it", self)
            self._is_away = True
            return
        self.complaint = words
        # TLS 1.3 refuses a certificate only after it was shown. A broker that is being stopped breaks TLS, too.
        is_tls = code == KafkaError._SSL or "SSL routines" in words
        if code == KafkaError._AUTHENTICATION or (is_tls and not self._has_answered):
            user = self._properties.get("sasl.username", "we")
            self._refusal = f"{user} cannot log in: {words}"

    def _answer(self, admin: AdminClient, asked: "Future[_Answer]", topic: str, expected: Collection[int] = ()) -> Any:
        """Wait for an answer; return it, or the error that came instead if its code is among those expected."""
        while not asked.done():
            admin.poll(0.05)
            self.check()
        try:
            answer = asked.result()
        except KafkaException as error:
            told: KafkaError = error.args[0]
            if told.code() in expected:
                return told
            complaint = f" ({self.complaint})" if self.complaint else ""
            raise self._error(f"{address(self, topic)}: {self.words(told)}{complaint}") from None
        self.went_well()
        return answer


def address(cluster: Cluster, topic: str) -> str:
    """Return how a topic is called in errors and logs."""
    return f"{cluster}/{topic}"


def create_topic(
    bootstrap: str,
    topic: str,
    partitions: int,
    *,
    properties: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
    timeout: float = ANSWER,
) -> None:
    """Make a topic with a partition per region; one that is there and has as many is left as it is.

    Parameters
    ----------
    bootstrap, properties
        See `Cluster`.
    config
        Kafka's own settings of a topic, e.g. ``retention.ms``.

    Raises
    ------
    ConfigError
        There is one with another number of partitions, or the cluster refuses or does not answer.
    """
    cluster = Cluster(bootstrap, properties, ConfigError)
    is_new = cluster.create(NewTopic(topic, partitions, config=dict(config or {})), timeout)
    cluster.wait_for(topic, timeout)  # the controller knows of it before brokers do
    if not is_new:
        there = cluster.n_partitions(topic, timeout)
        if there != partitions:
            raise ConfigError(f"{address(cluster, topic)} is there and has {there} partitions, not {partitions}")


def read_properties(path: Path | None) -> dict[str, str]:
    """Read settings of librdkafka, a ``name=value`` a line, as Kafka's own tools do; none if there is no file.

    Raises
    ------
    ConfigError
        The file cannot be read; names the line that is not one.
    """
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from None
    properties: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if name and not name.startswith("#"):
            if not equals:
                raise ConfigError(f"{path}:{number}: not a name=value")
            properties[name] = value
    return properties


def _secret(name: str, where: str) -> str:
    kind, _, place = where.partition(":")
    match kind:
        case "env":
            secret = os.environ.get(place, "")
        case "file":
            try:
                secret = Path(place).read_text(encoding="utf-8").rstrip("\r\n")
            except OSError as error:
                raise ConfigError(f"property {name}: {place}: {error.strerror}") from None
            except UnicodeDecodeError:
                raise ConfigError(f"property {name}: {place} is not text") from None
        case _:
            raise ConfigError(f"property {name}: write file:PATH or env:NAME, where the secret stands, not the secret")
    if not secret:
        raise ConfigError(f"property {name}: there is nothing in {where}")
    return secret
