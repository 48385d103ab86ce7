"""One Apache Kafka broker on this machine (KRaft), for tests and for those who have none.

Its jars come from Maven Central as `broker.pom.xml` pins them, once per user, into the cache directory.
"""

import base64
import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from stream.errors import BrokerError

_log = logging.getLogger(__name__)

_POM = Path(__file__).with_name("broker.pom.xml")
_FETCH_WITHIN = 900.0
_START_WITHIN = 120.0
_STOP_WITHIN = 30.0

_ONE_NODE = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL",
    "controller.quorum.bootstrap.servers": "127.0.0.1:0",  # itself, on whatever port
    "log.dirs": "data",
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    "num.network.threads": "2",
    "num.io.threads": "4",
    **{
        f"{topic}.{setting}": "1"
        for topic in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")
        for setting in ("num.partitions", "replication.factor")
    },
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # A broker that was killed is let in again once its last session is over: 9 s by default.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
}


def version() -> str:
    """Return the version of Kafka that is run."""
    [pinned] = re.findall(r"<kafka\.version>(.+)</kafka\.version>", _POM.read_text())
    return str(pinned)


class Broker(AbstractContextManager["Broker"]):
    """A Kafka broker in a process of its own, which lives no longer than the thread that starts it.

    It can be stopped or killed and started again: records, offsets and port stay.

    Parameters
    ----------
    directory
        Where it keeps its records (data/), its configuration (server.properties) and its warnings (broker.log).
    port
        Where it listens, without encryption and without asking who connects.
    listen
        Address it listens on and tells its clients to come to: no other machine reaches the default.
    properties
        Kafka's own settings, in place of or beside ours, e.g. "listeners".
    say
        Is told when jars are fetched, which takes its time.

    Raises
    ------
    BrokerError
        Java or Maven is missing, the jars cannot be fetched, or Kafka does not start; its own words are in it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int = 9092,
        listen: str = "127.0.0.1",
        properties: Mapping[str, str] | None = None,
        say: Callable[[str], None] = _log.info,
    ) -> None:
        self.bootstrap = f"{listen}:{port}"
        self.directory = directory.absolute()
        self.log = self.directory / "broker.log"
        self.properties = _ONE_NODE | {
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://127.0.0.1:0",
            **(properties or {}),
        }
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Return once it answers."""
        java = [_java(), "-Xmx512m", "-XX:+ExitOnOutOfMemoryError", *_LOGGING, "-cp", f"{jars(self._say)}/*"]
        meta = self.directory / "data" / "meta.properties"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                # Kafka of one node finds out too late that another one writes the same files. It inherits this lock.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._log_before = log.tell()
                # Java reads Latin-1; its escapes are those of JSON.
                lines = [f"{name}={json.dumps(value)[1:-1]}\n" for name, value in self.properties.items()]
                (self.directory / "server.properties").write_text("".join(lines), encoding="ascii")
                if not meta.exists():
                    self._format(java, log.fileno())
                self._process = subprocess.Popen(  # noqa: S603
                    [_program("setpriv"), "--pdeathsig", "KILL", *java, "kafka.Kafka", "server.properties"],
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for us, not for it
                )
            [cluster] = re.findall(r"^cluster\.id=(.*)$", meta.read_text(), re.MULTILINE)
        except BlockingIOError:
            raise BrokerError(f"another broker works in {self.directory}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BrokerError(f"Kafka cannot use {self.directory}: {error}") from None
        try:
            self._wait_for_answer(self._process, cluster)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it in good order; after 30 s without."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_WITHIN)
            self.kill()

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def watch(self, stop: threading.Event) -> None:
        """Return once `stop` is set; raise BrokerError if the broker ends before."""
        while not stop.wait(0.2):
            if self._process is None or self._process.poll() is not None:
                raise BrokerError(f"Kafka ended by itself: {self._last_words()}")

    def _format(self, java: list[str], log: int) -> None:
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = ["kafka.tools.StorageTool", "format", "--standalone", f"--cluster-id={cluster}"]
        done = subprocess.run(  # noqa: S603
            [*java, *tool, "--config", "server.properties"],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            timeout=_START_WITHIN,
            check=False,
        )
        if done.returncode != 0:
            raise BrokerError(f"Kafka cannot use {self.directory}: {self._last_words()}")

    def _wait_for_answer(self, process: subprocess.Popen[bytes], cluster: str) -> None:
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0, "reconnect.backoff.max.ms": 100})
        deadline = time.monotonic() + _START_WITHIN
        while process.poll() is None:
            with suppress(KafkaException):
                answer = admin.list_topics(timeout=1)
                # Another broker may have the port, while ours is about to find that out.
                if answer.cluster_id == cluster and answer.brokers:
                    return
            if time.monotonic() > deadline:
                raise BrokerError(f"Kafka did not answer at {self.bootstrap} in {_START_WITHIN:.0f} s")
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        raise BrokerError(f"Kafka did not start at {self.bootstrap}: {self._last_words()}")

    def _last_words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_before)
            lines = log.read().decode(errors="replace").splitlines()
        said = [line for line in lines if line.strip() and not line.startswith(("\tat ", "\t..."))]
        return "\n".join([f"see {self.log}", *said[-8:]])


_LOGGING = [
    f"-Dorg.slf4j.simpleLogger.{setting}"
    for setting in (
        "defaultLogLevel=warn",
        "showDateTime=true",
        "dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
        # It tells on every start that it starts.
        "log.org.apache.kafka.controller.QuorumController=error",
    )
]


def jars(say: Callable[[str], None]) -> Path:
    """Return the folder of the jars; fetch them if they are not there, while nobody else does."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xpcs-stream"
    folder = cache / f"kafka-{version()}"
    if folder.exists():
        return folder
    maven = _program("mvn")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "kafka.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                say(f"fetching Kafka {version()} from Maven Central (44 MB, once) into {folder}")
                with tempfile.TemporaryDirectory(dir=cache) as fetched:
                    _fetch(maven, Path(fetched) / "jars")
                    (Path(fetched) / "jars").rename(folder)
    except OSError as error:
        raise BrokerError(f"Kafka's jars cannot be kept in {cache}: {error}") from None
    return folder


def _fetch(maven: str, into: Path) -> None:
    what = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={into}"]
    try:
        done = subprocess.run(  # noqa: S603
            [maven, "--batch-mode", "--quiet", "--strict-checksums", "--file", str(_POM), *what],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_FETCH_WITHIN,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BrokerError(f"mvn did not fetch Kafka in {_FETCH_WITHIN:.0f} s") from None
    if done.returncode != 0:
        [*_, said] = [line for line in done.stdout.splitlines() if "Failed to execute" in line] or [done.stdout]
        raise BrokerError(f"mvn cannot fetch Kafka: {said}")


def _java() -> str:
    java = _program("java")
    told = subprocess.run([java, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    found = re.search(r"\d+", told)
    if found is None or int(found[0]) < 17:
        first = told.partition("\n")[0] or "older than Java 9"
        raise BrokerError(f"{java} is {first}; Kafka {version()} needs Java 17 or newer ({_INSTALL})")
    return java


_INSTALL = "Debian: apt-get install default-jre-headless maven"


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise BrokerError(f"{name} is not there, which Kafka {version()} needs ({_INSTALL})")
    return path
