"""Jobs on the manager's own machine: groups of processes, each with what is known of it in files beside its script.

Nothing is kept in memory, so that a manager that starts again finds its jobs. A job holds a lock on its record as long
as it lives, and the kernel lets go of it whatever becomes of the job: no id of a process is ever trusted by itself.
"""

import fcntl
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider
from parsl.providers.errors import ExecutionProviderException

from hpc_bridge.errors import ConfigError, SchedulerRefused, SchedulerUnreachable
from hpc_bridge.job import Job, JobSpec, JobState
from hpc_bridge.scheduler import Usage

logger = logging.getLogger(__name__)

_DIRECTIVE = "#LOCAL "
"""Begins the line of a script that tells what was asked for, as #SBATCH and #PBS do."""

_INHERITED = ("HOME", "LANG", "LOGNAME", "PATH", "USER")
"""All that a job gets of the manager's environment, as from the other schedulers: secrets stay behind."""

# File descriptor 9 is the record: locked while this shell or `timeout` lives. Two lines: the group of processes and
# when it began; how it ended and when. A job that was canceled before its first line was there is ended here.
_WRAPPER = """
exec 9>>"$0.record" && flock 9 || exit 1
began=$(date +%s.%N)
set -m
timeout --foreground --preserve-status --kill-after={grace} {duration} {payload} &
set +m
echo "$! $began" >&9
if [ -e "$0.canceled" ]; then kill $!; fi
wait $!
code=$?
kill -KILL -- -$! 2>/dev/null
echo "$code $(date +%s.%N)" >&9
exit $code
"""


class Local:
    """A `hpc_bridge.scheduler.Scheduler` of processes on this machine, submitted by Parsl's LocalProvider.

    A job ends after its duration or when it is canceled: SIGTERM to the command, once, and SIGKILL `grace` s later to
    all that is left of its group, as it is to what a command leaves behind when it ends by itself. An end by duration
    is FAILED for the reason "TIMEOUT", with the exit code of the command. There is one node; nobody waits.

    Parameters
    ----------
    directory
        Of scripts, output (``SCRIPT.out``, ``SCRIPT.err``) and records. Another `Local` on it knows the same jobs.
    timeout
        Of every call (s).
    grace
        From SIGTERM to SIGKILL (s).

    Raises
    ------
    ConfigError
        Parsl hands the directory's name to a shell as it is, and it has characters that mean something there.
    """

    def __init__(self, directory: Path, *, timeout: float = 10.0, grace: float = 30.0) -> None:
        self._directory = directory.absolute()
        if shlex.quote(str(self._directory)) != str(self._directory):
            raise ConfigError(f"directory {self._directory}: its name must do without quotes in a shell")
        self._timeout = timeout
        self._grace = grace

    def submit(self, spec: JobSpec) -> str:
        """Start a job and return its id, the name of its script."""
        self._refuse_what_there_is_not(spec)
        self._directory.mkdir(parents=True, exist_ok=True)
        attributes = spec.attributes
        directive = {
            "queue": attributes.queue_name or "",
            "account": attributes.account or "",
            "duration": attributes.duration.total_seconds(),
        }
        provider = LocalProvider(
            launcher=SimpleLauncher(),
            worker_init=f"#!/bin/bash\n{_DIRECTIVE}{json.dumps(directive)}",
            cmd_timeout=self._timeout,
        )
        provider.script_dir = str(self._directory)
        command = _WRAPPER.format(
            grace=self._grace, duration=attributes.duration.total_seconds(), payload=shlex.join(_payload(spec))
        )
        try:
            process = provider.submit(command, 1, spec.name)
        except subprocess.TimeoutExpired:
            raise SchedulerUnreachable(
                f"this machine did not start {spec.name} in {self._timeout} s; it may yet"
            ) from None
        except (ExecutionProviderException, OSError) as error:
            raise SchedulerRefused(f"{spec.name} cannot be started in {self._directory}: {error}") from None
        return Path(provider.resources[process]["script_path"]).stem

    def status(self, ids: Sequence[str]) -> Mapping[str, Job]:
        """Return what the records tell of jobs."""
        return {record.job.id: record.job for record in self._records(ids)}

    def list(self, prefix: str | tuple[str, ...]) -> Sequence[Job]:
        """Return all jobs on record whose name begins so, also those long over."""
        ids = sorted(script.stem for script in self._directory.glob("*.sh") if script.name.startswith(prefix))
        return [record.job for record in self._records(ids)]

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs; does not wait for it."""
        for record in self._records(ids):
            if record.job.state.is_final:
                continue
            self._file(record.job.id, "canceled").touch()
            # Read again: a job that began in between either saw the mark, or is seen here.
            if (group := next(iter(self._records([record.job.id]))).group) is not None:
                try:
                    os.kill(group, signal.SIGTERM)
                except ProcessLookupError:
                    logger.info("%s ended before it was canceled", record.job.id)

    def used(self, account: str, since: float) -> Sequence[Usage]:
        """Return what jobs cost; one whose end nobody saw counts up to the end of its walltime."""
        usages = []
        for job in self.list(""):
            if job.account == account and job.started is not None and job.ends is not None and job.started >= since:
                until = min(time.time(), job.ends) if job.ended is None else job.ended
                usages.append(Usage(id=job.id, name=job.name, account=account, node_seconds=until - job.started))
        return usages

    def _refuse_what_there_is_not(self, spec: JobSpec) -> None:
        attributes = spec.attributes
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", spec.name):
            raise SchedulerRefused(f"{spec.name!r} cannot be the name of a job")
        if spec.directory.absolute() != self._directory:
            raise SchedulerRefused(f"{spec.name}: jobs of this machine lie in {self._directory}, not {spec.directory}")
        if spec.node_count != 1:
            raise SchedulerRefused(f"{spec.name}: this machine is one node, not {spec.node_count}")
        if attributes.custom_attributes or attributes.reservation_id:
            raise SchedulerRefused(
                f"{spec.name}: this machine takes no options and has no reservations: "
                f"{' '.join(attributes.custom_attributes)} {attributes.reservation_id or ''}"
            )
        if attributes.duration <= timedelta(0):
            raise SchedulerRefused(f"{spec.name}: a duration of {attributes.duration}")

    def _file(self, job_id: str, suffix: str) -> Path:
        return self._directory / f"{job_id}.sh.{suffix}"

    def _records(self, ids: Iterable[str]) -> "Iterable[_Record]":
        for job_id in ids:
            script = self._directory / f"{job_id}.sh"
            try:
                with script.open() as lines:
                    directive = next((line for line in lines if line.startswith(_DIRECTIVE)), None)
                written = script.stat().st_mtime
            except FileNotFoundError:
                continue
            if directive is not None and directive.endswith("\n"):  # else it is being written
                yield self._record(job_id, json.loads(directive.removeprefix(_DIRECTIVE)), written)

    def _record(self, job_id: str, asked: Mapping[str, object], written: float) -> "_Record":
        lives, lines = _read(self._file(job_id, "record"))
        canceled = self._file(job_id, "canceled").exists()
        group, started = (int(lines[0][0]), float(lines[0][1])) if lines else (None, None)
        code, ended = (int(lines[1][0]), float(lines[1][1])) if len(lines) > 1 else (None, None)
        duration = float(str(asked["duration"]))
        reason = ""
        if lives or (started is None and time.time() < written + self._timeout):
            state = JobState.QUEUED if started is None else JobState.ACTIVE
        elif canceled:
            state = JobState.CANCELED
        elif started is None:
            state, reason = JobState.FAILED, "never started"
        elif ended is None:
            state, reason = JobState.FAILED, "killed"
        elif ended - started >= duration:
            state, reason = JobState.FAILED, "TIMEOUT"
        else:
            state = JobState.COMPLETED if code == 0 else JobState.FAILED
        job = Job(
            id=job_id,
            name=job_id,
            state=state,
            reason=reason,
            queue=str(asked["queue"]),
            account=str(asked["account"]),
            nodes=() if started is None else (socket.gethostname(),),
            exit_code=code,
            submitted=written,
            started=started,
            ends=None if started is None else started + duration,
            ended=ended,
        )
        return _Record(job, group if state is JobState.ACTIVE else None)


@dataclass(frozen=True, slots=True)
class _Record:
    job: Job
    group: int | None
    """Of processes, while the job lives and has one."""


def _read(file: Path) -> tuple[bool, Sequence[Sequence[str]]]:
    """Return whether somebody holds a record, and then its lines: of one that nobody holds, all there will be."""
    try:
        with file.open() as record:
            try:
                fcntl.flock(record, fcntl.LOCK_SH | fcntl.LOCK_NB)
                lives = False
            except BlockingIOError:
                lives = True
            return lives, [line.split() for line in record if line.endswith("\n")]
    except FileNotFoundError:
        return False, []


def _payload(spec: JobSpec) -> Sequence[str]:
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | dict(spec.environment)
    for name in spec.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SchedulerRefused(f"{spec.name}: {name!r} cannot be a variable of the environment")
    # The record is closed: a process that the command leaves behind must not look like the job.
    lines = ("exec 9>&-", spec.pre_launch, "exec " + shlex.join((spec.executable, *spec.arguments)))
    return ("env", "-i", *(f"{name}={value}" for name, value in environment.items()), "bash", "-c", "\n".join(lines))
