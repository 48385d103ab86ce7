"""How far frames are on their way from a gateway to workers that have them safe."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How far frames are at one moment."""

    lag: float | None
    """How long ago the oldest of those was sent that no worker has safe (s); 0: all are safe. None: not known."""
    lost: Mapping[int, int] | None
    """Records that went before a worker had them safe, by the number of their run; None: not known."""
    unsafe_run: int | None = None
    """The number of the first run of which records would be gone with the gateway; None: of none."""
