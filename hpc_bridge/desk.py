"""A site's scheduler, asked in a thread of its own: one that does not answer holds up no other site."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from hpc_bridge.config import Site
from hpc_bridge.errors import BridgeError, SchedulerRefused
from hpc_bridge.job import Job, JobSpec
from hpc_bridge.scheduler import Scheduler

_log = logging.getLogger(__name__)

PREFIX = "xb-"
"""Of the names of all jobs of ours."""

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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=site.site)
        self._listing: Future[None] | None = None
        self._next_listing = self._overdue = 0.0

    def list(self) -> None:
        """Ask for the jobs when it is time; one that takes too long is told of as no answer."""
        now = time.monotonic()
        if self._listing is not None and not self._listing.done():
            if now > self._overdue:
                self._overdue = now + self._patience
                self._answers.put(Listed(site=self._site, asked=time.time(), jobs=None, why="it hangs"))
        elif now >= self._next_listing:
            self._next_listing, self._overdue = now + self._every, now + self._patience
            self._listing = self._thread.submit(self._list)

    def submit(self, lease: str, spec: JobSpec) -> None:
        """Submit the job of a lease."""
        self._thread.submit(self._submit, lease, spec)

    def cancel(self, job_id: str) -> None:
        """Cancel a job."""
        self._thread.submit(self._cancel, job_id)

    def close(self) -> None:
        """Wait for what is under way; what is not begun is left."""
        self._thread.shutdown(cancel_futures=True)

    def _list(self) -> None:
        asked = time.time()
        try:
            listed = Listed(site=self._site, asked=asked, jobs=self._scheduler.list(PREFIX))
        except Exception as error:  # noqa: BLE001 - nobody else would hear of it
            listed = Listed(site=self._site, asked=asked, jobs=None, why=self._words(error))
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
