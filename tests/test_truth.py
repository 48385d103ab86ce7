"""Speckle of known dynamics goes in, its g2 comes out, within error bars that mean what they say."""

import numpy as np
import pytest

from stream.ingest.simulated import SimulatedSource
from stream.operators.multitau import MultiTau
from stream.operators.roimap import RoiMap
from stream.pipeline import Pipeline
from tests import truth
from tests.sources import ListSink

SHAPE = (32, 32)
STATIC = np.arange(1, SHAPE[0] + 1)[:, None] + np.zeros(SHAPE, int)
ROIMAP = RoiMap(static_roi_map=STATIC, dynamic_roi_map=-(-STATIC // 16))
RATES = [20.0, 5.0]
FRAME_TIME = 0.01


def deviations(seed, *, error="static", **changes):
    """(g2 - truth) / g2_err of every delay and bin of one simulated run."""
    parameters = {
        "rate": np.array([0.0, *RATES])[ROIMAP.dynamic_roi_map], "truth_rate": RATES, "frame_time": FRAME_TIME,
        "contrast": 0.5, "mean_counts": 0.5, "n_frames": 2048, "seed": seed, "batch": 512, "threads": 1,
    }  # fmt: skip
    sink = ListSink()
    source = SimulatedSource(**parameters | changes)
    Pipeline(source, lambda start: [MultiTau(start, ROIMAP, error=error, threads=1)], [sink]).run()
    result = next(arrays for (_, operator), arrays in sink.results(final=True).items() if operator == "multitau")
    known = sink.outputs[0].metadata["truth"]
    # APS delays: above 8 frames, four to a level of coarse frames twice as wide as the last.
    width = [1 if delay <= 8 else 1 << ((int(delay) - 1).bit_length() - 3) for delay in result["delay"]]
    delays = zip(result["delay"].tolist(), width, strict=True)
    expected = np.array([truth.expected_g2(known, delay, w, FRAME_TIME) for delay, w in delays])
    return (result["g2"] - expected) / result["g2_err"]


@pytest.mark.parametrize("changes", [{}, {"stretch": 0.6}, {"mean_counts": 0.05, "contrast": 1.0}, {"mean_counts": 20}])
def test_known_dynamics_are_recovered_within_the_error_bars(changes):
    d = deviations(1, **changes)
    assert d.shape[0] >= 34
    assert np.abs(d).max() < 4.5
    assert np.sqrt((d**2).mean()) < 1.6


def test_two_of_three_error_bars_reach_the_truth():
    """The mean over 16 static bins follows Student's t: 66.7 % of it is within one standard error."""
    inside = np.array([np.abs(deviations(seed)) < 1 for seed in range(40)])
    assert inside.mean() == pytest.approx(0.667, abs=0.035)
    for delays in np.array_split(np.arange(inside.shape[1]), 4):
        assert inside[:, delays].mean() == pytest.approx(0.667, abs=0.06)
