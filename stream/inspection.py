"""What a stream or a file holds, in words and numbers for a table."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.ledger import Ledger
from stream.messages import Arrays, FrameBatch, Rejected, RunStart, RunStop
from stream.operators.roimap import RoiMap
from stream.protocols import Source

_log = logging.getLogger(__name__)

_COUNTS = ("sent", "received", "lost", "late", "duplicate", "undecodable", "stray")

_UNITS = {
    "incident_energy": "keV",
    "detector_distance": "m",
    "x_pixel_size": "m",
    "y_pixel_size": "m",
    "beam_center_x": "pixel",
    "beam_center_y": "pixel",
}

Facts = Mapping[str, object]


def of_map(roimap: RoiMap) -> Facts:
    """Describe a roi map."""
    q = roimap.dynamic_q[np.isfinite(roimap.dynamic_q)]
    return {
        "shape": "{} x {}".format(*roimap.shape),
        "bins": f"{roimap.n_dynamic} dynamic, {roimap.n_static} static",
        "pixels inside": f"{np.count_nonzero(roimap.static_roi_map):,}",
        "q": f"{q.min():.4g} to {q.max():.4g} 1/angstrom" if len(q) else "not told",
        "digest": roimap.digest,
    }


def kind(path: Path) -> str:
    """Tell a "result", a "map" and "frames" apart.

    Raises
    ------
    ConfigError
        It is no HDF5 file.
    """
    with _opened(path) as file:
        if "xpcs/multitau/normalized_g2" in file:
            return "result"
        return "map" if "qmap" in file else "frames"


def of_result(path: Path) -> tuple[Facts, Mapping[str, NDArray[np.float64]]]:
    """Describe a result file, ours or boost_corr's, and return its tau, g2, g2_err and n_pairs (NaN if not told)."""
    with _opened(path) as file:
        multitau = file["xpcs/multitau"]
        g2 = {"g2": multitau["normalized_g2"][()], "g2_err": multitau["normalized_g2_err"][()]}
        facts: dict[str, object] = {}
        for name, dataset in {"run": "entry/entry_identifier", "frames": "xpcs/n_frames"}.items():
            if dataset in file:
                value = file[dataset][()]
                facts[name] = value.decode() if isinstance(value, bytes) else value
        if "xpcs/ledger" in file:
            counts = {name: int(file["xpcs/ledger"][name][()]) for name in _COUNTS}
            facts |= counts | ({"sent": "not told"} if counts["sent"] < 0 else {})
            facts |= how_frames_came({name: dataset[()] for name, dataset in file["xpcs/ledger"].items()})
        steps = [
            multitau[f"config/{name}"][()] for name in ("stride_frame", "avg_frame") if f"config/{name}" in multitau
        ]
        frame_time = file["entry/instrument/detector_1/frame_time"][()] * np.prod(steps)
        g2["tau"] = np.ravel(multitau["delay_list"][()]) * frame_time
        g2["n_pairs"] = multitau["n_pairs"][()] if "n_pairs" in multitau else np.full(len(g2["tau"]), np.nan)
    return facts, g2


def how_frames_came(ledger: Arrays) -> Facts:
    """Describe what a ledger says beside counts, where that is not as it should be."""
    facts: dict[str, object] = {}
    if plane := int(ledger.get("plane", 0)):
        facts["came by"] = ("stream", "stream and file", "file")[min(plane, 2)]
    for name in ("missing_regions", "repaired_regions"):
        if name in ledger and ledger[name].size:
            facts[name.replace("_", " ")] = ", ".join(map(str, ledger[name].tolist()))
    if late := int(ledger.get("from_file", 0)):
        facts["late, from the file"] = late
    return facts


def of_frames(source: Source, stop: threading.Event, limit: int) -> Facts:
    """Look at frames until the run ends, `limit` of them came, or `stop` is set.

    Raises
    ------
    ConfigError
        No run began.
    """
    start: RunStart | None = None
    end: RunStop | None = None
    ledger = Ledger()
    for message in source:
        match message:
            case RunStart() if start is None:
                start = message
                total, masked = np.zeros(start.shape), np.ones(start.shape, np.bool_)
                largest = np.iinfo(start.dtype).max if start.saturation_value is None else start.saturation_value
            case FrameBatch() if start is not None and message.run == start.run:
                ledger.admit(message.first, len(message.frames))
                for frame in message.unpacked:
                    saturated = frame > largest
                    masked &= saturated
                    total += np.where(saturated, 0, frame)
            case RunStop() if start is not None and message.run == start.run:
                ledger.close(message.n_frames)
                end = message
            case Rejected():
                ledger.undecodable += 1
                _log.warning("%s", message.reason)
        if stop.is_set() or end is not None or ledger.received >= limit:
            break
    if start is None:
        raise ConfigError("no run began there")
    facts = dict(_of_start(start))
    facts |= {
        "frames looked at": ledger.received,
        "lost": ledger.lost,
        "undecodable": ledger.undecodable,
        "end": end.exit_status if end else "not seen",
    }
    if ledger.received:
        good = np.count_nonzero(~masked)
        facts["masked pixels"] = f"{masked.size - good:,}"
        facts["mean counts"] = f"{total.sum() / max(good * ledger.received, 1):.4g} per pixel and frame"
    return facts


def _of_start(start: RunStart) -> Facts:
    known: dict[str, Any] = dict(start.metadata)
    truth = known.pop("truth", None)
    return {
        "run": start.run,
        "shape": "{} x {}".format(*start.shape),
        "dtype": start.dtype,
        "saturation value": start.saturation_value,
        "frame time": f"{start.frame_time:g} s",
        "count time": f"{start.count_time:g} s",
        **{name.replace("_", " "): f"{value} {_UNITS.get(name, '')}" for name, value in known.items()},
        **({"simulated with": truth} if truth else {}),
    }


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from error
