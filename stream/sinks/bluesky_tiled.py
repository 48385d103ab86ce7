"""Bluesky documents into a Tiled server, where bluesky_tiled_plugins' TiledWriter keeps them as runs."""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
from bluesky_tiled_plugins import TiledWriter
from event_model import EventModelError
from jsonschema import ValidationError  # type: ignore[import-untyped]
from tiled.client import from_context
from tiled.client.auth import CannotRefreshAuthentication
from tiled.client.context import CannotPrompt, Context

from stream.errors import SinkError
from stream.sinks.bluesky_tiled_nodes import Container, Unanswered, events
from stream.wire import one_line

_log = logging.getLogger(__name__)

MAX_WAITING = 1000
"""Documents that wait for the server, of all runs."""

MAX_RUNS = 64
"""That are written at once. Of one that never ends the others make room."""

ANSWER = 10.0
"""How long the server may take to say that it is there (s)."""

PAUSE = 0.5
"""Between attempts to write what must not be lost (s). Tiled's client itself tries for 45 s each time."""

POLL = 0.1
"""How often a wait looks whether it was stopped (s)."""

GRACE = 2.0
"""How long Tiled may still take something once we are stopped, or closed after an error (s)."""

KEY = "its key is taken from TILED_API_KEY, or from what `tiled login` keeps"

_OPENING = ("start", "descriptor", "stream_resource")
_OF_FILES = ("stream_resource", "stream_datum")
_FAILURES = (
    *(httpx.HTTPError, CannotPrompt, CannotRefreshAuthentication, Unanswered),
    *(EventModelError, ValidationError),
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError),
)
"""Of Tiled's client and of TiledWriter."""


class TiledDocuments:
    """To a catalogue of a Tiled server, which keeps runs. A `stream.sinks.bluesky.Publisher`.

    Documents are written one after the other, in a thread, each at once. While the server is slow or away, of the
    events that may be lost the newest waits for it; what must not be lost waits until it is back. A run that is there
    already, from a process before this one or a server that was restarted, is gone on with: no event is written twice.
    One that is there with its end is left as it is.

    A result file that the server cannot read is logged; the run is kept.

    Parameters
    ----------
    uri
        ``http://host:port`` or what else `tiled.client.from_uri` takes, such as that of a node. Its key is never in it,
        but in the environment (``TILED_API_KEY``), or was given in ``tiled login``.
    timeout
        How long the server may take for what must not be lost (s).
    stop
        Once it is set, nothing is waited for longer than 2 s.

    Raises
    ------
    SinkError
        The server does not answer, or does not let us in.
    """

    def __init__(self, uri: str, *, timeout: float = 60.0, stop: threading.Event | None = None) -> None:
        self._uri, self._timeout, self._stop = uri, timeout, stop
        try:
            httpx.get(uri, timeout=ANSWER)  # Tiled's client would try for 45 s
            self._client = _client(uri)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise SinkError(f"{uri}: no Tiled server answers: {_words(error)}") from None
        except _FAILURES as error:
            raise SinkError(f"{uri}: {_words(error)}; {KEY}") from None
        self._runs: dict[str, _Run] = {}
        self._waiting: deque[_Given] = deque()
        self._writing: _Given | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._failures: list[str] = []
        self._complaint = ""
        self._n_dropped = 0
        self._thread = threading.Thread(target=self._work, name="Tiled", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for what Tiled does not yet have: `timeout` at most, 2 s after an error."""
        try:
            self._flush(self._timeout if error is None else GRACE)
        except SinkError as failure:
            if error is None:
                raise
            _log.warning("%s", failure)
        finally:
            with self._changed:
                self._closing.set()
                self._changed.notify_all()
            self._thread.join(GRACE)
            if not self._thread.is_alive():  # else Tiled's client is still trying; it ends with the process
                self._client.context.close()

    def publish(self, run: str, name: str, document: Mapping[str, Any], *, may_be_lost: bool) -> None:
        """Take a document, at once; see `stream.sinks.bluesky.Publisher`."""
        with self._changed:
            older = [each for each in self._waiting if may_be_lost and each.may_be_lost and each.run == run]
            if older:
                self._dropped(f"{older[0]} waited until there was a newer one")
                older[0].document = document
                return
            given = _Given(run, name, document, may_be_lost)
            if len(self._waiting) >= MAX_WAITING:
                raise SinkError(f"{self._uri}: no room for {given}{self._because()}")
            self._waiting.append(given)
            self._changed.notify_all()

    def flush(self) -> None:
        """Return once Tiled has everything; see `stream.sinks.bluesky.Publisher`."""
        self._flush(self._timeout)

    def _flush(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._waiting or self._writing:
                now = time.monotonic()
                if self._stop is not None and self._stop.is_set():
                    deadline = min(deadline, now + GRACE)
                if not self._thread.is_alive():
                    raise SinkError(f"{self._uri}: nothing is written any more: what writes failed, as was said")
                if now >= deadline:
                    raise SinkError(f"{self._uri}: Tiled did not take everything{self._because()}")
                self._changed.wait(POLL)
            failures, self._failures = self._failures, []
        if failures:
            raise SinkError(f"{self._uri}: {'; '.join(failures)}")

    def _work(self) -> None:
        """Write what waits, one after the other."""
        while (given := self._next()) is not None:
            run = self._runs[given.run] = self._runs.pop(given.run, _Run())
            if len(self._runs) > MAX_RUNS:
                del self._runs[next(iter(self._runs))]
            self._write(run, given)
            if given.name == "stop":
                del self._runs[given.run]

    def _next(self) -> "_Given | None":
        with self._changed:
            self._writing = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            if self._closing.is_set():
                return None
            self._writing = self._waiting.popleft()
            return self._writing

    def _write(self, run: "_Run", given: "_Given") -> None:
        """Write a document, if need be again and again; or say why not."""
        if run.failure and given.name == "stop":
            with self._changed:
                self._failures.append(run.failure)
        while not (run.is_left or self._closing.is_set()):
            try:
                self._give(run, given)
            except _FAILURES as error:
                run.writer = None  # what it has done of this is not known; another one looks
                self._complaint = f"{given}: {_words(error)}"
                if given.may_be_lost or not _passes(error, given):
                    self._leave_out(run, given, self._complaint)
                    return
                self._closing.wait(PAUSE)
            else:
                self._complaint = ""
                return

    def _give(self, run: "_Run", given: "_Given") -> None:
        if run.writer is None:
            run.writer = self._writer(run, given.run)
        document = dict(given.document)
        is_kept = document["time"] in run.kept if given.name == "event" else (given.name, document) in run.opening
        if run.is_left or is_kept or (run.has_no_files and given.name in _OF_FILES):
            return
        # A process that remembered nothing of the run began to count again.
        if given.name == "event":
            document["seq_num"] = max(document["seq_num"], run.n_events + 1)
        elif given.name == "stop":
            said = document.get("num_events", {})
            document["num_events"] = {**said, "primary": max(said.get("primary", 0), run.n_events)}
        run.writer(given.name, document)
        if given.name == "event":
            run.n_events = document["seq_num"]
        if given.name in _OPENING:
            run.opening.append((given.name, given.document))
        if given.name == "stream_datum" and not run.has_looked:
            run.has_looked = True
            self._look(run, given)

    def _writer(self, run: "_Run", uid: str) -> TiledWriter:
        """Return what goes on with a run after what the server has of it."""
        with suppress(KeyError):
            there = self._client[uid]
            if not run.opening and "stop" in there.metadata:
                _log.warning("%s: run %s is there already, with its end: it is left as it is", self._uri, uid)
                run.is_left = True
            kept = events(there["primary"].base)
            run.kept = {time for _, time in kept}
            run.n_events = max((number for number, _ in kept), default=0)
        writer = TiledWriter(Container(self._client), batch_size=1)
        for name, document in run.opening:
            writer(name, dict(document))
        return writer

    def _look(self, run: "_Run", given: "_Given") -> None:
        """Say if the server, which takes any name of a file, cannot read this one."""
        told = {document["uid"]: document for _, document in run.opening}
        resource = told[given.document["stream_resource"]]
        stream = self._client[given.run][told[given.document["descriptor"]]["name"]].base
        answer = self._client.context.http_client.get(stream[resource["data_key"]].item["links"]["full"])
        if answer.is_error:
            _log.warning(
                "%s: the server cannot read %s (%d): it has the run, but what stands in that file only once it may",
                *(self._uri, resource["uri"], answer.status_code),
            )

    def _leave_out(self, run: "_Run", given: "_Given", why: str) -> None:
        if given.may_be_lost:
            self._dropped(why)
        elif given.name in _OF_FILES:
            _log.warning("%s: the run is kept without its result file: %s", self._uri, why)
            run.has_no_files = True
        else:
            run.is_left, run.failure = True, why
            with self._changed:
                self._failures.append(why)

    def _dropped(self, why: str) -> None:
        """Log the first, second, fourth, ... of events that are not kept."""
        with self._changed:
            self._n_dropped += 1
            if self._n_dropped & (self._n_dropped - 1) == 0:
                _log.warning("%s: left out: %s (%d so far)", self._uri, why, self._n_dropped)

    def _because(self) -> str:
        return f" ({self._complaint})" if self._complaint else ""


@dataclass(slots=True)
class _Given:
    run: str
    name: str
    document: Mapping[str, Any]
    may_be_lost: bool

    def __str__(self) -> str:
        return f"{self.name} of run {self.run}"


@dataclass(slots=True)
class _Run:
    writer: TiledWriter | None = None
    opening: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """What was written that a writer has to know to go on."""
    kept: set[float] = field(default_factory=set)
    """Times of the events that were there when the writer was made."""
    n_events: int = 0
    """Number of the last event that is there."""
    has_looked: bool = False
    """Whether the server can read a file."""
    has_no_files: bool = False
    is_left: bool = False
    """Nothing more is written of it."""
    failure: str = ""
    """Why not."""


def _client(uri: str) -> Any:
    """Return what `tiled.client.from_uri` does, but leave nothing open where that fails."""
    with ExitStack() as stack:
        context, path = Context.from_any_uri(uri)
        stack.enter_context(context)
        client = from_context(context, node_path_parts=path)
        stack.pop_all()
    return client


def _passes(error: Exception, given: _Given) -> bool:
    """Tell whether the server may take it later."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error and given.name not in _OF_FILES
    return isinstance(error, httpx.TransportError | Unanswered)


def _words(error: Exception) -> str:
    return one_line(str(error)) or type(error).__name__
