"""The documents that tell where a result file is, and what stands in it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
from event_model import ComposeRunBundle, ComposeStreamResource

Document = tuple[str, Mapping[str, Any]]
"""Its name, and itself."""

ORIGIN = {"source": "xpcs-stream", "object_name": "xpcs"}
"""Of every data key."""

_DATASETS: Mapping[str, tuple[str, str, list[str]]] = {
    "xpcs_result_g2": ("/xpcs/multitau/normalized_g2", "", ["tau", "q"]),
    "xpcs_result_g2_err": ("/xpcs/multitau/normalized_g2_err", "", ["tau", "q"]),
    "xpcs_result_tau": ("/xpcs/multitau/tau", "s", ["tau"]),
    "xpcs_result_scattering_2d": ("/xpcs/temporal_mean/scattering_2d", "photon/pixel/frame", ["y", "x"]),
}
"""By data key: name, units and axes; see `stream.sinks.nxxpcs`."""


def documents(file: Path, run: ComposeRunBundle, uid_of: Callable[[str], str], time: float) -> list[Document]:
    """Return a descriptor of the stream "result", and of each dataset where it is, as one single datum.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    with h5py.File(file) as opened:
        found = {key: opened[name] for key, (name, _, _) in _DATASETS.items() if name in opened}
        data_keys = {key: _data_key(key, dataset) for key, dataset in found.items()}
        chunks = {key: _chunk_shape(key, dataset) for key, dataset in found.items()}
    descriptor = run.compose_descriptor(
        name="result",
        data_keys=data_keys,
        hints={"xpcs": {"fields": []}},  # without any, BestEffortCallback plots them all
        object_keys={"xpcs": list(data_keys)},
        time=time,
        uid=uid_of("result"),
    ).descriptor_doc
    told: list[Document] = [("descriptor", descriptor)]
    for key in data_keys:
        resource, compose_datum = ComposeStreamResource(run.start_doc)(
            mimetype="application/x-hdf5",
            uri=f"file://localhost{file.absolute().as_posix()}",
            data_key=key,
            parameters={"dataset": _DATASETS[key][0], "chunk_shape": chunks[key], "swmr": False},
            uid=uid_of(key),
        )
        datum = compose_datum(indices={"start": 0, "stop": 1}, seq_nums={"start": 1, "stop": 2}, descriptor=descriptor)
        told += [("stream_resource", resource), ("stream_datum", datum)]
    return told


def array_key(shape: tuple[int, ...], dims: list[str], units: str) -> dict[str, Any]:
    """Return the data key of an array of float64."""
    described = {"dtype": "array", "shape": list(shape), "dtype_numpy": "<f8", "dims": dims, "units": units}
    return described | ORIGIN


def _data_key(key: str, dataset: h5py.Dataset) -> dict[str, Any]:
    _, units, dims = _DATASETS[key]
    shape = dataset.shape[-len(dims) :]  # of the one datum: a leading axis of length 1 counts datums
    return array_key(shape, dims, units) | {"dtype_numpy": dataset.dtype.str, "external": "STREAM:"}


def _chunk_shape(key: str, dataset: h5py.Dataset) -> list[int]:
    """Return the lengths of a chunk, datums first."""
    shape = dataset.chunks or dataset.shape
    return [1] * (1 + len(_DATASETS[key][2]) - len(shape)) + list(shape)
