"""A beamline with a link, a queue and a spool, without any of them: what becomes of its frames under a policy.

Time passes in steps of a second, frames are bytes, and what goes wrong is drawn by a seed. The policy sees what the
manager sees; see `hpc_bridge.switch.Measured`.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

from hpc_bridge.switch import Measured, Plane, Switch, Switching, begin, decide

LINK = 1.0
"""What the link carries where nothing is wrong (GB/s)."""

LOST_AFTER = 10
"""A pilot that is silent for so long (s) is given up, and another one asked for."""

CHECKPOINT = 10
"""Workers have safe what they took so long ago (s)."""

LIVE_WITHIN = 30
"""Frames that were taken so soon (s) are live."""

Policy = Callable[[Measured, int], Plane]
"""Is told what was measured and when, and says which way frames go from now on."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong for a while."""

    begin: int
    end: int
    share: float | None
    """Of the link that is left; None: the node is taken away, and there is another one at the end."""


@dataclass(frozen=True, slots=True)
class History:
    """What happens at a beamline."""

    seconds: int
    runs: tuple[tuple[int, int, float], ...]
    """Begin, end (s), and rate (GB/s)."""
    faults: tuple[Fault, ...]
    ring: float
    """GB that the gateway keeps for workers."""
    spool: float
    """GB."""
    queue: int
    """How long another pilot takes to come (s)."""
    files: float
    """The share of the link that files take while frames want it; the rest of it only where they do not."""


def history(seed: int, seconds: int = 7200, quiet: int = 0) -> History:
    """Draw a history; runs and faults end `quiet` seconds before it does."""
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    runs: list[tuple[int, int, float]] = []
    now = dice.randrange(10, 60)
    while now < seconds - quiet:
        end = min(now + dice.randrange(60, 600), seconds - quiet)
        runs.append((now, end, dice.uniform(0.2, 0.9) * LINK))
        now = end + dice.randrange(10, 120)
    queue = dice.randrange(3, 60)
    faults: list[Fault] = []
    now = dice.randrange(60, 1200)
    while now < seconds - quiet - 60:
        share: float | None = None
        match dice.choice(("cut", "slow", "preempted")):
            case "cut":
                share, length = 0.0, round(5 * 60 ** dice.random())
            case "slow":
                share, length = dice.uniform(0.1, 0.6), round(30 * 30 ** dice.random())
            case _:
                length = round(5 * 120 ** dice.random())
        faults.append(Fault(now, min(now + length, seconds - quiet), share))
        now += length + dice.randrange(120, 2000)
    return History(
        seconds,
        tuple(runs),
        tuple(faults),
        ring=dice.uniform(1, 20),
        spool=dice.uniform(300, 3000),
        queue=queue,
        files=dice.uniform(0, 0.5),
    )


@dataclass(slots=True)
class Run:
    """What became of a run. GB, and s."""

    end: int
    came: float = 0.0
    live: float = 0.0
    """Taken by workers soon."""
    late: float = 0.0
    """Taken by workers later."""
    spooled: float = 0.0
    nowhere: float = 0.0
    """Neither streamed nor in the spool."""
    unsafe: float = 0.0
    """In the ring."""
    goes: bool = False
    """Its file does, too."""
    sent: float = 0.0
    """Of that."""
    final: int | None = None
    """When there was a result that gets no better."""

    @property
    def complete(self) -> float:
        """The share of its frames that is in the final result."""
        return max(self.live + self.late, self.spooled if self.goes else 0.0) / self.came


@dataclass(slots=True)
class Told:
    """What became of a history under a policy."""

    planes: list[Plane] = field(default_factory=list)
    """Of every second."""
    serves: list[bool] = field(default_factory=list)
    """Whether frames could be taken, in every second."""
    only_file_and_lost: float = 0.0
    """GB that went by file only and found no room in the spool."""
    runs: list[Run] = field(default_factory=list)

    @property
    def switches(self) -> int:
        """How often frames went another way."""
        return sum(before != after for before, after in pairwise(self.planes))

    @property
    def by_file(self) -> float:
        """GB that went by file."""
        return sum(run.sent for run in self.runs)

    @property
    def live(self) -> float:
        """Share of all frames that were live."""
        return sum(run.live for run in self.runs) / sum(run.came for run in self.runs)

    @property
    def complete(self) -> float:
        """Share of all frames that are in the final results."""
        return sum(run.complete * run.came for run in self.runs) / sum(run.came for run in self.runs)

    def until_final(self, seconds: int) -> float:
        """Return how long it took from the end of a run to its final result (s), the mean of all runs.

        One that had none within the history counts as if it had it then.
        """
        waits = [(seconds if run.final is None else run.final) - run.end for run in self.runs]
        return sum(waits) / len(waits)


def simulate(history: History, policy: Policy, *, sends_all: bool = False, sends_none: bool = False) -> Told:
    """Let a history pass.

    Parameters
    ----------
    sends_all, sends_none
        Which files go: all, none; else those of runs that lost frames or went another way than over the stream only.
    """
    told = Told()
    beamline = _Beamline(history)
    plane = Plane.STREAM
    for now in range(history.seconds):
        beamline.step(now, plane, told, sends_all=sends_all, sends_none=sends_none)
        plane = policy(beamline.measured(now), now)
        told.planes.append(plane)
    return told


class _Beamline:
    def __init__(self, history: History) -> None:
        self._history = history
        self._ring: deque[tuple[int, Run, float]] = deque()
        self._checkpointed: deque[tuple[int, float]] = deque()
        """When workers took what they do not have safe yet."""
        self._held = 0.0
        self._lost = 0
        self._spool_lost = False
        self._spool_rate = 0.0
        self._going: deque[Run] = deque()
        self._heard = 0
        self._serves_from = 0
        self._none_since: int | None = None

    def step(self, now: int, plane: Plane, told: Told, *, sends_all: bool, sends_none: bool) -> None:
        wrong = [fault for fault in self._history.faults if fault.begin <= now < fault.end]
        link = LINK * min((fault.share for fault in wrong if fault.share is not None), default=1.0)
        for fault in wrong:
            if fault.share is None:
                self._serves_from = fault.end
        is_heard = link > 0 and now >= self._serves_from
        if is_heard:
            self._heard, self._none_since = now, None
        elif now - self._heard > LOST_AFTER and self._none_since is None:
            self._none_since = now
            self._serves_from = max(self._serves_from, now + self._history.queue)
        told.serves.append(is_heard)
        self._lost, self._spool_lost, self._spool_rate = 0, False, 0.0
        self._take_frames(now, plane, told)
        wanted = sum(size for _, _, size in self._ring) if is_heard else 0.0
        of_files = sum(run.spooled - run.sent for run in self._going)
        streamed = min(wanted, max(link - of_files, link * (1 - self._history.files)))
        self._send_files(now, link - streamed)
        self._stream(now, streamed)
        for run in told.runs:
            self._see_whether_final(run, now, sends_all=sends_all, sends_none=sends_none)

    def measured(self, now: int) -> Measured:
        oldest = [each[0][0] for each in (self._ring, self._checkpointed) if each]
        room = self._history.spool - self._held
        wait = 0.0 if self._none_since is None else float(now - self._none_since)
        return Measured(
            ack_lag=float(now - min(oldest)) if oldest else 0.0,
            lost=self._lost,
            spool="loses" if self._spool_lost else "takes",
            full_in=room / self._spool_rate if self._spool_rate else None,
            heartbeat_age=float(now - self._heard) if self._none_since is None else None,
            node_wait=wait,
        )

    def _take_frames(self, now: int, plane: Plane, told: Told) -> None:
        for begins, end, rate in self._history.runs:
            if now == begins:
                told.runs.append(Run(end))
            if not begins <= now < end:
                continue
            run = told.runs[-1]
            run.came += rate
            self._spool_rate = rate
            is_spooled = self._held + rate <= self._history.spool
            self._spool_lost = not is_spooled
            if is_spooled:
                self._held += rate
                run.spooled += rate
            if plane is not Plane.FILE:
                self._ring.append((now, run, rate))
                run.unsafe += rate
            elif not is_spooled:
                told.only_file_and_lost += rate
            run.goes = run.goes or plane is not Plane.STREAM
        while sum(size for _, _, size in self._ring) > self._history.ring:
            _, run, size = self._ring.popleft()
            run.unsafe -= size
            run.goes = True
            self._lost += 1

    def _stream(self, now: int, room: float) -> None:
        while self._ring and room > 1e-9:
            began, run, size = self._ring.popleft()
            part = min(size, room)
            room -= part
            if now - began <= LIVE_WITHIN:
                run.live += part
            else:
                run.late += part
            run.unsafe -= part
            if not self._checkpointed or self._checkpointed[-1][0] != began:
                self._checkpointed.append((began, now))
            if part < size:
                self._ring.appendleft((began, run, size - part))
        while self._checkpointed and self._checkpointed[0][1] <= now - CHECKPOINT:
            self._checkpointed.popleft()

    def _send_files(self, now: int, room: float) -> None:
        while self._going and room > 1e-9:
            run = self._going[0]
            part = min(room, run.spooled - run.sent)
            room -= part
            run.sent += part
            if run.spooled - run.sent > 1e-9:
                return
            self._going.popleft()
            self._held -= run.spooled  # it is safe, and makes room
            run.final = now + round(run.spooled / LINK) + 5  # what nodes take for it

    def _see_whether_final(self, run: Run, now: int, *, sends_all: bool, sends_none: bool) -> None:
        if now != run.end + 1 and not (now > run.end and run.final is None):
            return
        goes = (run.goes or sends_all) and not sends_none
        run.goes = goes
        if goes and run not in self._going and run.sent == 0 and run.spooled > 0:
            self._going.append(run)
        elif not goes and run.final is None and run.unsafe < 1e-6:
            run.final = now
            self._held -= run.spooled  # its result is complete: nobody needs the file


def ours(settings: Switching | None = None) -> Policy:
    """Return the policy of `hpc_bridge.switch`."""
    switch: Switch = begin(-inf)

    def policy(measured: Measured, now: int) -> Plane:
        nonlocal switch
        switch = decide(switch, measured, settings or Switching(), float(now))
        return switch.plane

    return policy


def always(plane: Plane) -> Policy:
    """Return a policy that never switches."""
    return lambda _, __: plane
