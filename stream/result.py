"""Results as programs at beamlines write them, read into one form.

=============  =======================================================================================================
`formats`      what tells it
=============  =======================================================================================================
xpcs-stream    ``/xpcs/multitau``, and ``/xpcs/program`` says so; see `stream.sinks.nxxpcs`
boost_corr     ``/xpcs/multitau`` of boost_corr, or of any other program whose results pyXpcsViewer opens
APS NXcanSAS   ``/entry/XPCS/data``: g2, g2_errors, t_el, ql_dyn; APS 8-ID-I until 2021
=============  =======================================================================================================
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  results may be stored with any of its filters
import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError
from stream.operators import roimap_file
from stream.operators.roimap import RoiMap

MAX_SIZE = 1 << 27
"""Numbers that are read at once, of g2 or of one two-time correlation."""

MAX_BRIEF = 1 << 20
"""Numbers that are read of g2 where many results are."""

_PER_ANGSTROM: Mapping[str, float] = {
    **dict.fromkeys(("1/angstrom", "angstrom^-1", "1/a", "a^-1", "a-1", "1/å", "å^-1", "å⁻¹", "å-1"), 1.0),
    **dict.fromkeys(("1/nm", "nm^-1", "nm⁻¹", "nm-1"), 0.1),
}
_SECONDS: Mapping[str, float] = {"s": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoTimes:
    """Where the two-time correlations of a result stand; `c2` reads one of them."""

    path: Path
    names: tuple[str, ...]
    bins: NDArray[np.int64]
    """(n_processed,) Dynamic bins, from 1."""
    time: NDArray[np.float64]
    """(n_times,) Start of each time (s)."""
    step: float
    """From one time to the next (s)."""

    def c2(self, i: int) -> NDArray[np.float32]:
        """Read the correlation of ``bins[i]``, (n_times, n_times): upper half as written, NaN below the diagonal.

        Raises
        ------
        ConfigError
            It cannot be read, or is not of that shape.
        """
        n = len(self.time)
        with opened(self.path) as file:
            c2 = np.asarray(_read(file, self.names[i], (n, n)), np.float32)
        c2[np.tril_indices(n, -1)] = np.nan
        return c2


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """g2 of successive parts of a run, from early to late; see `stream.operators.stability`."""

    start: NDArray[np.float64]
    """(n_segment,) s from the first frame."""
    stop: NDArray[np.float64]
    """(n_segment,) s, NaN if not told."""
    g2: NDArray[np.float64]
    """(n_segment, n_delay, n_bin), NaN if unknown."""
    g2_err: NDArray[np.float64]
    """The same."""

    @property
    def late(self) -> int:
        """The last one that is not much shorter than the first: of one that has just begun little is known."""
        length = self.stop - self.start
        return int(np.flatnonzero(~(length < length[0] / 2))[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """g2 of a result, whoever wrote it."""

    path: Path
    format: str
    """One of those above."""
    run: str
    facts: Mapping[str, object]
    """What else the file tells of the run: frames, lost, ..., start."""
    map_digest: str
    tau: NDArray[np.float64]
    """(n_delay,) s, ascending."""
    q: NDArray[np.float64]
    """(n_bin,) 1/angstrom, NaN if not told."""
    phi: NDArray[np.float64]
    """(n_bin,) degree, NaN if not told."""
    g2: NDArray[np.float64]
    """(n_delay, n_bin), NaN if unknown."""
    g2_err: NDArray[np.float64]
    """(n_delay, n_bin), NaN if unknown."""
    n_pairs: NDArray[np.float64]
    """(n_delay,) pairs of frames, NaN if not told."""
    converted: tuple[str, ...]
    """What stands in the file in other units than here."""
    twotime: TwoTimes | None
    segments: Segments | None = None
    """None where fewer than two are told of."""

    def named(self, index: int) -> str:
        """Return how people call a bin: by its q, and its phi where these differ, or by its number."""
        if not np.isfinite(self.q[index]):
            return f"bin {index + 1}"
        phi = self.phi[np.isfinite(self.phi)]
        azimuth = f", phi = {self.phi[index]:.4g}°" if np.unique(phi).size > 1 else ""
        return f"q = {self.q[index]:.4g} Å⁻¹{azimuth}"


def read(path: Path) -> Curves:
    """Read a result file.

    Raises
    ------
    ConfigError
        It cannot be opened, is of no format above, or what it holds does not fit together: the message names it.
    RoiMapError
        Its map of pixels to bins is unusable.
    """
    with opened(path) as file:
        for group, reader in _READERS.items():
            if isinstance(file.get(group), h5py.Group):
                return reader(path, file)
        reason = f"none of {', '.join(f'/{group}' for group in _READERS)} is there"
        if "xpcs/twotime" in file:
            reason = "it holds a two-time correlation only"
    raise ConfigError(f"{path} is not a result with g2 that is known here: {reason}")


def brief(path: Path) -> Curves:
    """Read what is small in a result of ours: not its map, so that `map_digest` is empty. Facts: sample, written, too.

    Raises
    ------
    ConfigError
        It cannot be read, is not of ours, or g2 is not small.
    """
    with opened(path) as file:
        if _text(file, "xpcs/program") != "xpcs-stream" or "xpcs/multitau/tau" not in file:
            raise ConfigError(f"{path} is not a result of xpcs-stream")
        size = _dataset(file, "xpcs/multitau/normalized_g2").size or 0
        if size > MAX_BRIEF:
            raise ConfigError(f"{path}: g2 has {size} numbers, more than {MAX_BRIEF}")
        g2 = _read(file, "xpcs/multitau/normalized_g2", (None, None))
        unknown = np.full(g2.shape[1], np.nan)
        named = file.get("entry/data/v_dim0")
        is_q = named is not None and named.attrs.get("long_name") == "q"
        q = _read(file, "entry/data/v_dim0", unknown.shape) if is_q else unknown
        return _curves(
            path,
            format="xpcs-stream",
            run=_text(file, "entry/entry_identifier") or path.stem,
            facts=_facts(file) | {"sample": _text(file, "entry/sample/name"), "written": _text(file, "xpcs/date")},
            map_digest="",
            tau=_read(file, "xpcs/multitau/tau", (len(g2),)),
            q=q * (_factor(_PER_ANGSTROM, _unit(file, "entry/data/v_dim0", "1/angstrom"), "q") if is_q else 1.0),
            phi=unknown,
            g2=g2,
            g2_err=_read(file, "xpcs/multitau/normalized_g2_err", g2.shape),
            n_pairs=_read(file, "xpcs/multitau/n_pairs", (len(g2),)) if "xpcs/multitau/n_pairs" in file else None,
            converted=(),
            twotime=None,
        )


def opened(path: Path) -> h5py.File:
    """Open a file to read it.

    Raises
    ------
    ConfigError
        It is not there, or no HDF5 file.
    """
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from error


def _of_multitau(path: Path, file: h5py.File) -> Curves:
    ours = _text(file, "xpcs/program") == "xpcs-stream"
    roimap = roimap_file.read(path)
    g2 = _read(file, "xpcs/multitau/normalized_g2", (None, roimap.n_dynamic))
    frame_time = _number(file, "entry/instrument/detector_1/frame_time")
    if "xpcs/multitau/tau" in file:
        tau = _read(file, "xpcs/multitau/tau", (len(g2),))
    else:
        step = _step(file, "xpcs/multitau", frame_time)
        tau = np.ravel(_read(file, "xpcs/multitau/delay_list", None)) * step
    q, converted = _q_of(file, roimap)
    return _curves(
        path,
        format="xpcs-stream" if ours else "boost_corr",
        run=_text(file, "entry/entry_identifier") or path.stem,
        facts=_facts(file),
        map_digest=roimap.digest,
        tau=tau,
        q=q,
        phi=roimap.dynamic_phi,
        g2=g2,
        g2_err=_read(file, "xpcs/multitau/normalized_g2_err", g2.shape),
        n_pairs=_read(file, "xpcs/multitau/n_pairs", (len(g2),)) if "xpcs/multitau/n_pairs" in file else None,
        converted=converted,
        twotime=_twotime(path, file, frame_time),
        segments=_segments(file, g2.shape, frame_time),
    )


def _of_nxcansas(path: Path, file: h5py.File) -> Curves:
    roimap = roimap_file.read(path)
    data = "entry/XPCS/data"
    g2 = _read(file, f"{data}/g2", (None, roimap.n_dynamic))
    of_q, of_time = _unit(file, f"{data}/ql_dyn", "1/angstrom"), _unit(file, f"{data}/t_el", "s")
    tau = np.ravel(_read(file, f"{data}/t_el", None)) * _factor(_SECONDS, of_time, f"{data}/t_el")
    return _curves(
        path,
        format="APS NXcanSAS",
        run=_text(file, "entry/SAXS_1D/run") or path.stem,
        facts={"start": _text(file, "entry/metadata/start_time") or "not told"},
        map_digest=roimap.digest,
        tau=tau,
        q=roimap.dynamic_q * _factor(_PER_ANGSTROM, of_q, f"{data}/ql_dyn"),
        phi=roimap.dynamic_phi,
        g2=g2,
        g2_err=_read(file, f"{data}/g2_errors", g2.shape),
        n_pairs=None,
        converted=_converted(q=(_PER_ANGSTROM, of_q), tau=(_SECONDS, of_time)),
        twotime=None,
    )


_READERS: Mapping[str, Callable[[Path, h5py.File], Curves]] = {
    "xpcs/multitau": _of_multitau,
    "entry/XPCS/data": _of_nxcansas,
}


def _curves(
    path: Path,
    *,
    tau: NDArray[Any],
    q: NDArray[Any],
    phi: NDArray[Any],
    g2: NDArray[Any],
    g2_err: NDArray[Any],
    n_pairs: NDArray[Any] | None,
    **told: Any,
) -> Curves:
    if len(tau) != len(g2):
        raise ConfigError(f"{path}: there are {len(tau)} delays, but g2 has {len(g2)}")
    # Ours has two delays at least, which are NaN where no pair of frames came; see `stream.sinks.nxxpcs`.
    if not (np.isfinite(tau).all() and (tau > 0).all() and (np.diff(tau) > 0).all()):
        raise ConfigError(f"{path}: delays are not above 0 and ascending: {tau[:8]}")
    return Curves(
        path=path,
        tau=tau.astype(np.float64),
        q=q.astype(np.float64),
        phi=phi.astype(np.float64),
        g2=g2.astype(np.float64),
        g2_err=g2_err.astype(np.float64),
        n_pairs=np.full(len(tau), np.nan) if n_pairs is None else n_pairs.astype(np.float64),
        **told,
    )


def _facts(file: h5py.File) -> dict[str, object]:
    facts: dict[str, object] = {}
    if "xpcs/n_frames" in file:
        facts["frames"] = int(_number(file, "xpcs/n_frames"))
    for name in ("lost", "late", "duplicate", "undecodable", "from_file"):
        if f"xpcs/ledger/{name}" in file:
            facts[name] = int(_number(file, f"xpcs/ledger/{name}"))
    for name, place in (("exit status", "xpcs/exit_status"), ("start", "entry/start_time")):
        if text := _text(file, place):
            facts[name] = text
    return facts


def _twotime(path: Path, file: h5py.File, frame_time: float) -> TwoTimes | None:
    maps = file.get("xpcs/twotime/correlation_map")
    if not isinstance(maps, h5py.Group) or not len(maps):
        return None
    names = tuple(f"xpcs/twotime/correlation_map/{name}" for name in sorted(maps))
    bins = np.ravel(_read(file, "xpcs/twotime/processed_bins", None)).astype(np.int64)
    if len(bins) != len(names):
        raise ConfigError(f"{path}: {len(bins)} processed_bins, but {len(names)} two-time correlations")
    step = _step(file, "xpcs/twotime", frame_time)
    first = _number(file, "xpcs/twotime/first") * frame_time if "xpcs/twotime/first" in file else 0.0
    n_times = _dataset(file, names[0]).shape[0]
    return TwoTimes(path=path, names=names, bins=bins, time=first + step * np.arange(n_times), step=step)


def _segments(file: h5py.File, shape: tuple[int, ...], frame_time: float) -> Segments | None:
    partial = "xpcs/multitau/normalized_g2_partial"
    if partial not in file:
        return None
    start = np.ravel(_read(file, f"{partial}_labels", None)).astype(np.float64)
    n = len(start)
    if n < 2:
        return None
    stop = np.append(start[1:], np.nan)
    if "xpcs/multitau/segment_stop" in file:
        stop = _read(file, "xpcs/multitau/segment_stop", (n,)).astype(np.float64)
    g2, g2_err = (_read(file, name, (n, *shape)).astype(np.float64) for name in (partial, f"{partial}_err"))
    return Segments(start=start * frame_time, stop=stop * frame_time, g2=g2, g2_err=g2_err)


def _step(file: h5py.File, group: str, frame_time: float) -> float:
    """Return the time between the frames that were correlated: some were left out, or averaged."""
    names = [f"{group}/config/{name}" for name in ("stride_frame", "avg_frame")]
    return float(np.prod([_number(file, name) for name in names if name in file]) * frame_time)


def _q_of(file: h5py.File, roimap: RoiMap) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    names, units = (roimap.qmap.get(name, (default,)) for name, default in (("map_names", "q"), ("map_units", "Å⁻¹")))
    if not len(names) or names[0] != "q" or not np.isfinite(roimap.dynamic_q).any():
        return np.full(roimap.n_dynamic, np.nan), ()
    unit = str(units[0])
    factor = _factor(_PER_ANGSTROM, unit, f"{file.filename}: q")
    return roimap.dynamic_q * factor, _converted(q=(_PER_ANGSTROM, unit))


def _converted(**units: tuple[Mapping[str, float], str]) -> tuple[str, ...]:
    return tuple(f"{name} is in {unit}" for name, (known, unit) in units.items() if known[unit.lower()] != 1)


def _factor(known: Mapping[str, float], unit: str, what: str) -> float:
    try:
        return known[unit.lower()]
    except KeyError:
        raise ConfigError(f'{what} is in "{unit}", which is not known; {", ".join(known)} are') from None


def _unit(file: h5py.File, name: str, default: str) -> str:
    return str(_dataset(file, name).attrs.get("units", default))


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ConfigError(f"{file.filename} has no {name}")
    if dataset.shape is None or (dataset.size or 0) > MAX_SIZE:
        raise ConfigError(f"{file.filename}: {name} has {dataset.size} elements, more than {MAX_SIZE}")
    return dataset


def _read(file: h5py.File, name: str, shape: tuple[int | None, ...] | None) -> NDArray[Any]:
    """Read numbers; None in a shape is any length, and None for it any shape."""
    dataset = _dataset(file, name)
    if dataset.dtype.kind not in "biuf":
        raise ConfigError(f"{file.filename}: {name} holds {dataset.dtype}, not numbers")
    if shape is not None and (
        len(shape) != dataset.ndim or any(n not in (None, m) for n, m in zip(shape, dataset.shape, strict=True))
    ):
        raise ConfigError(f"{file.filename}: {name} is {dataset.shape}, not {shape}")
    try:
        return np.asarray(dataset[()])
    except OSError as error:
        raise ConfigError(f"{file.filename}: {name} cannot be read: {error}") from error


def _number(file: h5py.File, name: str) -> float:
    values = _read(file, name, None)
    if values.size != 1 or not np.isfinite(values).all():
        raise ConfigError(f"{file.filename}: {name} is {values}, not one number")
    return float(values.item())


def _text(file: h5py.File, name: str) -> str:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset) or dataset.shape != () or not h5py.check_string_dtype(dataset.dtype):
        return ""
    return str(dataset.asstr(errors="replace")[()])
