"""What travels: from a source to the operators (`Message`) and from the pipeline to the sinks (`Output`).

Plain frozen dataclasses, validated once where bytes become messages (`stream.wire`, `stream.ingest`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
"""Named arrays: a result, or the state of an operator."""

Position = Mapping[str, int]
"""Where a source goes on after a restart, e.g. ``{"topic:partition": next_offset}``; empty if it cannot seek."""

ExitStatus = Literal["success", "abort", "fail"]

DTYPES = ("|u1", "<u2", "<u4")
"""Counts as detectors send them; every source converts to little-endian unsigned integers."""


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
class FrameBatch:
    """Frames first, first + 1, ... A frame that never came is a jump in `first`."""

    run: str
    region: int = 0
    first: int
    """Counted from 0 at RunStart."""
    frames: NDArray[np.unsignedinteger[Any]]
    """(n >= 1, rows, columns), counts; read-only, valid until the next message."""
    timestamp_ns: int
    """Start of frame `first`, ns since the Unix epoch."""


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
