"""Frames over ZeroMQ into g2: how many per second against only receiving them, and how late the result is.

The sender is another process, on loopback, with our wire. Both ends share the machine's cores, as they would not at a
beamline: look at the ratios.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from statistics import quantiles

import numpy as np
from numpy.typing import NDArray

from bench.measure import Figure, compare, pairs
from stream.ingest.zmq import ZmqResults, ZmqSource
from stream.messages import FrameBatch, Message, Result, RunStart, RunStop
from stream.operators.multitau import MultiTau
from stream.operators.qmap import ring_map
from stream.operators.roimap import RoiMap
from stream.pipeline import Pipeline
from stream.sinks.zmq import ZmqSink

SHAPE = (512, 512)
BATCH = 64
BATCHES = 24
ROUNDS = 5
PACED_FRAMES = 200
PACE = 0.02
"""Seconds between the frames of the latency run."""


def figures() -> Iterator[Figure]:
    """Send uint16 frames (mean 1 count) of 512 x 512 pixels in batches of 64; then single frames at 50 per second."""
    roimap = ring_map(
        shape=SHAPE, beam_center_x=256, beam_center_y=256, detector_distance=5, pixel_size=75e-6,
        incident_energy=10, mask=None, n_static=160, n_dynamic=8,
    )  # fmt: skip
    measured = pairs(lambda: _correlated(roimap), _received, ROUNDS)
    rates = [(BATCHES * BATCH / ours, BATCHES * BATCH / theirs) for ours, theirs in measured]
    bytes_per_frame = 2 * SHAPE[0] * SHAPE[1]
    against = "the same messages only received"
    yield compare("frames over ZeroMQ into g2", "frames/s", against, rates, target=0.2)
    gigabytes = [(ours * bytes_per_frame / 1e9, theirs * bytes_per_frame / 1e9) for ours, theirs in rates]
    yield compare("frames over ZeroMQ into g2", "GB/s", against, gigabytes, target=0.2)

    latencies = [(_percentiles(_result_latency(roimap)), _percentiles(_receive_latency())) for _ in range(3)]
    against = "frame sent to frame received"
    for which, name in ((0, "median"), (1, "99th percentile")):
        milliseconds = [(1e3 * ours[which], 1e3 * theirs[which]) for ours, theirs in latencies]
        yield compare(f"sent to result published, {name}", "ms", against, milliseconds, less_is_better=True)


def _sender(batch: int, batches: int, pace: float) -> tuple[subprocess.Popen[str], str]:
    arguments = [sys.executable, "-m", "bench.stream", str(batch), str(batches), str(pace)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None  # noqa: S101 - for the type checker
    return process, process.stdout.readline().strip()


class _Tapped(ZmqSource):
    """A source that shows each message to `tap` as it comes."""

    def __init__(self, address: str, tap: Callable[[Message], None]) -> None:
        super().__init__(address)
        self._tap = tap

    def __iter__(self) -> Iterator[Message | None]:
        for message in super().__iter__():
            if message is not None:
                self._tap(message)
            yield message


def _correlated(roimap: RoiMap) -> float:
    """Return the seconds from the first message to the last, which is asked for when all frames are correlated."""
    times: list[float] = []
    process, address = _sender(BATCH, BATCHES, 0)
    with process, _Tapped(address, lambda _: times.append(time.perf_counter())) as source:
        Pipeline(source, lambda start: [MultiTau(start, roimap)], [], runs=1).run()
    return times[-1] - times[0]


def _received() -> float:
    times: list[float] = []
    process, address = _sender(BATCH, BATCHES, 0)
    with process, _Tapped(address, lambda _: times.append(time.perf_counter())) as source:
        next(message for message in source if isinstance(message, RunStop))
    return times[-1] - times[0]


def _result_latency(roimap: RoiMap) -> list[float]:
    """Publish after every frame, and receive the results as a live display would."""
    sent: dict[int, int] = {}

    def note(message: Message) -> None:
        if isinstance(message, FrameBatch):
            sent[message.first + 1] = message.timestamp_ns

    latencies = []
    process, address = _sender(1, PACED_FRAMES, PACE)
    with process, _Tapped(address, note) as source, ZmqSink("tcp://127.0.0.1:*", pattern="pub") as sink:
        pipeline = Pipeline(source, lambda start: [MultiTau(start, roimap)], [sink], publish_every=0, runs=1)
        with ZmqResults(sink.address) as results:
            thread = threading.Thread(target=pipeline.run)
            thread.start()
            for message in results:
                if isinstance(message, RunStop):
                    break
                if isinstance(message, Result) and message.operator == "multitau" and message.n_frames in sent:
                    latencies.append((time.time_ns() - sent.pop(message.n_frames)) / 1e9)
            thread.join()
    return latencies


def _receive_latency() -> list[float]:
    process, address = _sender(1, PACED_FRAMES, PACE)
    latencies = []
    with process, ZmqSource(address) as source:
        for message in source:
            if isinstance(message, FrameBatch):
                latencies.append((time.time_ns() - message.timestamp_ns) / 1e9)
            if isinstance(message, RunStop):
                break
    return latencies


def _percentiles(latencies: list[float]) -> tuple[float, float]:
    cuts = quantiles(latencies, n=100)
    return cuts[49], cuts[98]


def _send(batch: int, batches: int, pace: float) -> None:
    """Be the sender: print the address, then send one run."""
    frames: NDArray[np.uint16] = np.random.default_rng(0).poisson(1, (batch, *SHAPE)).astype("<u2")
    waiting = threading.Event()
    with ZmqSink("tcp://127.0.0.1:*", pattern="push") as sink:
        print(sink.address, flush=True)
        sink.write(
            RunStart(run="bench", shape=SHAPE, dtype="<u2", saturation_value=65534, frame_time=1e-3, count_time=1e-3)
        )
        begin = time.perf_counter()
        for i in range(batches):
            waiting.wait(max(0.0, begin + i * pace - time.perf_counter()))
            sink.write(FrameBatch(run="bench", first=i * batch, frames=frames, timestamp_ns=time.time_ns()))
        sink.write(RunStop(run="bench", n_frames=batches * batch, exit_status="success"))


if __name__ == "__main__":
    _send(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
