"""What a pilot on a node and the manager say to each other: one MessagePack map each way, over ZeroMQ. No I/O.

A heartbeat says all that a pilot knows and an answer all that it is to do, so that it does not matter which of them are
lost. Fields that are not known are ignored; what is known is held to its type and bound.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from msgpack import packb, unpackb

VERSION = 1

MAX_BYTES = 2**18
"""Of a message."""

MAX_TEXT = 256
MAX_MESSAGE = 1024
MAX_REGIONS = 4096
MAX_FINDINGS = 32
MAX_WORDS = 1024
"""Of a task's command."""
MAX_COMMAND = 2**16
"""All words of it together, in bytes."""
MAX_RESULTS = 64
"""Of a task."""
MAX_PATH = 1024
MAX_COUNT = 2**53
MAX_SECONDS = 1e12

_SHA256 = re.compile(r"[0-9a-f]{64}")


class State(StrEnum):
    """What a pilot does."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    ENDED = "ended"


class Do(StrEnum):
    """What a pilot is to do. To drain and to end is the same: its command is told to stop, and has its time for it."""

    GO_ON = "go on"
    DRAIN = "drain"
    END = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the command of a pilot tells of itself."""

    ready: bool = False
    regions: tuple[int, ...] = ()
    frames: int = 0
    """Since it started."""
    lag_s: float | None = None
    """How far it is behind the detector (s); None: not known."""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a trial of a node found out."""

    name: str
    ok: bool
    detail: str
    seconds: float
    """That it took."""


class TaskState(StrEnum):
    """What came of a task on its node."""

    RUNNING = "running"
    DONE = "done"
    """Its command ended with 0, and all results are there."""
    FAILED = "failed"
    """It ended by itself, and not so."""
    STOPPED = "stopped"
    """It was told to stop: it is handed back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """What a file is."""

    path: str
    size: int
    sha256: str
    """In hex."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """What a pilot tells of the task that it has, until it is given another one or none."""

    task: str
    attempt: int
    state: TaskState
    exit_code: int | None = None
    digests: tuple[Digest, ...] = ()
    """Of its results, once it is done."""
    message: str = ""
    """The last line that it wrote, if it failed, or how far it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a pilot of kind "files" is to run."""

    task: str
    attempt: int
    command: tuple[str, ...]
    results: tuple[str, ...]
    """Files whose digests are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A pilot lives."""

    lease: str
    node: str
    """Name of the host."""
    pid: int
    n: int
    """Of this pilot's heartbeats, from 0."""
    state: State
    started: float
    """When the pilot began, s of the Unix epoch by the node's clock."""
    now: float
    """By the node's clock."""
    exit_code: int | None = None
    """Of the command, once that ended; 128 + N after signal N."""
    status: Status = field(default_factory=Status)
    findings: tuple[Finding, ...] = ()
    """Of a trial, so far."""
    task: TaskReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the manager says to a heartbeat."""

    n: int
    """Of the heartbeat."""
    do: Do = Do.GO_ON
    why: str = ""
    task: Assignment | None = None
    """None: a pilot of kind "files" has none, and stops the one that it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A heartbeat that came."""

    heartbeat: Heartbeat
    at: float
    """By our clock, s of the Unix epoch."""
    monotonic: float
    """By the one that is never set (s)."""

    @property
    def offset(self) -> float:
        """By how much the node's clock is before ours (s), less the time that the heartbeat took."""
        return self.heartbeat.now - self.at

    @property
    def began(self) -> float:
        """When the pilot began, by our clock."""
        return self.heartbeat.started - self.offset


def pack(said: Heartbeat | Answer) -> bytes:
    """Encode what is said; texts that are too long are cut."""
    packed: bytes = packb({"v": VERSION, **_cut(asdict(said))}, unicode_errors="replace")
    return packed


def heartbeat(packed: bytes) -> Heartbeat:
    """Read a heartbeat.

    Raises
    ------
    ValueError
        It is none; names what is wrong and its value.
    """
    said = _map(packed)
    exit_code = said.get("exit_code")
    return Heartbeat(
        lease=_text(said, "lease", least=1),
        node=_text(said, "node", least=1),
        pid=_whole(said, "pid"),
        n=_whole(said, "n"),
        state=State(_text(said, "state")),
        started=_seconds(said, "started"),
        now=_seconds(said, "now"),
        exit_code=None if exit_code is None else _whole(said, "exit_code", most=255),
        status=status(said.get("status")),
        findings=tuple(_finding(each) for each in _list(said, "findings", MAX_FINDINGS)),
        task=None if said.get("task") is None else _report(said["task"]),
    )


def answer(packed: bytes) -> Answer:
    """Read an answer.

    Raises
    ------
    ValueError
        It is none; names what is wrong and its value.
    """
    said = _map(packed)
    return Answer(
        n=_whole(said, "n"),
        do=Do(_text(said, "do")),
        why=_text(said, "why", most=MAX_MESSAGE),
        task=None if said.get("task") is None else _assignment(said["task"]),
    )


def status(said: object) -> Status:
    """Read what a command tells of itself, in a heartbeat or in its file.

    Raises
    ------
    ValueError
        It is no such thing; names what is wrong and its value.
    """
    said = _mapping(said, "status")
    lag = said.get("lag_s")
    regions = _list(said, "regions", MAX_REGIONS)
    return Status(
        ready=_flag(said, "ready"),
        regions=tuple(_within(each, MAX_REGIONS - 1, "a region") for each in regions),
        frames=_whole(said, "frames"),
        lag_s=None if lag is None else _seconds(said, "lag_s"),
        message=_text(said, "message", most=MAX_MESSAGE),
    )


def _finding(said: object) -> Finding:
    said = _mapping(said, "a finding")
    return Finding(
        name=_text(said, "name", least=1),
        ok=_flag(said, "ok"),
        detail=_text(said, "detail", most=MAX_MESSAGE),
        seconds=_seconds(said, "seconds"),
    )


def _report(said: object) -> TaskReport:
    said = _mapping(said, "a task")
    exit_code = said.get("exit_code")
    return TaskReport(
        task=_text(said, "task", least=1),
        attempt=_whole(said, "attempt"),
        state=TaskState(_text(said, "state")),
        exit_code=None if exit_code is None else _whole(said, "exit_code", most=255),
        digests=tuple(_digest(each) for each in _list(said, "digests", MAX_RESULTS)),
        message=_text(said, "message", most=MAX_MESSAGE),
    )


def _digest(said: object) -> Digest:
    said = _mapping(said, "a digest")
    sha256 = _text(said, "sha256")
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 is {sha256!r:.70}, not 64 hex digits")
    return Digest(path=_word(said.get("path"), MAX_PATH, "path"), size=_whole(said, "size"), sha256=sha256)


def _assignment(said: object) -> Assignment:
    said = _mapping(said, "a task")
    command = tuple(_word(each, MAX_COMMAND, "a word of its command") for each in _list(said, "command", MAX_WORDS))
    if not command:
        raise ValueError("a task has no command")
    return Assignment(
        task=_text(said, "task", least=1),
        attempt=_whole(said, "attempt"),
        command=command,
        results=tuple(_word(each, MAX_PATH, "a result") for each in _list(said, "results", MAX_RESULTS)),
    )


def _map(packed: bytes) -> Mapping[str, Any]:
    if len(packed) > MAX_BYTES:
        raise ValueError(f"{len(packed):,} bytes are more than the {MAX_BYTES:,} of a heartbeat")
    try:
        unpacked = unpackb(packed, max_array_len=MAX_REGIONS, max_map_len=64)
    except ValueError as error:  # all that msgpack raises for malformed bytes derives from it
        raise ValueError(f"not MessagePack: {error or type(error).__name__}") from None
    said = _mapping(unpacked, "what was said")
    if said.get("v") != VERSION:
        raise ValueError(f"version v = {said.get('v')!r:.50} is unknown; known is {VERSION}")
    return said


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r:.50}, not a map")  # noqa: TRY004 - one error for all that is wrong
    return value


def _text(said: Mapping[str, Any], name: str, *, least: int = 0, most: int = MAX_TEXT) -> str:
    value = said.get(name, "")
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise ValueError(f"{name} is {value!r:.50}, not a text of {least} to {most} characters")
    # It will be shown to people.
    return "".join(each if each.isprintable() else " " for each in value)


def _word(value: object, most: int, what: str) -> str:
    """Return a text as it is: it is for a machine."""
    if not isinstance(value, str) or len(value) > most or "\0" in value:
        raise ValueError(f"{what} is {value!r:.50}, not a text of {most} characters at most")
    return value


def _flag(said: Mapping[str, Any], name: str) -> bool:
    value = said.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.50}, not true or false")  # noqa: TRY004
    return value


def _whole(said: Mapping[str, Any], name: str, most: int = MAX_COUNT) -> int:
    return _within(said.get(name, 0), most, name)


def _within(value: object, most: int, what: str) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{what} is {value!r:.50}, not a whole number from 0 to {most}")
    return value


def _seconds(said: Mapping[str, Any], name: str) -> float:
    value = said.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_SECONDS:
        raise ValueError(f"{name} is {value!r:.50}, not a time in seconds")
    return float(value)


def _list(said: Mapping[str, Any], name: str, most: int) -> list[Any]:
    value = said.get(name, [])
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{name} is {value!r:.50}, not a list of {most} at most")
    return value


_LONG = {"message": MAX_MESSAGE, "detail": MAX_MESSAGE, "why": MAX_MESSAGE} | {
    "command": MAX_COMMAND,
    "results": MAX_PATH,
    "path": MAX_PATH,
}


def _cut(value: Any, most: int = MAX_TEXT) -> Any:
    match value:
        case str():
            return value[:most]
        case dict():
            return {name: _cut(each, _LONG.get(name, MAX_TEXT)) for name, each in value.items()}
        case tuple():
            return [_cut(each, most) for each in value]
        case _:
            return value
