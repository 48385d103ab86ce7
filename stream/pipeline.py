"""The straight line: source, operators, sinks, one run at a time.

              | RunStart                       | FrameBatch       | RunStop     | Rejected
--------------+--------------------------------+------------------+-------------+------------------
idle          | begin                          | stray            | ignore      | log
running r     | r again: ignore;               | of r: push;      | of r: end;  | count undecodable
              | another: end, begin            | other: stray     | other: stray|

Faults, one rule each. What cannot be read is counted and skipped; its frames show as lost. An interim result that a
sink does not take is dropped; a final one raises once the other sinks have it, and a restart delivers it again. A
transport that is gone raises: reconnecting is libzmq's and librdkafka's, restarting is the scheduler's.

Checkpoints are written beside, while frames are taken. A run ends in four steps, so that it can be killed between any
two of them and nothing is lost: checkpoint with the RunStop in it, write the final results, flush every sink,
checkpoint without the run.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from stream import checkpoint, heartbeat
from stream.errors import CheckpointError, ConfigError, RoiMapError, SinkError, SourceError, XpcsStreamError
from stream.ledger import Ledger
from stream.logs import bind
from stream.messages import ExitStatus, FrameBatch, Message, Output, Position, Rejected, Result, RunStart, RunStop
from stream.protocols import Operator, Sink, Source

_log = logging.getLogger(__name__)

OFTEN = 1.0
"""Seconds between checkpoints of a state that is written at once."""

SHARE = 0.1
"""Of the time, in which checkpoints are written unless they would be too far apart, and interim results made."""

DRAIN = 2.0
"""Seconds in which a source that cannot go back is emptied once the pipeline is told to stop."""


@dataclass(slots=True, kw_only=True)
class _Run:
    start: RunStart
    operators: Sequence[Operator]
    ledger: Ledger = field(default_factory=Ledger)
    stop: RunStop | None = None
    pushed: int = 0
    """One past the last frame of which the operators know."""
    rest: float = 0.0
    """Seconds between interim results in which making them takes no more than its share."""
    measured: tuple[float, int] | None = None
    """When which frame came, since when it is measured how fast they come; monotonic."""
    frame_time: float = 0.0
    """In which frames came lately (s); 0: not known yet."""
    came: float = math.nan
    """When the newest frame was correlated; monotonic."""
    saved: int = -1
    """Frames of the newest checkpoint; -1: there is none."""

    def owns(self, message: FrameBatch | RunStop) -> bool:
        return (message.run, message.region) == (self.start.run, self.start.region)

    def is_begun_by(self, start: RunStart) -> bool:
        """Tell whether this is our own start again; names of runs may come again (series of a restarted detector)."""
        times = [each.metadata.get("start_time") for each in (start, self.start)]
        return times[0] == times[1] and replace(start, metadata={}) == replace(self.start, metadata={})

    def misfit(self, batch: FrameBatch) -> str | None:
        """Say what keeps frames from being of this run."""
        n, *shape = batch.frames.shape
        if tuple(shape) != self.start.shape or batch.frames.dtype != self.start.dtype:
            began = f"{list(self.start.shape)} {self.start.dtype}"
            return f"are {shape} {batch.frames.dtype.str}, the run began with {began}"
        if self.planned and batch.first + n > self.planned:
            return f"end at {batch.first + n}, the run has {self.planned} frames"
        return None

    def frames_between(self, seconds: float, frame: int) -> int:
        """Return how many frames are between partial sums that are to be that time apart, once a frame has come.

        It is a power of 2. Regions have the same one, or where partial sums take long a larger one: then the others
        have them at these frames, too.
        """
        now = time.monotonic()
        since, first = self.measured = self.measured or (now, frame)
        if frame > first and now - since >= max(seconds, self.rest):
            self.frame_time = (now - since) / (frame - first)
            self.measured = now, frame
        times = seconds / self.start.frame_time, self.rest / (self.frame_time or self.start.frame_time)
        return 1 << math.ceil(math.log2(max(*times, 1)))

    def results(self, n_frames: int, *, final: bool, partials: bool) -> list[Result]:
        """Return what is known after n_frames."""
        for operator in self.operators:
            operator.miss(n_frames)
        arrays = [(each.name, each.partial() if partials else each.result()) for each in self.operators]
        told = self.told(n_frames, final=final, partials=partials)
        return [*(replace(told, operator=name, arrays=result) for name, result in arrays), told]

    def told(self, n_frames: int, *, final: bool, partials: bool) -> Result:
        """Return the ledger, and who tells it; not the latter where it would come into a result file."""
        frame_age = self.ledger.lag + time.monotonic() - self.came
        teller = heartbeat.worker(self.saved, frame_age) if partials or not final else {}
        return Result(
            run=self.start.run,
            region=self.start.region,
            operator="ledger",
            n_frames=n_frames,
            final=final,
            arrays={**self.ledger.arrays(), **teller},
        )

    @property
    def planned(self) -> int:
        """Frames the detector will send, 0 if it did not tell."""
        planned = self.start.metadata.get("n_frames")
        return planned if isinstance(planned, int) else 0

    def closed_by(self, stop: RunStop) -> RunStop:
        """Close the ledger; return the stop with what is known better here.

        A source that came too late to know tells fewer frames than came: then what was planned counts.
        """
        came = self.ledger.next_frame
        if stop.n_frames < came:
            n_frames = max(came, self.planned)
            stop = replace(stop, n_frames=n_frames, exit_status="abort" if n_frames > came else stop.exit_status)
        self.ledger.close(stop.n_frames)
        return stop


class Pipeline:
    """Runs until the source ends, `runs` runs are done, or `stop` is set.

    Parameters
    ----------
    source, sinks
        Open; the caller closes them.
    operators
        Makes the operators of a run.
    checkpoints
        Where to keep the state. With it a set `stop` leaves the run to be resumed; without it the run ends as aborted,
        with final results of what came.
    publish_every
        Seconds between interim results. There are fewer where making them would take more than a tenth of the time.
        With 0 there is one after every message.
    partials
        Publish partial sums (`Operator.partial`) instead of results, for a `stream.merger.Merger`: at frames that are
        multiples of a power of 2, so that all regions do so at the same ones.
    checkpoint_every
        Seconds between checkpoints at most: what has to be replayed after a kill. There are more of them while writing
        them takes less than a tenth of the time. With 0 there is one of every message, on disk before the next.
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
        checkpoints: checkpoint.Store | None = None,
        publish_every: float = 1.0,
        partials: bool = False,
        checkpoint_every: float = 30.0,
        runs: int | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._source = source
        self._operators = operators
        self._sinks = sinks
        self._checkpoints = checkpoints
        self._publish_every = publish_every
        self._partials = partials
        self._checkpoint_every = checkpoint_every
        self._runs_left = runs
        self._stop = stop if stop is not None else threading.Event()
        self._run: _Run | None = None
        self._runs_ended = 0
        self._position: Position = {}
        """Where the source stood before the message that is being taken."""
        self._refused: XpcsStreamError | None = None
        self._refused_run = ""
        self._last_reason = ""
        self._rejected = self._strays = 0
        self._publish_due = self._checkpoint_due = self._pass_due = self._beat_due = 0.0
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._drain_until: float | None = None

    def run(self) -> None:
        """Take messages from the source until there is nothing left to do.

        Raises
        ------
        SourceError
            The transport of the source is gone, or it ended and nothing in it could be read.
        SinkError
            A sink did not take a final result; the others have it.
        CheckpointError
            The checkpoint cannot be written, is damaged, or belongs to another configuration.
        RoiMapError, ConfigError
            All is done, but a run could not be processed at all.
        """
        with self._writer:
            self._resume()
            try:
                finished = self._listen()
            except SourceError:
                self._leave()
                raise
        if finished and self._refused is not None:
            raise self._refused

    def _listen(self) -> bool:
        """Return True when there is nothing left to do, False when told to stop."""
        if self._runs_left == 0:
            return True
        for message in self._source:
            self._take(message)
            self._position = self._source.position()
            if self._runs_left == 0:
                return True
            if self._stop.is_set() and self._drained(message):
                self._leave()
                return False
            self._keep_time()
        self._break_off("abort", self._source.position())
        if self._runs_ended == 0 and self._refused is None:
            self._say_why_nothing()
        return True

    def _drained(self, message: Message | None) -> bool:
        """Tell whether to leave. What a source that cannot go back holds for us would be lost: it is taken first."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + DRAIN
        return message is None or bool(self._position) or time.monotonic() > self._drain_until

    def _say_why_nothing(self) -> None:
        if self._last_reason:
            raise SourceError(f"nothing could be read: {self._last_reason}")
        if self._checkpoints is not None and self._checkpoints.load() is not None:
            _log.warning("nothing is left to do after %s; remove it to begin again", self._checkpoints)

    def _take(self, message: Message | None) -> None:
        run = self._run
        match message:
            case RunStart():
                if run is not None and run.is_begun_by(message):
                    return
                if run is not None:
                    _log.warning("run %s: the next run began before its end came", run.start.run)
                    # A restart must find this message again.
                    self._break_off("fail", self._position)
                self._begin(message)
            case FrameBatch():
                if run is not None and run.owns(message):
                    self._push(run, message)
                else:
                    self._stray(message.run, f"frames {message.first} and on")
            case RunStop():
                if run is not None and run.owns(message):
                    self._end(run, run.closed_by(message), self._source.position())
                elif run is not None:
                    self._stray(message.run, "the end")
            case Rejected():
                self._reject(message.reason)

    def _reject(self, reason: str) -> None:
        self._rejected += 1
        self._last_reason = reason
        _warn_seldom(self._rejected, "rejected: %s", reason)
        if self._run is not None:
            self._run.ledger.undecodable += 1

    def _stray(self, run: str, what: str) -> None:
        if run == self._refused_run:
            return
        self._strays += 1
        _warn_seldom(self._strays, "stray: %s of run %s", what, run)
        if self._run is not None:
            self._run.ledger.stray += 1

    def _begin(self, start: RunStart) -> None:
        bind(run=start.run)
        try:
            operators = self._operators(start)
        except (RoiMapError, ConfigError) as error:
            _log.warning("run %s cannot be processed: %s", start.run, error)
            self._refused, self._refused_run = error, start.run
            self._count_run()
            bind(run=None)
            return
        # Kept with the run, so that a restart does not tell another time.
        announced = {"announced": datetime.now(UTC).isoformat()}
        start = replace(start, metadata=announced | dict(start.metadata))
        self._run = _Run(start=start, operators=operators)
        self._publish_due, self._beat_due = time.monotonic() + self._publish_every, 0.0
        # A source that cannot go back will not send the start of the run again.
        self._save(self._source.position())
        deliver([start], self._sinks)

    def _push(self, run: _Run, batch: FrameBatch) -> None:
        if (wrong := run.misfit(batch)) is not None:
            self._reject(f"frames {batch.first} and on of run {batch.run} {wrong}")
            return
        n = len(batch.frames)
        past = run.ledger.admit(batch.first, n)
        if past < n:
            fresh = replace(batch, first=batch.first + past, frames=batch.frames[past:]) if past else batch
            for part in self._until_due(run, fresh):
                for operator in run.operators:
                    operator.push(part)
        age = time.time_ns() - batch.timestamp_ns
        run.ledger.lag = age / 1e9 - (n - 1) * run.start.frame_time - run.start.count_time
        run.came = time.monotonic()

    def _until_due(self, run: _Run, batch: FrameBatch) -> Iterator[FrameBatch]:
        """Cut frames where partial sums are due, and offer those."""
        if not self._partials:
            yield batch
            return
        begin, end = batch.first, batch.first + len(batch.frames)
        while begin < end:
            every = run.frames_between(self._publish_every, begin)
            due = begin // every * every
            if due > run.pushed:  # what was due then never came
                self._offer(run, due)
            until = min(end, due + every)
            yield replace(batch, first=begin, frames=batch.frames[begin - batch.first : until - batch.first])
            run.pushed = begin = until
            if until == due + every:
                self._offer(run, until)

    def _break_off(self, exit_status: ExitStatus, position: Position) -> None:
        """End a run of which the detector did not say that it ended."""
        if self._run is not None:
            start, n_frames = self._run.start, self._run.ledger.next_frame
            stop = RunStop(run=start.run, region=start.region, n_frames=n_frames, exit_status=exit_status)
            self._end(self._run, stop, position)

    def _end(self, run: _Run, stop: RunStop, position: Position) -> None:
        run.stop = stop
        self._save(position)
        deliver([*run.results(run.ledger.next_frame, final=True, partials=self._partials), stop], self._sinks)
        self._run = None
        self._runs_ended += 1
        self._save(position)
        self._count_run()
        bind(run=None)

    def _count_run(self) -> None:
        if self._runs_left is not None:
            self._runs_left -= 1

    def _offer(self, run: _Run, n_frames: int) -> None:
        begin = time.monotonic()
        offer(run.results(n_frames, final=False, partials=self._partials), self._sinks)
        end = time.monotonic()
        run.rest, self._beat_due = (end - begin) / SHARE, end + heartbeat.BEAT

    def _keep_time(self) -> None:
        now = time.monotonic()
        if self._run is not None and now >= self._publish_due and not self._partials:
            self._offer(self._run, self._run.ledger.next_frame)
            now = time.monotonic()
            self._publish_due = now + (max(self._publish_every, self._run.rest) if self._publish_every else 0.0)
        elif self._run is not None and now >= self._beat_due and self._partials:
            offer([self._run.told(self._run.ledger.next_frame, final=False, partials=True)], self._sinks)
            self._beat_due = now + heartbeat.BEAT
        if self._writing is not None and self._writing.done():
            self._wait_for_writer()
        if self._run is not None and self._checkpoint_every == 0:
            self._save(self._position)
        elif self._run is not None and now >= self._checkpoint_due and self._writing is None:
            self._save_beside(self._position)
        elif self._run is None and self._checkpoints is not None and now >= self._pass_due:
            # Of runs that were refused, and of none.
            self._pass_due = now + OFTEN
            self._checkpoints.pass_by(self._position)

    def _save(self, position: Position) -> None:
        """Return once the checkpoint is on disk."""
        self._save_beside(position)
        self._wait_for_writer()

    def _wait_for_writer(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _save_beside(self, position: Position) -> None:
        self._wait_for_writer()
        if self._checkpoints is None:
            return
        run = self._run
        running = None
        if run is not None:
            states = {operator.name: operator.snapshot() for operator in run.operators}
            running = checkpoint.Running(start=run.start, stop=run.stop, ledger=run.ledger.arrays(), operators=states)
        state = checkpoint.Checkpoint(position=dict(position), running=running)
        self._writing = self._writer.submit(self._write, self._checkpoints, state, run)

    def _write(self, store: checkpoint.Store, state: checkpoint.Checkpoint, run: _Run | None) -> None:
        begin = time.monotonic()
        store.save(state)
        end = time.monotonic()
        if run is not None and state.running is not None:
            run.saved = int(state.running.ledger["next_frame"])
        self._checkpoint_due = end + min(self._checkpoint_every, max(OFTEN, (end - begin) / SHARE))

    def _resume(self) -> None:
        saved = None if self._checkpoints is None else self._checkpoints.load()
        if saved is None:
            return
        try:
            if saved.position:
                self._source.seek(saved.position)
        except SourceError as error:
            if saved.running is not None:
                run = saved.running.start.run
                raise CheckpointError(f"{self._checkpoints}: run {run} in it is of another source: {error}") from error
            _log.info("%s is of another source, which is done", self._checkpoints)
        self._position = self._source.position()
        if saved.running is not None:
            self._resume_run(saved.running)

    def _resume_run(self, saved: checkpoint.Running) -> None:
        bind(run=saved.start.run)
        run = _Run(start=saved.start, operators=self._operators(saved.start), stop=saved.stop)
        names = [operator.name for operator in run.operators]
        if set(names) != set(saved.operators):
            was = ", ".join(saved.operators)
            raise CheckpointError(f"{self._checkpoints}: it was made with {was}, not with {', '.join(names)}")
        run.ledger.restore(saved.ledger)
        run.pushed = run.saved = run.ledger.next_frame
        for operator in run.operators:
            operator.restore(saved.operators[operator.name])
        _log.warning("run %s goes on at frame %d", saved.start.run, run.ledger.next_frame)
        self._run = run
        deliver([saved.start], self._sinks)
        if run.stop is not None:
            self._end(run, run.stop, self._source.position())

    def _leave(self) -> None:
        """Leave the run as it is if it can be resumed, else end it with what came."""
        if self._checkpoints is None:
            self._break_off("abort", self._source.position())
        elif self._run is not None:
            if not self._partials:
                self._offer(self._run, self._run.ledger.next_frame)
            self._save(self._source.position())


def deliver(outputs: Sequence[Output], sinks: Sequence[Sink]) -> None:
    """Bring outputs that must arrive to every sink, also when one of them fails.

    Raises
    ------
    SinkError
        Of the first that failed.
    """
    failed: SinkError | None = None
    for sink in sinks:
        try:
            for output in outputs:
                sink.write(output)
            sink.flush()
        except SinkError as error:
            _log.warning("%s", error)
            failed = failed or error
    if failed is not None:
        raise failed


def offer(results: Iterable[Result], sinks: Sequence[Sink]) -> None:
    """Give interim results to the sinks, which may drop them."""
    for result in results:
        for sink in sinks:
            try:
                sink.write(result)
            except SinkError as error:
                _log.warning("an interim result of %s was dropped: %s", result.operator, error)


def _warn_seldom(n: int, text: str, *values: object) -> None:
    """Log the first, second, fourth, ... of warnings that may come with every frame."""
    if n & (n - 1) == 0:
        _log.warning(text + " (%d so far)", *values, n)
