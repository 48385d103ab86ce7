import os
from io import BytesIO
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from stream.messages import Chunks, Events, FrameBatch, RunStart
from stream.operators.roimap import RoiMap
from tests import kafka
from tests import slurm as real_slurm

# Kernels compile on their first call, which hypothesis would take for a slow example.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=30)
settings.load_profile("here")

os.environ.setdefault("MPLBACKEND", "Agg")
# Brokers of Kafka take half as much of the processor for as short as they live here.
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")


@pytest.fixture(scope="session")
def shared_data():
    """Real recordings, which stand beside the project where it is developed."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the real recordings are not at {path}")
    return path


@pytest.fixture(scope="session")
def broker(tmp_path_factory):
    """A Kafka broker of this machine."""
    with kafka.started(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture(scope="session")
def secured(tmp_path_factory):
    """The doors of a broker that asks who comes in."""
    with kafka.started_secured(tmp_path_factory.mktemp("secured")) as doors:
        yield doors


@pytest.fixture(scope="session")
def slurm():
    """A Slurm of four nodes; whoever changes it brings it back to rest with `clear`."""
    with real_slurm.started() as slurm:
        yield slurm


@pytest.fixture
def topic(broker):
    return kafka.new_topic(broker)


@pytest.fixture
def roimap():
    return make_roimap()


def make_roimap(shape=(6, 50), n_static=6, n_dynamic=2, seed=0):
    """Random static bins 1..n_static and pixels outside, consecutive bins grouped."""
    static = np.random.default_rng(seed).integers(0, n_static + 1, shape)
    return RoiMap(static_roi_map=static, dynamic_roi_map=-(-static * n_dynamic // n_static))


def make_start(shape=(6, 50), **changes):
    return RunStart(
        **{"run": "run-1", "shape": shape, "dtype": "<u2", "frame_time": 0.01, "count_time": 0.009} | changes
    )


def events_of(frames):
    """The same frames as `Events`."""
    of_frame, row, column = np.nonzero(frames)
    return Events(
        shape=frames.shape,
        offsets=np.searchsorted(of_frame, np.arange(len(frames) + 1)),
        pixels=(row * frames.shape[2] + column).astype(np.uint32),
        counts=frames[frames > 0],
    )


def chunks_of(frames, counts_per_block=0):
    """The same frames as `Chunks`, by the filter of HDF5; 0 = in blocks of 8 KiB."""
    n, rows, columns = frames.shape
    with h5py.File(BytesIO(), "w") as file:
        compression = hdf5plugin.Bitshuffle(nelems=counts_per_block)
        dataset = file.create_dataset("counts", data=frames, chunks=(1, rows, columns), compression=compression)
        chunks = tuple(dataset.id.read_direct_chunk((i, 0, 0))[1] for i in range(n))
    return Chunks(shape=frames.shape, dtype=frames.dtype, chunks=chunks)


def push(operator, frames, *, came=None, batch=1000):
    """Push the frames that came, in batches of at most `batch`, none of which spans a gap."""
    came = np.ones(len(frames), bool) if came is None else came
    edges = np.flatnonzero(np.diff(came)) + 1
    for run in np.split(np.arange(len(frames)), edges):
        if came[run[0]]:
            for begin in range(run[0], run[-1] + 1, batch):
                part = frames[begin : min(begin + batch, run[-1] + 1)]
                operator.push(FrameBatch(run="run-1", first=begin, frames=part, timestamp_ns=0))
    return operator
