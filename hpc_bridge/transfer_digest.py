"""Whether files are what they were: size and sha256, read again."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hpc_bridge.transfer import Request

BLOCK = 4 << 20
"""Bytes that are read at once."""


def sha256(file: Path, going: Callable[[], None] = lambda: None) -> str:
    """Return the sha256 of a file as it is on its disk; `going` is called now and then, and may raise.

    Raises
    ------
    OSError
        It cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is written stays no more in memory only
        while block := opened.read(BLOCK):
            digest.update(block)
            going()
    return digest.hexdigest()


def missing_below(folder: Path, request: Request) -> Iterator[str]:
    """Give what of a request is not in a folder as it should be, and why."""
    for file in request.files:
        there = folder / file.name
        try:
            size = there.stat().st_size
            if size != file.size:
                yield f"{there}: {size} bytes instead of {file.size}"
            elif (digest := sha256(there)) != file.sha256:
                yield f"{there}: sha256 {digest} instead of {file.sha256}"
        except OSError as error:
            yield f"{there}: {error.strerror}"
