"""A run of 878 MB that goes by file, as all did with the Balsam edge service, beside the same run streamed.

By file: a manager brings it to a folder of this machine by copying, a job of this machine correlates it, and the result
comes back; all of it is read again on arrival. Streamed: the same file through a gateway to two workers that are there
already, and a merger. All share the cores of one machine, and no link is between them: add what yours takes.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import hdf5plugin

from bench.data import Shape, poisson
from bench.measure import Figure, compare
from bench.plane import REGIONS, STREAM, WORKERS, qmap, started, until_said
from hpc_bridge.control import ask
from stream.sinks.dectris_image import Compressor
from tests.bridge import Bridge
from tests.kafka import free_ports

SHAPE: Shape = (512, 512)
MEAN = 1.0
N_BYTES = 878_000_000
"""Of the XPCS run in M. Salim et al., "Balsam: Near Real-Time Experimental Data Analysis on Supercomputers" (2021)."""
DIFFERENT = 64
"""Frames, which are repeated."""
FRAME_TIME = 1e-3
ROUNDS = 3

STAGES = {
    "hash": "sha256 of the file",
    "wait": "wait for a turn",
    "transfer": "transfer, read again",
    "start": "start of a node",
    "compute": "compute",
    "return": "return of the result",
}
"""As `hpc-bridge status` tells them."""


def figures() -> Iterator[Figure]:
    """Take turns with the stream."""
    with TemporaryDirectory(prefix="xpcs-bench-") as name:
        folder = Path(name)
        frames, roimap = _written(folder), qmap(folder, SHAPE)
        _streamed(folder, frames, roimap)  # compilers
        rounds = [(_by_file(folder, frames, roimap), _streamed(folder, frames, roimap)) for _ in range(ROUNDS)]
    against = "the same run streamed"
    for stage, what in STAGES.items():
        yield compare(f"by file: {what}", "s", against, [(stages[stage], theirs) for stages, theirs in rounds])
    yield compare("by file: all of it", "s", against, [(sum(stages.values()), theirs) for stages, theirs in rounds])


def _written(folder: Path) -> Path:
    """Write the run, compressed as by a detector."""
    path = folder / "run.h5"
    with closing(Compressor("bslz4", framed=False)) as compressor, h5py.File(path, "w") as file:
        chunks = [compressor.compress(frame) for frame in poisson(SHAPE, DIFFERENT, MEAN)]
        n = DIFFERENT * N_BYTES // sum(map(len, chunks))
        frames = file.create_dataset(
            "entry/data/data", (n, *SHAPE), "<u2", chunks=(1, *SHAPE), **hdf5plugin.Bitshuffle(cname="lz4")
        )
        for i in range(n):
            frames.id.write_direct_chunk((i, 0, 0), chunks[i % DIFFERENT])
    return path


def _by_file(folder: Path, frames: Path, roimap: Path) -> dict[str, float]:
    """Return the seconds of every stage."""
    with TemporaryDirectory(dir=folder) as name, ExitStack() as stack:
        here = Path(name)
        options = ("--frame-time", f"{FRAME_TIME} s", "--qmap", str(roimap), "--out", "{result}", "--quiet")
        command = [sys.executable, *STREAM, "run", "--source", "{file}", *options]
        route = {"by": "copy", "there": {"path": str(here / "there")}, "command": command}
        files = {"results": str(here / "results"), "sites": {"here": route}}
        bridge = stack.enter_context(closing(Bridge(here, ["true"], nodes=0, max_nodes=1, files=files)))
        bridge.up()
        bridge.run("submit", frames, "--beamline", bridge.name, "--wait")
        [told] = ask(bridge.state, {"do": "status"})["beamlines"][bridge.name]["files"]["runs"]
        return {stage: told["seconds"][stage] or 0.0 for stage in STAGES}


def _streamed(folder: Path, frames: Path, roimap: Path) -> float:
    """Return the seconds from the gateway that is ready to the result file."""
    [port] = free_ports(1)
    address = f"zmq://127.0.0.1:{port}/bench"
    with TemporaryDirectory(dir=folder) as name, ExitStack() as stack:
        here = Path(name)
        working = ("-v", "worker", "--source", address, "--qmap", roimap, "--checkpoints", here, "--threads", "1")
        for _ in range(WORKERS):
            until_said(stack.enter_context(started(*STREAM, *working)), "taking regions", 1)
        merging = ("merge", "--source", address, "--qmap", roimap, "--out", here / "{run}.h5", "--runs", "1", "--quiet")
        merger = stack.enter_context(started(*STREAM, *merging))
        until_said(merger, "taking partial sums", 1)
        sending = ("--source", frames, "--frame-time", f"{FRAME_TIME} s", "--to", address, "--regions", str(REGIONS))
        gateway = stack.enter_context(started(*STREAM, "gateway", *sending))
        until_said(gateway, "taking frames", 1)
        begin = time.perf_counter()
        try:
            merger.wait(600)
        except subprocess.TimeoutExpired:
            raise RuntimeError("the stream has brought no result") from None
        return time.perf_counter() - begin
