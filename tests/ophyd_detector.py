"""A detector of ophyd-async that sees speckle, and writes HDF5 as it comes."""

import asyncio
import uuid
from contextlib import suppress

import h5py
from ophyd_async.core import (
    DetectorAcquireLogic,
    DetectorDataLogic,
    DetectorTriggerLogic,
    StandardDetector,
    StreamResourceDataProvider,
    StreamResourceInfo,
    soft_signal_r_and_setter,
)

from stream.assembly import simulated
from stream.messages import FrameBatch

DATASET = "/entry/data/data"
FRAME_TIME = 1e-3
BATCH = 25
RATE = 100.0
"""Of the sample, at the second bin (1/s)."""


class SpeckleDetector(StandardDetector):
    """Its file is `path`, which is closed where `file` is None; `taken` frames were written."""

    def __init__(self, directory, roimap, name="", seed=0):
        self.directory, self.roimap, self.seed = directory, roimap, seed
        self.path = self.file = self.task = None
        self.n_frames = 0
        self.taken, self.set_taken = soft_signal_r_and_setter(int)
        self.add_detector_logics(_Trigger(self), _Acquire(self), _Data(self))
        super().__init__(name=name)

    async def write(self):
        dataset = self.file[DATASET]
        before = len(dataset)
        loop = asyncio.get_running_loop()
        began = loop.time()
        source = simulated(
            self.roimap,
            diffusion=RATE / self.roimap.dynamic_q[1] ** 2,
            contrast=0.5,
            stretch=1.0,
            mean_counts=1.0,
            n_frames=self.n_frames,
            frame_time=FRAME_TIME,
            seed=self.seed,
            sample="speckle",
            batch=BATCH,
        )
        for message in source:
            if isinstance(message, FrameBatch):
                n = message.first + len(message.frames)
                await asyncio.sleep(began + n * FRAME_TIME - loop.time())
                dataset.resize(before + n, axis=0)
                dataset[before + message.first :] = message.frames
                dataset.flush()
                self.set_taken(before + n)


class _Trigger(DetectorTriggerLogic):
    def __init__(self, detector):
        self.detector = detector

    async def prepare_internal(self, num, livetime, deadtime):
        self.detector.n_frames = num


class _Acquire(DetectorAcquireLogic):
    def __init__(self, detector):
        self.detector = detector

    async def start_acquiring(self):
        self.detector.task = asyncio.create_task(self.detector.write())

    async def wait_for_idle(self):
        await self.detector.task

    async def ensure_stopped(self):
        if self.detector.task is not None:
            self.detector.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.detector.task
            self.detector.task = None


class _Data(DetectorDataLogic):
    def __init__(self, detector):
        self.detector = detector

    async def prepare_unbounded(self, datakey_name):
        detector, shape = self.detector, self.detector.roimap.shape
        detector.path = detector.directory / f"{uuid.uuid4()}.h5"
        detector.file = h5py.File(detector.path, "w", libver="latest")
        detector.file.create_dataset(DATASET, (0, *shape), "<u2", maxshape=(None, *shape), chunks=(1, *shape))
        detector.file.swmr_mode = True
        detector.set_taken(0)
        frames = StreamResourceInfo(
            data_key=datakey_name,
            shape=shape,
            chunk_shape=(1, *shape),
            dtype_numpy="<u2",
            parameters={"dataset": DATASET},
        )
        return StreamResourceDataProvider(
            uri=f"file://localhost{detector.path}",
            resources=[frames],
            mimetype="application/x-hdf5",
            collections_written_signal=detector.taken,
        )

    async def stop(self):
        if self.detector.file is not None:
            self.detector.file.close()
            self.detector.file = None
