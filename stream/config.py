"""What a configuration file may say. `docs/run.example.yaml` says all of it."""

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from stream.errors import ConfigError
from stream.units import quantity

Transport = Literal[
    "dectris", "zmq", "hub", "proxy", "kafka", "documents", "tiled", "live", "hdf5", "recording", "rigaku"
]

_SCHEMES: dict[str, Transport] = {
    "zmq+dectris://": "dectris",
    "zmq+bluesky://": "proxy",
    "kafka+bluesky://": "documents",
    "tiled+http://": "tiled",
    "tiled+https://": "tiled",
    "live://": "live",
    "zmq://": "zmq",
    "kafka://": "kafka",
}
_SUFFIXES: dict[str, Transport] = {
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".nxs": "hdf5",
    ".hdf": "hdf5",
    ".cbors": "recording",
    ".cbors.xz": "recording",
    ".bin": "rigaku",
    ".bin.000": "rigaku",
}
MAX_PORT = 65535
_BEAMLINE = r"[A-Za-z0-9._-]{1,200}"
_ADDRESSES = (
    "zmq+dectris://HOST:PORT, zmq://HOST:PORT, zmq://HOST:PORT/BEAMLINE, kafka://HOST:PORT/BEAMLINE, "
    "kafka+bluesky://HOST:PORT/TOPIC, zmq+bluesky://HOST:PORT, tiled+http://HOST:PORT, live://HOST:PORT, "
    f"or a file ({' '.join(_SUFFIXES)})"
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where frames or results come from or go to."""

    transport: Transport
    target: str
    """``tcp://host:port``, ``tcp://host:port/beamline`` of a hub, ``host:port/beamline`` of Kafka, the URI of a Tiled
    server, or a path."""


def address(text: str) -> Address:
    """Read an address: one of the schemes, a path, or ``file:`` of it.

    Raises
    ------
    ConfigError
        The scheme, the port or the suffix is none of these.
    """
    scheme = re.match(r"[\w+.-]+://", text)
    if scheme and scheme[0] != "file://":
        if scheme[0] not in _SCHEMES:
            raise ConfigError(f'"{text}": unknown scheme {scheme[0]}; an address is {_ADDRESSES}')
        if scheme[0] in ("kafka://", "kafka+bluesky://"):
            return Address(_SCHEMES[scheme[0]], _kafka(text))
        if _SCHEMES[scheme[0]] == "tiled":
            return Address("tiled", _tiled(text))
        parts = urlsplit(text)
        port = parts.netloc.rpartition(":")[2]
        if port.isdecimal() and not 1 <= int(port) <= MAX_PORT:
            raise ConfigError(f'"{text}": port {port} is not 1 to {MAX_PORT}')
        is_hub = scheme[0] == "zmq://" and re.fullmatch(f"/{_BEAMLINE}", parts.path) is not None
        has_more = parts.query or "@" in parts.netloc or (parts.path and not is_hub)
        if not parts.hostname or not port.isdecimal() or has_more:
            raise ConfigError(f'"{text}" must name a host and a port, e.g. "{scheme[0]}127.0.0.1:31001"')
        if is_hub:
            return Address("hub", f"tcp://{parts.netloc}{parts.path}")
        return Address(_SCHEMES[scheme[0]], f"tcp://{parts.netloc}")
    path = text.removeprefix("file:").removeprefix("//")
    for suffix, transport in _SUFFIXES.items():
        if path.endswith(suffix):
            return Address(transport, path)
    raise ConfigError(f'"{text}": an address is {_ADDRESSES}')


def live_at(text: str) -> tuple[str, int]:
    """Return host and port of a page.

    Raises
    ------
    ConfigError
        It is another address.
    """
    where = address(text)
    if where.transport != "live":
        raise ConfigError(f'"{text}": a page is at live://HOST:PORT')
    host, _, port = where.target.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def _kafka(text: str) -> str:
    found = re.fullmatch(rf"kafka(?:\+bluesky)?://([^/?#@,\s]+:\d+(?:,[^/?#@,\s]+:\d+)*)/({_BEAMLINE})", text)
    if found is None:
        raise ConfigError(f'"{text}" must name a broker and a beamline, e.g. "kafka://127.0.0.1:9092/8idi"')
    return f"{found[1]}/{found[2]}"


def _tiled(text: str) -> str:
    uri = text.removeprefix("tiled+")
    parts = urlsplit(uri)
    if not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
        # Not shown: there may be a key in it.
        raise ConfigError(
            'the address of a Tiled server is as "tiled+http://127.0.0.1:8000", perhaps with a path; its key does not '
            "belong there, where others read it, but into TILED_API_KEY"
        )
    return uri


def _address_of(*transports: Transport) -> Callable[[str], str]:
    def check(text: str) -> str:
        try:
            transport = address(text).transport
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if transport not in transports:
            allowed = [name for name, known in (_SCHEMES | _SUFFIXES).items() if known in transports]
            raise ValueError(f'"{text}" cannot be used here; {", ".join(allowed)} can')
        return text

    return check


def _positive_seconds(text: object) -> float:
    try:
        value = quantity(text, "s")
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if value <= 0:
        raise ValueError(f'"{text}" is not above 0')
    return value


Seconds = Annotated[float, BeforeValidator(_positive_seconds), PlainSerializer(lambda value: f"{value!r} s")]
File = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_SOURCE_OPTIONS: dict[Transport, frozenset[str]] = {
    "dectris": frozenset({"channel", "batch"}),
    "zmq": frozenset({"bind"}),
    "kafka": frozenset(),
    "proxy": frozenset({"batch", "frame_time", "roots"}),
    "documents": frozenset({"batch", "frame_time", "roots"}),
    "hub": frozenset(),
    "hdf5": frozenset({"batch", "metadata", "dataset", "frame_time"}),
    "recording": frozenset({"batch", "channel"}),
    "rigaku": frozenset({"batch", "metadata", "frame_time"}),
}


class SourceSection(_Section):
    """Where frames come from."""

    address: Annotated[
        str,
        AfterValidator(
            _address_of("dectris", "zmq", "hub", "kafka", "proxy", "documents", "hdf5", "recording", "rigaku")
        ),
    ]
    """See `stream.config.address`."""
    batch: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Frames handed on together."""
    channel: str | None = None
    """Threshold channel of a Dectris stream."""
    bind: bool | None = None
    """Whether this side of a ZeroMQ connection waits for the other."""
    metadata: File | None = None
    """Metadata file beside an HDF5 or Rigaku file."""
    dataset: str | None = None
    """Name of the frames in an HDF5 file."""
    frame_time: Seconds | None = None
    """Start to start of frames (s), for a file that does not tell."""
    roots: dict[str, File] | None = None
    """Directories of which Bluesky's documents may have files read, by what these call them."""
    documents: Annotated[str, AfterValidator(_address_of("proxy", "documents"))] | None = None
    """Where Bluesky's documents of a detector that streams come from."""

    @field_validator("batch", "channel", "bind", "metadata", "dataset", "frame_time", "roots")
    @classmethod
    def _belongs_to_the_address(cls, value: object, info: ValidationInfo) -> object:
        text = info.data.get("address")
        if text and info.field_name not in _SOURCE_OPTIONS[address(text).transport]:
            raise ValueError(f'not an option of "{text}"')
        return value

    def options(self) -> dict[str, Any]:
        """Return the options that were given, as the class of the source names them."""
        given = {name: getattr(self, name) for name in self.model_fields_set - {"address", "documents"}}
        return {name: value for name, value in given.items() if value is not None}


class MultiTauSection(_Section):
    """Delays and error bars of g2."""

    delays_per_level: Annotated[int, Field(ge=1, le=32)] = 4
    levels: Annotated[int, Field(ge=1, le=28)] = 16
    error: Literal["static", "pixel"] = "static"
    """Error bars from the spread over static bins, or over pixels as the APS does (slower, more memory)."""
    segments: Annotated[int, Field(ge=0, le=64)] = 8
    """Successive parts of the run, at most, of which g2 is told too; 0: of none."""


class TwoTimeSection(_Section):
    """Two-time correlation c2(t1, t2); see `stream.operators.twotime`."""

    frames: Annotated[int, Field(ge=2, le=8192)] = 256
    """The newest frames that are kept one by one, and so many averages of 2, 4, 8, ... of them."""
    levels: Annotated[int, Field(ge=1, le=16)] = 8
    """The longest time looked back is frames * 2**(levels - 1)."""
    bins: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)] | None = None
    """Dynamic bins of the map, from 1. None: all."""
    normalisation: Literal["dynamic", "static"] = "dynamic"
    """By the mean of each dynamic bin, or of each static bin in it as boost_corr does."""
    memory_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    """What would take more memory is refused."""


class OperatorsSection(_Section):
    """What is computed. g2 always is."""

    multitau: MultiTauSection = MultiTauSection()
    twotime: TwoTimeSection | None = None
    """Two-time correlation. None: it is not computed."""
    scattering: bool = True
    """Mean image and q profile."""
    intensity: bool = True
    """Mean counts against time."""


class CheckpointSection(_Section):
    """Where the state is kept, so that a restart goes on."""

    path: File
    every: Seconds = 30.0


def _sink(text: str) -> str:
    if text == "console":
        return text
    text = _address_of("zmq", "kafka", "proxy", "tiled", "live", "hdf5")(text)
    if unknown := set(re.findall(r"\{[^{}]*\}", text)) - {"{run}"}:
        raise ValueError(f'"{text}": {", ".join(sorted(unknown))} stands for nothing; only {{run}} does')
    return text


def _some(sinks: tuple[str, ...]) -> tuple[str, ...]:
    if not sinks:
        raise ValueError("at least one is needed")
    return sinks


class Configuration(_Section):
    """A whole configuration file."""

    source: SourceSection
    qmap: File
    """Map of pixels to q bins (pySimpleMask, NXxpcs)."""
    operators: OperatorsSection = OperatorsSection()
    sinks: Annotated[tuple[Annotated[str, AfterValidator(_sink)], ...], Field(strict=False), AfterValidator(_some)] = (
        "console",
    )
    """A result file (``{run}`` in its name stands for the run), ``zmq://HOST:PORT`` to publish, ``console``; as
    documents of a Bluesky run ``kafka://HOST:PORT/BEAMLINE``, ``zmq+bluesky://HOST:PORT`` of a Proxy, or
    ``tiled+http://HOST:PORT`` of a Tiled server; ``live://HOST:PORT`` for a page in the browser."""
    token_file: File | None = None
    """What must be known to see the page; asked for where others than this machine reach it."""
    kafka_properties: File | None = None
    """Settings of librdkafka, see `stream.kafka.read_properties`."""
    secret_key: File | None = None
    """Our own key, see `xpcs-stream keys`, for Proxies of bluesky that let in only whom they know."""
    proxy_key: Annotated[File | None, Field(validate_default=True)] = None
    """The public key of these."""
    checkpoint: CheckpointSection | None = None
    publish_every: Seconds = 1.0
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads that correlate. None: one per core."""

    @field_validator("proxy_key")
    @classmethod
    def _is_of_somebody(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) != (info.data.get("secret_key") is None):
            raise ValueError("secret_key and proxy_key go together")
        source: SourceSection | None = info.data.get("source")
        places = [*info.data.get("sinks", ()), *([source.address, source.documents or ""] if source else [])]
        if value is not None and not any(place.startswith("zmq+bluesky://") for place in places):
            raise ValueError("there is no zmq+bluesky:// whose key it is")
        return value

    def text(self) -> str:
        """Return the file that says this, defaults included; `load` of it gives the same again."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


Place = tuple[int | str, ...]
"""Keys and indices from the top of the document."""


def _dotted(place: Place) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return f"{text.removeprefix('.')}: " if text else ""


def check(document: object, where: Callable[[Place], str] = _dotted) -> Configuration:
    """Check plain data, as a YAML file or the command line gives it.

    Parameters
    ----------
    document
        Maps, lists, strings and numbers.
    where
        What to put before a problem at a place of the document.

    Raises
    ------
    ConfigError
        All that is wrong, one problem a line.
    """
    try:
        return Configuration.model_validate(document)
    except ValidationError as error:
        problems = [(problem["loc"], _words(problem)) for problem in error.errors(include_url=False)]
    raise ConfigError("\n".join(f"{where(place)}{words}" for place, words in problems))


def load(path: Path) -> Configuration:
    """Read a configuration file (YAML).

    Raises
    ------
    ConfigError
        All that is wrong with it, each as ``file:line: key: problem``.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        _refuse_duplicates(path, root)
        document = loader.construct_document(root) if root else {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a YAML file; frames are given with --source") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from None
    return check(document, lambda place: f"{path}:{_line(root, place)}: {_dotted(place)}")


def _words(problem: ErrorDetails) -> str:
    place, value = problem["loc"], problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            close = difflib.get_close_matches(str(place[-1]), _keys(place[:-1]), n=1)
            return "unknown key" + (f'; did you mean "{close[0]}"?' if close else "")
        case "missing":
            return "is missing"
        case "model_type":
            return f"{json.dumps(value, default=str)} should be a section with keys"
        case "tuple_type":
            return f"{json.dumps(value, default=str)} should be a list"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            return f"{json.dumps(value, default=str)} {problem['msg'].removeprefix('Input ')}"


def _keys(place: Place) -> list[str]:
    section: type[BaseModel] = Configuration
    for part in place:
        annotation = section.model_fields[str(part)].annotation
        choices = (annotation, *get_args(annotation))
        section = next(each for each in choices if isinstance(each, type) and issubclass(each, BaseModel))
    return list(section.model_fields)


def _line(root: yaml.Node | None, place: Place) -> int:
    """Return the line of a place of the document, or of what should contain it."""
    node, line = root, 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            line, node = found[-1][0].start_mark.line + 1, found[-1][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _refuse_duplicates(path: Path, root: yaml.Node | None) -> None:
    """YAML forbids a key twice, PyYAML silently takes the last."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)
            continue
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise ConfigError(f"{path}:{key.start_mark.line + 1}: {key.value}: stands here for the second time")
            keys.add(str(key.value))
            nodes.append(value)


def there(path: Path) -> Path:
    """Return the path of a file that exists; else ConfigError."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    return path
