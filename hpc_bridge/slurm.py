"""Slurm as a scheduler: Parsl writes the script and calls sbatch, the rest is asked of squeue and sacct."""

import logging
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider
from parsl.providers.errors import ScriptPathError, SubmitException

from hpc_bridge import slurm_text
from hpc_bridge.command import run
from hpc_bridge.errors import ConfigError, SchedulerRefused, SchedulerUnreachable
from hpc_bridge.job import Job, JobSpec
from hpc_bridge.scheduler import Usage

logger = logging.getLogger(__name__)

_OUTRANKING = ("SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_")
"""Variables of the environment that begin so would be heard rather than the script, and change what is printed."""

_INHERITED = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER")
"""All that sbatch, and so a job, gets of this process' environment but ``SLURM_*``. Not by --export=NONE: a node would
first run the user's login shell, which takes a second here, and hold the job if that takes too long."""

_REMEMBERED = timedelta(days=1)
"""How long a job that is over stays in `Slurm.list`; squeue forgets it after MinJobAge, 300 s by default."""

_LONG = timedelta(days=3650)
"""No accounting goes back further, and sacct does not know times before 1970."""

_PLAIN = r"[A-Za-z0-9_.:@/+=,%-]+"
"""Words that mean the same to us, to a shell, and to the shell at the far end of ssh."""


class Slurm:
    """A `hpc_bridge.scheduler.Scheduler` of Slurm.

    Nothing is kept in memory: another `Slurm` knows the same jobs. A job carries nothing of this process' environment
    but who and where it is, and ``SLURM_*``. It is not requeued when it is preempted or its node fails; if the
    site's RequeueExit brings it back all the same, `Job.restarts` tells. A signal's exit code is 128 more than the
    signal, as in a shell.

    Parameters
    ----------
    directory
        Of scripts and output (``SCRIPT.stdout``, ``SCRIPT.stderr``); jobs run in it.
    submit_through
        Put before every command of Slurm.
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

    def submit(self, spec: JobSpec) -> str:
        """Submit a job that becomes, by exec, what is to be run: it gets the signals that its options ask for."""
        attributes = spec.attributes
        _refuse_what_is_not_plain(spec)
        deadline = self._deadline()
        provider = _Provider(
            lambda *command: self._run(deadline, command),
            partition=attributes.queue_name,
            account=attributes.account,
            nodes_per_block=spec.node_count,
            walltime=_walltime(attributes.duration),
            scheduler_options="\n".join(f"#SBATCH {option}" for option in self._options(spec)),
            worker_init="\n".join((*_environment(spec), spec.pre_launch)),
            exclusive=False,
            launcher=SimpleLauncher(),
        )
        what = f"sbatch {spec.name} (account {attributes.account}, queue {attributes.queue_name})"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            provider.script_dir = str(self._directory)
            return str(provider.submit("exec " + shlex.join((spec.executable, *spec.arguments)), 1, spec.name))
        except SubmitException as error:
            # Anybody else than sbatch who speaks is on the way to it.
            if error.retcode and error.stderr.startswith("sbatch: ") and not slurm_text.is_unreachable(error.stderr):
                raise SchedulerRefused(f"{what}: {_words(error.stderr)}") from None
            raise SchedulerUnreachable(f"{what}: {_words(error.stderr or error.stdout)}; it may run yet") from None
        except (ScriptPathError, OSError) as error:
            raise SchedulerRefused(f"{spec.name}: no script in {self._directory}: {error}") from None

    def status(self, ids: Sequence[str]) -> Mapping[str, Job]:
        """Return what squeue tells of jobs, and sacct of those over that squeue has forgotten."""
        deadline = self._deadline()
        jobs = {job.id: job for job in self._listed(deadline) if job.id in ids}
        if forgotten := _checked(each for each in ids if each not in jobs):
            jobs |= {job.id: job for job in self._over(deadline, f"--jobs={','.join(forgotten)}")}
        return jobs

    def list(self, prefix: str | tuple[str, ...]) -> Sequence[Job]:
        """Return our jobs, those over for a day."""
        deadline = self._deadline()
        jobs = {job.id: job for job in self._listed(deadline)}
        over = {job.id: job for job in self._over(deadline, f"--starttime={_ago(_REMEMBERED.total_seconds())}")}
        return [job for job in (over | jobs).values() if job.name.startswith(prefix)]

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs: Slurm sends SIGTERM, and SIGKILL after the site's KillWait."""
        if not ids:
            return
        code, _, complaints = self._run(self._deadline(), ("scancel", *_checked(ids)))
        wrong = [
            line for line in complaints.splitlines() if not re.search("invalid job id|already complet", line, re.I)
        ]
        if code and wrong:
            refused = wrong[0].startswith("scancel: ") and not slurm_text.is_unreachable(complaints)
            raise (SchedulerRefused if refused else SchedulerUnreachable)(f"scancel: {_words(complaints)}")

    def used(self, account: str, since: float) -> Sequence[Usage]:
        """Return what jobs cost in all of their starts; the accounting lags behind by seconds."""
        ago = min(time.time() - since, _LONG.total_seconds())
        which = ("--duplicates", f"--accounts={account}", f"--starttime={_ago(ago)}")
        return slurm_text.read_usages(self._sacct(self._deadline(), slurm_text.USAGE, *which), since)

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _listed(self, deadline: float) -> Sequence[Job]:
        fields = ",".join(f"{field}:{slurm_text.SEPARATOR}" for field in slurm_text.SQUEUE)
        command = ("squeue", "--me", "--noheader", "--states=all", f"--Format={fields}")
        return slurm_text.read_squeue(self._answer(deadline, command))

    def _over(self, deadline: float, which: str) -> Sequence[Job]:
        """Return jobs that are over by the accounting; of others it has old news only. It may be off, or down."""
        try:
            jobs = slurm_text.read_sacct(self._sacct(deadline, slurm_text.SACCT, which))
        except SchedulerUnreachable as error:
            logger.warning("nothing is known of jobs that squeue has forgotten: %s", error)
            return ()
        return [job for job in jobs if job.state.is_final]

    def _sacct(self, deadline: float, fields: Sequence[str], *which: str) -> str:
        shape = ("--noheader", "--parsable", f"--delimiter={slurm_text.SEPARATOR}", f"--format={','.join(fields)}")
        return self._answer(deadline, ("sacct", "--allocations", *shape, *which))

    def _answer(self, deadline: float, command: Sequence[str]) -> str:
        code, answer, complaints = self._run(deadline, command, "SLURM_TIME_FORMAT=%s")
        if code:
            raise SchedulerUnreachable(f"{command[0]}: {_words(complaints) or f'ended with {code}'}")
        return answer

    def _run(self, deadline: float, command: Sequence[str], *variables: str) -> tuple[int, str, str]:
        names = (name for name in os.environ if re.fullmatch(_PLAIN, name))
        if command[0] == "sbatch":
            names = (name for name in names if name not in _INHERITED and not name.startswith("SLURM_"))
        else:
            names = (name for name in names if name.startswith(_OUTRANKING))
        through = (*self._through, "env", *(f"--unset={name}" for name in names), *variables)
        return run(command, through=through, deadline=deadline)

    def _options(self, spec: JobSpec) -> Iterator[str]:
        yield "--no-requeue"
        yield f"--chdir={self._directory}"
        if spec.attributes.reservation_id is not None:
            yield f"--reservation={spec.attributes.reservation_id}"
        yield from spec.attributes.custom_attributes


class _Provider(SlurmProvider):
    """Parsl's, whose commands go the site's way; it need not ask whether sacct works: its status() is not used."""

    def __init__(self, ask: Callable[..., tuple[int, str, str]], **options: Any) -> None:
        self._ask = ask
        super().__init__(**options)

    def execute_wait(self, cmd: str, timeout: float | None = None) -> tuple[int, str, str]:  # noqa: ARG002 - a deadline is kept
        return (0, "", "") if cmd == "sacct -X" else self._ask(*cmd.split())


def _refuse_what_is_not_plain(spec: JobSpec) -> None:
    attributes = spec.attributes
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,199}", spec.name):
        raise SchedulerRefused(f"{spec.name!r} cannot be the name of a job")
    for word in (attributes.queue_name, attributes.account, attributes.reservation_id):
        if word is not None and not re.fullmatch(_PLAIN, word):
            raise SchedulerRefused(f"{spec.name}: {word!r} cannot be a queue, an account or a reservation")
    for option in attributes.custom_attributes:
        if not re.fullmatch(r"-[^\n]+", option):
            raise SchedulerRefused(f"{spec.name}: {option!r} cannot be an option of sbatch")
    for name in spec.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SchedulerRefused(f"{spec.name}: {name!r} cannot be a variable of the environment")


def _environment(spec: JobSpec) -> Iterator[str]:
    for name, value in spec.environment.items():
        yield f"export {name}={shlex.quote(value)}"


def _walltime(duration: timedelta) -> str:
    """Return whole minutes, as Slurm counts them."""
    minutes = max(math.ceil(duration / timedelta(minutes=1)), 1)
    return f"{minutes // 60:02}:{minutes % 60:02}:00"


def _checked(ids: Iterable[str]) -> Sequence[str]:
    ids = sorted(set(ids))
    for each in ids:
        if not re.fullmatch("[0-9]+", each):
            raise SchedulerRefused(f"{each!r} is no id of a job")
    return ids


def _words(complaints: str) -> str:
    """Return what Slurm says on one line."""
    return "; ".join(re.sub(r"^s\w+: (error: )?", "", line) for line in complaints.splitlines() if line.strip())


def _ago(seconds: float) -> str:
    """Return a time of Slurm that means the same in all time zones."""
    return f"now-{max(math.ceil(seconds), 0)}seconds"
