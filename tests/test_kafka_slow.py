"""A worker that is slower than the detector: what it has not done yet waits in Kafka."""

import signal
import threading
import time
import uuid
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from stream.ingest.kafka import QUEUE_KBYTES, KafkaResults
from stream.kafka_plane import partials_topic
from stream.messages import FrameBatch, Result, RunStart, RunStop
from stream.sinks.zmq import ZmqSink
from tests.plane import Plane, until_said
from tests.test_command_line import xpcs_stream
from tests.test_kill import GEOMETRY

pytestmark = pytest.mark.timeout(400)

SHAPE = (256, 512)
N_FRAMES = 1280
"""335 MB of them."""
SLOW = 2
"""Partial sums until it is slow no more; the slower it is, the more frames are between them."""
MORE = 150e6
"""What else a worker needs once it has frames (bytes): state, partial sums, what Kafka just answered."""


@contextmanager
def slowed(process):
    """Let a process work a tenth of the time."""
    enough = threading.Event()

    def pause():
        while not enough.is_set():
            process.send_signal(signal.SIGSTOP)
            enough.wait(0.18)
            process.send_signal(signal.SIGCONT)
            enough.wait(0.02)

    pausing = threading.Thread(target=pause)
    pausing.start()
    try:
        yield
    finally:
        enough.set()
        pausing.join()


def memory(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def test_a_worker_slower_than_the_detector_falls_behind_needs_no_more_memory_and_loses_nothing(tmp_path, broker):
    beamline = f"beamline-{uuid.uuid4().hex[:8]}"
    qmap = tmp_path / "qmap.h5"
    assert xpcs_stream("qmap", *GEOMETRY[2:], "--shape", "256x512", "--out", qmap).exit_code == 0
    counts = np.random.default_rng(0).poisson(1, (64, *SHAPE)).astype("<u2")
    with ZmqSink("tcp://127.0.0.1:*", pattern="push") as detector, ExitStack() as stack:
        plane = Plane(f"kafka://{broker.bootstrap}/{beamline}", stack, tmp_path, qmap)
        source = detector.address.replace("tcp", "zmq")
        plane.start("gateway", "--source", source, "--to", plane.address, "--regions", 1)
        worker = plane.worker("--publish-every", "0.05 s")
        until_said(worker, "region 0 begins")
        before, most, lags, ledger = memory(worker), 0, [], {}
        with KafkaResults(broker.bootstrap, partials_topic(beamline)) as results, ExitStack() as slowly:
            slowly.enter_context(slowed(worker))
            detector.write(RunStart(run="a", shape=SHAPE, dtype="<u2", frame_time=0.002, count_time=0.001))
            for first in range(0, N_FRAMES, len(counts)):
                detector.write(FrameBatch(run="a", first=first, frames=counts, timestamp_ns=time.time_ns()))
            detector.write(RunStop(run="a", n_frames=N_FRAMES, exit_status="success"))
            for message in results:
                most = max(most, memory(worker) - before)
                match message:
                    case Result(operator="ledger", arrays=ledger) if ledger["received"]:
                        lags.append(float(ledger["lag"]))
                        if len(lags) == SLOW:
                            slowly.close()
                    case RunStop():
                        break
    assert lags[SLOW - 1] > lags[0]
    assert most < 1024 * QUEUE_KBYTES + MORE < N_FRAMES * counts[0].nbytes
    assert (ledger["received"], ledger["lost"]) == (N_FRAMES, 0)
