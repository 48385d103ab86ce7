"""What a NeXus file, an EIGER master or an APS metadata file says of a detector: the fields of a `RunStart`."""

import logging
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, SourceError
from stream.messages import RunStart
from stream.wire import MAX_SECONDS, check_start

logger = logging.getLogger(__name__)

KEV_ANGSTROM = 12.398419843320026
"""h c (CODATA 2018)."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = timedelta(seconds=MAX_SECONDS * 4)
"""Well within 64 bits of ns."""

UNITS: dict[str, dict[str, float]] = {
    "s": {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "m": {"m": 1, "mm": 1e-3, "um": 1e-6},
    "keV": {"keV": 1, "eV": 1e-3},
    "angstrom": {"angstrom": 1, "nm": 10},
    "pixel": {"pixel": 1, "pixels": 1},
}
"""Our unit: what files state, and its size."""

NUMBERS = (
    ("frame_time", "s", "detector/frame_time", "s"),
    ("count_time", "s", "detector/count_time", "s"),
    ("detector_distance", "m", "detector/detector_distance", "m"),
    ("detector_distance", "m", "detector/distance", "m"),
    ("x_pixel_size", "m", "detector/x_pixel_size", "m"),
    ("y_pixel_size", "m", "detector/y_pixel_size", "m"),
    ("beam_center_x", "pixel", "detector/beam_center_x", "pixel"),
    ("beam_center_y", "pixel", "detector/beam_center_y", "pixel"),
    ("saturation_value", None, "detector/saturation_value", None),
    ("bit_depth_image", None, "detector/bit_depth_image", None),
    ("incident_energy", "keV", "beam/incident_energy", "keV"),
    ("incident_energy", "keV", "detector/detectorSpecific/photon_energy", "eV"),
    ("incident_wavelength", "angstrom", "beam/incident_wavelength", "angstrom"),
    ("scan_number", None, "entry/scan_number", None),
)
"""Name, our unit, place, and unit where the file states none. The first that is found counts."""

TEXTS = (
    ("entry_identifier", "entry/entry_identifier"),
    ("start_time", "entry/start_time"),
    ("start_time", "detector/detectorSpecific/data_collection_date"),
    ("sample", "entry/sample/name"),
    ("detector", "detector/description"),
)

METADATA = (
    "start_time",
    "incident_energy",
    "detector_distance",
    "beam_center_x",
    "beam_center_y",
    "x_pixel_size",
    "y_pixel_size",
    "sample",
    "scan_number",
    "detector",
)
"""What of the above goes into `RunStart.metadata`."""


def describe(file: h5py.File) -> dict[str, Any]:
    """Return what the file holds of `NUMBERS` and `TEXTS`, in our units, and "is_eiger" for one of an EIGER."""
    groups = _groups(file)
    found: dict[str, Any] = {}
    for name, unit, place, default in NUMBERS:
        if name not in found and (number := _number(groups, place, unit, default)) is not None:
            found[name] = number
    for name, place in TEXTS:
        if name not in found and (text := _text(groups, place)) is not None:
            found[name] = text
    if found.get("incident_wavelength", 0) > 0:
        found.setdefault("incident_energy", KEV_ANGSTROM / found["incident_wavelength"])
    if "detectorSpecific" in groups["detector"]:
        found["is_eiger"] = True
    return found


def run_start(
    path: Path,
    said: dict[str, Any],
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    n_frames: int,
    frame_time: float | None,
) -> RunStart:
    """Return the RunStart of a file.

    Parameters
    ----------
    path
        The file: its stem is the run's name if `said` has none.
    said
        What `describe` found.
    shape, dtype
        Of a frame: (rows, columns) and as stored, signed or not.
    frame_time
        Start to start of frames (s), and wins. None: as `said`.

    Raises
    ------
    ConfigError
        frame_time is not to be found, or not a time.
    SourceError
        What the file says is too long, or no number where one is meant.
    """
    if frame_time is None:
        frame_time = said.get("frame_time")
    if frame_time is None:
        raise ConfigError(f"{path} does not tell the frame time: give --frame-time (source.frame_time)")
    if not 0 < frame_time <= MAX_SECONDS:
        raise ConfigError(f"{path}: a frame time of {frame_time} s is none: give --frame-time (source.frame_time)")
    count_time = said.get("count_time", frame_time)
    if not 0 < count_time <= frame_time:
        logger.warning(
            "%s: count_time %g s is not within frame_time, %g s, which is taken", path, count_time, frame_time
        )
        count_time = frame_time
    start = RunStart(
        run=said.get("entry_identifier") or path.stem,
        shape=shape,
        dtype=np.dtype(f"<u{dtype.itemsize}").str,
        saturation_value=_saturation_value(said, dtype),
        frame_time=frame_time,
        count_time=count_time,
        metadata={"n_frames": n_frames} | {name: said[name] for name in METADATA if name in said},
    )
    try:
        check_start(start)
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None
    return start


def start_ns(path: Path, said: dict[str, Any]) -> int:
    """Return when frame 0 started (ns since the Unix epoch): the start_time of `said`, else the modification time."""
    start_time = said.get("start_time")
    if start_time is not None:
        try:
            since = datetime.fromisoformat(start_time).astimezone(UTC) - EPOCH
        except (ValueError, OverflowError):
            since = timedelta(-1)
        if timedelta(0) <= since < LATEST:
            return since // timedelta(microseconds=1) * 1000
        logger.warning("%s: start_time %.80r is no date since 1970; taking the modification time", path, start_time)
    return path.stat().st_mtime_ns


def masked_pixels(file: h5py.File, shape: tuple[int, int]) -> NDArray[np.intp]:
    """Return the flat indices of the pixels, of frames of `shape`, that an EIGER left to us to mask.

    One that does not say whether it applied its mask is taken not to have: to mask what is masked changes nothing.
    """
    none = np.empty(0, np.intp)
    groups = _groups(file)
    detector = groups["detector"]
    if "detectorSpecific" not in detector or _number(groups, "detector/pixel_mask_applied", None, None):
        return none
    mask = detector.get("pixel_mask") or detector.get("detectorSpecific/pixel_mask")
    if mask is None:
        return none
    if not isinstance(mask, h5py.Dataset) or mask.shape != shape or mask.dtype.kind not in "bui":
        logger.warning("%s: pixel mask %s does not fit frames %s: not applied", file.filename, mask, shape)
        return none
    return np.flatnonzero(mask[()])


def _saturation_value(said: dict[str, Any], dtype: np.dtype[Any]) -> int | None:
    """Return the largest value that is a count.

    EIGER marks masked and overflown pixels with the largest value of its image bit depth (DECTRIS, SIMPLON API). The
    saturation_value that it states is where its count-rate correction ends, a limit that its stream does not have.
    """
    largest = int(np.iinfo(dtype).max)
    unmarked = largest if dtype.kind == "i" else largest - 1
    if "is_eiger" in said:
        depth = said.get("bit_depth_image")
        return min(unmarked, 2**depth - 2) if depth in (8, 16, 32) else unmarked
    stated = said.get("saturation_value", 0)
    if 0 < stated < largest and stated == int(stated):
        return int(stated)
    return unmarked if dtype.kind == "i" or stated >= largest else None


def _groups(file: h5py.File) -> dict[str, Any]:
    """Return the groups that places in `NUMBERS` and `TEXTS` begin with; empty ones where the file has none."""
    entry = file.get("/entry")
    if not isinstance(entry, h5py.Group):
        return {"entry": {}, "detector": {}, "beam": {}}
    return {
        "entry": entry,
        "detector": _member(entry, "NXdetector", "detector", "detector_1"),
        "beam": _member(entry, "NXbeam", "incident_beam", "beam"),
    }


def _member(entry: h5py.Group, nx_class: str, *names: str) -> Any:
    """Return the first group of the instrument that is of the NeXus class, else has one of the names; else nothing."""
    instrument = entry.get("instrument")
    if not isinstance(instrument, h5py.Group):
        return {}
    members = {name: m for name in instrument if isinstance(m := instrument.get(name), h5py.Group)}
    classed = [m for m in members.values() if m.attrs.get("NX_class") in (nx_class, nx_class.encode())]
    return next(iter(classed + [members[name] for name in names if name in members]), {})


def _text(groups: dict[str, Any], place: str) -> str | None:
    value = _scalar(_field(groups, place))
    return value if isinstance(value, str) else None


def _number(groups: dict[str, Any], place: str, unit: str | None, default: str | None) -> Any:
    """Return a number in our unit; None, with a warning, if it is not finite or in a unit we do not know."""
    field = _field(groups, place)
    value = _scalar(field)
    if value is None:
        return None
    stated = str(_decode(field.attrs.get("units", default)))
    scale = UNITS[unit].get(stated) if unit else 1
    if not isinstance(value, int | float) or not math.isfinite(value) or scale is None:
        logger.warning("%s: %s is %s %s, which is left out", field.file.filename, field.name, value, stated)
        return None
    return value * scale


def _field(groups: dict[str, Any], place: str) -> Any:
    group, _, path = place.partition("/")
    field = groups[group].get(path)
    return field if isinstance(field, h5py.Dataset) and field.size == 1 else None


def _scalar(field: Any) -> Any:
    return None if field is None else _decode(np.ravel(field[()]).tolist()[0])


def _decode(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
