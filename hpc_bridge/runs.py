"""When runs begin and end, by the documents of a run engine: over Kafka, or from a Proxy of bluesky.callbacks.zmq.

Of a document only the uid of the run is read, and where a file of it is; what else may be in it is `stream`'s matter.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import zmq
from confluent_kafka import Consumer, KafkaException
from msgpack import OutOfData, Unpacker

from hpc_bridge.errors import ConfigError

_log = logging.getLogger(__name__)

MAX_BYTES = 2**24
"""Of a document; a larger one is not looked into."""

MAX_UID = 200

MAX_URI = 2048

HDF5 = "application/x-hdf5"

AT_ONCE = 500
"""Documents taken at one look."""


@dataclass(frozen=True, slots=True)
class Told:
    """A run began, or ended."""

    run: str
    began: bool


@dataclass(frozen=True, slots=True)
class Points:
    """Data of a run are in a file of HDF5."""

    run: str
    uri: str


class Runs(Protocol):
    """What a run engine tells of runs."""

    def __enter__(self) -> Self:
        """Begin to listen."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Listen no more."""

    def look(self) -> list[Told | Points]:
        """Return what came since the last look; never waits."""


def told(value: bytes) -> Told | Points | None:
    """Return what ``[name, document]`` in MessagePack tells of a run, as bluesky_kafka writes it; None if nothing.

    Raises
    ------
    ValueError
        It is none.
    """
    unpacker = _of(value)

    def read() -> Told | Points | None:
        if unpacker.read_array_header() != 2:
            raise ValueError("not a name and a document")
        return _told(unpacker.unpack(), unpacker)

    return _read(read)


def told_by_proxy(message: bytes) -> Told | Points | None:
    """Return what a message of bluesky.callbacks.zmq tells: prefix, name and document, with spaces between.

    Raises
    ------
    ValueError
        It is none, or not in MessagePack.
    """
    match message.split(b" ", 2):
        case [_, name, document]:
            return _read(lambda: _told(name.decode("ascii", "replace"), _of(document)))
        case _:
            raise ValueError("not a prefix, a name and a document")


def _read(read: Callable[[], Told | Points | None]) -> Told | Points | None:
    try:
        return read()
    except OutOfData:
        raise ValueError("it ends too early") from None
    except TypeError as error:  # a key of a map that cannot be one
        raise ValueError(str(error)) from None


def _of(value: bytes) -> Unpacker:
    if len(value) > MAX_BYTES:
        raise ValueError(f"it has {len(value):,} bytes")
    unpacker = Unpacker(strict_map_key=False, max_buffer_size=MAX_BYTES)
    unpacker.feed(value)
    return unpacker


def _told(name: object, unpacker: Unpacker) -> Told | Points | None:
    if name == "stream_resource":
        return _points(unpacker)
    key = {"start": "uid", "stop": "run_start"}.get(name) if isinstance(name, str) else None
    if key is None:
        return None
    for _ in range(unpacker.read_map_header()):
        if unpacker.unpack() == key:
            return Told(_uid(key, unpacker.unpack()), name == "start")
        unpacker.skip()
    raise ValueError(f"a {name} without {key}")


def _points(unpacker: Unpacker) -> Points | None:
    found = {}
    for _ in range(unpacker.read_map_header()):
        key = unpacker.unpack()
        if isinstance(key, str) and key in ("run_start", "uri", "mimetype"):
            found[key] = unpacker.unpack()
        else:
            unpacker.skip()
    uri, mimetype = found.get("uri"), found.get("mimetype")
    if not isinstance(mimetype, str) or mimetype.partition(";")[0] != HDF5:
        return None
    if not isinstance(uri, str) or not 0 < len(uri) <= MAX_URI:
        raise ValueError("its uri is not one")
    return Points(_uid("run_start", found.get("run_start")), uri)


def _uid(key: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_UID:
        raise ValueError(f"its {key} is not a uid")
    return value


class KafkaRuns:
    """From a topic of Kafka, ``<beamline>.bluesky.runengine.documents``.

    What came while nobody listened is told at the next time: how far it was read is kept in Kafka.

    Parameters
    ----------
    properties
        Settings of librdkafka, e.g. those to log in.
    """

    def __init__(self, bootstrap: str, topic: str, *, group: str, properties: Mapping[str, str]) -> None:
        self._where = f"{bootstrap}/{topic}"
        fixed = {"bootstrap.servers": bootstrap, "group.id": group, "auto.offset.reset": "latest"}
        try:
            self._consumer = Consumer({**properties, **fixed, "logger": _log})
            self._consumer.subscribe([topic])
        except KafkaException as error:
            raise ConfigError(f"{self._where}: {error.args[0].str()}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def look(self) -> list[Told | Points]:
        """Return what came since the last look; see `Runs`."""
        found = []
        for record in self._consumer.consume(AT_ONCE, timeout=0):
            if (error := record.error()) is not None:
                _log.warning("%s: %s", self._where, error.str())
            elif (each := _legible(told, record.value() or b"", self._where)) is not None:
                found.append(each)
        return found


class ProxyRuns:
    """From a Proxy of bluesky.callbacks.zmq whose publishers write MessagePack, never pickles.

    What came while nobody listened is lost.
    """

    def __init__(self, address: str) -> None:
        self._where = address
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.maxmsgsize = MAX_BYTES
        self._socket.subscribe(b"")
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.__exit__()
            raise ConfigError(f"{address}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._context.term()

    def look(self) -> list[Told | Points]:
        """Return what came since the last look; see `Runs`."""
        found = []
        for _ in range(AT_ONCE):
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            if (each := _legible(told_by_proxy, message, self._where)) is not None:
                found.append(each)
        return found


def runs_of(address: str, *, group: str, properties: Path | None = None) -> Runs:
    """Listen to ``kafka+bluesky://HOST:PORT/TOPIC`` or ``zmq+bluesky://HOST:PORT``.

    Raises
    ------
    ConfigError
        The address or the properties cannot be meant.
    """
    scheme, _, target = address.partition("://")
    if scheme == "zmq+bluesky":
        return ProxyRuns(f"tcp://{target}")
    bootstrap, _, topic = target.partition("/")
    return KafkaRuns(bootstrap, topic, group=group, properties=_properties(properties))


def _properties(file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    pairs = [line.partition("=") for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return {name.strip(): value.strip() for name, _, value in pairs}


def _legible(read: Callable[[bytes], Told | Points | None], value: bytes, where: str) -> Told | Points | None:
    try:
        return read(value)
    except ValueError as error:
        _log.warning("%s: not a document: %s", where, error)
        return None
