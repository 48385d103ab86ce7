"""The benchmarks compare like with like, and say so in the same words."""

import dataclasses

import numpy as np
import pytest

from bench.measure import compare, pairs
from bench.multitau import numpy_multitau
from stream.operators.multitau import MultiTau
from tests.conftest import make_roimap, make_start, push


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


def test_a_figure_has_the_median_ratio_of_the_pairs_and_their_spread():
    figure = compare("x", "1/s", "y", [(10.0, 1.0), (20.0, 4.0), (30.0, 10.0)], target=5)
    assert dataclasses.asdict(figure) | {
        "figure": "x", "value": 20, "unit": "1/s", "against": "y", "ratio": 5, "low": 3, "high": 10, "median_of": 3,
    } == dataclasses.asdict(figure)  # fmt: skip
    assert figure.met


@pytest.mark.parametrize(("target", "less_is_better", "met"), [(4, False, True), (6, False, False), (4, True, False)])
def test_a_figure_meets_its_target_or_not(target, less_is_better, met):
    assert compare("x", "s", "y", [(10.0, 2.0)], target=target, less_is_better=less_is_better).met is met
