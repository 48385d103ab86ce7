"""Bluesky documents from a pipe, each after its length: from a run engine on the same machine, see `stream.bluesky`."""

import os
import select
from collections.abc import Iterator
from typing import Any, Self

from stream.documents import MAX_BYTES, unpack
from stream.errors import DecodeError, NotSeekable, SourceError
from stream.messages import Position, Rejected

POLL = 0.05
"""How long one look for a document takes (s)."""

LENGTH_BYTES = 4
"""Before each document: how long it is, little-endian."""


class PipedDocuments:
    """From a pipe: `stream.ingest.bluesky_messages.Documents`. They end when its other side closes it.

    Parameters
    ----------
    descriptor
        Of the pipe; 0 is standard input.
    wait
        How long to wait for a document before None is yielded (s).
    """

    def __init__(self, descriptor: int, *, wait: float = POLL) -> None:
        self._descriptor, self._wait = descriptor, wait
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]] | Rejected | None]:
        """Yield name and document as they come, `Rejected` for what is none, None when nothing came for `wait`.

        Raises
        ------
        SourceError
            What comes cannot be documents after their lengths.
        """
        while True:
            while (document := self._next()) is not None:
                yield document
            if not select.select([self._descriptor], [], [], self._wait)[0]:
                yield None
                continue
            came = os.read(self._descriptor, 2**16)
            if not came:
                return
            self._buffer += came

    def position(self) -> Position:
        """Return {}: documents are sent once."""
        return {}

    def seek(self, position: Position) -> None:
        """Refuse any position but {}."""
        if position:
            raise NotSeekable(f"a pipe cannot go back to {dict(position)}")

    def _next(self) -> tuple[str, dict[str, Any]] | Rejected | None:
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
        if length > MAX_BYTES:
            raise SourceError(f"a document of {length} bytes is longer than {MAX_BYTES}")
        end = LENGTH_BYTES + length
        if len(self._buffer) < max(end, LENGTH_BYTES):
            return None
        packed = bytes(self._buffer[LENGTH_BYTES:end])
        del self._buffer[:end]
        try:
            return unpack(packed)
        except DecodeError as error:
            return Rejected(reason=str(error))
