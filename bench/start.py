"""How long `xpcs-stream run` takes from nothing to a result: a file of 16 frames, in a process of its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py

from bench.data import poisson, rings
from bench.measure import Figure, asked_for, seconds
from stream.operators import roimap_file

SHAPE = (64, 128)
ROUNDS = 5
COLD = 10
"""Seconds, with all kernels to be compiled."""
WARM = 2
"""Seconds, with kernels compiled before."""


def figures(rounds: int = ROUNDS) -> Iterator[Figure]:
    """Run with an empty cache of compiled kernels, and once more with what that left."""
    measured = [_cold_and_warm() for _ in range(rounds)]
    for i, (name, limit) in enumerate((("cold", COLD), ("warm", WARM))):
        figure = f"xpcs-stream run, 16 frames, {name}"
        yield asked_for(figure, "s", [each[i] for each in measured], limit, less_is_better=True)


def _cold_and_warm() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with h5py.File(folder / "frames.h5", "w") as file:
            file["entry/data/data"] = poisson(SHAPE, 16, 1)
        roimap_file.write(folder / "qmap.h5", rings(SHAPE))
        return _run(folder), _run(folder)


def _run(folder: Path) -> float:
    where = {"source": "frames.h5", "qmap": "qmap.h5", "out": "result.h5"}
    options = [word for option, file in where.items() for word in (f"--{option}", str(folder / file))]
    command = [sys.executable, "-m", "stream", "run", *options, "--frame-time", "1 ms", "--quiet"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "kernels")}
    return seconds(lambda: subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL))
