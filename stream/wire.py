"""Our wire: one table of schemas, bytes to messages and back. No I/O.

A message is three parts, ``[route, header, payload]``:

route
    ``start/<region>``, ``frames/<region>``, ``stop/<region>`` or ``result/<operator>/<region>``: for the prefix filters
    of ZeroMQ subscribers. Never read here; the header decides.
header
    a MessagePack map: ``s`` names the schema, ``v`` its version, the rest are the fields of that header in `SCHEMAS`.
    Fields not known are ignored, so a newer sender may add some; a schema or version not known is refused.
payload
    frames: little-endian counts, row by row, frame after frame; with codec bslz4 or lz4, all of them as one chunk in
    the framing of the HDF5 filters bitshuffle (32008) and lz4 (32004), as Dectris detectors send; with codec events,
    the arrays of `stream.messages.Events` one after the other: offsets (<i8), pixels (<u4), counts (dtype); with codec
    bslz4-frames, each frame as a chunk of its own as in `stream.messages.Chunks`, one after the other.
    result: the bytes of the arrays one after the other, in the order of the header's table.
    start, stop: empty.

Nothing read is trusted: every size is held against a bound before anything is allocated, and payloads against their
CRC-32C.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal, Self

import numpy as np
from crc32c import crc32c
from dectris.compression import decompress
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from stream import blocks
from stream.errors import DecodeError
from stream.messages import Arrays, Chunks, Events, ExitStatus, FrameBatch, Frames, Output, Result, RunStart, RunStop

# Where `msgpack` itself has them from: importing bluesky_kafka calls msgpack_numpy.patch(), which replaces the names in
# `msgpack` by functions that unpickle.
try:
    from msgpack._cmsgpack import Packer as Packer
    from msgpack._cmsgpack import unpackb as unpackb
except ImportError:  # no compiled msgpack for this interpreter
    from msgpack.fallback import Packer as Packer
    from msgpack.fallback import unpackb as unpackb

Buffer = bytes | bytearray | memoryview

MAX_HEADER_BYTES = 2**20
MAX_FRAME_BYTES = 2**28
MAX_MESSAGE_BYTES = 2**30
MAX_DEPTH = 16
"""Of lists and maps within RunStart.metadata."""
MAX_LENGTH = 4096
"""Of one list or map within a header. Small, since MessagePack allocates what a list only claims to hold."""

MAX_COUNT = 2**62
"""Of frames: what is computed with numbers of frames stays within 64 bits."""
MAX_SECONDS = 1e9
"""Of `frame_time`, 30 years: so does what is computed with times of frames, in ns."""

_Name = Annotated[str, Field(min_length=1, max_length=256)]
_Operator = Annotated[str, Field(pattern=r"^[^/\x00-\x1f]{1,256}$")]
_Region = Annotated[int, Field(ge=0, lt=2**31)]
_Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
_Nanoseconds = Annotated[int, Field(ge=0, lt=2**63)]
_Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
_Checksum = Annotated[int, Field(ge=0, lt=2**32)]
_Pixels = Annotated[int, Field(ge=1, le=MAX_FRAME_BYTES)]
_Pixel = Annotated[int, Field(ge=0, lt=MAX_FRAME_BYTES)]
_Length = Annotated[int, Field(ge=0, le=MAX_MESSAGE_BYTES)]
_FrameShape = Annotated[tuple[_Pixels, _Pixels], Field(strict=False)]  # MessagePack knows lists only
_CountType = Literal["|u1", "<u2", "<u4"]
_ArrayType = Literal["|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f4", "<f8"]


_FINITE = (
    "incident_energy",
    "detector_distance",
    "beam_center_x",
    "beam_center_y",
    "x_pixel_size",
    "y_pixel_size",
)
"""Metadata that our own parts calculate with."""


class _Header(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    run: _Name
    region: _Region


class StartHeader(_Header):
    """Of a `RunStart`: its fields."""

    shape: _FrameShape
    origin: Annotated[tuple[_Region, _Region], Field(strict=False)]
    detector_shape: _FrameShape | None = None
    dtype: _CountType
    saturation_value: Annotated[int, Field(ge=0, lt=2**32)] | None
    frame_time: _Seconds
    count_time: _Seconds
    metadata: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_frame_bytes(self.shape, self.dtype)
        if self.count_time > self.frame_time * (1 + 1e-6):  # detectors round them to single precision
            raise ValueError(f"count_time = {self.count_time} s is longer than frame_time = {self.frame_time} s")
        _check_plain(self.metadata, "metadata", 0)
        for name in _FINITE:
            value = self.metadata.get(name, 0)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"metadata.{name} = {shown(value)} is not a finite number")
        planned = self.metadata.get("n_frames", 0)
        if not isinstance(planned, int) or not 0 <= planned <= MAX_COUNT:
            raise ValueError(f"metadata.n_frames = {shown(planned)} is not a whole number up to {MAX_COUNT}")
        return self


class FramesHeader(_Header):
    """Of a `FrameBatch`."""

    first: _Count
    n: Annotated[int, Field(ge=1, lt=2**31)]
    """Frames in the payload."""
    shape: _FrameShape
    """Of one frame."""
    dtype: _CountType
    codec: Literal["raw", "bslz4", "lz4", "events", "bslz4-frames"]
    nbytes: Annotated[int, Field(ge=0, le=MAX_MESSAGE_BYTES)]
    """Length of the payload, compressed if it is."""
    crc32c: _Checksum
    """Of the payload, compressed if it is."""
    timestamp_ns: _Nanoseconds
    skip: _Pixel | None = None
    """Of bslz4-frames: counts in each chunk before those of its frame."""
    lengths: Annotated[list[_Length], Field(max_length=MAX_LENGTH)] = []
    """Of bslz4-frames: bytes of each chunk."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        size = self.n * _check_frame_bytes(self.shape, self.dtype)
        if size > MAX_MESSAGE_BYTES and self.codec != "events":  # which are never unpacked all at once
            raise ValueError(f"n = {self.n} frames are {size} bytes, more than {MAX_MESSAGE_BYTES}")
        if self.first + self.n > MAX_COUNT:
            raise ValueError(f"first = {self.first} and n = {self.n} count past {MAX_COUNT}")
        if self.codec == "bslz4-frames" and self.skip is None:
            raise ValueError("skip is missing")
        if self.codec == "bslz4-frames" and (len(self.lengths), sum(self.lengths)) != (self.n, self.nbytes):
            raise ValueError(
                f"lengths are {len(self.lengths)} of {sum(self.lengths)} bytes, "
                f"not n = {self.n} of nbytes = {self.nbytes}"
            )
        return self


class StopHeader(_Header):
    """Of a `RunStop`: its fields."""

    n_frames: _Count
    exit_status: ExitStatus


class ResultHeader(_Header):
    """Of a `Result`."""

    operator: _Operator
    n_frames: _Count
    final: bool
    arrays: list[Any]
    """The table of `pack_arrays`."""


_AnyHeader = StartHeader | FramesHeader | StopHeader | ResultHeader

SCHEMAS: Mapping[str, Mapping[int, type[_AnyHeader]]] = {
    "start": {1: StartHeader},
    "frames": {1: FramesHeader},
    "stop": {1: StopHeader},
    "result": {1: ResultHeader},
}
"""By name and version. A field that changes its meaning makes a new version; a new one that may be missing does not."""


class _ArrayEntry(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: _Name
    dtype: _ArrayType
    shape: Annotated[tuple[_Count, ...], Field(strict=False, max_length=32)]
    nbytes: _Count
    crc32c: _Checksum

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        itemsize = np.dtype(self.dtype).itemsize
        if math.prod(self.shape) * itemsize != self.nbytes:
            raise ValueError(f"{self.name!r}: shape {list(self.shape)} of {self.dtype} is not nbytes = {self.nbytes}")
        if math.prod(length or 1 for length in self.shape) * itemsize >= 2**63:
            raise ValueError(f"{self.name!r}: shape {list(self.shape)} is no array's")
        return self


_TO_BE_ADDED = {f"to be added {i}": "x" * 200 for i in range(8)}

_TABLE = TypeAdapter(list[_ArrayEntry])


def encode(output: Output) -> list[Buffer]:
    """Write a message as its three parts. Frames that are C-contiguous are not copied: the payload is a view of them.

    Raises
    ------
    ValueError
        The message is none that `decode` would accept; names the field.
    """
    region = f"{output.region}".encode()
    payload: Buffer = b""
    match output:
        case RunStart():
            route, schema, header = b"start/", "start", _fields(output)
            header["metadata"] = dict(output.metadata)
        case FrameBatch(frames=frames):
            if len(frames.shape) != 3:
                raise ValueError(f"frames have shape {frames.shape}, which is not (n, rows, columns)")
            route, schema = b"frames/", "frames"
            codec, payload, more = _pack(frames)
            header = {
                "run": output.run,
                "region": output.region,
                "first": output.first,
                "n": frames.shape[0],
                "shape": frames.shape[1:],
                "dtype": frames.dtype.str,
                "codec": codec,
                "nbytes": len(payload),
                "crc32c": crc32c(payload),
                "timestamp_ns": output.timestamp_ns,
                **more,
            }
        case RunStop():
            route, schema, header = b"stop/", "stop", _fields(output)
        case Result():
            route, schema, header = b"result/" + output.operator.encode() + b"/", "result", _fields(output)
            header["arrays"], buffers = pack_arrays(output.arrays)
            payload = b"".join(buffers)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{schema}: {len(payload)} bytes are more than {MAX_MESSAGE_BYTES}")
    version = max(SCHEMAS[schema])
    try:
        SCHEMAS[schema][version].model_validate(header)
    except ValidationError as error:
        raise ValueError(f"{schema}: {words(error)}") from None
    packed: bytes = Packer().pack({"s": schema, "v": version, **header})
    if len(packed) > MAX_HEADER_BYTES:
        raise ValueError(f"{schema}: a header of {len(packed)} bytes is longer than {MAX_HEADER_BYTES}")
    return [route + region, packed, payload]


def decode(parts: Sequence[Buffer]) -> RunStart | FrameBatch | RunStop | Result:
    """Read a message. Its arrays are read-only views of the payload, unless compressed or at an odd address.

    Raises
    ------
    DecodeError
        Names what is wrong and its value.
    """
    if len(parts) != 3:
        raise DecodeError(f"a message has 3 parts (route, header, payload), not {len(parts)}")
    _, packed, payload = parts
    header = _read_header(packed)
    length = memoryview(payload).nbytes
    if length > MAX_MESSAGE_BYTES:
        raise DecodeError(f"a payload of {length} bytes is longer than {MAX_MESSAGE_BYTES}")
    if length and isinstance(header, StartHeader | StopHeader):
        raise DecodeError(f"run {header.run!r} starts or stops with a payload of {length} bytes, which has no meaning")
    match header:
        case StartHeader():
            return RunStart(**header.__dict__)
        case FramesHeader():
            return _frame_batch(header, payload)
        case StopHeader():
            return RunStop(**header.__dict__)
        case ResultHeader():
            return Result(**header.__dict__ | {"arrays": unpack_arrays(header.arrays, payload)})


def check_start(start: RunStart) -> None:
    """Check what a source gives to a pipeline, which adds a few entries to the metadata before it encodes it.

    Raises
    ------
    ValueError
        `encode` could not write it then; names the field.
    """
    encode(replace(start, metadata={**start.metadata, **_TO_BE_ADDED}))


def check_events(events: Events) -> None:
    """Check that events are frames, at a cost of about a nanosecond each.

    Raises
    ------
    ValueError
        Names what is wrong, where, and its value.
    """
    offsets, pixels, counts = events.offsets, events.pixels, events.counts
    n_event, n_pixel = len(pixels), math.prod(events.shape[1:])
    if (
        offsets.dtype != np.int64
        or pixels.dtype != np.uint32
        or [len(offsets), len(counts)] != [len(events) + 1, n_event]
    ):
        raise ValueError(
            f"{len(offsets)} offsets of {offsets.dtype}, {n_event} pixels of {pixels.dtype} and {len(counts)} counts "
            f"are not the events of {len(events)} frames"
        )
    if (offsets[0], offsets[-1]) != (0, n_event):
        raise ValueError(f"offsets go from {offsets[0]} to {offsets[-1]}, not from 0 to the {n_event} events there are")
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        at = int(falls.argmax())
        raise ValueError(f"offsets fall from {offsets[at]} to {offsets[at + 1]} at frame {at}")
    if pixels.max(initial=0) >= n_pixel:
        at = int((pixels >= n_pixel).argmax())
        raise ValueError(f"event {at} is at pixel {pixels[at]} of frames of {n_pixel} pixels")
    if n_event and not counts.min():
        raise ValueError(f"event {counts.argmin()} has no counts")
    follows = pixels[1:] > pixels[:-1]
    borders = offsets[(offsets > 0) & (offsets < n_event)]
    follows[borders - 1] = True
    if not follows.all():
        at = int(follows.argmin())
        raise ValueError(f"event {at + 1} at pixel {pixels[at + 1]} follows pixel {pixels[at]} in the same frame")


def pack_arrays(arrays: Arrays) -> tuple[list[dict[str, Any]], list[Buffer]]:
    """Describe arrays in a table of plain values, and give their bytes; C-contiguous little-endian ones are not copied.

    Returns
    -------
    table
        One map per array: ``name``, ``dtype`` (bool, integer or float with byte order), ``shape``, ``nbytes``,
        ``crc32c``.
    buffers
        Their bytes in the same order.

    Raises
    ------
    ValueError
        An array that `unpack_arrays` would not accept, e.g. of objects; names it.
    """
    table: list[dict[str, Any]] = []
    buffers: list[Buffer] = []
    for name, given in arrays.items():
        array = np.asarray(given)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} is of Python objects")
        buffers.append(_bytes_of(array))
        table.append(
            {
                "name": name,
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "nbytes": array.nbytes,
                "crc32c": crc32c(buffers[-1]),
            }
        )
    try:
        _TABLE.validate_python(table)
    except ValidationError as error:
        raise ValueError(f"arrays: {words(error)}") from None
    return table, buffers


def unpack_arrays(table: Sequence[Any], payload: Buffer) -> dict[str, NDArray[Any]]:
    """Read arrays back: read-only views of the payload, copied only where they would lie at an odd address.

    Raises
    ------
    DecodeError
        The table is malformed, does not add up to the payload, or a checksum differs; names the array.
    """
    try:
        entries = _TABLE.validate_python(table)
    except ValidationError as error:
        raise DecodeError(f"arrays: {words(error)}") from None
    view = memoryview(payload).cast("B")
    total = sum(entry.nbytes for entry in entries)
    if total != len(view):
        raise DecodeError(f"arrays: the table has {total} bytes, the payload {len(view)}")
    arrays: dict[str, NDArray[Any]] = {}
    offset = 0
    for entry in entries:
        if entry.name in arrays:
            raise DecodeError(f"array {entry.name!r} comes twice")
        data = view[offset : offset + entry.nbytes]
        if crc32c(data) != entry.crc32c:
            raise DecodeError(f"array {entry.name!r}: crc32c is {crc32c(data):#010x}, not {entry.crc32c:#010x}")
        arrays[entry.name] = _array(data, entry.dtype, entry.shape)
        offset += entry.nbytes
    return arrays


def _read_header(packed: Buffer) -> _AnyHeader:
    if memoryview(packed).nbytes > MAX_HEADER_BYTES:
        raise DecodeError(f"a header of {memoryview(packed).nbytes} bytes is longer than {MAX_HEADER_BYTES}")
    try:
        header = unpackb(packed, max_array_len=MAX_LENGTH, max_map_len=MAX_LENGTH)
    except ValueError as error:  # all that msgpack raises for malformed bytes derives from it
        raise DecodeError(f"the header is not MessagePack: {error or type(error).__name__}") from None
    if not isinstance(header, dict):
        raise DecodeError(f"the header is not a map but {shown(header)}")
    schema, version = header.get("s"), header.get("v")
    if not isinstance(schema, str) or schema not in SCHEMAS:
        raise DecodeError(f"schema s = {shown(schema)} is unknown; known are {', '.join(SCHEMAS)}")
    if type(version) is not int or version not in SCHEMAS[schema]:
        known = ", ".join(map(str, SCHEMAS[schema]))
        raise DecodeError(f"{schema}: version v = {shown(version)} is unknown; known are {known}")
    try:
        return SCHEMAS[schema][version].model_validate(header)
    except ValidationError as error:
        raise DecodeError(f"{schema}: {words(error)}") from None


def _frame_batch(header: FramesHeader, payload: Buffer) -> FrameBatch:
    where = f"frames {header.first}.. of run {header.run!r}"
    length = memoryview(payload).nbytes
    if length != header.nbytes:
        raise DecodeError(f"{where}: the payload has {length} bytes, not nbytes = {header.nbytes}")
    if crc32c(payload) != header.crc32c:
        raise DecodeError(f"{where}: crc32c is {crc32c(payload):#010x}, not {header.crc32c:#010x}")
    shape = (header.n, *header.shape)
    dtype = np.dtype(header.dtype)
    if header.codec == "events":
        return _batch_of(header, _unpack_events(payload, dtype, shape, where))
    if header.codec == "bslz4-frames":
        return _batch_of(header, _unpack_chunks(payload, header, dtype, where))
    size = math.prod(shape) * dtype.itemsize
    if header.codec != "raw":
        payload = _decompress(payload, header.codec, dtype.itemsize, size, where)
    elif length != size:
        raise DecodeError(f"{where}: {list(shape)} of {header.dtype} are {size} bytes, not nbytes = {header.nbytes}")
    return _batch_of(header, _array(payload, dtype, shape))


def _batch_of(header: FramesHeader, frames: Frames) -> FrameBatch:
    return FrameBatch(
        run=header.run,
        region=header.region,
        first=header.first,
        frames=frames,
        timestamp_ns=header.timestamp_ns,
    )


def _pack(frames: Frames) -> tuple[str, Buffer, dict[str, Any]]:
    """Return the codec of frames, their payload, and what else the header says of them."""
    match frames:
        case Events(offsets=offsets, pixels=pixels, counts=counts):
            check_events(frames)
            return "events", b"".join(_bytes_of(array) for array in (offsets, pixels, counts)), {}
        case Chunks(chunks=chunks, skip=skip):
            blocks.check(frames)
            return "bslz4-frames", b"".join(chunks), {"skip": skip, "lengths": [len(chunk) for chunk in chunks]}
        case _:
            return "raw", _bytes_of(frames), {}


def _unpack_chunks(payload: Buffer, header: FramesHeader, dtype: np.dtype[Any], where: str) -> Chunks:
    view = memoryview(payload).cast("B")
    chunks = tuple(view[begin:end] for begin, end in pairwise(accumulate(header.lengths, initial=0)))
    frames = Chunks(shape=(header.n, *header.shape), dtype=dtype, skip=header.skip or 0, chunks=chunks)
    try:
        blocks.check(frames)
    except ValueError as error:
        raise DecodeError(f"{where}: {error}") from None
    return frames


def _unpack_events(payload: Buffer, dtype: np.dtype[Any], shape: tuple[int, int, int], where: str) -> Events:
    view = memoryview(payload).cast("B")
    pixels = 8 * (shape[0] + 1)
    n_event, rest = divmod(len(view) - pixels, 4 + dtype.itemsize)
    if n_event < 0 or rest:
        raise DecodeError(f"{where}: {len(view)} bytes are not the events of {shape[0]} frames of {dtype.str}")
    counts = pixels + 4 * n_event
    events = Events(
        shape=shape,
        offsets=_array(view[:pixels], np.int64, (shape[0] + 1,)),
        pixels=_array(view[pixels:counts], np.uint32, (n_event,)),
        counts=_array(view[counts:], dtype, (n_event,)),
    )
    try:
        check_events(events)
    except ValueError as error:
        raise DecodeError(f"{where}: {error}") from None
    return events


def _decompress(chunk: Buffer, codec: str, itemsize: int, size: int, where: str) -> bytes:
    """Undo one HDF5 chunk: length (8 bytes) and block length (4 bytes), big-endian, then the blocks."""
    declared = int.from_bytes(chunk[:8], "big")
    block = int.from_bytes(chunk[8:12], "big")
    if declared != size or block > MAX_FRAME_BYTES:
        raise DecodeError(f"{where}: {codec} of {declared} bytes in blocks of {block}, where {size} bytes are expected")
    if size > 255 * len(chunk):  # the most that LZ4 can do
        raise DecodeError(f"{where}: {codec} of {size} bytes cannot be packed into {len(chunk)}")
    try:
        data: bytes = decompress(chunk, codec, elem_size=itemsize)
    except (RuntimeError, ValueError) as error:
        raise DecodeError(f"{where}: {codec}: {error}") from None
    if len(data) != size:
        raise DecodeError(f"{where}: {codec} gave {len(data)} bytes, not {size}")
    return data


def _fields(message: RunStart | RunStop | Result) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in fields(message)}


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _array(data: Buffer, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.frombuffer(data, dtype).reshape(shape)
    array = np.require(array, requirements="A")  # small ZeroMQ messages, and arrays after odd ones, lie anywhere
    array.flags.writeable = False
    return array


def _check_frame_bytes(shape: tuple[int, int], dtype: str) -> int:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"shape {list(shape)} of {dtype} is {size} bytes a frame, more than {MAX_FRAME_BYTES}")
    return size


def _check_plain(value: Any, path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"{path} is nested deeper than {MAX_DEPTH}")
    match value:
        case None | bool() | float() | str():
            return
        case int() if -(2**63) <= value < 2**64:
            return
        case list() | tuple() | dict() if len(value) > MAX_LENGTH:
            raise ValueError(f"{path} has {len(value)} entries, more than {MAX_LENGTH}")
        case list() | tuple():
            for index, item in enumerate(value):
                _check_plain(item, f"{path}[{index}]", depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{path} has the key {shown(key)}, not a string")  # noqa: TRY004 for pydantic
                _check_plain(item, f"{path}.{shown(key)[1:-1]}", depth + 1)
        case _:
            raise ValueError(f"{path} = {shown(value)} is not a number of 64 bits, string, list or map")


def words(error: ValidationError) -> str:
    """Say in one line what pydantic found first."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "value_error":  # said by a model_validator above
        return one_line(first["msg"].removeprefix("Value error, "))
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return one_line(f"{place} is missing")
    if first["type"] == "json_invalid":
        return one_line(first["msg"])
    return one_line(f"{place} = {shown(first['input'])}: {first['msg']}".removeprefix(" = "))


def shown(value: object) -> str:
    """Return the beginning of the repr of what somebody sent."""
    try:
        return reprlib.repr(value)[:200]
    except ValueError:  # Python writes out no integer of more than 4300 digits
        return f"({type(value).__name__} too long to show)"


def one_line(text: str) -> str:
    """Return the beginning of a text that may quote what somebody sent."""
    return " ".join(text[:400].split())
