"""What one part of the page shows, as bytes for the browser."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.messages import Arrays

ALIGNED = 8
"""Arrays begin at multiples of this, so that the browser looks at them where they are."""


@dataclass(frozen=True, slots=True)
class Section:
    """A version of one part of the page. Packed once, for all browsers."""

    name: str
    version: int
    packed: bytes
    frame_end: float | None = None
    """When the newest frame in it ended (`time.monotonic`); None where that is not known, or not new."""


def pack(name: str, facts: Mapping[str, Any], arrays: Arrays) -> bytes:
    """Return a section: the length of a JSON head (<u4), the head, and the arrays one after the other.

    The head is ``facts`` with ``section``, its name, and ``arrays``: of each its type (numpy's ``str`` of it), shape
    and offset in bytes after the head. Numbers that are not finite are null in the head; in arrays they are as they
    are.
    """
    table: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for key, values in arrays.items():
        data = np.ascontiguousarray(values).tobytes()
        table[key] = [values.dtype.str, list(values.shape), offset]
        padding = -len(data) % ALIGNED
        parts.append(data + bytes(padding))
        offset += len(data) + padding
    head = json.dumps({**_plain(facts), "section": name, "arrays": table}, allow_nan=False).encode()
    head += b" " * (-(len(head) + 4) % ALIGNED)
    return b"".join([len(head).to_bytes(4, "little"), head, *parts])


def floats(arrays: Arrays, *names: str) -> dict[str, NDArray[np.float64]]:
    """Return some of the arrays of a result as the browser knows them."""
    return {name: np.asarray(arrays[name], "<f8") for name in names}


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value
