"""What Prometheus is told of a gateway: `xpcs-stream gateway --metrics`."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stream.delivery import HubState, KafkaState
from stream.gateway_runs import GatewayRuns
from stream.gateway_status import GatewayStatus, Seen
from stream.plane_file import WAYS
from stream.sinks.spool import Spool


def registry(runs: GatewayRuns, status: GatewayStatus, planes: Sequence[str], spool: Spool | None) -> CollectorRegistry:
    """Return what is served.

    Parameters
    ----------
    status
        That looks at everything every second: who scrapes takes what it saw last, and so waits for no lock or disk.
    planes
        Addresses of where frames go, in the order of the status.
    """
    made = CollectorRegistry()
    ProcessCollector(registry=made)
    made.register(_Gateway(runs, status, planes, spool))
    return made


class _Gateway(Collector):
    def __init__(self, runs: GatewayRuns, status: GatewayStatus, planes: Sequence[str], spool: Spool | None) -> None:
        self._runs, self._status, self._planes, self._spool = runs, status, planes, spool

    def collect(self) -> Iterator[Metric]:
        """Yield all families, those of which nothing is known without values."""
        seen = self._status.last
        yield from self._of_runs(seen)
        yield from self._of_spool(seen)
        yield from self._of_hubs(_through(self._planes, seen, HubState))
        yield from self._of_kafka(_through(self._planes, seen, KafkaState))

    def _of_runs(self, seen: Seen | None) -> Iterator[Metric]:
        runs = self._runs
        yield _counter("frames", "Frames that came.", runs.frames)
        yield _counter("frame_bytes", "Of these frames, as their detector compressed them.", runs.n_bytes)
        yield _counter("unsent_frames", "Of these frames, those that went by file only.", runs.unsent)
        yield _counter("runs", "Runs that began.", runs.n_runs)
        is_on = None if seen is None else float(seen.told["run"] is not None)
        yield _gauge("running", "1 while a run is on.", is_on)
        plane = _gauge("plane", "1 for the way that frames go.", labels=["plane"])
        for way in WAYS:
            plane.add_metric([way], float(seen is not None and seen.told["plane"] == way))
        yield plane
        lag = None if seen is None else seen.told["ack_lag_s"]
        yield _gauge("ack_lag_seconds", "Since the oldest frame was sent that no worker has safe; 0: all are.", lag)
        age = None if seen is None else time.monotonic() - seen.at
        yield _gauge("status_age_seconds", "Since the gateway looked at itself: it does so every second.", age)
        lost = _counter("lost_records", "Records of frames that went before a worker had them safe.", labels=["to"])
        for to, delivery in zip(self._planes, [] if seen is None else seen.deliveries, strict=False):
            if delivery.n_lost is not None:
                lost.add_metric([to], delivery.n_lost)
        yield lost

    def _of_spool(self, seen: Seen | None) -> Iterator[Metric]:
        spool, told = self._spool, None if seen is None else seen.told["spool"]
        held, room, full = None, None, None
        if seen is not None and told is not None:
            held, room = told["held_bytes"], seen.room_bytes
            full = math.inf if told["full_in_s"] is None else told["full_in_s"]
        yield _gauge("spool_held_bytes", "Of all runs in the spool.", held)
        yield _gauge("spool_free_bytes", "That the spool still takes: free, or held by runs that are safe.", room)
        limit, written, lost = (None, None, None) if spool is None else (spool.keep_bytes, spool.written, spool.lost)
        yield _gauge("spool_limit_bytes", "Of all runs in the spool, at most.", limit)
        yield _gauge(
            "spool_full_in_seconds", "Until the spool is full at the rate of now; +Inf: it is not filled.", full
        )
        yield _counter("spool_written_bytes", "Written to the spool.", written)
        yield _counter("spool_lost_frames", "Frames that came and are not in the spool.", lost)

    def _of_hubs(self, hubs: Sequence[tuple[str, HubState]]) -> Iterator[Metric]:
        of_region, of_plane = ["to", "region"], ["to"]
        sent = _counter("sent_records", "Records of frames for workers.", labels=of_region)
        safe = _counter("safe_records", "Of these, those before the last checkpoint.", labels=of_region)
        why = "Records of frames in memory; those that are safe stay as long as there is room."
        held = _gauge("ring_held_bytes", why, labels=of_region)
        limit = _gauge("ring_limit_bytes", "Of records of frames in memory, at most.", labels=of_region)
        free = _gauge("credit_free_bytes", "That workers still take: the rest of their windows.", labels=of_region)
        used = _gauge("credit_used_bytes", "On their way to workers.", labels=of_region)
        unsafe = _gauge("partials_unsafe_records", "Partial sums with which no merger is done.", labels=of_plane)
        workers = _gauge("workers", "Workers that are alive.", labels=of_plane)
        mergers = _gauge("mergers", "Those that read partial sums.", labels=of_plane)
        regions = _gauge("regions", "Regions of the detector.", labels=of_plane)
        served = _gauge("served_regions", "Regions that a worker has.", labels=of_plane)
        for to, hub in hubs:
            for log in hub.logs:
                if log.region is None:
                    unsafe.add_metric([to], log.appended - log.safe)
                    mergers.add_metric([to], log.readers)
                    continue
                region = [to, str(log.region)]
                sent.add_metric(region, log.appended)
                safe.add_metric(region, log.safe)
                held.add_metric(region, log.held_bytes)
                limit.add_metric(region, log.held_bytes + log.room_bytes)
                free.add_metric(region, max(0, log.window_bytes - log.used_bytes))
                used.add_metric(region, log.used_bytes)
            workers.add_metric([to], hub.workers)
            regions.add_metric([to], len(hub.logs) - 1)
            served.add_metric([to], hub.served)
        yield from (sent, safe, held, limit, free, used, unsafe, workers, mergers, regions, served)

    def _of_kafka(self, planes: Sequence[tuple[str, KafkaState]]) -> Iterator[Metric]:
        delivered = _counter("kafka_delivered_records", "Records that Kafka has.", labels=["to"])
        failed = _counter("kafka_failed_records", "Records that Kafka will never have.", labels=["to"])
        waiting = _gauge("kafka_waiting_records", "Records that Kafka does not have yet.", labels=["to"])
        n_bytes = _gauge("kafka_waiting_bytes", "Of frames in these, if Kafka is not waited for.", labels=["to"])
        for to, kafka in planes:
            delivered.add_metric([to], kafka.delivered)
            failed.add_metric([to], kafka.failed)
            waiting.add_metric([to], kafka.waiting)
            n_bytes.add_metric([to], kafka.waiting_bytes)
        yield from (delivered, failed, waiting, n_bytes)


_State = TypeVar("_State", HubState, KafkaState)


def _through(planes: Sequence[str], seen: Seen | None, kind: type[_State]) -> list[tuple[str, _State]]:
    """Return the planes of a kind, by their addresses."""
    found = zip(planes, [] if seen is None else seen.deliveries, strict=False)
    return [(to, delivery.through) for to, delivery in found if isinstance(delivery.through, kind)]


def _counter(name: str, says: str, value: float | None = None, labels: Sequence[str] = ()) -> CounterMetricFamily:
    return CounterMetricFamily(f"xpcs_gateway_{name}", says, value=value, labels=labels or None)


def _gauge(name: str, says: str, value: float | None = None, labels: Sequence[str] = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"xpcs_gateway_{name}", says, value=value, labels=labels or None)
