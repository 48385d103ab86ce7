"""The process that serves the page."""

import asyncio
import logging
import resource
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from stream.live.calculation import Calculation
from stream.live.hub import Hub
from stream.live.metrics import Metrics
from stream.live.past import read_back
from stream.live.view import UNFIT, View
from stream.live.web import application
from stream.messages import Rejected, Result, RunStart, RunStop
from stream.operators.roimap import RoiMap

_log = logging.getLogger(__name__)

FIRST_REQUEST = 5.0
"""Seconds in which whoever connects must have asked for something."""

MOST_CONNECTIONS = 4096

_ROOM = 256
"""Files that this process has open besides connections."""


class Results(Protocol):
    """Where results come from: a `stream.ingest.zmq.ZmqResults`."""

    def __iter__(self) -> Iterator[RunStart | RunStop | Result | Rejected | None]:
        """Yield what comes, None when nothing does."""


class _Connection(H11Protocol):
    """One that asks for nothing is cut off: thousands of them would leave no room for others."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self.loop.call_later(FIRST_REQUEST, self._cut_off)

    def _cut_off(self) -> None:
        if self in self.connections and self.cycle is None:
            self.transport.abort()


class Server:
    """Serves the page until `stop` is set.

    Parameters
    ----------
    listening
        A bound socket.
    results
        Open; the caller closes it once we have ended.
    roimap
        The map of the results.
    source
        Where results come from, as the page says it.
    token
        See `stream.live.web.application`.
    files
        Where result files of earlier runs are, see `stream.live.past`.
    """

    def __init__(
        self,
        listening: socket.socket,
        results: Results,
        *,
        roimap: RoiMap | None,
        source: str,
        token: str | None,
        stop: threading.Event,
        files: Path | None = None,
    ) -> None:
        self._listening = listening
        self._files = files
        self._results = results
        self._stop = stop
        self._metrics = Metrics()
        self._hub = Hub(self._metrics.served)
        self._view = View(roimap, source=source, publish=self._hub.publish)
        self._calculation = Calculation(self._view)
        local = listening.getsockname()[0] in ("127.0.0.1", "::1")
        config = uvicorn.Config(
            application(self._view, self._hub, self._metrics, token=token, local=local),
            http=_Connection,
            ws="websockets-sansio",
            ws_max_size=4096,  # nothing is expected from browsers
            ws_ping_interval=10.0,
            ws_ping_timeout=10.0,
            ws_per_message_deflate=False,  # numbers that are noise, on a network that is fast
            h11_max_incomplete_event_size=16384,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=1,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        self._server = _Uvicorn(config, stop)

    def run(self) -> None:
        """Serve.

        Raises
        ------
        SourceError
            Nothing can be heard any more.
        """
        _raise_limit()
        # It warns of every browser that leaves while it is sent something.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        asyncio.run(self._run())

    async def _run(self) -> None:
        self._hub.open()
        threads = ThreadPoolExecutor(2, "live")
        working = [threads.submit(work) for work in (self._hear, self._calculation.run)]
        for work in working:  # the page is nothing without either
            work.add_done_callback(lambda _: self._stop.set())
        if self._files is not None:
            # Files may lie where nothing answers: it is not waited for.
            read = threading.Thread(target=read_back, args=(self._files, self._view.remember, self._stop), daemon=True)
            read.start()
        try:
            await self._server.serve(sockets=[self._listening])
        finally:
            self._stop.set()
            self._calculation.close()
            await asyncio.to_thread(threads.shutdown)
        for work in working:
            work.result()

    def _hear(self) -> None:
        """Take results, faster than they come: what takes its time is done elsewhere."""
        for message in self._results:
            if self._stop.is_set():
                return
            self._take(message)

    def _take(self, message: RunStart | RunStop | Result | Rejected | None) -> None:
        view = self._view
        match message:
            case None:
                view.keep_time()
                return
            case Rejected():
                self._reject(message.reason)
                return
        try:
            view.take(message)
        except UNFIT as error:
            what = message.operator if isinstance(message, Result) else type(message).__name__
            self._reject(f"{what} of run {message.run}: {error!r}")
            return
        if isinstance(message, Result) and message.operator in ("multitau", "scattering", "twotime"):
            self._calculation.put(view.key, message)
        if not isinstance(message, Result) or message.operator == "ledger":
            self._metrics.count(view.state()[0])

    def _reject(self, reason: str) -> None:
        _log.warning("rejected: %s", reason)
        self._metrics.reject()
        self._view.reject()


class _Uvicorn(uvicorn.Server):
    """Ends once an event is set; signals are heard by whoever sets it."""

    def __init__(self, config: uvicorn.Config, stop: threading.Event) -> None:
        super().__init__(config)
        self._stop = stop

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; asked ten times a second."""
        return self._stop.is_set() or await super().on_tick(counter)

    def capture_signals(self) -> Any:
        """Leave signals alone."""
        return nullcontext()


def _raise_limit() -> None:
    """Let this process have as many connections as it takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _ROOM
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
