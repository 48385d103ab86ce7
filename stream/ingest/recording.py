"""Recorded DECTRIS streams: the messages of a detector as they came.

A recording is a CBOR sequence (RFC 8742), plain or in xz: per ZeroMQ message one array of byte strings, its parts.
"""

import lzma
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Self

import cbor2

from stream.errors import DecodeError, SourceError
from stream.ingest.dectris import DectrisDecoder
from stream.messages import Give, Message, Position, Rejected

MAX_PARTS = 64
"""Of one message; DECTRIS sends up to 9."""

MAX_PART_BYTES = 2**28
MAX_CHUNK_BYTES = 2**20

ARRAY, BYTE_STRING = 4, 2
"""Major types (RFC 8949, section 3.1)."""

XZ_MAGIC = b"\xfd7zXZ\x00"

_File = BufferedReader | lzma.LZMAFile


def messages(path: Path) -> Iterator[list[bytes]]:
    """Yield the parts of one message after the other.

    Raises
    ------
    SourceError
        The file cannot be opened.
    DecodeError
        What follows is not a message, or not all of one. Those before it have been yielded.
    """
    n = 0
    try:
        with _open(path) as file:
            while first := file.read1(1):
                n_parts = _length(first, file, ARRAY, MAX_PARTS)
                yield [_byte_string(file) for _ in range(n_parts)]
                n += 1
    except (EOFError, ValueError, lzma.LZMAError) as error:
        raise DecodeError(f"{path}: message {n} of the recording: {error}") from error


def record(parts: Iterable[Sequence[bytes]], path: Path) -> None:
    """Write messages for `messages` to read; in xz if the name of the file ends so."""
    with lzma.open(path, "wb") if path.suffix == ".xz" else path.open("wb") as file:
        for message in parts:
            cbor2.dump(list(message), file)


class RecordingSource:
    """A recording, decoded as if it came from the detector; a `stream.protocols.Source` that can seek.

    Seeking decodes again from the beginning and leaves out what was yielded before, so that headers, masks and a batch
    in the making are the same. `channel`, `batch` and `give` are those of `stream.ingest.dectris.DectrisDecoder`,
    and must be the same as when the position was taken. Where the recording is damaged it ends, with a Rejected.

    Raises
    ------
    SourceError
        The file cannot be opened.
    """

    def __init__(self, path: Path, *, channel: str | None = None, batch: int = 64, give: Give = "frames") -> None:
        self._path = path
        self._channel = channel
        self._batch = batch
        self._give = give
        self._n_yielded = 0
        self._place = f"{path.name}:message"
        _open(path).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __iter__(self) -> Iterator[Message]:
        """Yield the messages of the recording, and end."""
        for message in islice(self._decode(), self._n_yielded, None):
            self._n_yielded += 1
            yield message

    def position(self) -> Position:
        """Return the file's name and how many messages were yielded."""
        return {self._place: self._n_yielded}

    def seek(self, position: Position) -> None:
        """Go to a `position`; an empty one is the beginning.

        Raises
        ------
        SourceError
            It is that of another source.
        """
        if position.keys() - {self._place}:
            raise SourceError(f"{self._path}: {dict(position)} is a position of another source: not {self._place}")
        self._n_yielded = position.get(self._place, 0)

    def _decode(self) -> Iterator[Message]:
        decoder = DectrisDecoder(channel=self._channel, batch=self._batch, give=self._give)
        try:
            for parts in messages(self._path):
                yield from decoder.feed(parts)
        except DecodeError as error:
            yield from decoder.idle()
            yield Rejected(reason=str(error))
        else:
            yield from decoder.idle()


def _open(path: Path) -> _File:
    try:
        with path.open("rb") as file:
            is_xz = file.read(len(XZ_MAGIC)) == XZ_MAGIC
        return lzma.open(path) if is_xz else path.open("rb")
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be opened: {error.strerror}") from error


def _byte_string(file: _File) -> bytes:
    return _read(file, _length(_read(file, 1), file, BYTE_STRING, MAX_PART_BYTES))


def _length(first: bytes, file: _File, major_type: int, bound: int) -> int:
    """Return the length that the head of an item declares (RFC 8949, section 3), which begins with `first`."""
    found, info = first[0] >> 5, first[0] & 0x1F
    if found != major_type or info > 27:
        raise ValueError(f"byte {first.hex()} where CBOR major type {major_type} of known length begins")
    length = info if info < 24 else int.from_bytes(_read(file, 1 << (info - 24)), "big")
    if length > bound:
        raise ValueError(f"length {length} of CBOR major type {major_type} is above {bound}")
    return length


def _read(file: _File, n: int) -> bytes:
    chunks: list[bytes] = []
    missing = n
    # read looks ahead, and so meets the damage of a damaged xz before what comes before it was given
    while missing and (chunk := file.read1(min(missing, MAX_CHUNK_BYTES))):
        chunks.append(chunk)
        missing -= len(chunk)
    if missing:
        raise EOFError(f"the file ends within it ({n - missing} of {n} bytes)")
    return b"".join(chunks)
