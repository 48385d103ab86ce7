"""The newest of every section, and the browsers that want it."""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from stream.live.section import Section

MOST_CLIENTS = 256

PATIENCE = 10.0
"""Seconds in which a browser must take a section; then its connection is cut, and it may come again."""


SECTIONS = (
    *("run", "regions", "map", "g2", "fit", "segments", "history"),
    *("scattering", "intensity", "image", "twotime"),
)
"""As they are sent, where several are new."""


class Hub:
    """Newest wins: a browser that is slow is given fewer versions, and nothing is kept for it.

    All methods but `publish` are for the event loop.

    Parameters
    ----------
    on_served
        Is told how long ago the newest frame in a section had ended when a browser had it (s).
    """

    def __init__(self, on_served: Callable[[float], None]) -> None:
        self._on_served = on_served
        self._loop: asyncio.AbstractEventLoop | None = None
        self._newest: dict[str, Section] = {}
        self._waiting: set[asyncio.Event] = set()
        self._version = 0

    def open(self) -> None:
        """Take sections from now on in the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._wake()

    def publish(self, name: str, packed: bytes, frame_end: float | None) -> None:
        """Take a section, from one thread at a time or several; see `stream.live.view.Publish`."""
        if self._loop is None:
            self._take(name, packed, frame_end)
        else:
            with suppress(RuntimeError):  # it is closed: nobody is served any more
                self._loop.call_soon_threadsafe(self._take, name, packed, frame_end)

    def _take(self, name: str, packed: bytes, frame_end: float | None) -> None:
        self._version += 1
        if packed:
            self._newest[name] = Section(name, self._version, packed, frame_end)
        else:
            self._newest.pop(name, None)
        self._wake()

    def _wake(self) -> None:
        for event in self._waiting:
            event.set()

    @property
    def n_clients(self) -> int:
        """Browsers that are connected."""
        return len(self._waiting)

    async def serve(self, socket: WebSocket) -> None:
        """Give a browser what is new until it is gone. What it says is not read: it has nothing to say."""
        if self.n_clients >= MOST_CLIENTS:
            await socket.close(1013, "too many browsers")
            return
        await socket.accept()
        changed = asyncio.Event()
        changed.set()
        self._waiting.add(changed)
        sending = asyncio.create_task(self._send(socket, changed))
        hearing = asyncio.create_task(_gone(socket))
        try:
            await asyncio.wait([sending, hearing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting.discard(changed)
            for task in (sending, hearing):
                task.cancel()
            await asyncio.gather(sending, hearing, return_exceptions=True)

    async def _send(self, socket: WebSocket, changed: asyncio.Event) -> None:
        has = dict.fromkeys(self._newest, 0)
        while True:
            await changed.wait()
            changed.clear()
            for section in self._newer(has):
                has[section.name] = section.version
                async with asyncio.timeout(PATIENCE):
                    await socket.send_bytes(section.packed)
                if section.frame_end is not None:
                    self._on_served(time.monotonic() - section.frame_end)

    def _newer(self, has: dict[str, int]) -> Iterable[Section]:
        # Looked up one by one, since there may be newer ones once one was sent.
        for name in SECTIONS:
            section = self._newest.get(name)
            if section is not None and section.version > has.get(name, 0):
                yield section


async def _gone(socket: WebSocket) -> None:
    """Return once the browser is gone, or says something, which it has no reason to."""
    message = await socket.receive()
    if message["type"] != "websocket.disconnect":
        await socket.close(1008, "nothing is read here")
        raise WebSocketDisconnect
