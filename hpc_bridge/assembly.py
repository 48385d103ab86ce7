"""The only place that names the classes of schedulers, and what a job of ours is."""

from itertools import chain

from hpc_bridge.config import Beamline, Site
from hpc_bridge.curve import ManagerKeys
from hpc_bridge.dialing import file_of
from hpc_bridge.errors import ConfigError
from hpc_bridge.job import Attributes, JobSpec
from hpc_bridge.leases import Kind, Lease
from hpc_bridge.local import Local
from hpc_bridge.pbs import Pbs
from hpc_bridge.scheduler import Scheduler
from hpc_bridge.slurm import Slurm


def scheduler_of(site: Site) -> Scheduler:
    """Return the scheduler of a site.

    Raises
    ------
    ConfigError
        A file of credentials is not there, or others may read it.
    """
    for file in site.credentials:
        if not file.is_file():
            raise ConfigError(f"site {site.site}: credentials {file}: no such file")
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"site {site.site}: credentials {file}: others may read them; chmod 600 it")
    timeout = site.command_timeout.total_seconds()
    match site.scheduler:
        case "slurm":
            return Slurm(site.directory, submit_through=site.submit_through, timeout=timeout)
        case "pbs":
            return Pbs(site.directory, submit_through=site.submit_through, timeout=timeout)
        case "local":
            return Local(site.directory, timeout=timeout, grace=site.drain.total_seconds())


def keys_of(site: Site) -> ManagerKeys | None:
    """Return the manager's keys for the pilots of a site, None if there are none.

    Raises
    ------
    ConfigError
        They are not what they should be, or only some are given.
    """
    beats = site.heartbeats
    given = (beats.secret_key, beats.allowed, beats.pilot_secret_key, beats.manager_key)
    if all(each is None for each in given):
        return None
    if beats.secret_key is None or beats.allowed is None or None in given:
        raise ConfigError(
            f"site {site.site}: heartbeats: secret_key, allowed, pilot_secret_key and manager_key go together"
        )
    return ManagerKeys.read(beats.secret_key, beats.allowed)


def job_of(lease: Lease, site: Site, beamline: Beamline) -> JobSpec:
    """Return the job of a lease: a pilot that runs the beamline's command, or its tasks."""
    terms = {
        "--every": f"{site.heartbeats.every.total_seconds():g}",
        "--alone": f"{site.alone.total_seconds():g}",
        "--grace": f"{site.drain.total_seconds():g}",
        "--requeue-code": str(site.requeue_code),
    }
    what = ("--tasks",) if lease.kind is Kind.FILES else ("--", *beamline.command)
    words = ("pilot", *way_home(site, lease.lease), *chain(*terms.items()), *what)
    return job(lease.name, words, site, lease.queue, beamline)


def way_home(site: Site, lease: str) -> list[str]:
    """Return the options of a pilot by which it finds its manager, or is found, and is known there."""
    beats = site.heartbeats
    if beats.address is not None:
        way = ["--manager", beats.address]
    else:
        way = ["--listen", beats.listen, "--announce", str(file_of(site.directory, lease))]
    keys = {"--secret-key": beats.pilot_secret_key, "--manager-key": beats.manager_key}
    given = [str(word) for name, file in keys.items() if file is not None for word in (name, file)]
    return ["--lease", lease, *way, *given]


def job(name: str, arguments: tuple[str, ...], site: Site, rung: str, beamline: Beamline) -> JobSpec:
    """Return a job that runs `hpc-bridge` with these arguments on a node of a rung."""
    [queue] = [queue for queue in site.queues if queue.name == rung]
    account = beamline.accounts.get(site.site)
    options = queue.options
    if site.scheduler == "slurm":
        # To the pilot alone, which tells its command. At 0: when the job is preempted, and not, as Slurm would, up to a
        # minute before the walltime is over, when it was relieved long ago.
        options = (*options, "--signal=B:TERM@0")
    return JobSpec(
        name=name,
        executable=site.pilot,
        arguments=arguments,
        directory=site.directory,
        environment=beamline.environment,
        pre_launch=site.prepare,
        attributes=Attributes(
            duration=queue.walltime,
            queue_name=queue.queue or queue.name,
            account=None if account is None else account.account,
            reservation_id=queue.reservation,
            custom_attributes=options,
        ),
    )
