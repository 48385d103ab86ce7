"""What g2 must come out of simulated speckle, from `RunStart.metadata["truth"]`."""

import numpy as np


def g2(truth, tau, rate):
    """1 + contrast * g1**2, with g1 = sum_j weights_j exp(-rate factors_j tau)."""
    g1 = sum(p * np.exp(-np.multiply(rate, f) * tau) for p, f in zip(truth["weights"], truth["factors"], strict=True))
    return 1 + truth["contrast"] * g1**2


def expected_g2(truth, delay, width, frame_time):
    """g2 of each dynamic bin at `delay` frames, where coarse frames of `width` neighbours are correlated.

    Two coarse frames so far apart hold, for |m| < width, width - |m| pairs of frames that are delay + m apart.
    """
    shifts = np.arange(1 - width, width)
    pairs = (width - np.abs(shifts)) / width**2
    return sum(n * g2(truth, (delay + m) * frame_time, truth["rate"]) for n, m in zip(pairs, shifts, strict=True))
