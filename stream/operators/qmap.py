"""Bins of equal q and azimuth from the geometry of a detector that stands upright in the direct beam."""

from math import isfinite, pi

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, RoiMapError
from stream.operators.roimap import MAX_SIZE, RoiMap

HC = 12.398419843320026
"""Planck's constant times the speed of light (keV angstrom), exact since the SI of 2019."""

PLAUSIBLE = {
    "beam_center_x": (-1e5, 1e5, "pixel"),
    "beam_center_y": (-1e5, 1e5, "pixel"),
    "detector_distance": (1e-3, 1e3, "m"),
    "pixel_size": (1e-7, 1e-2, "m"),
    "incident_energy": (1e-2, 1e3, "keV"),
}
"""Outside of these a number was given in another unit."""


def ring_map(
    *,
    shape: tuple[int, int],
    beam_center_x: float,
    beam_center_y: float,
    detector_distance: float,
    pixel_size: float,
    incident_energy: float,
    mask: NDArray[np.bool_] | None = None,
    n_static: int,
    n_dynamic: int,
    n_phi: int = 1,
    q_min: float | None = None,
    q_max: float | None = None,
) -> RoiMap:
    """Divide a detector into rings equally spaced in q, and these into sectors.

    Every dynamic ring is made of n_static / n_dynamic neighbouring static rings. Bins without pixels are left out, and
    the numbering is pySimpleMask's: rings from the inside out, in each of them sectors from azimuth -180 degree on,
    which counts from the direction of growing columns towards that of falling rows.

    Parameters
    ----------
    shape
        Rows and columns of the detector.
    beam_center_x, beam_center_y
        Column and row of the direct beam (pixel); the centre of the first pixel is (0, 0).
    detector_distance, pixel_size
        From the sample, and of square pixels (m).
    incident_energy
        Photon energy (keV).
    mask
        True where a pixel may be used; every pixel if None.
    n_static, n_dynamic
        Number of rings, the first a multiple of the second.
    n_phi
        Number of sectors of every ring.
    q_min, q_max
        Inner and outer edge (1/angstrom); what the pixels in use cover if None.

    Raises
    ------
    ConfigError
        A number cannot be meant; it is named.
    RoiMapError
        No pixel is left.
    """
    geometry = {
        "beam_center_x": beam_center_x,
        "beam_center_y": beam_center_y,
        "detector_distance": detector_distance,
        "pixel_size": pixel_size,
        "incident_energy": incident_energy,
    }
    _check_geometry(geometry)
    _check_bins(shape, n_static, n_dynamic, n_phi)
    used = np.ones(shape, np.bool_) if mask is None else np.asarray(mask, np.bool_)
    if used.shape != tuple(shape):
        raise ConfigError(f"mask is {used.shape}, the detector is {shape}")
    if not used.any():
        raise RoiMapError("the mask leaves no pixel")

    q, phi = _q_and_phi(shape, **geometry)
    low = float(q[used].min()) if q_min is None else q_min
    high = float(q[used].max()) if q_max is None else q_max
    if not (isfinite(low) and isfinite(high) and 0 <= low < high):
        raise ConfigError(f"q from {low} to {high} 1/angstrom is no range")
    inside = used & (q >= low) & (q <= high)
    if not inside.any():
        raise RoiMapError(
            f"no pixel in use has q from {low} to {high} 1/angstrom; the detector has {q.min()} to {q.max()}"
        )

    ring = np.minimum((q[inside] - low) / (high - low) * n_static, n_static - 1).astype(np.int64)
    sector = ((phi[inside] + 180) / 360 * n_phi).astype(np.int64) % n_phi
    maps = {}
    qmap = {
        "mask": used,
        "map_names": ["q", "phi"],
        "map_units": ["Å⁻¹", "deg"],
        "beam_center_x": beam_center_x,
        "beam_center_y": beam_center_y,
        "detector_distance": detector_distance,
        "pixel_size": pixel_size,
        "energy": incident_energy,
    }
    for kind, n_rings in (("static", n_static), ("dynamic", n_dynamic)):
        on_grid = ring // (n_static // n_rings) * n_phi + sector
        filled = np.bincount(on_grid, minlength=n_rings * n_phi) > 0
        roi_map = np.zeros(shape, np.int32)
        roi_map[inside] = np.cumsum(filled)[on_grid]
        maps[f"{kind}_roi_map"] = roi_map
        qmap |= {
            f"{kind}_index_mapping": np.flatnonzero(filled),
            f"{kind}_num_pts": np.array([n_rings, n_phi]),
            f"{kind}_v_list_dim0": low + (np.arange(n_rings) + 0.5) * (high - low) / n_rings,
            f"{kind}_v_list_dim1": -180 + (np.arange(n_phi) + 0.5) * 360 / n_phi,
        }
    return RoiMap(**maps, qmap=qmap)


def _q_and_phi(
    shape: tuple[int, int],
    *,
    beam_center_x: float,
    beam_center_y: float,
    detector_distance: float,
    pixel_size: float,
    incident_energy: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return q = 4 pi / lambda sin(theta / 2), theta the scattering angle (1/angstrom), and the azimuth (degree)."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    x, y = x - beam_center_x, y - beam_center_y
    theta = np.arctan2(np.hypot(x, y) * pixel_size, detector_distance)
    return 4 * pi * incident_energy / HC * np.sin(theta / 2), np.degrees(np.arctan2(-y, x))


def _check_geometry(geometry: dict[str, float]) -> None:
    for name, value in geometry.items():
        lowest, highest, unit = PLAUSIBLE[name]
        if not lowest <= value <= highest:
            raise ConfigError(f"{name} {value} {unit} is not between {lowest:g} and {highest:g} {unit}")


def _check_bins(shape: tuple[int, int], n_static: int, n_dynamic: int, n_phi: int) -> None:
    rows, columns = shape
    if min(rows, columns) < 1 or rows * columns > MAX_SIZE:
        raise ConfigError(f"a detector of {rows} x {columns} pixels cannot be; at most {MAX_SIZE} pixels")
    if min(n_static, n_dynamic, n_phi) < 1 or n_static % n_dynamic:
        raise ConfigError(
            f"n_static {n_static}, n_dynamic {n_dynamic}, n_phi {n_phi}:"
            " all must be at least 1, n_static a multiple of n_dynamic"
        )
    if n_static * n_phi > rows * columns:
        raise ConfigError(f"n_static {n_static} times n_phi {n_phi} are more bins than the {rows * columns} pixels")
