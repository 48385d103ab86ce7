"""A run ends when its goal is reached and not by luck, when its dose is spent, or when its sample changes."""

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stream.damage import UNKNOWN, drift
from stream.errors import ConfigError
from stream.ingest.simulated import SimulatedSource
from stream.messages import FrameBatch, Result, RunStart, RunStop
from stream.operators.multitau import MultiTau
from stream.operators.qmap import ring_map
from stream.precision import GROWTH, RELAXATIONS, Goal, Judge
from stream.uncertainty import estimate
from tests.conftest import make_roimap

SHAPE = (64, 64)
N_DYNAMIC, N_MEMBERS = 12, 10
FRAME_TIME, COUNT_TIME = 1e-3, 5e-4
CONTRAST, RATE = 0.3, 40.0
LONG = int(RELAXATIONS / RATE / FRAME_TIME) + 100
TAU = FRAME_TIME * np.array([*range(1, 9), *(k << level for level in range(1, 8) for k in range(5, 9))])

ROIMAP = ring_map(
    shape=SHAPE,
    beam_center_x=-20,
    beam_center_y=-20,
    detector_distance=5,
    pixel_size=75e-6,
    incident_energy=11,
    n_static=N_DYNAMIC * N_MEMBERS,
    n_dynamic=N_DYNAMIC,
)
Q = float(ROIMAP.dynamic_q[3])
START = RunStart(run="r", shape=SHAPE, dtype="<u2", frame_time=FRAME_TIME, count_time=COUNT_TIME)
STOP = RunStop(run="r", n_frames=10, exit_status="success")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def goal(**changes):
    return Goal(**{"q": Q, "relative_error": 0.05} | changes)


def judge(**changes):
    made = Judge(goal(**changes), ROIMAP)
    made.take(START)
    return made


def result(operator, n_frames, arrays):
    return Result(run="r", operator=operator, n_frames=n_frames, final=False, arrays=arrays)


def multitau(g2):
    """A result in which each static bin has this g2."""
    ones = np.ones((len(TAU), ROIMAP.n_static))
    return {"tau": TAU, "G2": g2 * ones, "IP": ones, "IF": ones}


def decay(rng, rate=RATE, noise=1e-3):
    """g2 of every static bin, (n_delay, n_static)."""
    g2 = 1 + CONTRAST * np.exp(-2 * rate * TAU[:, None] * np.ones(ROIMAP.n_static))
    return g2 + rng.normal(0, noise, g2.shape)


def precise(rng, n_frames):
    return result("multitau", n_frames, multitau(decay(rng)))


def vague(rng, n_frames):
    return result("multitau", n_frames, multitau(decay(rng, noise=0.2)))


def simulated(seed, n_frames, contrast=CONTRAST, rate=RATE, mean_counts=0.3):
    """Multi-tau results of speckle of the same dynamics everywhere, each of a twentieth more frames than the last."""
    source = SimulatedSource(
        rate=np.full(SHAPE, rate),
        contrast=contrast,
        mean_counts=mean_counts,
        n_frames=n_frames,
        frame_time=FRAME_TIME,
        seed=seed,
        batch=32,
    )
    due = 0
    for message in source:
        match message:
            case RunStart():
                operator = MultiTau(message, ROIMAP, threads=1)
                yield message
            case FrameBatch():
                operator.push(message)
                if operator.n_frames >= due:
                    due = 1.05 * operator.n_frames
                    yield result("multitau", operator.n_frames, operator.result())


def scattering(intensity, n_frames_per_segment=8):
    begin = np.arange(len(intensity)) * n_frames_per_segment
    return {"segment_start": begin, "scattering_1d_segments": np.asarray(intensity, float)}


def drift_of(intensity):
    return drift(scattering(intensity), 8 * len(intensity), ROIMAP.dynamic_of_static)


def damaged(rng, by, n_segment=12, counts=1e5):
    """Poisson counts; the third dynamic bin loses a part of them on the way."""
    mean = counts * np.exp(-np.linspace(0, 2, ROIMAP.n_static)) * np.ones((n_segment, 1))
    dying = ROIMAP.dynamic_of_static == 3
    mean[:, dying] *= 1 - by * np.linspace(0, 1, n_segment)[:, None]
    return rng.poisson(mean)


def test_the_error_promised_is_the_error_delivered_when_a_run_stops_by_it():
    wanted, off = 0.06, []
    for seed in range(3):
        judges = [Judge(goal(q=q, relative_error=wanted), ROIMAP) for q in ROIMAP.dynamic_q.tolist()]
        for message in simulated(seed, 12_000):
            verdicts = [(each, each.take(message)) for each in judges]
            off += [(verdict.value / RATE - 1) / wanted for _, verdict in verdicts if verdict.outcome == "precise"]
            judges = [each for each, verdict in verdicts if verdict.outcome == "go on"]
            if not judges:
                break
    assert len(off) > 0.9 * 3 * N_DYNAMIC
    assert np.sqrt(np.mean(np.square(off))) < 1.15
    assert np.mean(np.abs(off) < 1) > 0.6


def test_the_error_holds_where_least_squares_promises_too_much():
    pulls, promised = [], []
    for seed in range(4):
        *_, last = simulated(seed, 1200, rate=8.0, mean_counts=2.0)
        for i in range(N_DYNAMIC):
            members = np.flatnonzero(ROIMAP.dynamic_of_static == i + 1)
            found = estimate(last.arrays, "contrast", members, ROIMAP.static_q[members])
            pulls.append((found.value - CONTRAST) / found.error)
            promised.append(found.fit.contrast_err / found.error)
    assert np.sqrt(np.mean(np.square(pulls))) == pytest.approx(1.1, abs=0.3)
    assert np.median(promised) < 0.5


def test_dynamics_that_change_across_a_ring_are_no_error(rng):
    members = np.flatnonzero(ROIMAP.dynamic_of_static == 4)
    q = ROIMAP.static_q[members]
    across = RATE * (ROIMAP.static_q / q.mean()) ** 2
    found = estimate(multitau(decay(rng, rate=across)), "rate", members, q)
    spread = across[members].std() / np.sqrt(N_MEMBERS)
    assert found.error < spread / 3
    assert estimate(multitau(decay(rng, rate=across)), "rate", members, np.full(N_MEMBERS, np.nan)).error > spread / 2


def test_bins_without_light_do_not_count(rng):
    members = np.arange(N_MEMBERS)
    lit = multitau(decay(rng))
    lit["IP"] = lit["IF"] = np.where(np.arange(ROIMAP.n_static) < 2, 0.0, lit["IP"])
    some = estimate(lit, "rate", members, ROIMAP.static_q[members])
    assert some == estimate(lit, "rate", members[2:], ROIMAP.static_q[members[2:]])
    lit["IP"] = 0 * lit["IP"]
    assert estimate(lit, "rate", members, ROIMAP.static_q[members]).relative_error == inf


def test_precise_is_what_two_looks_in_a_row_found(rng):
    followed = judge()
    assert followed.take(precise(rng, LONG)).outcome == "go on"
    assert followed.take(vague(rng, 2 * LONG)).outcome == "go on"
    assert followed.take(precise(rng, 3 * LONG)).outcome == "go on"
    assert followed.take(precise(rng, 4 * LONG)).outcome == "precise"


def test_results_that_come_again_or_with_hardly_more_frames_are_no_second_look(rng):
    followed = judge()
    for n_frames in (LONG, LONG, LONG - 50, int(LONG * GROWTH) - 1):
        assert followed.take(precise(rng, n_frames)).outcome == "go on"
    assert followed.take(precise(rng, int(LONG * GROWTH) + 1)).outcome == "precise"


def test_nothing_is_believed_of_a_run_that_is_short_against_its_dynamics(rng):
    followed = judge()
    for n_frames in (LONG // 4, LONG // 3, LONG // 2):
        assert followed.take(precise(rng, n_frames)).outcome == "go on"


def test_dose_is_exposure_behind_the_attenuator(rng):
    followed = judge(relative_error=1e-9, max_dose=1.0, transmission=0.25)
    n_frames = round(1.0 / COUNT_TIME / 0.25)
    before = followed.take(precise(rng, n_frames - 1))
    assert (before.outcome, before.dose) == ("go on", pytest.approx((n_frames - 1) * COUNT_TIME * 0.25))
    # Too early for another look, but the dose counts at once.
    assert followed.take(precise(rng, n_frames)).outcome == "dose spent"


def test_a_detector_that_is_done_ends_it(rng):
    followed = judge()
    assert followed.take(STOP).reason.startswith("detector done: rate at q")
    assert "not known" in followed.take(STOP).reason


def test_the_reason_tells_the_numbers(rng):
    followed = judge(max_dose=100.0)
    verdict = [followed.take(precise(rng, n_frames)) for n_frames in (LONG, 2 * LONG)][-1]
    for text in ("precise", f"{Q:.4g} 1/Å", "% of 5.00% wanted", f"{2 * LONG} frames", f"{verdict.value:.4g} ± "):
        assert text in verdict.reason


def test_damage_ends_it(rng):
    followed = judge(max_damage=0.02)
    verdict = followed.take(result("scattering", 96, scattering(damaged(rng, by=0.05))))
    assert verdict.outcome == "radiation damage"
    assert verdict.drift.change == pytest.approx(-0.05, abs=0.01)
    assert verdict.reason.startswith("radiation damage: scattering changed by -")


def test_a_change_that_is_allowed_is_no_damage_however_sure(rng):
    followed = judge(max_damage=0.1)
    verdict = followed.take(result("scattering", 96, scattering(damaged(rng, by=0.05))))
    assert (verdict.outcome, verdict.drift.p_value < 1e-5) == ("go on", True)


def test_without_a_limit_nobody_looks_for_damage(rng):
    verdict = judge().take(result("scattering", 96, scattering(damaged(rng, by=0.5))))
    assert (verdict.outcome, verdict.drift) == ("go on", UNKNOWN)


def test_false_alarms_in_all_looks_of_a_run_are_as_rare_as_stated(rng):
    n_run, stated, alarms = 40, 0.25, 0
    for _ in range(n_run):
        followed = judge(max_damage=1e-9, false_alarm=stated)
        counts = damaged(rng, by=0.0, n_segment=20, counts=30)
        looks = [result("scattering", 8 * n, scattering(counts[:n])) for n in range(4, 21, 2)]
        alarms += any(followed.take(look).outcome == "radiation damage" for look in looks)
    assert alarms <= stated * n_run


def test_slow_speckle_is_no_damage(rng):
    # Ten times the noise of its photons, each static bin on its own.
    slow = damaged(rng, by=0.0) * np.exp(np.cumsum(rng.normal(0, 0.02, (12, ROIMAP.n_static)), axis=0))
    assert drift_of(slow).p_value > 0.01


@given(arrays(float, 12, elements=st.floats(0.01, 100)))
def test_an_unsteady_beam_is_no_damage(beam):
    counts = damaged(np.random.default_rng(5), by=0.03)
    steady, unsteady = drift_of(counts), drift_of(counts * beam[:, None])
    assert unsteady.change == pytest.approx(steady.change)
    assert unsteady.p_value == pytest.approx(steady.p_value)


def test_a_segment_that_is_not_complete_does_not_count(rng):
    counts = damaged(rng, by=0.0)
    begun = np.vstack([counts, 3 * counts[::-1][:1, ::-1]])
    assert drift(scattering(begun), 8 * 12 + 5, ROIMAP.dynamic_of_static) == drift_of(counts)


def test_segments_in_which_no_frame_came_do_not_count(rng):
    counts = damaged(rng, by=0.0).astype(float)
    counts[5] = np.nan
    assert 0 < drift_of(counts).p_value < 1
    assert drift_of(counts[3:7]) == UNKNOWN


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"relative_error": 0.0}, "relative_error 0.0"),
        ({"relative_error": np.nan}, "relative_error nan"),
        ({"max_dose": -1.0}, "max_dose -1.0"),
        ({"max_damage": 0.0}, "max_damage 0.0"),
        ({"transmission": 1.5}, "transmission 1.5"),
        ({"false_alarm": 0.0}, "false_alarm 0.0"),
        ({"q": -0.1}, "q -0.1"),
        ({"q": 1.0}, "q 1 1/angstrom is outside of the map"),
    ],
)
def test_a_goal_that_cannot_be_meant_is_refused(changes, what):
    with pytest.raises(ConfigError, match=what):
        judge(**changes)


def test_a_map_that_cannot_tell_is_refused():
    with pytest.raises(ConfigError, match="does not tell q"):
        Judge(goal(), make_roimap())
    few = ring_map(
        shape=SHAPE,
        beam_center_x=-20,
        beam_center_y=-20,
        detector_distance=5,
        pixel_size=75e-6,
        incident_energy=11,
        n_static=8,
        n_dynamic=2,
    )
    with pytest.raises(ConfigError, match="has 4 static bins"):
        Judge(goal(), few)


def test_results_of_another_map_are_refused(rng):
    other = {name: values[..., :30] for name, values in multitau(decay(rng)).items() if name != "tau"}
    with pytest.raises(ConfigError, match="results have 30 static bins, the map 120"):
        judge().take(result("multitau", LONG, {"tau": TAU, **other}))
