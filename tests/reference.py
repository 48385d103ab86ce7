"""Everything that the operators compute, once more, from the definition and not fast.

Integer sums are Python integers (dtype object), so they never round; divisions come last.
"""

import numpy as np


def delays(n_frames, d, levels):
    """Level and delay in coarse frames of every delay that a pair of n_frames can have (APS convention)."""
    for level in range(levels):
        for k in range(1 if level == 0 else d + 1, 2 * d + 1):
            if k < n_frames >> level:
                yield level, k


def first_bad(frames, came, saturation_value):
    """(n_pixel,) the frame in which each pixel leaves; the number of frames if it stays."""
    n = len(frames)
    if saturation_value is None:
        return np.full(frames.shape[1], n)
    bad = (frames > saturation_value) & came[:, None]
    return np.where(bad.any(axis=0), bad.argmax(axis=0), n)


def multitau(frames, static, dynamic_of_static, *, d=4, levels=16, came=None, saturation_value=None, within=None):
    """Multi-tau of frames (n, n_pixel), all of them, also those that did not come (came[i] is False).

    static (n_pixel,) static bin from 1, 0 outside; dynamic_of_static (n_static,). Of pairs only those count whose later
    coarse frame ends after the first and not after the second of `within`.
    Returns a dict as the operator does, plus g2_static (n_delay, n_static) and g2_err for both definitions.
    """
    frames = np.asarray(frames).reshape(len(frames), -1)
    n, n_pixel = frames.shape
    came = np.ones(n, bool) if came is None else np.asarray(came)
    leaves = first_bad(frames, came, saturation_value)
    present = came[:, None] & (np.arange(n)[:, None] < leaves)
    counts = np.where(present, frames, 0).astype(object)
    n_static, n_dynamic = len(dynamic_of_static), max(dynamic_of_static)
    out = {
        name: [] for name in ("delay", "n_pairs", "G2", "IP", "IF", "g2_static", "g2", "g2_err_static", "g2_err_pixel")
    }
    for level, k in delays(n, d, levels):
        size = 2**level
        n_coarse = n // size
        c = counts[: n_coarse * size].reshape(n_coarse, size, n_pixel).sum(axis=1)
        w = came[: n_coarse * size].reshape(n_coarse, size).sum(axis=1).astype(object)
        end = (np.arange(k, n_coarse) + 1) * size
        counted = (end > within[0]) & (end <= within[1]) if within else np.ones(len(end), bool)
        ww = w[:-k] * w[k:] * counted
        # A pair counts for a pixel when the pixel was there until the end of the later coarse frame.
        pair = (end[:, None] <= leaves) & counted[:, None]
        sums = {
            "G2": (c[:-k] * c[k:] * pair).sum(axis=0),
            "IP": (c[:-k] * w[k:, None] * pair).sum(axis=0),
            "IF": (w[:-k, None] * c[k:] * pair).sum(axis=0),
            "N": (ww[:, None] * pair).sum(axis=0),
        }
        binned = {
            name: np.array([x[static == b + 1].sum() for b in range(n_static)], object) for name, x in sums.items()
        }
        g2_static = [ratio(b["G2"] * b["N"], b["IP"] * b["IF"]) for b in rows(binned)]
        g2_pixel = np.array([ratio(p["G2"] * p["N"], p["IP"] * p["IF"]) for p in rows(sums)])
        out["delay"].append(k * size)
        out["n_pairs"].append(ratio(ww.sum(), 4**level))
        out["g2_static"].append(g2_static)
        for name in ("G2", "IP", "IF"):
            out[name].append([ratio(b[name], b["N"]) for b in rows(binned)])
        groups = [np.array(g2_static)[np.asarray(dynamic_of_static) == q + 1] for q in range(n_dynamic)]
        out["g2"].append([finite(g).mean() if len(finite(g)) else np.nan for g in groups])
        out["g2_err_static"].append([standard_error(g) for g in groups])
        dynamic = np.concatenate([[0], dynamic_of_static])[static]
        out["g2_err_pixel"].append([standard_error(g2_pixel[dynamic == q + 1]) for q in range(n_dynamic)])
    width = {
        "delay": (),
        "n_pairs": (),
        "g2": (n_dynamic,),
        "g2_err_static": (n_dynamic,),
        "g2_err_pixel": (n_dynamic,),
    }
    return {
        name: np.array(values, float).reshape(len(values), *width.get(name, (n_static,)))
        for name, values in out.items()
    }


def multitau_segments(frames, static, dynamic_of_static, *, segments=8, shortest=256, **options):
    """The same of segments of the run: g2, g2_err_static (n_segment, n_delay, n_dynamic), n_pairs, start and stop."""
    n = len(frames)
    length = max(shortest, segment_length(n, segments))
    start = np.arange(0, n, length)
    stop = np.minimum(start + length, n)
    each = [
        multitau(frames, static, dynamic_of_static, within=span, **options) for span in zip(start, stop, strict=True)
    ]
    out = {name: np.array([told[name] for told in each]) for name in ("g2", "g2_err_static", "n_pairs")}
    beyond = each[0]["delay"] >= length
    out["g2"][:, beyond] = out["g2_err_static"][:, beyond] = np.nan
    out["n_pairs"][:, beyond] = 0
    return {**out, "start": start, "stop": stop}


def rows(columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def ratio(numerator, denominator):
    return float(numerator) / float(denominator) if denominator > 0 else np.nan


def finite(values):
    return values[np.isfinite(values)]


def standard_error(values):
    values = finite(np.asarray(values, float))
    return values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan


def present(frames, came, saturation_value):
    """(n, n_pixel) where a pixel counts: the frame came and the pixel has not left."""
    return came[:, None] & (np.arange(len(frames))[:, None] < first_bad(frames, came, saturation_value))


def segment_length(n_frames, capacity):
    """Frames per segment: the smallest power of two for which n_frames fit into `capacity` segments."""
    length = 1
    while -(-n_frames // length) > capacity:
        length *= 2
    return length


def mean(counts, where):
    """Mean of counts where `where`, NaN where there is none."""
    return ratio(int(counts[where].sum()), int(where.sum()))


def scattering(frames, static, n_static, *, came=None, saturation_value=None):
    """Mean image (n_pixel,), mean per static bin, and the same per segment, of frames (n, n_pixel)."""
    came = np.ones(len(frames), bool) if came is None else came
    here = present(frames, came, saturation_value)
    length = segment_length(len(frames), 20)
    starts = range(0, len(frames), length)
    bins = [static == b + 1 for b in range(n_static)]
    stays = first_bad(frames, came, saturation_value) == len(frames)
    return {
        "image": np.array([mean(frames[:, p], here[:, p]) if stays[p] else np.nan for p in range(frames.shape[1])]),
        "scattering_1d": np.array([mean(frames[:, b], here[:, b]) for b in bins]),
        "scattering_1d_segments": np.array(
            [[mean(frames[s : s + length, b], here[s : s + length, b]) for b in bins] for s in starts]
        ),
        "segment_start": np.array(starts),
    }


def intensity(frames, static, *, came=None, saturation_value=None):
    """Mean of the mapped pixels of each frame that came, of frames (n, n_pixel)."""
    came = np.ones(len(frames), bool) if came is None else came
    here = present(frames, came, saturation_value) & (static > 0)
    known = np.flatnonzero(here.any(axis=1))
    return {"frame": known, "intensity": np.array([mean(frames[t], here[t]) for t in known])}


def twotime(frames, static, dynamic_of_static, *, kept, levels, normalisation, came=None, saturation_value=None):
    """Two-time correlation of frames (n, n_pixel), level after level; see `multitau` for the arguments.

    Returns of each level a dict: first frame, frames per time, n_came (n_time,), c2 (n_dynamic, n_time, n_time).
    """
    n = len(frames)
    came = np.ones(n, bool) if came is None else came
    stays = first_bad(frames, came, saturation_value) == n
    counts = np.where(came[:, None], frames, 0).astype(object)
    out = []
    for level in range(levels):
        size = 2**level
        n_time = min(kept, n // size)
        first = n // size - n_time
        span = slice(first * size, (first + n_time) * size)
        c = counts[span].reshape(n_time, size, -1).sum(axis=1)
        n_came = came[span].reshape(n_time, size).sum(axis=1)
        c2 = []
        for q in range(1, max(dynamic_of_static) + 1):
            members = [b + 1 for b, of in enumerate(dynamic_of_static) if of == q]
            groups = [[b] for b in members] if normalisation == "static" else [members]
            pixels = [c[:, np.isin(static, group) & stays] for group in groups]
            c2.append([[mean_correlation(pixels, i, j) for j in range(n_time)] for i in range(n_time)])
        out.append({"first": first * size, "avg_frame": size, "n_came": n_came, "c2": np.array(c2, float)})
        if first == 0:
            break
    return out


def mean_correlation(pixels, i, j):
    """<c(i) c(j)> / (<c(i)> <c(j)>) of each group of pixels (n_time, n_pixel), their mean weighted with pixels."""
    values = [(ratio((c[i] * c[j]).sum() * c.shape[1], c[i].sum() * c[j].sum()), c.shape[1]) for c in pixels]
    known = [(value, n) for value, n in values if np.isfinite(value)]
    return ratio(sum(value * n for value, n in known), sum(n for _, n in known))


def along_diagonals(c2):
    """Mean of what is known of c2 (n_bin, n, n) at each delay, (n, n_bin)."""
    n = c2.shape[1]
    means = [[finite(np.array([c2[b, i, i + k] for i in range(n - k)])) for b in range(len(c2))] for k in range(n)]
    return np.array([[v.mean() if len(v) else np.nan for v in row] for row in means]).reshape(n, len(c2))


def age_cuts(c2, n_age):
    """Mean of c2 (n_bin, n, n) over the pairs of each band of ages and group of delays; see `stream.live.twotime`."""
    n_bin, n, _ = c2.shape
    band = [s * n_age // (2 * n - 1) for s in range(2 * n - 1)]
    widths = [1] * 8 + [2] * 4 + [4] * 4 + [8] * 4 + [16] * 4
    ends = np.cumsum(widths)
    groups = [range(end - width + 1, min(end + 1, n)) for end, width in zip(ends, widths, strict=True)]
    groups = [group for group in groups if len(group)]
    cuts = [
        [
            [
                finite(np.array([c2[b, i, i + k] for k in group for i in range(n - k) if band[2 * i + k] == a])).mean()
                if any(np.isfinite(c2[b, i, i + k]) for k in group for i in range(n - k) if band[2 * i + k] == a)
                else np.nan
                for group in groups
            ]
            for a in range(n_age)
        ]
        for b in range(n_bin)
    ]
    return {
        "ages": [np.mean([s / 2 for s in range(2 * n - 1) if band[s] == a]) for a in range(n_age)],
        "taus": [np.mean(group) for group in groups],
        "cuts": np.array(cuts).reshape(n_bin, n_age, len(groups)),
    }
