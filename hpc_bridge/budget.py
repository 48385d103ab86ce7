"""What an account has left, and whether the scheduler counts as we do. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpc_bridge.config import Account
from hpc_bridge.errors import BudgetExceeded
from hpc_bridge.leases import Lease
from hpc_bridge.scheduler import Usage

HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A job of which record and scheduler differ. Node-seconds; None: not known there."""

    job_id: str
    lease: str | None
    ours: float | None
    theirs: float | None


def used(lease: Lease, now: float) -> float:
    """Return the node-seconds that a lease used until `now`; without an end on record until its walltime was over."""
    if lease.started is None:
        return 0.0
    until = min(now, lease.started + lease.walltime) if lease.ended is None else lease.ended
    return lease.nodes * max(0.0, until - lease.started)


def committed(leases: Iterable[Lease], now: float) -> float:
    """Return the node-seconds that leases may still use until their walltime is over."""
    return sum(lease.nodes * lease.walltime - used(lease, now) for lease in leases if lease.ended is None)


def check(account: Account, *, site: str, used_s: float, committed_s: float, request_s: float) -> None:
    """See that an account covers a request. All in node-seconds.

    Raises
    ------
    BudgetExceeded
        Names the account, what is left of it and what is asked for.
    """
    if account.node_hours is None:
        return
    left = account.node_hours - (used_s + committed_s) / HOUR
    if request_s / HOUR > left:
        raise BudgetExceeded(
            f"account {account.account} at {site} has {max(0.0, left):.2f} of {account.node_hours:g} node hours left "
            f"({used_s / HOUR:.2f} used, {committed_s / HOUR:.2f} promised to jobs that are there), "
            f"{request_s / HOUR:.2f} are asked for"
        )


def differences(
    leases: Sequence[Lease], usage: Sequence[Usage], *, now: float, tolerance: float = 60.0
) -> list[Difference]:
    """Return where our own account of jobs and the scheduler's differ by more than `tolerance` node-seconds.

    A job that used nothing need not be accounted, and one that used nothing may be.
    """
    theirs = {row.id: row.node_seconds for row in usage}
    ours = {lease.job_id: lease for lease in leases if lease.job_id is not None}
    found = []
    for job_id in dict.fromkeys([*ours, *theirs]):
        lease = ours.get(job_id)
        own = None if lease is None else used(lease, now)
        other = theirs.get(job_id)
        if abs((own or 0.0) - (other or 0.0)) > tolerance:
            name = None if lease is None else lease.lease
            found.append(Difference(job_id=job_id, lease=name, ours=own, theirs=other))
    return found
