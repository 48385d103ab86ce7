"""docs/adaptive.py: an agent, a run engine, live g2 and Tiled find the best attenuation of a simulated beamline."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(500)

HERE = Path(__file__).parents[1]
WORDS = re.compile(r"(?:the best of them|the agent chose): +([\d.]+) decades, off by ([\d.]+)%(?:, after (\d+) runs)?")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the example prints, and where it kept its files."""
    folder = tmp_path_factory.mktemp("adaptive")
    environment = os.environ | {"PYTHONPATH": str(HERE), "TMPDIR": str(folder)}
    command = [sys.executable, str(HERE / "docs" / "adaptive.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_the_agent_chooses_an_attenuation_that_is_as_good_as_the_best(said):
    (best, best_off, _), (chosen, off, n_runs) = WORDS.findall(said[0])
    assert abs(float(chosen) - float(best)) <= 0.3
    # How far off eight runs are is known to a quarter.
    assert float(off) <= 1.3 * float(best_off)
    assert int(n_runs) <= 16


def test_nothing_is_left_behind(said):
    _, folder = said
    assert not [command for command in commands() if str(folder).encode() in command]
    assert not list(folder.iterdir())


def commands():
    """Those of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            yield path.read_bytes()
