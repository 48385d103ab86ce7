import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import zmq
from typer.testing import CliRunner

from stream.__main__ import app
from stream.config import load
from stream.operators.roimap_file import read
from tests.kafka import free_ports

ROOT = Path(__file__).parents[1]
DEADLINE = 180
GEOMETRY = (
    *("--shape", "40x50", "--beam-center-x", "-20", "--beam-center-y", "-30", "--detector-distance", "5 m"),
    *("--pixel-size", "75 um", "--incident-energy", "11 keV", "--n-dynamic", "3", "--n-static", "12"),
)


def xpcs_stream(*arguments):
    # Wide, so that no line of an error is broken in the middle of what is looked for.
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "1000"})


@contextmanager
def started(*arguments, cwd):
    """Start a command in a process of its own, which does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stream", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def finished(process):
    """Wait for a process and return what it printed."""
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture
def free():
    """Return host:port where nobody listens, of the ports that the system gives to nobody by itself."""
    [port] = free_ports(1)
    return f"127.0.0.1:{port}"


@pytest.fixture
def qmap(tmp_path):
    path = tmp_path / "qmap.h5"
    assert xpcs_stream("qmap", *GEOMETRY, "--out", path).exit_code == 0
    return path


@pytest.fixture
def frames(tmp_path):
    """A file of frames as a beamline has it: 200 of 40 x 50 pixels, 2000 a second."""
    path = tmp_path / "frames.h5"
    with h5py.File(path, "w") as file:
        file["entry/entry_identifier"] = "scan-7"
        counts = np.random.default_rng(1).poisson(3.0, (200, 40, 50)).astype("u2")
        file.create_dataset("entry/data/data", data=counts, chunks=(1, 40, 50))
        detector = file.create_group("entry/instrument/detector")
        detector["frame_time"] = 5e-4
        detector["count_time"] = 4e-4
    return path


def result_of(path):
    with h5py.File(path) as file:
        ledger = {name: int(file["xpcs/ledger"][name][()]) for name in ("sent", "received", "lost", "undecodable")}
        g2, tau = file["xpcs/multitau/normalized_g2"][()], file["xpcs/multitau/tau"][()]
        return {"g2": g2, "tau": tau, "ledger": ledger, "exit_status": file["xpcs/exit_status"].asstr()[()]}


@pytest.mark.parametrize(
    ("scheme", "options"), [("zmq+dectris", ["--stream", "1"]), ("zmq+dectris", ["--stream", "2"]), ("zmq", [])]
)
def test_g2_of_a_simulated_detector_arrives_in_the_result_file(tmp_path, qmap, free, scheme, options):
    address = f"{scheme}://{free}"
    simulate = ["simulate", "--qmap", qmap, "--to", address, *options, "--frames", 4000, "--as-fast-as-possible"]
    run = ["run", "--source", address, "--qmap", qmap, "--out", "result.h5", "--runs", 1]
    with (
        started(
            *simulate, "--mean-counts", 0.5, "--contrast", 0.3, "--diffusion", "2e6 angstrom^2/s", cwd=tmp_path
        ) as detector,
        started(*run, cwd=tmp_path) as correlator,
    ):
        out, err = finished(correlator)
        finished(detector)
    assert out == "result.h5\n"
    assert "4,000 of 4,000 frames" in err
    result = result_of(tmp_path / "result.h5")
    assert result["ledger"] == {"sent": 4000, "received": 4000, "lost": 0, "undecodable": 0}
    assert result["exit_status"] == "success"
    # 2000 pixels over 4 s; the slowest speckle lives for 0.1 s: g2 - 1 is known to some 2 % of the contrast.
    q = read(qmap).dynamic_q
    truth = 1 + 0.3 * np.exp(-2 * 2e6 * q**2 * result["tau"][:8, None])
    np.testing.assert_allclose(result["g2"][:8], truth, atol=0.03)


def test_a_file_that_is_replayed_gives_the_g2_of_the_file(tmp_path, qmap, frames, free):
    address = f"zmq+dectris://{free}"
    assert xpcs_stream("run", "--source", frames, "--qmap", qmap, "--out", tmp_path / "file.h5", "-q").exit_code == 0
    with (
        started("replay", frames, "--to", address, "--rate", "1 kHz", cwd=tmp_path) as detector,
        started(
            "run", "--source", address, "--qmap", qmap, "--out", "stream.h5", "--runs", 1, "-q", cwd=tmp_path
        ) as run,
    ):
        finished(run)
        finished(detector)
    of_file, of_stream = result_of(tmp_path / "file.h5"), result_of(tmp_path / "stream.h5")
    assert of_file["ledger"]["received"] == 200
    np.testing.assert_array_equal(of_stream["g2"], of_file["g2"])
    np.testing.assert_allclose(of_stream["tau"], of_file["tau"], rtol=1e-12)


def test_lost_frames_are_told(tmp_path, qmap, free):
    address = f"zmq+dectris://{free}"
    with (
        started("simulate", "--qmap", qmap, "--to", address, "--frames", 500, "--lose", 0.1, cwd=tmp_path) as detector,
        started("run", "--source", address, "--qmap", qmap, "--out", "result.h5", "--runs", 1, cwd=tmp_path) as run,
    ):
        finished(run)
        finished(detector)
    ledger = result_of(tmp_path / "result.h5")["ledger"]
    assert 20 < ledger["lost"] < 90
    assert ledger["received"] + ledger["lost"] == ledger["sent"] == 500
    seen = xpcs_stream("inspect", tmp_path / "result.h5").output
    assert f"lost  {ledger['lost']}" in seen


def test_a_simulation_that_is_stopped_ends_its_run_as_aborted(tmp_path, qmap, free):
    address = f"zmq+dectris://{free}"
    with (
        started("simulate", "--qmap", qmap, "--to", address, "--frames", 1_000_000, cwd=tmp_path) as detector,
        started("run", "--source", address, "--qmap", qmap, "--out", "result.h5", "--runs", 1, cwd=tmp_path) as run,
    ):
        while "frames/s, " not in (line := run.stderr.readline()):
            assert line, "the run ended before frames came"
        detector.send_signal(signal.SIGTERM)
        finished(detector)
        finished(run)
    result = result_of(tmp_path / "result.h5")
    assert result["exit_status"] == "abort"
    assert 0 < result["ledger"]["received"] < 1_000_000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_the_result_of_what_came(tmp_path, qmap, free, number):
    address = f"zmq://{free}"
    with (
        started("simulate", "--qmap", qmap, "--to", address, "--frames", 1_000_000, cwd=tmp_path),
        started("run", "--source", address, "--qmap", qmap, "--out", "result.h5", cwd=tmp_path) as run,
    ):
        while "frames/s, " not in (line := run.stderr.readline()):
            assert line, "the run ended before frames came"
        run.send_signal(number)
        assert finished(run)[0] == "result.h5\n"
    assert result_of(tmp_path / "result.h5")["exit_status"] == "abort"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("scheme", ["zmq", "zmq+dectris"])
def test_a_detector_that_nobody_listens_to_ends_at_once_on_a_signal(tmp_path, qmap, free, scheme, number):
    simulate = ["simulate", "--qmap", qmap, "--to", f"{scheme}://{free}", "--frames", 100]
    with started(*simulate, cwd=tmp_path) as detector:
        assert detector.stderr.readline().startswith("waiting for a receiver")
        assert ends_soon(detector, number) == f"tcp://{free}: stopped while nobody received\n"


def ends_soon(process, number):
    process.send_signal(number)
    began = time.monotonic()
    _, said = finished(process)
    assert time.monotonic() - began < 30  # not the 60 s that a receiver has; 0.4 s where nothing else runs
    return said


def test_a_replay_whose_receiver_hangs_ends_at_once_on_a_signal(tmp_path, frames, free):
    with zmq.Context() as context, context.socket(zmq.PULL) as hung:
        hung.rcvhwm, hung.rcvbuf, hung.linger = 1, 4096, 0
        hung.connect(f"tcp://{free}")
        with h5py.File(frames, "a") as file:
            del file["entry/data/data"]
            file["entry/data/data"] = np.random.default_rng(1).integers(0, 2**16, (200, 200, 200), "<u2")
        replay = ["replay", frames, "--to", f"zmq+dectris://{free}", "--as-fast-as-possible"]
        with started(*replay, cwd=tmp_path) as detector:
            assert detector.stderr.readline().startswith("waiting for a receiver")
            while hung.poll(DEADLINE * 1000) and "image" not in str(hung.recv()):
                pass
            ends_soon(detector, signal.SIGTERM)


def test_a_result_file_is_named_as_soon_as_it_is_written(tmp_path, qmap, free):
    address = f"zmq+dectris://{free}"
    with (
        started("simulate", "--qmap", qmap, "--to", address, "--frames", 20, cwd=tmp_path) as detector,
        started("run", "--source", address, "--qmap", qmap, "--out", "result.h5", cwd=tmp_path) as run,
    ):
        assert run.stdout.readline() == "result.h5\n"
        assert result_of(tmp_path / "result.h5")["ledger"]["received"] == 20
        finished(detector)
        run.send_signal(signal.SIGTERM)
        assert finished(run)[0] == ""


def test_a_run_that_is_left_says_where_it_goes_on(tmp_path, qmap, free):
    address = f"zmq+dectris://{free}"
    with (
        started("simulate", "--qmap", qmap, "--to", address, "--frames", 1_000_000, cwd=tmp_path),
        started("run", "--source", address, "--qmap", qmap, "--checkpoint", "state", cwd=tmp_path) as run,
    ):
        while "frames/s, " not in (line := run.stderr.readline()):
            assert line, "the run ended before frames came"
        run.send_signal(signal.SIGTERM)
        last = finished(run)[1].splitlines()[-1]
    assert re.fullmatch(r"run [0-9a-f-]+ left at frame [1-9]\d* in state; start again to go on", last)


@pytest.mark.parametrize("error", ["static", "pixel"])
def test_nothing_is_left_to_compile_when_frames_come(error):
    code = f"""
import gc, sys, numpy as np
from numba.core.dispatcher import Dispatcher
from stream.correlators import compile_kernels
from stream.messages import DTYPES, FrameBatch
from stream.operators.intensity import Intensity
from stream.operators.multitau import MultiTau
from stream.operators.scattering import Scattering
from tests.conftest import make_roimap, make_start
roimap = make_roimap((300, 50))
def make(start):
    return [MultiTau(start, roimap, error={error!r}), Scattering(start, roimap), Intensity(start, roimap)]
def compiled():
    return sum(len(kernel.signatures) for kernel in gc.get_objects() if isinstance(kernel, Dispatcher))
compile_kernels(make, roimap, sys.stderr.write)
before = compiled()
for dtype in DTYPES:
    frames = np.random.default_rng(0).poisson(1.0, (100, *roimap.shape)).astype(dtype)
    frames.flags.writeable = False
    for operator in make(make_start(roimap.shape, dtype=dtype, saturation_value=3)):
        operator.push(FrameBatch(run="run-1", first=0, frames=frames, timestamp_ns=0))
        operator.result()
print(before, compiled())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    before, after = map(int, done.stdout.split())
    assert 0 < before == after, done.stderr


def test_frames_are_sent_at_the_rate(tmp_path, qmap, free):
    address = f"zmq://{free}"
    arguments = ["--frames", 400, "--rate", "200 Hz"]
    with (
        started("simulate", "--qmap", qmap, "--to", address, *arguments, cwd=tmp_path) as detector,
        started("inspect", address, cwd=tmp_path) as receiver,
    ):
        seen, _ = finished(receiver)
        _, said = finished(detector)
    assert "frames looked at  400" in seen
    rate = float(said.split("(")[1].split(" frames/s")[0])
    assert 20 < rate <= 201


def test_the_configuration_in_a_result_file_runs_again(tmp_path, qmap, frames):
    out = tmp_path / "result.h5"
    first = xpcs_stream("run", "--source", frames, "--qmap", qmap, "--out", out, "--error", "pixel", "--levels", 3)
    assert first.exit_code == 0, first.output
    before = result_of(out)
    with h5py.File(out) as file:
        (tmp_path / "run.yaml").write_text(file["xpcs/configuration"].asstr()[()])
    assert load(tmp_path / "run.yaml").operators.multitau.error == "pixel"
    out.unlink()
    assert xpcs_stream("run", tmp_path / "run.yaml").exit_code == 0
    np.testing.assert_array_equal(result_of(out)["g2"], before["g2"])


def test_inspect_tells_what_frames_hold(frames):
    seen = xpcs_stream("inspect", frames).output
    for fact in ("scan-7", "40 x 50", "<u2", "0.0005 s", "frames looked at  200", "success"):
        assert fact in seen
    assert "2.99" in seen or "3.00" in seen  # mean counts


def test_inspect_tells_what_a_recording_holds(shared_data):
    seen = xpcs_stream("inspect", shared_data / "eiger1m_stream_v2.cbors.xz").output
    for fact in ("01HRCJF83SA63WH8M5X1VBKFJM", "1065 x 1030", "<u4", "frames looked at  10", "38,130"):
        assert fact in seen


@pytest.mark.parametrize(("version", "n", "has_end"), [(1, 9, False), (2, 10, True)])
def test_a_replay_says_how_many_frames_it_sent_and_whether_the_run_has_an_end(
    shared_data, tmp_path, free, version, n, has_end
):
    recording = shared_data / f"eiger1m_stream_v{version}.cbors.xz"
    address = f"zmq+dectris://{free}"
    with (
        started("replay", recording, "--to", address, "--as-fast-as-possible", cwd=tmp_path) as detector,
        started("inspect", address, "--frames", n, cwd=tmp_path) as receiver,
    ):
        finished(receiver)
        _, said = finished(detector)
    assert f"sent {n} frames" in said
    assert ("has no end of its run" in said) is not has_end


def test_a_recording_that_has_no_rate_is_refused_before_anybody_can_connect(shared_data, free):
    said = xpcs_stream("replay", shared_data / "eiger1m_stream_v2.cbors.xz", "--to", f"zmq+dectris://{free}")
    assert said.exit_code == 1
    assert said.stderr == "xpcs-stream: recorded messages are sent at a --rate, or --as-fast-as-possible\n"


@pytest.fixture
def untimed(frames):
    """A file of frames that does not tell the time between them."""
    with h5py.File(frames, "a") as file:
        del file["entry/instrument/detector/frame_time"]
    return frames


def test_inspect_says_that_a_file_does_not_tell_the_frame_time(untimed):
    assert re.search("frame time +not told", xpcs_stream("inspect", untimed).output)
    assert re.search("frame time +0.002 s", xpcs_stream("inspect", untimed, "--frame-time", "2 ms").output)


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--rate", "1 kHz"], "0.001 s"), (["--rate", "1 kHz", "--frame-time", "2 ms"], "0.002 s")],
)
def test_a_file_that_does_not_tell_the_frame_time_is_replayed_with_that_of_the_rate(
    tmp_path, untimed, free, options, told
):
    address = f"zmq+dectris://{free}"
    with (
        started("replay", untimed, "--to", address, *options, cwd=tmp_path) as detector,
        started("inspect", address, cwd=tmp_path) as receiver,
    ):
        seen, _ = finished(receiver)
        finished(detector)
    assert re.search(f"frame time +{told}", seen)


def test_a_recording_is_replayed_message_by_message(shared_data, tmp_path, free):
    address = f"zmq+dectris://{free}"
    recording = shared_data / "eiger1m_stream_v2.cbors.xz"
    with (
        started("replay", recording, "--to", address, "--rate", "100 Hz", cwd=tmp_path) as detector,
        started("inspect", address, cwd=tmp_path) as receiver,
    ):
        seen, _ = finished(receiver)
        finished(detector)
    assert "frames looked at  10" in seen
    assert "38,130" in seen


def test_inspect_tells_what_a_map_holds(qmap):
    seen = xpcs_stream("inspect", qmap).output
    assert "40 x 50" in seen
    assert "3 dynamic, 12 static" in seen
    assert read(qmap).digest in seen


def test_a_result_is_drawn(tmp_path, qmap, frames):
    result, picture = tmp_path / "result.h5", tmp_path / "g2.png"
    assert xpcs_stream("run", "--source", frames, "--qmap", qmap, "--out", result, "-q").exit_code == 0
    assert "500 µs" in xpcs_stream("inspect", result).output
    assert xpcs_stream("show", result, "--out", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_map_is_drawn(tmp_path):
    picture = tmp_path / "map.png"
    assert xpcs_stream("qmap", *GEOMETRY, "--out", tmp_path / "q.h5", "--png", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run", "--source", "zmq://127.0.0.1:5", "--qmap", "none.h5"], "none.h5: no such file"),
        (["run", "--source", "frames.tif", "--qmap", "q.h5"], '"frames.tif": an address is'),
        (["run", "--source", "f.h5", "--qmap", "q.h5", "--publish-every", "5"], '--publish-every: "5" has no unit'),
        (["run", "--source", "f.h5", "--qmap", "q.h5", "--error", "both"], "--error: "),
        (["run", "none.yaml"], "none.yaml: no such file"),
        (["run", "--source", "f.h5", "--qmap", "q.h5", "--out", "x.txt"], '--out: "x.txt"'),
        (["run", "--source", "f.h5", "--qmap", "q.h5", "--out", "{scan}.h5"], "--out: "),
        (["run", "--source", "f.h5", "--qmap", "q.h5", "--publish", "zmq://h:99999"], "--publish: "),
        (["run", "--source", "zmq://h", "--qmap", "q.h5"], "--source: "),
        (["simulate", "--qmap", "none.h5", "--to", "zmq://127.0.0.1:5"], "none.h5: no such file"),
        (["replay", "none.h5", "--to", "zmq://127.0.0.1:5"], "none.h5: no such file"),
        (["replay", __file__, "--to", "zmq://127.0.0.1:5"], "test_command_line.py"),
        (["inspect", "none.h5"], "none.h5: no such file"),
        (["inspect", "none.cbors"], "none.cbors: no such file"),
        (["show", "none.h5", "--out", "x.png"], "none.h5: no such file"),
        (["qmap", *GEOMETRY, "--n-static", "7", "--out", "q.h5"], "n_static 7"),
    ],
)
def test_what_goes_wrong_is_one_line_and_exit_status_1(arguments, problem):
    said = xpcs_stream(*arguments)
    assert said.exit_code == 1
    assert said.stdout == ""
    (line,) = said.stderr.splitlines()
    assert line.startswith("xpcs-stream: ")
    assert problem in line


@pytest.mark.parametrize("option", ["--out", "--checkpoint"])
def test_where_nothing_can_be_written_is_told_before_frames_are_taken(tmp_path, qmap, frames, option):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x.h5"
    said = xpcs_stream("run", "--source", frames, "--qmap", qmap, option, place, "-q", "--publish", "zmq://127.0.0.1:1")
    assert said.exit_code == 1
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"xpcs-stream: {place}")


def test_frames_are_sent_to_sockets_only(frames):
    said = xpcs_stream("replay", frames, "--to", "out.h5")
    assert said.stderr == "xpcs-stream: out.h5: frames are sent to zmq+dectris://HOST:PORT or zmq://HOST:PORT\n"


@pytest.mark.parametrize("command", [("show",), ("export", "--to", "x.csv"), ("compare", __file__)])
def test_a_map_is_no_result_and_what_is_looked_for_is_named(qmap, command):
    said = xpcs_stream(command[0], qmap, *command[1:])
    lacks = "none of /xpcs/multitau, /entry/XPCS/data is there"
    assert said.stderr == f"xpcs-stream: {qmap} is not a result with g2 that is known here: {lacks}\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run"], "CONFIG"),
        (["run", "x.yaml", "--source", "f.h5"], "--runs"),
        (["simulate", "--qmap", "q.h5", "--to", "zmq://h:1", "--rate", "1000"], "has no unit"),
        (["simulate", "--qmap", "q.h5", "--to", "zmq://h:1", "--rate", "5 kg"], "is not a rate"),
        (["simulate", "--qmap", "q.h5", "--to", "zmq://h:1", "--rate", "0 Hz"], "above 0"),
        (["simulate", "--qmap", "q.h5", "--to", "zmq://h:1", "--stream", "3"], "--stream"),
        (["qmap", *GEOMETRY, "--shape", "40", "--out", "q.h5"], "ROWSxCOLUMNS"),
        (["correlate"], "correlate"),
    ],
)
def test_wrong_usage_is_exit_status_2(arguments, problem):
    said = xpcs_stream(*arguments)
    assert said.exit_code == 2
    assert problem in said.stderr


@pytest.mark.parametrize("command", ["run", "simulate", "replay", "inspect", "qmap", "show", "compare", "export"])
def test_every_command_is_explained_with_an_example(command):
    said = xpcs_stream(command, "-h")
    assert said.exit_code == 0
    assert said.output == xpcs_stream(command, "--help").output
    assert f"xpcs-stream {command} " in said.output.split("Options")[0].split("Usage:")[1].split("\n", 1)[1]


def test_the_version_is_told():
    said = xpcs_stream("--version")
    assert said.exit_code == 0
    assert said.output.startswith("xpcs-stream")


def test_help_imports_nothing_slow():
    code = "import sys, stream.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"numba", "h5py", "numpy", "matplotlib", "pint", "pydantic", "zmq"}.isdisjoint(loaded.split())


def test_an_option_that_a_source_of_a_gateway_does_not_have_is_named(tmp_path):
    said = xpcs_stream(
        "gateway", "--source", "any.h5", "--channel", "1", "--to", "kafka://127.0.0.1:1/x", "--regions", 2
    )
    assert said.exit_code == 1
    assert 'xpcs-stream: --channel: not an option of "any.h5"' in said.output


@pytest.mark.parametrize("address", ["kafka://127.0.0.1:9092", "kafka://127.0.0.1/x", "kafka://127.0.0.1:9092/x/y"])
def test_an_address_of_kafka_names_a_broker_and_a_beamline(address):
    said = xpcs_stream("gateway", "--source", "any.h5", "--to", address, "--regions", 2)
    assert said.exit_code == 1
    assert f'"{address}" must name a broker and a beamline' in said.output


def test_kafka_properties_that_are_none_are_named_with_their_line(tmp_path):
    (tmp_path / "kafka.properties").write_text("# ours\nsecurity.protocol=SSL\nnonsense\n")
    options = ("--to", "kafka://127.0.0.1:1/x", "--regions", 2, "--kafka-properties", tmp_path / "kafka.properties")
    said = xpcs_stream("gateway", "--source", "any.h5", *options)
    assert said.exit_code == 1
    assert f"{tmp_path / 'kafka.properties'}:3: not a name=value" in said.output
