"""Regions shared out among workers by the hub of a gateway (`stream.sharing`)."""

import logging
import threading
import time
import uuid

from stream.dealer import Dealer, Hub
from stream.errors import SourceError
from stream.hub_wire import Here, Yours
from stream.serving import Serving
from stream.sharing import SESSION

_log = logging.getLogger(__name__)

BEAT = 0.25
"""Seconds between two signs of life."""


class HubGroup:
    """A member of the group of workers of a gateway. A `stream.plane.Group`.

    Parameters
    ----------
    hub
        Where the gateway is.
    name
        No two alive may have the same: the one that comes later has it. One that is started again under its name gets
        its regions back at once. None: a name of its own.
    """

    def __init__(self, hub: Hub, *, name: str | None = None) -> None:
        self._hub = hub
        self._process = uuid.uuid4().hex
        self._name = name or self._process
        self._heard = 0
        self._heard_at: float | None = None
        """When the hub answered last, monotonic; None: it is away, and that was said."""

    def take_part(self, serving: Serving, stop: threading.Event) -> None:
        """Serve the regions that are ours until `stop` is set.

        Raises
        ------
        SourceError
            The gateway does not let us in: its keys, another beamline, another worker of our name.
        XpcsStreamError
            A region could not be correlated.
        """
        self._heard_at = time.monotonic()
        with Dealer(self._hub, SourceError) as dealer:
            try:
                while not stop.is_set():
                    self._beat(dealer, serving)
                    stop.wait(BEAT)
                serving.release(serving.regions)
                while serving.regions:
                    # Still a member: nobody shall begin before the last checkpoint is written.
                    dealer.say(self._here(serving))
                    serving.wait(BEAT)
                    serving.tend()
            finally:
                serving.leave(serving.regions)
                dealer.say(self._here(serving, is_leaving=True))

    def _beat(self, dealer: Dealer, serving: Serving) -> None:
        dealer.say(self._here(serving))
        yours, _ = dealer.hear(BEAT)
        while isinstance(newer := dealer.hear(0)[0], Yours):
            yours = newer
        if isinstance(yours, Yours):
            self._heard = yours.number
            serving.release(set(serving.regions) - set(yours.regions))
            for region in yours.regions:
                if region not in serving.regions:
                    serving.begin(region)
            if self._heard_at is None:
                _log.warning("%s is back", self._hub)
            self._heard_at = time.monotonic()
        elif self._heard_at is not None and time.monotonic() - self._heard_at > SESSION:
            _log.warning("%s is away; waiting for it", self._hub)
            self._heard_at = None
        serving.tend()

    def _here(self, serving: Serving, *, is_leaving: bool = False) -> Here:
        return Here(
            beamline=self._hub.beamline,
            name=self._name,
            process=self._process,
            heard=self._heard,
            serving=serving.regions,
            leaving=is_leaving,
        )
