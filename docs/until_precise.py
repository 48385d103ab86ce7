"""Frames saved by measuring until precise: simulated samples, and plans to measure them.

Nobody knows the contrast and the rate of a sample before it is measured. A plan of fixed length has to be long enough
for the worst of those that may come. Measuring until precise ends each run when the rate of that sample is known.

    python docs/until_precise.py

The fixed length is found as an expert with the simulated beamline at hand would: the fewest frames with which the error
of the worst sample is as small as wanted, on average over runs of it. All plans see the same frames: what is compared
is where they end, and how far off the truth they are then. A third plan of fixed length takes as many frames in all as
measuring until precise.
"""

from collections.abc import Iterator

import numpy as np

from stream.assembly import simulated
from stream.messages import FrameBatch, Result, RunStart
from stream.operators.multitau import MultiTau
from stream.operators.qmap import ring_map
from stream.precision import GROWTH, Goal, Judge
from stream.uncertainty import Estimate, estimate

WANTED = 0.05
CONTRASTS, RATES = (0.1, 0.4), (20.0, 80.0)
MEAN_COUNTS = 0.1
MAX_FRAMES = 16_000
N_SAMPLES, N_WORST = 24, 3

MAP = ring_map(
    shape=(64, 64),
    beam_center_x=-20,
    beam_center_y=-20,
    detector_distance=5,
    pixel_size=75e-6,
    incident_energy=11,
    n_static=60,
    n_dynamic=4,
)
BIN = 1
Q = float(MAP.dynamic_q[BIN])
MEMBERS = np.flatnonzero(MAP.dynamic_of_static == BIN + 1)


def run(contrast: float, rate: float, seed: int, n_frames: int) -> Iterator[RunStart | Result]:
    """Yield g2 of one sample as it comes."""
    source = simulated(
        MAP,
        diffusion=rate / Q**2,
        contrast=contrast,
        stretch=1.0,
        mean_counts=MEAN_COUNTS,
        n_frames=n_frames,
        frame_time=1e-3,
        seed=seed,
        sample=f"{contrast:.2f}, {rate:.0f}/s",
        batch=50,
    )
    due = 500.0
    for message in source:
        match message:
            case RunStart():
                operator = MultiTau(message, MAP)
                yield message
            case FrameBatch():
                operator.push(message)
                n = operator.n_frames
                if n >= due or n == n_frames:
                    due = GROWTH * n
                    yield Result(
                        run=message.run, operator="multitau", n_frames=n, final=n == n_frames, arrays=operator.result()
                    )


def rate_of(result: Result) -> Estimate:
    """Return the rate that a result tells."""
    return estimate(result.arrays, "rate", MEMBERS, MAP.static_q[MEMBERS])


def fixed_length() -> int:
    """Return how many frames the worst sample needs."""
    needed = []
    for rate in RATES:
        errors: dict[int, list[float]] = {}
        for seed in range(N_WORST):
            for message in run(CONTRASTS[0], rate, 1000 + seed, MAX_FRAMES):
                if isinstance(message, Result):
                    errors.setdefault(message.n_frames, []).append(rate_of(message).relative_error)
        enough = [n for n, of_runs in errors.items() if np.sqrt(np.mean(np.square(of_runs))) <= WANTED]
        needed.append(min(enough, default=MAX_FRAMES))
        print(f"  contrast {CONTRASTS[0]}, {rate:g}/s: {needed[-1]} frames")
    return max(needed)


def main() -> None:
    """Measure all samples, and print what each plan took and how good it was."""
    print(f"wanted: the rate to {WANTED:.0%} of samples of contrast {CONTRASTS[0]} to {CONTRASTS[1]}", end=", ")
    print(f"rate {RATES[0]:g} to {RATES[1]:g}/s\na plan of fixed length has to be as long as the worst sample needs:")
    n_fixed = fixed_length()
    rng = np.random.default_rng(1)
    truths, ended, followed = [], [], []
    print("samples:")
    for seed in range(N_SAMPLES):
        contrast, rate = rng.uniform(*CONTRASTS), float(np.exp(rng.uniform(*np.log(RATES))))
        judge = Judge(Goal(q=Q, of="rate", relative_error=WANTED), MAP)
        verdict, rates = None, {}
        for message in run(contrast, rate, seed, MAX_FRAMES):
            if verdict is None or verdict.outcome == "go on":
                verdict = judge.take(message)
            if isinstance(message, Result):
                rates[message.n_frames] = rate_of(message).value
                if message.n_frames >= n_fixed and verdict.outcome != "go on":
                    break
        truths.append(rate)
        ended.append(verdict)
        followed.append(rates)
        print(f"  contrast {contrast:.2f}, {rate:4.1f}/s: {verdict.reason}")
    n_mean = round(np.mean([verdict.n_frames for verdict in ended]))
    plans = {
        f"fixed length, {n_fixed}": [at(rates, n_fixed) for rates in followed],
        "until precise": [(verdict.n_frames, verdict.value) for verdict in ended],
        f"fixed length, {n_mean}": [at(rates, n_mean) for rates in followed],
    }
    print(
        f"\n{'plan':22}{'frames':>8}{'off the truth (rms)':>21}{'worst':>7}   off by more than twice the {WANTED:.0%}"
    )
    for name, ends in plans.items():
        off = np.array([abs(value / rate - 1) for (_, value), rate in zip(ends, truths, strict=True)])
        n, far = sum(n for n, _ in ends), np.count_nonzero(off > 2 * WANTED)
        print(f"{name:22}{n:8}{np.sqrt(np.mean(off**2)):21.1%}{off.max():7.1%}   {far} of {N_SAMPLES}")
    whole, taken = (sum(n for n, _ in plans[name]) for name in list(plans)[:2])
    print(f"\nsaved: {whole - taken} of {whole} frames ({1 - taken / whole:.0%})")


def at(rates: dict[int, float], n_frames: int) -> tuple[int, float]:
    """Return the last result of at most so many frames."""
    n = max(n for n in rates if n <= n_frames)
    return n, rates[n]


if __name__ == "__main__":
    main()
