"""How a gateway is, in a file for those who look after it: `xpcs-stream gateway --status`."""

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stream.delivery import Delivery
from stream.gateway_runs import GatewayRuns, Run, remember, remembered
from stream.plane import Sent
from stream.sinks.spool import Spool
from stream.sinks.spool_found import Found, Inventory
from stream.sinks.spool_found import room as spool_room

_log = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two of them, where nothing changes."""

EXIT_SECONDS = 10.0
"""How long the end waits for the file to be written."""

OVER = 10.0
"""Seconds that rates are measured over."""

MOST_RUNS = 100
"""That are told of; those that nobody has proven safe before others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How a gateway was."""

    at: float
    """When, `time.monotonic`."""
    told: Mapping[str, Any]
    """What the file says."""
    deliveries: Sequence[Delivery]
    """Of all planes, in their order."""
    room_bytes: int | None
    """That the spool still takes; None: not known."""


class GatewayStatus:
    """Tells how a gateway is: every second, and at once when a run begins or ends.

    The file is replaced, so that it is whole at any time; see `xpcs-stream gateway --help` for what is in it.

    Parameters
    ----------
    path
        None: nowhere.
    runs
        Of the gateway. It tells this one of changes.
    sinks
        Where frames go.
    spool
        Where they are, too.
    is_watched
        Look every second also without a file, for who reads `last`.

    Attributes
    ----------
    last
        What was seen last; None: nothing yet.
    """

    def __init__(
        self,
        path: Path | None,
        runs: GatewayRuns,
        sinks: Sequence[Sent],
        spool: Spool | None,
        *,
        is_watched: bool = False,
    ) -> None:
        self.last: Seen | None = None
        self._runs, self._sinks, self._spool = runs, sinks, spool
        self._inventory = Inventory(spool.directory) if spool is not None else None
        self._rates: deque[tuple[float, int, int, int]] = deque([(time.monotonic(), 0, 0, 0)])
        self._remembered: dict[Path, dict[str, Any]] = {}
        self._failure = ""
        self._is_closing = False
        self._has_changed = threading.Event()
        self._thread: threading.Thread | None = None
        if path is not None or is_watched:
            runs.has_changed = self._has_changed.set
            self._thread = threading.Thread(target=self._run, args=(path,), name="gateway status", daemon=True)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell a last time how it is."""
        self._is_closing = True
        self._has_changed.set()
        if self._thread is not None:
            self._thread.join(EXIT_SECONDS)
            if self._thread.is_alive():
                _log.warning("how the gateway ended is not told: the file of its status, or its spool, takes too long")

    def _run(self, path: Path | None) -> None:
        is_last = False
        while not is_last:
            self._has_changed.wait(EVERY)
            self._has_changed.clear()
            is_last = self._is_closing
            try:
                told = self.told()
                if path is not None:
                    temporary = path.with_name(path.name + ".tmp")
                    temporary.write_text(json.dumps(told))
                    temporary.replace(path)
            except OSError as error:
                self._complain(f"{path}: cannot be written: {error.strerror}")

    def told(self) -> dict[str, Any]:
        """Return what the file says."""
        deliveries = [sink.delivery() for sink in self._sinks]
        lag, lost, unsafe_run = _together(deliveries)
        with self._runs.lock:
            self._runs.look()
            frames, n_bytes, written = self._rate()
            run, known = self._runs.run, list(self._runs.runs)
            ways = {each.number: _way(each, lost, unsafe_run) for each in known}
            told: dict[str, Any] = {
                "run": run.start.run if run is not None else None,
                "frames": run.frames if run is not None else 0,
                "frames_per_s": frames,
                "bytes_per_s": n_bytes,
                "plane": self._runs.plane,
                "why": self._runs.why,
                "ack_lag_s": lag,
                "lost": None if lost is None else lost.get(known[-1].number if known else 0, 0),
                "lost_in_all": None if lost is None else sum(lost.values()),
            }
        here = {each.number: self._spool.path_of(each.start) for each in known} if self._spool is not None else {}
        found: list[dict[str, Any]] = []
        told["spool"] = room = None
        if self._spool is not None:
            of_path = {path: ways[number] for number, path in here.items() if path is not None}
            told["spool"], found, room = self._look_at(self._spool, written, of_path)
        paths = {each["path"] for each in found}
        runs = [
            _streamed(each, ways[each.number])
            for each in known
            if (path := here.get(each.number)) is None or (not each.ended and f"{path.absolute()}" not in paths)
        ] + found
        told["runs"] = _last(runs)
        self.last = Seen(at=time.monotonic(), told=told, deliveries=deliveries, room_bytes=room)
        return told

    def _look_at(
        self, spool: Spool, written: float, ways: Mapping[Path, dict[str, Any]]
    ) -> tuple[dict[str, Any], list[dict[str, Any]], int | None]:
        """Return how a spool is, what is in it, and how many bytes more it takes."""
        running = spool.running  # before the look: of all others the files are complete then
        told = {"directory": f"{spool.directory.absolute()}", "lost": spool.lost, "full_in_s": 0.0, "held_bytes": None}
        try:
            found = self._inventory.look() if self._inventory is not None else []
            held, room = spool_room(spool.directory, spool.keep_bytes, found, running)
            there = {each.path for each in found}
            self._remembered = {path: way for path, way in self._remembered.items() if path in there}
            for each in found:
                if each.path in ways and not each.is_safe:
                    self._remember(each.path, ways[each.path])
        except OSError as error:
            self._complain(f"spool {spool.directory}: {error.strerror}")
            return told, [], None
        told |= {"full_in_s": room / written if written > 0 else None, "held_bytes": held}
        runs = [
            _spooled(each, ways.get(each.path) or _left(remembered(each.path)), is_running=each.path == running)
            for each in found
        ]
        return told, runs, room

    def _remember(self, path: Path, way: dict[str, Any]) -> None:
        if self._remembered.get(path) == way:
            return
        try:
            remember(path, way)
        except FileNotFoundError:  # the run is taken away
            pass
        except OSError as error:  # the runs are told of all the same
            self._complain(f"spool {path.parent}: which way frames went cannot be written: {error.strerror}")
            return
        self._remembered[path] = way

    def _rate(self) -> tuple[float, float, float]:
        """Return frames, bytes, and bytes of the spool per second."""
        now, spool = time.monotonic(), self._spool
        counts = self._runs.frames, self._runs.n_bytes, spool.written if spool is not None else 0
        while len(self._rates) > 1 and now - self._rates[0][0] > OVER:
            self._rates.popleft()
        self._rates.append((now, *counts))
        then, *before = self._rates[0]
        frames, n_bytes, written = (
            (new - old) / max(now - then, 1e-3) for new, old in zip(counts, before, strict=True)
        )
        return frames, n_bytes, written

    def _complain(self, failure: str) -> None:
        if failure != self._failure:
            _log.warning("%s", failure)
        self._failure = failure


def _together(deliveries: Iterable[Delivery]) -> tuple[float | None, Counter[int] | None, int | None]:
    """Return the longest lag, what all lost, and the first run that is not safe; None where none of them knows."""
    deliveries = list(deliveries)
    lags = [each.lag for each in deliveries if each.lag is not None]
    losses = [Counter(each.lost) for each in deliveries if each.lost is not None]
    unsafe = min((each.unsafe_run for each in deliveries if each.unsafe_run is not None), default=None)
    return max(lags, default=None), sum(losses, Counter()) if losses else None, unsafe


def _way(run: Run, lost: Mapping[int, int] | None, unsafe_run: int | None) -> dict[str, Any]:
    """Return what is only known while the gateway lives, unless it is written down."""
    return {
        "began": run.began,
        "frames": run.frames,
        "unsent": run.unsent,
        "lost": None if lost is None else lost.get(run.number, 0),
        "planes": run.ways(),
        "unsafe": unsafe_run is not None and run.number >= unsafe_run,
    }


def _left(way: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier gateway wrote down: what no worker had safe was lost with it, a record at least."""
    return way | {"lost": (way.get("lost") or 0) + 1, "unsafe": False} if way.get("unsafe") else way


def _streamed(run: Run, way: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is told of a run that is in no file."""
    nowhere: dict[str, Any] = {"path": None, "files": [], "bytes": 0, "spooled": 0, "safe": False}
    exit_status = run.stop.exit_status if run.stop is not None else None
    return {"run": run.start.run, **nowhere, "ended": run.ended, "exit_status": exit_status, **way}


def _spooled(found: Found, way: Mapping[str, Any], *, is_running: bool) -> dict[str, Any]:
    """Return what is told of a run in the spool."""
    return {
        "run": found.run,
        "path": f"{found.path.absolute()}",
        "files": list(found.files),
        "bytes": found.n_bytes,
        "spooled": found.spooled,
        "safe": found.is_safe,
        "ended": not is_running,
        "exit_status": found.exit_status,
        "began": way.get("began", found.written),
        "frames": way.get("frames", found.frames),
        "unsent": way.get("unsent"),
        "lost": way.get("lost"),
        "planes": way.get("planes", []),
        "unsafe": way.get("unsafe", False),
    }


def _last(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last ones in order, rather those that are not safe."""
    runs = sorted(runs, key=lambda run: (not run["safe"], run["began"]))[-MOST_RUNS:]
    return sorted(runs, key=lambda run: run["began"])
