"""No compiler runs twice for the same kernel, nor while frames come."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from stream.messages import DTYPES
from stream.operators.roimap_file import write
from tests.conftest import make_roimap

ROOT = Path(__file__).parents[1]
DEADLINE = 250

INTENSITY = """
import numba.core.event as event, numpy as np
from stream.correlators import compile_kernels
from stream.messages import FrameBatch
from stream.operators.intensity import Intensity
from tests.conftest import make_roimap, make_start
roimap = make_roimap()
def make(start):
    return [Intensity(start, roimap, threads=2)]
with event.install_recorder("numba:run_pass") as recorder:
    compile_kernels(make, roimap, print)
operator = make(make_start())[0]
frames = np.arange(12, dtype="<u2").repeat(300).reshape(12, 6, 50)
frames.flags.writeable = False
operator.push(FrameBatch(run="run-1", first=0, frames=frames, timestamp_ns=0))
print(operator.result()["intensity"].tolist() == list(range(12)))
print(len(recorder.buffer))
"""


def started(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    with process:
        try:
            out, err = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    assert process.returncode == 0, err
    return out.splitlines()


def test_of_processes_that_start_together_one_compiles_and_the_others_load(tmp_path):
    together = [started(INTENSITY, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(4)]
    *right, compiled = zip(*[finished(process)[-2:] for process in together], strict=True)
    assert right == [("True",) * 4]
    assert sorted(map(int, compiled))[:3] == [0, 0, 0]
    assert max(map(int, compiled)) > 0
    assert finished(started(INTENSITY, NUMBA_CACHE_DIR=str(tmp_path)))[-2:] == ["True", "0"]


@pytest.mark.parametrize("error", ["static", "pixel"])
def test_no_compiler_runs_while_frames_come(error):
    code = f"""
import itertools, numba.core.event as event, numpy as np
from stream import wire
from stream.correlators import compile_kernels
from stream.messages import DTYPES, FrameBatch
from stream.operators.intensity import Intensity
from stream.operators.multitau import MultiTau
from stream.operators.scattering import Scattering
from tests.conftest import events_of, make_roimap, make_start
roimap = make_roimap((300, 50))
def make(start):
    return [MultiTau(start, roimap, error={error!r}), Scattering(start, roimap), Intensity(start, roimap)]
def frames_of(dtype, mean, n, form):
    frames = np.random.default_rng(n).poisson(mean, (n, 300, 50)).astype(dtype)
    batch = FrameBatch(run="run-1", first=0, frames=form(frames), timestamp_ns=0)
    return wire.decode([bytes(part) for part in wire.encode(batch)]).frames
compile_kernels(make, roimap, print)
with event.install_recorder("numba:compile") as recorder:
    for dtype, saturation in itertools.product(DTYPES, [None, 3]):
        for operator in make(make_start(roimap.shape, dtype=dtype, saturation_value=saturation)):
            first = 0
            for mean, n, form in itertools.product([0.001, 1, 100], [1, 70], [np.asarray, events_of]):
                frames = frames_of(dtype, mean, n, form)
                operator.push(FrameBatch(run="run-1", first=first, frames=frames, timestamp_ns=0))
                operator.result()
                first += n + 5
            operator.restore(operator.snapshot())
            operator.push(FrameBatch(run="run-1", first=10**6, frames=frames[1:], timestamp_ns=0))
            operator.result()
print(*[one.data["dispatcher"].__name__ for _, one in recorder.buffer])
print("done")
"""
    compiled, done = finished(started(code))[-2:]
    assert (compiled, done) == ("", "done")


@pytest.mark.parametrize("error", ["static", "pixel"])
def test_a_run_finds_on_disk_what_was_compiled_ahead(tmp_path, error):
    roimap = make_roimap()
    write(tmp_path / "qmap.h5", roimap)
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["entry/data/data"] = np.random.default_rng(0).poisson(1.0, (20, *roimap.shape)).astype(DTYPES[1])
    files = ["--source", "frames.h5", "--qmap", "qmap.h5", "--out", "result.h5"]
    run = f"""
import os, sys, numba.core.event as event
from stream.__main__ import app
os.chdir({str(tmp_path)!r})
with event.install_recorder("numba:compile") as recorder:
    app(["run", *{files!r}, "--frame-time", "1 ms", "--error", {error!r}, "-q"], standalone_mode=False)
print(len(recorder.buffer))
"""
    finished(started("from stream.__main__ import app; app(['compile'])"))
    assert finished(started(run, PYTHONPATH=str(ROOT))) == ["result.h5", "0"]


def test_a_worker_that_starts_loads_nothing_that_takes_its_time(tmp_path):
    write(tmp_path / "qmap.h5", make_roimap())
    words = ["worker", "--source", "zmq://127.0.0.1:9/8idi", "--qmap", str(tmp_path / "qmap.h5")]
    words += ["--checkpoints", str(tmp_path), "--status", str(tmp_path / "status"), "--publish-every", "200 ms"]
    finished(started("from stream.__main__ import app; app(['compile'])"))
    worker = started(f"""
import atexit, sys
atexit.register(lambda: print(*sys.modules))
from stream.__main__ import app
app({words!r})
""")
    deadline = time.monotonic() + DEADLINE
    while not (tmp_path / "status").exists() or not json.loads((tmp_path / "status").read_text())["ready"]:
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker.terminate()
    loaded = set(finished(worker)[-1].split())
    of_others = {"scipy.linalg", "awkward", "pint", "event_model", "matplotlib", "confluent_kafka", "asyncio", "tiled"}
    ours = {"stream.assembly", "stream.ingest.bluesky", "stream.ingest.dectris", "stream.sinks.hdf5"}
    assert (of_others | ours) & loaded == set()
    assert "stream.operators.multitau" in loaded
