import math

import numpy as np
import pytest

from stream.errors import ConfigError, SourceError
from stream.ingest.simulated import SimulatedSource
from stream.ingest.speckle import exponentials, philox
from stream.messages import FrameBatch, RunStart, RunStop
from tests import truth as truths

FRAME_TIME = 1e-3


def source(**given):
    defaults = {
        "rate": np.full((96, 96), 50.0),
        "contrast": 0.5,
        "mean_counts": 1.0,
        "n_frames": 400,
        "frame_time": FRAME_TIME,
        "seed": 7,
        "run": "r",
        "start_time_ns": 1_700_000_000_000_000_000,
    }
    return SimulatedSource(**defaults | given)


def frames_of(messages):
    return np.concatenate([message.frames for message in messages if isinstance(message, FrameBatch)])


def simulate(**given):
    with source(**given) as simulated:
        start, *rest = simulated
    return start, frames_of(rest).astype(np.float64)


def assert_within_5_sigma(samples, expected, precision):
    """Samples are independent along the first axis; `precision` bounds sigma, so that the test can fail."""
    sigma = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    assert np.all(sigma < precision)
    assert np.all(np.abs(samples.mean(axis=0) - expected) < 5 * sigma)


def assert_distributed(counts, probabilities):
    """Chi squared within 6 sigma of its expectation; what lies beyond the given probabilities is one class."""
    n = len(probabilities)
    observed = np.bincount(np.minimum(counts.astype(np.int64), n).ravel(), minlength=n + 1)
    expected = counts.size * np.append(probabilities, 1 - sum(probabilities))
    kept = expected > 20
    chi_squared = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert kept.sum() >= 3
    assert abs(chi_squared - kept.sum()) < 6 * math.sqrt(2 * kept.sum())


def poisson(mean):
    k = np.arange(int(mean + 10 * math.sqrt(mean) + 10))
    return np.exp(k * math.log(mean) - mean - np.array([math.lgamma(each + 1) for each in k]))


def g2_of_pixels(frames, delays):
    """(n_pixels, n_delays), normalised by the known mean of 1, so that its mean over pixels is unbiased."""
    return np.stack([(frames[:-k] * frames[k:]).mean(axis=0).ravel() for k in delays], axis=1)


def test_philox_gives_the_known_answers_of_random123():
    low = 0xFFFFFFFF
    for words, answer in (
        ((0, 0, 0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((low, low, low, low, low, low), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert tuple(int(word) for word in philox(*map(np.uint64, words))) == answer


def test_the_mean_of_every_pixel_is_as_asked_for():
    asked = np.linspace(0, 2, 96 * 96).reshape(96, 96)
    _, frames = simulate(mean_counts=asked, rate=np.full((96, 96), 1e4))
    assert_within_5_sigma(frames.mean(axis=0).T / asked.mean(axis=1), 1, 0.1)


@pytest.mark.parametrize("stretch", [1.0, 0.6])
@pytest.mark.parametrize("contrast", [0.2, 1.0])
def test_g2_is_the_truth_that_is_told(stretch, contrast):
    delays = np.array([1, 2, 5, 10, 40, 150])
    start, frames = simulate(stretch=stretch, contrast=contrast)
    expected = truths.g2(start.metadata["truth"], delays * FRAME_TIME, 50.0)
    assert expected[0] > 1 + 0.7 * contrast
    assert_within_5_sigma(g2_of_pixels(frames, delays), expected, 0.012)


def test_coarse_frames_have_the_averaged_truth():
    start, frames = simulate(truth_rate=[50.0])
    coarse = frames.reshape(100, 4, 96, 96).mean(axis=1)
    truth = start.metadata["truth"]
    expected = [truths.expected_g2(truth, 4 * k, 4, FRAME_TIME)[0] for k in (1, 3, 5)]
    assert_within_5_sigma(g2_of_pixels(coarse, [1, 3, 5]), expected, 0.01)
    assert expected[0] - truths.g2(truth, 4 * FRAME_TIME, 50.0) > 0.001


def test_a_rate_of_0_is_static_speckle():
    _, frames = simulate(rate=np.zeros((96, 96)))
    assert_within_5_sigma(g2_of_pixels(frames, [1, 300]), 1.5, 0.03)


def test_each_pixel_has_its_own_rate():
    rate = np.full((96, 96), 20.0)
    rate[:, 48:] = 200.0
    start, frames = simulate(rate=rate)
    for half, gamma in ((frames[:, :, :48], 20.0), (frames[:, :, 48:], 200.0)):
        expected = truths.g2(start.metadata["truth"], 4 * FRAME_TIME, gamma)
        assert_within_5_sigma(g2_of_pixels(half, [4]), expected, 0.03)


def test_pixels_fluctuate_independently():
    _, frames = simulate()
    neighbours = (frames[:, :, 0::2] * frames[:, :, 1::2]).mean(axis=0).ravel()
    assert_within_5_sigma(neighbours, 1, 0.01)


@pytest.mark.parametrize("mean", [0.05, 0.5, 5.0, 29.0, 31.0, 300.0])
def test_counts_are_poisson_distributed_around_the_intensity(mean):
    _, counts = simulate(contrast=1e-12, mean_counts=mean, n_frames=30)
    assert_distributed(counts, poisson(mean))


@pytest.mark.parametrize("mean", [0.3, 20.0])
def test_counts_of_full_contrast_are_bose_einstein_distributed(mean):
    # Mandel's formula for Gaussian light: holds only if the field is Gaussian to all orders.
    _, counts = simulate(contrast=1.0, mean_counts=mean, rate=np.full((96, 96), 1e5), n_frames=50)
    k = np.arange(int(30 * mean + 10))
    assert_distributed(counts, (mean / (1 + mean)) ** k / (1 + mean))


@pytest.mark.parametrize("stretch", [0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])
def test_few_exponentials_stand_in_for_a_stretched_one(stretch):
    weights, factors = exponentials(stretch)
    x = np.concatenate([[0], np.geomspace(1e-2, 1e2, 500)])
    assert len(weights) == len(factors) <= 8
    assert weights.min() > 0
    assert weights.sum() == pytest.approx(1)
    assert np.abs(np.exp(-np.outer(x, factors)) @ weights - np.exp(-(x**stretch))).max() < 0.012


def test_batches_and_threads_do_not_change_a_count():
    given = {"rate": np.full((70, 130), 50.0), "n_frames": 50, "mean_counts": 12.0, "stretch": 0.7}
    _, expected = simulate(**given)
    for batch, threads in ((1, 1), (7, 2), (50, 3)):
        assert np.array_equal(simulate(**given, batch=batch, threads=threads)[1], expected)


def test_another_seed_or_run_has_other_counts():
    _, one = simulate(n_frames=2)
    _, other = simulate(n_frames=2, seed=8)
    _, *messages = source(n_frames=2, runs=2)
    first, second = frames_of(messages[:1]), frames_of(messages[2:])
    assert np.array_equal(first, one)
    assert not np.array_equal(one, other)
    assert not np.array_equal(first, second)


def same(one, other):
    if isinstance(one, FrameBatch):
        return (one.run, one.first, one.timestamp_ns) == (
            other.run,
            other.first,
            other.timestamp_ns,
        ) and np.array_equal(one.frames, other.frames)
    return one == other


def test_going_on_from_any_position_equals_not_having_been_interrupted():
    given = {"rate": np.full((20, 30), 80.0), "n_frames": 20, "batch": 6, "runs": 2}
    whole = source(**given)
    messages, positions = [], [whole.position()]
    for message in whole:
        messages.append(message)
        positions.append(whole.position())
    for done, position in enumerate(positions):
        resumed = source(**given)
        resumed.seek(position)
        rest = list(resumed)
        assert len(rest) == len(messages) - done
        assert all(same(one, other) for one, other in zip(rest, messages[done:], strict=True))


def test_it_goes_on_within_a_batch():
    resumed = source(n_frames=20, batch=6)
    resumed.seek({"r:run": 0, "r:frame": 4})
    batch = next(iter(resumed))
    assert batch.first == 4
    assert np.array_equal(batch.frames, simulate(n_frames=20)[1][4:10])


@pytest.mark.parametrize(
    "position", [{"r:run": 0, "r:frame": 401}, {"r:run": 2, "r:frame": 0}, {"r:run": -1}, {"r:frame": -2}]
)
def test_a_position_that_does_not_exist_is_refused(position):
    with pytest.raises(SourceError, match="no frame"):
        source().seek(position)


def test_a_position_of_another_simulation_is_refused():
    position = source(run="other").position()
    assert position == {"other:run": 0, "other:frame": -1}
    with pytest.raises(SourceError, match=r"r: .*'other:run': 0.* is a position of another source: not r:run, r:frame"):
        source().seek(position)


@pytest.mark.parametrize(("dtype", "largest"), [("|u1", 255), ("<u2", 65535), ("<u4", 4294967295)])
def test_masked_pixels_read_the_largest_value_above_saturation(dtype, largest):
    masked = np.zeros((96, 96), bool)
    masked[3, 5] = masked[90] = True
    start, *rest = source(masked=masked, dtype=dtype, n_frames=5)
    frames = frames_of(rest)
    assert frames.dtype == dtype
    assert start.saturation_value == largest - 1
    assert np.all(frames[:, masked] == largest)
    assert frames[:, ~masked].max() < 30


def test_counts_end_at_the_saturation_value():
    _, frames = simulate(dtype="|u1", mean_counts=200.0, contrast=1.0, n_frames=10)
    assert frames.max() == 254
    assert 0.2 < (frames == 254).mean() < 0.35


def test_a_run_is_a_start_its_frames_in_order_and_a_stop():
    start, *batches, stop = source(n_frames=100, batch=33, metadata={"sample": "silica"}, truth_rate=(50.0,))
    assert start == RunStart(
        run="r",
        shape=(96, 96),
        dtype="<u2",
        saturation_value=65534,
        frame_time=FRAME_TIME,
        count_time=FRAME_TIME,
        metadata={
            "sample": "silica",
            "n_frames": 100,
            "start_time": "2023-11-14T22:13:20+00:00",
            "truth": {"contrast": 0.5, "stretch": 1.0, "weights": [1.0], "factors": [1.0], "rate": [50.0]},
        },
    )
    assert [(batch.first, len(batch.frames)) for batch in batches] == [(0, 33), (33, 33), (66, 33), (99, 1)]
    assert [batch.timestamp_ns - 1_700_000_000_000_000_000 for batch in batches] == [
        0,
        33_000_000,
        66_000_000,
        99_000_000,
    ]
    assert not batches[0].frames.flags.writeable
    assert stop == RunStop(run="r", n_frames=100, exit_status="success")


def test_runs_follow_each_other_with_names_of_their_own():
    starts = [message for message in source(n_frames=10, runs=3) if isinstance(message, RunStart)]
    assert [start.run for start in starts] == ["r", "r-1", "r-2"]
    assert [start.metadata["start_time"][17:26] for start in starts] == ["20+00:00", "20.010000", "20.020000"]


def test_a_run_without_a_name_is_given_one_of_its_own():
    assert next(iter(source(run=None))).run != next(iter(source(run=None))).run


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"contrast": 0.0}, "contrast 0.0"),
        ({"contrast": 1.1}, "contrast 1.1"),
        ({"stretch": math.nan}, "stretch nan"),
        ({"frame_time": 0.0}, "frame_time 0.0 s"),
        ({"frame_time": math.inf}, "frame_time inf s"),
        ({"n_frames": 0}, "n_frames 0"),
        ({"runs": 0}, "runs 0"),
        ({"batch": 0}, "batch 0"),
        ({"seed": -1}, "seed -1"),
        ({"threads": 0}, "threads 0"),
        ({"dtype": ">u2"}, "dtype >u2"),
        ({"rate": np.full((4, 4), -1.0)}, "rate has -1.0 at row 0, column 0"),
        ({"rate": np.zeros(4)}, r"rate is \(4,\)"),
        ({"mean_counts": math.nan}, "mean_counts has nan"),
        ({"mean_counts": 1e7}, r"mean_counts 1e\+07"),
        ({"mean_counts": np.ones((4, 5))}, r"mean_counts is \(4, 5\)"),
        ({"run": "x" * 257}, "run = 'xxx"),
        ({"metadata": {"sample": b"x"}}, "metadata.sample = b'x'"),
        ({"masked": np.ones((4, 5), bool)}, r"masked is \(4, 5\)"),
    ],
)
def test_a_parameter_that_cannot_be_meant_is_named(given, message):
    with pytest.raises(ConfigError, match=message):
        source(**given)
