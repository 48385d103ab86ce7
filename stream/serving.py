"""The regions that a worker has, each correlated by a thread of its own."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stream.errors import SinkError, SourceError, Superseded
from stream.logs import bind, bound

_log = logging.getLogger(__name__)

AGAIN = 1.0
"""Seconds after which a region that ended is begun once more if it is still given to us."""

STEADY = 10.0
"""Seconds after which a region that loses its connections for good is begun once more, with new ones."""


@dataclass(slots=True)
class _Region:
    thread: threading.Thread
    stop: threading.Event
    again: float | None = None
    """When to begin once more; monotonic."""


class Serving:
    """Regions begin and end here as a group of workers shares them out.

    Parameters
    ----------
    serve
        Correlates a region until its `stop` is set, and leaves it then so that another can go on. After `Superseded`,
        and after a SourceError or SinkError that comes late, it is begun again while the region is ours; any other
        error ends the worker.
    """

    def __init__(self, serve: Callable[[int, threading.Event], None]) -> None:
        self._serve = serve
        self._regions: dict[int, _Region] = {}
        self._failed: BaseException | None = None

    @property
    def regions(self) -> list[int]:
        """Those that others must not have yet."""
        return list(self._regions)

    def begin(self, region: int) -> None:
        """Begin one that is ours now."""
        stop = threading.Event()
        thread = threading.Thread(target=self._work, args=(region, stop), name=f"region {region}")
        self._regions[region] = _Region(thread, stop)
        with bound(region=region):
            _log.info("region %d begins here", region)
        thread.start()

    def release(self, regions: Iterable[int]) -> None:
        """Let regions end, which are no more among `regions` once others may go on with them."""
        for region in regions:
            if region in self._regions:
                self._regions[region].stop.set()

    def leave(self, regions: Iterable[int]) -> None:
        """Return once others may go on with regions."""
        left = list(regions)
        self.release(left)
        for region in left:
            if region in self._regions:
                self._regions.pop(region).thread.join()

    def wait(self, within: float) -> None:
        """Return once one of the regions has ended, or after `within` seconds."""
        for region in list(self._regions.values())[:1]:
            region.thread.join(within)

    def tend(self) -> None:
        """Look after regions that ended: forget those that were released, go on with the others.

        A worker that was paused may have taken regions over when it woke, without a right.

        Raises
        ------
        XpcsStreamError
            A region could not be correlated.
        """
        if self._failed is not None:
            raise self._failed
        for region, serving in list(self._regions.items()):
            if serving.thread.is_alive():
                continue
            if serving.stop.is_set():
                del self._regions[region]
            elif serving.again is None:
                serving.again = time.monotonic() + AGAIN
            elif time.monotonic() > serving.again:
                self.begin(region)

    def _work(self, region: int, stop: threading.Event) -> None:
        bind(region=region)
        begin = time.monotonic()
        try:
            self._serve(region, stop)
        except Superseded as error:
            _log.warning("region %d ends here: %s", region, error)
        except (SourceError, SinkError) as error:
            if time.monotonic() - begin < STEADY and not stop.is_set():
                self._failed = error
            else:
                _log.warning("region %d ends here: %s", region, error)
        except BaseException as error:  # noqa: BLE001 - of a thread: raised again by `tend`
            self._failed = error
