"""Two-time correlation on the page: what it is given, and what is seen of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.live.section import pack
from stream.live.twotime import CUT_BYTES, MAP_BYTES, UNKNOWN, age_cuts, two_time
from stream.live.view import View
from stream.messages import Result
from stream.operators.twotime import TwoTime
from tests import reference
from tests.conftest import make_roimap, make_start, push
from tests.test_live import unpack

FRAME_TIME = 0.01


def correlated(n=40, *, kept=16, came=None, seed=0):
    frames = np.random.default_rng(seed).poisson(5, (n, 6, 50)).astype("<u2")
    return push(TwoTime(make_start(), make_roimap(), frames=kept), frames, came=came).result()


def decoded(arrays, window, bin_, n):
    """The map of a bin as the browser makes it, (n, n)."""
    zero, unit = arrays[f"scale_{window}"][bin_][:2]
    codes = arrays[f"map_{window}"][bin_]
    half = np.where(codes == UNKNOWN, np.nan, zero + unit * codes)
    whole = np.empty((n, n))
    whole[np.triu_indices(n)] = whole.T[np.triu_indices(n)] = half
    return whole


def test_maps_are_what_the_operator_computed_of_the_whole_run_and_of_its_newest_frames():
    came = np.ones(40, bool)
    came[[5, 30, 31]] = False
    result = correlated(came=came)
    facts, arrays = two_time(result, FRAME_TIME)
    assert facts["bins"] == [1, 2]
    assert [(each["avg_frame"], each["n"], each["block"]) for each in facts["windows"]] == [(4, 10, 1), (1, 16, 1)]
    np.testing.assert_allclose([each["first"] for each in facts["windows"]], [0, 0.24])
    np.testing.assert_allclose([each["step"] for each in facts["windows"]], [0.04, 0.01])
    for window, level in enumerate((2, 0)):
        n = facts["windows"][window]["n"]
        for bin_ in range(2):
            expected = result["c2"][level, bin_, :n, :n]
            shown = decoded(arrays, window, bin_, n)
            beside = ~np.eye(n, dtype=bool)
            np.testing.assert_allclose(shown[beside], expected[beside], atol=arrays[f"scale_{window}"][bin_][1])
            low, high = arrays[f"scale_{window}"][bin_][2:]
            assert low <= 1 <= high


def test_on_the_diagonal_are_the_neighbours_and_nothing_where_frames_are_lost():
    came = np.ones(16, bool)
    came[[7]] = False
    result = correlated(16, came=came)
    _, arrays = two_time(result, FRAME_TIME)
    shown, c2 = decoded(arrays, 0, 0, 16), result["c2"][0, 0]
    assert np.isnan(shown[7]).all()
    np.testing.assert_allclose(shown[3, 3], (c2[2, 3] + c2[3, 4]) / 2, rtol=1e-4)
    np.testing.assert_allclose(shown[6, 6], c2[5, 6], rtol=1e-4)


@settings(max_examples=20)
@given(n=st.integers(2, 40), n_age=st.integers(1, 12), seed=st.integers(0, 2**32), lost=st.sampled_from([0, 0.3]))
def test_cuts_are_means_over_the_pairs_of_an_age(n, n_age, seed, lost):
    rng = np.random.default_rng(seed)
    c2 = rng.random((2, n, n))
    gone = rng.random(n) < lost
    c2[:, gone] = c2[:, :, gone] = np.nan
    n_age = min(n_age, 2 * n - 1)
    ages, taus, cuts = age_cuts(c2, n_age)
    expected = reference.age_cuts(c2, n_age)
    np.testing.assert_allclose(ages, expected["ages"])
    np.testing.assert_allclose(taus, expected["taus"])
    np.testing.assert_allclose(cuts, expected["cuts"], rtol=1e-12, equal_nan=True)


def test_what_ages_is_seen_in_the_cuts():
    """Speckles that live for 4 frames until frame 100, then for ever."""
    rng = np.random.default_rng(1)
    lives = np.where(np.arange(200) < 100, np.arange(200) // 4, 1000)
    speckles = {life: rng.exponential(20, (6, 50)) for life in set(lives.tolist())}
    frames = np.stack([rng.poisson(speckles[life]) for life in lives.tolist()]).astype("<u2")
    result = push(TwoTime(make_start(), make_roimap(), frames=256), frames).result()
    _, arrays = two_time(result, FRAME_TIME)
    ages, taus, cuts = (arrays[f"{name}_0"] for name in ("age", "tau", "cut"))
    young, old = (np.abs(ages - age).argmin() for age in (0.5, 1.5))
    later = (taus > 0.1) & (taus < 0.4)
    assert (cuts[:, young][:, later] < 1.3).all()
    assert (cuts[:, old][:, later] > 1.7).all()


@pytest.mark.parametrize(("n_bin", "n"), [(1, 300), (36, 256), (300, 64)])
def test_however_many_bins_a_section_is_small_enough_for_a_phone(n_bin, n):
    c2 = np.random.default_rng(0).random((2, n_bin, n, n), np.float32)
    result = {
        "bins": np.arange(1, n_bin + 1),
        "avg_frame": np.array([1, 2]),
        "first": np.array([n, 0]),
        "n_times": np.array([n, n]),
        "c2": c2,
    }
    facts, arrays = two_time(result, FRAME_TIME)
    for name, most in (("map", MAP_BYTES), ("cut", CUT_BYTES)):
        assert 0.01 * most < sum(arrays[f"{name}_{i}"].nbytes for i in (0, 1)) < 1.1 * most
    assert len(pack("twotime", facts, arrays)) < 1.2 * (MAP_BYTES + CUT_BYTES)
    block = facts["windows"][0]["block"]
    size = -(-n // block)
    cells = c2[0, 0, :block, size // 2 * block : (size // 2 + 1) * block]
    np.testing.assert_allclose(decoded(arrays, 1, 0, size)[0, size // 2], cells.mean(), atol=1e-4)


def test_a_run_that_has_just_begun_shows_nothing():
    assert two_time(TwoTime(make_start(), make_roimap(), frames=8).result(), FRAME_TIME) is None
    assert two_time(correlated(1), FRAME_TIME) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_times": np.array([16, 16, 17])},
        {"n_times": np.array([16])},
        {"n_times": np.array([1, 16, 10])},
        {"first": np.array([0, 0, np.inf])},
        {"bins": np.array([1])},
        {"c2": np.zeros((3, 2, 16, 15))},
        {"c2": np.zeros(3)},
    ],
)
def test_what_no_operator_makes_is_refused(wrong):
    with pytest.raises((ValueError, IndexError, TypeError)):
        two_time({**correlated(), **wrong}, FRAME_TIME)


def test_interim_ones_are_shown_as_often_as_is_bearable_and_the_final_one_always_and_last(monkeypatch):
    monkeypatch.setattr("stream.live.view.TWO_TIME_BYTES_PER_S", 1e-3)
    shown = []
    view = View(None, source="", publish=lambda name, packed, _: shown.append((name, packed)))
    view.take(make_start())

    def give(n_frames, *, final=False):
        result = Result(run="run-1", operator="twotime", n_frames=n_frames, final=final, arrays=correlated())
        view.take(result)
        view.two_time(view.key, result)
        return [unpack(packed)[0]["n_frames"] for name, packed in shown if name == "twotime"]

    assert give(10) == [10]
    assert give(11) == [10], "not so soon"
    for name in ("BYTES_PER_S", "SHARE"):
        monkeypatch.setattr(f"stream.live.view.TWO_TIME_{name}", 1e12)
    assert give(12, final=True) == [10, 12]
    assert give(13) == [10, 12], "it came late"
    view.take(make_start(run="run-2"))
    view.two_time(view.key - 1, Result(run="run-1", operator="twotime", n_frames=14, final=True, arrays=correlated()))
    assert [packed for name, packed in shown if name == "twotime"][2:] == [b""], "it is of another run"
