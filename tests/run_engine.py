"""A run engine whose documents a command follows by way of a Proxy."""

import threading
import time

import pytest
from bluesky import RunEngine

DEADLINE = 90


def connected(process, publisher):
    """Send what is no start until somebody says so; returns what goes on listening, and what it hears."""
    is_there, said = threading.Event(), []

    def listen():
        for line in process.stderr:
            said.append(line)
            if "rejected: start: uid" in line:
                is_there.set()

    listener = threading.Thread(target=listen)
    listener.start()
    deadline = time.monotonic() + DEADLINE
    while not is_there.wait(0.05):
        publisher("start", {"uid": 0})
        assert time.monotonic() < deadline
    return listener, said


@pytest.fixture
def engine():
    engine = RunEngine({}, context_managers=[])
    yield engine
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join(DEADLINE)
    engine.loop.close()
