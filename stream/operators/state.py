"""What the state of an operator must have in common with the operator that takes it over."""

import numpy as np

from stream.errors import CheckpointError
from stream.messages import Arrays, RunStart
from stream.operators.roimap import RoiMap


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
