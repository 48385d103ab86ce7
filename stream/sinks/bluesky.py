"""Results as a derived Bluesky run: what its documents say is `stream.sinks.bluesky_run`'s matter."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

OPENING = 5.0
"""How long a run waits at its start for those who are told of it (s)."""


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

    Whoever cannot be told how a run began gets no events before the end, and is told all of it then.

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
            self._opener = entered.enter_context(ThreadPoolExecutor(1, "opening"))
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
            The last result or the end was not taken; other documents are only logged. Or the memory failed.
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
                del self._runs[output.run]
                self._end(run, output)

    def flush(self) -> None:
        """Return once the publishers have everything; at once while one was not yet told how a run began.

        Raises
        ------
        SinkError
            One has not.
        """
        if all(run.opening.done() and not run.opening.result() for run in self._runs.values()):
            self._flush(self._everyone)

    def _begin(self, start: RunStart) -> None:
        documents = DerivedRun(
            start, qmap=self._qmap, delays=self._delays, fitted=self._fitted, analysis=self._analysis
        )
        published = self._published.setdefault(documents.uid, _Published(began=time.time()))
        if published.ended:
            _log.warning("run %s: its documents are published already, as %s", start.run, documents.uid)
            return
        began = documents.opening(published.began)
        self._save()
        to = self._stores if published.opened else self._everyone
        run = _Run(documents, published, began, self._opener.submit(self._open, documents.uid, began, to))
        self._runs[start.run] = run
        if wait([run.opening], OPENING).not_done:
            _log.warning("run %s goes on, though not all were told within %g s how it began", start.run, OPENING)
        else:
            self._opened(run)

    def _open(self, run: str, began: Sequence[Document], publishers: Sequence[Publisher]) -> list[Publisher]:
        """Return who did not take how a run began."""
        missing = []
        for publisher in publishers:
            try:
                self._tell(publisher, run, began)
            except SinkError as error:
                _log.warning("run %s: how it began is told again at its end: %s", run, error)
                missing.append(publisher)
        return missing

    def _tell(self, publisher: Publisher, run: str, began: Sequence[Document]) -> None:
        for name, document in began:
            publisher.publish(run, name, document, may_be_lost=False)
        publisher.flush()

    def _opened(self, run: "_Run") -> list[Publisher]:
        """Return who was not told how a run began, once that was tried."""
        missing = run.opening.result()
        if not (missing or run.published.opened):
            run.published.opened = True
            self._save()
        return missing

    def _interim(self, run: "_Run") -> None:
        now = time.monotonic()
        if now < run.due or "multitau" not in run.results or run.published.ending is not None:
            return
        # Publishers are asked by one thread at a time.
        if not all(each.opening.done() for each in self._runs.values()):
            return
        missing = self._opened(run)
        run.due = now + self._every
        # Before it is out: a number that is missing harms nobody, two events of one number do.
        run.published.n_events += 1
        self._save()
        event = run.documents.event(run.results, run.published.n_events, time.time())
        try:
            others = [publisher for publisher in self._everyone if publisher not in missing]
            self._publish(run.documents.uid, [event], others, may_be_lost=True)
        except SinkError as error:
            _log.warning("an event was dropped: %s", error)

    def _end(self, run: "_Run", stop: RunStop) -> None:
        published, documents = run.published, run.documents
        wait([run.opening, *(each.opening for each in self._runs.values())])
        missing = self._opened(run)
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
            away = [each for each in missing if not attempt(self._tell, each, documents.uid, run.began)]
            stores, others = ([each for each in of if each not in away] for of in (self._stores, self._publishers))
            attempt(self._publish, documents.uid, [*last, *result], [*others, *stores])
            for publishers in (stores, others):
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
def _first_failure() -> Iterator[Callable[..., bool]]:
    """Give what calls a function and tells whether it went well; in the end raise the first SinkError of them."""
    failures: list[SinkError] = []

    def attempt(do: Callable[..., None], *given: Any, **options: Any) -> bool:
        try:
            do(*given, **options)
        except SinkError as error:
            failures.append(error)
            return False
        return True

    yield attempt
    if failures:
        raise failures[0]


class _Published(BaseModel):
    began: float
    opened: bool = False
    """Start and descriptor are out."""
    n_events: int = 0
    ending: float | None = None
    """When the end began to be published: then no other event comes before the last."""
    ended: bool = False


class _Memory(BaseModel):
    runs: dict[str, _Published]


@dataclass(slots=True)
class _Run:
    documents: DerivedRun
    published: _Published
    began: list[Document]
    opening: Future[list[Publisher]]
    """Who did not take how it began, once that is known."""
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
