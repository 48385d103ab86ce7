"""What Prometheus is told of a manager: `hpc-bridge up --metrics`."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hpc_bridge import tasks
from hpc_bridge.budget import HOUR
from hpc_bridge.bulk_record import Stage
from hpc_bridge.leases import Kind
from hpc_bridge.reconcile import State
from hpc_bridge.report import Seen
from hpc_bridge.switch import Plane

MOST_RUNS = 500
"""Of a beamline, whose moved bytes are remembered."""

OUTCOMES = ("accepted", "refused", "unanswered")


class Metrics(Collector):
    """Keeps what the manager saw last: who scrapes waits neither for it nor for a disk.

    Counters begin with 0 when the process does.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(self)
        self._seen: Seen | None = None
        self._used: dict[tuple[str, str, str], float] = {}
        self._moved: dict[str, dict[str, int]] = {}
        """Bytes of every run of a beamline."""
        self._n_moved: Counter[str] = Counter()

    def take(self, seen: Seen) -> None:
        """Take what the manager saw."""
        for account, used in seen.used.items():
            # Of a job that ended earlier than we thought less is on record afterwards.
            self._used[account] = max(used, self._used.get(account, 0.0))
        for beamline, told in seen.report["beamlines"].items():
            self._count_moved(beamline, told["files"]["runs"])
        self._seen = seen

    def _count_moved(self, beamline: str, runs: Sequence[Mapping[str, Any]]) -> None:
        before = self._moved.get(beamline)
        now = {run["run"]: _moved(run, (before or {}).get(run["run"], 0)) for run in runs}
        if before is not None:
            self._n_moved[beamline] += sum(max(0, moved - before.get(run, 0)) for run, moved in now.items())
        # A beamline that is let go lists none, and lists them again when it comes back.
        known = list(((before or {}) | now).items())[-MOST_RUNS:]
        self._moved[beamline] = dict(known)

    def collect(self) -> Iterator[Metric]:
        """Yield all families, those of which nothing is known without values."""
        seen = self._seen
        age = _gauge("report_age_seconds", "Since the manager looked at itself: it does so every second.")
        if seen is not None:
            age.add_metric([], time.time() - seen.at)
        yield age
        beamlines = {} if seen is None else seen.report["beamlines"]
        yield from _of_sites(seen)
        yield from _of_pilots(beamlines, seen)
        yield from self._of_costs(beamlines)
        yield from self._of_files(beamlines, seen)

    def _of_costs(self, beamlines: Mapping[str, Any]) -> Iterator[Metric]:
        by = ["beamline", "site", "account"]
        seconds = _counter("node_seconds", "Node-seconds used since this manager began.", by)
        for account, used in list(self._used.items()):
            seconds.add_metric(account, used)
        used_of = _gauge("account_used_node_seconds", "Used of an account since its period began.", by)
        left_of = _gauge("account_left_node_seconds", "Left of its budget; none without a budget.", by)
        for name, told in beamlines.items():
            for site, account in told["accounts"].items():
                used = account["used_node_hours"] * HOUR
                used_of.add_metric([name, site, account["account"]], used)
                if account["node_hours"] is not None:
                    left_of.add_metric([name, site, account["account"]], account["node_hours"] * HOUR - used)
        yield from (seconds, used_of, left_of)

    def _of_files(self, beamlines: Mapping[str, Any], seen: Seen | None) -> Iterator[Metric]:
        waiting = _gauge("tasks", "Tasks of nodes for files, by what they do.", ["beamline", "state"])
        runs = _gauge("file_runs", "Runs on record that go by file, by what is done for them.", ["beamline", "stage"])
        moved = _counter("moved_bytes", "Of files of runs, moved to sites since this manager began.", ["beamline"])
        plane = _gauge("plane", "1 for the way that frames go, where we decide it.", ["beamline", "plane"])
        trouble = _gauge("fallback_trouble", "1 while no file would save a stream that is lost.", ["beamline"])
        for name, told in beamlines.items():
            files = told["files"]
            for state in tasks.State:
                waiting.add_metric([name, state.value], files["tasks"].get(state, 0))
            for stage in Stage:
                runs.add_metric([name, stage.value], 0 if seen is None else seen.stages[name].get(stage, 0))
            moved.add_metric([name], self._n_moved[name])
            for way in Plane if files["plane"] else ():
                plane.add_metric([name, way.value], files["plane"]["plane"] == way.value)
            trouble.add_metric([name], bool(files["trouble"]))
        yield from (waiting, runs, moved, plane, trouble)


def _of_sites(seen: Seen | None) -> Iterator[Metric]:
    reachable = _gauge("site_reachable", "1 while a site's scheduler answers.", ["site"])
    listed = _gauge("site_listing_age_seconds", "Since a site listed its jobs.", ["site"])
    asked = _counter("submissions", "Jobs that were asked for, by what came of it.", ["site", "outcome"])
    for name, told in {} if seen is None else seen.report["sites"].items():
        reachable.add_metric([name], told["unreachable"] is None)
        if seen is not None and told["listed"] is not None:
            listed.add_metric([name], seen.at - told["listed"])
        for outcome in OUTCOMES:
            asked.add_metric([name, outcome], 0 if seen is None else seen.submissions.get((name, outcome), 0))
    yield from (reachable, listed, asked)


def _of_pilots(beamlines: Mapping[str, Any], seen: Seen | None) -> Iterator[Metric]:
    wanted = _gauge("wanted_pilots", "Pilots that are wanted.", ["beamline", "kind"])
    pilots = _gauge("pilots", "Pilots by what they do.", ["beamline", "site", "kind", "state"])
    heard = _gauge("heartbeat_age_max_seconds", "Since the most silent pilot was heard of.", ["beamline"])
    lag = _gauge("lag_max_seconds", "How far the slowest pilot is behind the detector.", ["beamline"])
    passed = _gauge("passed_by_queues", "Queues that are passed by for a while.", ["beamline"])
    runs = _gauge("runs", "Runs that are on.", ["beamline"])
    for name, told in beamlines.items():
        wanted.add_metric([name, Kind.STREAM], told["wanted"])
        wanted.add_metric([name, Kind.FILES], told["files"]["wanted"])
        there = Counter((pilot["site"], pilot["kind"], pilot["state"]) for pilot in told["pilots"])
        sites = [] if seen is None else seen.sites[name]
        held = {(site, Kind.STREAM.value): None for site in sites} | {(site, kind): None for site, kind, _ in there}
        for site, kind in held:
            for state in State:
                if state is not State.OVER:
                    pilots.add_metric([name, site, kind, state.value], there[site, kind, state.value])
        for family, what in ((heard, "heard_s_ago"), (lag, "lag_s")):
            values = [pilot[what] for pilot in told["pilots"] if pilot[what] is not None]
            if values:
                family.add_metric([name], max(values))
        passed.add_metric([name], len(told["passed_by"]))
        runs.add_metric([name], len(told["runs"]))
    yield from (wanted, pilots, heard, lag, passed, runs)


def _moved(run: Mapping[str, Any], before: int) -> int:
    """Return the bytes of a run that are at its site."""
    match run["stage"]:
        case Stage.HASHING:  # these were read only
            return 0
        case Stage.FAILED | Stage.CANCELED:
            return before
        case _:
            return int(run["moved"])


def _counter(name: str, says: str, labels: Sequence[str]) -> CounterMetricFamily:
    return CounterMetricFamily(f"hpc_bridge_{name}", says, labels=labels)


def _gauge(name: str, says: str, labels: Sequence[str] = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"hpc_bridge_{name}", says, labels=labels)
