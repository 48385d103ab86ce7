"""What binds an operator, and a saved state of it, to a run and a roi map."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.errors import CheckpointError, RoiMapError
from stream.messages import Arrays, RunStart
from stream.operators.roimap import RoiMap


def static_bins(start: RunStart, roimap: RoiMap) -> NDArray[np.int32]:
    """Return the static roi map of the region that a run streams, cut out of that of the whole detector.

    Raises
    ------
    RoiMapError
        The map was made for another detector.
    """
    detector_shape = start.detector_shape or start.shape
    if roimap.shape != detector_shape:
        raise RoiMapError(
            f"the roi map has {roimap.shape} rows and columns, the detector of {start.run} {detector_shape}"
        )
    return roimap.crop(start.origin, start.shape).static_roi_map


def identity(start: RunStart, roimap: RoiMap, *parameters: int) -> Arrays:
    """Return what a snapshot carries to be recognised by: digest of the roi maps, region, and parameters."""
    saturation = -1 if start.saturation_value is None else start.saturation_value
    return {
        "roimap": np.frombuffer(bytes.fromhex(roimap.digest), np.uint8),
        "region": np.array([*start.shape, *start.origin], np.int64),
        "parameters": np.array([np.dtype(start.dtype).itemsize, saturation, *parameters], np.int64),
    }


def check_identity(operator: str, state: Arrays, expected: Arrays) -> None:
    """Refuse a snapshot of another operator.

    Raises
    ------
    CheckpointError
        Names what differs.
    """
    for name, value in expected.items():
        if name not in state or not np.array_equal(state[name], value):
            raise CheckpointError(f"{operator}: the checkpoint was made with another {name}")


class Copying(Mapping[str, NDArray[Any]]):
    """A state that another thread is still copying: whoever looks at it waits."""

    def __init__(self, copy: Future[Arrays]) -> None:
        self._copy = copy

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._copy.result()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._copy.result())

    def __len__(self) -> int:
        return len(self._copy.result())
