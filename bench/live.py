"""The live page: how soon a result is on the screen, what a browser costs the server, how much the page weighs.

The browser is Chromium without a window, which draws with the processor, beside the server and the publisher: a screen
of its own is faster. The limit is a bare WebSocket (`websockets`) that sends the same bytes to a page that only looks
at the clock.
"""

import asyncio
import gzip
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
from playwright.sync_api import Browser, Page, sync_playwright
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from bench.measure import Figure, compare
from stream.live.section import pack
from stream.live.web import BOKEH, PAGE
from stream.messages import Result, RunStart
from stream.operators.qmap import ring_map
from stream.operators.roimap import RoiMap
from stream.operators.roimap_file import write
from stream.sinks.zmq import ZmqSink

BINS = 30
DELAYS = 60
PER_SECOND = 5
RESULTS = 60
"""Of one round."""

ROUNDS = 3
CLIENTS = 50
SECONDS = 10.0

_CLOCK = """
(port) => { window.seen = []; const socket = new WebSocket(`ws://127.0.0.1:${port}`); socket.binaryType = "arraybuffer";
socket.onmessage = (event) => seen.push([Number(new DataView(event.data).getFloat64(0)),
performance.timeOrigin + performance.now()]); }
"""


def figures() -> Iterator[Figure]:
    """Publish g2 of 30 bins and 60 delays with its ledger, 5 times a second."""
    roimap = ring_map(
        shape=(512, 512), beam_center_x=256, beam_center_y=256, detector_distance=5, pixel_size=75e-6,
        incident_energy=10, mask=None, n_static=10 * BINS, n_dynamic=BINS,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, _served(roimap, Path(folder)) as (sink, port, server):
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            rounds = [
                (_percentiles(_to_screen(browser, sink, port)), _percentiles(_bare(browser))) for _ in range(ROUNDS)
            ]
            browser.close()
        for which, name in ((0, "median"), (1, "99th percentile")):
            measured = [(ours[which], theirs[which]) for ours, theirs in rounds]
            yield compare(
                f"result to pixel, {name}", "ms", "the same bytes to a page that looks", measured, less_is_better=True
            )
        costs = [(_cost(sink, port, server), _bare_cost()) for _ in range(ROUNDS)]
        yield compare("server CPU per browser", "% of a core", "a bare WebSocket server", costs, less_is_better=True)
    files = [path for path in PAGE.iterdir() if path.suffix in (".js", ".css", ".html", ".svg")]
    bokeh = [BOKEH / "bokeh.min.js", BOKEH / "bokeh-api.min.js"]
    ours, all_of_it = (sum(len(path.read_bytes()) for path in some) / 1e6 for some in (files, files + bokeh))
    yield compare("page weight", "MB", "our part of it", [(all_of_it, ours)], less_is_better=True)
    packed = sum(len(gzip.compress(path.read_bytes())) for path in files + bokeh) / 1e6
    yield compare("page weight, compressed", "MB", "as it is", [(packed, all_of_it)], less_is_better=True)


def _percentiles(milliseconds: list[float]) -> tuple[float, float]:
    return median(milliseconds), quantiles(milliseconds, n=100)[-1]


@contextmanager
def _served(roimap: RoiMap, folder: Path) -> Iterator[tuple[ZmqSink, int, psutil.Process]]:
    write(folder / "qmap.h5", roimap)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ZmqSink("tcp://127.0.0.1:*", pattern="pub") as sink, ExitStack() as stack:
        command = [sys.executable, "-m", "stream", "live", sink.address.replace("tcp", "zmq")]
        server = subprocess.Popen([*command, "--qmap", folder / "qmap.h5", "--at", f"live://127.0.0.1:{port}"])
        stack.callback(server.wait)
        stack.callback(server.terminate)
        _until(lambda: _answers(port))
        sink.write(_START)
        yield sink, port, psutil.Process(server.pid)


_START = RunStart(run="bench", shape=(512, 512), dtype="<u2", frame_time=1e-3, count_time=1e-3, metadata={})


def _until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError("the page is not there")
        time.sleep(0.05)


def _answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


_count = iter(range(1, 1 << 40))


def _publish(sink: ZmqSink) -> int:
    """Publish one result; return its number of frames."""
    n_frames = next(_count)
    tau = 1e-3 * 1.2 ** np.arange(DELAYS)
    rate = np.linspace(0.5, 50, BINS)
    noise = np.random.default_rng(n_frames).normal(0, 1e-3, (DELAYS, BINS))
    multitau = {
        "tau": tau,
        "g2": 1 + 0.2 * np.exp(-2 * tau[:, None] * rate) + noise,
        "g2_err": np.full((DELAYS, BINS), 1e-3),
        "n_pairs": np.full(DELAYS, 1e4),
    }
    ledger = {name: np.array(n_frames) for name in ("sent", "received")}
    ledger |= {name: np.array(0) for name in ("lost", "late", "duplicate", "undecodable", "stray")}
    ledger |= {"lost_spans": np.empty((0, 2), np.int64), "lag": np.array(0.0)}
    for name, arrays in (("multitau", multitau), ("ledger", ledger)):
        sink.write(Result(run="bench", operator=name, n_frames=n_frames, final=False, arrays=arrays))
    return n_frames


def _to_screen(browser: Browser, sink: ZmqSink, port: int) -> list[float]:
    """Return the milliseconds from `write` to the screen, of results that were drawn."""
    page = browser.new_page(viewport={"width": 1920, "height": 1080})
    page.goto(f"http://127.0.0.1:{port}/")
    _until(lambda: bool(page.evaluate("xpcs.state.here")))
    written: dict[int, float] = {}
    for _ in range(RESULTS):
        written[_publish(sink)] = time.time()
        page.wait_for_timeout(1000 / PER_SECOND)
    drawn = dict(page.evaluate("[...xpcs.drawn].reverse()"))
    page.close()
    return [drawn[n_frames] - 1e3 * at for n_frames, at in written.items() if n_frames in drawn]


def _message() -> bytes:
    curves = {name: np.zeros((DELAYS, BINS)) for name in ("g2", "g2_err")} | {"tau": np.zeros(DELAYS)}
    return pack("g2", {"n_frames": 0}, curves)


@contextmanager
def _bare_server() -> Iterator[int]:
    """Send every 1/5 s when it was sent, and as many bytes as a result has."""
    loop = asyncio.new_event_loop()
    padding = _message()
    ports: list[int] = []
    ready = threading.Event()

    async def send(connection: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            while True:
                at = np.array([1e3 * time.time()], ">f8").tobytes()
                await connection.send(at + padding)
                await asyncio.sleep(1 / PER_SECOND)

    async def run() -> None:
        async with serve(send, "127.0.0.1", 0, compression=None) as server:
            ports.append(next(iter(server.sockets)).getsockname()[1])
            ready.set()
            await asyncio.Future()

    def main() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(run())
        stops.append(lambda: loop.call_soon_threadsafe(task.cancel))
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            loop.close()

    stops: list[Callable[[], Any]] = []
    thread = threading.Thread(target=main)
    thread.start()
    ready.wait(20)
    try:
        yield ports[0]
    finally:
        stops[0]()
        thread.join()


def _bare(browser: Browser) -> list[float]:
    page: Page = browser.new_page()
    with _bare_server() as port:
        page.evaluate(_CLOCK, port)
        page.wait_for_timeout(1000 * RESULTS / PER_SECOND)
        seen = page.evaluate("seen")
        page.close()
    return [arrived - sent for sent, arrived in seen]


def _clients(port: int, path: str) -> Callable[[], None]:
    """Connect clients that read, in a process of their own; return what ends them."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.live", f"ws://127.0.0.1:{port}{path}"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None  # noqa: S101 - for the type checker
    process.stdout.readline()

    def end() -> None:
        process.terminate()
        process.wait()

    return end


def _busy(process: psutil.Process, work: Callable[[], object]) -> float:
    """Return the share of a core (%) that a process takes while `work` is done, 5 times a second."""
    before, begin = sum(process.cpu_times()[:2]), time.perf_counter()
    while time.perf_counter() < begin + SECONDS:
        work()
        time.sleep(1 / PER_SECOND)
    return float(100 * (sum(process.cpu_times()[:2]) - before) / (time.perf_counter() - begin))


def _cost(sink: ZmqSink, port: int, server: psutil.Process) -> float:
    """Return what one browser more costs the server: that of 50, less that of none, by 50."""
    alone = _busy(server, lambda: _publish(sink))
    end = _clients(port, "/live")
    together = _busy(server, lambda: _publish(sink))
    end()
    return (together - alone) / CLIENTS


def _bare_cost() -> float:
    process = psutil.Process()
    with _bare_server() as port:
        end = _clients(port, "")
        share = _busy(process, lambda: None)
        end()
    return share / CLIENTS


def _read(url: str) -> None:
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(url, max_size=None, compression=None)) for _ in range(CLIENTS)]

        def listen(each: Any) -> None:
            for _ in each:
                pass

        threads = [threading.Thread(target=listen, args=(each,), daemon=True) for each in sockets]
        for thread in threads:
            thread.start()
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    _read(sys.argv[1])
