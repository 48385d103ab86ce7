"""Photon counts of fluctuating speckle whose g2 is known.

The field of a pixel is E = sum_j sqrt(p_j) E_j; each E_j is complex Gaussian noise that forgets itself exponentially,
an AR(1) process with <E_j(t) E_j*(t + tau)> = exp(-Gamma f_j tau). The intensity I = mean (1 + sqrt(beta) (|E|^2 - 1))
then has, by the Siegert relation,

    g2(tau) = 1 + beta |g1(tau)|^2,    g1(tau) = sum_j p_j exp(-Gamma f_j tau),

and the counts are Poisson distributed around it, which changes g2 at tau = 0 only.

Every random number is a function of seed, run, pixel and frame (Philox, Salmon et al., doi:10.1145/2063384.2063405), so
that neither the size of the batches nor the number of threads changes a single count.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

MAX_MODES = 8

TILE = 4096
"""Pixels that one thread works on at a time: their state stays in its cache."""

BLOCK = 64
"""Pixels whose counts are searched for together; divides TILE."""

MANY = 30.0
"""Intensities above it are counted by rejection instead of by search."""


class Speckle:
    """The fields of all pixels in one run, moved on frame by frame.

    Parameters
    ----------
    intensity
        (rows, cols) Mean counts per frame.
    decay
        (n_modes, rows, cols) What each field loses in a frame: Gamma f_j frame_time.
    weights
        (n_modes,) Share of each field in the intensity.
    """

    def __init__(
        self,
        *,
        intensity: NDArray[np.floating[Any]],
        contrast: float,
        decay: NDArray[np.floating[Any]],
        weights: NDArray[np.float64],
        seed: np.random.SeedSequence,
    ) -> None:
        key, start = seed.spawn(2)
        self._key = key.generate_state(2, np.uint32).astype(np.uint64)
        self._intensity = _tiles(intensity)
        self._sqrt_contrast = np.float32(math.sqrt(contrast))
        self._loss = np.stack([_tiles(-np.expm1(-each)) for each in decay], axis=1)
        self._amplitude = np.sqrt(weights).astype(np.float32)
        field = np.random.default_rng(start).standard_normal((*self._loss.shape, 2), np.float32) * np.float32(0.5**0.5)
        self._re, self._im = field[..., 0].copy(), field[..., 1].copy()
        self.next_frame = 0

    def count(self, frames: NDArray[np.unsignedinteger[Any]], threads: ThreadPoolExecutor) -> None:
        """Move on by n frames and count their photons into `frames` (n, n_pixels)."""
        saturation_value = np.iinfo(frames.dtype).max - 1

        def work(tile: int) -> None:
            pixel = tile * TILE
            _count_tile(
                self._key,
                self.next_frame,
                pixel,
                self._re[tile],
                self._im[tile],
                self._loss[tile],
                self._amplitude,
                self._intensity[tile],
                self._sqrt_contrast,
                saturation_value,
                frames,
            )

        list(threads.map(work, range(len(self._intensity))))  # raises what a thread raised
        self.next_frame += len(frames)


def exponentials(stretch: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weights p and factors f, at most `MAX_MODES`, so that sum_j p_j exp(-f_j x) is about exp(-x^stretch).

    Non-negative least squares on log-spaced f, by multiplicative updates (Lee & Seung, Nature 401, 788 (1999)), for
    several widths of the spectrum; the best is at most 1.2 % off for x from 0 to 100.
    """
    if stretch == 1:
        return np.ones(1), np.ones(1)
    x = np.concatenate([[0.0], np.geomspace(1e-2, 1e2, 100)])
    wanted = np.exp(-(x**stretch))
    best = math.inf, np.ones(1), np.ones(1)
    for decades in np.geomspace(0.1, 3, 15):
        factors = np.logspace(-decades, decades, MAX_MODES)
        basis = np.exp(-np.outer(x, factors))
        overlap, target = basis.T @ basis, basis.T @ wanted
        weights = np.full(MAX_MODES, 1 / MAX_MODES)
        for _ in range(4000):
            weights *= target / (overlap @ weights)
        weights = np.where(weights < 1e-3, 0, weights)
        weights /= weights.sum()
        error = float(np.abs(basis @ weights - wanted).max())
        best = min(best, (error, weights[weights > 0], factors[weights > 0]), key=lambda fit: fit[0])
    return best[1], best[2]


def _tiles(pixels: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return (n_tiles, TILE), the last one filled up with zeros."""
    tiles = np.zeros((-(-pixels.size // TILE), TILE), np.float32)
    tiles.ravel()[: pixels.size] = pixels.ravel()
    return tiles


_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_UNIT = 2.0**-32


# Numba inlines it, since LLVM would do so only after it has given up vectorising the loop around the call.
@njit(nogil=True, cache=True, inline="always")
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Philox4x32-10: four random 32-bit words of a counter (c0..c3) and a key (k0, k1), each kept in a uint64."""
    for _ in range(10):
        even, odd = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (odd >> _HALF) ^ c1 ^ k0, odd & _LOW, (even >> _HALF) ^ c3 ^ k1, even & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@njit(nogil=True, cache=True)
def _count_tile(
    key: Any,
    first: Any,
    pixel: Any,
    re: Any,
    im: Any,
    loss: Any,
    amplitude: Any,
    mean: Any,
    sqrt_contrast: Any,
    saturation_value: Any,
    counts: Any,
) -> None:
    n_pixels = min(TILE, counts.shape[1] - pixel)
    noise_re, noise_im = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    sum_re, sum_im = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    uniform, intensity, found = np.empty(TILE), np.empty(TILE), np.empty(TILE, np.int32)
    for i in range(len(counts)):
        frame = np.uint64(first + i)
        sum_re[:] = 0
        sum_im[:] = 0
        for mode in range(len(amplitude)):
            _noise(key[0], key[1], pixel, frame, mode, noise_re, noise_im, uniform)
            _move(re[mode], loss[mode], noise_re, amplitude[mode], sum_re)
            _move(im[mode], loss[mode], noise_im, amplitude[mode], sum_im)
        for p in range(TILE):
            speckle = sum_re[p] * sum_re[p] + sum_im[p] * sum_im[p]
            intensity[p] = mean[p] * ((np.float32(1) - sqrt_contrast) + sqrt_contrast * speckle)
        _poisson(intensity, uniform, found)
        for p in range(n_pixels):
            if intensity[p] > MANY:
                found[p] = _poisson_by_rejection(intensity[p], key[0], key[1], pixel + p, frame)
        for p in range(n_pixels):
            counts[i, pixel + p] = min(found[p], saturation_value)


@njit(nogil=True, cache=True)
def _noise(k0: Any, k1: Any, pixel: Any, frame: Any, mode: Any, re: Any, im: Any, uniform: Any) -> None:
    """Complex Gaussian noise of variance 1 (Box and Muller 1958) and uniform noise, independent, for a tile."""
    radius = np.empty(TILE, np.float32)
    for p in range(TILE):
        r0, r1, r2, _ = philox(np.uint64(pixel + p), frame, np.uint64(mode), np.uint64(0), k0, k1)
        radius[p] = (np.float32(r0) + np.float32(0.5)) * np.float32(_UNIT)
        uniform[p] = np.float64(r2) * _UNIT
        # 30 bits give an angle of at most 45 degree, for which short Taylor series do; 2 bits turn it by quarters.
        angle = (np.float32(r1 >> np.uint64(2)) * np.float32(2.0**-30) - np.float32(0.5)) * np.float32(math.pi / 2)
        y = angle * angle
        s = angle * (np.float32(1) + y * (np.float32(-1 / 6) + y * (np.float32(1 / 120) + y * np.float32(-1 / 5040))))
        c = np.float32(1) + y * (
            np.float32(-1 / 2) + y * (np.float32(1 / 24) + y * (np.float32(-1 / 720) + y * np.float32(1 / 40320)))
        )
        sign = np.float32(1) - np.float32(r1 & np.uint64(2))
        turned = r1 & np.uint64(1)
        re[p] = sign * (-s if turned else c)
        im[p] = sign * (c if turned else s)
    for p in range(TILE):
        radius[p] = math.sqrt(-math.log(radius[p]))
    for p in range(TILE):
        re[p] *= radius[p]
        im[p] *= radius[p]


@njit(nogil=True, cache=True)
def _move(field: Any, loss: Any, noise: Any, amplitude: Any, total: Any) -> None:
    """Move one component of one field of a tile on by a frame and add it to the total."""
    for p in range(TILE):
        kick = math.sqrt(loss[p] * (np.float32(2) - loss[p]))
        moved = field[p] + (kick * noise[p] - loss[p] * field[p])
        field[p] = moved
        total[p] += amplitude * moved


@njit(nogil=True, cache=True)
def _poisson(intensity: Any, uniform: Any, found: Any) -> None:
    """Invert the Poisson distribution by search from 0 on, for `BLOCK` pixels at once so that it vectorises."""
    term, total = np.empty(BLOCK), np.empty(BLOCK)
    for begin in range(0, TILE, BLOCK):
        for p in range(BLOCK):
            # what is done elsewhere is found at once
            term[p] = math.exp(-intensity[begin + p]) if intensity[begin + p] <= MANY else 1.0
            total[p] = term[p]
            found[begin + p] = 0
        k, unfinished = 0.0, np.int32(1)
        while unfinished > 0:
            k += 1.0
            inverse = 1.0 / k
            unfinished = np.int32(0)
            for p in range(BLOCK):
                beyond = np.int32(uniform[begin + p] >= total[p])
                found[begin + p] += beyond
                unfinished += beyond
                term[p] *= intensity[begin + p] * inverse
                total[p] += term[p]


@njit(nogil=True, cache=True)
def _poisson_by_rejection(mean: Any, k0: Any, k1: Any, pixel: Any, frame: Any) -> Any:
    """Count by transformed rejection (PTRS, Hoermann, Insurance: Math. and Economics 12, 39 (1993)), for means > 10."""
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2)
    attempt = np.uint64(0)
    while True:
        attempt += np.uint64(1)
        r0, r1, _, _ = philox(np.uint64(pixel), frame, np.uint64(0), attempt, k0, k1)
        u, v = (np.float64(r0) + 0.5) * _UNIT - 0.5, (np.float64(r1) + 0.5) * _UNIT
        us = 0.5 - abs(u)
        k = math.floor((2 * a / us + b) * u + mean + 0.43)
        if us >= 0.07 and v <= v_r:
            return k
        if k < 0 or (us < 0.013 and v > us):
            continue
        if math.log(v * inverse_alpha / (a / (us * us) + b)) <= k * math.log(mean) - mean - math.lgamma(k + 1):
            return k
