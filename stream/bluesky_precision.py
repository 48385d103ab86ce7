"""A plan that measures until what is wanted is known: a verdict on live results ends it (Bluesky).

Results are those that ``xpcs-stream run --publish`` or ``xpcs-stream merge --publish`` publish. They are followed in a
thread, so that the run engine never waits for them nor computes anything.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from bluesky import plan_stubs as bps
from bluesky import preprocessors as bpp
from bluesky.protocols import Flyable, Stageable, Status, Stoppable, WritesStreamAssets
from bluesky.utils import MsgGenerator

from stream.errors import XpcsStreamError
from stream.ingest.zmq import ZmqResults
from stream.messages import Rejected, Result, RunStart, RunStop
from stream.operators.roimap import RoiMap
from stream.precision import Goal, Judge, Verdict

_log = logging.getLogger(__name__)

STREAM = "primary"

EVERY = 0.5
"""Seconds between two times that a plan says it is there, and tells of the frames that its detector has written."""


class Awaited:
    """Follows the next run that is announced until its verdict: a Bluesky Status, done when there is one.

    Waiting begins at once. Runs that were announced before are left alone: publishers tell who joins of their last run.
    For that the clocks of this machine and of the one that publishes have to agree better than a detector is armed.

    Parameters
    ----------
    results
        ``tcp://host:port`` where they are published.
    judge
        Of the run.
    within
        Seconds in which a result with more frames has to come, while the plan is not paused. Else the verdict is "no
        results", or "detector done" where there are results and nobody saw more frames since.
    """

    def __init__(self, results: str, judge: Judge, *, within: float) -> None:
        self._results = results
        self._judge = judge
        self._within = within
        self._began = datetime.now(UTC)
        self._alive = self._grew = time.monotonic()
        self._taken: int | None = None
        self._given_up = threading.Event()
        self._verdict: Future[Verdict] = Future()
        # Whoever leaves Python while a plan is paused does not wait for it.
        threading.Thread(target=self._follow, name="until precise", daemon=True).start()

    def __repr__(self) -> str:
        # What the run engine writes into the stop document of a plan that failed by this Status.
        return f"results from {self._results}: {self.exception() if self.done else 'followed'}"

    def trigger(self) -> Status:
        """Return itself, as something that a plan can wait for; again and again, as long as the plan is not paused."""
        self._alive = time.monotonic()
        return self

    def saw(self, taken: int) -> None:
        """Take note of how many frames, or events, the detector has taken."""
        if taken != self._taken:
            self._taken, self._grew = taken, time.monotonic()

    def give_up(self) -> None:
        """Stop following; returns at once."""
        self._given_up.set()

    def verdict(self) -> Verdict:
        """Return the verdict; only when done."""
        return self._verdict.result(timeout=0)

    def add_callback(self, callback: Callable[[Status], None]) -> None:
        """Call when done, with this Status."""
        self._verdict.add_done_callback(lambda _: callback(self))

    def exception(self, timeout: float | None = 0.0) -> BaseException | None:
        """Return why there is no verdict, None if there is one; TimeoutError if that is open yet."""
        return self._verdict.exception(timeout)

    @property
    def done(self) -> bool:
        """There is a verdict, or there will be none."""
        return self._verdict.done()

    @property
    def success(self) -> bool:
        """There is a verdict."""
        return self.done and self.exception() is None

    def _follow(self) -> None:
        try:
            with ZmqResults(self._results) as results:
                self._verdict.set_result(self._judged(results))
        except XpcsStreamError as error:
            self._verdict.set_exception(error)
        finally:
            if not self._verdict.done():
                self._verdict.set_exception(RuntimeError("whoever follows results failed, see above"))

    def _judged(self, results: ZmqResults) -> Verdict:
        run: str | None = None
        verdict = Verdict(outcome="go on", reason="no run was announced")
        heard = time.monotonic()
        silent_since = heard
        for message in results:
            match message:
                case RunStart() if run is None and self._is_new(message):
                    run, silent_since = message.run, time.monotonic()
                    _log.info("run %s is followed", run)
                case Rejected(reason=reason):
                    _log.warning("%s", reason)
            if isinstance(message, RunStart | Result | RunStop) and message.run == run:
                before, verdict = verdict, self._judge.take(message)
                if verdict.n_frames > before.n_frames:
                    heard = silent_since = time.monotonic()
                if verdict.outcome != "go on":
                    return verdict
            if time.monotonic() > self._alive + 4 * EVERY:
                silent_since = time.monotonic()  # the plan is paused: its detector tells of no frames
            if self._given_up.is_set() or time.monotonic() > silent_since + self._within:
                break
        silence = f"none for {self._within:g} s from {self._results}; before: {verdict.reason}"
        if verdict.n_frames and self._taken is not None and self._grew <= heard:
            return replace(verdict, outcome="detector done", reason=f"detector done: no more frames, {silence}")
        return replace(verdict, outcome="no results", reason=f"no results: {silence}")

    def _is_new(self, start: RunStart) -> bool:
        with suppress(TypeError, ValueError):  # metadata may hold anything
            return datetime.fromisoformat(start.metadata["announced"]) >= self._began
        return "announced" not in start.metadata


def until_precise(
    detector: Flyable, results: str, goal: Goal, roimap: RoiMap, *, within: float = 30.0
) -> MsgGenerator[Verdict]:
    """Let a detector take frames until there is a verdict; a plan stub for an open run.

    Parameters
    ----------
    detector
        Set up for more frames than should be needed. It is kicked off here, and stopped once there is a verdict, also
        if the plan fails: by its ``stop``, or by ``unstage`` where it has none (ophyd-async). If it writes files
        (``WritesStreamAssets``), the documents of the stream "primary" tell of its frames as they come.
    results
        ``tcp://host:port`` where results are published.
    goal
        What is wanted, and what it may cost.
    roimap
        The map that the results are made with (`stream.operators.roimap_file.read`).
    within
        Seconds in which a result with more frames has to come, also the first; else the verdict is "no results". A
        pause does not count.

    Returns
    -------
    Verdict
        Its reason is for the run's stop document: ``bps.close_run(reason=verdict.reason)``.

    Raises
    ------
    ConfigError
        The goal does not suit the map.
    """
    judge = Judge(goal, roimap)

    def measure() -> MsgGenerator[Verdict]:
        awaited = Awaited(results, judge, within=within)
        try:
            yield from bps.kickoff(detector, wait=True)
            is_known = False
            while not is_known:
                # Resumed after a pause, the plan goes on from here: what was kicked off stays so.
                yield from bps.checkpoint()
                yield from bps.trigger(awaited, group=awaited)
                is_known = yield from bps.wait(awaited, timeout=EVERY, error_on_timeout=False)
                yield from _tell(detector, awaited)
            return awaited.verdict()
        finally:
            awaited.give_up()

    if isinstance(detector, WritesStreamAssets):
        yield from bps.declare_stream(detector, name=STREAM, collect=True)
    verdict: Verdict = yield from bpp.finalize_wrapper(  # type: ignore[no-untyped-call]
        measure(), lambda: _stop(detector)
    )
    return verdict


def fly_until_precise(
    detector: Flyable,
    results: str,
    goal: Goal,
    roimap: RoiMap,
    *,
    within: float = 30.0,
    prepare: Any = None,
    md: Mapping[str, Any] | None = None,
) -> MsgGenerator[Verdict]:
    """Measure one run with `until_precise`; the verdict is the ``reason`` in its stop document.

    A detector of ophyd-async is prepared with `prepare`, a ``TriggerInfo``, once it is staged. The exit status is
    "fail" where results stopped coming, "success" else.
    """
    wanted = {"q": goal.q, "of": goal.of, "relative_error": goal.relative_error}
    metadata = {"plan_name": "fly_until_precise", "detectors": [detector.name], "goal": wanted, **(md or {})}

    def measure() -> MsgGenerator[Verdict]:
        yield from bps.open_run(metadata)
        if prepare is not None:
            yield from bps.prepare(detector, prepare, wait=True)
        verdict = yield from until_precise(detector, results, goal, roimap, within=within)
        exit_status = "fail" if verdict.outcome == "no results" else "success"
        yield from bps.close_run(exit_status=exit_status, reason=verdict.reason)
        return verdict

    plan = measure()
    if isinstance(detector, Stageable):
        plan = bpp.stage_wrapper(plan, [detector])  # type: ignore[no-untyped-call]
    return (yield from plan)


def _tell(detector: Flyable, awaited: Awaited | None = None) -> MsgGenerator[None]:
    """Publish documents of the frames that a detector has written, if it does so."""
    if isinstance(detector, WritesStreamAssets):
        yield from bps.collect(detector, return_payload=False, name=STREAM)
        if awaited is not None:
            (index,) = yield from bps.wait_for([detector.get_index])
            awaited.saw(index.result())


def _stop(detector: Flyable) -> MsgGenerator[None]:
    if isinstance(detector, Stoppable):
        yield from bps.stop(detector)
        yield from bps.complete(detector, wait=True)
    else:
        yield from bps.unstage(detector, wait=True)
    yield from _tell(detector)
