"""The mean image and the map of bins, small enough for a browser."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.operators.roimap import GEOMETRY, RoiMap

LARGEST = 512
"""Rows and columns that are sent."""


def block_of(shape: tuple[int, int]) -> int:
    """Return how many rows and columns of the detector make one pixel of the picture."""
    return -(-max(shape) // LARGEST)


def block_mean(image: NDArray[np.float64], block: int) -> NDArray[np.float32]:
    """Return the mean over blocks of pixels, of those that are known; NaN where none is."""
    rows, columns = image.shape
    if block == 1:
        return image.astype(np.float32)
    edges = [np.arange(0, size, block) for size in (rows, columns)]
    known = np.isfinite(image)
    sums = np.add.reduceat(np.add.reduceat(np.where(known, image, 0.0), edges[0], 0), edges[1], 1)
    n = np.add.reduceat(np.add.reduceat(known.view(np.int8), edges[0], 0, dtype=np.int32), edges[1], 1)
    with np.errstate(invalid="ignore"):
        return np.where(n > 0, sums / np.maximum(n, 1), np.nan).astype(np.float32)


def on_the_detector(
    image: NDArray[np.float64], origin: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """Return an image of the whole detector; NaN where there is none."""
    if image.shape == shape:
        return image
    whole = np.full(shape, np.nan)
    row, column = (int(at) for at in origin)
    part = whole[row : row + image.shape[0], column : column + image.shape[1]]
    part[...] = image[: part.shape[0], : part.shape[1]]
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """A map as the page needs it. Arrays are of the picture, not of the detector."""

    facts: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    expected: NDArray[np.bool_]
    """(rows, columns) of the picture where counts are expected: not masked."""
    dynamic_of_static: NDArray[np.int64]
    dynamic_q: NDArray[np.float64]

    @classmethod
    def of(cls, roimap: RoiMap) -> "Bins":
        """Make the picture of a map: of every block the bin of its middle pixel."""
        block = block_of(roimap.shape)
        # A block at the edge may have no middle.
        rows, columns = (np.minimum(np.arange(0, size, block) + block // 2, size - 1) for size in roimap.shape)
        bins = roimap.dynamic_roi_map[np.ix_(rows, columns)]
        known = roimap.arrays()
        mask = np.asarray(known["mask"])
        usable = block_mean(np.where(mask > 0, 1.0, np.nan), block) if mask.shape == roimap.shape else bins
        return cls(
            facts={
                "shape": list(roimap.shape),
                "block": block,
                "n_dynamic": roimap.n_dynamic,
                "geometry": {name: float(known[name]) for name in GEOMETRY},
            },
            arrays={
                "bins": bins.astype("<i4"),
                "q": roimap.dynamic_q,
                "phi": roimap.dynamic_phi,
                "static_q": roimap.static_q,
                "dynamic_of_static": roimap.dynamic_of_static.astype("<i4"),
            },
            expected=np.isfinite(usable) & (usable > 0),
            dynamic_of_static=roimap.dynamic_of_static,
            dynamic_q=roimap.dynamic_q,
        )
