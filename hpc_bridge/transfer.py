"""What is asked of a way to move the files of a run: of Globus, of rsync, or of this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Protocol

from pydantic import AfterValidator, Field

from hpc_bridge.errors import BridgeError
from hpc_bridge.section import Section

MOST_FILES = 10_000
"""Of one request."""


class TransferUnreachable(BridgeError):
    """There was no answer, or that it is to be asked again later; what it was asked it may have done.

    Parameters
    ----------
    retry_after
        How long (s) it wants to be left alone. None: it did not say.
    """

    def __init__(self, why: str, retry_after: float | None = None) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class TransferRefused(BridgeError):
    """It said no, and did nothing.

    Parameters
    ----------
    is_final
        It would say so for ever. Otherwise somebody can do something about it; the message says what.
    """

    def __init__(self, why: str, *, is_final: bool = False) -> None:
        super().__init__(why)
        self.is_final = is_final


class UnknownTask(BridgeError):
    """There is no such task, or no more."""


class State(StrEnum):
    """Of a task, and of the request that it is for."""

    QUEUED = "queued"
    ACTIVE = "active"
    STALLED = "stalled"
    """Nothing moves until somebody does something, whatever the service calls it; the message says why."""
    DONE = "done"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_final(self) -> bool:
        """Nothing will change any more."""
        return self in (State.DONE, State.FAILED, State.CANCELED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a task is."""

    state: State
    bytes: int = 0
    files: int = 0
    faults: int = 0
    """Errors that were tried again."""
    nice_status: str = ""
    """The service's own word for what it waits for."""
    message: str = ""


def _inside(name: str) -> str:
    if name.startswith("/") or not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(f"{name!r} is no name of a file below a folder")
    return name


def _absolute(path: PurePosixPath) -> PurePosixPath:
    if not path.is_absolute() or ".." in path.parts or not str(path).isprintable():
        raise ValueError(f"{str(path)!r} is no absolute path of a folder")
    return path


class File(Section):
    """A file as it was written down when it was closed."""

    name: Annotated[str, Field(max_length=1024), AfterValidator(_inside)]
    """Below the folder, at the source as at the destination."""
    size: int = Field(ge=0)
    """In bytes."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Place(Section):
    """A folder somewhere."""

    endpoint: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9_.@-]*)?$")
    """A collection of Globus, or ``user@host`` of rsync. Empty: this machine."""
    path: Annotated[PurePosixPath, AfterValidator(_absolute)]


class Request(Section):
    """Files of a run that are to be somewhere else.

    Where it comes from somebody else, what is wrong with it is told by pydantic.
    """

    beamline: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]{0,31}$")
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    source: Place
    destination: Place
    files: tuple[File, ...] = Field(min_length=1, max_length=MOST_FILES)
    deadline: float
    """After which nobody wants it any more, in seconds of the Unix epoch."""

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(file.size for file in self.files)


class Transfer(Protocol):
    """Every call but `missing` ends within seconds; every call may raise TransferUnreachable and TransferRefused."""

    most_active: int
    """Tasks that it carries out at once."""

    def prepare(self, request: Request, name: str) -> str:
        """Return the document of a new task, which is to be on record before it is submitted. Nothing moves yet.

        Parameters
        ----------
        name
            By which the task can be found again: of this request, and this attempt.
        """

    def submit(self, document: str) -> str:
        """Return the id of the task of a document: of the same one for the same document, however often."""

    def find(self, document: str) -> str | None:
        """Return the id of the task that a document began; None if it began none."""

    def progress(self, task: str) -> Progress:
        """Return how far a task is.

        Raises
        ------
        UnknownTask
            It never was, or is remembered no more.
        """

    def cancel(self, task: str) -> None:
        """End a task; one that is over or unknown is no error. What it then says of itself says whether it was."""

    def missing(self, request: Request) -> Sequence[str]:
        """Return what is not at the destination with its size and sha256, and why. Nothing: the source may go."""
