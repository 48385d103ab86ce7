"""Frames through Kafka into one merged g2: how many per second, how late, and how soon after a worker is killed.

Gateway and merger are in this process, two workers and the broker in others, all on the cores of one machine, as they
would not be at a beamline: look at the ratios. The bare client sends and receives records of the same size.
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
from statistics import quantiles
from typing import Self

import numpy as np
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from numpy.typing import NDArray

from bench.data import Shape, poisson, rings
from bench.measure import Figure, asked_for, compare
from stream import kafka_plane
from stream.broker import Broker
from stream.ingest.kafka import KafkaResults
from stream.kafka import create_topic
from stream.merger import Merger
from stream.messages import FrameBatch, Message, Position, Result, RunStart, RunStop
from stream.operators.intensity import Intensity
from stream.operators.multitau import MultiTau
from stream.operators.scattering import Scattering
from stream.protocols import Operator
from stream.regions import Regions

SHAPE: Shape = (512, 512)
REGIONS = 4
WORKERS = 2
BATCH = 16
FRAMES = 1024
PACED_FRAMES = 1000
PACE = 0.01
"""Seconds between the frames of the latency run: about half of the maximal rate."""
PUBLISH_EVERY = 0.1
ROUNDS = 3
PORT = 29192


def figures() -> Iterator[Figure]:
    """Send uint16 frames (mean 1 count) of 512 x 512 pixels in 4 regions to 2 workers; then 100 frames per second."""
    with tempfile.TemporaryDirectory() as folder, Broker(Path(folder) / "kafka", port=PORT) as broker:
        bench = _Beamline(Path(folder), broker.bootstrap)
        bench.through(BATCH, BATCH, 0)  # compilers, and the broker's own warm-up
        rounds = [(bench.through(FRAMES, BATCH, 0)[0], bench.bare(FRAMES)) for _ in range(ROUNDS)]
        against = "the same bytes through the bare client"
        rates = [(FRAMES / ours, FRAMES / theirs) for ours, theirs in rounds]
        yield compare("frames through Kafka into g2", "frames/s", against, rates, target=0.8)
        gigabytes = [tuple(rate * 2 * SHAPE[0] * SHAPE[1] / 1e9 for rate in pair) for pair in rates]
        yield compare("frames through Kafka into g2", "GB/s", against, [(a, b) for a, b in gigabytes], target=0.8)
        late = [quantiles(bench.through(PACED_FRAMES, 1, PACE)[1], n=100) for _ in range(ROUNDS)]
        for which, name in ((49, "median"), (98, "99th percentile")):
            seconds = [cuts[which] for cuts in late]
            yield asked_for(f"frame sent to g2 merged, {name}", "s", seconds, 1.0, less_is_better=True)
        gaps = [bench.failover() for _ in range(ROUNDS)]
        yield asked_for("worker killed to its regions served", "s", gaps, 10.0, less_is_better=True)


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


class _Beamline:
    def __init__(self, folder: Path, bootstrap: str) -> None:
        self._folder, self._bootstrap = folder, bootstrap
        self._roimap = rings(SHAPE)
        self._qmap = folder / "qmap.h5"
        center = ("--beam-center-x", str(SHAPE[1] / 2), "--beam-center-y", str(SHAPE[0] / 2))
        geometry = ("--detector-distance", "5 m", "--pixel-size", "75 um", "--incident-energy", "10 keV")
        bins = ("--n-static", "320", "--n-dynamic", "8")
        command = ("qmap", "--shape", f"{SHAPE[0]}x{SHAPE[1]}", *center, *geometry, *bins, "--out", str(self._qmap))
        subprocess.run([sys.executable, "-m", "stream", *command], check=True, stdout=subprocess.DEVNULL)

    def through(self, n: int, batch: int, pace: float) -> tuple[float, list[float]]:
        """Return the seconds from the first frame to the last result, and from each frame to the result of it."""
        where = f"{self._bootstrap}/bench-{uuid.uuid4().hex}"
        kafka_plane.create_topics(where, {}, REGIONS, retention_bytes=10**10)
        sent: dict[int, float] = {}
        late: list[float] = []
        source = _Frames(poisson(SHAPE, batch, 1), n, pace, lambda each: sent.update({each.first + batch: time.time()}))
        stop = threading.Event()
        with ExitStack() as stack:
            for share in (REGIONS, REGIONS // WORKERS):
                _until(stack.enter_context(self._worker(where)), "begins here", share)
            sink = stack.enter_context(kafka_plane.frames_sink(where, {}, stop))
            topic = kafka_plane.partials_topic(where.rsplit("/", 1)[1])
            results = stack.enter_context(KafkaResults(self._bootstrap, topic))
            sender = threading.Thread(target=kafka_plane.gateway, args=(source, sink, Regions(REGIONS), stop))
            begin = time.perf_counter()
            sender.start()
            merger = Merger(self._operators)
            for message in results:
                outputs = list(merger.take(message)) if isinstance(message, RunStart | Result | RunStop) else []
                g2 = [each for each in (*outputs, *merger.interim()) if isinstance(each, Result)]
                known = [each.n_frames for each in g2 if each.operator == "multitau" and each.n_frames in sent]
                late += [time.time() - sent.pop(n_frames) for n_frames in known]
                if any(isinstance(output, RunStop) for output in outputs):
                    break
            sender.join()
            return time.perf_counter() - begin, late

    def bare(self, n: int) -> float:
        """Return the seconds from the first record sent to the last one received by another process."""
        topic = f"bench-{uuid.uuid4().hex}"
        create_topic(self._bootstrap, topic, REGIONS)
        region = poisson(SHAPE, BATCH, 1)[:, : SHAPE[0] // REGIONS]
        per_record = 900_000 // region[0].nbytes
        record = region[:per_record].tobytes()
        n_record = REGIONS * -(-n // per_record)
        command = [sys.executable, "-m", "bench.kafka", self._bootstrap, topic, str(n_record)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout is not None  # noqa: S101 - for the type checker
            receiver.stdout.readline()
            producer = Producer({"bootstrap.servers": self._bootstrap, "acks": "all", "enable.idempotence": True})
            begin = time.perf_counter()
            for i in range(n_record):
                while True:
                    try:
                        producer.produce(topic, record, partition=i % REGIONS)
                        break
                    except BufferError:
                        producer.poll(0.01)
            producer.flush()
            receiver.wait()
            return time.perf_counter() - begin

    def failover(self) -> float:
        """Return the seconds from the kill of one of two workers until the other has its regions."""
        where = f"{self._bootstrap}/bench-{uuid.uuid4().hex}"
        kafka_plane.create_topics(where, {}, REGIONS, retention_bytes=10**10)
        with self._worker(where) as first:
            _until(first, "begins here", REGIONS)
            with self._worker(where) as second:
                _until(second, "begins here", REGIONS // 2)
                first.kill()
                begin = time.perf_counter()
                _until(second, "begins here", REGIONS // 2)
                return time.perf_counter() - begin

    @contextmanager
    def _worker(self, where: str) -> Iterator["subprocess.Popen[str]"]:
        options = ("--checkpoints", str(self._folder / "checkpoints"), "--publish-every", f"{PUBLISH_EVERY} s")
        command = (
            "-v",
            "worker",
            "--source",
            f"kafka://{where}",
            "--qmap",
            str(self._qmap),
            "--threads",
            "1",
            *options,
        )
        with subprocess.Popen([sys.executable, "-m", "stream", *command], stderr=subprocess.PIPE, text=True) as process:
            try:
                _until(process, "taking regions", 1)
                yield process
            finally:
                process.kill()

    def _operators(self, start: RunStart) -> list[Operator]:
        roimap = self._roimap
        return [MultiTau(start, roimap, threads=1), Scattering(start, roimap), Intensity(start, roimap)]


def _until(process: "subprocess.Popen[str]", words: str, times: int) -> None:
    assert process.stderr is not None  # noqa: S101 - for the type checker
    while times:
        line = process.stderr.readline()
        if not line:
            raise RuntimeError(f"a worker ended before it said {words!r}")
        times -= words in line


def _receive(bootstrap: str, topic: str, n: str) -> None:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, region, OFFSET_BEGINNING) for region in range(REGIONS)])
    print("ready", flush=True)
    received = 0
    while received < int(n):
        received += sum(record.error() is None for record in consumer.consume(100, 0.1))
    consumer.close()


if __name__ == "__main__":
    _receive(*sys.argv[1:])
