"""`--documents`: what a command makes of frames is a Bluesky run that others receive."""

import threading
import uuid
from contextlib import ExitStack

import event_model
import h5py
import numpy as np
import pytest
from bluesky.callbacks.zmq import Proxy, RemoteDispatcher

from stream.documents import read
from tests.kafka import free_ports
from tests.plane import DEADLINE, Plane
from tests.test_bluesky_transport import received
from tests.test_command_line import finished, started
from tests.test_kill import N_FRAMES, frames, free, qmap

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap"]


def assert_last_event_is(path, documents):
    """The last event holds what the result file does, and the run is of the same frames."""
    last = dict(documents)
    names = [name for name, _ in documents]
    assert (names[0], names[-1]) == ("start", "stop")
    for name, document in documents:
        event_model.schema_validators[event_model.DocumentNames[name]].validate(document)
    with h5py.File(path) as file:
        g2, run = file["xpcs/multitau/normalized_g2"][()], file["entry/entry_identifier"].asstr()[()]
    assert last["start"]["original_run_uid"] == run
    data = last["event"]["data"]
    assert data["xpcs_frames"] == N_FRAMES
    np.testing.assert_array_equal(np.asarray(data["xpcs_g2"]).T[: len(g2)], g2)
    assert last["stop"]["num_events"]["primary"] == names.count("event")
    assert "stream_resource" in names, "it tells of the result file"


def test_a_run_goes_through_a_proxy_of_bluesky(frames, qmap, tmp_path):
    inside, outside = (f"127.0.0.1:{port}" for port in free_ports(2))
    documents, has_stopped = [], threading.Event()

    def take(name, document):
        documents.append((name, document))
        if name == "stop":
            has_stopped.set()

    proxy = Proxy(f"tcp://{inside}", f"tcp://{outside}")
    dispatcher = RemoteDispatcher(outside, deserializer=read)
    dispatcher.subscribe(take)
    for each in (proxy, dispatcher):
        threading.Thread(target=each.start, daemon=True).start()
    command = ("run", "--source", frames, "--qmap", qmap, "--out", "result.h5", "--quiet")
    with started(*command, "--documents", f"zmq+bluesky://{inside}", cwd=tmp_path) as process:
        finished(process)
    assert has_stopped.wait(DEADLINE)
    assert_last_event_is(tmp_path / "result.h5", documents)


def test_a_merger_publishes_the_run_of_the_whole_detector_in_kafka(frames, qmap, tmp_path, broker):
    beamline = f"beamline-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        plane = Plane(f"zmq://{free()}/{beamline}", stack, tmp_path, qmap)
        plane.gateway(frames)
        plane.worker()
        plane.result(plane.merger("--documents", f"kafka://{broker.bootstrap}/{beamline}", "--position", "position"))
    assert_last_event_is(tmp_path / "result.h5", received(broker, f"{beamline}.xpcs.live.documents"))
