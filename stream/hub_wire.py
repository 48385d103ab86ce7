"""What the hub of a gateway and its clients say to each other over ZeroMQ: ROUTER there, DEALER here. No I/O.

A message is a MessagePack map: ``s`` names the schema, ``v`` its version, the rest are its fields. Behind `Put` and
`Record` follow the three parts of a message of our wire (`stream.wire`), as they were encoded once.

Every message says all that its sender knows, and none is an answer that must come: so it does not matter which of them
are lost when a connection breaks or one end is another process than before.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stream.errors import DecodeError
from stream.wire import MAX_COUNT, Buffer, Packer, shown, unpackb, words

MAX_BYTES = 2**28
"""Of one part of a message."""

OVERHEAD = 2**12
"""Bytes that a record counts for besides its own where it is held against a window: so that bounds their number too."""

MAX_REGIONS = 4096
MAX_CONTROL_BYTES = 2**16

_Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,256}$")]
_Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
_Regions = Annotated[list[Annotated[int, Field(ge=0, lt=MAX_REGIONS)]], Field(max_length=MAX_REGIONS)]


class _Said(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Read(_Said):
    """A reader tells how far it is, again and again: what it may be sent follows from that."""

    beamline: _Text
    log: _Text
    ring: Annotated[str, Field(max_length=64)]
    """In which life of the log; empty of one that has read nothing."""
    next: _Count
    """Offset of the record that it wants next."""
    safe: _Count
    """Records before this offset will never be wanted again."""
    window: Annotated[int, Field(ge=1, le=MAX_BYTES)]
    """Bytes from `next` on that may be on their way, `OVERHEAD` more for every record; one record at least."""
    again: bool = False
    """What was on its way is lost: send it once more."""


class Record(_Said):
    """A record for a reader."""

    log: _Text
    ring: _Text
    offset: _Count
    follows: _Count
    """What is between this offset and its own is no longer there."""


class Put(_Said):
    """A record of somebody who writes."""

    beamline: _Text
    log: _Text
    writer: _Text
    number: _Count
    """Of this writer's records, which are taken in their order and once."""
    oldest: _Count
    """Number of the oldest of which it does not know whether the hub has it."""
    must_stay: bool
    """It goes only when there is nothing left that may be lost."""


class Had(_Said):
    """The hub has the records of a writer before this number."""

    number: _Count


class Here(_Said):
    """A worker is alive."""

    beamline: _Text
    name: _Text
    process: _Text
    """Tells two of the same name apart."""
    heard: _Count
    """Number of the newest `Yours`."""
    serving: _Regions
    leaving: bool = False


class Yours(_Said):
    """The regions of a worker."""

    number: _Count
    """Grows when regions change hands."""
    regions: _Regions


class Refused(_Said):
    """Why nothing more will come."""

    reason: Annotated[str, Field(max_length=1024)]


Said = Read | Record | Put | Had | Here | Yours | Refused

SCHEMAS: dict[str, type[Said]] = {
    kind.__name__.lower(): kind for kind in (Read, Record, Put, Had, Here, Yours, Refused)
}
VERSION = 1


def pack(said: Said) -> bytes:
    """Encode what is said."""
    packed: bytes = Packer().pack({"s": type(said).__name__.lower(), "v": VERSION, **said.__dict__})
    return packed


def unpack(parts: Sequence[Buffer]) -> Said:
    """Read what is said in the first part; the others are those of our wire.

    Raises
    ------
    DecodeError
        Names what is wrong and its value.
    """
    if not parts or memoryview(parts[0]).nbytes > MAX_CONTROL_BYTES:
        raise DecodeError(f"{memoryview(parts[0]).nbytes if parts else 0} bytes are not something said to a hub")
    try:
        header = unpackb(parts[0], max_array_len=MAX_REGIONS, max_map_len=64)
    except ValueError as error:  # all that msgpack raises for malformed bytes derives from it
        raise DecodeError(f"what is said to a hub is not MessagePack: {error or type(error).__name__}") from None
    schema = header.get("s") if isinstance(header, dict) else header
    if not isinstance(schema, str) or schema not in SCHEMAS:
        raise DecodeError(f"schema s = {shown(schema)} is unknown; known are {', '.join(SCHEMAS)}")
    if type(header.get("v")) is not int or header["v"] != VERSION:
        raise DecodeError(f"{schema}: version v = {shown(header.get('v'))} is unknown; known is {VERSION}")
    try:
        said = SCHEMAS[schema].model_validate(header)
    except ValidationError as error:
        raise DecodeError(f"{schema}: {words(error)}") from None
    wanted = 4 if isinstance(said, Record | Put) else 1
    if len(parts) != wanted:
        raise DecodeError(f"{schema}: {len(parts)} parts, not {wanted}")
    return said
