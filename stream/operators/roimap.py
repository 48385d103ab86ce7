"""Which pixel belongs to which bin, from and to the files that beamlines keep it in."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  maps may be stored with any of its filters
import numpy as np
from numpy.typing import NDArray

from stream.errors import RoiMapError

MAX_SIZE = 1 << 27
"""Elements of the largest dataset that is read: 30 times an EIGER2 4M."""

MAX_BINS = 1 << 22

GEOMETRY = ("beam_center_x", "beam_center_y", "detector_distance", "pixel_size", "energy")

KINDS = ("static", "dynamic")

PER_BIN_LAYOUTS: Mapping[str, Mapping[str, str]] = {
    # NXxpcs
    "entry/instrument/masks": {
        "dynamic_roi_map": "dynamic_roi_map",
        "static_roi_map": "static_roi_map",
        "dynamic_q": "dynamic_q_list",
        "dynamic_phi": "dynamic_phi_list",
        "static_q": "static_q_list",
        "static_phi": "static_phi_list",
        "mask": "mask",
    },
    # APS 8-ID-I until 2021
    "xpcs": {
        "dynamic_roi_map": "dqmap",
        "static_roi_map": "sqmap",
        "dynamic_q": "dqlist",
        "dynamic_phi": "dphilist",
        "static_q": "sqlist",
        "static_phi": "sphilist",
        "mask": "mask",
    },
    # APS 8-ID-I in the SASBDB/NXcanSAS form
    "entry/XPCS/data": {"dynamic_roi_map": "masks/mask/mask", "dynamic_q": "ql_dyn"},
}
"""Groups with one q (and phi) per bin, and what our names are called there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoiMap:
    """Which pixel belongs to which bin; names as in NXxpcs and pySimpleMask. 0 is outside, bins count from 1.

    g2 is normalised per static bin and averaged over the static bins of a dynamic bin. All arrays are read-only.

    Raises
    ------
    RoiMapError
        The maps differ in shape or in what is outside, hold something else than bins, or a static bin lies in more
        than one dynamic bin.
    """

    static_roi_map: NDArray[np.int32]
    """(rows, cols)"""
    dynamic_roi_map: NDArray[np.int32]
    """(rows, cols)"""
    qmap: Mapping[str, Any] = field(default_factory=dict)
    """What else is known, by the names of pySimpleMask; ``attributes`` holds the attributes of its group."""

    n_static: int = field(init=False)
    n_dynamic: int = field(init=False)
    dynamic_of_static: NDArray[np.int64] = field(init=False)
    """(n_static,) Dynamic bin of each static bin, 0 for a static bin without pixels."""
    static_q: NDArray[np.float64] = field(init=False)
    """(n_static,) q of each bin (1/angstrom), NaN if unknown."""
    dynamic_q: NDArray[np.float64] = field(init=False)
    """(n_dynamic,) q of each bin (1/angstrom), NaN if unknown."""
    dynamic_phi: NDArray[np.float64] = field(init=False)
    """(n_dynamic,) Azimuth of each bin (degree), NaN if unknown."""
    digest: str = field(init=False)
    """SHA-256 over the shape and both maps."""

    def __post_init__(self) -> None:
        static = _bins("static_roi_map", self.static_roi_map)
        dynamic = _bins("dynamic_roi_map", self.dynamic_roi_map)
        if static.shape != dynamic.shape:
            raise RoiMapError(f"static_roi_map is {static.shape}, dynamic_roi_map is {dynamic.shape}")
        static_axes = _Axes.of("static", self.qmap, static)
        dynamic_axes = _Axes.of("dynamic", self.qmap, dynamic)
        computed = {
            "static_roi_map": static,
            "dynamic_roi_map": dynamic,
            "n_static": len(static_axes.index_mapping),
            "n_dynamic": len(dynamic_axes.index_mapping),
            "dynamic_of_static": _read_only(_dynamic_of_static(static, dynamic, len(static_axes.index_mapping))),
            "static_q": _read_only(static_axes.value(0)),
            "dynamic_q": _read_only(dynamic_axes.value(0)),
            "dynamic_phi": _read_only(dynamic_axes.value(1)),
            "digest": _digest(static, dynamic),
        }
        _geometry(self.qmap)
        for name, value in computed.items():
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the maps (pixel)."""
        rows, columns = self.static_roi_map.shape
        return rows, columns

    def pixels_by_static_bin(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the pixels inside, bin after bin.

        Returns
        -------
        pixels : (n_inside,)
            Flat indices, sorted by static bin and then by index.
        offsets : (n_static + 1,)
            The pixels of static bin b are ``pixels[offsets[b - 1]:offsets[b]]``.
        """
        bins = self.static_roi_map.ravel()
        order = np.argsort(bins, kind="stable")
        ends = np.cumsum(np.bincount(bins, minlength=self.n_static + 1))
        return order[ends[0] :], ends - ends[0]

    def crop(self, origin: tuple[int, int], shape: tuple[int, int]) -> "RoiMap":
        """Return the map of a part of the detector; bins keep their numbers, and there are as many.

        Raises
        ------
        RoiMapError
            The part lies outside of the map.
        """
        row, column = origin
        rows, columns = shape
        if (
            min(row, column) < 0
            or min(rows, columns) < 1
            or row + rows > self.shape[0]
            or column + columns > self.shape[1]
        ):
            raise RoiMapError(f"rows and columns {shape} from {origin} lie outside of a roi map of {self.shape}")
        part = np.s_[row : row + rows, column : column + columns]
        qmap = {
            name: value[part] if np.shape(value) == self.shape else value
            for name, value in self.arrays().items()
            if name not in ("static_roi_map", "dynamic_roi_map")
        }
        qmap["beam_center_x"] = qmap["beam_center_x"] - column
        qmap["beam_center_y"] = qmap["beam_center_y"] - row
        return RoiMap(static_roi_map=self.static_roi_map[part], dynamic_roi_map=self.dynamic_roi_map[part], qmap=qmap)

    def arrays(self) -> Mapping[str, Any]:
        """Return what stands in the group ``/qmap`` of a map file and ``/xpcs/qmap`` of a result file.

        What pyXpcsViewer and pySimpleMask ask for is all there: numbers the file did not have are NaN, and
        ``attributes`` (of the group) has the hash of these maps.
        """
        given = {
            "mask": self.static_roi_map > 0,
            "map_names": ["q", "phi"],
            "map_units": ["Å⁻¹", "deg"],
            **self.qmap,
            **_geometry(self.qmap),
            "static_roi_map": self.static_roi_map,
            "dynamic_roi_map": self.dynamic_roi_map,
        }
        for kind, roi_map in zip(KINDS, (self.static_roi_map, self.dynamic_roi_map), strict=True):
            given |= _Axes.of(kind, self.qmap, roi_map).arrays()
        attributes = {"version": "xpcs-stream", **self.qmap.get("attributes", {}), "hash": self.digest}
        return given | {"attributes": attributes}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    """The grid of two values (q and phi) that the bins of one map were made from; bins without pixels left out.

    Bin b stands at ``index_mapping[b - 1]`` of the flattened (n0, n1) grid.
    """

    kind: str
    index_mapping: NDArray[np.int64]
    num_pts: NDArray[np.int64]
    v_lists: tuple[NDArray[np.float64], NDArray[np.float64]]

    @classmethod
    def of(cls, kind: str, qmap: Mapping[str, Any], roi_map: NDArray[np.int32]) -> "_Axes":
        largest = int(roi_map.max())
        index_mapping = _ravelled(qmap, f"{kind}_index_mapping", np.arange(largest)).astype(np.int64)
        n_bins = len(index_mapping)
        if largest > n_bins:
            raise RoiMapError(f"{kind}_roi_map has bin {largest}, but {kind}_index_mapping only {n_bins} bins")
        dim0 = _ravelled(qmap, f"{kind}_v_list_dim0", np.full(n_bins, np.nan)).astype(np.float64)
        dim1 = _ravelled(qmap, f"{kind}_v_list_dim1", np.full(1, np.nan)).astype(np.float64)
        num_pts = _ravelled(qmap, f"{kind}_num_pts", (len(dim0), len(dim1))).astype(np.int64)
        if num_pts.tolist() != [len(dim0), len(dim1)]:
            raise RoiMapError(
                f"{kind}_num_pts is {num_pts.tolist()}, but {kind}_v_list_dim0 has {len(dim0)} values"
                f" and {kind}_v_list_dim1 {len(dim1)}"
            )
        if n_bins and not 0 <= index_mapping.min() <= index_mapping.max() < len(dim0) * len(dim1):
            wrong = index_mapping[(index_mapping < 0) | (index_mapping >= len(dim0) * len(dim1))][0]
            raise RoiMapError(f"{kind}_index_mapping has {wrong}, but the grid is {len(dim0)} x {len(dim1)}")
        return cls(kind=kind, index_mapping=index_mapping, num_pts=num_pts, v_lists=(dim0, dim1))

    def value(self, axis: int) -> NDArray[np.float64]:
        """Value of each bin along one axis of the grid."""
        return self.v_lists[axis][np.divmod(self.index_mapping, len(self.v_lists[1]))[axis]]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            f"{self.kind}_index_mapping": self.index_mapping,
            f"{self.kind}_num_pts": self.num_pts,
            f"{self.kind}_v_list_dim0": self.v_lists[0],
            f"{self.kind}_v_list_dim1": self.v_lists[1],
        }


def read(path: Path) -> RoiMap:
    """Read a map file or the maps of a result file.

    Understood are pySimpleMask's ``/qmap`` and its copy ``/xpcs/qmap`` in results of boost_corr and of this package,
    NXxpcs (``/entry/instrument/masks``), and the older APS files (``/xpcs/dqmap``, ``/entry/XPCS/data/masks``).
    Pixels with ``mask`` 0 are outside. Without a static map, static bins are the dynamic bins.

    Raises
    ------
    RoiMapError
        Names the file, the dataset and the value.
    """
    try:
        with h5py.File(path, "r") as file:
            qmap = _read_qmap(file)
    except RoiMapError as error:
        raise RoiMapError(f"{path}: {error}") from None
    except (OSError, RuntimeError) as error:
        raise RoiMapError(f"{path} cannot be read: {error}") from error
    try:
        return _from_qmap(qmap)
    except RoiMapError as error:
        raise RoiMapError(f"{path}: {error}") from None


def write(path: Path, roimap: RoiMap) -> None:
    """Write a map file as pySimpleMask does; whoever reads `path` sees the old file or the new one.

    Raises
    ------
    RoiMapError
        The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with h5py.File(partial, "w") as file:
            _write_qmap(file.create_group("qmap"), roimap.arrays())
        partial.replace(path)
    except OSError as error:
        raise RoiMapError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _read_qmap(file: h5py.File) -> dict[str, Any]:
    for name in ("qmap", "xpcs/qmap"):
        group = file.get(name)
        if isinstance(group, h5py.Group) and "dynamic_roi_map" in group:
            datasets = {name: group.get(name) for name in group}
            qmap = {name: _value(item) for name, item in datasets.items() if isinstance(item, h5py.Dataset)}
            return qmap | {"attributes": dict(group.attrs)}
    for name, layout in PER_BIN_LAYOUTS.items():
        group = file.get(name)
        if isinstance(group, h5py.Group) and isinstance(group.get(layout["dynamic_roi_map"]), h5py.Dataset):
            found = {ours: _value(group[theirs]) for ours, theirs in layout.items() if theirs in group}
            return found | {name: value for kind in KINDS for name, value in _grid(kind, found).items()}
    raise RoiMapError(
        "no dynamic_roi_map, neither of pySimpleMask (/qmap, /xpcs/qmap) nor of NXxpcs or older APS files"
    )


def _value(dataset: h5py.Dataset) -> Any:
    """Read numbers as an array or a number, text as str or list of str."""
    if (dataset.size or 0) > MAX_SIZE:
        raise RoiMapError(f"{dataset.name} has {dataset.size} elements, more than {MAX_SIZE}")
    if h5py.check_string_dtype(dataset.dtype):
        text = dataset.asstr(errors="replace")[()]
        return text.tolist() if isinstance(text, np.ndarray) else text
    if dataset.dtype.kind not in "biuf" or dataset.shape is None:
        raise RoiMapError(f"{dataset.name} holds {dataset.dtype}, neither numbers nor text")
    return dataset[()] if dataset.shape else dataset[()].item()


def _grid(kind: str, found: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Turn a q and a phi per bin into pySimpleMask's grid of q times phi, on whose diagonal the bins then stand."""
    if f"{kind}_q" not in found:
        return {}
    q = np.ravel(found.pop(f"{kind}_q"))
    phi = np.ravel(found.pop(f"{kind}_phi", np.nan))
    if len(phi) not in (1, len(q)):
        raise RoiMapError(f"the {kind} bins have {len(q)} values of q, but {len(phi)} of phi")
    step = 1 if len(phi) == 1 else len(phi) + 1
    return {
        f"{kind}_v_list_dim0": q,
        f"{kind}_v_list_dim1": phi,
        f"{kind}_index_mapping": np.arange(len(q)) * step,
    }


def _from_qmap(qmap: dict[str, Any]) -> RoiMap:
    if "static_roi_map" not in qmap:
        dynamic = {name.removeprefix("dynamic"): value for name, value in qmap.items() if name.startswith("dynamic_")}
        qmap |= {f"static{name}": value for name, value in dynamic.items()}
    maps = {name: _bins(name, qmap.pop(name)) for name in ("static_roi_map", "dynamic_roi_map")}
    if "mask" in qmap:
        mask = _numbers("mask", qmap["mask"])
        for name, roi_map in maps.items():
            if mask.shape != roi_map.shape:
                raise RoiMapError(f"mask is {mask.shape}, {name} is {roi_map.shape}")
            maps[name] = np.where(mask, roi_map, 0)
    return RoiMap(**maps, qmap=qmap)


def _numbers(name: str, values: Any) -> NDArray[Any]:
    numbers = np.asarray(values)
    if numbers.dtype.kind not in "biuf":
        raise RoiMapError(f"{name} is {values!r:.100}, not numbers")
    return numbers


def _ravelled(qmap: Mapping[str, Any], name: str, default: Any) -> NDArray[Any]:
    return _numbers(name, qmap.get(name, default)).ravel()


def _geometry(qmap: Mapping[str, Any]) -> dict[str, float]:
    geometry = {name: _numbers(name, qmap.get(name, np.nan)) for name in GEOMETRY}
    for name, value in geometry.items():
        if value.size != 1:
            raise RoiMapError(f"{name} has {value.size} values, not one")
    return {name: float(value.item()) for name, value in geometry.items()}


def _bins(name: str, values: Any) -> NDArray[np.int32]:
    """Widen a map (pySimpleMask stores it as uint8 where it can) once it is known to hold bins only."""
    numbers = _numbers(name, values)
    if numbers.ndim != 2 or numbers.size == 0:
        raise RoiMapError(f"{name} has the shape {numbers.shape}, not rows and columns")
    wrong = ~((numbers >= 0) & (numbers <= MAX_BINS) & (numbers == np.trunc(numbers)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise RoiMapError(f"{name} has {numbers[row, column]} at row {row}, column {column}: not a bin")
    return _read_only(numbers.astype(np.int32))


def _dynamic_of_static(static: NDArray[np.int32], dynamic: NDArray[np.int32], n_static: int) -> NDArray[np.int64]:
    differs = (static > 0) != (dynamic > 0)
    if differs.any():
        row, column = np.argwhere(differs)[0]
        raise RoiMapError(
            f"the pixel at row {row}, column {column} lies in static bin {static[row, column]}"
            f" and dynamic bin {dynamic[row, column]}, but 0 is outside for both"
        )
    dynamic_of_static = np.zeros(n_static + 1, np.int64)
    dynamic_of_static[static.ravel()] = dynamic.ravel()
    wrong = static[dynamic_of_static[static] != dynamic]
    if wrong.size:
        bins = np.unique(dynamic[static == wrong[0]]).tolist()
        raise RoiMapError(f"static bin {wrong[0]} lies in the dynamic bins {bins}, not in one")
    return dynamic_of_static[1:]


def _digest(static: NDArray[np.int32], dynamic: NDArray[np.int32]) -> str:
    sha256 = hashlib.sha256(repr(static.shape).encode())
    for roi_map in (static, dynamic):
        sha256.update(np.ascontiguousarray(roi_map, "<i4").data)
    return sha256.hexdigest()


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def _write_qmap(group: h5py.Group, arrays: Mapping[str, Any]) -> None:
    for name, value in arrays.items():
        if name == "attributes":
            group.attrs.update(value)
            continue
        if name.endswith(("_roi_map", "_index_mapping")):
            value = value.astype(np.min_scalar_type(value.max(initial=0)))  # as pySimpleMask
        dataset = group.create_dataset(name, data=value, compression="lzf" if np.size(value) > 1024 else None)
        if "_v_list_dim" in name:
            axis = int(name[-1])
            dataset.attrs["name"] = arrays["map_names"][axis]
            dataset.attrs["unit"] = arrays["map_units"][axis]
            dataset.attrs["size"] = len(value)
