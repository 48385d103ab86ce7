"""A detector in bands of rows, each a stream of its own: pixels are independent of each other, frames are not."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from stream import blocks
from stream.errors import ConfigError
from stream.messages import Chunks, Events, FrameBatch, Frames, RunStart, RunStop


class Regions:
    """Cuts messages into those of n regions.

    Parameters
    ----------
    n
        Bands of rows, as equal as can be.
    """

    def __init__(self, n: int) -> None:
        self._n = n

    def cut(self, message: RunStart | FrameBatch | RunStop) -> Iterator[RunStart | FrameBatch | RunStop]:
        """Yield what of a message is for each region. Every RunStart says in its metadata how many `regions` there are.

        Raises
        ------
        ConfigError
            The detector has fewer rows.
        """
        match message:
            case RunStart():
                for region, (begin, end) in enumerate(self._bands(message.shape[0])):
                    yield replace(
                        message,
                        region=region,
                        shape=(end - begin, message.shape[1]),
                        origin=(message.origin[0] + begin, message.origin[1]),
                        detector_shape=message.detector_shape or message.shape,
                        metadata={**message.metadata, "regions": self._n},
                    )
            case FrameBatch(frames=frames):
                for region, band in enumerate(_cut(frames, self._bands(frames.shape[1]))):
                    yield replace(message, region=region, frames=band)
            case RunStop():
                for region in range(self._n):
                    yield replace(message, region=region)

    def _bands(self, n_rows: int) -> Iterator[tuple[int, int]]:
        if n_rows < self._n:
            raise ConfigError(f"{n_rows} rows cannot be cut into {self._n} regions")
        return pairwise(n_rows * i // self._n for i in range(self._n + 1))


def _cut(frames: Frames, bands: Iterator[tuple[int, int]]) -> Iterator[Frames]:
    match frames:
        case Chunks():
            yield from blocks.bands(frames, bands)
        case Events():
            columns = frames.shape[2]
            for begin, end in bands:
                yield frames.band(begin * columns, (end - begin, columns))
        case _:
            for begin, end in bands:
                yield frames[:, begin:end]
