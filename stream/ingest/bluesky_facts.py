"""What Bluesky's documents say of a run in the words of a `stream.messages.RunStart`, and the two put together."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from stream.ingest.nexus import KEV_ANGSTROM, UNITS
from stream.messages import RunStart
from stream.wire import MAX_SECONDS, check_start, shown

_log = logging.getLogger(__name__)

ROUNDING = 1e-4
"""By how much, relatively, two may state a number differently and mean the same: as a PV shows it."""

NUMBERS = (
    ("frame_time", "s", "frame_time", "s"),  # EIGER by FastCS; CHX
    ("frame_time", "s", "acquire_period", "s"),  # areaDetector by ophyd and ophyd-async; APS 8-ID; CHX
    ("count_time", "s", "count_time", "s"),
    ("count_time", "s", "acquire_time", "s"),
    ("count_time", "s", "exposure_time", "s"),
    ("incident_energy", "keV", "incident_energy", "keV"),
    ("incident_energy", "keV", "photon_energy", "eV"),  # EIGER
    ("incident_energy", "keV", "energy", "keV"),  # APS 8-ID
    ("incident_wavelength", "angstrom", "incident_wavelength", "angstrom"),  # CHX
    ("incident_wavelength", "angstrom", "wavelength", "angstrom"),
    ("detector_distance", "m", "detector_distance", "m"),
    ("beam_center_x", "pixel", "beam_center_x", "pixel"),
    ("beam_center_y", "pixel", "beam_center_y", "pixel"),
    ("x_pixel_size", "m", "x_pixel_size", "m"),
    ("y_pixel_size", "m", "y_pixel_size", "m"),
)
"""Ours, our unit, what a key is called or ends with, and its unit where none is stated. The first that is found counts.

Keys of a descriptor's configuration have the names of their devices before them (``eiger4m_cam_acquire_period``,
``det-driver-acquire_period``); those of a start document stand alone (``acquire_period``, ``acquire period``).
"""

OTHERS = (
    ("scan_id", "scan_id"),
    ("scan_number", "scan_id"),
    ("sample", "sample"),
    ("sample", "sample_name"),
    ("data_session", "data_session"),
    ("data_groups", "data_groups"),
    ("tiled_access_tags", "tiled_access_tags"),
    ("owner", "owner"),
    ("group", "group"),
    ("project", "project"),
    ("proposal", "proposal"),
    ("plan_name", "plan_name"),
    ("qmap", "qmap"),
    ("qmap", "qmap_file"),
    ("mask", "mask"),
    ("mask", "mask_file"),
)
"""Ours, and what the start document calls it; taken as it is."""

SPELLINGS = {
    "sec": "s",
    "second": "s",
    "seconds": "s",
    "µs": "us",
    "µm": "um",
    "micron": "um",
    "microns": "um",
    "meter": "m",
    "meters": "m",
    "kev": "keV",
    "ev": "eV",
    "a": "angstrom",
    "å": "angstrom",
    "angstroms": "angstrom",
    "px": "pixel",
}
"""Of units, in lower case, beside those of `stream.ingest.nexus.UNITS`."""

_TIMES = ("frame_time", "count_time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the documents of one run say."""

    run: str
    """The uid of its start."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Of `NUMBERS`, in our units."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Of `OTHERS`, and ``start_time``."""
    has_detectors: bool = False
    """Whether its start names any."""

    @property
    def metadata(self) -> dict[str, Any]:
        """What goes into `RunStart.metadata`."""
        numbers = {name: n for name, n in self.numbers.items() if name not in (*_TIMES, "incident_wavelength")}
        if (wavelength := self.numbers.get("incident_wavelength")) is not None:
            numbers.setdefault("incident_energy", KEV_ANGSTROM / wavelength)
        return {**self.others, **numbers}


def of_start(run: str, document: Mapping[str, Any]) -> Facts:
    """Return what a start document says."""
    stated = {str(key).replace(" ", "_"): value for key, value in document.items()}
    others: dict[str, Any] = {}
    for name, key in OTHERS:
        if name not in others and key in stated and _is_plain(run, key, stated[key]):
            others[name] = stated[key]
    time = document.get("time")
    if isinstance(time, int | float) and 0 <= time < 4 * MAX_SECONDS:
        others["start_time"] = datetime.fromtimestamp(time, UTC).isoformat()
    numbers, detectors = dict(_numbers(run, stated, None)), document.get("detectors")
    return Facts(
        run=run, numbers=numbers, others=others, has_detectors=isinstance(detectors, list | tuple) and bool(detectors)
    )


def with_configuration(facts: Facts, configuration: Mapping[str, Any]) -> Facts:
    """Return what is known once a device's configuration was described, which counts more than the start document."""
    data, keys = configuration.get("data"), configuration.get("data_keys")
    if not isinstance(data, Mapping):
        return facts
    keys = keys if isinstance(keys, Mapping) else {}
    units = {name: key.get("units") for name, key in keys.items() if isinstance(key, Mapping)}
    found = dict(_numbers(facts.run, data, units))
    return replace(facts, numbers={**facts.numbers, **found})


def merged(start: RunStart, facts: Facts) -> RunStart:
    """Return the detector's start with what the documents know, and by the name of theirs.

    Where both state something, the detector's counts. Where they differ by more than rounding this is logged, and told
    in ``metadata["conflicts"]``.
    """
    conflicts = list(_conflicts(start, facts))
    for conflict in conflicts:
        _log.warning("run %s: %s; the detector's counts", facts.run, conflict)
    metadata = {**facts.metadata, **start.metadata}
    if conflicts:
        metadata["conflicts"] = "; ".join(conflicts)
    return replace(start, run=facts.run, metadata=metadata)


def _conflicts(start: RunStart, facts: Facts) -> Iterator[str]:
    detector = {**start.metadata, "frame_time": start.frame_time, "count_time": start.count_time}
    documents = {**facts.metadata, **{name: facts.numbers[name] for name in _TIMES if name in facts.numbers}}
    # Detector and run engine begin a run at times of their own.
    for name in sorted((detector.keys() & documents.keys()) - {"start_time"}):
        ours, theirs = detector[name], documents[name]
        if _is_number(ours) and _is_number(theirs):
            is_same = math.isclose(ours, theirs, rel_tol=ROUNDING)
        else:
            is_same = ours == theirs
        if not is_same:
            yield f"{name} is {shown(ours)} by the detector, {shown(theirs)} by the documents"


def _numbers(run: str, stated: Mapping[str, Any], units: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    """Yield what is found; `units` of the keys of a device, None of a start document."""
    found: set[str] = set()
    for name, unit, ending, default in NUMBERS:
        for key, value in stated.items():
            if name in found or not _ends(str(key), ending, alone=units is None):
                continue
            number = _number(value)
            stated_unit = (units or {}).get(key)
            scale = _scale(default if stated_unit in (None, "") else str(stated_unit), unit)
            if number is None or scale is None or (unit != "pixel" and number <= 0):
                _log.warning("run %s: %s = %s %s is left out", run, shown(key), shown(value), shown(stated_unit or ""))
                continue
            found.add(name)
            yield name, number * scale


def _ends(key: str, ending: str, *, alone: bool) -> bool:
    normal = key.lower().replace("-", "_").replace(".", "_")
    return normal == ending or (not alone and normal.endswith(f"_{ending}"))


def _scale(stated: str, unit: str) -> float | None:
    known = UNITS[unit]
    return known.get(stated, known.get(SPELLINGS.get(stated.lower(), "")))


def _number(value: Any) -> float | None:
    if isinstance(value, np.ndarray | np.generic | list) and np.size(value) == 1:
        value = np.ravel(np.asarray(value)).tolist()[0]
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_plain(run: str, key: str, value: Any) -> bool:
    """Tell whether our wire takes it."""
    try:
        check_start(
            RunStart(run="r", shape=(1, 1), dtype="|u1", frame_time=1.0, count_time=1.0, metadata={"value": value})
        )
    except ValueError:
        _log.warning("run %s: %s = %s is left out", run, key, shown(value))
        return False
    return True
