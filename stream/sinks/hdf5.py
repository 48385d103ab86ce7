"""The result file: at once a valid NXxpcs and what pyXpcsViewer and pySimpleMask open.

::

    /entry                      NXxpcs (contributed definition of nexusformat 2.1.0)
        data                    g2, g2_derr, G2_unnormalized, delay_difference: the arrays of /xpcs, linked
            frame_average       (rows, columns) of the whole detector, NaN where nothing was measured
            v_dim0, v_dim1      (n_dynamic,) where the bins lie, e.g. q and phi
        instrument              incident_beam, detector_1
    /xpcs                       as boost_corr writes it and pyXpcsViewer 1.2.2 reads it
        qmap                    the map of pixels to bins, attributes hash and version
        multitau                normalized_g2, normalized_g2_err, delay_list; tau, n_pairs, G2, IP, IF
        temporal_mean           scattering_2d, scattering_1d, scattering_1d_segments; segment_start, v_dim0, v_dim1
        spatial_mean            intensity_vs_time; frame, intensity
        ledger                  frames sent, received, lost, ...
        configuration, metadata what the run was told: text and JSON
        <operator>              the arrays of any other operator
"""

import json
import logging
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, SinkError
from stream.messages import Arrays, Output, Result, RunStart, RunStop

logger = logging.getLogger(__name__)

_QMAP = (
    *("mask", "dynamic_roi_map", "static_roi_map", "map_names", "map_units"),
    *("dynamic_v_list_dim0", "dynamic_v_list_dim1", "dynamic_num_pts", "dynamic_index_mapping"),
    *("static_v_list_dim0", "static_v_list_dim1", "static_num_pts", "static_index_mapping"),
    *("beam_center_x", "beam_center_y", "detector_distance", "pixel_size"),
)
"""What pyXpcsViewer cannot load a file without."""

_LONGEST_PER_FRAME = 2**22
"""Frames up to which intensity_vs_time has one value per frame, as pyXpcsViewer takes it: 64 MB before compression."""


@dataclass(slots=True)
class _Run:
    start: RunStart
    told: datetime
    results: dict[str, Result] = field(default_factory=dict)


class Hdf5Sink:
    """Write one result file per run when it stops.

    Only final results are used; of those of one operator the one that knows most frames. What the viewers need and the
    run did not say is taken from the map (energy, beam centre, distance, pixel size; attribute ``source``), from the
    clock when the run was announced (start_time), or is NaN (energy); an unknown scan_number is -1.

    Parameters
    ----------
    path
        The file. ``{run}`` stands for the name of the run. A file there of another run is left alone; the new one is
        then called ``<stem>_<run><suffix>``. pyXpcsViewer lists .h5 and .hdf only.
    qmap
        What stands under /xpcs/qmap by name: arrays, numbers, lists of str as pySimpleMask names them, and
        "attributes", a map with "hash".
    configuration
        Text kept in the file.

    Raises
    ------
    ConfigError
        The map lacks something that pyXpcsViewer needs.
    """

    def __init__(self, path: Path, *, qmap: Mapping[str, Any], configuration: str = "") -> None:
        missing = [name for name in _QMAP if name not in qmap]
        if "hash" not in qmap.get("attributes", {}):
            missing.append("attributes: hash")
        if missing:
            raise ConfigError(f"qmap for {path} lacks {', '.join(missing)}")
        self.written: list[Path] = []
        self._path = path
        self._qmap = qmap
        self._configuration = configuration
        self._runs: dict[str, _Run] = {}

    def __enter__(self) -> Self:
        """Return the sink."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no file is open between two calls."""

    def write(self, output: Output) -> None:
        """Remember the run and its final results; write the file at its RunStop.

        Raises
        ------
        SinkError
            The file cannot be written, or a result does not fit the map.
        """
        run = self._runs.get(output.run)
        match output:
            case RunStart():
                self._runs[output.run] = _Run(output, datetime.now(UTC))
            case Result(final=True) if run:
                held = run.results.get(output.operator)
                if held is None or held.n_frames <= output.n_frames:
                    run.results[output.operator] = output
            case RunStop() if run:
                self._save(run, output)
                del self._runs[output.run]

    def flush(self) -> None:
        """Do nothing: a file is on disk when `write` returns."""

    def _save(self, run: _Run, stop: RunStop) -> None:
        image = _image(run, stop, self._qmap, self._configuration)
        target = self._path
        try:
            target = _free(self._path, stop.run)
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace(target, image)
        except OSError as error:
            raise SinkError(f"{target}: {error.strerror or error}") from error
        self.written.append(target)


def _free(path: Path, run: str) -> Path:
    """Return the first name for the file of `run` that is not taken by another run."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", run)[:80]
    if name != run or not name[:1].isalnum():
        name = f"run_{name}_{sha256(run.encode('utf-8', 'replace')).hexdigest()[:8]}"
    first = Path(str(path).replace("{run}", name))
    second = first.with_name(f"{first.stem}_{name}{first.suffix}")
    for target in (first, second):
        owner = _owner(target)
        if owner in (None, run):
            return target
        logger.warning("%s is kept: it belongs to %s, not to run %s", target, owner or "no run", run)
    raise SinkError(f"{first} and {second} belong to something else; run {run} has no file")


def _owner(path: Path) -> str | None:
    """Return the run of the file, "" if it is no result file, None if there is none."""
    if not path.exists():
        return None
    with suppress(OSError, KeyError, TypeError, AttributeError), h5py.File(path) as file:
        return str(file["entry/entry_identifier"].asstr()[()])
    return ""


def _replace(target: Path, image: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _image(run: _Run, stop: RunStop, qmap: Mapping[str, Any], configuration: str) -> bytes:
    """Return the bytes of the file. It is made in memory, so that only plain writes can fail on a full disk."""
    with h5py.File("result", "w", driver="core", backing_store=False) as file:
        file.attrs["default"] = "entry"
        entry = _group(file, "entry", "NXentry", default="data")
        xpcs = _group(file, "xpcs", "NXprocess")
        _process(xpcs, run, stop, configuration)
        _qmap(xpcs, qmap)
        _multitau(xpcs, run, len(qmap["dynamic_index_mapping"]))
        _temporal_mean(xpcs, run, qmap)
        _spatial_mean(xpcs, run)
        for name in run.results.keys() - {"multitau", "scattering", "intensity"}:
            group = xpcs.create_group(name)
            for key, array in run.results[name].arrays.items():
                _put(group, key, np.asarray(array))
        _entry(entry, run)
        _instrument(entry, run.start, qmap)
        _data(entry, xpcs, qmap)
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def _process(xpcs: h5py.Group, run: _Run, stop: RunStop, configuration: str) -> None:
    try:
        version = metadata.version("xpcs-stream")
    except metadata.PackageNotFoundError:
        version = "unknown"
    _put(xpcs, "program", "xpcs-stream")
    _put(xpcs, "version", version)
    _put(xpcs, "date", datetime.now(UTC).isoformat())
    _put(xpcs, "configuration", configuration)
    _put(xpcs, "metadata", _json(run.start))
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


def _multitau(xpcs: h5py.Group, run: _Run, n_dynamic: int) -> None:
    group = xpcs.create_group("multitau")
    _put(group, "config/stride_frame", 1)
    _put(group, "config/avg_frame", 1)
    arrays = _arrays(run, "multitau", ("delay", "tau", "g2", "g2_err", "n_pairs", "G2", "IP", "IF"))
    if arrays is None:
        none = np.empty((0, n_dynamic))
        arrays = {"delay": none[:, 0], "tau": none[:, 0], "g2": none, "g2_err": none, "n_pairs": none[:, 0]}
    _fits(run, "multitau", "g2", arrays["g2"].shape[1:], (n_dynamic,))
    if len(arrays["delay"]) < 2:
        arrays = _two_delays(arrays, run.start.frame_time)
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


def _two_delays(arrays: Arrays, frame_time: float) -> dict[str, NDArray[Any]]:
    """Return the results at delays 1 and 2, NaN where there are none: the viewer cannot read arrays of shape (1, 1)."""
    padded = {}
    for name, array in arrays.items():
        padded[name] = np.full((2, *array.shape[1:]), np.nan)
        padded[name][: len(array)] = array
    delay = np.array([1, 2])
    return padded | {"delay": delay, "tau": delay * frame_time, "n_pairs": np.nan_to_num(padded["n_pairs"])}


def _temporal_mean(xpcs: h5py.Group, run: _Run, qmap: Mapping[str, Any]) -> None:
    group = xpcs.create_group("temporal_mean")
    n_static = len(qmap["static_index_mapping"])
    names = ("image", "scattering_1d", "scattering_1d_segments", "segment_start", "origin")
    whole = np.full(np.shape(qmap["mask"]), np.nan)
    arrays = _arrays(run, "scattering", names)
    if arrays is None:
        arrays = {"scattering_1d": np.full(n_static, np.nan), "scattering_1d_segments": np.empty((0, n_static))}
    else:
        image, (row, column) = arrays["image"], arrays["origin"]
        window = whole[row : row + image.shape[0], column : column + image.shape[1]]
        _fits(run, "scattering", f"image at row {row}, column {column}", image.shape, window.shape)
        window[:] = image
    _fits(run, "scattering", "scattering_1d", arrays["scattering_1d"].shape, (n_static,))
    if not len(arrays["scattering_1d_segments"]):
        nothing = {"scattering_1d_segments": np.full((1, n_static), np.nan), "segment_start": np.zeros(1, np.int64)}
        arrays = arrays | nothing
    # The viewer takes percentiles of this image: no NaN. Which pixels were measured stands in frame_average.
    _put(group, "scattering_2d", np.nan_to_num(whole)[np.newaxis])
    _put(group, "frame_average", whole, long_name="counts per pixel and frame", units="counts")
    for name in names[1:3]:
        rows = np.atleast_2d(arrays[name])
        _put(group, name, rows.ravel() if rows.shape == (1, 1) else rows)  # the viewer cannot read (1, 1)
    _put(group, "segment_start", arrays["segment_start"], units="frames")
    _put_bins(group, qmap, "static")


def _spatial_mean(xpcs: h5py.Group, run: _Run) -> None:
    group = xpcs.create_group("spatial_mean")
    arrays = _arrays(run, "intensity", ("frame", "intensity"))
    if arrays is None or not arrays["frame"].size:
        _put(group, "intensity_vs_time", np.zeros((2, 2)))
        return
    frame, intensity = arrays["frame"], arrays["intensity"]
    _put(group, "frame", frame, units="frames")
    _put(group, "intensity", intensity, units="counts")
    _put(group, "intensity_vs_time", _per_frame(frame, intensity, run.results["intensity"].n_frames))


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


def _entry(entry: h5py.Group, run: _Run) -> None:
    known = run.start.metadata
    _put(entry, "definition", "NXxpcs")
    _put(entry, "entry_identifier", run.start.run)
    with suppress(ValueError):
        _put(entry, "entry_identifier_uuid", str(uuid.UUID(run.start.run)))
    scan_number = known.get("scan_number")
    _put(entry, "scan_number", scan_number if isinstance(scan_number, int) and 0 <= scan_number < 2**63 else -1)
    try:
        datetime.fromisoformat(known.get("start_time", ""))
        _put(entry, "start_time", known["start_time"])
    except (TypeError, ValueError):
        _put(entry, "start_time", run.told.isoformat(), source="clock of xpcs-stream when the run was announced")
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


def _arrays(run: _Run, operator: str, names: tuple[str, ...]) -> dict[str, NDArray[Any]] | None:
    if operator not in run.results:
        return None
    arrays: Arrays = run.results[operator].arrays
    missing = [name for name in names if name not in arrays]
    if missing:
        raise SinkError(f"run {run.start.run}: result {operator!r} lacks {', '.join(missing)}")
    return {name: np.asarray(array) for name, array in arrays.items()}


def _fits(run: _Run, operator: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise SinkError(f"run {run.start.run}: result {operator!r}: {name}: {shape} does not fit the map's {expected}")


def _json(start: RunStart) -> str:
    try:
        return json.dumps(start.metadata, default=_plain)
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
