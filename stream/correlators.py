"""The operators that a configuration asks for, with their kernels compiled.

A worker needs no more of what is configured, and is to start fast: so they are not made by `stream.assembly`, which
imports every source and sink.
"""

import math
import threading
from collections.abc import Callable, Iterator

import numpy as np

from stream import kernel_cache
from stream.config import Configuration, check
from stream.errors import ConfigError
from stream.messages import DTYPES, Events, FrameBatch, RunStart
from stream.operators.intensity import Intensity
from stream.operators.kernels import CACHE
from stream.operators.multitau import MultiTau
from stream.operators.roimap import RoiMap
from stream.operators.scattering import Scattering
from stream.operators.twotime import TwoTime, partial_bytes
from stream.protocols import Operator

Make = Callable[[RunStart], list[Operator]]
"""Makes the operators of a run."""


def operators_of(configuration: Configuration, roimap: RoiMap) -> Make:
    """Return what makes the operators that are configured."""
    operators, threads = configuration.operators, configuration.threads

    def make(start: RunStart) -> list[Operator]:
        made: list[Operator] = [MultiTau(start, roimap, threads=threads, **operators.multitau.model_dump())]
        if operators.scattering:
            made.append(Scattering(start, roimap, threads=threads))
        if operators.intensity:
            made.append(Intensity(start, roimap, threads=threads))
        if operators.twotime is not None:
            made.append(TwoTime(start, roimap, threads=threads, **operators.twotime.model_dump()))
        return made

    return make


def check_partials(configuration: Configuration, roimap: RoiMap, most: int) -> None:
    """Refuse operators of which partial sums may be more than so many bytes.

    Raises
    ------
    ConfigError
        Says what would fit.
    """
    section = configuration.operators.twotime
    if section is None:
        return
    every = np.arange(1, roimap.n_dynamic + 1)
    rows = roimap.dynamic_of_static if section.normalisation == "static" else every
    n_rows = int(np.isin(rows, section.bins or every).sum())
    needed = partial_bytes(section.frames, section.levels, n_rows)
    if needed > most:
        fits = (n for n in range(section.frames, 1, -1) if partial_bytes(n, section.levels, n_rows) <= most)
        frames = next(fits, None)
        raise ConfigError(
            f"twotime: partial sums of {section.frames} frames and {n_rows} {section.normalisation} bins may be "
            f"{needed / 1e6:.3g} MB, more than the {most / 1e6:.3g} MB of a record; "
            + (f"{frames} frames would fit" if frames else "take a map with fewer bins")
        )


def compile_kernels(make: Make, roimap: RoiMap, say: Callable[[str], None]) -> None:
    """Let a few frames of every kind through, so that no compiler runs while frames come."""
    n_rows, n_columns = roimap.shape
    row = int(np.argmax(roimap.static_roi_map.any(axis=1)))

    def exercise() -> None:
        for dtype in DTYPES:
            start = RunStart(
                run="",
                shape=(min(8, n_rows - row), n_columns),
                origin=(row, 0),
                detector_shape=roimap.shape,
                dtype=dtype,
                saturation_value=int(np.iinfo(dtype).max) - 1,
                frame_time=1.0,
                count_time=1.0,
            )
            for operator in make(start):
                for batch in _every_kind(start):
                    operator.push(batch)
                    operator.result()
                    operator.restore(operator.snapshot())

    slow = threading.Timer(1.5, say, ["compiling the kernels (once per installation)"])
    slow.start()
    try:
        kernel_cache.fill(CACHE, exercise)
    finally:
        slow.cancel()


def compile_all(say: Callable[[str], None]) -> None:
    """Compile the kernels of every operator and of both kinds of error bars."""
    bins = np.ones((8, 256), np.int32)
    roimap = RoiMap(static_roi_map=bins, dynamic_roi_map=bins)
    for error in ("static", "pixel"):
        # Where frames come from does not matter: nothing is opened.
        operators = {"multitau": {"error": error}, "twotime": {"frames": 2}}
        document = {"source": {"address": "any.h5"}, "qmap": "any", "operators": operators}
        compile_kernels(operators_of(check(document), roimap), roimap, say)


def _every_kind(start: RunStart) -> Iterator[FrameBatch]:
    """Yield frames that are dark, dim, as bright as can be, and too bright; dense, and after a gap as events."""
    counts = np.zeros((4, math.prod(start.shape)), start.dtype)
    counts[1] = 1
    counts[2] = np.iinfo(start.dtype).max - 1
    counts[3, ::2] = np.iinfo(start.dtype).max
    of_frame, pixels = np.nonzero(counts)
    frames = counts.reshape(4, *start.shape)
    events = Events(
        shape=frames.shape,
        offsets=np.searchsorted(of_frame, np.arange(5)),
        pixels=pixels.astype(np.uint32),
        counts=counts[of_frame, pixels],
    )
    frames.flags.writeable = False
    # One frame has no delays yet, and after a gap that long there are all of them.
    yield FrameBatch(run="", first=0, frames=frames[:1], timestamp_ns=0)
    yield FrameBatch(run="", first=1, frames=frames[1:], timestamp_ns=0)
    yield FrameBatch(run="", first=1 << 20, frames=events, timestamp_ns=0)
