"""docs/beamline.py: the whole of a beamline in one command, which leaves nothing running."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(500)

HERE = Path(__file__).parents[1]
DEADLINE = 180


@contextmanager
def beamline(folder):
    """The example, whose processes all have the folder in their command or their environment."""
    command = [sys.executable, str(HERE / "docs" / "beamline.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OF_THIS_TEST": str(folder)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def left_of(folder):
    """Processes that the example began and that are there still."""
    mark, found = f"OF_THIS_TEST={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" "))
        except OSError:
            continue
    return found


def test_g2_of_a_run_engine_is_read_back_from_tiled_equal_to_the_result_file(tmp_path):
    with beamline(tmp_path) as process:
        said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "g2 in Tiled and in the result file are equal, bit for bit" in said
    assert "frames  1000, 0 of them lost" in said
    rate, error, truth = map(float, re.search(r"([\d.]+) ± ([\d.]+) 1/s at .* in truth ([\d.]+)", said).groups())
    assert abs(rate - truth) < 4 * error < truth
    # BestEffortCallback has seen it come.
    assert said.count("generator xpcs_live") == 1
    assert len(re.findall(r"(?m)^\| +\d+ \|", said)) >= 2
    for name in ("live.png", "g2.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert not left_of(tmp_path)


def test_stopped_in_the_middle_it_leaves_no_process(tmp_path):
    with beamline(tmp_path) as process:
        for line in process.stdout:
            if line.startswith("measuring"):
                break
        assert len(left_of(tmp_path)) == 8, "itself and its services"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 1
        assert "Traceback" not in errors
    assert not left_of(tmp_path)
