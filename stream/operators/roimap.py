"""Which pixel belongs to which bin."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.errors import RoiMapError

MAX_SIZE = 1 << 27
"""Elements of the largest dataset that is read: 30 times an EIGER2 4M."""

MAX_BINS = 1 << 22

GEOMETRY = ("beam_center_x", "beam_center_y", "detector_distance", "pixel_size", "energy")

KINDS = ("static", "dynamic")


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
        static = bins_of("static_roi_map", self.static_roi_map)
        dynamic = bins_of("dynamic_roi_map", self.dynamic_roi_map)
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


def numbers(name: str, values: Any) -> NDArray[Any]:
    """Return values of any kind of number as an array.

    Raises
    ------
    RoiMapError
        They are something else.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise RoiMapError(f"{name} is {values!r:.100}, not numbers")
    return array


def _ravelled(qmap: Mapping[str, Any], name: str, default: Any) -> NDArray[Any]:
    return numbers(name, qmap.get(name, default)).ravel()


def _geometry(qmap: Mapping[str, Any]) -> dict[str, float]:
    geometry = {name: numbers(name, qmap.get(name, np.nan)) for name in GEOMETRY}
    for name, value in geometry.items():
        if value.size != 1:
            raise RoiMapError(f"{name} has {value.size} values, not one")
    return {name: float(value.item()) for name, value in geometry.items()}


def bins_of(name: str, values: Any) -> NDArray[np.int32]:
    """Widen a map (pySimpleMask stores it as uint8 where it can) once it is known to hold bins only.

    Raises
    ------
    RoiMapError
        Names a value that is no bin, and its place.
    """
    given = numbers(name, values)
    if given.ndim != 2 or given.size == 0:
        raise RoiMapError(f"{name} has the shape {given.shape}, not rows and columns")
    wrong = ~((given >= 0) & (given <= MAX_BINS) & (given == np.trunc(given)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise RoiMapError(f"{name} has {given[row, column]} at row {row}, column {column}: not a bin")
    return _read_only(given.astype(np.int32))


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
