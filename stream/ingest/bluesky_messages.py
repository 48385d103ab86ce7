"""What of Bluesky's documents matters here, field by field. No I/O; nothing from the wire is trusted."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from stream.errors import DecodeError
from stream.ingest.bluesky_facts import Facts
from stream.messages import ExitStatus, Position, Rejected
from stream.wire import MAX_COUNT, MAX_FRAME_BYTES, MAX_LENGTH, shown

Document = Mapping[str, Any]

MAX_NAME = 256
"""Characters of a uid."""

EIGER_SPECS = ("AD_EIGER2", "AD_EIGER", "AD_EIGER_SLICE")
"""Of resources that are EIGER master files, as area-detector-handlers reads them."""

_Kind = TypeVar("_Kind")


class Documents(AbstractContextManager["Documents"], Protocol):
    """Where documents come from."""

    def __iter__(self) -> Iterator[tuple[str, Document] | Rejected | None]:
        """Yield name and document, Rejected for what is none, None when nothing came for a while."""

    def position(self) -> Position:
        """As a `stream.protocols.Source`."""

    def seek(self, position: Position) -> None:
        """As a `stream.protocols.Source`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A run began, or its detector's configuration became known."""

    facts: Facts
    is_described: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Frames of a run stand in an HDF5 file: a stream_datum."""

    run: str
    uri: str
    dataset: str
    first: int
    """Of the run."""
    row: int
    """Of the dataset, where they begin."""
    n: int

    @property
    def after(self) -> "Rows":
        """As many frames, right after these."""
        return replace(self, first=self.first + self.n, row=self.row + self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Master:
    """All frames of an event of a run stand in an EIGER master file: a datum of spec AD_EIGER2."""

    run: str
    path: str
    event: int
    """Counted from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A run ended, and all of its documents came, or will not."""

    run: str
    exit_status: ExitStatus


Told = Opened | Rows | Master | Ended | Rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """Of the stream that the detector is in."""

    run: str
    data_key: str | None
    """Of its frames, None where they do not stand in files."""
    device: str | None
    frames_per_event: int
    is_streamed: bool
    """Whether stream_datum tell of the frames, or events by datum."""


def field(document: Document, name: str, kind: type[_Kind]) -> _Kind:
    """Return a field of a document.

    Raises
    ------
    DecodeError
        It is missing, or of another kind, or too long.
    """
    value = document.get(name)
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DecodeError(f"{name} = {shown(value)} is not a {kind.__name__}")
    if isinstance(value, str) and not 0 < len(value) <= (MAX_LENGTH if name in ("uri", "resource_path") else MAX_NAME):
        raise DecodeError(f"{name} = {shown(value)} has {len(value)} characters")
    return value


def between(document: Document, name: str, least: int) -> tuple[int, int]:
    """Return start and stop of a range of a stream_datum.

    Raises
    ------
    DecodeError
        They are not whole numbers in order.
    """
    limits = field(document, name, dict)
    start, stop = field(limits, "start", int), field(limits, "stop", int)
    if not least <= start < stop <= MAX_COUNT:
        raise DecodeError(f"{name} = {shown(limits)} is no range of something")
    return start, stop


def descriptor(document: Document, wanted: str | None) -> Descriptor:
    """Return what a descriptor says of the data key that is wanted, or else the first whose data stand in files.

    Raises
    ------
    DecodeError
        Names what is wrong and its value.
    """
    run, keys = field(document, "run_start", str), field(document, "data_keys", dict)
    for name, key in keys.items():
        if not isinstance(key, dict):
            raise DecodeError(f"data key {shown(name)} = {shown(key)} is not a dict")
        external, shape = key.get("external"), _image_shape(key.get("shape"))
        if (wanted is not None and name != wanted) or not isinstance(external, str) or shape is None:
            continue
        return Descriptor(
            run=run,
            data_key=name,
            device=key["object_name"] if isinstance(key.get("object_name"), str) else None,
            frames_per_event=shape[0] if len(shape) > 2 else 1,
            is_streamed=external.startswith("STREAM"),
        )
    return Descriptor(run=run, data_key=None, device=None, frames_per_event=1, is_streamed=False)


def eiger_master(resource: Document, kwargs: Document) -> str:
    """Return the path of the master file of a datum.

    Raises
    ------
    DecodeError
        Its resource is of another kind, or names no file.
    """
    if resource.get("spec") not in EIGER_SPECS:
        raise DecodeError(
            f"resource of spec {shown(resource.get('spec'))}; of {', '.join(EIGER_SPECS)} frames are read"
        )
    root = resource.get("root", "")
    if not isinstance(root, str):
        raise DecodeError(f"root = {shown(root)} is not a str")
    path, series = field(resource, "resource_path", str), field(kwargs, "seq_id", int)
    return f"{root.rstrip('/')}/{path.lstrip('/')}_{series}_master.h5" if root else f"{path}_{series}_master.h5"


def rows_of(page: Document, columns: tuple[str, ...], maps: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield what an event_page or a datum_page holds, one after the other.

    Raises
    ------
    DecodeError
        Its columns are not lists as long as each other.
    """
    lists = {name: field(page, name, list) for name in columns}
    inner = {name: field(page, name, dict) for name in maps}
    n = len(lists[columns[0]])
    of_columns = [*lists.items(), *((f"{name}.{key}", c) for name in maps for key, c in inner[name].items())]
    for name, column in of_columns:
        if not hasattr(column, "__len__") or isinstance(column, str | bytes) or len(column) != n:
            raise DecodeError(f"{shown(name)} = {shown(column)} is not a list of {n}")
    for i in range(n):
        row: dict[str, Any] = {name: column[i] for name, column in lists.items()}
        yield row | {name: {key: column[i] for key, column in inner[name].items()} for name in maps}


def _image_shape(shape: Any) -> list[int] | None:
    """Return the shape of a data key if it is that of images."""
    if not isinstance(shape, list | tuple) or len(shape) < 2:
        return None
    sizes = [n.item() if isinstance(n, np.generic) else n for n in shape]
    return sizes if all(type(n) is int and 0 < n <= MAX_FRAME_BYTES for n in sizes) else None
