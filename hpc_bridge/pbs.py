"""PBS Professional and OpenPBS as a scheduler: Parsl writes the script and calls qsub, the rest is asked of qstat."""

import math
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider
from parsl.providers.errors import ScriptPathError, SubmitException

from hpc_bridge.command import run
from hpc_bridge.errors import ConfigError, SchedulerRefused, SchedulerUnreachable
from hpc_bridge.job import Job, JobSpec
from hpc_bridge.pbs_text import read_jobs, read_usages
from hpc_bridge.scheduler import Usage

_SCRIPT = """#!/bin/bash
#PBS -S /bin/bash
#PBS -N ${jobname}
#PBS -m n
#PBS -r y
#PBS -l walltime=${walltime}
#PBS -o ${job_stdout_path}
#PBS -e ${job_stderr_path}
${scheduler_options}

${worker_init}
${user_script}
"""
"""Can be rerun, although nobody waits for that: where jobs are preempted by requeue only, others are not preempted at
all (openpbs, src/server/req_rerun.c), and the demand job would wait for us."""

_NO_ANSWER = re.compile(
    r"cannot connect|could not connect|communication failure|connection (refused|reset|closed|timed out)|end of file"
    r"|no server|server (is )?(busy|shutting down)|unknown host|could not resolve|no route|unreachable|timed? ?out"
    r"|invalid credential",
    re.IGNORECASE,
)
"""What PBS, or the way to it, says when the request was not looked at."""

_OF_NO_JOB = re.compile(
    r"^q(stat|del): .*(Unknown Job Id|Job has finished|Request invalid for state of job).*\n?",
    re.IGNORECASE | re.MULTILINE,
)
"""What PBS says of a job that is forgotten, over, or about to be."""

_NO_HISTORY = re.compile(r"histor", re.IGNORECASE)
"""What a server that keeps no jobs that are over says to ``-x``."""

_PLAIN = r"[A-Za-z0-9_.:@/+=,-]+"
"""Words that mean the same to us, to a shell, and to the shell at the far end of ssh."""

_REMEMBERED = 86400.0
"""How long (s) a job that is over stays in `Pbs.list`."""

_AT_ONCE = 500
"""Jobs that one qstat is asked for."""


class Pbs:
    """A `hpc_bridge.scheduler.Scheduler` of PBS.

    A signal's exit code is 128 more than the signal, as in a shell; PBS tells that of the shell around the command,
    which dies of the SIGTERM of a `cancel` that the command takes for its order to go. A negative Exit_status of PBS
    is no exit code, but is told in the reason. Where the server keeps no history (``job_history_enable``), jobs that
    are over are not known at all, and `used` knows as much as the history goes back.

    ``-l select=...`` among the options of a job stands for the nodes; else they are ``-l select=NODES``.

    Parameters
    ----------
    directory
        Of scripts and output (``SCRIPT.stdout``, ``SCRIPT.stderr``).
    submit_through
        Put before every command of PBS.
    timeout
        Of every call (s).

    Raises
    ------
    ConfigError
        The directory's name has characters that mean something to a shell.
    """

    def __init__(self, directory: Path, *, submit_through: Sequence[str] = (), timeout: float = 10.0) -> None:
        self._directory = directory.absolute()
        if not re.fullmatch(_PLAIN, str(self._directory)):
            raise ConfigError(f"directory {self._directory}: its name must do without quotes in a shell")
        self._through = tuple(submit_through)
        self._timeout = timeout
        self._user: str | None = None

    def submit(self, spec: JobSpec) -> str:
        """Submit a job that becomes, by exec, what is to be run."""
        attributes = spec.attributes
        queue = attributes.reservation_id.partition(".")[0] if attributes.reservation_id else attributes.queue_name
        _refuse_what_is_not_plain(spec, queue)
        deadline = self._deadline()
        provider = _Provider(
            lambda *command: self._run(deadline, *command),
            account=attributes.account,
            queue=queue,
            scheduler_options=_options(spec),
            worker_init="\n".join((*_environment(spec), spec.pre_launch)),
            nodes_per_block=spec.node_count,
            launcher=SimpleLauncher(),
            walltime=_walltime(attributes.duration),
        )
        what = f"qsub {spec.name} (account {attributes.account}, queue {queue})"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            provider.script_dir = str(self._directory)
            job_id = provider.submit("exec " + shlex.join((spec.executable, *spec.arguments)), 1, spec.name)
        except SubmitException as error:
            raise _failure(what, f"{error.stderr}{error.stdout}") from None
        except (ScriptPathError, OSError) as error:
            raise SchedulerRefused(f"{spec.name}: no script in {self._directory}: {error}") from None
        if job_id is None or not re.fullmatch(r"\d+\.\S+", job_id):
            raise SchedulerUnreachable(f"{what}: its answer {job_id!r} is no id of a job; it may run yet")
        return _short(str(job_id))

    def status(self, ids: Sequence[str]) -> Mapping[str, Job]:
        """Return what qstat tells of jobs."""
        # It may call a job by a longer or a shorter name of its server than qsub did.
        found = {_number(job.id): job for job in read_jobs(self._qstat(self._deadline(), ids))}
        return {job_id: replace(found[_number(job_id)], id=job_id) for job_id in ids if _number(job_id) in found}

    def list(self, prefix: str | tuple[str, ...]) -> Sequence[Job]:
        """Return our jobs whose name begins so, of those over the ones of the last day."""
        deadline = self._deadline()
        since = time.strftime("%Y%m%d%H%M.%S", time.gmtime(time.time() - _REMEMBERED))
        ids = dict.fromkeys((*self._qselect(deadline), *self._qselect(deadline, "-x", f"-tm.gt.{since}")))
        jobs = read_jobs(self._qstat(deadline, tuple(ids)))
        return [replace(job, id=_short(job.id)) for job in jobs if job.name.startswith(prefix)]

    def cancel(self, ids: Sequence[str]) -> None:
        """Delete jobs: PBS sends SIGTERM to all of their processes, and SIGKILL after the queue's ``kill_delay``."""
        if ids:
            code, _, complaints = self._run(self._deadline(), "qdel", *ids)
            complaints = _OF_NO_JOB.sub("", complaints)
            if code and complaints.strip():
                raise _failure(f"qdel {' '.join(ids)}", complaints)

    def used(self, account: str, since: float) -> Sequence[Usage]:
        """Return node-seconds, of jobs that the server still knows."""
        deadline = self._deadline()
        usages = read_usages(self._qstat(deadline, self._qselect(deadline, "-x", "-A", account)), since)
        return [replace(usage, id=_short(usage.id)) for usage in usages if usage.account == account]

    def _qselect(self, deadline: float, *options: str) -> Sequence[str]:
        if self._user is None:
            self._user = self._answer(deadline, "id", "-un").strip()
        code, output, complaints = self._run(deadline, "qselect", "-u", self._user, *options)
        if code and "-x" in options and _NO_HISTORY.search(complaints):
            return ()
        if code:
            raise SchedulerUnreachable(f"qselect: {complaints.strip()}")
        return output.split()

    def _qstat(self, deadline: float, ids: Sequence[str]) -> str:
        parts = (ids[first : first + _AT_ONCE] for first in range(0, len(ids), _AT_ONCE))
        return "".join(self._qstat_at_once(deadline, part) for part in parts)

    def _qstat_at_once(self, deadline: float, ids: Sequence[str]) -> str:
        # Not -F json: of several jobs, some versions print the first one (openpbs#2672).
        code, output, complaints = self._run(deadline, "qstat", "-x", "-f", "-F", "dsv", *ids)
        if code and _NO_HISTORY.search(_OF_NO_JOB.sub("", complaints)):
            code, output, complaints = self._run(deadline, "qstat", "-f", "-F", "dsv", *ids)
        complaints = _OF_NO_JOB.sub("", complaints)
        if code and complaints.strip():
            raise SchedulerUnreachable(f"qstat: {complaints.strip()}")
        return output

    def _answer(self, deadline: float, *command: str) -> str:
        code, output, complaints = self._run(deadline, *command)
        if code:
            raise SchedulerUnreachable(f"{command[0]}: {complaints.strip()}")
        return output

    def _run(self, deadline: float, *command: str) -> tuple[int, str, str]:
        return run(("env", "TZ=UTC", *command), through=self._through, deadline=deadline)

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout


class _Provider(PBSProProvider):
    """Parsl's, with our script, and which runs commands as it is told to."""

    def __init__(self, run: Callable[..., tuple[int, str, str]], **options: Any) -> None:
        super().__init__(**options)
        self.template_string = _SCRIPT
        self._run = run

    def execute_wait(self, cmd: str, timeout: int | None = None) -> tuple[int, str, str]:  # noqa: ARG002 - has its own
        return self._run(*cmd.split())


def _refuse_what_is_not_plain(spec: JobSpec, queue: str | None) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,199}", spec.name):
        raise SchedulerRefused(f"{spec.name!r} cannot be the name of a job of PBS")
    for what, word in (("queue", queue), ("account", spec.attributes.account)):
        if word is not None and not re.fullmatch(_PLAIN, word):
            raise SchedulerRefused(f"{spec.name}: {word!r} cannot be its {what}")
    for option in spec.attributes.custom_attributes:
        if not re.fullmatch(r"-[^\n]+", option):
            raise SchedulerRefused(f"{spec.name}: {option!r} cannot be an option of qsub")
    for name in spec.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SchedulerRefused(f"{spec.name}: {name!r} cannot be a variable of the environment")


def _options(spec: JobSpec) -> str:
    options = spec.attributes.custom_attributes
    if not any(re.match(r"-l\s*select=", option) for option in options):
        options = (f"-l select={spec.node_count}", *options)
    return "\n".join(f"#PBS {option}" for option in options)


def _environment(spec: JobSpec) -> Sequence[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in spec.environment.items()]


def _walltime(duration: timedelta) -> str:
    seconds = math.ceil(duration.total_seconds())
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _number(job_id: str) -> str:
    return job_id.partition(".")[0]


def _short(job_id: str) -> str:
    """Return ``7.server`` also for ``7.server.site.gov``: qsub and qstat need not agree."""
    return ".".join(job_id.split(".")[:2])


def _failure(what: str, complaints: str) -> SchedulerRefused | SchedulerUnreachable:
    # Anybody else than PBS who speaks is on the way to it.
    by_pbs = re.search("^q(sub|del): ", complaints, re.MULTILINE) and not _NO_ANSWER.search(complaints)
    return (SchedulerRefused if by_pbs else SchedulerUnreachable)(f"{what}: {complaints.strip()}")
