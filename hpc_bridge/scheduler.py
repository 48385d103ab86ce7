"""What is asked of a scheduler of compute nodes: of Slurm, of PBS Pro, or of this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpc_bridge.job import Job, JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a job cost, by the scheduler's own accounting."""

    id: str
    name: str
    account: str
    node_seconds: float


class Scheduler(Protocol):
    """Every call ends within the time given to the constructor (s), and may raise SchedulerUnreachable.

    A job that is not told of is not over: it may not be listed yet, or the accounting lags behind.
    """

    def submit(self, spec: JobSpec) -> str:
        """Return the id of a new job.

        Raises
        ------
        SchedulerRefused
            It will not run such a job.
        SchedulerUnreachable
            There was no answer: it may run the job all the same.
        """

    def status(self, ids: Sequence[str]) -> Mapping[str, Job]:
        """Return what is known of jobs, waiting, running or over, by id. What is not known is not there."""

    def list(self, prefix: str | tuple[str, ...]) -> Sequence[Job]:
        """Return our jobs whose name begins so, or so: all that wait or run, and those over that are still known."""

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs; SIGTERM first. One that is over or unknown is no error."""

    def used(self, account: str, since: float) -> Sequence[Usage]:
        """Return what our jobs on an account cost that began after `since` (s of the Unix epoch)."""
