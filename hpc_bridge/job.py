"""Jobs as PSI/J and the DOE's IRI facility API have them.

The names are those of PSI/J's JobSpec, ResourceSpec, JobAttributes and JobState (exaworks.org/psij), which the facility
API takes as JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path


class JobState(StrEnum):
    """What a scheduler knows of a job. One that is requeued is `QUEUED` again: nothing is final before it ended."""

    QUEUED = "queued"
    HELD = "held"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_final(self) -> bool:
        """Whether the job is over."""
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """How long, where, and on whose account a job runs."""

    duration: timedelta
    queue_name: str | None = None
    account: str | None = None
    reservation_id: str | None = None
    custom_attributes: tuple[str, ...] = ()
    """Further options of the scheduler as it takes them, e.g. ``"--constraint=gpu"`` or ``"-l filesystems=home"``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to be run."""

    name: str
    """Letters, digits, "-", "_" and "."; `hpc_bridge.scheduler.Scheduler` finds a job by how it begins."""
    executable: str
    arguments: tuple[str, ...] = ()
    directory: Path
    """Where script and output lie, on a file system that the nodes reach."""
    environment: Mapping[str, str] = field(default_factory=dict)
    pre_launch: str = ""
    """Lines of shell before it: modules, a virtual environment."""
    node_count: int = 1
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a scheduler says of a job. Times in seconds of the Unix epoch; None where it does not say."""

    id: str
    name: str
    state: JobState
    reason: str = ""
    """Why it waits, or how it ended, in the scheduler's words: ``"Resources"``, ``"PREEMPTED"``, ``"NODE_FAIL"``."""
    queue: str = ""
    account: str = ""
    nodes: tuple[str, ...] = ()
    exit_code: int | None = None
    submitted: float | None = None
    started: float | None = None
    ends: float | None = None
    """When its walltime is over."""
    ended: float | None = None
    restarts: int = 0
