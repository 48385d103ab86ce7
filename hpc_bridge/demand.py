"""How many nodes a beamline wants, by its runs and by how far its pilots lag behind. Pure: it is told the time."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from hpc_bridge.config import Beamline
from hpc_bridge.leases import LONGEST_RUN, Run

MAX_RUNS = 1000
"""That are on at once; of more the oldest is forgotten."""


class Demand:
    """What one beamline wants.

    Parameters
    ----------
    runs
        Those on record, that are on or ended a while ago (`linger` at least).
    has
        How many pilots there are already: those beyond `nodes` and `spares` came since others lagged behind.
    """

    def __init__(self, beamline: Beamline, runs: Iterable[Run] = (), *, has: int = 0) -> None:
        self._beamline = beamline
        self._on: dict[str, float] = {}
        self._last_stop: float | None = None
        base = beamline.nodes + beamline.spares
        self._more = max(0, min(has, beamline.max_nodes) - base)
        self._lags_since: float | None = None
        self._keeps_up_since: float | None = None
        for run in runs:
            self.began(run.run, run.began)
            if run.ended is not None:
                self.ended(run.run, run.ended)

    def began(self, run: str, at: float) -> None:
        """Take note of a run; a second time is no matter."""
        self._on.setdefault(run, at)
        if len(self._on) > MAX_RUNS:
            del self._on[min(self._on, key=self._on.__getitem__)]

    def ended(self, run: str, at: float) -> None:
        """Take note that a run ended; one that is not known is no matter."""
        if self._on.pop(run, None) is not None:
            self._last_stop = max(at, self._last_stop or at)

    def wanted(self, now: float, *, lag: float | None, serving: int) -> int:
        """Return how many pilots shall serve.

        While a run is on, and until `linger` after the last one: `nodes`, `spares`, and one more, up to `max_nodes`,
        each time that pilots lagged by `grow_at_lag` or more for `grow_after`; each time that they did not for `linger`
        one of these goes. Else `idle_nodes`.

        Parameters
        ----------
        lag
            Of the pilot that is furthest behind (s); None: not known.
        serving
            How many pilots do serve. While these are not all that are wanted there is no growth: more could not help
            before they came.
        """
        beamline = self._beamline
        if not self._is_on(now):
            self._more = 0
            self._lags_since = self._keeps_up_since = None
            return min(beamline.idle_nodes, beamline.max_nodes)
        base = beamline.nodes + beamline.spares
        self._grow(now, lag, most=beamline.max_nodes - base, is_complete=serving >= base + self._more)
        return base + self._more

    def _is_on(self, now: float) -> bool:
        for run in [run for run, began in self._on.items() if now - began > LONGEST_RUN]:
            self.ended(run, self._on[run] + LONGEST_RUN)
        linger = self._beamline.linger.total_seconds()
        has_just_ended = self._last_stop is not None and now - self._last_stop < linger
        return self._beamline.run_engine is None or bool(self._on) or has_just_ended

    def _grow(self, now: float, lag: float | None, *, most: int, is_complete: bool) -> None:
        limit = self._beamline.grow_at_lag
        if limit is None or lag is None or lag < limit.total_seconds():
            self._lags_since = None
            self._keeps_up_since = now if self._keeps_up_since is None else self._keeps_up_since
            if self._more and now - self._keeps_up_since >= self._beamline.linger.total_seconds():
                self._more -= 1
                self._keeps_up_since = now
            return
        self._keeps_up_since = None
        self._lags_since = now if self._lags_since is None or not is_complete else self._lags_since
        if self._more < most and now - self._lags_since >= self._beamline.grow_after.total_seconds():
            self._more += 1
            self._lags_since = now


class FilesDemand:
    """How many pilots the tasks of a beamline want at each site.

    Parameters
    ----------
    nodes
        At most, at all sites together.
    linger
        How long those are kept that have nothing to do (s), while no other site wants them.
    has
        How many there are already, by site.
    """

    def __init__(self, nodes: int, linger: float, has: Mapping[str, int], now: float) -> None:
        self._nodes, self._linger = nodes, linger
        self._kept = dict(has)
        self._used = dict.fromkeys(has, now)

    def wanted(self, now: float, asked: Sequence[str]) -> dict[str, int]:
        """Return how many pilots shall be at each site.

        Parameters
        ----------
        asked
            Sites of the tasks that run, and then of those that wait, in the order in which they are handed out.
        """
        needed = Counter(asked[: self._nodes])
        for site in self._kept.keys() | needed.keys():
            if needed[site] >= self._kept.get(site, 0) or now - self._used[site] >= self._linger:
                self._kept[site], self._used[site] = needed[site], now
        left = self._nodes - needed.total()
        for site, kept in self._kept.items():
            idle = min(left, kept - needed[site])
            needed[site] += idle
            left -= idle
        return dict(needed)
