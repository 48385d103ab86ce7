"""Bluesky's documents and their bytes, as bluesky_kafka 0.10 and bluesky.callbacks.zmq 1.15 know them. No I/O.

Over Kafka a record is MessagePack of ``[name, document]``. Over ZeroMQ a message is prefix, name and document with
spaces between; both ends have to agree on what the document is written with: by default pickle, here MessagePack.

Arrays and complex numbers are written as msgpack_numpy 0.4.8 does. But nothing is unpickled: arrays of objects and of
structures are refused. So is what is not a plain value, and whatever is longer or deeper than the bounds below.
"""

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from event_model import DocumentNames
from numpy.typing import NDArray

from stream.errors import DecodeError
from stream.wire import Buffer, Packer, one_line, shown, unpackb

MAX_BYTES = 2**24
"""Of one document: what MongoDB takes, where Bluesky keeps them."""
MAX_LENGTH = 2**16
"""Of one list or map. MessagePack allocates what a list only claims to hold."""
MAX_DEPTH = 32
"""Of lists and maps in each other."""

NAMES = frozenset(name.value for name in DocumentNames)

_STRINGS = {str}
# What stays as it is, and needs no call to find that out.
_WRITTEN = {type(None), bool, float, str, bytes}
_READ = {*_WRITTEN, int}

_DTYPE = re.compile(r"[<>=|]?(b1|[iuf][0-9]{1,2}|c[0-9]{1,2}|[SU][0-9]{1,8})")


def pack(name: str, document: Mapping[str, Any]) -> bytes:
    """Write a document with its name, as bluesky_kafka does.

    Raises
    ------
    ValueError
        It is none that `unpack` would accept; names the thing and the value.
    """
    return _packed([_known(name, ValueError), _written(document, name, 0)])


def unpack(data: Buffer) -> tuple[str, dict[str, Any]]:
    """Read a name and a document. Lists stay lists; arrays are read-only.

    Raises
    ------
    DecodeError
        Names what is wrong and its value.
    """
    match _unpacked(data):
        case [name, document]:
            return _known(name, DecodeError), _document(document, name)
        case other:
            raise DecodeError(f"a document is a list of its name and itself, not {shown(other)}")


def frame(name: str, document: Mapping[str, Any], prefix: bytes = b"") -> bytes:
    """Write a message of bluesky.callbacks.zmq. Its `RemoteDispatcher` reads it with ``deserializer=read``.

    Raises
    ------
    ValueError
        As `pack`, or the prefix has a space in it.
    """
    if b" " in prefix:
        raise ValueError(f"prefix {prefix!r} has a space")
    return b" ".join([prefix, _known(name, ValueError).encode(), _packed(_written(document, name, 0))])


def unframe(message: bytes) -> tuple[bytes, str, dict[str, Any]]:
    """Read a message of bluesky.callbacks.zmq that was written with MessagePack: its prefix, name and document.

    Raises
    ------
    DecodeError
        Names what is wrong and its value.
    """
    parts = message.split(b" ", 2)
    if len(parts) != 3:
        raise DecodeError(f"a message is a prefix, a name and a document, not {shown(message)}")
    prefix, name, data = parts
    known = _known(name.decode("ascii", "replace"), DecodeError)
    return prefix, known, _document(_unpacked(data), known)


def read(data: Buffer) -> dict[str, Any]:
    """Read a document that comes without its name.

    Raises
    ------
    DecodeError
        Names what is wrong and its value.
    """
    return _document(_unpacked(data), "document")


def _packed(value: Any) -> bytes:
    packed: bytes = Packer().pack(value)
    if len(packed) > MAX_BYTES:
        raise ValueError(f"a document of {len(packed)} bytes is longer than {MAX_BYTES}")
    return packed


def _unpacked(data: Buffer) -> Any:
    if memoryview(data).nbytes > MAX_BYTES:
        raise DecodeError(f"a document of {memoryview(data).nbytes} bytes is longer than {MAX_BYTES}")
    try:
        return unpackb(data, max_array_len=MAX_LENGTH, max_map_len=MAX_LENGTH)
    except ValueError as error:  # all that msgpack raises for malformed bytes derives from it
        raise DecodeError(one_line(f"a document is not MessagePack: {error or type(error).__name__}")) from None


def _known(name: Any, error: type[Exception]) -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise error(f"there is no document called {shown(name)}; there are {', '.join(sorted(NAMES))}")
    return name


def _document(value: Any, name: str) -> dict[str, Any]:
    document = _read(value, name, 0)
    if not isinstance(document, dict):
        raise DecodeError(f"{name} is not a map but {shown(value)}")
    return document


def _written(value: Any, path: str, depth: int) -> Any:
    """Return what MessagePack is to write."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{_short(path)} is nested deeper than {MAX_DEPTH}")
    match value:
        case np.ndarray() | np.generic():
            return _written_array(value, path)
        case None | bool() | str() | bytes() | float():
            return value
        case int() if -(2**63) <= value < 2**64:
            return value
        case complex():
            return {b"complex": True, b"data": repr(value)}
        case Mapping() | list() | tuple() if len(value) > MAX_LENGTH:
            raise ValueError(f"{_short(path)} has {len(value)} entries, more than {MAX_LENGTH}; write an array")
        case dict() if _STRINGS.issuperset(map(type, value)):
            return {
                key: item if type(item) in _WRITTEN else _written(item, f"{path}.{key}", depth + 1)
                for key, item in value.items()
            }
        case Mapping():
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{_short(path)} has the key {shown(wrong[0])}, not a string")
            return {key: _written(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [
                item if type(item) in _WRITTEN else _written(item, f"{path}[{i}]", depth + 1)
                for i, item in enumerate(value)
            ]
        case _:
            raise ValueError(f"{_short(path)} = {shown(value)} is not a number of 64 bits, string, list, map or array")


def _written_array(array: NDArray[Any] | np.generic, path: str) -> Any:
    if isinstance(array, str | bytes | float):
        return array.item()
    if not _DTYPE.fullmatch(array.dtype.str) or not array.dtype.itemsize:
        raise ValueError(f"{_short(path)} is an array of {array.dtype}")
    if isinstance(array, np.ndarray):
        return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}
    return {b"nd": False, b"type": array.dtype.str, b"data": array.tobytes()}


def _read(value: Any, path: str, depth: int) -> Any:
    """Return what MessagePack read, with arrays."""
    if depth > MAX_DEPTH:
        raise DecodeError(f"{_short(path)} is nested deeper than {MAX_DEPTH}")
    match value:
        case dict() if _STRINGS.issuperset(map(type, value)):
            return {
                key: item if type(item) in _READ else _read(item, f"{path}.{key}", depth + 1)
                for key, item in value.items()
            }
        case list():
            return [
                item if type(item) in _READ else _read(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)
            ]
        case None | bool() | int() | float() | str() | bytes():
            return value
        case {b"nd": is_array, b"type": dtype, b"data": data}:
            return _array(dtype, value.get(b"shape") if is_array is True else [], data, path, is_array=is_array is True)
        case {b"complex": _, b"data": str(text)}:
            try:
                return complex(text)
            except ValueError:
                raise DecodeError(f"{_short(path)} = {shown(text)} is not a complex number") from None
        case dict():
            wrong = next(key for key in value if not isinstance(key, str))
            raise DecodeError(f"{_short(path)} has the key {shown(wrong)}, not a string")
        case _:
            raise DecodeError(f"{_short(path)} = {shown(value)} is not a number, string, list, map or array")


def _array(dtype: Any, shape: Any, data: Any, path: str, *, is_array: bool) -> Any:
    where = _short(path)
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise DecodeError(f"{where} is an array of {shown(dtype)}, which is not a number or a text")
    try:
        kind = np.dtype(dtype)
    except TypeError:
        raise DecodeError(f"{where} is an array of {dtype}, which does not exist") from None
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise DecodeError(f"{where} has the shape {shown(shape)}")
    size = math.prod(shape) * kind.itemsize
    longest = math.prod(n or 1 for n in shape) * kind.itemsize
    if not isinstance(data, bytes) or len(data) != size or not 0 < longest < 2**63:
        n_bytes = f"{len(data)} bytes" if isinstance(data, bytes) else shown(data)
        raise DecodeError(f"{where} is an array of {dtype} and shape {shown(shape)} in {n_bytes}, not {size}")
    array: NDArray[Any] = np.ndarray(shape, kind, data)
    if kind.kind == "U":
        largest = int(np.frombuffer(data, np.dtype(np.uint32).newbyteorder(kind.byteorder)).max(initial=0))
        if largest > sys.maxunicode:  # numpy itself fails when it is looked at
            raise DecodeError(f"{where} has the character {largest:#x}, which there is none of")
    return array if is_array else array[()]


def _short(path: str) -> str:
    return one_line(path if len(path) <= 200 else f"{path[:100]}...{path[-97:]}")
