"""Dectris Stream V2 messages, one CBOR map each, header_detail = basic with user data. Pure encoders.

Source: https://github.com/dectris/documentation, stream_v2 and cbor/dectris-compression-tag.md.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import cbor2
import numpy as np
from cbor2 import CBORTag

from stream.messages import RunStart
from stream.sinks.dectris_image import CompressedImage, planned, saturation
from stream.wire import Buffer

CHANNEL = "threshold_1"

_SELF_DESCRIBED = 55799  # detectors put it before every message
_MULTI_DIMENSIONAL = 40
_COMPRESSED = 56500
_TYPED_ARRAY = {"|u1": 64, "<u2": 69, "<u4": 70}
_NS = 10**9


def encode_start(start: RunStart, *, series: int) -> list[Buffer]:
    """Say that the detector was armed; `start.metadata` goes into the user data.

    Parameters
    ----------
    start
        With plain metadata; its ``start_time``, if there, is ISO 8601.
    series
        Number of the series; images name it and the run.

    Raises
    ------
    ValueError, TypeError
        The metadata has no number of frames, or something that CBOR does not know.
    """
    told = start.metadata
    rows, columns = start.shape
    energy = 1000.0 * told.get("incident_energy", 0.0)  # eV
    fields = {
        "type": "start",
        "series_id": series,
        "series_unique_id": start.run,
        "arm_date": datetime.fromisoformat(told["start_time"]).astimezone()
        if "start_time" in told
        else datetime.now(UTC),
        "beam_center_x": told.get("beam_center_x", 0.0),
        "beam_center_y": told.get("beam_center_y", 0.0),
        "channels": [CHANNEL],
        "count_time": start.count_time,
        "countrate_correction_enabled": False,
        "detector_description": told.get("detector", "xpcs-stream"),
        "detector_serial_number": "",
        "detector_translation": [0.0, 0.0, told.get("detector_distance", 0.0)],
        "flatfield_enabled": False,
        "frame_time": start.frame_time,
        "goniometer": {},
        "image_size_x": columns,
        "image_size_y": rows,
        "incident_energy": energy,
        "incident_wavelength": 12398.419843320026 / energy if energy else 0.0,  # angstrom
        "number_of_images": planned(start),
        "pixel_mask_enabled": True,
        "pixel_size_x": told.get("x_pixel_size", 0.0),
        "pixel_size_y": told.get("y_pixel_size", 0.0),
        "saturation_value": saturation(start),
        "sensor_material": "Si",
        "sensor_thickness": 0.00045,
        "threshold_energy": {CHANNEL: energy / 2},
        "user_data": dict(told),
        "virtual_pixel_interpolation_enabled": False,
    }
    return _message(fields)


def encode_image(image: CompressedImage, *, run: str, series: int) -> list[Buffer]:
    """Say one image, in one channel."""
    series_us = image.series_ns // 1000  # dates are told to the microsecond; the times after it carry the rest
    start_ns = max(0, image.timestamp_ns - 1000 * series_us)
    exposure_ns = round(image.count_time * _NS)
    counts = (
        image.data
        if image.compression == "none"
        else CBORTag(_COMPRESSED, [image.compression, _element_size(image), image.data])
    )
    return _message(
        {
            "type": "image",
            "series_id": series,
            "series_unique_id": run,
            "image_id": image.number,
            "real_time": [exposure_ns, _NS],
            "series_date": datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=series_us),
            "start_time": [start_ns, _NS],
            "stop_time": [start_ns + exposure_ns, _NS],
            "data": {
                CHANNEL: CBORTag(_MULTI_DIMENSIONAL, [[*image.shape], CBORTag(_TYPED_ARRAY[image.dtype], counts)])
            },
        }
    )


def encode_end(*, run: str, series: int) -> list[Buffer]:
    """Say that the detector was disarmed."""
    return _message({"type": "end", "series_id": series, "series_unique_id": run})


def _element_size(image: CompressedImage) -> int:
    return np.dtype(image.dtype).itemsize if image.compression == "bslz4" else 0


def _message(fields: dict[str, Any]) -> list[Buffer]:
    try:
        return [cbor2.dumps(CBORTag(_SELF_DESCRIBED, fields))]
    except cbor2.CBOREncodeError as error:
        raise ValueError(str(error)) from None
