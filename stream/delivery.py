"""How far frames are on their way from a gateway to workers that have them safe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LogState:
    """How one log of a hub is: records in memory, and the windows of those who read them."""

    region: int | None
    """None: partial sums."""
    appended: int
    """Records so far."""
    safe: int
    """Records before this one are safe elsewhere."""
    lost: int
    """Records that went before they were safe."""
    held_bytes: int
    room_bytes: int
    """Both together are the limit."""
    readers: int
    window_bytes: int
    """That readers let be on its way to them."""
    used_bytes: int
    """Of these, what is on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubState:
    """How the hub of a gateway is."""

    logs: Sequence[LogState]
    workers: int
    """That take part in sharing regions."""
    served: int
    """Regions that one of them has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaState:
    """What Kafka said of the records that it was sent."""

    delivered: int
    failed: int
    """It will never have them."""
    waiting: int
    """It does not have them yet."""
    waiting_bytes: int
    """Of frames among these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How far frames are at one moment."""

    lag: float | None
    """How long ago the oldest of those was sent that no worker has safe (s); 0: all are safe. None: not known."""
    lost: Mapping[int, int] | None
    """Records that went before a worker had them safe, by the number of their run; None: not known."""
    unsafe_run: int | None = None
    """The number of the first run of which records would be gone with the gateway; None: of none."""
    n_lost: int | None = None
    """Records that ever went before a worker had them safe; of `lost` the oldest runs are forgotten."""
    through: HubState | KafkaState | None = None
    """What they go through."""
