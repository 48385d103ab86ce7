"""Dectris Stream V1 ("legacy") messages, header_detail = basic with a header appendix. Pure encoders.

Shapes are [columns, rows] here. Source: DECTRIS, SIMPLON API reference 1.8, "Stream"; fields as an EIGER1 1M sent them.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from stream.messages import RunStart
from stream.sinks.dectris_image import CompressedImage, Compression, planned, saturation
from stream.wire import Buffer

_TYPES = {"|u1": "uint8", "<u2": "uint16", "<u4": "uint32"}


def encode_start(start: RunStart, *, series: int, compression: Compression) -> list[Buffer]:
    """Say that the detector was armed; `start.metadata` goes into the appendix.

    Parameters
    ----------
    start
        With metadata that JSON knows.
    series
        Number of the series: all that the images say of their run.
    compression
        Of the images that follow.

    Raises
    ------
    ValueError, TypeError
        The metadata has no number of frames, or something that JSON does not know.
    """
    told = start.metadata
    rows, columns = start.shape
    bits = 8 * np.dtype(start.dtype).itemsize
    energy = 1000.0 * told.get("incident_energy", 0.0)  # eV
    distance = told.get("detector_distance", 0.0)
    configuration = {
        "auto_summation": True,
        "beam_center_x": told.get("beam_center_x", 0.0),
        "beam_center_y": told.get("beam_center_y", 0.0),
        "bit_depth_image": bits,
        "bit_depth_readout": bits,
        "chi_increment": 0.0,
        "chi_start": 0.0,
        "compression": compression,
        "count_time": start.count_time,
        "countrate_correction_applied": False,
        "countrate_correction_count_cutoff": saturation(start),
        "data_collection_date": told.get("start_time", ""),
        "description": told.get("detector", "xpcs-stream"),
        "detector_distance": distance,
        "detector_number": "",
        "detector_readout_time": 0.0,
        "detector_translation": [0.0, 0.0, distance],
        "eiger_fw_version": "",
        "element": "",
        "flatfield_correction_applied": False,
        "frame_count_time": start.count_time,
        "frame_period": start.frame_time,
        "frame_time": start.frame_time,
        "kappa_increment": 0.0,
        "kappa_start": 0.0,
        "nimages": planned(start),
        "ntrigger": 1,
        "number_of_excluded_pixels": 0,
        "omega_increment": 0.0,
        "omega_start": 0.0,
        "phi_increment": 0.0,
        "phi_start": 0.0,
        "photon_energy": energy,
        "pixel_mask_applied": True,
        "roi_mode": "",
        "sensor_material": "Si",
        "sensor_thickness": 0.00045,
        "software_version": "1.8.0",
        "threshold_energy": energy / 2,
        "trigger_mode": "ints",
        "two_theta_increment": 0.0,
        "two_theta_start": 0.0,
        "virtual_pixel_correction_applied": False,
        "wavelength": 12398.419843320026 / energy if energy else 0.0,  # angstrom
        "x_pixel_size": told.get("x_pixel_size", 0.0),
        "x_pixels_in_detector": columns,
        "y_pixel_size": told.get("y_pixel_size", 0.0),
        "y_pixels_in_detector": rows,
    }
    header = {"htype": "dheader-1.0", "series": series, "header_detail": "basic"}
    return [_json(header), _json(configuration), _json(told)]


def encode_image(image: CompressedImage, *, series: int) -> list[Buffer]:
    """Say one image: what it is, its shape and type, its bytes, its times."""
    rows, columns = image.shape
    bits = 8 * np.dtype(image.dtype).itemsize
    exposure_ns = round(image.count_time * 1e9)
    start_ns = max(0, image.timestamp_ns - image.series_ns)
    encoding = {"bslz4": f"bs{bits}-lz4<", "lz4": "lz4<", "none": "<"}[image.compression]
    return [
        _json({"htype": "dimage-1.0", "series": series, "frame": image.number, "hash": _hash(image.data)}),
        _json(
            {
                "htype": "dimage_d-1.0",
                "shape": [columns, rows],
                "type": _TYPES[image.dtype],
                "encoding": encoding,
                "size": len(image.data),
            }
        ),
        image.data,
        _json(
            {
                "htype": "dconfig-1.0",
                "start_time": start_ns,
                "stop_time": start_ns + exposure_ns,
                "real_time": exposure_ns,
            }
        ),
    ]


def encode_end(*, series: int) -> list[Buffer]:
    """Say that the detector was disarmed."""
    return [_json({"htype": "dseries_end-1.0", "series": series})]


def _hash(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()  # receivers do not check it, but some want one


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(fields)).encode()
