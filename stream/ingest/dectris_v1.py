"""Dectris Stream V1 ("legacy"): JSON and binary parts. A pure decoder.

Shapes are [columns, rows] here. There are no channels; what is sent is the lower threshold. The times of images are
nanoseconds on a clock of the detector that has no known zero.

Source: DECTRIS, SIMPLON API reference 1.8, "Stream"; recorded messages of an EIGER1 1M. `lz4<` without bitshuffle is
one bare LZ4 block ("without any additional data like block size").
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from stream.errors import DecodeError
from stream.ingest.dectris_messages import (
    Codec,
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
from stream.wire import MAX_HEADER_BYTES, Buffer

CHANNEL = "threshold_1"

_DTYPES = {"uint8": "|u1", "uint16": "<u2", "uint32": "<u4"}
_Shape = Annotated[tuple[int, int], Field(strict=False)]


class _Header(Fields):
    htype: Literal["dheader-1.0"]
    series: Count


class _Image(Fields):
    htype: Literal["dimage-1.0"]
    series: Count
    frame: Count


class _End(Fields):
    htype: Literal["dseries_end-1.0"]
    series: Count


_First = Annotated[_Header | _Image | _End, Field(discriminator="htype")]
_FIRST: TypeAdapter[_Header | _Image | _End] = TypeAdapter(_First)


class _Configuration(Fields):
    nimages: Planned
    ntrigger: Planned = 1
    frame_time: Seconds
    count_time: Seconds
    pixel_mask_applied: bool = True
    data_collection_date: str | None = None
    description: str | None = None
    photon_energy: Any = None
    detector_distance: Any = None
    beam_center_x: Any = None
    beam_center_y: Any = None
    x_pixel_size: Any = None
    y_pixel_size: Any = None


class _Array(Fields):
    htype: Literal["dflatfield-1.0", "dpixelmask-1.0", "dcountrate_table-1.0"]
    shape: _Shape
    type: str


class _Data(Fields):
    htype: Literal["dimage_d-1.0"]
    shape: _Shape
    type: Literal["uint8", "uint16", "uint32"]
    encoding: str
    size: Count


class _Exposure(Fields):
    htype: Literal["dconfig-1.0"]
    start_time: Count


def decode(parts: Sequence[Buffer]) -> Start | Image | End:
    """Read one multipart message.

    Raises
    ------
    DecodeError
        Names what is wrong and its value.
    """
    first = validate(_FIRST.validate_json, _json(parts[0]), "dheader, dimage or dseries_end")
    run = f"series-{first.series}"
    match first:
        case _Header():
            return _start(run, first.series, parts)
        case _Image():
            return _image(run, first.frame, parts)
        case _End():
            return End(run=run)


def _start(run: str, series: int, parts: Sequence[Buffer]) -> Start:
    if len(parts) < 2:
        raise DecodeError(f"dheader of {run} has no configuration: set the detector's stream header_detail to all")
    detector = validate(_Configuration.model_validate_json, _json(parts[1]), f"dheader of {run}")
    mask, appendix = _extras(parts[2:])
    n_frames = detector.nimages * detector.ntrigger
    return Start(
        run=run,
        n_frames=n_frames,
        frame_time=detector.frame_time,
        count_time=detector.count_time,
        armed_ns=_nanoseconds(detector.data_collection_date),
        masks={} if mask is None or detector.pixel_mask_applied else {CHANNEL: mask},
        metadata=metadata(
            {
                "series_id": series,
                "start_time": detector.data_collection_date or None,
                "detector": detector.description,
                "incident_energy": kilo(detector.photon_energy),  # eV
                "detector_distance": detector.detector_distance,
                "beam_center_x": detector.beam_center_x,
                "beam_center_y": detector.beam_center_y,
                "x_pixel_size": detector.x_pixel_size,
                "y_pixel_size": detector.y_pixel_size,
            },
            appendix,
            n_frames=n_frames,
        ),
    )


def _extras(parts: Sequence[Buffer]) -> tuple[NDArray[np.bool_] | None, str | None]:
    """Read what header_detail = all adds, pairs of description and bytes, and the appendix, one part of any text."""
    mask = None
    for described, content in zip(parts[::2], parts[1::2], strict=False):
        array = validate(_Array.model_validate_json, _json(described), "dheader")
        if array.htype == "dpixelmask-1.0":
            if array.type not in _DTYPES:
                raise DecodeError(f"dpixelmask: type {array.type!r:.80} is not one of {', '.join(_DTYPES)}")
            columns, rows = array.shape
            values = Pixels(shape=(rows, columns), dtype=_DTYPES[array.type], codec="none", data=_bytes(content))
            mask = values.decompress() != 0
    appendix = str(_json(parts[-1]), errors="replace") if len(parts) % 2 else None
    return mask, appendix


def _image(run: str, number: int, parts: Sequence[Buffer]) -> Image:
    if len(parts) not in (4, 5):
        raise DecodeError(f"dimage {number} of {run} has {len(parts)} parts, not 4, or 5 with an appendix")
    where = f"dimage {number} of {run}"
    image = validate(_Data.model_validate_json, _json(parts[1]), where)
    exposure = validate(_Exposure.model_validate_json, _json(parts[3]), where)
    data = _bytes(parts[2])
    if len(data) != image.size:
        raise DecodeError(f"{where}: {len(data)} bytes came, size = {image.size}")
    dtype = _DTYPES[image.type]
    codecs: dict[str, Codec] = {
        "<": "none",
        "lz4<": "lz4 block",
        f"bs{8 * np.dtype(dtype).itemsize}-lz4<": "bslz4",
    }
    if image.encoding not in codecs:
        raise DecodeError(f"{where}: encoding {image.encoding!r:.80} of {image.type} is not one of {', '.join(codecs)}")
    columns, rows = image.shape
    return Image(
        run=run,
        number=number,
        start_ns=exposure.start_time,
        clock_ns=None,
        channels={CHANNEL: Pixels(shape=(rows, columns), dtype=dtype, codec=codecs[image.encoding], data=data)},
    )


def _json(part: Buffer) -> bytes:
    if memoryview(part).nbytes > MAX_HEADER_BYTES:
        raise DecodeError(f"{memoryview(part).nbytes} bytes of JSON, more than {MAX_HEADER_BYTES}")
    return bytes(part)


def _bytes(part: Buffer) -> bytes | memoryview:
    return part if isinstance(part, bytes) else memoryview(part).cast("B")


def _nanoseconds(date: str | None) -> int | None:
    """Read ISO 8601; a date without an offset is the local time, as old firmware sends it."""
    try:
        return None if date is None else round(datetime.fromisoformat(date).timestamp() * 1e6) * 1000
    except (ValueError, OverflowError):
        return None
