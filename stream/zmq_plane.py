"""The plane over ZeroMQ: workers and mergers come to a hub in the gateway's own process. A `stream.plane.Plane`."""

import logging
import threading

from stream.curve import ClientKeys, GatewayKeys
from stream.dealer import Hub as Address
from stream.hub import PARTIALS, Hub, frames_log
from stream.hub_group import HubGroup
from stream.ingest.hub import HubResults, HubSource
from stream.sinks.hub import QUEUE_BYTES, HubFrames, HubSink

_log = logging.getLogger(__name__)

LOOPBACK = ("tcp://127.", "tcp://localhost:", "tcp://[::1]:")


class ZmqPlane:
    """Everything in memory and at once: what is not safe when the gateway ends is lost.

    Parameters
    ----------
    address
        ``tcp://host:port`` where the gateway listens.
    beamline
        Its name.
    keys
        Of a gateway, or of those who go there. None: neither encrypted nor authenticated.
    """

    partial_bytes = QUEUE_BYTES

    def __init__(self, address: str, beamline: str, keys: ClientKeys | GatewayKeys | None = None) -> None:
        self.beamline = beamline
        self._address = address
        self._keys = keys

    def gateway(self, n_regions: int, *, ring_bytes: int, waits: bool, stop: threading.Event) -> HubFrames:
        """Return where frames of all regions go; see `stream.plane.Plane`."""
        keys = self._keys if isinstance(self._keys, GatewayKeys) else None
        if keys is None and not self._address.startswith(LOOPBACK):
            _log.warning("whoever reaches %s reads the frames and writes results: see xpcs-stream keys", self._address)
        hub = Hub(self._address, self.beamline, n_regions, ring_bytes=ring_bytes, keys=keys)
        return HubFrames(hub, waits=waits, stop=stop)

    def wait(self, stop: threading.Event) -> None:
        """Return at once: a gateway may come at any time."""

    def group(self, name: str | None) -> HubGroup:
        """Return a member of the group of workers."""
        return HubGroup(self._hub(), name=name)

    def frames(self, region: int) -> HubSource:
        """Return the frames of a region."""
        return HubSource(self._hub(), frames_log(region))

    def partials(self, stop: threading.Event) -> HubSink:
        """Return where workers publish their partial sums."""
        return HubSink(self._hub(), PARTIALS, stop=stop)

    def results(self) -> HubResults:
        """Return all partial sums."""
        return HubResults(self._hub(), PARTIALS)

    def n_logs(self) -> int:
        """Return 1: all regions are in one."""
        return 1

    def _hub(self) -> Address:
        return Address(self._address, self.beamline, self._keys if isinstance(self._keys, ClientKeys) else None)
