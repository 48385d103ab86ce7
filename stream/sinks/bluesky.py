"""Results as a derived Bluesky run: what its documents say is `stream.sinks.bluesky_run`'s matter."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import h5py
from pydantic import BaseModel, ValidationError

from stream.errors import CheckpointError, ConfigError, SinkError
from stream.messages import Output, Result, RunStart, RunStop
from stream.sinks.bluesky_result import Document
from stream.sinks.bluesky_run import Delays, DerivedRun

_log = logging.getLogger(__name__)

REMEMBERED = 64
"""Runs, the newest."""


class Publisher(AbstractContextManager["Publisher"], Protocol):
    """A way out for documents."""

    def publish(self, run: str, name: str, document: Mapping[str, Any], *, may_be_lost: bool) -> None:
        """Take a document of the run with this uid, in order; one that may be lost is never waited for.

        Raises
        ------
        SinkError
            It cannot be delivered.
        """

    def flush(self) -> None:
        """Return once it has what must not be lost.

        Raises
        ------
        SinkError
            It has not.
        """


class BlueskySink:
    """Publishes one derived run per run of the detector. A `stream.protocols.Sink`.

    Events follow the results, at most one in `every` seconds, and one at the end: those in between may be lost.

    A sink that is started again in the middle of a run goes on with the run that it began, if it has a `memory`: there
    is one start, and no number of an event is used twice. What was being published when the process died may come
    twice (the same document, with the same uid), or, if it was an event before the last, never.

    Parameters
    ----------
    publishers
        Where documents go: to each of them, one document after the other. Entered and left with the sink.
    stores
        As publishers, but where runs are kept: told the end of a run before the others are, so that who hears of it
        finds the run; and how a run began also when the sink goes on with it.
    qmap
        `stream.operators.roimap.RoiMap.arrays`: where the bins lie.
    delays
        All delays that a result of so many frames has. A run has those of the frames planned, or else all there are;
        NaN is what is not reached. What comes beyond the plan is only in the result file.
    every
        Seconds between two events.
    fitted
        Which dynamic bin contrast and relaxation rate are of, from 0.
    analysis
        What is told in the start of how results are made, beside what is known here.
    memory
        File in which is kept what was published of the last runs. None: nothing is remembered.

    Raises
    ------
    ConfigError
        There is no bin `fitted`.
    CheckpointError
        The memory cannot be read.
    """

    def __init__(
        self,
        publishers: Sequence[Publisher],
        *,
        stores: Sequence[Publisher] = (),
        qmap: Mapping[str, Any],
        delays: Delays,
        every: float = 1.0,
        fitted: int = 0,
        analysis: Mapping[str, Any] | None = None,
        memory: Path | None = None,
    ) -> None:
        n_q = len(qmap["dynamic_index_mapping"])
        if not 0 <= fitted < n_q:
            raise ConfigError(f"bin {fitted} cannot be fitted: the map has {n_q}, counted from 0")
        self._publishers, self._stores = publishers, stores
        self._everyone = [*publishers, *stores]
        self._qmap, self._delays, self._fitted, self._analysis = qmap, delays, fitted, analysis or {}
        self._every = every
        self._memory = memory
        self._published = _remembered(memory)
        self._runs: dict[str, _Run] = {}
        self._files: dict[str, Path] = {}
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            for publisher in self._everyone:
                entered.enter_context(publisher)
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered.__exit__(kind, error, traceback)

    def written(self, file: Path) -> None:
        """Take note of a result file; before the end of its run. For `stream.sinks.hdf5.Hdf5Sink`'s ``on_written``."""
        try:
            with h5py.File(file) as opened:
                self._files[opened["entry/entry_identifier"].asstr()[()]] = file
        except (OSError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s is not told of in documents: %s", file, error)

    def write(self, output: Output) -> None:
        """Publish what follows from one output.

        Raises
        ------
        SinkError
            A document was not taken; one of an interim result is only logged.
        """
        run = self._runs.get(output.run)
        match output:
            case RunStart():
                self._begin(output)
            case Result() if run:
                run.results[output.operator] = output
                # The last of those that are known together.
                if output.operator == "ledger" and not output.final:
                    self._interim(run)
            case RunStop() if run:
                self._end(run, output)
                del self._runs[output.run]

    def flush(self) -> None:
        """Return once the publishers have everything.

        Raises
        ------
        SinkError
            One has not.
        """
        self._flush(self._everyone)

    def _begin(self, start: RunStart) -> None:
        documents = DerivedRun(
            start, qmap=self._qmap, delays=self._delays, fitted=self._fitted, analysis=self._analysis
        )
        published = self._published.setdefault(documents.uid, _Published(began=time.time()))
        if published.ended:
            _log.warning("run %s: its documents are published already, as %s", start.run, documents.uid)
            return
        self._runs[start.run] = _Run(documents, published)
        opening = documents.opening(published.began)
        self._save()
        self._publish(documents.uid, opening, self._stores if published.opened else self._everyone)
        self.flush()
        published.opened = True
        self._save()

    def _interim(self, run: "_Run") -> None:
        now = time.monotonic()
        if now < run.due or "multitau" not in run.results or run.published.ending is not None:
            return
        run.due = now + self._every
        # Before it is out: a number that is missing harms nobody, two events of one number do.
        run.published.n_events += 1
        self._save()
        event = run.documents.event(run.results, run.published.n_events, time.time())
        try:
            self._publish(run.documents.uid, [event], self._everyone, may_be_lost=True)
        except SinkError as error:
            _log.warning("an event was dropped: %s", error)

    def _end(self, run: "_Run", stop: RunStop) -> None:
        published, documents = run.published, run.documents
        has_last = "multitau" in run.results
        if published.ending is None:
            published.n_events += has_last
            published.ending = time.time()
            self._save()
        now = published.ending
        last = [documents.event(run.results, published.n_events, now)] if has_last else []
        result = self._result(documents, stop.run, now)
        end = documents.stop(stop, published.n_events, now)
        with _first_failure() as attempt:
            attempt(self._publish, documents.uid, [*last, *result], self._everyone)
            for publishers in (self._stores, self._publishers):
                attempt(self._publish, documents.uid, [end], publishers)
                attempt(self._flush, publishers)
        published.ended = True
        self._save()

    def _result(self, documents: DerivedRun, run: str, now: float) -> list[Document]:
        file = self._files.pop(run, None)
        try:
            return documents.result(file, now) if file else []
        except OSError as error:
            _log.warning("%s is not told of in documents: %s", file, error)
            return []

    def _publish(
        self, run: str, documents: Sequence[Document], publishers: Sequence[Publisher], *, may_be_lost: bool = False
    ) -> None:
        with _first_failure() as attempt:
            for name, document in documents:
                for publisher in publishers:
                    attempt(publisher.publish, run, name, document, may_be_lost=may_be_lost)

    def _flush(self, publishers: Sequence[Publisher]) -> None:
        with _first_failure() as attempt:
            for publisher in publishers:
                attempt(publisher.flush)

    def _save(self) -> None:
        while len(self._published) > REMEMBERED:
            del self._published[next(iter(self._published))]
        if self._memory is None:
            return
        temporary = self._memory.with_name(self._memory.name + ".tmp")
        try:
            temporary.write_text(_Memory(runs=self._published).model_dump_json())
            temporary.replace(self._memory)
        except OSError as error:
            raise SinkError(f"{self._memory}: {error.strerror}") from error


@contextmanager
def _first_failure() -> Iterator[Callable[..., None]]:
    """Give what calls a function, whatever became of those before; in the end raise the first SinkError of them."""
    failures: list[SinkError] = []

    def attempt(do: Callable[..., None], *given: Any, **options: Any) -> None:
        try:
            do(*given, **options)
        except SinkError as error:
            failures.append(error)

    yield attempt
    if failures:
        raise failures[0]


class _Published(BaseModel):
    began: float
    opened: bool = False
    """Start and descriptor are out."""
    n_events: int = 0
    ending: float | None = None
    """When the end began to be published."""
    """Then no other event comes before the last."""
    ended: bool = False


class _Memory(BaseModel):
    runs: dict[str, _Published]


@dataclass(slots=True)
class _Run:
    documents: DerivedRun
    published: _Published
    results: dict[str, Result] = field(default_factory=dict)
    due: float = 0.0
    """When the next event may be published; monotonic."""


def _remembered(memory: Path | None) -> dict[str, _Published]:
    if memory is None or not memory.exists():
        return {}
    try:
        return _Memory.model_validate_json(memory.read_bytes()).runs
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{memory}: not what was published of Bluesky runs: {error}") from None
