"""g2 of successive parts of the run as the page shows it: see `stream.operators.stability`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.messages import Arrays


def segments(arrays: Arrays, frame_time: float) -> dict[str, NDArray[Any]] | None:
    """Return the section of a result of multi-tau; None if it tells of fewer than two parts.

    Returns
    -------
    tau : (n_delay,) <f8
        s; only the delays that parts have.
    g2, g2_err : (n_segment, n_delay, n_dynamic) <f4
    n_pairs : (n_segment, n_delay) <f8
    start, stop : (n_segment,) <f8
        s

    Raises
    ------
    ValueError
        They do not fit together.
    """
    start, stop = (np.asarray(arrays.get(f"segment_{name}", ()), "<f8") * frame_time for name in ("start", "stop"))
    if len(start) < 2:
        return None
    tau, g2, g2_err = (np.asarray(arrays[name]) for name in ("tau", "g2_segments", "g2_err_segments"))
    n_pairs = np.asarray(arrays["n_pairs_segments"], "<f8")
    if (
        n_pairs.shape != g2.shape[:2]
        or stop.shape != start.shape
        or g2.shape != g2_err.shape
        or g2.shape[:2] != (len(start), len(tau))
        or g2.ndim != 3
    ):
        raise ValueError(f"g2 of {len(start)} segments at {len(tau)} delays is {g2.shape}, its error {g2_err.shape}")
    known = np.isfinite(g2).any(axis=(0, 2))
    return {
        "tau": tau[known].astype("<f8"),
        "g2": g2[:, known].astype("<f4"),
        "g2_err": g2_err[:, known].astype("<f4"),
        "n_pairs": n_pairs[:, known],
        "start": start,
        "stop": stop,
    }
