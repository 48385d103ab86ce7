"""What travels: from a source to the operators (`Message`) and from the pipeline to the sinks (`Output`).

Plain frozen dataclasses, validated once where bytes become messages (`stream.wire`, `stream.ingest`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
"""Named arrays: a result, or the state of an operator."""

Position = Mapping[str, int]
"""Where a source goes on after a restart, e.g. ``{"topic:partition": next_offset}``; empty if it cannot seek."""

ExitStatus = Literal["success", "abort", "fail"]

DTYPES = ("|u1", "<u2", "<u4")
"""Counts as detectors send them; every source converts to little-endian unsigned integers."""

Give = Literal["frames", "photons", "chunks"]
"""What a source makes of frames in bitshuffle and LZ4: their counts, `Events` where they are dim, or `Chunks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """A detector was armed. Names as in NXxpcs and NXdetector.

    `metadata` holds what else the sender knows, plain numbers, strings, lists and maps. Names used by our own parts:
    ``n_frames`` (frames planned), ``start_time`` and ``announced`` (when the detector and when our pipeline began, ISO
    8601), ``incident_energy`` (keV), ``detector_distance`` (m),
    ``beam_center_x``, ``beam_center_y`` (pixel), ``x_pixel_size``, ``y_pixel_size`` (m), ``sample``, ``scan_number``,
    ``detector`` (description), ``truth`` (what a simulated detector knows, see `stream.ingest.simulated`).
    """

    run: str
    """Identifier of the run, the same in all its messages."""
    region: int = 0
    """Which band of detector rows this stream carries."""
    shape: tuple[int, int]
    """Rows and columns streamed (pixel)."""
    origin: tuple[int, int] = (0, 0)
    """First row and column on the whole detector."""
    detector_shape: tuple[int, int] | None = None
    """Rows and columns of the whole detector; None: this stream carries all of it."""
    dtype: str
    """One of `DTYPES`."""
    saturation_value: int | None = None
    """The largest value that is a count: pixels above it are masked or overflown. None: every value is a count."""
    frame_time: float
    """Start to start of frames (s): tau = delay * frame_time."""
    count_time: float
    """Exposure (s), at most `frame_time`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """Frames of few photons: only the pixels that are not dark. Cut and iterated over like an array of frames."""

    shape: tuple[int, int, int]
    """Frames, rows, columns."""
    offsets: NDArray[np.int64]
    """(n + 1,) the events of frame i are offsets[i]:offsets[i + 1]; from 0 to n_event. The arrays become read-only."""
    pixels: NDArray[np.uint32]
    """(n_event,) row * columns + column, strictly ascending within a frame."""
    counts: NDArray[np.unsignedinteger[Any]]
    """(n_event,) above 0, of one of `DTYPES`."""

    def __post_init__(self) -> None:
        # Kernels read the arrays by address, and would be compiled once more for those that can be written to.
        for array in (self.offsets, self.pixels, self.counts):
            if not array.flags.c_contiguous:
                raise ValueError("events with gaps between them in memory")
            array.flags.writeable = False

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Of the counts."""
        return self.counts.dtype

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.shape[0]

    def __getitem__(self, frames: slice) -> Self:
        """Return some of the frames, without copying events. The step is 1."""
        first, end, step = frames.indices(len(self))
        if step != 1:
            raise ValueError(f"events are cut in steps of 1, not {step}")
        end = max(first, end)
        offsets = self.offsets[first : end + 1]
        events = slice(offsets[0], offsets[-1])
        return type(self)(
            shape=(end - first, *self.shape[1:]),
            offsets=offsets - offsets[0],
            pixels=self.pixels[events],
            counts=self.counts[events],
        )

    def __iter__(self) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
        """Yield frame after frame with its dark pixels, (rows, columns)."""
        return (self[i : i + 1].dense()[0] for i in range(len(self)))

    def band(self, first: int, shape: tuple[int, int]) -> Self:
        """Return frames of `shape`, whose pixels are first, first + 1, ... of these."""
        begin, end = np.uint32(first), first + shape[0] * shape[1]
        inside = np.flatnonzero((self.pixels >= begin) & (self.pixels < end))
        return type(self)(
            shape=(len(self), *shape),
            offsets=np.searchsorted(inside, self.offsets),
            pixels=self.pixels[inside] - begin,
            counts=self.counts[inside],
        )

    def dense(self) -> NDArray[np.unsignedinteger[Any]]:
        """Return the frames with their dark pixels, (n, rows, columns)."""
        n, rows, columns = self.shape
        frames = np.zeros(self.shape, self.dtype)
        of_frame = np.repeat(np.arange(n), np.diff(self.offsets))
        frames.reshape(n, rows * columns)[of_frame, self.pixels] = self.counts
        return frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """Frames as their detector compressed them: for the way from a gateway to its workers, see `stream.blocks`.

    A source yields them where it is asked for them, `stream.regions` cuts them, `stream.wire` carries them, and the
    source at the other end makes them NDArrays or `Events`. Pipelines and operators never see them.
    """

    shape: tuple[int, int, int]
    """Frames, rows, columns."""
    dtype: np.dtype[np.unsignedinteger[Any]]
    """One of `DTYPES`."""
    skip: int = 0
    """How many counts stand in each chunk before those of its frame."""
    chunks: tuple[bytes | memoryview, ...]
    """Of each frame one chunk of HDF5 in bitshuffle and LZ4. All begin with the same header of 12 bytes."""

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.shape[0]

    def __getitem__(self, frames: slice) -> Self:
        """Return some of the frames. The step is 1."""
        first, end, step = frames.indices(len(self))
        if step != 1:
            raise ValueError(f"chunks are cut in steps of 1, not {step}")
        chunks = self.chunks[first:end]
        return replace(self, shape=(len(chunks), *self.shape[1:]), chunks=chunks)


Frames = NDArray[np.unsignedinteger[Any]] | Events | Chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameBatch:
    """Frames first, first + 1, ... A frame that never came is a jump in `first`."""

    run: str
    region: int = 0
    first: int
    """Counted from 0 at RunStart."""
    frames: Frames
    """(n >= 1, rows, columns), counts; read-only. A source never writes to them again, so that they may be kept.

    `Chunks` on the way from a gateway to its workers only.
    """
    timestamp_ns: int
    """Start of frame `first`, ns since the Unix epoch."""

    @property
    def unpacked(self) -> NDArray[np.unsignedinteger[Any]] | Events:
        """The frames, for those who never get `Chunks`; TypeError if they are."""
        if isinstance(self.frames, Chunks):
            raise TypeError(f"frames {self.first} and on of run {self.run} are still compressed")
        return self.frames


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStop:
    """The detector was disarmed."""

    run: str
    region: int = 0
    n_frames: int
    """Frames the detector sent; 0 from a source that came too late to know."""
    exit_status: ExitStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A message came that could not be read. The stream goes on; its frames will show as lost."""

    reason: str
    """One line that names the thing and the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an operator knows after `n_frames`; replaces its earlier results of the run.

    (run, region, operator, n_frames) is the key: writing twice is harmless.
    """

    run: str
    region: int = 0
    operator: str
    n_frames: int
    final: bool
    """An interim result may be lost, a final one must arrive."""
    arrays: Arrays


Message = RunStart | FrameBatch | RunStop | Rejected
Output = RunStart | FrameBatch | RunStop | Result
