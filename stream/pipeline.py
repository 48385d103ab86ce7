"""The straight line: source, operators, sinks, one run at a time.

              | RunStart                       | FrameBatch       | RunStop     | Rejected
--------------+--------------------------------+------------------+-------------+------------------
idle          | begin                          | stray            | ignore      | log
running r     | of r: ignore; other: end, begin| of r: push;      | of r: end;  | count undecodable
              |                                | other: stray     | other: stray|

Faults, one rule each. What cannot be read is counted and skipped; its frames show as lost. An interim result that a
sink does not take is dropped; a final one raises, and a restart delivers it from the checkpoint. A transport that is
gone raises: reconnecting is libzmq's and librdkafka's, restarting is the scheduler's.

A run ends in four steps, so that it can be killed between any two of them and nothing is lost: checkpoint with the
RunStop in it, write the final results, flush every sink, checkpoint without the run.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from stream import checkpoint
from stream.errors import ConfigError, RoiMapError, SinkError, SourceError, XpcsStreamError
from stream.ledger import Ledger
from stream.messages import ExitStatus, FrameBatch, Message, Output, Rejected, Result, RunStart, RunStop
from stream.protocols import Operator, Sink, Source

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Run:
    start: RunStart
    operators: Sequence[Operator]
    ledger: Ledger = field(default_factory=Ledger)
    stop: RunStop | None = None

    def owns(self, message: RunStart | FrameBatch | RunStop) -> bool:
        return (message.run, message.region) == (self.start.run, self.start.region)


class Pipeline:
    """Runs until the source ends, `runs` runs are done, or `stop` is set.

    Parameters
    ----------
    source, sinks
        Open; the caller closes them.
    operators
        Makes the operators of a run.
    checkpoint_path
        Where to keep the state. With it a set `stop` leaves the run to be resumed; without it the run ends as aborted,
        with final results of what came.
    publish_every, checkpoint_every
        Seconds between interim results, and between checkpoints.
    runs
        Return after so many runs; None = go on for ever.
    stop
        May be set at any time, also by a signal handler.
    """

    def __init__(
        self,
        source: Source,
        operators: Callable[[RunStart], Sequence[Operator]],
        sinks: Sequence[Sink],
        *,
        checkpoint_path: Path | None = None,
        publish_every: float = 1.0,
        checkpoint_every: float = 30.0,
        runs: int | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._source = source
        self._operators = operators
        self._sinks = sinks
        self._checkpoint_path = checkpoint_path
        self._publish_every = publish_every
        self._checkpoint_every = checkpoint_every
        self._runs_left = runs
        self._stop = stop if stop is not None else threading.Event()
        self._run: _Run | None = None
        self._refused: XpcsStreamError | None = None
        self._rejected = self._strays = 0
        self._publish_due = self._checkpoint_due = 0.0

    def run(self) -> None:
        """Take messages from the source until there is nothing left to do.

        Raises
        ------
        SourceError
            The transport of the source is gone.
        SinkError
            A sink did not take a final result.
        CheckpointError
            The checkpoint cannot be written, is damaged, or belongs to another configuration.
        RoiMapError, ConfigError
            All of the wanted number of runs are done, and one of them could not be processed at all.
        """
        self._resume()
        try:
            self._listen()
        except SourceError:
            self._leave()
            raise
        if self._runs_left == 0 and self._refused is not None:
            raise self._refused

    def _listen(self) -> None:
        if self._runs_left == 0:
            return
        for message in self._source:
            self._take(message)
            if self._runs_left == 0:
                return
            if self._stop.is_set():
                self._leave()
                return
            self._keep_time()
        self._break_off("abort")

    def _take(self, message: Message | None) -> None:
        run = self._run
        match message:
            case RunStart():
                if run is not None and run.owns(message):
                    return
                if run is not None:
                    _log.warning("run %s: the next run began before its end came", run.start.run)
                    self._break_off("fail")
                self._begin(message)
            case FrameBatch():
                if run is not None and run.owns(message):
                    self._push(run, message)
                else:
                    self._stray(message.run, f"frames {message.first} and on")
            case RunStop():
                if run is not None and run.owns(message):
                    run.ledger.close(message.n_frames)
                    self._end(run, message)
                elif run is not None:
                    self._stray(message.run, "the end")
            case Rejected():
                self._rejected += 1
                _warn_seldom(self._rejected, "rejected: %s", message.reason)
                if run is not None:
                    run.ledger.undecodable += 1

    def _stray(self, run: str, what: str) -> None:
        self._strays += 1
        _warn_seldom(self._strays, "stray: %s of run %s", what, run)
        if self._run is not None:
            self._run.ledger.stray += 1

    def _begin(self, start: RunStart) -> None:
        try:
            operators = self._operators(start)
        except (RoiMapError, ConfigError) as error:
            _log.warning("run %s cannot be processed: %s", start.run, error)
            self._refused = error
            self._count_run()
            return
        # Kept with the run, so that a restart does not tell another time.
        announced = {"announced": datetime.now(UTC).isoformat()}
        start = replace(start, metadata=announced | dict(start.metadata))
        self._run = _Run(start=start, operators=operators)
        self._publish_due = time.monotonic() + self._publish_every
        self._write(start)
        # A source that cannot seek will not send the start of the run again.
        self._save()

    def _push(self, run: _Run, batch: FrameBatch) -> None:
        n, *shape = batch.frames.shape
        if tuple(shape) != run.start.shape or batch.frames.dtype != run.start.dtype:
            self._take(Rejected(reason=(
                f"frames {batch.first} and on of run {batch.run} are {shape} {batch.frames.dtype.str},"
                f" the run began with {list(run.start.shape)} {run.start.dtype}"
            )))  # fmt: skip
            return
        past = run.ledger.admit(batch.first, n)
        if past < n:
            fresh = replace(batch, first=batch.first + past, frames=batch.frames[past:]) if past else batch
            for operator in run.operators:
                operator.push(fresh)
        age = time.time_ns() - batch.timestamp_ns
        run.ledger.lag = age / 1e9 - (n - 1) * run.start.frame_time - run.start.count_time

    def _break_off(self, exit_status: ExitStatus) -> None:
        """End a run of which the detector did not say that it ended."""
        if self._run is not None:
            start, n_frames = self._run.start, self._run.ledger.next_frame
            stop = RunStop(run=start.run, region=start.region, n_frames=n_frames, exit_status=exit_status)
            self._end(self._run, stop)

    def _end(self, run: _Run, stop: RunStop) -> None:
        run.stop = stop
        self._save()
        self._publish(run, final=True)
        self._write(stop)
        for sink in self._sinks:
            sink.flush()
        self._run = None
        self._save()
        self._count_run()

    def _count_run(self) -> None:
        if self._runs_left is not None:
            self._runs_left -= 1

    def _publish(self, run: _Run, *, final: bool) -> None:
        arrays = [(operator.name, operator.result()) for operator in run.operators]
        for name, result in [*arrays, ("ledger", run.ledger.arrays())]:
            self._write(
                Result(
                    run=run.start.run,
                    region=run.start.region,
                    operator=name,
                    n_frames=run.ledger.next_frame,
                    final=final,
                    arrays=result,
                )
            )

    def _write(self, output: Output) -> None:
        for sink in self._sinks:
            try:
                sink.write(output)
            except SinkError:
                if not isinstance(output, Result) or output.final:
                    raise
                _log.warning("an interim result of %s was dropped", output.operator, exc_info=True)

    def _keep_time(self) -> None:
        now = time.monotonic()
        if self._run is not None and now >= self._publish_due:
            self._publish(self._run, final=False)
            self._publish_due = now + self._publish_every
        if self._run is not None and now >= self._checkpoint_due:
            self._save()

    def _save(self) -> None:
        self._checkpoint_due = time.monotonic() + self._checkpoint_every
        if self._checkpoint_path is None:
            return
        run = self._run
        running = None
        if run is not None:
            states = {operator.name: operator.snapshot() for operator in run.operators}
            running = checkpoint.Running(start=run.start, stop=run.stop, ledger=run.ledger.arrays(), operators=states)
        state = checkpoint.Checkpoint(position=self._source.position(), running=running)
        checkpoint.save(self._checkpoint_path, state)

    def _resume(self) -> None:
        saved = None if self._checkpoint_path is None else checkpoint.load(self._checkpoint_path)
        if saved is None:
            return
        if saved.position:
            self._source.seek(saved.position)
        if saved.running is None:
            return
        start = saved.running.start
        run = _Run(start=start, operators=self._operators(start), stop=saved.running.stop)
        run.ledger.restore(saved.running.ledger)
        for operator in run.operators:
            operator.restore(saved.running.operators[operator.name])
        _log.info("run %s goes on at frame %d", start.run, run.ledger.next_frame)
        self._run = run
        self._checkpoint_due = time.monotonic() + self._checkpoint_every
        self._write(start)
        if run.stop is not None:
            self._end(run, run.stop)

    def _leave(self) -> None:
        """Leave the run as it is if it can be resumed, else end it with what came."""
        if self._checkpoint_path is None:
            self._break_off("abort")
        elif self._run is not None:
            self._publish(self._run, final=False)
            self._save()


def _warn_seldom(n: int, text: str, *values: object) -> None:
    """Log the first, second, fourth, ... of warnings that may come with every frame."""
    if n & (n - 1) == 0:
        _log.warning(text + " (%d so far)", *values, n)
