"""Real processes and real signals: what a run that was killed or stopped leaves behind, and how it goes on."""

import json
import signal
import subprocess
import time
from contextlib import ExitStack, suppress

import h5py
import numpy as np
import pytest

from stream import checkpoint
from stream.ingest.zmq import ZmqResults
from stream.messages import Result
from tests.kafka import free_ports
from tests.test_command_line import finished, started, xpcs_stream

pytestmark = pytest.mark.timeout(300)  # for each test, also where it waits for a line of a process

DEADLINE = 180
N_FRAMES = 2500
COUNTS = np.random.default_rng(1).integers(0, 8, (N_FRAMES, 64, 64), "<u2")
GEOMETRY = (
    *("--shape", "64x64", "--beam-center-x", "-20", "--beam-center-y", "-30", "--detector-distance", "5 m"),
    *("--pixel-size", "75 um", "--incident-energy", "11 keV", "--n-dynamic", "3", "--n-static", "12"),
)

NOT_OF_THE_FRAMES = {"xpcs/date", "xpcs/configuration", "xpcs/ledger/lag"}
"""When the file was written, what the run was told, and how late the last frame was."""


def write_frames(path, came):
    """Write a file of frames up to the last that came; those that did not come were never written."""
    with h5py.File(path, "w") as file:
        file["entry/entry_identifier"] = "scan-7"
        file["entry/start_time"] = "2025-03-01T12:00:00+00:00"
        file["entry/instrument/detector/frame_time"] = 5e-4
        file["entry/instrument/detector/count_time"] = 4e-4
        data = file.create_dataset("entry/data/data", (max(came) + 1, 64, 64), COUNTS.dtype, chunks=(1, 64, 64))
        for n in came:
            data.id.write_direct_chunk((n, 0, 0), COUNTS[n].tobytes())
    return path


def result_of_frames(folder, qmap, came):
    """Return the contents of the result file of the frames that came, of a run that nothing interrupts."""
    frames, out = write_frames(folder / "came.h5", came), folder / "of_frames_that_came.h5"
    said = xpcs_stream("run", "--source", frames, "--qmap", qmap, "--out", out, "--quiet")
    assert said.exit_code == 0, said.output
    return contents(out)


def contents(path):
    """Return every dataset of a result file by name, except those that say nothing about the frames."""
    with h5py.File(path) as file:
        found = {}
        file.visititems(lambda name, node: found.update({name: node[()]} if isinstance(node, h5py.Dataset) else {}))
    return {name: found[name] for name in found.keys() - NOT_OF_THE_FRAMES}


def assert_identical(result, expected):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(result[name], value, err_msg=name)


@pytest.fixture(scope="module")
def qmap(tmp_path_factory):
    path = tmp_path_factory.mktemp("qmap") / "qmap.h5"
    assert xpcs_stream("qmap", *GEOMETRY, "--out", path).exit_code == 0
    return path


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return write_frames(tmp_path_factory.mktemp("frames") / "frames.h5", range(N_FRAMES))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, qmap):
    return result_of_frames(tmp_path_factory.mktemp("uninterrupted"), qmap, range(N_FRAMES))


@pytest.fixture
def start(tmp_path):
    """Start commands in processes of their own, which do not outlive the test."""
    with ExitStack() as processes:
        yield lambda *arguments: processes.enter_context(started(*arguments, cwd=tmp_path))


@pytest.fixture
def saved(tmp_path):
    return tmp_path / "checkpoint"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "result.h5"


def free():
    """Return host:port where nobody listens."""
    [port] = free_ports(1)
    return f"127.0.0.1:{port}"


def write_config(folder, **sections):
    path = folder / "run.yaml"
    path.write_text(json.dumps(sections))  # JSON is YAML
    return path


def until(process, reached):
    """Wait for something that a running process does."""
    deadline = time.monotonic() + DEADLINE
    while not reached():
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.001)
            pytest.fail(f"the process ended before: {process.communicate()}")
        assert time.monotonic() < deadline, "it did not come about"


def identity(path):
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns


def until_saved(process, path, n_frames):
    """Wait for a checkpoint with at least so many frames."""
    while (before := identity(path)) is None or frames_in(path) < n_frames:
        until(process, lambda before=before: identity(path) != before)


def ledgers(process, address):
    """Yield the counts of frames as a run publishes them."""
    while "taking frames from" not in (line := process.stderr.readline()):
        assert line, "the process ended before it took frames"
    deadline = time.monotonic() + DEADLINE
    with ZmqResults(f"tcp://{address}") as results:
        for message in results:
            if isinstance(message, Result) and message.operator == "ledger":
                yield message.arrays
            assert process.poll() is None, f"the process ended before: {process.communicate()}"
            assert time.monotonic() < deadline, "it did not come about"


def frames_in(path):
    """Return how many frames a checkpoint holds, of a run that is on."""
    running = checkpoint.load(path).running
    assert running is not None
    assert running.stop is None
    return int(running.ledger["next_frame"])


def test_killed_again_and_again_a_run_over_a_file_gives_the_identical_result(
    tmp_path, start, qmap, frames, uninterrupted, saved, out
):
    config = write_config(
        tmp_path,
        source={"address": str(frames), "batch": 1},
        qmap=str(qmap),
        sinks=[str(out)],
        checkpoint={"path": str(saved), "every": "50 ms"},
        threads=1,
    )
    held = [-1]
    # Once the checkpoint holds so many frames: at once, or while the next one is being written.
    for n_frames, while_writing in [(0, False), (300, True), (900, False)]:
        run = start("run", config)
        until_saved(run, saved, max(n_frames, held[-1] + 1))
        if while_writing:
            until(run, saved.with_name("checkpoint.tmp").exists)
        run.kill()
        assert run.wait(DEADLINE) == -signal.SIGKILL
        assert not out.exists()
        held.append(frames_in(saved))
    assert held == sorted(set(held)), "every run went on where the one before had been"
    assert held[-1] < N_FRAMES
    assert finished(start("run", config))[0] == f"{out}\n"
    assert_identical(contents(out), uninterrupted)


def test_told_to_stop_a_run_with_a_checkpoint_saves_all_it_did_and_goes_on_from_there(
    tmp_path, start, qmap, frames, uninterrupted, saved, out
):
    publish = free()
    config = write_config(
        tmp_path,
        source={"address": str(frames), "batch": 1},
        qmap=str(qmap),
        sinks=[str(out), f"zmq://{publish}"],
        checkpoint={"path": str(saved), "every": "1 h"},
        publish_every="50 ms",
        threads=1,
    )
    run = start("run", config)
    seen = next(n for ledger in ledgers(run, publish) if (n := int(ledger["received"])) > 100)
    run.terminate()
    asked = time.monotonic()
    assert finished(run)[0] == ""
    assert time.monotonic() - asked < 30
    assert not out.exists()
    assert seen <= frames_in(saved) < N_FRAMES
    assert finished(start("run", config))[0] == f"{out}\n"
    assert_identical(contents(out), uninterrupted)


def test_told_to_stop_a_live_run_without_a_checkpoint_gives_the_result_of_what_came(tmp_path, start, qmap, frames, out):
    address, publish = f"zmq://{free()}", free()
    config = write_config(
        tmp_path,
        source={"address": address},
        qmap=str(qmap),
        sinks=[str(out), f"zmq://{publish}"],
        publish_every="50 ms",
        threads=1,
    )
    start("replay", frames, "--to", address, "--rate", "1 kHz")
    run = start("run", config)
    seen = next(n for ledger in ledgers(run, publish) if (n := int(ledger["received"])) > 100)
    run.terminate()
    assert finished(run)[0] == f"{out}\n"
    result = contents(out)
    received = int(result["xpcs/ledger/received"])
    assert seen <= received < N_FRAMES
    assert result["xpcs/exit_status"] == b"abort"
    assert result["xpcs/n_frames"] == received
    assert result["xpcs/ledger/lost"] == 0
    assert result["xpcs/ledger/sent"] == -1  # the detector never said
    # A file of just these frames ends well, and knows how many they are.
    expected = result_of_frames(tmp_path, qmap, range(received))
    for name in ("xpcs/exit_status", "xpcs/ledger/sent", "xpcs/metadata"):
        del result[name], expected[name]
    assert_identical(result, expected)


def test_killed_and_restarted_a_live_run_counts_what_it_missed_and_ends_with_the_result_of_the_rest(
    tmp_path, start, qmap, frames, saved, out
):
    address, publish = f"zmq://{free()}", free()
    config = write_config(
        tmp_path,
        source={"address": address},
        qmap=str(qmap),
        sinks=[str(out), f"zmq://{publish}"],
        checkpoint={"path": str(saved), "every": "200 ms"},
        publish_every="50 ms",
        threads=1,
    )
    sender = start("replay", frames, "--to", address, "--rate", "1 kHz")
    run = start("run", config, "--runs", 1)
    seen = next(n for ledger in ledgers(run, publish) if (n := int(ledger["received"])) > frames_in(saved) > 0)
    run.kill()
    assert run.wait(DEADLINE) == -signal.SIGKILL
    assert sender.poll() is None
    held = frames_in(saved)
    assert finished(start("run", config, "--runs", 1))[0] == f"{out}\n"
    finished(sender)
    result = contents(out)
    # Lost is what came after the checkpoint, what was in flight, and nothing else.
    [[lost_first, lost_stop]] = result["xpcs/ledger/lost_spans"].tolist()
    assert lost_first == held
    assert seen <= lost_stop < N_FRAMES
    counts = {name: int(result[f"xpcs/ledger/{name}"]) for name in ("sent", "received", "lost", "late", "duplicate")}
    lost = lost_stop - lost_first
    assert counts == {"sent": N_FRAMES, "received": N_FRAMES - lost, "lost": lost, "late": 0, "duplicate": 0}
    assert result["xpcs/exit_status"] == b"success"
    # The same frames, but the others could not be read.
    expected = result_of_frames(tmp_path, qmap, [*range(lost_first), *range(lost_stop, N_FRAMES)])
    assert result.pop("xpcs/ledger/undecodable") == 0
    assert expected.pop("xpcs/ledger/undecodable") > 0
    assert_identical(result, expected)
