"""Results for other tools: a plain table, NetCDF, Zarr.

CSV
    One line per bin and delay, in float64 that reads back bit for bit; what is not known is empty. The first line names
    the columns with their units, and nothing stands above it: so pandas and Excel read it as it is. Of each segment of
    the run two columns follow, named by its begin and end in s: g2_0_to_2.56_s, g2_err_0_to_2.56_s.
NetCDF, Zarr
    An xarray.Dataset, by h5netcdf or zarr: ``g2``, ``g2_err`` (delay, bin) over the coordinates ``tau`` and ``q``,
    ``phi``, with their units; ``c2`` (processed_bin, t1, t2) if a two-time correlation was made; ``g2_segments``,
    ``g2_err_segments`` (segment, delay, bin) of successive parts of the run, if there are some.
"""

import csv
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stream.errors import ConfigError
from stream.result import MAX_SIZE, Curves

if TYPE_CHECKING:
    import xarray

COLUMNS = ("bin", "q_per_angstrom", "phi_degree", "tau_s", "g2", "g2_err", "n_pairs")


def export(curves: Curves, to: Path) -> None:
    """Write a result to `to`, by its suffix: .csv, .nc or .zarr.

    Whoever reads `to` sees what was there before, or all of it. A file that is there is replaced; a .zarr, which is a
    directory, is not.

    Raises
    ------
    ConfigError
        The suffix is another, it cannot be written there, or xarray is not installed.
    """
    if to.suffix not in _WRITERS:
        raise ConfigError(f"{to}: results are exported to {', '.join(_WRITERS)}")
    if to.is_dir():
        raise ConfigError(f"{to}: is there, a directory; it is not replaced")
    partial = to.with_name(f".{to.stem}.{os.getpid()}.partial{to.suffix}")
    try:
        _WRITERS[to.suffix](curves, partial)
        partial.replace(to)
    except OSError as error:
        raise ConfigError(f"{to}: {error}") from error
    except ImportError as error:
        needs = f'{to}: {to.suffix} needs {error.name}: pip install "xpcs-stream[export]"'
        raise ConfigError(needs) from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def dataset(curves: Curves) -> "xarray.Dataset":
    """Return a result as an xarray.Dataset.

    Raises
    ------
    ImportError
        xarray is not installed.
    ConfigError
        The two-time correlation is too large, or cannot be read.
    """
    import xarray  # only who exports has it

    arrays: dict[str, Any] = {
        "g2": (("delay", "bin"), curves.g2, {"long_name": "g2"}),
        "g2_err": (("delay", "bin"), curves.g2_err, {"long_name": "standard error of g2"}),
        "n_pairs": (("delay",), curves.n_pairs, {"long_name": "pairs of frames"}),
    }
    coordinates: dict[str, Any] = {
        "bin": np.arange(1, len(curves.q) + 1),
        "tau": (("delay",), curves.tau, {"long_name": "delay", "units": "s"}),
        "q": (("bin",), curves.q, {"units": "1/angstrom"}),
        "phi": (("bin",), curves.phi, {"units": "degree"}),
    }
    if (twotime := curves.twotime) is not None:
        n = len(twotime.time)
        if len(twotime.names) * n**2 > MAX_SIZE:
            raise ConfigError(f"{curves.path}: {len(twotime.names)} two-time correlations of {n} x {n} are too large")
        c2 = np.stack([twotime.c2(i) for i in range(len(twotime.names))])
        arrays["c2"] = (("processed_bin", "t1", "t2"), c2, {"long_name": "two-time correlation, upper half"})
        coordinates |= {"processed_bin": twotime.bins}
        coordinates |= {name: ((name,), twotime.time, {"units": "s"}) for name in ("t1", "t2")}
    if (parts := curves.segments) is not None:
        arrays["g2_segments"] = (("segment", "delay", "bin"), parts.g2, {"long_name": "g2 of parts of the run"})
        arrays["g2_err_segments"] = (("segment", "delay", "bin"), parts.g2_err, {"long_name": "its standard error"})
        coordinates |= {"segment": np.arange(1, len(parts.start) + 1)}
        for name, values in (("segment_start", parts.start), ("segment_stop", parts.stop)):
            coordinates[name] = (("segment",), values, {"units": "s"})
    told = {name.replace(" ", "_"): value for name, value in curves.facts.items()}
    attributes = {"run": curves.run, "source": str(curves.path), "format": curves.format, **told}
    return xarray.Dataset(arrays, coordinates, attributes)


def _csv(curves: Curves, path: Path) -> None:
    # With a byte order mark Excel would know its encoding, and others would not know the first column: all is ASCII.
    with path.open("w", newline="", encoding="ascii") as file:
        lines = csv.writer(file)
        parts = curves.segments
        spans = [] if parts is None else list(zip(parts.start, parts.stop, strict=True))
        names = [f"{name}_{start:.9g}_to_{stop:.9g}_s" for start, stop in spans for name in ("g2", "g2_err")]
        lines.writerow([*COLUMNS, *names])
        for b in range(len(curves.q)):
            for d in range(len(curves.tau)):
                numbers = (
                    *(curves.q[b], curves.phi[b], curves.tau[d]),
                    *(curves.g2[d, b], curves.g2_err[d, b], curves.n_pairs[d]),
                    *(() if parts is None else np.stack([parts.g2[:, d, b], parts.g2_err[:, d, b]], axis=1).ravel()),
                )
                lines.writerow([b + 1, *("" if np.isnan(number) else repr(float(number)) for number in numbers)])


def _netcdf(curves: Curves, path: Path) -> None:
    import h5netcdf  # noqa: F401  whose absence xarray tells as a ValueError

    dataset(curves).to_netcdf(path, engine="h5netcdf")


def _zarr(curves: Curves, path: Path) -> None:
    import zarr  # noqa: F401

    dataset(curves).to_zarr(path, mode="w-", consolidated=False)


_WRITERS: Mapping[str, Callable[[Curves, Path], None]] = {".csv": _csv, ".nc": _netcdf, ".zarr": _zarr}
