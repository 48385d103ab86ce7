"""The files of a run by copying them, to a folder of this machine or one that is mounted here."""

import fcntl
import hashlib
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from hpc_bridge.transfer import File, Request, TransferRefused
from hpc_bridge.transfer_digest import BLOCK, missing_below, sha256
from hpc_bridge.transfer_here import Task, TaskFailed


class Copy:
    """A file has its name once it is whole, has been read again, and is on disk; until then it can be gone on with."""

    def check(self, request: Request) -> None:
        """Only folders of this machine will do."""
        for place in (request.source, request.destination):
            if place.endpoint:
                raise TransferRefused(f"{place.endpoint}: only folders of this machine can be copied", is_final=True)

    def carry(self, request: Request, task: Task) -> None:
        """Copy what is not there."""
        for file in request.files:
            task.go_on()
            _copy(Path(request.source.path) / file.name, Path(request.destination.path) / file.name, file, task)
            task.files += 1

    def missing(self, request: Request) -> Sequence[str]:
        """Read what is there again."""
        return tuple(missing_below(Path(request.destination.path), request))


def _copy(source: Path, target: Path, file: File, task: Task) -> None:
    if _is(target, file, task):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{hashlib.sha256(f'{target.name}/{file.sha256}'.encode()).hexdigest()[:24]}.part")
    with (
        source.open("rb", buffering=0) as reading,
        os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b", 0) as writing,
    ):
        try:
            fcntl.flock(writing, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TaskFailed(f"{target}: somebody else copies it") from None
        begun = writing.seek(0, os.SEEK_END)
        digest = _fill(reading, writing, begun if begun <= file.size else 0, file, part, task)
        if digest != file.sha256 and begun:
            task.faults += 1
            digest = _fill(reading, writing, 0, file, part, task)
        if digest != file.sha256:
            task.faults += 1
            writing.truncate(0)
            size = os.fstat(reading.fileno()).st_size
            raise TaskFailed(
                f"{target}: arrived with sha256 {digest} instead of {file.sha256}; {source} has {size} bytes"
            )
        part.rename(target)
    sync(target.parent)


def _fill(reading: FileIO, writing: FileIO, begin: int, file: File, part: Path, task: Task) -> str:
    """Copy from `begin` on; return the sha256 of all that is there then."""
    reading.seek(begin)
    writing.seek(begin)
    writing.truncate()
    left = file.size - begin
    while left and (block := reading.read(min(BLOCK, left))):
        task.go_on()
        rest = memoryview(block)
        while rest:
            rest = rest[writing.write(rest) :]
        left -= len(block)
        task.bytes += len(block)
    os.fsync(writing.fileno())
    return sha256(part, task.go_on)


def _is(target: Path, file: File, task: Task) -> bool:
    try:
        return target.stat().st_size == file.size and sha256(target, task.go_on) == file.sha256
    except FileNotFoundError:
        return False


def sync(folder: Path) -> None:
    """See that the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
