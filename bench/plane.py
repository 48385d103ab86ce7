"""Frames through gateway, workers and merger into one merged g2; `bench.kafka` and `bench.zmq` say through what.

Gateway and merger are in this process, two workers in others, all on the cores of one machine, as they would not be at
a beamline: look at the ratios. What a long run takes of memory is that of gateway, worker and merger in processes of
their own.
"""

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bench.data import Shape, poisson, rings
from bench.measure import Figure, asked_for, compare
from stream.ingest.zmq import ZmqResults
from stream.merger import Merger
from stream.messages import FrameBatch, Message, Position, Result, RunStart, RunStop
from stream.operators.intensity import Intensity
from stream.operators.multitau import MultiTau
from stream.operators.scattering import Scattering
from stream.plane import Plane, send
from stream.protocols import Operator
from stream.regions import Regions
from stream.sinks.zmq import ZmqSink

SHAPE: Shape = (512, 512)
REGIONS = 4
WORKERS = 2
BATCH = 16
FRAMES = 4096
PACED_FRAMES = 1000
PACE = 0.01
"""Seconds between the frames of the latency run: about half of the maximal rate."""
PUBLISH_EVERY = 1.0
"""Seconds between results, by the frames' own time, as a worker has it if it is not told ..."""
OFTEN = 0.1
"""... and where it matters how late they are."""
ROUNDS = 3
STREAM = ("-m", "stream")
RING_BYTES = 10**9

SMALL: Shape = (32, 32)
SMALL_REGIONS = 2
SMALL_RING = "0.02"
"""GB: full long before the first look at what is taken of memory."""
AHEAD = 2**14
"""Frames that are sent before their result is waited for: what waits in queues is not what is asked for."""
EARLY, LATE = 12 * AHEAD, 64 * AHEAD
"""The most memory until the first is held against the most from there to the second."""
MAY_GROW = 1.1, 20.0
"""By this ratio or by so many MB, whatever is more."""


class Beamline:
    """Gateway, workers and merger.

    Parameters
    ----------
    folder
        Where to write.
    new
        Makes another plane of the kind: its address, and itself.
    """

    def __init__(self, folder: Path, new: Callable[[], tuple[str, Plane]]) -> None:
        self._folder = folder
        self._new = new
        self._roimap = rings(SHAPE)
        self._qmap = qmap(folder, SHAPE)

    def figures(self, name: str, bare: Callable[[int], float], *, failover: float) -> Iterator[Figure]:
        """Send uint16 frames (mean 1 count) of 512 x 512 pixels in 4 regions to 2 workers; then 100 frames per second.

        Parameters
        ----------
        name
            Of what is between them.
        bare
            Returns the seconds that so many frames take through its bare client.
        failover
            Seconds in which the regions of a dead worker should be served again.
        """
        self.through(BATCH, BATCH, 0, PUBLISH_EVERY)  # compilers, and the broker's own warm-up
        rounds = [(self.through(FRAMES, BATCH, 0, PUBLISH_EVERY)[0], bare(FRAMES)) for _ in range(ROUNDS)]
        against = "the same bytes through the bare client"
        rates = [(FRAMES / ours, FRAMES / theirs) for ours, theirs in rounds]
        yield compare(f"frames through {name} into g2", "frames/s", against, rates, target=0.8)
        gigabytes = [tuple(rate * 2 * SHAPE[0] * SHAPE[1] / 1e9 for rate in pair) for pair in rates]
        yield compare(f"frames through {name} into g2", "GB/s", against, [(a, b) for a, b in gigabytes], target=0.8)
        against = "the same frames in memory, one process"
        alone = [(ours, FRAMES / self._alone(FRAMES)) for ours, _ in rates]
        yield compare(f"frames through {name} into g2", "frames/s", against, alone)
        late = [quantiles(self.through(PACED_FRAMES, 1, PACE, OFTEN)[1], n=100) for _ in range(ROUNDS)]
        for which, what in ((49, "median"), (98, "99th percentile")):
            seconds = [cuts[which] for cuts in late]
            yield asked_for(f"frame sent to g2 merged, {what}", "s", seconds, 1.0, less_is_better=True)
        gaps = [self.failover() for _ in range(ROUNDS)]
        yield asked_for("worker killed to its regions served", "s", gaps, failover, less_is_better=True)
        for process, (before, after) in self._resident().items():
            ratio, more = MAY_GROW
            figure, against = f"{process}: memory, {LATE:,} frames", f"itself, first {EARLY:,} frames"
            target = round(max(ratio, 1 + more / before), 2)
            yield compare(figure, "MB", against, [(after, before)], target=target, less_is_better=True)

    def through(self, n: int, batch: int, pace: float, publish_every: float) -> tuple[float, list[float]]:
        """Return the seconds from the first frame to the last result, and from each frame to the result of it."""
        address, plane = self._new()
        sent: dict[int, float] = {}
        late: list[float] = []
        source = _Frames(poisson(SHAPE, batch, 1), n, pace, lambda each: sent.update({each.first + batch: time.time()}))
        stop = threading.Event()
        sink = plane.gateway(REGIONS, ring_bytes=RING_BYTES, waits=True, stop=stop)
        with ExitStack() as stack:
            for share in (REGIONS, REGIONS // WORKERS):
                until_said(stack.enter_context(self._worker(address, publish_every)), "begins here", share)
            stack.enter_context(sink)
            results = stack.enter_context(plane.results())
            sender = threading.Thread(target=send, args=(source, [sink], Regions(REGIONS), stop))
            begin = time.perf_counter()
            sender.start()
            due = begin
            merger = Merger(self._operators)
            for message in results:
                outputs = list(merger.take(message)) if isinstance(message, RunStart | Result | RunStop) else []
                if time.perf_counter() >= due:
                    outputs += merger.interim()
                    due = time.perf_counter() + publish_every
                g2 = [each.n_frames for each in outputs if isinstance(each, Result) and each.operator == "multitau"]
                late += [time.time() - sent.pop(n_frames) for n_frames in g2 if n_frames in sent]
                if any(isinstance(output, RunStop) for output in outputs):
                    break
            took = time.perf_counter() - begin
            results.acknowledge(results.position())
            sender.join()
            return took, late

    def failover(self, *program: str) -> float:
        """Return the seconds from the kill of one of two workers, of this program, until the other has its regions."""
        address, plane = self._new()
        sink = plane.gateway(REGIONS, ring_bytes=RING_BYTES, waits=True, stop=threading.Event())
        with sink, self._worker(address, PUBLISH_EVERY, *program) as first:
            until_said(first, "begins here", REGIONS)
            with self._worker(address, PUBLISH_EVERY, *program) as second:
                until_said(second, "begins here", REGIONS // 2)
                first.kill()
                begin = time.perf_counter()
                until_said(second, "begins here", REGIONS // 2)
                return time.perf_counter() - begin

    @contextmanager
    def _worker(self, address: str, publish_every: float, *program: str) -> Iterator["subprocess.Popen[str]"]:
        command = ("-v", "worker", "--source", address, "--qmap", self._qmap, "--threads", "1")
        options = ("--checkpoints", self._folder / "checkpoints", "--publish-every", f"{publish_every} s")
        with started(*(program or STREAM), *command, *options) as process:
            until_said(process, "taking regions", 1)
            yield process

    def _alone(self, n: int) -> float:
        """Return the seconds from the first frame to g2 where nothing is sent anywhere."""
        source = _Frames(poisson(SHAPE, BATCH, 1), n, 0, lambda _: None)
        begin = time.perf_counter()
        operators: list[Operator] = []
        for message in source:
            match message:
                case RunStart():
                    operators = self._operators(message, WORKERS)
                case FrameBatch():
                    for operator in operators:
                        operator.push(message)
        for operator in operators:
            operator.result()
        return time.perf_counter() - begin

    def _operators(self, start: RunStart, threads: int = 1) -> list[Operator]:
        roimap = self._roimap
        return [
            MultiTau(start, roimap, threads=threads),
            Scattering(start, roimap, threads=threads),
            Intensity(start, roimap, threads=threads),
        ]

    def _resident(self) -> dict[str, tuple[float, float]]:
        """Return the MB that gateway, worker and merger have at most until `EARLY`, and after it until `LATE`."""
        address, _ = self._new()
        small = qmap(self._folder, SMALL)
        frames = poisson(SMALL, BATCH, 1).astype("u1")
        resident: list[list[float]] = []
        with ExitStack() as stack:
            detector = stack.enter_context(ZmqSink("tcp://127.0.0.1:*", pattern="push"))
            display = ZmqSink("tcp://127.0.0.1:*", pattern="pub")
            display.__exit__(None, None, None)  # its port is free again, and nobody else's so soon
            taking = ("--source", detector.address.replace("tcp", "zmq"), "--regions", str(SMALL_REGIONS))
            serving = ("--checkpoints", self._folder / "small", "--checkpoint-every", "2 s", "--threads", "1")
            often = ("--publish-every", f"{OFTEN} s")
            shown = display.address.replace("tcp", "zmq")
            commands: dict[str, tuple[str | Path, ...]] = {
                "gateway": ("--to", address, *taking, "--keep", SMALL_RING),
                "worker": ("--source", address, "--qmap", small, *often, *serving),
                "merge": ("--source", address, "--qmap", small, "--publish", shown, "--quiet", *often),
            }
            processes = [stack.enter_context(started(*STREAM, name, *options)) for name, options in commands.items()]
            results = iter(stack.enter_context(ZmqResults(display.address)))
            detector.write(RunStart(run="small", shape=SMALL, dtype="|u1", frame_time=1e-4, count_time=1e-4))
            for first in range(0, LATE, BATCH):
                detector.write(FrameBatch(run="small", first=first, frames=frames, timestamp_ns=time.time_ns()))
                sent = first + BATCH
                if sent % AHEAD == 0:
                    while not (isinstance(each := next(results), Result) and each.n_frames == sent):
                        if any(process.poll() is not None for process in processes):
                            raise RuntimeError(f"one of {', '.join(commands)} ended after {sent} frames or before")
                    resident.append([_megabytes(process) for process in processes])
        n = EARLY // AHEAD
        series = zip(commands, zip(*resident, strict=True), strict=True)
        return {name: (max(each[:n]), max(each[n:])) for name, each in series}


def qmap(folder: Path, shape: Shape) -> Path:
    """Write a map, that of `bench.data.rings`, by the command for it."""
    rows, columns = shape
    path = folder / f"qmap-{rows}x{columns}.h5"
    center = ("--beam-center-x", str(columns / 2), "--beam-center-y", str(rows / 2))
    geometry = ("--detector-distance", "5 m", "--pixel-size", "75 um", "--incident-energy", "10 keV")
    bins = ("--n-static", "320", "--n-dynamic", "8")
    command = ("qmap", "--shape", f"{rows}x{columns}", *center, *geometry, *bins, "--out", path)
    subprocess.run([sys.executable, *STREAM, *command], check=True, stdout=subprocess.DEVNULL)
    return path


class _Frames:
    """One run, in batches, as a `stream.protocols.Source`."""

    def __init__(self, frames: NDArray[np.uint16], n: int, pace: float, sent: Callable[[FrameBatch], None]) -> None:
        self._frames, self._n, self._pace, self._sent = frames, n, pace, sent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Message | None]:
        waiting, begin = threading.Event(), time.perf_counter()
        yield RunStart(
            run="bench", shape=SHAPE, dtype="<u2", saturation_value=65534,
            frame_time=self._pace or 1e-3, count_time=1e-3,
        )  # fmt: skip
        size = len(self._frames)
        for first in range(0, self._n, size):
            waiting.wait(max(0.0, begin + first * self._pace - time.perf_counter()))
            batch = FrameBatch(run="bench", first=first, frames=self._frames, timestamp_ns=time.time_ns())
            self._sent(batch)
            yield batch
        yield RunStop(run="bench", n_frames=self._n, exit_status="success")

    def position(self) -> Position:
        return {}

    def seek(self, position: Position) -> None:
        pass


def _megabytes(process: "subprocess.Popen[str]") -> float:
    """Return what a process has in memory; see proc(5)."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@contextmanager
def started(*command: str | Path) -> Iterator["subprocess.Popen[str]"]:
    """Start a program of Python in a process of its own, which does not outlive the block."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until_said(process: "subprocess.Popen[str]", words: str, times: int) -> None:
    """Return once a process has said something so many times."""
    assert process.stderr is not None  # noqa: S101 - for the type checker
    while times:
        line = process.stderr.readline()
        if not line:
            raise RuntimeError(f"{process.args!r} ended before it said {words!r}")
        times -= words in line
