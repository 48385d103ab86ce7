"""Files that beamlines keep their roi maps in: pySimpleMask's, NXxpcs, and older ones of the APS."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  maps may be stored with any of its filters
import numpy as np
from numpy.typing import NDArray

from stream.errors import RoiMapError
from stream.operators.roimap import KINDS, MAX_SIZE, RoiMap, bins_of, numbers

MASKS = ("mask", "qmap/mask", "xpcs/qmap/mask")
PIXEL_MASKS = (
    "entry/instrument/detector/pixel_mask",
    "entry/instrument/detector/detectorSpecific/pixel_mask",
    "entry/instrument/detector_1/pixel_mask",
)

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


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Read which pixels may be used.

    A ``.npy`` holds 0 where not; an HDF5 file is searched for `MASKS` (there other than 0 means good) and then for
    `PIXEL_MASKS` (a detector's own, where other than 0 means bad; NXdetector).

    Raises
    ------
    RoiMapError
        Names the file, and what is wrong.
    """
    try:
        if path.suffix == ".npy":
            return numbers("the mask", np.load(path, allow_pickle=False)).astype(np.bool_)
        with h5py.File(path, "r") as file:
            for names, good in ((MASKS, True), (PIXEL_MASKS, False)):
                for name in names:
                    if isinstance(file.get(name), h5py.Dataset):
                        found: NDArray[np.bool_] = numbers(name, _value(file[name])).astype(np.bool_)
                        return found if good else ~found
    except (OSError, ValueError) as error:
        raise RoiMapError(f"{path}: {error}") from error
    raise RoiMapError(f"{path} has none of {', '.join((*MASKS, *PIXEL_MASKS))}")


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
    maps = {name: bins_of(name, qmap.pop(name)) for name in ("static_roi_map", "dynamic_roi_map")}
    if "mask" in qmap:
        mask = numbers("mask", qmap["mask"])
        for name, roi_map in maps.items():
            if mask.shape != roi_map.shape:
                raise RoiMapError(f"mask is {mask.shape}, {name} is {roi_map.shape}")
            maps[name] = np.where(mask, roi_map, 0)
    return RoiMap(**maps, qmap=qmap)


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
