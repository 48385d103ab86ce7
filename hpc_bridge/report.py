"""How a beamline's nodes are, as plain values for JSON and as tables for people."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpc_bridge import budget
from hpc_bridge.bulk_report import plane_text, table
from hpc_bridge.config import Beamline
from hpc_bridge.leases import LONGEST_RUN, Leases
from hpc_bridge.reconcile import View

_STYLES = {"serving": "green", "draining": "yellow", "silent": "bold red", "over": "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How a manager and all that it holds were at one moment."""

    at: float
    """Seconds of the Unix epoch."""
    report: Mapping[str, Any]
    """What `hpc-bridge status` shows."""
    sites: Mapping[str, Sequence[str]]
    """Where every beamline has nodes."""
    used: Mapping[tuple[str, str, str], float]
    """Node-seconds since the manager began, by beamline, site and account."""
    stages: Mapping[str, Mapping[str, int]]
    """How many runs of every beamline go by file, by stage."""
    submissions: Mapping[tuple[str, str], int]
    """Jobs that were asked for since then, by site and what came of it."""


def report(
    beamline: Beamline,
    views: Sequence[View],
    leases: Leases,
    *,
    wanted: int,
    files: Mapping[str, Any] | None = None,
    now: float,
) -> dict[str, Any]:
    """Return how one beamline is. Times in seconds; those of the Unix epoch where they are moments.

    Of `files` it says how many pilots for files are wanted, and of tasks how many there are by their state.
    """
    name = beamline.beamline
    return {
        "wanted": wanted,
        "files": dict(files) if files is not None else {"wanted": 0, "tasks": {}},
        "runs": [run.run for run in leases.runs(name, now) if run.ended is None and now - run.began < LONGEST_RUN],
        "passed_by": [
            {
                "kind": pause.kind.value,
                "site": pause.site,
                "queue": pause.queue,
                "until": pause.until,
                "why": pause.why,
            }
            for pause in leases.pauses(name, now)
        ],
        "accounts": {
            site: {
                "account": account.account,
                "node_hours": account.node_hours,
                "used_node_hours": leases.cost(name, site, account.account, since=account.begins, now=now)
                / budget.HOUR,
            }
            for site, account in beamline.accounts.items()
        },
        "pilots": [_pilot(view, now) for view in views],
    }


def _pilot(view: View, now: float) -> dict[str, Any]:
    lease, heard = view.lease, view.heard
    status = None if heard is None else heard.heartbeat.status
    task = None if heard is None or heard.heartbeat.task is None else heard.heartbeat.task
    left = view.ends - now
    return {
        "lease": lease.lease,
        "kind": lease.kind.value,
        "site": lease.site,
        "queue": lease.queue,
        "job": lease.job_id,
        "state": view.state.value,
        "why": view.why,
        "replaces": lease.replaces,
        "node": lease.node or None,
        "regions": [] if status is None else list(status.regions),
        "frames": None if status is None else status.frames,
        "lag_s": None if status is None else status.lag_s,
        "task": task.task if task is not None and view.has_task else None,
        "message": "" if status is None else status.message,
        "heard_s_ago": None if heard is None else now - heard.at,
        "clock_offset_s": None if heard is None else heard.offset,
        "ends_in_s": left if left < float("inf") else None,
        "node_seconds": budget.used(lease, now),
    }


def tables(reported: Mapping[str, Any], now: float) -> RenderableType:
    """Return what `hpc-bridge status` shows."""
    return Group(*_tables(reported, now))


def _tables(reported: Mapping[str, Any], now: float) -> Iterator[RenderableType]:
    for site, told in reported["sites"].items():
        if told["unreachable"] is not None:
            yield Text(f"{site} cannot be reached: {told['unreachable']}", style="bold red")
    for name, beamline in reported["beamlines"].items():
        serving = Counter(pilot["kind"] for pilot in beamline["pilots"] if pilot["state"] == "serving")
        runs = ", ".join(beamline["runs"])
        title = f"{name}: {serving['stream']} of {beamline['wanted']} nodes serve{f', run {runs}' if runs else ''}"
        if beamline["files"]["wanted"] or beamline["files"]["tasks"]:
            tasks = ", ".join(f"{n} {state}" for state, n in beamline["files"]["tasks"].items())
            title += f"; for files {serving['files']} of {beamline['files']['wanted']}, tasks: {tasks or 'none'}"
        yield _pilots(title, beamline["pilots"])
        if beamline["files"].get("plane"):
            yield plane_text(beamline["files"]["plane"])
        if trouble := beamline["files"].get("trouble"):
            yield Text(f"there is no fallback: {trouble}", style="bold red")
        if beamline["files"].get("runs"):
            yield table(name, beamline["files"]["runs"])
        for pilot in beamline["pilots"]:
            if pilot["why"]:
                yield Text(f"{pilot['lease'][:6]} {pilot['state']}: {pilot['why']}", style="yellow")
        for rung in beamline["passed_by"]:
            where = f"{rung['queue']} at {rung['site']}{' for files' * (rung['kind'] == 'files')}"
            text = f"{where} is passed by for {_time(rung['until'] - now)}: {rung['why']}"
            yield Text(text, style="yellow")
        for site, account in beamline["accounts"].items():
            of = "" if account["node_hours"] is None else f" of {account['node_hours']:g}"
            yield Text(f"account {account['account']} at {site}: {account['used_node_hours']:.2f}{of} node hours used")


def _pilots(title: str, pilots: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("pilot", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("queue", no_wrap=True)
    table.add_column("node", no_wrap=True)
    has_tasks = any(pilot["kind"] == "files" for pilot in pilots)
    table.add_column("regions, task" if has_tasks else "regions", min_width=13 if has_tasks else None, overflow="fold")
    for heading in ("lag", "heard", "ends in", "node min"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("job", no_wrap=True, max_width=10)
    sites = {pilot["site"] for pilot in pilots}
    for pilot in pilots:
        table.add_row(
            pilot["lease"][:6],
            Text(pilot["state"], style=_STYLES.get(pilot["state"], "")),
            pilot["queue"] if len(sites) == 1 else f"{pilot['site']}: {pilot['queue']}",
            pilot["node"] or "",
            _ranges(pilot["regions"]) if pilot["kind"] == "stream" else pilot["task"] or "no task",
            _time(pilot["lag_s"]),
            _time(pilot["heard_s_ago"]),
            _time(pilot["ends_in_s"]),
            f"{pilot['node_seconds'] / 60:.1f}",
            pilot["job"] or "",
        )
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _ranges(regions: Sequence[int]) -> str:
    """Write 0, 1, 2, 5 as 0-2 5."""
    found: list[list[int]] = []
    for region in sorted(regions):
        if found and region == found[-1][-1] + 1:
            found[-1][1:] = [region]
        else:
            found.append([region])
    return " ".join("-".join(map(str, ends)) for ends in found)
