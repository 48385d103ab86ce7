"""Nodes from a real Slurm: from the start of a run to its first frame correlated, and until a lost node is replaced.

Slurm runs on this machine, as in the tests, whose it is, and so do workers and all else: on two cores a worker that
starts waits for everybody. The scheduler's own time is that from sbatch to the first line of a job that does nothing
else, taken in turn.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Any

import zmq

from bench.data import Shape, poisson
from bench.measure import Figure, asked_for, compare
from bench.plane import qmap
from hpc_bridge.control import NoManager, ask
from stream.errors import SinkError
from stream.messages import FrameBatch, Result, RunStart, RunStop
from stream.protocols import Sink
from stream.sinks.bluesky_zmq import ZmqDocuments
from stream.zmq_plane import ZmqPlane
from tests.bridge import Bridge, worker
from tests.kafka import free_ports
from tests.slurm import Slurm, started

SHAPE: Shape = (64, 64)
RING_BYTES = 10**7
BATCH, FRAME_TIME = 4, 0.01
COLD, WARM, REPLACED = 5, 15, 4
DEADLINE = 120.0
LOOK = 0.02
"""Between looks at what the manager says (s)."""

WARM_TARGET, MORE_COLD, MORE_PREEMPTED, DEAD = 0.5, 1.0, 2.0, 30.0


def figures() -> Iterator[Figure]:
    """Take turns with the bare scheduler."""
    with started() as slurm, TemporaryDirectory(prefix="xpcs-bench-") as folder:
        beamline = _Beamline(slurm, Path(folder))
        _bare(slurm)
        cold = beamline.from_run_start(COLD, idle_nodes=0)
        yield compare("run start to first frame correlated, cold", "s", "sbatch to the first line of a job", cold)
        more = [ours - theirs for ours, theirs in cold]
        yield asked_for("the same beyond the scheduler's own time", "s", more, MORE_COLD, less_is_better=True)
        warm = [ours for ours, _ in beamline.from_run_start(WARM, idle_nodes=1)]
        yield asked_for("run start to first frame correlated, warm", "s", warm, WARM_TARGET, less_is_better=True)
        late = quantiles(warm, n=100, method="inclusive")[98]
        yield asked_for("the same, 99th percentile", "s", [late], WARM_TARGET, less_is_better=True)
        taken = beamline.until_replaced(REPLACED, _preempt)
        more = [ours - theirs for ours, theirs in taken]
        yield asked_for("preempted node to its successor serving", "s", more, MORE_PREEMPTED, less_is_better=True)
        dead = [ours for ours, _ in beamline.until_replaced(REPLACED, _lose)]
        yield asked_for("node lost to its successor serving", "s", dead, DEAD, less_is_better=True)


def _bare(slurm: Slurm) -> float:
    """Return the seconds from sbatch to the first line of its job."""
    file = slurm.work / uuid.uuid4().hex
    begin = time.time()
    slurm.sbatch("-p", "preemptable", script=f"date +%s.%N > {file}.new; mv {file}.new {file}")
    _until(file.exists)
    return float(file.read_text()) - begin


def _preempt(slurm: Slurm, job: str) -> Callable[[], object]:
    node = slurm.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    demand = slurm.sbatch("-p", "demand", "--exclusive", "-w", node)
    return lambda: slurm.run("scancel", demand)


def _lose(slurm: Slurm, job: str) -> Callable[[], object]:
    node = slurm.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    slurm.lose_node(node)
    return lambda: slurm.start_node(node)


class _Beamline:
    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self._slurm, self._folder = slurm, folder
        self._qmap = qmap(folder, SHAPE)

    def from_run_start(self, n: int, *, idle_nodes: int) -> list[tuple[float, float]]:
        """Return seconds from a run's start to its first result, and the scheduler's own."""
        hub, into, out = (f"tcp://127.0.0.1:{port}" for port in free_ports(3))
        plane = ZmqPlane(hub, "bench")
        stop = threading.Event()
        found = []
        with ExitStack() as stack:
            stack.enter_context(_proxy(into, out))
            bridge = stack.enter_context(closing(self._bridge(hub, idle_nodes=idle_nodes, out=out)))
            documents = stack.enter_context(ZmqDocuments(into))
            bridge.up()
            stack.enter_context(suppress(SinkError))  # what no node has safe at the end is let go
            sink = stack.enter_context(plane.gateway(1, ring_bytes=RING_BYTES, waits=False, stop=stop))
            partials = stack.enter_context(plane.results())
            results = iter(partials)
            for _ in range(n + 1):
                run = uuid.uuid4().hex
                _until(lambda: len(_pilots(bridge)) == idle_nodes and len(_pilots(bridge, "serving")) == idle_nodes)
                theirs = _bare(self._slurm)
                begin = time.perf_counter()
                documents.publish(run, "start", {"uid": run}, may_be_lost=False)
                with _measuring(sink, run):
                    while not (isinstance(each := next(results), Result) and each.run == run):
                        pass
                    found.append((time.perf_counter() - begin, theirs))
                while not (isinstance(each := next(results), RunStop) and each.run == run):
                    pass
                partials.acknowledge(partials.position())
                documents.publish(run, "stop", {"run_start": run}, may_be_lost=False)
            stop.set()
        return found[1:]  # the first one of each compiles, and finds cold disks

    def until_replaced(self, n: int, lose: Callable[[Slurm, str], Callable[[], object]]) -> list[tuple[float, float]]:
        """Return seconds from the loss of a node to its successor serving, and the scheduler's own."""
        [port] = free_ports(1)
        hub = f"tcp://127.0.0.1:{port}"
        found = []
        with ExitStack() as stack:
            stack.enter_context(suppress(SinkError))
            gateway = ZmqPlane(hub, "bench").gateway(1, ring_bytes=RING_BYTES, waits=False, stop=threading.Event())
            stack.enter_context(gateway)
            bridge = stack.enter_context(closing(self._bridge(hub)))
            bridge.up()
            for _ in range(n):
                _until(lambda: len(_pilots(bridge, "serving")) == 1)
                theirs = _bare(self._slurm)
                [before] = _pilots(bridge, "serving")
                begin = time.perf_counter()
                give_back = lose(self._slurm, before["job"])
                _until(partial(_has_another, bridge, before["lease"]))
                found.append((time.perf_counter() - begin, theirs))
                give_back()
        return found

    def _bridge(self, hub: str, *, idle_nodes: int = 0, out: str | None = None) -> Bridge:
        folder = self._folder / uuid.uuid4().hex[:8]
        folder.mkdir()
        command = worker(f"{hub.replace('tcp', 'zmq')}/bench", self._qmap, folder)
        runs = {} if out is None else {"run_engine": out.replace("tcp", "zmq+bluesky")}
        return Bridge(
            folder, command, scheduler="slurm", through=self._slurm.through,
            nodes=1, idle_nodes=idle_nodes, max_nodes=2, linger="1 s", lost_after="3 s", **runs,
        )  # fmt: skip


@contextmanager
def _measuring(sink: Sink, run: str) -> Iterator[None]:
    """Send frames of a run, in batches as fast as they are measured, until the block is left."""
    stop = threading.Event()
    sender = threading.Thread(target=_send, args=(sink, run, stop))
    sender.start()
    yield
    stop.set()
    sender.join()


def _send(sink: Sink, run: str, stop: threading.Event) -> None:
    frames = poisson(SHAPE, BATCH, 1)
    sink.write(RunStart(run=run, shape=SHAPE, dtype="<u2", frame_time=FRAME_TIME, count_time=FRAME_TIME))
    first = 0
    while not stop.wait(BATCH * FRAME_TIME):
        sink.write(FrameBatch(run=run, first=first, frames=frames, timestamp_ns=time.time_ns()))
        first += BATCH
    sink.write(RunStop(run=run, n_frames=first, exit_status="success"))


def _pilots(bridge: Bridge, state: str | None = None) -> list[dict[str, Any]]:
    try:
        pilots = ask(bridge.state, {"do": "status"})["beamlines"][bridge.name]["pilots"]
    except NoManager:
        return []
    return [pilot for pilot in pilots if state in (None, pilot["state"])]


def _has_another(bridge: Bridge, lease: str) -> bool:
    return any(pilot["lease"] != lease for pilot in _pilots(bridge, "serving"))


def _until(is_so: Callable[[], bool]) -> None:
    end, waiting = time.monotonic() + DEADLINE, threading.Event()
    while not is_so():
        if time.monotonic() > end:
            raise RuntimeError(f"not within {DEADLINE:g} s")
        waiting.wait(LOOK)


class _proxy:  # noqa: N801 - a context manager, used as a function
    """What bluesky's Proxy is: documents that come in go out to whoever subscribed."""

    def __init__(self, into: str, out: str) -> None:
        self._addresses = into, out
        self._context = zmq.Context()

    def __enter__(self) -> None:
        into, out = self._context.socket(zmq.XSUB), self._context.socket(zmq.XPUB)
        for socket, address in zip((into, out), self._addresses, strict=True):
            socket.linger = 0
            socket.bind(address)
        threading.Thread(target=self._run, args=(into, out), daemon=True).start()

    def _run(self, *sockets: "zmq.Socket[bytes]") -> None:
        with suppress(zmq.ContextTerminated):
            zmq.proxy(*sockets)
        for socket in sockets:
            socket.close()

    def __exit__(self, *_: object) -> None:
        self._context.term()
