"""What Prometheus is told."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from stream.live.view import PLANES

LOSSES = ("lost", "late", "duplicate", "undecodable", "stray")
ENDS = ("complete", "aborted", "failed")

REGIONS = {
    "frames": ("xpcs_region_frames", "Frames of which the newest sums of a region are."),
    "lost": ("xpcs_region_lost_frames", "Frames of a region that never came."),
    "lag": ("xpcs_region_lag_seconds", "From the end of the newest frame of a region to its correlation."),
    "age": ("xpcs_region_age_seconds", "Since a worker was heard of that has the region; none once it has ended."),
    "checkpoint": ("xpcs_region_checkpoint_frame", "Frames of the newest checkpoint of a region."),
}
"""Gauges by what they are of, see `stream.live.regions`."""

MOST_REGIONS = 64
"""That Prometheus is told of."""

BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts over all runs since this process began; what a ledger counts, it counts per run."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._frames = Counter("xpcs_frames", "Frames correlated.", registry=self._registry)
        self._bytes = Counter("xpcs_frame_bytes", "Counts correlated, uncompressed (bytes).", registry=self._registry)
        self._losses = Counter(
            "xpcs_losses",
            "lost: frames that never came; late: of these, those that came after a later one; duplicate: frames that "
            "came again; undecodable, stray: messages that could not be read or belong to another run.",
            ["cause"],
            registry=self._registry,
        )
        self._runs = Counter("xpcs_runs", "Runs that ended.", ["state"], registry=self._registry)
        self._rejected = Counter(
            "xpcs_rejected", "Messages of results that could not be read.", registry=self._registry
        )
        self._running = Gauge("xpcs_running", "1 while a run is on.", registry=self._registry)
        self._lag = Gauge(
            "xpcs_lag_seconds", "From the end of the newest frame to its correlation.", registry=self._registry
        )
        self._age = Gauge("xpcs_result_age_seconds", "Since the newest result came.", registry=self._registry)
        self._missing = Gauge(
            "xpcs_missing_regions", "Regions of the detector that are not in the result.", registry=self._registry
        )
        self._plane = Gauge("xpcs_plane", "1 for the plane in use.", ["plane"], registry=self._registry)
        self._regions = {
            name: Gauge(called, text, ["region"], registry=self._registry) for name, (called, text) in REGIONS.items()
        }
        self._clients = Gauge("xpcs_browsers", "Browsers that show the page.", registry=self._registry)
        self._served = Histogram(
            "xpcs_served_seconds",
            "From the end of the newest frame in a result to a browser that has it; with the wait for the result "
            "(--publish-every), where whoever made it tells how long that was.",
            buckets=BUCKETS,
            registry=self._registry,
        )
        for cause in LOSSES:
            self._losses.labels(cause)
        for end in ENDS:
            self._runs.labels(end)
        self._before: dict[str, int] = {}
        self._key = ""
        self._state = ""

    def served(self, seconds: float) -> None:
        """Take one latency."""
        self._served.observe(seconds)

    def text(self, state: Mapping[str, Any], regions: Sequence[Mapping[str, Any]], n_clients: int) -> bytes:
        """Return what is known, in Prometheus' own format; `n_clients` are connected."""
        self._lag.set(state["lag"] if state["lag"] is not None else float("nan"))
        self._age.set(state["age"] if state["age"] is not None else float("nan"))
        self._running.set(state["state"] == "running")
        self._missing.set(len(state["missing_regions"]))
        for plane in PLANES:
            self._plane.labels(plane).set(state["plane"] == plane)
        for name, gauge in self._regions.items():
            gauge.clear()  # the run before may have had more
            for region in regions[:MOST_REGIONS]:
                if region[name] is not None and math.isfinite(region[name]):
                    gauge.labels(region["region"]).set(region[name])
        self._clients.set(n_clients)
        return generate_latest(self._registry)

    def count(self, state: Mapping[str, Any]) -> None:
        """Take the state of a run, as `stream.live.view.View.state` returns it; every one, so that none is missed."""
        if state["key"] != self._key:
            self._key, self._before, self._state = state["key"], {}, ""
        frames = self._more("received", state)
        self._frames.inc(frames)
        self._bytes.inc(frames * state.get("frame_bytes", 0))
        for cause in LOSSES:
            self._losses.labels(cause).inc(self._more(cause, state))
        if state["state"] != self._state:
            self._state = state["state"]
            if self._state in ENDS:
                self._runs.labels(self._state).inc()

    def reject(self) -> None:
        """Count a message that could not be read."""
        self._rejected.inc()

    def _more(self, name: str, state: Mapping[str, Any]) -> int:
        more = max(0, int(state[name]) - self._before.get(name, 0))
        self._before[name] = max(int(state[name]), self._before.get(name, 0))
        return more
