"""Runs out of Bluesky's documents, in whatever order they come. No I/O: a state machine that is told the time.

Documents name each other by uid. One that names another that did not come waits for it, `within` seconds at most. So
documents of several runs may come mixed, late, twice and out of order; the outcome is that of their order. Frames are
told of in their order, and the end of a run once all of it came that its stop document counts.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stream.errors import DecodeError
from stream.ingest import bluesky_facts
from stream.ingest.bluesky_messages import (
    Document,
    Ended,
    Master,
    Opened,
    Rows,
    Told,
    between,
    descriptor,
    eiger_master,
    field,
    rows_of,
)
from stream.ingest.bluesky_run import MAX_WAITING, Run
from stream.messages import Rejected
from stream.wire import MAX_COUNT, one_line, shown

MAX_RUNS = 64
"""That are open at once."""
MAX_KNOWN = 2**16
"""Documents that others may name; the oldest are forgotten."""


class _Missing(Exception):
    def __init__(self, uid: str) -> None:
        self.uid = uid


@dataclass(slots=True)
class _Waiting:
    name: str
    document: Document
    until: float


class Runs:
    """Takes documents with `feed`, and tells what they mean for frames.

    Parameters
    ----------
    data_key
        Of the detector's frames. None: the first in the stream "primary" whose data stand in files.
    within
        How long a document waits for those that it names, and a stop for the rest of its run (s).
    silence
        How long a run may be silent, once others have begun, until its stop is no longer expected (s).
    """

    def __init__(self, *, data_key: str | None = None, within: float = 10.0, silence: float = 60.0) -> None:
        self._data_key, self._within, self._silence = data_key, within, silence
        self._runs: dict[str, Run] = {}
        self._ended: OrderedDict[str, int] = OrderedDict()
        """What would have been told of next."""
        self._known: OrderedDict[tuple[str, str], Any] = OrderedDict()
        """Descriptors, resources and datums by what they are and uid."""
        self._waiting: dict[str, list[_Waiting]] = {}
        """By what they wait for."""
        self._n_waiting = 0
        self._take: Mapping[str, Callable[[Document, float], Iterator[Told]]] = {
            "start": self._start,
            "descriptor": self._descriptor,
            "stream_resource": self._resource,
            "stream_datum": self._stream_datum,
            "resource": self._resource,
            "datum": self._datum,
            "datum_page": self._datum_page,
            "event": self._event,
            "event_page": self._event_page,
            "stop": self._stop,
        }

    def feed(self, name: str, document: Document, now: float) -> Iterator[Told]:
        """Take a document; `now` is a time that only goes on (s)."""
        todo = deque([_Waiting(name, document, now + self._within)])
        while todo:
            each = todo.popleft()
            try:
                yield from self._fed(each, now)
            except _Missing as missing:
                yield from self._await(missing.uid, each)
            except DecodeError as error:
                yield Rejected(reason=one_line(f"{each.name}: {error}"))
            else:
                uid = each.document.get("datum_id" if each.name == "datum" else "uid")
                released = self._waiting.pop(uid, []) if isinstance(uid, str) else []
                for datum_id in _datum_ids(each):
                    released += self._waiting.pop(datum_id, [])
                self._n_waiting -= len(released)
                todo.extend(released)
        yield from self._end_those(lambda run: run.is_complete)

    def expire(self, now: float) -> Iterator[Told]:
        """Give up what was waited for long enough; to be called now and then."""
        for uid, waiting in list(self._waiting.items()):
            late = [each for each in waiting if each.until <= now]
            for each in late:
                yield Rejected(reason=f"{each.name}: {shown(uid)}, which it names, did not come")
            self._n_waiting -= len(late)
            self._waiting[uid] = [each for each in waiting if each.until > now]
            if not self._waiting[uid]:
                del self._waiting[uid]
        newest = next(reversed(self._runs), None)
        yield from self._end_those(lambda run: run.stop is not None and run.until <= now)
        yield from self._end_those(lambda run: run.facts.run != newest and run.heard + self._silence <= now)

    def close(self) -> Iterator[Told]:
        """End all runs: nothing more will come."""
        yield from self._end_those(lambda _: True)

    def _fed(self, each: _Waiting, now: float) -> Iterator[Told]:
        take = self._take.get(each.name)
        if take is None:
            raise DecodeError("is of a kind that is not made any more")
        yield from take(each.document, now)

    def _await(self, uid: str, each: _Waiting) -> Iterator[Rejected]:
        if self._n_waiting >= MAX_WAITING:
            yield Rejected(reason=f"{each.name}: {shown(uid)}, which it names, did not come, and {MAX_WAITING} wait")
            return
        self._n_waiting += 1
        self._waiting.setdefault(uid, []).append(each)

    def _run(self, uid: str, now: float) -> Run | None:
        """Return an open run, None if it ended."""
        if uid in self._ended:
            return None
        if uid not in self._runs:
            raise _Missing(uid)
        run = self._runs[uid]
        run.heard = max(run.heard, now)
        return run

    def _check_late(self, uid: str, end: int) -> None:
        """Raise DecodeError if that is more than what was told of an ended run; what came twice is no matter."""
        if end > self._ended[uid]:
            raise DecodeError(f"run {shown(uid)} ended before {end - 1}, which is lost")

    def _named(self, kind: str, uid: str) -> Any:
        if (kind, uid) not in self._known:
            raise _Missing(uid)
        return self._known[kind, uid]

    def _keep(self, kind: str, uid: str, thing: Any) -> None:
        self._known.setdefault((kind, uid), thing)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _start(self, document: Document, now: float) -> Iterator[Told]:
        uid = field(document, "uid", str)
        if uid in self._runs or uid in self._ended:
            return
        if len(self._runs) >= MAX_RUNS:
            oldest = next(iter(self._runs))
            yield from self._end_those(lambda run: run.facts.run == oldest)
        facts = bluesky_facts.of_start(uid, document)
        self._runs[uid] = Run(facts, now)
        yield Opened(facts=facts, is_described=False)

    def _descriptor(self, document: Document, now: float) -> Iterator[Told]:
        uid, told = field(document, "uid", str), descriptor(document, self._data_key)
        if (run := self._run(told.run, now)) is None or ("descriptor", uid) in self._known:
            return
        is_ours = document.get("name") == "primary"
        self._keep("descriptor", uid, told if is_ours else None)
        if not is_ours:
            return
        configuration = document.get("configuration")
        devices = configuration if isinstance(configuration, Mapping) else {}
        for device in [told.device] if told.device in devices else devices:
            if isinstance(devices[device], Mapping):
                run.facts = bluesky_facts.with_configuration(run.facts, devices[device])
        run.described = told
        yield Opened(facts=run.facts, is_described=True)

    def _resource(self, document: Document, _: float) -> Iterator[Told]:
        self._keep("resource", field(document, "uid", str), document)
        yield from ()

    def _datum(self, document: Document, _: float) -> Iterator[Told]:
        uid, resource = field(document, "datum_id", str), field(document, "resource", str)
        self._keep("datum", uid, (resource, field(document, "datum_kwargs", dict)))
        yield from ()

    def _datum_page(self, document: Document, now: float) -> Iterator[Told]:
        resource = field(document, "resource", str)
        for row in rows_of(document, ("datum_id",), ("datum_kwargs",)):
            yield from self._datum({**row, "resource": resource}, now)

    def _stream_datum(self, document: Document, now: float) -> Iterator[Told]:
        uid = field(document, "stream_resource", str)
        told = self._named("descriptor", field(document, "descriptor", str))
        resource = self._named("resource", uid)
        begin, end = between(document, "indices", 0)
        first_event, _ = between(document, "seq_nums", 1)
        if told is None or resource.get("data_key") != told.data_key:
            return
        per_event = told.frames_per_event
        if (run := self._run(told.run, now)) is None:
            self._check_late(told.run, end * per_event)
            return
        parameters = field(resource, "parameters", dict)
        # A file that is not the run's first goes on where the one before ended.
        offset = run.offsets.setdefault(uid, max(0, first_event - 1 - begin) * per_event)
        rows = Rows(
            run=told.run,
            uri=field(resource, "uri", str),
            dataset=field(parameters, "dataset", str),
            first=offset + begin * per_event,
            row=begin * per_event,
            n=(end - begin) * per_event,
        )
        if rows.first + rows.n > MAX_COUNT:
            raise DecodeError(f"frames {rows.first} and on are more than {MAX_COUNT}")
        yield from run.in_order(rows.first, rows.first + rows.n, rows)

    def _event(self, document: Document, now: float) -> Iterator[Told]:
        told = self._named("descriptor", field(document, "descriptor", str))
        if told is None:
            return
        number, data = field(document, "seq_num", int), field(document, "data", dict)
        if (run := self._run(told.run, now)) is None:
            self._check_late(told.run, 0 if told.is_streamed or told.data_key is None else number)
            return
        if told.data_key is not None and not told.is_streamed:
            resource_uid, kwargs = self._named("datum", field(data, told.data_key, str))
            path = eiger_master(self._named("resource", resource_uid), kwargs)
            yield from run.in_order(number - 1, number, Master(run=told.run, path=path, event=number - 1))
        run.seen = max(run.seen, number)

    def _event_page(self, document: Document, now: float) -> Iterator[Told]:
        uid = field(document, "descriptor", str)
        self._named("descriptor", uid)
        for row in rows_of(document, ("seq_num",), ("data",)):
            yield from self._event({**row, "descriptor": uid}, now)

    def _stop(self, document: Document, now: float) -> Iterator[Told]:
        if (run := self._run(field(document, "run_start", str), now)) is None or run.stop is not None:
            return
        field(document, "exit_status", str)
        run.stop, run.until = document, now + self._within
        yield from ()

    def _end_those(self, is_over: Callable[[Run], bool]) -> Iterator[Told]:
        for run in [run for run in self._runs.values() if is_over(run)]:
            uid = run.facts.run
            yield from run.rest()
            del self._runs[uid]
            self._ended[uid] = run.next
            if len(self._ended) > MAX_KNOWN:
                self._ended.popitem(last=False)
            yield Ended(run=uid, exit_status=run.exit_status)


def _datum_ids(each: _Waiting) -> list[str]:
    ids = each.document.get("datum_id") if each.name == "datum_page" else []
    return [uid for uid in ids if isinstance(uid, str)] if isinstance(ids, list) else []
