"""Scattering and intensity are the means that `reference` computes from the definition."""

import numpy as np
import pytest

from stream.messages import Events, FrameBatch
from stream.operators import intensity as intensity_module
from stream.operators.intensity import Intensity
from stream.operators.scattering import Scattering
from tests import reference
from tests.conftest import make_roimap, make_start, push

ROIMAP = make_roimap()
STATIC = ROIMAP.static_roi_map.ravel()


@pytest.fixture(params=[("|u1", 3, 1), ("<u2", 19, 7), ("<u2", 20, 100), ("<u4", 77, 10), ("<u4", 333, 64)])
def stream(request):
    """Frames with lost ones and saturated pixels, and the batches they come in."""
    dtype, n, batch = request.param
    top = np.iinfo(dtype).max
    rng = np.random.default_rng(n)
    frames = rng.integers(0, top, (n, 6, 50), dtype)
    frames[rng.random(frames.shape) < 2e-3] = top
    came = rng.random(n) > 0.2
    came[-1] = True
    return frames, came, batch, int(top) - 1


def test_scattering_is_the_mean_per_pixel_per_bin_and_per_segment(stream):
    frames, came, batch, saturation_value = stream
    start = make_start(dtype=frames.dtype.str, saturation_value=saturation_value)
    result = push(Scattering(start, ROIMAP), frames, came=came, batch=batch).result()
    flat = frames.reshape(len(frames), -1)
    expected = reference.scattering(flat, STATIC, 6, came=came, saturation_value=saturation_value)
    for name, values in expected.items():
        np.testing.assert_allclose(result[name].reshape(values.shape), values, rtol=1e-15, err_msg=name)


def test_intensity_is_the_mean_of_the_mapped_pixels_of_each_frame(stream):
    frames, came, batch, saturation_value = stream
    start = make_start(dtype=frames.dtype.str, saturation_value=saturation_value)
    result = push(Intensity(start, ROIMAP), frames, came=came, batch=batch).result()
    flat = frames.reshape(len(frames), -1)
    expected = reference.intensity(flat, STATIC, came=came, saturation_value=saturation_value)
    np.testing.assert_array_equal(result["frame"], expected["frame"])
    np.testing.assert_allclose(result["intensity"], expected["intensity"], rtol=1e-15)


def test_long_runs_keep_their_intensity_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(intensity_module, "MAX_INTERVALS", 8)
    operator = Intensity(make_start(), ROIMAP)
    frames = np.arange(100, dtype="<u2")[:, None, None] + np.zeros((6, 50), "<u2")
    operator.push(FrameBatch(run="run-1", first=0, frames=frames, timestamp_ns=0))
    result = operator.result()
    assert result["frame"].tolist() == [0, 16, 32, 48, 64, 80, 96]
    assert result["intensity"].tolist() == [7.5, 23.5, 39.5, 55.5, 71.5, 87.5, 97.5]


def test_more_counts_than_32_bits_hold_are_added_up_exactly():
    frames = np.broadcast_to(np.array(65535, "<u2"), (70_000, 6, 50))
    operator = Scattering(make_start(), ROIMAP)
    operator.push(FrameBatch(run="run-1", first=11 * 2**17, frames=frames, timestamp_ns=0))
    result = operator.result()
    assert (result["image"] == 65535).all()
    assert (result["scattering_1d"] == 65535).all()


def test_events_cost_nothing_for_dark_pixels():
    """A dense batch of these frames would not fit into any memory."""
    start = make_start((512, 1024), saturation_value=4094)
    roimap = make_roimap((512, 1024))
    offsets = np.arange(2**20 + 1)
    pixels, counts = np.full(2**20, 77, "u4"), np.full(2**20, 2, "<u2")
    events = Events(shape=(2**20, 512, 1024), offsets=offsets, pixels=pixels, counts=counts)
    scattering, intensity = Scattering(start, roimap), Intensity(start, roimap)
    for operator in (scattering, intensity):
        operator.push(FrameBatch(run="run-1", first=0, frames=events, timestamp_ns=0))
    assert scattering.result()["image"].ravel()[[76, 77]].tolist() == [0, 2]
    mean = 2 / np.count_nonzero(roimap.static_roi_map) * (roimap.static_roi_map.flat[77] > 0)
    np.testing.assert_allclose(intensity.result()["intensity"], mean, rtol=1e-15)
