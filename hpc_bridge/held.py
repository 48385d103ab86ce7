"""A beamline as a manager holds it."""

import logging
import time
from collections import Counter
from collections.abc import Mapping

from hpc_bridge.bulk import Routes
from hpc_bridge.bulk_gateway import Nodes
from hpc_bridge.config import Beamline
from hpc_bridge.demand import Demand, FilesDemand
from hpc_bridge.dispatch import Dispatch
from hpc_bridge.leases import Kind, Leases
from hpc_bridge.pool import Pool
from hpc_bridge.reconcile import State, View
from hpc_bridge.runs import Points, Runs, Told
from hpc_bridge.tasks import Tasks

_log = logging.getLogger(__name__)


class Held:
    """A beamline that a manager holds: its nodes, those that are wanted, and the runs that it hears of."""

    def __init__(
        self,
        beamline: Beamline,
        pool: Pool,
        files: Mapping[str, Pool],
        leases: Leases,
        tasks: Tasks,
        runs: Runs | None,
        *,
        is_let_go: bool,
    ) -> None:
        self.beamline, self.pool, self.is_let_go = beamline, pool, is_let_go
        self.files = files
        """Pools of kind "files", by site: a task has its files at one of them."""
        retry_after = 0.0 if beamline.files is None else beamline.files.retry_after.total_seconds()
        self.dispatch = Dispatch(beamline.beamline, tasks, retry_after=retry_after)
        self.routes: Routes | None = None
        """Of its files, if it says something of them and is not let go."""
        self.views: list[View] = []
        self.wanted = 0
        self.files_wanted: dict[str, int] = {}
        self._leases, self._tasks = leases, tasks
        now = time.time()
        n_files = Counter(lease.site for lease in leases.open_leases(beamline.beamline, Kind.FILES))
        nodes, linger = (
            (0, 0.0) if beamline.files is None else (beamline.files.nodes, beamline.files.linger.total_seconds())
        )
        self._files_demand = FilesDemand(nodes, linger, n_files, now)
        since = time.time() - beamline.linger.total_seconds()
        has = len(leases.open_leases(beamline.beamline, Kind.STREAM))
        self._demand = Demand(beamline, leases.runs(beamline.beamline, since), has=has)
        self._runs = runs

    @property
    def pools(self) -> list[Pool]:
        """That for the stream, and those for files."""
        return [self.pool, *self.files.values()]

    def pools_at(self, site: str) -> list[Pool]:
        """Return those that have nodes at a site."""
        stream = [self.pool] if site in self.beamline.sites else []
        return [*stream, *(pool for name, pool in self.files.items() if name == site)]

    @property
    def nodes(self) -> Nodes:
        """What matters of those for the stream to those who see to its files."""
        serving = [view for view in self.views if view.lease.kind is Kind.STREAM and view.state is State.SERVING]
        heard_at = max((view.heard.at for view in serving if view.heard is not None), default=None)
        return Nodes(heard_at=heard_at, is_wanted=self.wanted > 0)

    def close(self) -> None:
        """Listen to the run engine no more."""
        if self._runs is not None:
            self._runs.__exit__(None, None, None)

    def look_at_runs(self, now: float) -> list[Told | Points]:
        """Take note of runs that began or ended, and return all that was told."""
        found = self._runs.look() if self._runs is not None else []
        for told in found:
            if isinstance(told, Points):
                continue
            name = self.beamline.beamline
            _log.info("%s: run %s %s", name, told.run, "begins" if told.began else "ended")
            if told.began:
                self._leases.run_began(name, told.run, now)
                self._demand.began(told.run, now)
            else:
                self._leases.run_ended(name, told.run, now)
                self._demand.ended(told.run, now)
        return found

    def want(self, now: float) -> int:
        """Return how many nodes are wanted."""
        is_stream = (view for view in self.views if view.lease.kind is Kind.STREAM)
        serving = [view for view in is_stream if view.state is State.SERVING]
        lags = [view.heard.heartbeat.status.lag_s for view in serving if view.heard is not None]
        lag = max((lag for lag in lags if lag is not None), default=None)
        self.wanted = 0 if self.is_let_go else self._demand.wanted(now, lag=lag, serving=len(serving))
        return self.wanted

    def want_files(self, now: float) -> dict[str, int]:
        """Return how many nodes for files are wanted at each site."""
        if self.is_let_go or self.beamline.files is None:
            self.files_wanted = {}
        else:
            reached = [name for name, pool in self.files.items() if pool.reaches(name)]
            asked = self._tasks.asked(self.beamline.beamline, reached, self.beamline.files.nodes, now)
            self.files_wanted = self._files_demand.wanted(now, asked)
        return self.files_wanted

    def take_back_tasks(self, now: float) -> None:
        """Let the tasks wait again whose pilots were lost; once it is decided what becomes of these."""
        views = [view for pool in self.files.values() for view in pool.views(now)]
        lost = (State.SILENT, State.OVER)
        living = {view.lease.lease for view in views if view.state not in lost}
        self.dispatch.take_back(living, {view.lease.lease: view.why for view in [*self.views, *views]})
