"""Dectris Stream V2: one CBOR message each for start, image and end. A pure decoder.

Source: https://github.com/dectris/documentation, stream_v2 and cbor/dectris-compression-tag.md; recorded messages of an
EIGER1 1M. Shapes are [rows, columns]; arrays are RFC 8746 typed arrays; lz4 and bslz4 are framed as in HDF5.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import cbor2
from cbor2 import CBORTag
from pydantic import Field, TypeAdapter

from stream.errors import DecodeError
from stream.ingest.dectris_messages import (
    Count,
    End,
    Fields,
    Image,
    Pixels,
    Planned,
    Seconds,
    Start,
    kilo,
    metadata,
    validate,
)
from stream.wire import Buffer, shown

_DTYPES = {64: "|u1", 69: "<u2", 70: "<u4"}
_MAX_DEPTH = 32

_Name = Annotated[str, Field(min_length=1, max_length=256)]
_Numerator = Annotated[int, Field(ge=0, lt=2**64)]
_Denominator = Annotated[int, Field(ge=1, lt=2**64)]
_Rational = Annotated[tuple[_Numerator, _Denominator], Field(strict=False)]


class _Start(Fields):
    type: Literal["start"]
    series_id: Count
    series_unique_id: _Name
    number_of_images: Planned
    frame_time: Seconds
    count_time: Seconds
    arm_date: datetime | None = None
    pixel_mask: dict[str, Any] = Field(default={})
    pixel_mask_enabled: bool = True
    detector_description: str | None = None
    detector_translation: Any = None
    incident_energy: Any = None
    beam_center_x: Any = None
    beam_center_y: Any = None
    pixel_size_x: Any = None
    pixel_size_y: Any = None
    user_data: Any = None


class _Image(Fields):
    type: Literal["image"]
    series_unique_id: _Name
    image_id: Count
    series_date: datetime | None = None
    start_time: _Rational
    data: dict[str, Any]


class _End(Fields):
    type: Literal["end"]
    series_unique_id: _Name


_AnyMessage = Annotated[_Start | _Image | _End, Field(discriminator="type")]
_MESSAGE: TypeAdapter[_Start | _Image | _End] = TypeAdapter(_AnyMessage)


def decode(parts: Sequence[Buffer]) -> Start | Image | End:
    """Read one message.

    Raises
    ------
    DecodeError
        Names what is wrong and its value.
    """
    if len(parts) != 1:
        raise DecodeError(f"a CBOR message has {len(parts)} parts, not 1")
    try:
        # the hook: under a tag, and the detector sends all under "this is CBOR", cbor2 makes maps of its own type
        fields = cbor2.loads(bytes(parts[0]), max_depth=_MAX_DEPTH, object_hook=lambda entries, _: dict(entries))
    except cbor2.CBORDecodeError as error:
        raise DecodeError(f"not CBOR: {error}") from None
    message = validate(_MESSAGE.validate_python, fields, "start, image or end")
    run = message.series_unique_id
    match message:
        case _Start():
            return _start(run, message)
        case _Image():
            where = f"image {message.image_id} of {run}"
            numerator, denominator = message.start_time
            return Image(
                run=run,
                number=message.image_id,
                start_ns=numerator * 10**9 // denominator,
                clock_ns=_nanoseconds(message.series_date),
                channels={name: _pixels(array, f"{where}: {name:.80}") for name, array in message.data.items()},
            )
        case _End():
            return End(run=run)


def _start(run: str, start: _Start) -> Start:
    masks = {} if start.pixel_mask_enabled else start.pixel_mask
    return Start(
        run=run,
        n_frames=start.number_of_images,
        frame_time=start.frame_time,
        count_time=start.count_time,
        armed_ns=_nanoseconds(start.arm_date),
        masks={name: _pixels(array, f"pixel_mask of {name:.80}").decompress() != 0 for name, array in masks.items()},
        metadata=metadata(
            {
                "series_id": start.series_id,
                "start_time": None if start.arm_date is None else start.arm_date.isoformat(),
                "detector": start.detector_description,
                "incident_energy": kilo(start.incident_energy),  # eV
                "detector_distance": _distance(start.detector_translation),
                "beam_center_x": start.beam_center_x,
                "beam_center_y": start.beam_center_y,
                "x_pixel_size": start.pixel_size_x,
                "y_pixel_size": start.pixel_size_y,
            },
            start.user_data,
            n_frames=start.number_of_images,
        ),
    )


def _pixels(array: object, where: str) -> Pixels:
    match array:
        case CBORTag(tag=40, value=[[int(rows), int(columns)], CBORTag(tag=kind, value=content)]) if kind in _DTYPES:
            dtype = _DTYPES[kind]
        case CBORTag(tag=40, value=[[int(), int()], CBORTag(tag=kind)]):
            raise DecodeError(f"{where}: typed array tag {kind} is not one of {', '.join(map(str, _DTYPES))}")
        case _:
            raise DecodeError(f"{where} is not a tagged array of two dimensions")
    match content:
        case bytes():
            return Pixels(shape=(rows, columns), dtype=dtype, codec="none", data=content)
        case CBORTag(tag=56500, value=["bslz4", size, bytes(data)]) if size == int(dtype[-1]):
            return Pixels(shape=(rows, columns), dtype=dtype, codec="bslz4", data=data)
        case CBORTag(tag=56500, value=["lz4", _, bytes(data)]):
            return Pixels(shape=(rows, columns), dtype=dtype, codec="lz4", data=data)
        case CBORTag(tag=56500, value=[codec, size, bytes()]):
            raise DecodeError(f"{where}: codec {shown(codec)} of {shown(size)} bytes is not lz4, or bslz4 of {dtype}")
        case _:
            raise DecodeError(f"{where} has neither bytes nor compressed bytes")


def _distance(translation: object) -> Any:
    """Return the detector's distance (m), the third component; some firmware counts it against the beam."""
    match translation:
        case [_, _, int() | float() as z]:
            return abs(z)
        case _:
            return None


def _nanoseconds(date: datetime | None) -> int | None:
    if date is None:
        return None
    aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000
