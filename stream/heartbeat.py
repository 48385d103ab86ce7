"""Who correlates which region, how far it is, and when it was heard of last.

A worker says in the ledger that it publishes who it is, and how it is:

    node            (n,) uint8: name of its machine and number of its process, as UTF-8
    checkpoint      0-d int64, frames of its newest checkpoint; -1 if there is none
    frame_age       0-d float64, since the end of the newest frame that it knows of (s); NaN if that is not known

A merger makes a table of it, the interim result "regions". It is of interest only while a run is on, so that it stands
in no result file: what is in those does not depend on who computed it.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stream.messages import Arrays

BEAT = 2.0
"""Seconds after which a worker that has nothing new to tell says that it is there."""

NODE_BYTES = 64
"""Of the name of a worker, at most."""

MOST_REGIONS = 4096
"""That a run may say it has."""

MOST_ROWS = 2**28
"""More than any detector has."""

OF_A_WORKER = ("node", "checkpoint", "frame_age")
"""What a ledger says beside the counts."""


def worker(checkpoint: int, frame_age: float) -> Arrays:
    """Return who this process is; see the module."""
    process = f":{os.getpid()}"
    machine = socket.gethostname().encode()[: NODE_BYTES - len(process)]
    return {
        "node": np.frombuffer(machine + process.encode(), np.uint8),
        "checkpoint": np.array(checkpoint, np.int64),
        "frame_age": np.array(frame_age, np.float64),
    }


def worker_of(ledger: Arrays) -> Arrays:
    """Return what a ledger says of who published it.

    Raises
    ------
    ArithmeticError, TypeError, ValueError
        It is of another kind or shape.
    """
    told = {name: ledger[name] for name in OF_A_WORKER if name in ledger}
    if "node" in told and (told["node"].dtype != np.uint8 or told["node"].ndim != 1):
        raise ValueError(f"node is {told['node'].dtype} {told['node'].shape}")
    if "checkpoint" in told:
        told["checkpoint"] = np.array(int(told["checkpoint"].item()), np.int64)
    if "frame_age" in told:
        told["frame_age"] = np.array(float(told["frame_age"].item()), np.float64)
    return told


def node_of(ledger: Arrays) -> str:
    """Return who published a ledger; "" if it does not tell."""
    node = ledger.get("node", np.empty(0, np.uint8))
    if node.dtype != np.uint8:
        return ""
    return node.ravel()[:NODE_BYTES].tobytes().rstrip(b"\0").decode("utf-8", "replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """What is known of a region while a run is on."""

    rows: tuple[int, int] = (0, 0)
    """Of the detector, begin and end."""
    frames: int = 0
    """Of which its newest sums are."""
    lost: int = 0
    lag: float = np.nan
    """From the end of its newest frame to its correlation (s)."""
    checkpoint: int = -1
    """Frames of its newest checkpoint; -1 if it has none."""
    node: str = ""
    age: float = np.nan
    """Since it was heard of (s); NaN if it never was."""
    ended: bool = False
    """All of it is told: nothing more is to be heard."""


def table(regions: Sequence[Region]) -> Arrays:
    """Return regions as the arrays of a result, each (n_regions, ...)."""
    names = np.array([region.node.encode()[:NODE_BYTES] for region in regions], f"S{NODE_BYTES}")
    return {
        "rows": np.array([region.rows for region in regions], np.int64).reshape(-1, 2),
        "frames": np.array([region.frames for region in regions], np.int64),
        "lost": np.array([region.lost for region in regions], np.int64),
        "lag": np.array([region.lag for region in regions], np.float64),
        "checkpoint": np.array([region.checkpoint for region in regions], np.int64),
        "node": names.view(np.uint8).reshape(-1, NODE_BYTES),
        "age": np.array([region.age for region in regions], np.float64),
        "ended": np.array([region.ended for region in regions], bool),
    }


def regions_of(arrays: Arrays) -> list[Region]:
    """Return what `table` was given.

    Raises
    ------
    KeyError, IndexError, TypeError, ValueError
        The arrays are none of its.
    """
    names = ("rows", "frames", "lost", "checkpoint", "ended", "lag", "age")
    for name in names[:5]:
        if arrays[name].dtype.kind not in "biu":
            raise ValueError(f"{name} are {arrays[name].dtype}, which does not count")
    n = len(arrays["rows"])
    shapes = dict.fromkeys(names, (n,)) | {"rows": (n, 2), "node": (n, *(arrays["node"].shape[1:2] or (1,)))}
    if wrong := [name for name, shape in shapes.items() if arrays[name].shape != shape]:
        raise ValueError(f"{wrong[0]} of {n} regions are {arrays[wrong[0]].shape}")
    if n > MOST_REGIONS or arrays["node"].size < n:
        raise ValueError(f"{n} regions, nodes {arrays['node'].shape}")
    if any(not 0 <= begin <= end <= MOST_ROWS for begin, end in arrays["rows"].tolist()):
        raise ValueError("rows that no detector has")
    nodes = [node_of({"node": row}) for row in arrays["node"]]
    columns = zip(*(arrays[name].tolist() for name in names), nodes, strict=True)
    return [
        Region(
            rows=(begin, end),
            frames=frames,
            lost=lost,
            checkpoint=checkpoint,
            ended=bool(ended),
            lag=float(lag),
            age=float(age),
            node=node,
        )
        for (begin, end), frames, lost, checkpoint, ended, lag, age, node in columns
    ]
