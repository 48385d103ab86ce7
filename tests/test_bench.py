"""The benchmarks compare like with like, and say so in the same words."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as command
from bench import bluesky, limits, measure, multitau
from bench.data import photons, poisson, rings
from bench.measure import asked_for, compare, in_turn, pairs, rate
from bench.peers import Peers, numpy_multitau
from bench.picture import draw
from stream.operators.multitau import MultiTau
from tests.conftest import make_roimap, make_start, push

SMALL = (64, 128)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def one_run(monkeypatch):
    """Every rate is that of a single run."""
    monkeypatch.setattr(measure, "AT_LEAST", 0)


def test_the_numpy_peer_computes_the_same_g2():
    roimap = make_roimap()
    frames = np.random.default_rng(0).poisson(2, (64, 6, 50)).astype("<u2")
    ours = push(MultiTau(make_start(), roimap, levels=4), frames).result()
    theirs = numpy_multitau(frames, roimap)
    np.testing.assert_allclose(theirs, ours["G2"] / (ours["IP"] * ours["IF"]), rtol=1e-5)


def test_both_are_measured_in_turn_and_the_first_pair_does_not_count():
    order = []
    measured = pairs(lambda: order.append("a") or len(order), lambda: order.append("b") or len(order), 2)
    assert order == ["a", "b"] * 3
    assert measured == [(3, 4), (5, 6)]


def test_everyone_has_one_figure_per_round():
    order = []
    contenders = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    assert in_turn(contenders, 2) == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}
    assert order == ["a", "b", "c"] * 3


def test_a_rate_counts_every_run():
    runs = []
    found = rate(10, lambda: runs.append(0))
    assert len(runs) > 1
    assert 10 * len(runs) / 60 < found <= 10 * len(runs) / measure.AT_LEAST


def test_a_rate_needs_one_run(one_run):
    runs = []
    rate(10, lambda: runs.append(0))
    assert len(runs) == 1


def test_a_figure_has_the_median_ratio_of_the_pairs_and_their_spread():
    figure = compare("x", "1/s", "y", [(10.0, 1.0), (20.0, 4.0), (30.0, 10.0)], target=5)
    assert dataclasses.asdict(figure) | {
        "figure": "x", "value": 20, "unit": "1/s", "against": "y", "ratio": 5, "low": 3, "high": 10, "median_of": 3,
        "theirs": 4,
    } == dataclasses.asdict(figure)  # fmt: skip
    assert figure.met


@pytest.mark.parametrize(("target", "less_is_better", "met"), [(4, False, True), (6, False, False), (4, True, False)])
def test_a_figure_meets_its_target_or_not(target, less_is_better, met):
    assert compare("x", "s", "y", [(10.0, 2.0)], target=target, less_is_better=less_is_better).met is met


@pytest.mark.parametrize(
    ("value", "less_is_better", "met"), [(3.0, True, False), (1.0, True, True), (3.0, False, True)]
)
def test_a_figure_without_a_peer_is_held_against_what_was_asked(value, less_is_better, met):
    figure = asked_for("start", "s", [value], 2.0, less_is_better=less_is_better)
    assert figure.met is met
    assert figure.ratio == value / 2
    assert "2 s asked for" in figure.against


def test_the_events_are_as_many_photons_as_the_mean_says():
    events = photons(SMALL, 100, 0.1)
    assert events.dense().mean() == pytest.approx(0.1, rel=0.05)
    assert poisson(SMALL, 10, 0.1).mean() == pytest.approx(0.1, rel=0.1)


def test_half_of_the_detector_is_masked():
    inside = rings(SMALL, first_row=32).static_roi_map > 0
    assert not inside[:32].any()
    assert inside[32:].all()


def test_the_limits_are_measured(one_run):
    words = np.zeros(100_000, "<u2")
    limits.read_rate(words, 2)
    assert 0 < limits.read_rate(words, 2) < 1e13
    assert 0 < limits.multiply_add_rate(1) < 1e13


def test_a_peer_that_is_not_installed_is_left_out_and_named(tmp_path, monkeypatch, capfd):
    for absent in ("skbeam", "torch"):
        (tmp_path / f"{absent}.py").write_text(f"raise ImportError('no {absent} here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Peers(SMALL, 1, 2) as peers:
        rates = {name: rate() for name, rate in peers.rates().items()}
    assert list(rates) == ["plain numpy, 1 thread"]
    assert rates["plain numpy, 1 thread"] > 0
    said = capfd.readouterr().err
    assert "scikit-beam is left out: no skbeam here" in said
    assert "boost_corr is left out: no torch here" in said


def test_every_kind_of_frames_is_measured(one_run):
    figures = [
        *multitau.dense(SMALL, 8, rounds=1),
        *multitau.large(SMALL, 8, rounds=1),
        *multitau.sparse(SMALL, 16, mean=0.01, target=3.5, photon_rate=70e6, rounds=1),
        *multitau.sparse(SMALL, 16, mean=0.1, target=0.9, rounds=1),
    ]
    assert all(math.isfinite(figure.value) and figure.value > 0 for figure in figures)
    assert len({(figure.figure, figure.against, figure.unit) for figure in figures}) == len(figures)


def test_documents_in_and_out_and_their_delay_are_measured(broker, tmp_path):
    figures = [
        bluesky.rate_in(broker.bootstrap, tmp_path, 20, rounds=1),
        bluesky.rate_out(broker.bootstrap, 20, rounds=1),
        *bluesky.delay(broker.bootstrap, tmp_path, 2, 0.1, rounds=1),
    ]
    assert all(math.isfinite(figure.value) and figure.value > 0 and figure.theirs > 0 for figure in figures)


def test_a_peer_that_a_benchmark_is_all_about_is_named_where_it_is_not_installed(tmp_path):
    (tmp_path / "bluesky_kafka.py").write_text("raise ModuleNotFoundError('no bluesky_kafka here')")
    said = subprocess.run(
        [sys.executable, "-m", "bench", "bluesky"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1
    assert said.stderr == ("bench bluesky needs bluesky-kafka, which is in the extra test: no bluesky_kafka here\n")


def test_a_missed_target_is_drawn_told_and_fails_the_check(tmp_path, monkeypatch, capsys):
    figures = [compare("ours", "1/s", "theirs", [(1.0, 2.0)], target=4), compare("late", "ms", "it", [(1.0, 2.0)])]
    monkeypatch.setattr(multitau, "figures", lambda: iter(figures))
    monkeypatch.setattr("sys.argv", ["bench", "multitau", "--json", "--check", "--plot", str(tmp_path / "it.png")])
    assert command.main() == 1
    assert '"met": false' in capsys.readouterr().out
    assert (tmp_path / "it.png").read_bytes()[1:4] == b"PNG"


def test_a_picture_tells_what_was_measured_and_against_what(tmp_path):
    draw([compare("ours", "1/s", "theirs", [(1.0, 2.0)], target=4)], tmp_path / "it.svg")
    # matplotlib writes the characters of a text as a comment beside their outlines
    assert "ours  |  theirs" in (tmp_path / "it.svg").read_text()
