"""What Prometheus is told by every process that it can reach, and that docs/grafana asks for nothing else."""

import json
import socket
import time
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from urllib.request import urlopen

import promql_parser as promql
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import hpc_bridge.scraped
import stream.scraped
from hpc_bridge.metrics import Metrics
from hpc_bridge.report import Seen
from stream.ingest.hub import WINDOW
from tests.bridge import Bridge, stand_in
from tests.kafka import free_ports
from tests.plane import REGIONS, Plane, until_said
from tests.test_command_line import finished
from tests.test_gateway_status import FRAME_BYTES, Gateway
from tests.test_kill import COUNTS, N_FRAMES, frames, free, qmap, until
from tests.test_live import page

pytestmark = pytest.mark.timeout(200)

__all__ = ["frames", "page", "qmap"]

GRAFANA = Path(__file__).parents[1] / "docs/grafana"
DASHBOARD = json.loads((GRAFANA / "xpcs-stream.json").read_text())
ALERTS = yaml.safe_load((GRAFANA / "alerts.yml").read_text())


class Scraped:
    """What a process serves at a port of this machine."""

    def __init__(self, port=None):
        [self.port] = [port] if port else free_ports(1)

    def families(self):
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=20) as answer:
            return list(text_string_to_metric_families(answer.read().decode()))

    def names(self):
        """Names of samples, also of those that have no value now."""
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        return {each.name + end for each in self.families() for end in suffixes.get(each.type, ("",))}

    def of(self, name, **labels):
        """Values of a metric where it has these labels."""
        samples = [sample for family in self.families() for sample in family.samples if sample.name == name]
        return [sample.value for sample in samples if labels.items() <= sample.labels.items()]


@pytest.fixture
def plane(tmp_path, qmap):
    with ExitStack() as stack:
        yield Plane(f"zmq://{free()}/beamline", stack, tmp_path, qmap)


@pytest.fixture
def bridge_of(tmp_path):
    with ExitStack() as stack:
        yield lambda command, **options: stack.enter_context(closing(Bridge(tmp_path, command, **options)))


def test_a_gateway_tells_what_came_who_takes_it_and_how_far_it_is_safe(plane, frames):
    told = Scraped()
    gateway = Gateway(plane, "--spool", "spool", "--metrics", told.port)
    assert told.of("xpcs_gateway_regions") == [REGIONS]
    worker = plane.worker("--checkpoint-every", "0.2 s")
    until_said(worker, "taking regions")
    until(gateway.process, lambda: told.of("xpcs_gateway_served_regions") == [REGIONS])
    finished(gateway.replay(frames))
    until(gateway.process, lambda: min(told.of("xpcs_gateway_safe_records_total")) > 2)
    until(gateway.process, lambda: told.of("xpcs_gateway_running") == [0])
    until(gateway.process, lambda: told.of("xpcs_gateway_ack_lag_seconds") == [0])
    assert told.of("xpcs_gateway_frames_total") == [N_FRAMES]
    assert told.of("xpcs_gateway_frame_bytes_total") == [COUNTS.nbytes]
    assert told.of("xpcs_gateway_runs_total") == [1]
    assert told.of("xpcs_gateway_workers") == [1]
    assert told.of("xpcs_gateway_lost_records_total") == [0]
    assert told.of("xpcs_gateway_plane", plane="stream") == [1]
    sent = told.of("xpcs_gateway_sent_records_total")
    assert sent == told.of("xpcs_gateway_safe_records_total")
    assert len(sent) == REGIONS
    credit = [told.of(f"xpcs_gateway_credit_{each}_bytes") for each in ("free", "used")]
    assert [sum(each) for each in zip(*credit, strict=True)] == [WINDOW] * REGIONS
    [held] = told.of("xpcs_gateway_spool_held_bytes")
    assert held == gateway.status["spool"]["held_bytes"] > 0
    assert told.of("xpcs_gateway_spool_lost_frames_total") == [0]


def test_frames_that_nobody_takes_fill_the_ring_and_are_counted_as_lost(plane, frames):
    told = Scraped()
    gateway = Gateway(plane, "--metrics", told.port, keep=500 * FRAME_BYTES / 1e9)
    finished(gateway.replay(frames))
    until(gateway.process, lambda: told.of("xpcs_gateway_lost_records_total") > [0])
    limit = told.of("xpcs_gateway_ring_limit_bytes", region="0")
    assert [0] < told.of("xpcs_gateway_ring_held_bytes", region="0") <= limit == [500 * FRAME_BYTES]
    assert told.of("xpcs_gateway_safe_records_total", region="0") == [0]
    until(gateway.process, lambda: told.of("xpcs_gateway_ack_lag_seconds") > [1])
    assert told.of("xpcs_gateway_spool_free_bytes") == []


def test_who_connects_and_says_nothing_keeps_nobody_from_scraping(plane):
    told = Scraped()
    gateway = Gateway(plane, "--metrics", f"127.0.0.1:{told.port}")
    with ExitStack() as idle:
        for _ in range(20):
            idle.enter_context(socket.create_connection(("127.0.0.1", told.port)))
        assert told.of("xpcs_gateway_frames_total") == [0]
        gateway.end()
        assert gateway.process.returncode == 0


@pytest.mark.parametrize("scraped", [stream.scraped, hpc_bridge.scraped])
@pytest.mark.parametrize(
    "at", ["nowhere", "127.0.0.1:", "127.0.0.1:99999", "user@127.0.0.1:9100", "taken", "1.2.3.4:1"]
)
def test_an_address_that_cannot_be_used_is_named(scraped, at):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = f"127.0.0.1:{taken.getsockname()[1]}" if at == "taken" else at
        with pytest.raises(scraped.ConfigError, match=f"--metrics {at}"), scraped.served(at, CollectorRegistry()):
            pass


def test_a_manager_tells_of_its_pilots_what_they_cost_and_what_is_left(bridge_of):
    told = Scraped()
    accounts = {"here": {"account": "beam", "node_hours": 10.0}}
    bridge = bridge_of(stand_in(lag=0.5), nodes=1, max_nodes=1, accounts=accounts)
    bridge.up("--metrics", told.port)
    is_stream = {"beamline": bridge.name, "site": "here", "kind": "stream"}
    bridge.until(lambda: told.of("hpc_bridge_pilots", **is_stream, state="serving") == [1])
    assert told.of("hpc_bridge_pilots", **is_stream, state="silent") == [0]
    assert told.of("hpc_bridge_wanted_pilots", beamline=bridge.name, kind="stream") == [1]
    assert told.of("hpc_bridge_site_reachable", site="here") == [1]
    assert told.of("hpc_bridge_submissions_total", site="here", outcome="accepted") == [1]
    assert told.of("hpc_bridge_submissions_total", site="here", outcome="refused") == [0]
    bridge.until(lambda: told.of("hpc_bridge_lag_max_seconds") == [0.5])
    bridge.until(lambda: told.of("hpc_bridge_node_seconds_total", account="beam") > [1])
    bridge.until(lambda: told.of("hpc_bridge_account_left_node_seconds", account="beam") < [35_999])
    second = bridge.run("up", "--metrics", told.port, check=False)
    assert second.returncode == 2
    assert "there is one" in second.stderr


def seen(*runs, used=0.0, stages=None):
    """What a manager saw of a beamline that has runs by file."""
    files = {"wanted": 0, "tasks": {"waiting": 2}, "plane": None, "trouble": "", "runs": list(runs)}
    beamline = {"wanted": 1, "files": files, "runs": [], "passed_by": [], "accounts": {}, "pilots": []}
    return Seen(
        at=time.time(),
        report={"sites": {}, "beamlines": {"8idi": beamline}},
        sites={"8idi": ["polaris"]},
        used={("8idi", "polaris", "beam"): used},
        stages={"8idi": stages or {}},
        submissions={},
    )


def run_of(name, stage, moved, size=100):
    return {"run": name, "stage": stage, "moved": moved, "bytes": size}


def test_bytes_are_counted_once_however_often_a_run_is_looked_at(tmp_path):
    metrics = Metrics()

    def moved():
        families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
        return {sample.name: sample.value for family in families for sample in family.samples}[
            "hpc_bridge_moved_bytes_total"
        ]

    metrics.take(seen(run_of("old", "done", 100)))
    assert moved() == 0  # that was before we began
    metrics.take(seen(run_of("old", "done", 100), run_of("new", "hashing", 70)))
    assert moved() == 0  # read, not moved
    for state in (("sending", 40), ("sending", 40), ("failed", 100), ("failed", 100)):
        metrics.take(seen(run_of("new", *state)))
        assert moved() == 40
    metrics.take(seen(run_of("new", "computing", 100)))
    assert moved() == 100


def test_node_seconds_never_fall_though_a_job_turns_out_to_have_ended_earlier():
    metrics = Metrics()
    for used, known in ((10.0, 10.0), (8.0, 10.0), (12.0, 12.0)):
        metrics.take(seen(used=used, stages={"failed": 3}))
        text = generate_latest(metrics.registry).decode()
        assert f'hpc_bridge_node_seconds_total{{account="beam",beamline="8idi",site="polaris"}} {known}\n' in text
    assert 'hpc_bridge_file_runs{beamline="8idi",stage="failed"} 3.0\n' in text
    assert 'hpc_bridge_tasks{beamline="8idi",state="waiting"} 2.0\n' in text


def panels(dashboard):
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())


def questions():
    """Every expression of the dashboard, and of the alerts."""
    for panel in panels(DASHBOARD):
        yield from (target["expr"] for target in panel.get("targets", ()))
    for group in ALERTS["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def asked(node):
    """Names of all metrics that an expression asks for."""
    if isinstance(node, promql.VectorSelector):
        return {node.name}
    if isinstance(node, promql.MatrixSelector):
        return asked(node.vector_selector)
    parts = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "param")]
    return set().union(*(asked(part) for part in chain(parts, getattr(node, "args", ())) if part is not None))


def of_grafana(expression):
    """Put something in the place of the variables of Grafana."""
    return expression.replace("$__rate_interval", "1m").replace("$__range", "1h")


def test_the_dashboard_and_the_alerts_ask_only_for_what_is_served(page, plane, bridge_of):
    gateway, manager = Scraped(), Scraped()
    Gateway(plane, "--metrics", gateway.port)
    bridge_of(stand_in(), nodes=0, max_nodes=1).up("--metrics", manager.port)
    served = {"up"}.union(*(process.names() for process in (Scraped(page.port), gateway, manager)))
    wanted = set().union(*(asked(promql.parse(of_grafana(each))) for each in questions()))
    assert wanted - served == set()
    assert len(wanted) > 40


def test_every_panel_says_what_it_shows_in_which_unit_and_stands_alone():
    places = []
    for panel in panels(DASHBOARD):
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        at = panel["gridPos"]
        places += [(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24
    ids = [panel["id"] for panel in panels(DASHBOARD)]
    assert len(ids) == len(set(ids))
