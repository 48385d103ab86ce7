"""The documents of one derived Bluesky run: what is known of g2, live, of one run of a detector.

start
    ``original_run_uid`` is the uid of the raw run. Facts of it are copied from the metadata of our `RunStart`, if they
    are there and event_model takes them: ``scan_id`` (else ``scan_number``, else -1), ``sample``, ``data_session``,
    ``data_groups``, ``owner``, ``group``, ``project``, ``proposal``, ``tiled_access_tags``; ``plan_name`` as
    ``original_plan_name``.
stream "primary"
    One event per update, and a last one. Each holds all that is known, so that a late consumer needs only the newest.
    Arrays have one shape throughout; NaN is what is not known yet. ``xpcs_plane`` is the worst way that the run went:
    0 stream, 1 stream and file, 2 file. ``xpcs_frames_from_file`` came late, by the file only; ``xpcs_awaits_file`` is
    1 while the run has ended, and lost frames may yet come so.
stream "result"
    The result file, where one was written.
stop
    The exit status of the raw run, also as ``raw_exit_status``.

Uids follow from the raw run: the same documents made twice have the same uids.
"""

import json
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from event_model import DocumentNames, compose_run, schema_validators
from numpy.typing import NDArray

from stream.messages import Result, RunStart, RunStop
from stream.sinks import bluesky_result
from stream.sinks.bluesky_result import ORIGIN, Document, array_key
from stream.uncertainty import estimate
from stream.wire import shown

_log = logging.getLogger(__name__)

Delays = Callable[[int], NDArray[np.int64]]
"""Tells all delays (frames) that a result of so many frames has."""

_OURS = uuid.UUID("8e0a9a35-5c4b-5a0f-9d1e-0c8f2a7d3b61")
_ENDLESS = 2**62
"""Frames of a run that nobody planned."""

_FACTS = ("sample", "data_session", "data_groups", "owner", "group", "project", "proposal", "tiled_access_tags")

_SCALARS: Mapping[str, Mapping[str, Any]] = {
    "xpcs_frames": {"dtype": "integer"},
    "xpcs_frames_dropped": {"dtype": "integer"},
    "xpcs_frames_from_file": {"dtype": "integer"},
    "xpcs_plane": {"dtype": "integer"},
    "xpcs_awaits_file": {"dtype": "integer"},
    "xpcs_source_start": {"dtype": "integer"},
    "xpcs_source_stop": {"dtype": "integer"},
    "xpcs_lag": {"dtype": "number", "units": "s", "precision": 3},
    "xpcs_mean_intensity": {"dtype": "number", "units": "photon/pixel/frame", "precision": 5},
    "xpcs_contrast": {"dtype": "number", "units": "", "precision": 4},
    "xpcs_contrast_err": {"dtype": "number", "units": "", "precision": 4},
    "xpcs_relaxation_rate": {"dtype": "number", "units": "1/s", "precision": 3},
    "xpcs_relaxation_rate_err": {"dtype": "number", "units": "1/s", "precision": 3},
}


class DerivedRun:
    """Makes the documents of one run, with event_model. No I/O but the shapes in the result file.

    Parameters
    ----------
    start
        The run of the detector.
    qmap
        `stream.operators.roimap.RoiMap.arrays`: where the bins lie.
    delays
        Of the results.
    fitted
        Which dynamic bin contrast and relaxation rate are of, from 0.
    analysis
        What else is told of how the results are made.

    Attributes
    ----------
    uid
        Of its start. Other maps or other ways of analysis make other runs of the same frames.
    """

    def __init__(
        self,
        start: RunStart,
        *,
        qmap: Mapping[str, Any],
        delays: Delays,
        fitted: int,
        analysis: Mapping[str, Any],
    ) -> None:
        self._raw, self._qmap = start, qmap
        planned = delays(start.metadata.get("n_frames") or _ENDLESS)
        self._delays = planned if planned.size else delays(_ENDLESS)
        self._n_q, self._n_static = len(qmap["dynamic_index_mapping"]), len(qmap["static_index_mapping"])
        self._members = _static_bins(qmap, fitted)
        self._analysis = {"qmap": {"sha256": qmap["attributes"]["hash"]}, **analysis}
        # Of runs of one name the beginning is known, too, as in `stream.merger`.
        what = [start.run, start.metadata.get("start_time", ""), fitted, self._analysis]
        self.uid = str(uuid.uuid5(_OURS, json.dumps(what, sort_keys=True)))

    def opening(self, time: float) -> list[Document]:
        """Return what comes first: start and descriptor, of that time (s since the Unix epoch)."""
        self._run = compose_run(uid=self.uid, time=time, metadata=_about(self._raw, self._analysis))
        self._primary = self._run.compose_descriptor(
            name="primary",
            data_keys=self._data_keys(),
            hints={"xpcs": {"fields": ["xpcs_frames", "xpcs_contrast", "xpcs_relaxation_rate"]}},
            configuration={"xpcs": self._configuration(time)},
            object_keys={"xpcs": list(self._data_keys())},
            time=time,
            uid=self._uid_of("primary"),
        )
        return [("start", self._run.start_doc), ("descriptor", self._primary.descriptor_doc)]

    def event(self, results: Mapping[str, Result], seq_num: int, time: float) -> Document:
        """Return what is known, from results by operator with those of "multitau" among them."""
        data = self._data(results)
        event = self._primary.compose_event(
            data=data,
            timestamps=dict.fromkeys(data, time),
            seq_num=seq_num,
            uid=self._uid_of(f"event {seq_num}"),
            time=time,
        )
        return "event", event

    def result(self, file: Path, time: float) -> list[Document]:
        """Return what tells of the result file."""
        return bluesky_result.documents(file, self._run, self._uid_of, time)

    def stop(self, stop: RunStop, n_events: int, time: float) -> Document:
        """Return the end, after so many events."""
        self._run.compose_stop.event_counters["primary"] = n_events + 1
        reason = "" if stop.exit_status == "success" else f"{stop.exit_status} after {stop.n_frames} frames"
        document = self._run.compose_stop(
            exit_status=stop.exit_status, reason=reason, uid=self._uid_of("stop"), time=time
        )
        return "stop", {**document, "raw_exit_status": stop.exit_status}

    def _uid_of(self, what: str) -> str:
        return str(uuid.uuid5(uuid.UUID(self.uid), what))

    def _data_keys(self) -> dict[str, Any]:
        n_tau = len(self._delays)
        arrays = {
            "xpcs_g2": ((self._n_q, n_tau), ["q", "tau"], ""),
            "xpcs_g2_err": ((self._n_q, n_tau), ["q", "tau"], ""),
            "xpcs_n_pairs": ((n_tau,), ["tau"], ""),
            "xpcs_saxs_1d": ((self._n_static,), ["q_static"], "photon/pixel/frame"),
        }
        return {
            name: {"shape": [], "dtype_numpy": "<i8" if of["dtype"] == "integer" else "<f8", **ORIGIN, **of}
            for name, of in _SCALARS.items()
        } | {name: array_key(shape, dims, units) for name, (shape, dims, units) in arrays.items()}

    def _configuration(self, time: float) -> dict[str, Any]:
        tau = self._delays * self._raw.frame_time
        units = [str(unit) for unit in self._qmap["map_units"]]
        data = {
            "xpcs_tau": tau.tolist(),
            "xpcs_q": _bins(self._qmap, 0).tolist(),
            "xpcs_phi": _bins(self._qmap, 1).tolist(),
            "xpcs_frame_period": self._raw.frame_time,
        }
        data_keys = {
            "xpcs_tau": array_key(tau.shape, ["tau"], "s"),
            "xpcs_q": array_key((self._n_q,), ["q"], units[0]),
            "xpcs_phi": array_key((self._n_q,), ["q"], units[1]),
            "xpcs_frame_period": {"dtype": "number", "shape": [], "dtype_numpy": "<f8", "units": "s", **ORIGIN},
        }
        return {"data": data, "timestamps": dict.fromkeys(data, time), "data_keys": data_keys}

    def _data(self, results: Mapping[str, Result]) -> dict[str, Any]:
        multitau = results["multitau"]
        arrays = {name: result.arrays for name, result in results.items()}
        ledger, counts = arrays.get("ledger", {}), arrays.get("intensity", {}).get("intensity", np.empty(0))
        contrast, rate = (estimate(multitau.arrays, of, *self._members) for of in ("contrast", "rate"))
        nothing = np.full(self._n_static, np.nan)
        return {
            "xpcs_frames": multitau.n_frames,
            "xpcs_frames_dropped": int(ledger.get("lost", 0)),
            "xpcs_frames_from_file": int(ledger.get("from_file", 0)),
            "xpcs_plane": int(ledger.get("plane", 0)),
            "xpcs_awaits_file": int(ledger.get("awaits_file", 0)),
            "xpcs_source_start": 0,
            "xpcs_source_stop": multitau.n_frames,
            "xpcs_lag": float(ledger.get("lag", np.nan)),
            "xpcs_mean_intensity": float(counts.mean()) if counts.size else np.nan,
            "xpcs_contrast": contrast.value if contrast.fit.converged else np.nan,
            "xpcs_contrast_err": contrast.error,
            "xpcs_relaxation_rate": rate.value if rate.fit.converged else np.nan,
            "xpcs_relaxation_rate_err": rate.error,
            "xpcs_g2": self._by_delay(multitau, "g2"),
            "xpcs_g2_err": self._by_delay(multitau, "g2_err"),
            "xpcs_n_pairs": np.nan_to_num(self._by_delay(multitau, "n_pairs")),
            "xpcs_saxs_1d": np.array(arrays.get("scattering", {}).get("scattering_1d", nothing), np.float64),
        }

    def _by_delay(self, multitau: Result, name: str) -> NDArray[np.float64]:
        """Return an array of a result with delays last, at the delays of this run."""
        delay, values = multitau.arrays["delay"], np.asarray(multitau.arrays[name], np.float64).T
        known = np.full((*values.shape[:-1], len(self._delays)), np.nan)
        known[..., np.isin(self._delays, delay)] = values[..., np.isin(delay, self._delays)]
        return known


def _about(start: RunStart, analysis: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "original_run_uid": start.run,
        "plan_name": "xpcs_live",
        "plan_type": "generator",  # LiveTable ends with an error without it, and without scan_id
        "purpose": "analysis",
        "detectors": ["xpcs"],
        "motors": [],
        "hints": {"dimensions": [[["xpcs_frames"], "primary"]]},
        "analysis": {
            "algorithm": "multitau",
            "software": "xpcs-stream",
            "version": _version(),
            "normalization": "symmetric",
            "frame_period_s": start.frame_time,
            **analysis,
        },
        "tiled_specs": [{"name": "XPCSLiveResult", "version": "1.0"}],
        "scan_id": -1,
        **_facts(start),
    }


def _version() -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("xpcs-stream")
    return "unknown"


def _facts(start: RunStart) -> dict[str, Any]:
    told = start.metadata
    candidates = {name: told[name] for name in _FACTS if name in told}
    renamed = {"scan_number": "scan_id", "scan_id": "scan_id", "plan_name": "original_plan_name"}
    candidates |= {of: told[name] for name, of in renamed.items() if name in told}
    facts = {}
    for name, value in candidates.items():
        if schema_validators[DocumentNames.start].is_valid({"uid": "", "time": 0.0, name: value}):
            facts[name] = value
        else:
            _log.warning("run %s: event_model does not take %s = %s: left out", start.run, name, shown(value))
    return facts


def _bins(qmap: Mapping[str, Any], dim: int, kind: str = "dynamic") -> NDArray[np.float64]:
    """Return where the bins lie along one of the two axes of the map."""
    natural = np.asarray(qmap[f"{kind}_index_mapping"], np.int64)
    along = np.divmod(natural, int(qmap[f"{kind}_num_pts"][1]))[dim]
    return np.asarray(qmap[f"{kind}_v_list_dim{dim}"], np.float64)[along]


def _static_bins(qmap: Mapping[str, Any], dynamic: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the static bins of a dynamic one, all counted from 0, and their q."""
    inside = np.asarray(qmap["dynamic_roi_map"]) == dynamic + 1
    members = np.unique(np.asarray(qmap["static_roi_map"])[inside]).astype(np.int64) - 1
    return members, _bins(qmap, 0, "static")[members]
