"""Batches of frames, cut into what fits into records."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stream.messages import Chunks, Events, FrameBatch, Output, RunStart

HEADER_BYTES = 2048
"""More than key, header and framing of any frames, but for the lengths of `Chunks`."""

LENGTH_BYTES = 5
"""At most, of one of those in the header."""


class Pieces:
    """Cuts what is written, which it sees all of.

    Parameters
    ----------
    n_bytes
        Of a record at most, unless a single frame is larger.
    """

    def __init__(self, n_bytes: int) -> None:
        self._room = n_bytes - HEADER_BYTES
        self._starts: dict[int, RunStart] = {}

    def cut(self, output: Output) -> Iterator[Output]:
        """Yield frames in pieces, anything else as it is."""
        if isinstance(output, RunStart):
            self._starts[output.region] = output
        if not isinstance(output, FrameBatch):
            yield output
            return
        ends = payload_ends(output)
        first = 0
        while first < len(output.frames):
            end = max(first + 1, int(np.searchsorted(ends, ends[first] + self._room, "right")) - 1)
            yield replace(
                output,
                first=output.first + first,
                frames=output.frames[first:end],
                timestamp_ns=output.timestamp_ns + (self._ns_of(output, first) if first else 0),
            )
            first = end

    def _ns_of(self, batch: FrameBatch, n: int) -> int:
        """Return how long n frames take (ns); 0 if we came later than the start of the run, which told it."""
        start = self._starts.get(batch.region)
        return round(n * start.frame_time * 1e9) if start is not None and start.run == batch.run else 0


def payload_ends(batch: FrameBatch) -> NDArray[np.int64]:
    """Return where each frame ends in the payload (bytes), and its length in the header, after a leading 0."""
    n = np.arange(len(batch.frames) + 1)
    match batch.frames:
        case Events(offsets=offsets, dtype=dtype):
            return 8 * n + offsets * (4 + dtype.itemsize)
        case Chunks(chunks=chunks):
            return LENGTH_BYTES * n + np.cumsum([0, *map(len, chunks)], dtype=np.int64)
        case frames:
            return n * (frames.nbytes // len(frames))
