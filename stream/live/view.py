"""What the page shows of the run that is on."""

import math
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.live.dynamics import Dynamics
from stream.live.history import History, Past
from stream.live.picture import Bins, block_mean, block_of, on_the_detector
from stream.live.regions import Regions
from stream.live.section import floats, pack
from stream.live.stability import segments
from stream.live.twotime import two_time
from stream.messages import Arrays, Result, RunStart, RunStop
from stream.operators.roimap import RoiMap

EVERY = 1.0
"""Seconds after which the page is told again how old what it shows is."""

LONGEST_LAG = 3600.0
"""Seconds above which it is the clocks that differ, or frames that were measured long ago."""

MOST_POINTS = 1500
"""Of intensity against time."""

MOST_SPANS = 500
"""Of lost frames; those that lie close together are shown as one."""

FEW_PAIRS = 32
"""Delays with fewer pairs of frames are drawn pale."""

PLANES = ("stream", "stream and file", "file")

COUNTS = ("sent", "received", "lost", "late", "duplicate", "undecodable", "stray")

STATES = {"success": "complete", "abort": "aborted", "fail": "failed"}

TWO_TIME_BYTES_PER_S = 1e6
"""To each browser, while the run is on."""

TWO_TIME_SHARE = 0.25
"""Of the time, that making it may take: fits are made by the same thread."""

SEGMENTS_BYTES_PER_S = 1e5
"""The same, of g2 of segments: of few bins they come with every result."""

MOST_TEXT = 200
"""Characters of what is told of a run that is over: there are many of them."""

UNFIT = (ArithmeticError, LookupError, TypeError, ValueError)
"""Raised by arrays that are not what they should be."""

Publish = Callable[[str, bytes, float | None], None]
"""Takes the name of a section, its bytes, and when the newest frame in it ended (`time.monotonic`), if it is known.

No bytes: there is none any more.
"""

OF_A_RUN = ("g2", "fit", "segments", "scattering", "intensity", "image", "twotime", "regions")
"""Sections that say nothing of the next run."""


class View:
    """Makes sections of results, in the thread that hears them.

    Parameters
    ----------
    roimap
        The map of the results. None: bins have numbers only.
    source
        Where results come from, as the page says it.
    publish
        Is given every new section, from this thread.
    """

    def __init__(self, roimap: RoiMap | None, *, source: str, publish: Publish) -> None:
        self.history = History()
        self._telling = threading.Lock()
        self._bins = Bins.of(roimap) if roimap is not None else None
        self._source = source
        self._publish = publish
        self._start: RunStart | None = None
        self._stop: RunStop | None = None
        self._key = 0
        self._server = secrets.token_hex(4)
        self._n_frames = 0
        self._final: set[str] = set()
        self._ledger: Arrays = {}
        self._regions: Regions | None = None
        self._heard: float | None = None
        self._frames_per_s = math.nan
        self._rate_from: tuple[float, int] | None = None
        self._rejected = 0
        self._g2 = b""
        self._drift: dict[str, Any] = {}
        self._past: Past | None = None
        self._told = 0.0
        self._told_frames = 0
        self._two_time_due = 0.0
        self._segments_due = 0.0
        if self._bins is not None:
            publish("map", pack("map", self._bins.facts, self._bins.arrays), None)
        self.tell()

    def take(self, message: RunStart | Result | RunStop) -> None:
        """Show what was heard of the newest run; leave out others.

        Raises
        ------
        ArithmeticError, LookupError, TypeError, ValueError
            (`UNFIT`) A result is not what its operator makes. It is not shown.
        """
        match message:
            case RunStart():
                if self._start is None or _differs(message, self._start):
                    self._begin(message)
            case Result() if self._start is not None and message.run == self._start.run:
                # Regions are told of also where nothing is new.
                self._heard = self._heard if message.operator == "regions" else time.monotonic()
                self._show(message)
            case RunStop() if self._start is not None and message.run == self._start.run and self._stop is None:
                self._stop = message
                self._end()
            case _:
                return
        if not isinstance(message, Result) or message.operator == "ledger":
            fresh = isinstance(message, Result) and message.n_frames > self._told_frames
            self._told_frames = self._n_frames
            self.tell(fresh=fresh)

    def reject(self) -> None:
        """Count a message that could not be read."""
        self._rejected += 1

    def keep_time(self) -> None:
        """Tell how old everything is, if that was long ago."""
        if time.monotonic() >= self._told + EVERY:
            self.tell()

    def tell(self, *, fresh: bool = False) -> None:
        """Publish the state of the run."""
        self._told = time.monotonic()
        facts, arrays = self.state()
        lag = facts["lag"]
        age = lag if facts["frame_age"] is None else facts["frame_age"]
        frame_end = self._told - age if fresh and age is not None and self._stop is None else None
        self._publish("run", pack("run", facts, arrays), frame_end)
        if self._regions is not None:
            facts, arrays = self._regions.section(facts["missing_regions"], is_on=self._stop is None)
            self._publish("regions", pack("regions", {"key": self._name(self._key), **facts}, arrays), None)

    def dynamics(self, key: int, n_frames: int, facts: dict[str, Any], arrays: Arrays) -> None:
        """Show fits of the run `key` after n_frames, from whatever thread they were made in."""
        if key != self._key:
            return
        self._publish("fit", pack("fit", {"key": self._name(key), "n_frames": n_frames, **facts}, arrays), None)
        if self._past is not None:
            self._past.facts |= {name: facts["single"][name] for name in ("diffusion", "diffusion_err")}
            self._tell_history()

    def two_time(self, key: int, result: Result) -> None:
        """Show a two-time correlation of the run `key`, from whatever thread; interim ones as often as is bearable."""
        start = self._start
        late = not result.final and ("twotime" in self._final or time.monotonic() < self._two_time_due)
        if key != self._key or start is None or late:
            return
        begin = time.monotonic()
        found = two_time(result.arrays, start.frame_time)
        if found is None:
            return
        head = {"key": self._name(key), "n_frames": result.n_frames, "final": result.final}
        packed = pack("twotime", {**head, **found[0]}, found[1])
        self._publish("twotime", packed, None)
        end = time.monotonic()
        self._two_time_due = end + max(len(packed) / TWO_TIME_BYTES_PER_S, (end - begin) / TWO_TIME_SHARE)

    def drift(self, key: int, facts: dict[str, Any]) -> None:
        """Show how the scattering of the run `key` drifts."""
        if key == self._key:
            self._drift = facts

    @property
    def key(self) -> int:
        """Which run is shown; names of runs may come again."""
        return self._key

    def regions(self) -> list[dict[str, Any]]:
        """Return how the regions are, see `stream.live.regions.Regions.facts`. For any thread."""
        regions, missing = self._regions, self._ledger.get("missing_regions", np.empty(0))
        return [] if regions is None else regions.facts(missing.tolist(), is_on=self._stop is None)

    @property
    def dynamic_of_static(self) -> NDArray[np.int64] | None:
        """Of the map, if there is one."""
        return None if self._bins is None else self._bins.dynamic_of_static

    def new_dynamics(self) -> Dynamics:
        """Return what fits the run that is shown."""
        return Dynamics(np.empty(0) if self._bins is None else self._bins.dynamic_q)

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """Return the section "run" before it is packed."""
        start, ledger = self._start, self._ledger
        missing, repaired = ([int(i) for i in ledger.get(name, ())] for name in ("missing_regions", "repaired_regions"))
        lag, frame_age = (float(ledger.get(name, math.nan)) for name in ("lag", "frame_age"))
        planned = start.metadata.get("n_frames") if start is not None else None
        facts = {
            "key": self._name(self._key),
            "server": self._server,
            "source": self._source,
            "state": self._state,
            "n_frames": self._n_frames,
            "planned": planned if isinstance(planned, int) and planned > 0 else None,
            "frames_per_s": self._frames_per_s,
            "lag": _of_now(lag),
            "frame_age": _of_now(frame_age),
            "age": None if self._heard is None else time.monotonic() - self._heard,
            "plane": PLANES[int(ledger["plane"])] if "plane" in ledger and 0 <= int(ledger["plane"]) < 3 else None,
            "missing_regions": missing,
            "repaired_regions": repaired,
            "rejected": self._rejected,
            "drift": self._drift,
            "few_pairs": FEW_PAIRS,
            **{name: int(ledger[name]) if name in ledger else 0 for name in COUNTS},
        }
        if start is not None:
            facts |= {
                "run": start.run,
                "sample": str(start.metadata.get("sample", "")),
                "detector": str(start.metadata.get("detector", "")),
                "shape": list(start.shape),
                "frame_time": start.frame_time,
                "frame_bytes": math.prod(start.shape) * np.dtype(start.dtype).itemsize,
                "start_time": str(start.metadata.get("start_time") or start.metadata.get("announced") or ""),
            }
        spans = np.asarray(ledger.get("lost_spans", np.empty((0, 2))), np.int64)
        return facts, {"lost_spans": joined(spans, max(1, self._n_frames) // MOST_SPANS).astype("<f8")}

    def _name(self, key: int) -> str:
        """Return what no other run is called, also none that was shown before we were started again."""
        return f"{self._server}-{key}"

    @property
    def _state(self) -> str:
        if self._start is None:
            return "waiting"
        return "running" if self._stop is None else STATES[self._stop.exit_status]

    def _begin(self, start: RunStart) -> None:
        self._start, self._stop, self._past = start, None, None
        self._key += 1
        self._n_frames = 0
        self._final = set()
        self._ledger, self._drift, self._g2 = {}, {}, b""
        self._segments_due = self._two_time_due = 0.0
        self._regions, self._told_frames = None, 0
        self._rate_from, self._frames_per_s = None, math.nan
        for name in OF_A_RUN if self._key > 1 else ():
            self._publish(name, b"", None)

    def _end(self) -> None:
        if self._start is None or self._stop is None or not self._g2:
            return
        began = self._start.metadata.get("start_time") or self._start.metadata.get("announced") or ""
        facts = {
            "run": self._start.run[:MOST_TEXT],
            "start_time": str(began)[:MOST_TEXT],
            "sample": str(self._start.metadata.get("sample", ""))[:MOST_TEXT],
            "state": self._state,
            "n_frames": self._stop.n_frames,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._past = self.history.add(facts, self._g2)
        self._tell_history()

    def remember(self, facts: dict[str, Any], g2: bytes) -> None:
        """Take a run that was over before we were, from whatever thread: `facts` and `g2` as of `History.add`."""
        self.history.add(facts, g2)
        self._tell_history()

    def _tell_history(self) -> None:
        with self._telling:  # of several threads: the newest last
            self._publish("history", pack("history", {"runs": self.history.facts()}, {}), None)

    def _show(self, result: Result) -> None:
        if result.operator in self._final and not result.final:
            return  # the final one was heard before
        if result.final:
            self._final.add(result.operator)
        self._n_frames = max(self._n_frames, result.n_frames)
        head = {"key": self._name(self._key), "n_frames": result.n_frames, "final": result.final}
        match result.operator:
            case "multitau":
                self._show_curves(head, floats(result.arrays, "tau", "g2", "g2_err", "n_pairs"))
                self._show_segments(head, result)
            case "scattering":
                self._show_scattering(head, result.arrays)
            case "intensity":
                self._show_intensity(head, result.arrays)
            case "ledger":
                self._take_ledger(result)
            case "regions":
                regions = Regions.of(result.arrays)
                regions.section([], is_on=True)  # told as soon as it is known, again and again: it must be fit
                self._regions = regions
                self.tell()

    def _show_curves(self, head: dict[str, Any], curves: Arrays) -> None:
        n_delay, _ = curves["g2"].shape
        for name, shape in (("g2_err", curves["g2"].shape), ("tau", (n_delay,)), ("n_pairs", (n_delay,))):
            if curves[name].shape != shape:
                raise ValueError(f"{name} is {curves[name].shape}, not {shape}")
        self._g2 = pack("g2", head, curves)
        self._publish("g2", self._g2, None)

    def _show_segments(self, head: dict[str, Any], result: Result) -> None:
        if self._start is None or not (result.final or time.monotonic() >= self._segments_due):
            return
        shown = segments(result.arrays, self._start.frame_time)
        if shown is not None:
            packed = pack("segments", head, shown)
            self._publish("segments", packed, None)
            self._segments_due = time.monotonic() + len(packed) / SEGMENTS_BYTES_PER_S

    def _show_scattering(self, head: dict[str, Any], arrays: Arrays) -> None:
        profiles = floats(arrays, "scattering_1d", "scattering_1d_segments", "segment_start")
        self._publish("scattering", pack("scattering", head, profiles), None)
        shape = self._start.shape if self._start is not None else arrays["image"].shape
        block = block_of(shape)
        picture = block_mean(on_the_detector(arrays["image"], arrays["origin"], shape), block)
        no_data = np.zeros(picture.shape, bool)
        if self._bins is not None and self._bins.expected.shape == picture.shape:
            no_data = self._bins.expected & np.isnan(picture)
        shown = {"image": picture.astype("<f4"), "no_data": no_data.astype("|u1")}
        self._publish("image", pack("image", {**head, "block": block, "shape": list(shape)}, shown), None)

    def _show_intensity(self, head: dict[str, Any], arrays: Arrays) -> None:
        frame, intensity = arrays["frame"], np.asarray(arrays["intensity"], np.float64)
        if not len(frame):
            return
        step = -(-len(frame) // MOST_POINTS)
        begin = np.arange(0, len(frame), step)
        n = np.diff(np.append(begin, len(frame)))
        frame_time = self._start.frame_time if self._start is not None else 1.0
        shown = {
            "time": frame[begin] * frame_time,
            "intensity": np.add.reduceat(intensity, begin) / n,
            "lowest": np.minimum.reduceat(intensity, begin),
            "highest": np.maximum.reduceat(intensity, begin),
        }
        self._publish("intensity", pack("intensity", head, floats(shown, *shown)), None)

    def _take_ledger(self, result: Result) -> None:
        before, self._ledger = self._ledger, result.arrays
        try:
            self.state()
            regions = Regions.of_one(result.arrays)
        except UNFIT:
            self._ledger = before
            raise
        self._regions = regions or self._regions
        now = (time.monotonic(), int(result.arrays["received"]))
        if self._rate_from is None:
            self._rate_from = now
        elif now[0] - self._rate_from[0] > EVERY / 2:
            self._frames_per_s = max(0, now[1] - self._rate_from[1]) / (now[0] - self._rate_from[0])
            self._rate_from = now


def _of_now(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) and abs(seconds) < LONGEST_LAG else None


def joined(spans: NDArray[np.int64], gap: int) -> NDArray[np.int64]:
    """Return spans (n, 2) in ascending order with those at most `gap` apart made one."""
    if not len(spans):
        return spans.reshape(0, 2)
    apart = spans[1:, 0] - spans[:-1, 1] > gap
    return np.column_stack([spans[np.append(True, apart), 0], spans[np.append(apart, True), 1]])


def _differs(start: RunStart, other: RunStart) -> bool:
    """Tell whether runs differ: their names may come again (series of a restarted detector)."""
    times = [(each.metadata.get("start_time"), each.metadata.get("announced")) for each in (start, other)]
    return start.run != other.run or times[0] != times[1]
