"""A detector that sees speckle of known dynamics, in process."""

import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, SourceError
from stream.ingest.speckle import Speckle, exponentials
from stream.messages import DTYPES, FrameBatch, Message, Position, RunStart, RunStop
from stream.wire import check_start

MAX_MEAN_COUNTS = 1e6
"""Keeps the brightest speckle within 32 bits."""


class SimulatedSource:
    """A detector that sends speckle of known dynamics, as fast as it can; a `stream.protocols.Source` that can seek.

    Parameters
    ----------
    rate
        (rows, cols) Decay rate Gamma of the field of each pixel (1/s); 0 is static speckle.
    contrast
        beta in g2 = 1 + beta |g1|^2, above 0 and up to 1.
    stretch
        gamma in |g1| = exp(-(Gamma tau)^gamma), above 0 and up to 1. Below 1 at most `MAX_MODES` exponentials stand in
        for it, to 1.2 % of |g1|; the truth in the metadata is these exponentials, and exact.
    mean_counts
        Counts per pixel and frame, a number or (rows, cols).
    n_frames
        Frames of a run.
    frame_time
        Start to start of frames, and exposure (s).
    dtype
        One of `stream.messages.DTYPES`. Its largest value marks masked pixels; counts end at the one below it.
    seed
        The same seed gives the same counts.
    masked
        (rows, cols) True where a pixel gives no counts.
    run
        Identifier of the run, followed by -1, -2, ... for those after the first. None: a random one; a simulation that
        is to go on in another process (`seek`) has to be given one.
    runs
        How many runs there are, each with other noise.
    batch
        Frames of a batch.
    start_time_ns
        Start of the first frame, ns since the Unix epoch. None: now. Runs follow each other without a pause.
    truth_rate
        Gamma of each dynamic bin (1/s), to be told in the metadata: the source does not know bins.
    metadata
        What else goes into `RunStart.metadata`, beside ``n_frames``, ``start_time`` and ``truth``.
    threads
        None: as many as there are cores.

    Raises
    ------
    ConfigError
        A parameter cannot be meant; it is named.

    Notes
    -----
    ``metadata["truth"]`` has ``contrast`` beta, ``stretch`` gamma, ``weights`` [p_j], ``factors`` [f_j], and ``rate``,
    which is `truth_rate`.
    """

    def __init__(
        self,
        *,
        rate: NDArray[np.floating[Any]],
        contrast: float,
        stretch: float = 1.0,
        mean_counts: float | NDArray[np.floating[Any]],
        n_frames: int,
        frame_time: float,
        dtype: str = "<u2",
        seed: int = 0,
        masked: NDArray[np.bool_] | None = None,
        run: str | None = None,
        runs: int = 1,
        batch: int = 64,
        start_time_ns: int | None = None,
        truth_rate: Sequence[float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        threads = threads if threads is not None else os.cpu_count() or 1
        for name, number in {"n_frames": n_frames, "runs": runs, "batch": batch, "threads": threads}.items():
            if number < 1:
                raise ConfigError(f"{name} {number} is less than 1")
        if seed < 0:
            raise ConfigError(f"seed {seed} is negative")
        for name, value in (("contrast", contrast), ("stretch", stretch)):
            if not 0 < value <= 1:
                raise ConfigError(f"{name} {value} is not above 0 and up to 1")
        if not 0 < frame_time < math.inf:
            raise ConfigError(f"frame_time {frame_time} s is not positive")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype} is none of {', '.join(DTYPES)}")
        self._rate = _pixels("rate", rate, np.shape(rate))
        self._mean = _pixels("mean_counts", mean_counts, self._rate.shape)
        if self._mean.max() > MAX_MEAN_COUNTS:
            raise ConfigError(f"mean_counts {self._mean.max():g} is more than {MAX_MEAN_COUNTS:g}")
        self._masked = np.zeros(self._rate.shape, np.bool_) if masked is None else np.asarray(masked, np.bool_)
        if self._masked.shape != self._rate.shape:
            raise ConfigError(f"masked is {self._masked.shape}, rate is {self._rate.shape}")

        self._contrast = contrast
        self._weights, self._factors = exponentials(stretch)
        self._n_frames = n_frames
        self._frame_time = frame_time
        self._dtype = np.dtype(dtype)
        self._seed = seed
        self._run = run if run is not None else str(uuid.uuid4())
        self._places = f"{self._run}:run", f"{self._run}:frame"
        self._n_runs = runs
        self._batch = batch
        self._start_time_ns = start_time_ns if start_time_ns is not None else time.time_ns()
        self._metadata = dict(metadata or {})
        self._truth = {
            "contrast": float(contrast),
            "stretch": float(stretch),
            "weights": self._weights.tolist(),
            "factors": self._factors.tolist(),
        }
        if truth_rate is not None:
            self._truth["rate"] = [float(gamma) for gamma in truth_rate]
        self._threads = threads
        self._run_index = 0
        self._next = -1
        try:
            check_start(self._run_start(self._start_time_ns))
        except ValueError as error:
            raise ConfigError(f"{error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return

    def __iter__(self) -> Iterator[Message]:
        """Yield the messages of the runs; `Source.__iter__`."""
        with ThreadPoolExecutor(self._threads) as threads:
            while self._run_index < self._n_runs:
                yield from self._one_run(threads)

    def position(self) -> Position:
        """Return the run's index and its next frame, -1 before its RunStart."""
        return dict(zip(self._places, (self._run_index, self._next), strict=True))

    def seek(self, position: Position) -> None:
        """Go to a `position`; an empty one is the beginning. The frames before it are computed and thrown away.

        Raises
        ------
        SourceError
            It is that of another source, or there is no such run or frame.
        """
        if position.keys() - {*self._places}:
            raise SourceError(
                f"{self._run}: {dict(position)} is a position of another source: not {', '.join(self._places)}"
            )
        run_index, frame = (position.get(place, first) for place, first in zip(self._places, (0, -1), strict=True))
        if not (0 <= run_index <= self._n_runs and -1 <= frame <= self._n_frames):
            raise SourceError(
                f"no frame {frame} of run {run_index} among {self._n_runs} runs of {self._n_frames} frames"
            )
        self._run_index, self._next = run_index, frame

    def _one_run(self, threads: ThreadPoolExecutor) -> Iterator[Message]:
        frame_ns = self._frame_time * 1e9
        start_ns = self._start_time_ns + round(self._run_index * self._n_frames * frame_ns)
        start = self._run_start(start_ns)
        run = start.run
        if self._next < 0:
            self._next = 0
            yield start
        if self._next < self._n_frames:
            speckle = Speckle(
                intensity=np.where(self._masked, 0, self._mean),
                contrast=self._contrast,
                decay=np.multiply.outer(self._factors, self._rate * self._frame_time),
                weights=self._weights,
                seed=np.random.SeedSequence(self._seed, spawn_key=(self._run_index,)),
            )
            while speckle.next_frame < self._next:
                self._frames(speckle, self._next, threads)
        while self._next < self._n_frames:
            first = self._next
            frames = self._frames(speckle, self._n_frames, threads)
            self._next = speckle.next_frame
            yield FrameBatch(run=run, first=first, frames=frames, timestamp_ns=start_ns + round(first * frame_ns))
        self._run_index, self._next = self._run_index + 1, -1
        yield RunStop(run=run, n_frames=self._n_frames, exit_status="success")

    def _frames(self, speckle: "Speckle", end: int, threads: ThreadPoolExecutor) -> NDArray[Any]:
        n = min(self._batch, end - speckle.next_frame)
        frames = np.empty((n, *self._rate.shape), self._dtype)
        speckle.count(frames.reshape(n, -1), threads)
        frames[:, self._masked] = np.iinfo(self._dtype).max
        frames.flags.writeable = False
        return frames

    def _run_start(self, start_ns: int) -> RunStart:
        rows, columns = self._rate.shape
        start_time = datetime.fromtimestamp(start_ns / 1e9, UTC).isoformat()
        return RunStart(
            run=self._run if self._run_index == 0 else f"{self._run}-{self._run_index}",
            shape=(rows, columns),
            dtype=self._dtype.str,
            saturation_value=int(np.iinfo(self._dtype).max) - 1,
            frame_time=self._frame_time,
            count_time=self._frame_time,
            metadata={**self._metadata, "n_frames": self._n_frames, "start_time": start_time, "truth": self._truth},
        )


def _pixels(name: str, values: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    if len(shape) != 2 or 0 in shape or np.shape(values) not in ((), shape):
        raise ConfigError(f"{name} is {np.shape(values)}, not rows and columns")
    pixels = np.broadcast_to(np.asarray(values, np.float64), shape)
    wrong = ~((pixels >= 0) & (pixels < math.inf))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ConfigError(f"{name} has {pixels[row, column]} at row {row}, column {column}: not a number from 0 on")
    return pixels
