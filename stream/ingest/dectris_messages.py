"""What a Dectris detector says, whichever version of its stream it speaks. Pure: no socket, no clock."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import lz4.block
import numpy as np
from dectris.compression import decompress
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stream.blocks import HEADER, MAX_BLOCK_BYTES
from stream.errors import DecodeError
from stream.messages import RunStart
from stream.wire import MAX_COUNT, MAX_FRAME_BYTES, MAX_SECONDS, check_start, shown, words

logger = logging.getLogger(__name__)

Codec = Literal["none", "bslz4", "lz4", "lz4 block"]
"""lz4 is framed as by the HDF5 filter (Stream V2); "lz4 block" is one bare LZ4 block (Stream V1)."""

Count = Annotated[int, Field(ge=0, lt=MAX_COUNT)]
Planned = Annotated[int, Field(ge=1, lt=2**31)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]

MAX_TEXT = 2**16
"""Characters of one text in the metadata."""


class Fields(BaseModel):
    """Named values of a message: what is not named here is ignored, what is named must fit."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The detector was armed. It does not say yet which shape and type its images have: they do."""

    run: str
    n_frames: int
    """Planned."""
    frame_time: float
    count_time: float
    armed_ns: int | None
    """ns since the Unix epoch; None if it did not say."""
    masks: Mapping[str, NDArray[np.bool_]]
    """By channel, (rows, columns): True where the detector left a pixel in that should be out. Empty if it did not."""
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """One image of one channel, still compressed. Its sizes are known to fit."""

    shape: tuple[int, int]
    """Rows, columns."""
    dtype: str
    codec: Codec
    data: bytes | memoryview

    def __post_init__(self) -> None:
        rows, columns = self.shape
        where = f"{shown(rows)} x {shown(columns)} pixels of {self.dtype}"
        if min(self.shape) < 1 or self.nbytes > MAX_FRAME_BYTES:
            raise DecodeError(f"{where} are not 1 to {MAX_FRAME_BYTES} bytes")
        if self.codec == "none" and len(self.data) != self.nbytes:
            raise DecodeError(f"{where} are {self.nbytes} bytes, not {len(self.data)}")
        if self.codec in ("bslz4", "lz4"):
            if len(self.data) < HEADER.size:
                raise DecodeError(f"{self.codec}: {len(self.data)} bytes are not a compressed image")
            declared, block = HEADER.unpack_from(self.data)
            if declared != self.nbytes:
                raise DecodeError(f"{self.codec}: {where} are {self.nbytes} bytes, not the {declared} declared")
            if block > max(self.nbytes, MAX_BLOCK_BYTES):
                raise DecodeError(f"{self.codec}: a block of {block} bytes in an image of {self.nbytes}")

    @property
    def nbytes(self) -> int:
        """Bytes of the image once decompressed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def decompress(self) -> NDArray[np.unsignedinteger[Any]]:
        """Return the counts, (rows, columns), read-only.

        Raises
        ------
        DecodeError
            The compressed bytes are damaged.
        """
        try:
            match self.codec:
                case "none":
                    counts = self.data
                case "lz4 block":
                    counts = lz4.block.decompress(self.data, uncompressed_size=self.nbytes)
                case _:
                    counts = decompress(self.data, self.codec, elem_size=np.dtype(self.dtype).itemsize)
        except (RuntimeError, ValueError, lz4.block.LZ4BlockError) as error:
            raise DecodeError(f"{self.codec}: {error}") from None
        if len(counts) != self.nbytes:
            raise DecodeError(f"{self.codec}: gave {len(counts)} bytes, not {self.nbytes}")
        return np.frombuffer(counts, self.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One exposure, every channel of it."""

    run: str
    number: int
    """Counted from 0."""
    start_ns: int
    """On the detector's clock."""
    clock_ns: int | None
    """When the detector's clock was 0, ns since the Unix epoch; None if it did not say."""
    channels: Mapping[str, Pixels]
    """In the order the detector sent them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The detector was disarmed."""

    run: str


FieldsT = TypeVar("FieldsT")


def validate(check: Callable[[Any], FieldsT], value: object, where: str) -> FieldsT:
    """Return `check(value)`, one of pydantic's validators.

    Raises
    ------
    DecodeError
        Names the field and its value.
    """
    try:
        return check(value)
    except ValidationError as error:
        raise DecodeError(f"{where}: {words(error)}") from None


def metadata(described: Mapping[str, Any], user: object, *, n_frames: int) -> dict[str, Any]:
    """Return the metadata of a RunStart.

    Parameters
    ----------
    described
        What the detector says, under our names and in our units; None where it does not.
    user
        What the user asked the detector to pass on (`user_data`, header appendix): a map, or JSON text of one, whose
        entries win over the detector's, since somebody meant them. Anything else is left out.
    n_frames
        Planned.
    """
    entries = _usable({name: value for name, value in described.items() if value is not None}, "detector")
    entries["n_frames"] = n_frames
    merged = {**entries, **_usable(_entries(user), "user"), "n_frames": n_frames}
    if _travels(merged):
        return merged
    logger.warning("user data left out: too large, too deep or not plain")
    return entries


def kilo(value: object) -> Any:
    """Return a thousandth; what is no number that can be divided as it is, for `metadata` to leave out."""
    return value / 1000 if isinstance(value, int | float) and abs(value) < _LARGE else value


def _entries(user: object) -> dict[str, Any]:
    try:
        plain = json.loads(user if isinstance(user, str) else json.dumps(user))
    except (ValueError, TypeError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


_LARGE = 2**63

_GEOMETRY = {
    "incident_energy": 0,
    "detector_distance": 0,
    "x_pixel_size": 0,
    "y_pixel_size": 0,
    "beam_center_x": -_LARGE,
    "beam_center_y": -_LARGE,
}
"""What is calculated with, and what it must be larger than. Detectors send 0 for what nobody told them."""


def _usable(entries: dict[str, Any], whose: str) -> dict[str, Any]:
    useless = {
        name: value
        for name, value in entries.items()
        if (name in _GEOMETRY and not _is_number_above(_GEOMETRY[name], value))
        or (isinstance(value, str) and len(value) > MAX_TEXT)
    }
    if useless:
        logger.warning("left out of what the %s says: %s", whose, shown(useless))
    return {name: value for name, value in entries.items() if name not in useless}


def _is_number_above(bound: int, value: object) -> bool:
    return isinstance(value, int | float) and bound < value < _LARGE


def _travels(entries: dict[str, Any]) -> bool:
    """Tell whether our own wire can carry it: what a gateway or a checkpoint holds is bounded there."""
    try:
        check_start(RunStart(run="-", shape=(1, 1), dtype="|u1", frame_time=1.0, count_time=1.0, metadata=entries))
    except ValueError:
        return False
    return True
