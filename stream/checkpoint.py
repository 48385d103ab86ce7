"""State and position of a run in one file, replaced atomically.

A node may die without a signal at any time. Because what was computed and where the source goes on stand in the same
file, each frame enters the state exactly once when the source can seek; otherwise what came meanwhile shows as lost.

The file: `MAGIC`, length and crc32c of the header (little-endian uint32 each), the header (MessagePack), then the
arrays one after the other, each with its own checksum in the header's table.
"""

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import crc32c
import numpy as np

from stream import wire
from stream.errors import CheckpointError, DecodeError
from stream.messages import Arrays, Position, RunStart, RunStop
from stream.wire import Packer, unpackb

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
