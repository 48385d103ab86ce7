"""Which task each pilot of kind "files" has: decided when it asks, with its heartbeat, and on record before it is told.

Messages may come in any order, twice or not at all, and the manager may be killed between any two of them: a pilot
tells again what came of its task until it is given another one or none, and is told again what it has until it says so.
"""

import logging
from collections.abc import Collection, Mapping

from hpc_bridge.heartbeat import Assignment, Heard, Heartbeat, TaskReport, TaskState
from hpc_bridge.heartbeat import State as Pilot
from hpc_bridge.tasks import State, Task, Tasks

_log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Of a command that ends by itself and not well. Those that were cut short by others are not counted."""

LONGER = 4.0
"""By so much each further wait of one that failed is longer: what fails because of a file system would fail again."""

TEMPORARY = 75
"""Exit code of a command that was told to stop before it was done (EX_TEMPFAIL of sysexits.h)."""


class Dispatch:
    """Hands out the tasks of one beamline.

    Every method may raise RecordError: then nothing may be told to the pilot.

    Parameters
    ----------
    retry_after
        How long (s) a command that failed waits before it is tried again the first time.
    """

    def __init__(self, beamline: str, tasks: Tasks, *, retry_after: float) -> None:
        self._beamline, self._tasks, self._retry_after = beamline, tasks, retry_after

    def answer(self, heard: Heard, *, site: str, may_begin: bool) -> Assignment | None:
        """Take what a pilot of ours says, and return the task that it has from now on.

        Parameters
        ----------
        heard
            From the newest pilot of its lease.
        site
            Where it is.
        may_begin
            Whether it may get a task if it has none.
        """
        beat = heard.heartbeat
        self._take(beat, heard.at)
        task = self._tasks.had_by(self._beamline, beat.lease)
        is_busy = beat.task is not None and beat.task.state is TaskState.RUNNING
        if task is None and may_begin and beat.state is Pilot.SERVING and not is_busy:
            task = self._tasks.next(self._beamline, site, heard.at)
            if task is not None:
                _log.info(
                    "task %s goes to %s%s", task.task, beat.lease, f", attempt {task.attempt}" * (task.attempt > 1)
                )
                task = self._tasks.handed(task.task, beat.lease, heard.at)
        if task is None:
            return None
        return Assignment(task=task.task, attempt=task.attempt, command=task.command, results=task.results)

    def take_back(self, living: Collection[str], why: Mapping[str, str]) -> None:
        """Let the tasks wait again whose pilots live no more.

        Parameters
        ----------
        living
            Leases whose pilots may still do what they were given.
        why
            Others do not, as far as it is known.
        """
        for task in self._tasks.running(self._beamline):
            if task.lease is not None and task.lease not in living:
                self._wait(task, f"lost with its pilot {task.lease}: {why.get(task.lease) or 'its lease is over'}")

    def _take(self, beat: Heartbeat, at: float) -> None:
        said = beat.task
        task = None if said is None else self._tasks.get(said.task)
        if said is not None and task is not None and _is_of(task, beat, said):
            match said.state:
                case TaskState.DONE if tuple(each.path for each in said.digests) == task.results:
                    _log.info("task %s is done", task.task)
                    self._tasks.done(task.task, said.digests, at)
                case TaskState.DONE:
                    self._fall(task, said, f"other results are told of than {', '.join(task.results)}", at)
                case TaskState.FAILED if said.exit_code == TEMPORARY:
                    self._wait(task, f"exit code {TEMPORARY}: {said.message or 'not done'}", at + self._retry_after)
                case TaskState.FAILED:
                    self._fall(task, said, said.message or f"it ended with {said.exit_code}", at)
                case TaskState.STOPPED:
                    self._wait(task, f"handed back by {beat.lease}: {said.message}")
        if beat.state is Pilot.ENDED:
            had = self._tasks.had_by(self._beamline, beat.lease)
            if had is not None:
                self._wait(had, f"its pilot {beat.lease} ended")

    def _fall(self, task: Task, said: TaskReport, why: str, at: float) -> None:
        words = f"exit code {said.exit_code}: {why}" if said.exit_code is not None else why
        rest = self._retry_after * LONGER**task.failures
        after = self._tasks.fell(task.task, said.exit_code, words, attempts=ATTEMPTS, not_before=at + rest, now=at)
        outcome = "has failed" if after.state is State.FAILED else f"is tried again in {rest:.0f} s"
        _log.warning("task %s %s: %s", task.task, outcome, words)

    def _wait(self, task: Task, why: str, not_before: float = 0.0) -> None:
        _log.warning("task %s waits again: %s", task.task, why)
        self._tasks.waits(task.task, why, not_before)


def _is_of(task: Task, beat: Heartbeat, said: TaskReport) -> bool:
    """Say whether the pilot has this attempt: others may tell of theirs late, or again."""
    return task.state is State.RUNNING and (task.lease, task.attempt) == (beat.lease, said.attempt)
