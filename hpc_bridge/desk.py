"""A site's scheduler, asked in a thread of its own: one that does not answer holds up no other site."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread

from hpc_bridge.config import Site
from hpc_bridge.errors import BridgeError, SchedulerRefused
from hpc_bridge.job import Job, JobSpec
from hpc_bridge.leases import PREFIXES
from hpc_bridge.logs import bind
from hpc_bridge.scheduler import Scheduler

_log = logging.getLogger(__name__)

OURS = tuple(PREFIXES.values())

OVERDUE = 3.0
"""Times that a command may take, after which a site is said to hang: a file system may, where no command does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What jobs a site lists; None: it did not answer."""

    site: str
    asked: float
    jobs: Sequence[Job] | None
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What came of the job of a lease."""

    lease: str
    at: float
    job_id: str | None = None
    refused: str = ""
    """If not empty; and if there is no id either, nobody knows."""


class Desk:
    """Where requests to one scheduler are handed in, and are done one after the other.

    Parameters
    ----------
    answers
        Where what came of them is put. Every submission has its answer, whatever happens.
    """

    def __init__(self, site: Site, scheduler: Scheduler, answers: "SimpleQueue[Listed | Submitted]") -> None:
        self._site, self._scheduler, self._answers = site.site, scheduler, answers
        self._every = site.list_every.total_seconds()
        self._patience = OVERDUE * site.command_timeout.total_seconds()
        self._is_listing = self._is_closed = False
        self._next_listing = self._overdue = 0.0
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # A daemon: nobody waits for ever for a file system that hangs.
        self._thread = Thread(target=self._run, name=site.site, daemon=True)
        self._thread.start()

    def list(self) -> None:
        """Ask for the jobs when it is time; one that takes too long is told of as no answer."""
        now = time.monotonic()
        if self._is_listing:
            if now > self._overdue:
                self._overdue = now + self._patience
                self._answers.put(Listed(site=self._site, asked=time.time(), jobs=None, why="it hangs"))
        elif now >= self._next_listing:
            self._next_listing, self._overdue = now + self._every, now + self._patience
            self._is_listing = True
            self._work.put(self._list)

    def submit(self, lease: str, spec: JobSpec) -> None:
        """Submit the job of a lease."""
        self._work.put(partial(self._submit, lease, spec))

    def cancel(self, job_id: str) -> None:
        """Cancel a job."""
        self._work.put(partial(self._cancel, job_id))

    def close(self) -> None:
        """Wait for what is under way, unless it hangs; what is not begun is left."""
        self._is_closed = True
        self._work.put(lambda: None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            _log.warning("%s: what is under way hangs: it is left to itself", self._site)

    def _run(self) -> None:
        bind(site=self._site)
        while not self._is_closed:
            self._work.get()()

    def _list(self) -> None:
        asked = time.time()
        try:
            listed = Listed(site=self._site, asked=asked, jobs=self._scheduler.list(OURS))
        except Exception as error:  # noqa: BLE001 - nobody else would hear of it
            listed = Listed(site=self._site, asked=asked, jobs=None, why=self._words(error))
        self._is_listing = False
        self._answers.put(listed)

    def _submit(self, lease: str, spec: JobSpec) -> None:
        job_id, refused = None, ""
        try:
            job_id = self._scheduler.submit(spec)
        except SchedulerRefused as error:
            refused = str(error)
        except Exception as error:  # noqa: BLE001 - the lease waits for its answer
            _log.warning("%s: %s", self._site, self._words(error))
        self._answers.put(Submitted(lease=lease, at=time.time(), job_id=job_id, refused=refused))

    def _cancel(self, job_id: str) -> None:
        try:
            self._scheduler.cancel([job_id])
        except Exception as error:  # noqa: BLE001 - it is cancelled again later
            _log.warning("%s: job %s is not cancelled yet: %s", self._site, job_id, self._words(error))

    def _words(self, error: Exception) -> str:
        if isinstance(error, BridgeError):
            return str(error)
        _log.error("%s: this is our own mistake", self._site, exc_info=error)
        return f"{type(error).__name__}: {error}"
