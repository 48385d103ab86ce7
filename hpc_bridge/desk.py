"""A site's scheduler, asked in a thread of its own: one that does not answer holds up no other site."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from hpc_bridge.errors import BridgeError, SchedulerRefused, SchedulerUnreachable
from hpc_bridge.job import Job, JobSpec
from hpc_bridge.scheduler import Scheduler

_log = logging.getLogger(__name__)

PREFIX = "xb-"
"""Of the names of all jobs of ours."""


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
        Where what came of them is put.
    """

    def __init__(self, site: str, scheduler: Scheduler, answers: "SimpleQueue[Listed | Submitted]") -> None:
        self._site, self._scheduler, self._answers = site, scheduler, answers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=site)
        self._is_listing = False
        self._next_listing = 0.0

    def list(self, every: float) -> None:
        """Ask for the jobs, unless that was done less than `every` seconds ago."""
        if self._is_listing or time.monotonic() < self._next_listing:
            return
        self._is_listing = True
        self._next_listing = time.monotonic() + every
        self._thread.submit(self._list)

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
        except BridgeError as error:
            listed = Listed(site=self._site, asked=asked, jobs=None, why=str(error))
        self._is_listing = False
        self._answers.put(listed)

    def _submit(self, lease: str, spec: JobSpec) -> None:
        try:
            job_id = self._scheduler.submit(spec)
            self._answers.put(Submitted(lease=lease, at=time.time(), job_id=job_id))
        except SchedulerRefused as error:
            self._answers.put(Submitted(lease=lease, at=time.time(), refused=str(error)))
        except BridgeError as error:
            _log.warning("%s: %s", self._site, error)
            self._answers.put(Submitted(lease=lease, at=time.time()))

    def _cancel(self, job_id: str) -> None:
        try:
            self._scheduler.cancel([job_id])
        except (SchedulerRefused, SchedulerUnreachable) as error:
            _log.warning("%s: job %s is not cancelled yet: %s", self._site, job_id, error)
