"""State and position of a run in one file, replaced atomically.

A node may die without a signal at any time. Because what was computed and where the source goes on stand in the same
file, each frame enters the state exactly once when the source can seek; otherwise what came meanwhile shows as lost.

One process alone keeps one `File`. Where a region may get another owner while the one before still lives, paused or
unreachable, each owner has an epoch of its own (`Epochs`) and only the newest counts: what an old one still writes
changes nothing.

The file: `MAGIC`, length and crc32c of the header (little-endian uint32 each), the header (MessagePack), then the
arrays one after the other, each with its own checksum in the header's table.
"""

import logging
import mmap
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import crc32c
import numpy as np

from stream import wire
from stream.errors import CheckpointError, DecodeError, Superseded
from stream.messages import Arrays, Position, RunStart, RunStop
from stream.wire import Packer, unpackb

_log = logging.getLogger(__name__)

MAGIC = b"xpcs-stream checkpoint 1\n"
_PREFIX = struct.Struct("<II")


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A run that is not finished."""

    start: RunStart
    stop: RunStop | None
    """Set once the run has ended and its final results are still to be delivered."""
    ledger: Arrays
    operators: Mapping[str, Arrays]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where a pipeline stands."""

    position: Position
    running: Running | None


class Store(Protocol):
    """Where checkpoints of one run and region are kept."""

    def load(self) -> Checkpoint | None:
        """Return the newest; None if there is none.

        Raises
        ------
        CheckpointError
            What is there cannot be read.
        """

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep one, in the place of older ones.

        Raises
        ------
        CheckpointError
            It could not be written.
        Superseded
            Another owner has taken over.
        """

    def pass_by(self, position: Position) -> None:
        """Take note that this process needs nothing before a position; the next one may, so it is not kept."""


class File:
    """One file, for one process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def load(self) -> Checkpoint | None:
        """Read it; see `Store`."""
        return load(self._path)

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace it; see `Store`."""
        save(self._path, checkpoint)

    def pass_by(self, position: Position) -> None:
        """Do nothing; see `Store`."""


class Reader(Protocol):
    """A source that wants to know what a checkpoint says of it."""

    def begin(self, start: RunStart) -> None:
        """Take note of the run that frames at its position are of."""

    def acknowledge(self, position: Position) -> None:
        """Take note that nothing before a position will be asked for again."""


class Acknowledged:
    """A store that tells a source what is read and what is saved."""

    def __init__(self, store: Store, reader: Reader) -> None:
        self._store = store
        self._reader = reader

    def __str__(self) -> str:
        return str(self._store)

    def load(self) -> Checkpoint | None:
        """Read it, and tell which run goes on; see `Store`."""
        saved = self._store.load()
        if saved is not None and saved.running is not None:
            self._reader.begin(saved.running.start)
        return saved

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep one, then tell that it is safe; see `Store`."""
        self._store.save(checkpoint)
        self._reader.acknowledge(checkpoint.position)

    def pass_by(self, position: Position) -> None:
        """Tell that it is safe; see `Store`."""
        self._reader.acknowledge(position)


KEPT = 2
"""Checkpoints of an epoch: should the newest be damaged, there is the one before."""


class Epochs:
    """A directory that owners of a region share, one after the other: ``<epoch>/<number>``.

    The one who makes the directory of an epoch is its owner; no two can.

    Raises
    ------
    CheckpointError
        The directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            epoch = max(self._epochs(), default=0) + 1
            while not _made(directory / f"{epoch:08d}"):
                epoch += 1
            self._own = directory / f"{epoch:08d}"
        except OSError as error:
            raise CheckpointError(f"{directory}: checkpoints cannot be kept there: {error.strerror}") from error

    def __str__(self) -> str:
        return str(self._directory)

    def load(self) -> Checkpoint | None:
        """Return the newest of the newest epoch that can be read; None if there never was one."""
        damaged: CheckpointError | None = None
        # A former owner that does not know yet that it is one may be removing what it listed just now.
        while found := self._newest_first():
            for path in found:
                try:
                    saved = load(path)
                except CheckpointError as error:
                    _log.warning("%s; the one before is taken", error)
                    damaged = damaged or error
                    continue
                if saved is not None:
                    return saved
            if damaged is not None:
                raise damaged
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the next of our epoch, and remove what is older than the one before."""
        self._check_whose()
        self._number += 1
        try:
            save(self._own / f"{self._number:012d}", checkpoint)
        except CheckpointError:
            self._check_whose()
            raise
        # Once more: a new owner that did not find this one needs what came after the one before.
        self._check_whose()
        for old in self._newest_first()[KEPT:]:
            old.unlink(missing_ok=True)
        if self._number >= KEPT:
            for epoch in self._epochs():
                if epoch < int(self._own.name):
                    shutil.rmtree(self._directory / f"{epoch:08d}", ignore_errors=True)

    def pass_by(self, position: Position) -> None:
        """Do nothing; see `Store`."""

    def _check_whose(self) -> None:
        try:
            is_over = not self._own.exists() or max(self._epochs()) > int(self._own.name)
        except OSError as error:
            raise CheckpointError(f"{self._directory}: cannot be read: {error.strerror}") from error
        if is_over:
            raise Superseded(f"{self._directory}: another owner has taken over")

    def _epochs(self) -> Iterator[int]:
        return (int(path.name) for path in self._directory.iterdir() if re.fullmatch(r"\d{8}", path.name))

    def _newest_first(self) -> list[Path]:
        own = int(self._own.name)
        found = [
            path for path in self._directory.glob("*/*") if re.fullmatch(r"\d{8}/\d{12}", "/".join(path.parts[-2:]))
        ]
        return sorted((path for path in found if int(path.parent.name) <= own), reverse=True)


def _made(directory: Path) -> bool:
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file at `path`; it is the old one or the new one at any time.

    Raises
    ------
    CheckpointError
        It could not be written, or holds what cannot be read back.
    """
    try:
        packed, buffers = _packed(checkpoint)
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot write the checkpoint: {error}") from error
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC + _PREFIX.pack(len(packed), crc32c.crc32c(packed)) + packed)
            for buffer in buffers:
                file.write(buffer)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write the checkpoint: {error.strerror}") from error


def _packed(checkpoint: Checkpoint) -> tuple[bytes, list[wire.Buffer]]:
    """Return the header, and the bytes of the arrays behind it."""
    running = checkpoint.running
    arrays = {}
    header: dict[str, object] = {"position": dict(checkpoint.position)}
    if running is not None:
        header["start"] = [bytes(part) for part in wire.encode(running.start)]
        header["stop"] = None if running.stop is None else [bytes(part) for part in wire.encode(running.stop)]
        for name, state in {"ledger": running.ledger, **running.operators}.items():
            arrays.update({f"{name}/{key}": array for key, array in state.items()})
    header["arrays"], buffers = wire.pack_arrays(arrays)
    packed: bytes = Packer().pack(header)
    return packed, buffers


def load(path: Path) -> Checkpoint | None:
    """Read the file at `path`; None if there is none.

    Raises
    ------
    CheckpointError
        It is damaged, or not a checkpoint.
    """
    try:
        with path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error}") from error
    try:
        return _parse(content)
    except DecodeError as error:
        raise CheckpointError(f"{path}: the checkpoint is damaged: {error}") from error


def _parse(content: memoryview) -> Checkpoint:
    prefix = len(MAGIC) + _PREFIX.size
    if len(content) < prefix or content[: len(MAGIC)] != MAGIC:
        raise DecodeError(f"it does not begin with {MAGIC!r}")
    length, checksum = _PREFIX.unpack_from(content, len(MAGIC))
    packed = content[prefix : prefix + length]
    if len(packed) != length or crc32c.crc32c(packed) != checksum:
        raise DecodeError("the checksum of the header is wrong")
    # The checksum holds, so this is what `save` wrote.
    header = unpackb(packed)
    arrays = wire.unpack_arrays(header["arrays"], content[prefix + length :])
    if "start" not in header:
        return Checkpoint(position=header["position"], running=None)
    start = wire.decode(header["start"])
    stop = None if header["stop"] is None else wire.decode(header["stop"])
    if not isinstance(start, RunStart) or not isinstance(stop, RunStop | None):
        raise DecodeError(f"a {type(start).__name__} and a {type(stop).__name__} where a run should begin and end")
    states: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        owner, _, key = name.partition("/")
        states.setdefault(owner, {})[key] = array
    ledger = states.pop("ledger")
    return Checkpoint(
        position=header["position"], running=Running(start=start, stop=stop, ledger=ledger, operators=states)
    )
