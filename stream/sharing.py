"""Who of the workers that are alive has which region: what a consumer group is in Kafka."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stream.hub_wire import Here, Yours

SESSION = 2.0
"""Seconds after which a worker that says nothing is taken for dead."""

SETTLE = 1.0
"""Seconds after the first worker came, in which others may come before regions are shared out."""

MOST_WORKERS = 1024


def share(n_regions: int, workers: Sequence[str], owners: Mapping[int, str]) -> dict[int, str]:
    """Return the worker of every region: as many for each as can be, and as few as can be change hands."""
    if not workers:
        return {}
    mine: dict[str, list[int]] = {worker: [] for worker in workers}
    for region in range(n_regions):
        if owners.get(region) in mine:
            mine[owners[region]].append(region)
    least, n_more = divmod(n_regions, len(workers))
    most_first = sorted(workers, key=lambda worker: -len(mine[worker]))
    quota = {worker: least + (i < n_more) for i, worker in enumerate(most_first)}
    kept = {region: worker for worker in workers for region in mine[worker][: quota[worker]]}
    free = (region for region in range(n_regions) if region not in kept)
    for worker in workers:
        for _ in range(quota[worker] - len(mine[worker])):
            kept[next(free)] = worker
    return dict(sorted(kept.items()))


@dataclass(slots=True)
class _Worker:
    process: str
    heard_at: float
    told: set[int] = field(default_factory=set)
    """Regions that it may be serving."""
    given: frozenset[int] = frozenset()
    """Those that it was told to serve."""


class Group:
    """The workers of a gateway. A region is given to the next only when the one before has left it or is dead.

    Nothing is shared out before `SETTLE` has passed since the first one came: so workers that were here before the
    gateway was keep what they have, and nobody begins with regions that others who start at the same time will get.
    """

    def __init__(self, n_regions: int) -> None:
        self._n_regions = n_regions
        self._workers: dict[str, _Worker] = {}
        self._wanted: dict[int, str] = {}
        self._number = secrets.randbelow(2**60)  # none that workers have heard from a gateway before
        self._looked_at = 0.0
        self._settled_at: float | None = None
        self._has_changed = False
        self._superseded: dict[str, None] = {}
        """Processes whose name another one has now."""

    @property
    def owners(self) -> Mapping[int, str]:
        """The worker of every region; empty without workers."""
        return self._wanted

    @property
    def n_workers(self) -> int:
        """How many workers are alive."""
        return len(self._workers)

    def hear(self, here: Here, now: float) -> Yours | None:
        """Take note of a worker; return what it may serve, None if another process has its name now.

        Parameters
        ----------
        now
            Monotonic (s).
        """
        if here.process in self._superseded:
            return None
        if here.leaving:
            self._forget(here)
        else:
            self._take_note(here, now)
        self._share(now)
        mine = {region for region, name in self._wanted.items() if name == here.name}
        elsewhere = {region for name, other in self._workers.items() if name != here.name for region in other.told}
        worker = self._workers.get(here.name)
        if worker is None:
            return Yours(number=self._number, regions=[])
        worker.given = frozenset(mine - (elsewhere - worker.given))  # who wakes up takes nothing from its heirs
        if not worker.told >= worker.given:
            worker.told |= worker.given
            self._number += 1
        return Yours(number=self._number, regions=sorted(worker.given))

    def expire(self, now: float) -> list[str]:
        """Forget workers that are silent, and return their names. To be called all the time."""
        if now - self._looked_at > SESSION / 2:  # we stood still ourselves: what they said is still to be heard
            for worker in self._workers.values():
                worker.heard_at = now
        self._looked_at = now
        silent = [name for name, worker in self._workers.items() if now - worker.heard_at > SESSION]
        for name in silent:
            del self._workers[name]
            self._has_changed = True
        self._share(now)
        return silent

    def _take_note(self, here: Here, now: float) -> None:
        worker = self._workers.get(here.name)
        if worker is None and len(self._workers) >= MOST_WORKERS:
            return
        if worker is None or worker.process != here.process:
            if worker is not None:
                self._superseded[worker.process] = None
                while len(self._superseded) > MOST_WORKERS:
                    del self._superseded[next(iter(self._superseded))]
            worker = self._workers[here.name] = _Worker(here.process, now, set(here.serving))
            for region in here.serving:
                if region < self._n_regions:
                    self._wanted.setdefault(region, here.name)
            self._settled_at = now + SETTLE if self._settled_at is None else self._settled_at
            self._has_changed = True
        elif here.heard == self._number:  # else it may not know yet what it was told
            worker.told = set(here.serving)
        worker.heard_at = now

    def _forget(self, here: Here) -> None:
        if here.name in self._workers and self._workers[here.name].process == here.process:
            del self._workers[here.name]
            self._has_changed = True

    def _share(self, now: float) -> None:
        if self._has_changed and self._settled_at is not None and now >= self._settled_at:
            self._wanted = share(self._n_regions, list(self._workers), self._wanted)
            self._number += 1
            self._has_changed = False
