"""The result file: at once a valid NXxpcs and what pyXpcsViewer and pySimpleMask open.

::

    /entry                      NXxpcs (contributed definition of nexusformat 2.1.0)
        data                    g2, g2_derr, G2_unnormalized, delay_difference: the arrays of /xpcs, linked
            frame_average       (rows, columns) of the whole detector, NaN where nothing was measured
            v_dim0, v_dim1      (n_dynamic,) where the bins lie, e.g. q and phi
        twotime                 two_time_corr_func, g2_from_two_time_corr_func, ..._partials: those of /xpcs/twotime
        instrument              incident_beam, detector_1
    /xpcs                       as boost_corr writes it and pyXpcsViewer 1.2.2 reads it
        qmap                    the map of pixels to bins, attributes hash and version
        multitau                normalized_g2, normalized_g2_err, delay_list; tau, n_pairs, G2, IP, IF
                                normalized_g2_partial, ..._partial_err (n_segment, n_delay, n_dynamic): of successive
                                parts of the run, NaN at delays as long as a part; ..._partial_labels, segment_stop
                                where they begin and end; n_pairs_segments: see `stream.operators.stability`
        twotime                 if it was computed: of the whole run, at the resolution at which it was kept
            correlation_map     c2_00001, ...: upper half; NaN where frames are lost. Times are of config/avg_frame
                                frames, by which pyXpcsViewer 1.2.2 does not multiply those at its axes
            normalized_g2, normalized_g2_segments, processed_bins, config, ...: see `stream.operators.twotime`
            finer               c2 of the newest frames at finer resolutions
        temporal_mean           scattering_2d, scattering_1d, scattering_1d_segments; segment_start, v_dim0, v_dim1
        spatial_mean            intensity_vs_time; frame, intensity
        ledger                  frames sent, received, lost, ...; of merged results also how their frames came:
                                missing_regions, repaired_regions (from a file), from_file (frames that came late, by a
                                file only), plane (0 stream, 1 stream and file, 2 file), awaits_file
        configuration, metadata what the run was told: text and JSON
        <operator>              the arrays of any other operator

What the viewers need and the run did not say is taken from the map (energy, beam centre, distance, pixel size;
attribute ``source``), from the clock when the run was announced (start_time), or is NaN (energy); an unknown
scan_number is -1.
"""

import json
import logging
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from stream.errors import SinkError
from stream.messages import Arrays, Result, RunStart, RunStop

logger = logging.getLogger(__name__)

_QMAP = (
    *("mask", "dynamic_roi_map", "static_roi_map", "map_names", "map_units"),
    *("dynamic_v_list_dim0", "dynamic_v_list_dim1", "dynamic_num_pts", "dynamic_index_mapping"),
    *("static_v_list_dim0", "static_v_list_dim1", "static_num_pts", "static_index_mapping"),
    *("beam_center_x", "beam_center_y", "detector_distance", "pixel_size"),
)
"""What pyXpcsViewer cannot load a file without."""

_SEGMENTS = {
    "g2_segments": "normalized_g2_partial",
    "g2_err_segments": "normalized_g2_partial_err",
    "n_pairs_segments": "n_pairs_segments",
    "segment_start": "normalized_g2_partial_labels",
    "segment_stop": "segment_stop",
}
"""Arrays of a result, and what the viewer calls them, of which segments go by their first frame."""

_LONGEST_PER_FRAME = 2**22
"""Frames up to which intensity_vs_time has one value per frame, as pyXpcsViewer takes it: 64 MB before compression."""


def lacking(qmap: Mapping[str, Any]) -> list[str]:
    """Return the names that pyXpcsViewer needs and the map does not have."""
    names = [name for name in _QMAP if name not in qmap]
    return names if "hash" in qmap.get("attributes", {}) else [*names, "attributes: hash"]


def file_image(
    start: RunStart,
    stop: RunStop,
    results: Mapping[str, Result],
    *,
    qmap: Mapping[str, Any],
    configuration: str,
    announced: datetime,
    date: datetime,
) -> bytes:
    """Return the bytes of the file: it is made in memory, so that only plain writes can fail on a full disk.

    Parameters
    ----------
    start, stop
        The run.
    results
        Its results by operator.
    qmap, configuration
        What stands under /xpcs/qmap, and the text under /xpcs/configuration; see `stream.sinks.hdf5.Hdf5Sink`.
    announced, date
        When `start` came, and now.

    Raises
    ------
    SinkError
        The detector or a result does not fit the map, or a result lacks an array.
    """
    with h5py.File("result", "w", driver="core", backing_store=False) as file:
        file.attrs["default"] = "entry"
        entry = _group(file, "entry", "NXentry", default="data")
        xpcs = _group(file, "xpcs", "NXprocess")
        _process(xpcs, start, stop, configuration, date)
        _qmap(xpcs, qmap)
        _multitau(xpcs, results.get("multitau"), len(qmap["dynamic_index_mapping"]), start.frame_time)
        _twotime(xpcs, results.get("twotime"), len(qmap["dynamic_index_mapping"]))
        _temporal_mean(xpcs, start, results.get("scattering"), qmap)
        _spatial_mean(xpcs, results.get("intensity"))
        for name, result in results.items():
            if name not in ("multitau", "twotime", "scattering", "intensity"):
                _verbatim(xpcs, result)
        _entry(entry, start, announced)
        _instrument(entry, start, qmap)
        _data(entry, xpcs, qmap)
        if "twotime" in xpcs:
            _twotime_data(entry, xpcs["twotime"], start.frame_time)
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def _process(xpcs: h5py.Group, start: RunStart, stop: RunStop, configuration: str, date: datetime) -> None:
    try:
        version = metadata.version("xpcs-stream")
    except metadata.PackageNotFoundError:
        version = "unknown"
    _put(xpcs, "program", "xpcs-stream")
    _put(xpcs, "version", version)
    _put(xpcs, "date", date.isoformat())
    _put(xpcs, "configuration", configuration)
    _put(xpcs, "metadata", _json(start))
    _put(xpcs, "n_frames", stop.n_frames)
    _put(xpcs, "exit_status", stop.exit_status)


def _qmap(xpcs: h5py.Group, qmap: Mapping[str, Any]) -> None:
    group = xpcs.create_group("qmap")
    group.attrs.update(qmap["attributes"])
    for name, value in qmap.items():
        if name in ("map_names", "map_units"):
            group.create_dataset(name, data=list(value), dtype=h5py.string_dtype())
        elif name != "attributes":
            _put(group, name, value if isinstance(value, str) else np.asarray(value))


def _multitau(xpcs: h5py.Group, result: Result | None, n_dynamic: int, frame_time: float) -> None:
    group = xpcs.create_group("multitau")
    _put(group, "config/stride_frame", 1)
    _put(group, "config/avg_frame", 1)
    if result is not None:
        arrays = _arrays(result, "delay", "tau", "g2", "g2_err", "n_pairs", "G2", "IP", "IF")
        _fits(result.run, "result 'multitau': g2", arrays["g2"].shape[1:], (n_dynamic,))
    else:
        per_bin, per_delay = np.empty((0, n_dynamic)), np.empty(0)
        arrays = {"delay": per_delay, "tau": per_delay, "g2": per_bin, "g2_err": per_bin, "n_pairs": per_delay}
    segments = {name: arrays.pop(name) for name in _SEGMENTS if name in arrays}
    if len(arrays["delay"]) < 2:
        segments, arrays = {}, _two_delays(arrays, frame_time)
    known = np.isfinite(arrays["g2"]).any(axis=1)
    if known.sum() < 2:
        known[:2] = True
    # One NaN fails the viewer's fit of that bin, so delays without any pair are left out.
    table = {name: array[known] for name, array in arrays.items()}
    _put(group, "delay_list", table.pop("delay"), units="frames", storage_mode="one_array")
    _put(group, "normalized_g2", table.pop("g2"), long_name="g2", units="", storage_mode="one_array")
    _put(group, "normalized_g2_err", table.pop("g2_err"), units="", storage_mode="one_array")
    _put(group, "tau", table.pop("tau"), units="s")
    for name, array in table.items():
        _put(group, name, array)
    if "G2" in group:
        group["G2"].attrs["storage_mode"] = "other"  # one column per static bin
    if len(segments) == len(_SEGMENTS) and segments["segment_start"].size:
        for name, of in _SEGMENTS.items():
            array = segments[name]
            _put(group, of, array[:, known] if array.ndim > 1 else array)


def _two_delays(arrays: Arrays, frame_time: float) -> dict[str, NDArray[Any]]:
    """Return the results at delays 1 and 2, NaN where there are none: the viewer cannot read arrays of shape (1, 1)."""
    padded = {}
    for name, array in arrays.items():
        padded[name] = np.full((2, *array.shape[1:]), np.nan)
        padded[name][: len(array)] = array
    delay = np.array([1, 2])
    return padded | {"delay": delay, "tau": delay * frame_time, "n_pairs": np.nan_to_num(padded["n_pairs"])}


def _twotime(xpcs: h5py.Group, result: Result | None, n_dynamic: int) -> None:
    if result is None:
        return
    arrays = _arrays(
        result, "bins", "avg_frame", "first", "n_times", "n_came", "c2", "delay", "tau", "g2", "g2_segments"
    )
    bins, n_level = arrays["bins"], len(arrays["avg_frame"])
    if not n_level or arrays["n_times"][-1] < 2:
        return  # there is nothing to correlate
    n = int(arrays["n_times"][-1])
    _fits(result.run, "result 'twotime': g2", arrays["g2"].shape, (n, len(bins)))
    if len(bins) and bins.max() > n_dynamic:
        raise SinkError(
            f"run {result.run}: result 'twotime': bin {bins.max()} is not in the map, which has {n_dynamic}"
        )
    group = xpcs.create_group("twotime")
    _put(group, "config/stride_frame", 1)
    _put(group, "config/avg_frame", int(arrays["avg_frame"][-1]))
    _put(group, "processed_bins", bins)
    c2 = np.triu(arrays["c2"]).astype(np.float32)
    for i in range(len(bins)):
        _put(group, f"correlation_map/c2_{i + 1:05d}", c2[-1, i, :n, :n])
    q_last = {"storage_mode": "one_array_q_last", "baseline_reference": 1}
    _put(group, "normalized_g2", arrays["g2"], first_point_for_fit=0, **q_last)
    _put(group, "normalized_g2_segments", arrays["g2_segments"])
    _put(group, "delay", arrays["delay"], units="frames")
    _put(group, "tau", arrays["tau"], units="s")
    _put(group, "first", int(arrays["first"][-1]), units="frames")
    _put(group, "n_came", arrays["n_came"][-1, :n], units="frames")
    if n_level > 1:
        _put(group, "finer/c2", c2[:-1])
        for name in ("avg_frame", "first", "n_came"):
            _put(group, f"finer/{name}", arrays[name][:-1], units="frames")


def _twotime_data(entry: h5py.Group, twotime: h5py.Group, frame_time: float) -> None:
    data = _group(entry, "twotime", "NXdata", signal="two_time_corr_func", axes=["processed_bins", "t1", "t2"])
    data["processed_bins"] = twotime["processed_bins"]
    avg_frame, n = twotime["config/avg_frame"][()], len(twotime["n_came"])
    _put(data, "t1", (twotime["first"][()] + avg_frame * np.arange(n)) * frame_time, units="s")
    data["t2"] = data["t1"]
    maps = twotime["correlation_map"]
    layout = h5py.VirtualLayout((len(maps), n, n), np.float32)
    for i, name in enumerate(sorted(maps)):
        layout[i] = h5py.VirtualSource(".", f"{maps.name}/{name}", (n, n))
    data.create_virtual_dataset("two_time_corr_func", layout, np.nan).attrs.update(
        storage_mode="one_array_q_first",
        baseline_reference=1,
        time_origin_location="upper_left",
        populated_elements="upper_half",
    )
    data["g2_from_two_time_corr_func"] = twotime["normalized_g2"]
    partials = np.moveaxis(twotime["normalized_g2_segments"][()], 1, 2)
    _put(data, "g2_from_two_time_corr_func_partials", partials, storage_mode="one_array", baseline_reference=1)


def _temporal_mean(xpcs: h5py.Group, start: RunStart, result: Result | None, qmap: Mapping[str, Any]) -> None:
    group = xpcs.create_group("temporal_mean")
    n_static = len(qmap["static_index_mapping"])
    detector_shape = start.detector_shape or start.shape
    _fits(start.run, "detector", detector_shape, np.shape(qmap["mask"]))
    whole = np.full(detector_shape, np.nan)
    mean, segments, segment_start = np.full(n_static, np.nan), np.full((1, n_static), np.nan), np.zeros(1, np.int64)
    if result is not None:
        arrays = _arrays(result, "image", "origin", "scattering_1d", "scattering_1d_segments", "segment_start")
        image, (row, column) = arrays["image"], arrays["origin"]
        window = whole[row : row + image.shape[0], column : column + image.shape[1]]
        _fits(start.run, f"result 'scattering': image at row {row}, column {column}", image.shape, window.shape)
        window[:] = image
        mean = arrays["scattering_1d"]
        _fits(start.run, "result 'scattering': scattering_1d", mean.shape, (n_static,))
        if len(arrays["scattering_1d_segments"]):
            segments, segment_start = arrays["scattering_1d_segments"], arrays["segment_start"]
    # The viewer takes percentiles of this image: no NaN. Which pixels were measured stands in frame_average.
    _put(group, "scattering_2d", np.nan_to_num(whole)[np.newaxis])
    _put(group, "frame_average", whole, long_name="counts per pixel and frame", units="counts")
    for name, rows in (("scattering_1d", mean[np.newaxis]), ("scattering_1d_segments", segments)):
        _put(group, name, rows.ravel() if rows.shape == (1, 1) else rows)  # the viewer cannot read (1, 1)
    _put(group, "segment_start", segment_start, units="frames")
    _put_bins(group, qmap, "static")


def _spatial_mean(xpcs: h5py.Group, result: Result | None) -> None:
    group = xpcs.create_group("spatial_mean")
    arrays = _arrays(result, "frame", "intensity") if result else {}
    if result is None or not arrays["frame"].size:
        _put(group, "intensity_vs_time", np.zeros((2, 2)))
        return
    frame, intensity = arrays["frame"], arrays["intensity"]
    _put(group, "frame", frame, units="frames")
    _put(group, "intensity", intensity, units="counts")
    _put(group, "intensity_vs_time", _per_frame(frame, intensity, result.n_frames))


def _per_frame(frame: NDArray[Any], intensity: NDArray[Any], n_frames: int) -> NDArray[np.float64]:
    """Return (2, n): frame and mean counts as pyXpcsViewer takes them.

    Its abscissa is the column, so every frame has the counts of its interval; a bad frame has 0.
    """
    counts = np.nan_to_num(intensity)
    n_frames = max(n_frames, int(frame[-1]) + 1)
    if n_frames > _LONGEST_PER_FRAME:
        return np.stack([frame, counts])
    every = np.arange(n_frames)
    interval = np.searchsorted(frame, every, side="right") - 1
    within = (interval >= 0) & (every - frame[interval] < np.diff(frame).min(initial=n_frames))
    return np.stack([every, np.where(within, counts[interval], 0.0)])


def _verbatim(xpcs: h5py.Group, result: Result) -> None:
    group = xpcs.create_group(result.operator)
    for name, array in result.arrays.items():
        _put(group, name, np.asarray(array))


def _entry(entry: h5py.Group, start: RunStart, announced: datetime) -> None:
    known = start.metadata
    _put(entry, "definition", "NXxpcs")
    _put(entry, "entry_identifier", start.run)
    with suppress(ValueError):
        _put(entry, "entry_identifier_uuid", str(uuid.UUID(start.run)))
    scan_number = known.get("scan_number")
    _put(entry, "scan_number", scan_number if isinstance(scan_number, int) and 0 <= scan_number < 2**63 else -1)
    try:
        datetime.fromisoformat(known.get("start_time", ""))
        _put(entry, "start_time", known["start_time"])
    except (TypeError, ValueError):
        _put(entry, "start_time", announced.isoformat(), source="clock of xpcs-stream when the run was announced")
    if isinstance(known.get("sample"), str):
        _put(_group(entry, "sample", "NXsample"), "name", known["sample"])


def _instrument(entry: h5py.Group, start: RunStart, qmap: Mapping[str, Any]) -> None:
    instrument = _group(entry, "instrument", "NXinstrument")
    beam = _group(instrument, "incident_beam", "NXbeam")
    detector = _group(instrument, "detector_1", "NXdetector")
    _put(detector, "frame_time", start.frame_time, units="s")
    _put(detector, "count_time", start.count_time, units="s")
    if isinstance(start.metadata.get("detector"), str):
        _put(detector, "description", start.metadata["detector"])
    for group, name, units, of_run, of_map in (
        (beam, "incident_energy", "keV", "incident_energy", "energy"),
        (detector, "distance", "m", "detector_distance", "detector_distance"),
        (detector, "beam_center_x", "pixel", "beam_center_x", "beam_center_x"),
        (detector, "beam_center_y", "pixel", "beam_center_y", "beam_center_y"),
        (detector, "x_pixel_size", "m", "x_pixel_size", "pixel_size"),
        (detector, "y_pixel_size", "m", "y_pixel_size", "pixel_size"),
    ):
        value: Any = start.metadata.get(of_run)
        known = isinstance(value, int | float) and abs(value) < 1e300
        if value is not None and not known:
            logger.warning("run %s: %s is %r, not a number; taken from the map", start.run, of_run, value)
        number = value if known else qmap.get(of_map, np.nan)
        _put(group, name, float(number), units=units, source="run" if known else "qmap")


def _data(entry: h5py.Group, xpcs: h5py.Group, qmap: Mapping[str, Any]) -> None:
    data = _group(entry, "data", "NXdata", signal="g2", axes=["tau", "."])
    data["g2"] = xpcs["multitau/normalized_g2"]
    data["g2_derr"] = xpcs["multitau/normalized_g2_err"]
    data["g2_errors"] = xpcs["multitau/normalized_g2_err"]  # the name NXdata plots error bars by
    data["delay_difference"] = xpcs["multitau/delay_list"]
    data["tau"] = xpcs["multitau/tau"]
    if "multitau/G2" in xpcs:
        data["G2_unnormalized"] = xpcs["multitau/G2"]
    data["frame_average"] = xpcs["temporal_mean/frame_average"]
    _put_bins(data, qmap, "dynamic")


def _put_bins(group: h5py.Group, qmap: Mapping[str, Any], which: str) -> None:
    """Put where the bins of the dynamic or static map lie, e.g. their q and phi."""
    natural = np.asarray(qmap[f"{which}_index_mapping"], dtype=np.int64)
    along = np.divmod(natural, int(qmap[f"{which}_num_pts"][1]))
    for dim, (name, unit) in enumerate(zip(qmap["map_names"], qmap["map_units"], strict=True)):
        values = np.asarray(qmap[f"{which}_v_list_dim{dim}"])[along[dim]]
        _put(group, f"v_dim{dim}", values, long_name=name, units=unit)


def _arrays(result: Result, *names: str) -> dict[str, NDArray[Any]]:
    missing = [name for name in names if name not in result.arrays]
    if missing:
        raise SinkError(f"run {result.run}: result {result.operator!r} lacks {', '.join(missing)}")
    return {name: np.asarray(array) for name, array in result.arrays.items()}


def _fits(run: str, what: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise SinkError(f"run {run}: {what}: {shape} does not fit the map's {expected}")


def _json(start: RunStart) -> str:
    try:
        told = {name: value for name, value in start.metadata.items() if name != "announced"}
        return json.dumps(told, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        logger.warning("run %s: metadata is not kept: %s", start.run, error)
        return "{}"


def _plain(value: object) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _group(parent: h5py.Group, name: str, nx_class: str, **attributes: Any) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs.update({"NX_class": nx_class, **attributes})
    return group


def _put(group: h5py.Group, name: str, value: Any, **attributes: Any) -> None:
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    large = isinstance(value, np.ndarray) and value.nbytes > 2**12
    filters = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if large else {}
    group.create_dataset(name, data=value, **filters).attrs.update(attributes)
