"""How much memory the state of a run takes, and how long a snapshot of it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from bench.data import EIGER2_4M, rings
from bench.measure import Figure, asked_for, compare, pairs, seconds
from stream.messages import FrameBatch, RunStart
from stream.operators.multitau import MultiTau

BANDS = 16
"""All 16 levels are reached with 2**15 frames, which would take minutes on the whole detector."""
LEVELS = 16
BATCH = 64
ROUNDS = 5
LIMIT = 1.0
"""GB for the state of a whole detector."""


def figures() -> Iterator[Figure]:
    """Fill all levels on a sixteenth of an EIGER2 4M (its rows are alike), in a process of its own."""
    command = [sys.executable, "-m", "bench.memory"]
    said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    yield asked_for("state, 4M, 16 levels", "GB", [BANDS * said["state"] / 1e9], LIMIT, less_is_better=True)
    milliseconds = [(1e3 * BANDS * ours, 1e3 * BANDS * theirs) for ours, theirs in said["snapshot"]]
    against = f"copying its {BANDS * said['snapshot_size'] / 1e9:.2f} GB"
    yield compare("snapshot, 4M, 16 levels", "ms", against, milliseconds, less_is_better=True)
    held_up = [(1e3 * ours, 1e3 * theirs) for ours, theirs in said["held_up"]]
    against = f"the snapshot, of 1/{BANDS}"
    yield compare("frame held up by a snapshot", "ms", against, held_up, less_is_better=True)


def _measure() -> None:
    """Print what the state takes more than what there was before its first frame: the frames, and compiled kernels."""
    shape = EIGER2_4M[0] // BANDS, EIGER2_4M[1]
    frames = np.random.default_rng(0).integers(0, 3, (BATCH, *shape), "<u2")
    start = RunStart(run="bench", shape=shape, dtype="<u2", saturation_value=65534, frame_time=1e-3, count_time=1e-3)
    compiling = MultiTau(start, rings(shape))
    compiling.push(FrameBatch(run="bench", first=0, frames=frames[:1], timestamp_ns=0))
    del compiling

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here; see proc(5)
    before = _resident("VmRSS")
    operator = MultiTau(start, rings(shape), levels=LEVELS)
    for first in range(0, 2 ** (LEVELS - 1), BATCH):
        operator.push(FrameBatch(run="bench", first=first, frames=frames, timestamp_ns=0))
    state = _resident("VmHWM") - before

    arrays = operator.snapshot()
    snapshot = partial(seconds, lambda: dict(operator.snapshot()))
    copying = pairs(snapshot, lambda: seconds(lambda: [a.copy() for a in arrays.values()]), ROUNDS)

    def push_beside() -> None:
        operator.snapshot()
        first = operator.n_frames
        operator.push(FrameBatch(run="bench", first=first, frames=frames[:1], timestamp_ns=0))

    held_up = pairs(lambda: seconds(push_beside), snapshot, ROUNDS)
    size = sum(array.nbytes for array in arrays.values())
    print(json.dumps({"state": state, "snapshot": copying, "held_up": held_up, "snapshot_size": size}))


def _resident(name: str) -> int:
    """Return bytes of this process that are in memory: now (VmRSS), or at most so far (VmHWM)."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None  # noqa: S101 - for the type checker
    return 1024 * int(found[1])


if __name__ == "__main__":
    _measure()
