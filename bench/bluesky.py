"""Bluesky's documents in and out: how many per second, and how long after a raw event its g2 is out.

All through a real Kafka broker, beside bluesky_kafka's own Publisher and RemoteDispatcher, which only carry documents.
What comes in is a fly scan: 30 000 events of eight numbers, and one stream_datum of a detector that writes a file.

in
    From the first document that Kafka gives until the run is over: decoded and checked, put in order, its few frames
    read, its end counted. Against a RemoteDispatcher that hands them to a callback which does nothing; it believes
    what comes, while ours checks every value. Nothing is promised: run engines tell hundreds of events per second.
out
    Events as ours are (4 bins, 40 delays), from the first one handed over until Kafka has them and the stop. Against a
    Publisher that flushes at the stop, both idempotent; ours checks here, too.
delay
    From a raw event, one per second, until a consumer has the first derived event with its frames: Kafka, the file,
    `xpcs-stream run` as it is by default, Kafka. It publishes once a second, whenever events come: that is up to one
    second, half a one on average. All the rest may take half a second; so 1.5 s are asked for. Beside it, how long
    the same raw event takes to a RemoteDispatcher.
"""

import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np

from bench.data import poisson, rings
from bench.measure import Figure, asked_for, compare, pairs
from stream.broker import Broker
from stream.ingest import bluesky_kafka as ingest
from stream.ingest.bluesky_files import BlueskyFiles
from stream.ingest.bluesky_messages import Document
from stream.ingest.bluesky_roots import Roots
from stream.kafka import create_topic
from stream.messages import Rejected, RunStop
from stream.operators import roimap_file
from stream.sinks import bluesky_kafka as sinks

try:
    from bluesky_kafka import Publisher, RemoteDispatcher  # type: ignore[import-untyped]
except ImportError as error:
    raise SystemExit(f"bench bluesky needs bluesky-kafka, which is in the extra test: {error}") from None

PORT = 29292
EVENTS_IN = 30_000
EVENTS_OUT = 5000
ROUNDS = 5
POINTS = 10
"""Of the delay run, one per `PACE` seconds."""
PACE = 1.0
LATE = 1.5
DELAY_ROUNDS = 3
SHAPE = (64, 128)
PER_POINT = 100
"""Frames."""
DEADLINE = 60.0

Named = tuple[str, dict[str, Any]]


def figures() -> Iterator[Figure]:
    """Measure what is told above."""
    with tempfile.TemporaryDirectory() as folder, Broker(Path(folder) / "kafka", port=PORT) as broker:
        yield rate_in(broker.bootstrap, Path(folder), EVENTS_IN, ROUNDS)
        yield rate_out(broker.bootstrap, EVENTS_OUT, ROUNDS)
        yield from delay(broker.bootstrap, Path(folder), POINTS, PACE, DELAY_ROUNDS)


def rate_in(bootstrap: str, folder: Path, n: int, rounds: int) -> Figure:
    """Receive one run from Kafka again and again."""
    topic = _new_topic(bootstrap)
    run = _Run(_file(folder, 1), 1)
    documents = [*run.opening(), run.frames(0), *(run.monitored(i) for i in range(n)), run.stop(1)]
    publisher = _publisher(bootstrap, topic)
    for each in documents:
        publisher(*each)

    def ours() -> float:
        with _Tapped(bootstrap, topic) as came, BlueskyFiles(came, Roots({str(folder): folder})) as source:
            for message in source:
                assert not isinstance(message, Rejected), message.reason  # noqa: S101 - nothing is measured then
                if isinstance(message, RunStop):
                    break
            return len(documents) / (time.perf_counter() - came.began)

    def theirs() -> float:
        times: list[float] = []
        with _dispatched(bootstrap, topic, lambda *_: times.append(time.perf_counter())):
            _until(lambda: len(times) == len(documents))
        return len(documents) / (times[-1] - times[0])

    measured = pairs(ours, theirs, rounds)
    return compare("documents from Kafka into runs", "documents/s", "RemoteDispatcher alone", measured)


def rate_out(bootstrap: str, n: int, rounds: int) -> Figure:
    """Send one run to Kafka again and again."""
    arrays = {"xpcs_g2": (4, 40), "xpcs_g2_err": (4, 40), "xpcs_n_pairs": (40,), "xpcs_saxs_1d": (24,)}
    data = {name: np.random.default_rng(1).random(shape) for name, shape in arrays.items()}
    scalars = {f"xpcs_scalar_{i}": float(i) for i in range(10)}
    run = _Run(Path("/none.h5"), 0)
    events = [run.event(i, {**scalars, **data}) for i in range(n)]
    begin, *_ = run.opening()
    end = run.stop(n)

    def ours() -> float:
        with sinks.KafkaDocuments(bootstrap, _new_topic(bootstrap)) as publisher:
            publisher.publish(run.uid, *begin, may_be_lost=False)
            publisher.flush()
            began = time.perf_counter()
            for each in (*events, end):
                publisher.publish(run.uid, *each, may_be_lost=False)
            publisher.flush()
            return (n + 1) / (time.perf_counter() - began)

    def theirs() -> float:
        publisher = _publisher(bootstrap, _new_topic(bootstrap))
        publisher(*begin)
        publisher.flush()
        began = time.perf_counter()
        for each in (*events, end):
            publisher(*each)
        return (n + 1) / (time.perf_counter() - began)

    measured = pairs(ours, theirs, rounds)
    return compare("documents to Kafka", "documents/s", "Publisher alone, flush at stop", measured)


def delay(bootstrap: str, folder: Path, points: int, pace: float, rounds: int) -> Iterator[Figure]:
    """Publish one raw event after the other, and look when it and what follows from it are there."""
    roimap_file.write(folder / "qmap.h5", rings(SHAPE))
    both = [_delays(bootstrap, folder, points, pace) for _ in range(rounds)]
    seconds = [(median(ours), median(theirs)) for ours, theirs in both]
    figure = "raw event to derived event, median"
    yield asked_for(figure, "s", [ours for ours, _ in seconds], LATE, less_is_better=True)
    yield compare(figure, "s", "raw event to RemoteDispatcher", seconds, less_is_better=True)


def _delays(bootstrap: str, folder: Path, points: int, pace: float) -> tuple[list[float], list[float]]:
    """Return how long after each raw event the derived one is there, and the raw one itself."""
    raw, beamline = _new_topic(bootstrap), f"bench-{uuid.uuid4().hex}"
    derived = f"{beamline}.xpcs.live.documents"
    create_topic(bootstrap, derived, 1)
    run = _Run(_file(folder, points + 1), points + 1)
    raw_seen: dict[int, float] = {}
    derived_seen: list[tuple[int, float]] = []

    def take_raw(name: str, document: Document) -> None:
        if name == "event":
            raw_seen[document["seq_num"]] = time.perf_counter()

    def take_derived(name: str, document: Document) -> None:
        if name == "event":
            derived_seen.append((document["data"]["xpcs_frames"], time.perf_counter()))

    with ExitStack() as stack:
        process = stack.enter_context(_correlating(bootstrap, raw, beamline, folder))
        stack.enter_context(_dispatched(bootstrap, raw, take_raw))
        stack.enter_context(_dispatched(bootstrap, derived, take_derived))
        publisher = _publisher(bootstrap, raw)
        # Everybody is there once the first point came through.
        for each in (*run.opening(), run.frames(0), run.event(0, {})):
            publisher(*each)
        _until(lambda: 1 in raw_seen and bool(derived_seen), process)
        sent: dict[int, float] = {}
        waiting, begin = threading.Event(), time.perf_counter()
        for i in range(1, points + 1):
            waiting.wait(max(0.0, begin + i * pace - time.perf_counter()))
            publisher(*run.frames(i))
            sent[i + 1] = time.perf_counter()
            publisher(*run.event(i, {}))
        _until(lambda: points + 1 in raw_seen and derived_seen[-1][0] == (points + 1) * PER_POINT, process)
        publisher(*run.stop(points + 1))
        process.wait(DEADLINE)
    late = [
        next(at for frames, at in derived_seen if frames >= n * PER_POINT) - at_first for n, at_first in sent.items()
    ]
    return late, [raw_seen[n] - at_first for n, at_first in sent.items()]


class _Run:
    """Documents of a run whose frames stand in a file."""

    def __init__(self, file: Path, points: int) -> None:
        self._file, self._points = file, points
        self.uid = str(uuid.uuid4())

    def opening(self) -> list[Named]:
        """Return what comes before the first point."""
        uid = self.uid
        at = {"source": "bench", "dtype": "number", "shape": []}
        detector = at | {
            "dtype": "array",
            "shape": [PER_POINT, *SHAPE],
            "external": "STREAM:",
            "object_name": "detector",
        }
        settings = {"data": {"acquire_period": PACE / PER_POINT}, "data_keys": {"acquire_period": at}, "timestamps": {}}
        of_all = {"time": time.time(), "run_start": uid, "hints": {}, "object_keys": {}}
        parameters = {"dataset": "/entry/data/data", "chunk_shape": [1, *SHAPE]}
        uri = f"file://localhost{self._file}"
        return [
            ("start", {"uid": uid, "time": time.time(), "scan_id": 1, "plan_name": "fly", "sample": "silica"}),
            (
                "descriptor",
                {"uid": f"{uid}/primary", "name": "primary", "data_keys": {"detector": detector}, **of_all}
                | {"configuration": {"detector": settings}},
            ),
            (
                "descriptor",
                {"uid": f"{uid}/monitor", "name": "monitor", "data_keys": dict.fromkeys(_numbers(0), at), **of_all}
                | {"configuration": {}},
            ),
            (
                "stream_resource",
                {"uid": f"{uid}/file", "run_start": uid, "data_key": "detector", "mimetype": "application/x-hdf5"}
                | {"uri": uri, "parameters": parameters},
            ),
        ]

    def frames(self, i: int) -> Named:
        """Return what tells where the frames of a point stand."""
        uid, here = self.uid, {"start": i, "stop": i + 1}
        of = {"uid": f"{uid}/file/{i}", "stream_resource": f"{uid}/file", "descriptor": f"{uid}/primary"}
        return "stream_datum", {**of, "indices": here, "seq_nums": {"start": i + 1, "stop": i + 2}}

    def event(self, i: int, data: dict[str, Any]) -> Named:
        """Return an event of a point."""
        return _event(f"{self.uid}/primary", i, data)

    def monitored(self, i: int) -> Named:
        """Return an event of what is monitored beside."""
        return _event(f"{self.uid}/monitor", i, _numbers(i))

    def stop(self, points: int) -> Named:
        """Return the end."""
        counted = {"exit_status": "success", "num_events": {"primary": points}}
        return "stop", {"uid": str(uuid.uuid4()), "time": time.time(), "run_start": self.uid, **counted}


def _numbers(i: int) -> dict[str, Any]:
    return {f"motor_{j}": i + j / 8 for j in range(8)}


def _event(descriptor: str, i: int, data: dict[str, Any]) -> Named:
    now = time.time()
    of = {"uid": str(uuid.uuid4()), "time": now, "descriptor": descriptor, "seq_num": i + 1, "filled": {}}
    return "event", {**of, "data": data, "timestamps": dict.fromkeys(data, now)}


class _Tapped(ingest.KafkaDocuments):
    """Documents of a topic from its beginning, which notes when the first one came."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        super().__init__(bootstrap, topic, begin="beginning")
        self.began = 0.0

    def __iter__(self) -> Iterator[Named | Rejected | None]:
        for each in super().__iter__():
            if each is not None and not self.began:
                self.began = time.perf_counter()
            yield each


def _file(folder: Path, points: int) -> Path:
    path = folder / f"{points}.h5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            file.create_dataset("entry/data/data", data=poisson(SHAPE, points * PER_POINT, 1), chunks=(1, *SHAPE))
    return path


def _new_topic(bootstrap: str) -> str:
    topic = f"bench-{uuid.uuid4().hex}"
    create_topic(bootstrap, topic, 1)
    return topic


def _publisher(bootstrap: str, topic: str) -> Any:
    return Publisher(topic, bootstrap, "key", {"enable.idempotence": True, "log_level": 0}, flush_on_stop_doc=True)


@contextmanager
def _dispatched(bootstrap: str, topic: str, callback: Callable[[str, Document], object]) -> Iterator[None]:
    """Let a RemoteDispatcher hand on all documents of a topic."""
    options = {"auto.offset.reset": "earliest", "log_level": 0}
    dispatcher = RemoteDispatcher([topic], bootstrap, uuid.uuid4().hex, options)
    dispatcher.subscribe(callback)
    is_over = threading.Event()
    thread = threading.Thread(target=dispatcher.start, args=(lambda: not is_over.is_set(),))
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def _correlating(bootstrap: str, raw: str, beamline: str, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start `xpcs-stream run`, which does not outlive the block."""
    source = ("--source", f"kafka+bluesky://{bootstrap}/{raw}", "--root", f"{folder}={folder}")
    sink = ("--documents", f"kafka://{bootstrap}/{beamline}", "--qmap", folder / "qmap.h5", "--runs", "1", "--quiet")
    command: list[str | Path] = [sys.executable, "-m", "stream", "run", *source, *sink]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None  # noqa: S101 - for the type checker
        try:
            while "taking frames" not in (line := process.stderr.readline()):
                if not line:
                    raise RuntimeError("xpcs-stream run ended before it took frames")
            yield process
        finally:
            process.kill()


def _until(is_so: Callable[[], bool], process: "subprocess.Popen[str] | None" = None) -> None:
    deadline, waiting = time.monotonic() + DEADLINE, threading.Event()
    while not is_so():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise RuntimeError("documents did not come")
        waiting.wait(0.01)
