"""What nodes cost, by the record of leases, and what the schedulers say that they cost."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpc_bridge import budget
from hpc_bridge.assembly import scheduler_of
from hpc_bridge.budget import HOUR
from hpc_bridge.errors import BridgeError
from hpc_bridge.leases import PREFIXES, Lease, Leases
from hpc_bridge.state import StateDirectory


def costs_of(state: Path, beamlines: Sequence[str], *, since: float, now: float) -> dict[str, Any]:
    """Return node-seconds since a moment, by beamline: per site, account and run; and where accountings differ.

    A scheduler that does not answer is named, and nothing is compared there.
    """
    directory = StateDirectory(state)
    sites = directory.sites()
    found: dict[str, Any] = {}
    with Leases.look(directory.record) as leases:
        for name in beamlines or leases.beamlines():
            ours = [lease for lease in leases.all(name, since) if lease.created >= since]
            by_account: dict[tuple[str, str], list[Lease]] = {}
            for lease in ours:
                by_account.setdefault((lease.site, lease.account), []).append(lease)
            accounts = []
            for (site, account), of_it in by_account.items():
                told: dict[str, Any] = {"site": site, "account": account}
                told["node_seconds"] = sum(budget.used(lease, now) for lease in of_it)
                try:
                    usage = [row for row in scheduler_of(sites[site]).used(account, since) if _is_of(name, row.name)]
                except (BridgeError, KeyError) as error:
                    told |= {"theirs": None, "why": str(error)}
                else:
                    told["theirs"] = sum(row.node_seconds for row in usage)
                    told["differences"] = [
                        {"job": each.job_id, "lease": each.lease, "ours": each.ours, "theirs": each.theirs}
                        for each in budget.differences(of_it, usage, now=now)
                    ]
                accounts.append(told)
            runs = leases.cost_by_run(name, since=since, now=now)
            found[name] = {"accounts": accounts, "runs": runs}
    return found


def _is_of(beamline: str, job: str) -> bool:
    return job.startswith(tuple(f"{prefix}{beamline}-" for prefix in PREFIXES.values()))


def tables(found: Mapping[str, Any]) -> RenderableType:
    """Return what `hpc-bridge costs` shows."""
    return Group(*_tables(found))


def _tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    for name, told in found.items():
        table = Table(title=f"{name}: node hours", title_justify="left", title_style="bold")
        for heading in ("site", "account"):
            table.add_column(heading)
        for heading in ("on record", "by the scheduler"):
            table.add_column(heading, justify="right")
        for account in told["accounts"]:
            theirs = account["theirs"]
            words = Text("not known", style="yellow") if theirs is None else f"{theirs / HOUR:.3f}"
            table.add_row(account["site"], account["account"], f"{account['node_seconds'] / HOUR:.3f}", words)
        yield table
        for account in told["accounts"]:
            if account["theirs"] is None:
                yield Text(f"{account['site']}: {account['why']}", style="yellow")
            for each in account.get("differences", ()):
                yield Text(f"job {each['job']}: {_minutes(each['ours'])} here, {_minutes(each['theirs'])} there")
        if told["runs"]:
            runs = Table(title="runs: node hours while each was on", title_justify="left")
            runs.add_column("run")
            runs.add_column("node hours", justify="right")
            for run, seconds in told["runs"].items():
                runs.add_row(run, f"{seconds / HOUR:.3f}")
            yield runs


def _minutes(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds / 60:.1f} node minutes"
