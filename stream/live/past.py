"""Runs of the last day, from their result files: a page that is started anew has them again."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from glob import escape
from pathlib import Path
from typing import Any

from stream.errors import XpcsStreamError
from stream.live.dynamics import Dynamics
from stream.live.section import floats, pack
from stream.live.view import MOST_TEXT, STATES
from stream.result import Curves, brief

_log = logging.getLogger(__name__)

MOST_FILES = 50
DAY = 86400.0
SUFFIXES = (".h5", ".hdf", ".hdf5", ".nxs")

Remember = Callable[[dict[str, Any], bytes], None]


def read_back(where: Path, remember: Remember, stop: threading.Event) -> None:
    """Read the newest results of the last day, the newest first; leave out what is none, or damaged.

    Parameters
    ----------
    where
        Directory of the files, or the name of a file with ``{run}`` in it for the run, as `stream.sinks.hdf5` takes it.
    """
    for path in newest(where):
        if stop.is_set():
            return
        try:
            curves = brief(path)
            ended = _ended(path, curves)
            law = Dynamics(curves.q).of({"tau": curves.tau, "g2": curves.g2, "g2_err": curves.g2_err})[0]["single"]
        # h5py raises all of these of damaged files.
        except (XpcsStreamError, OSError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            named = error if isinstance(error, XpcsStreamError) else f"{path}: {error!r}"
            _log.warning("an earlier run is not shown: %s", named)
            continue
        facts = {
            "run": curves.run[:MOST_TEXT],
            "start_time": str(curves.facts.get("start", ""))[:MOST_TEXT],
            "sample": str(curves.facts.get("sample", ""))[:MOST_TEXT],
            "state": STATES.get(str(curves.facts.get("exit status")), "complete"),
            "n_frames": curves.facts.get("frames", 0),
            "ended": ended,
            "diffusion": law["diffusion"],
            "diffusion_err": law["diffusion_err"],
        }
        arrays = {"tau": curves.tau, "g2": curves.g2, "g2_err": curves.g2_err, "n_pairs": curves.n_pairs}
        head = {"key": "", "n_frames": facts["n_frames"], "final": True}
        remember(facts, pack("g2", head, floats(arrays, *arrays)))


def newest(where: Path) -> list[Path]:
    """Return the newest files of the last day that may be results."""
    found: list[tuple[float, Path]] = []
    try:
        for path in _found(where):
            # Between looking and asking it may be replaced.
            with suppress(FileNotFoundError):
                if path.is_file() and (written := path.stat().st_mtime) > time.time() - DAY:
                    found.append((written, path))
    except OSError as error:
        _log.warning("earlier runs are not shown: %s: %s", where, error.strerror or error)
    return [path for _, path in sorted(found, reverse=True)[:MOST_FILES]]


def _found(where: Path) -> Iterator[Path]:
    if where.is_dir():
        yield from (path for path in where.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))
        return
    *parents, name = (escape(part).replace("{run}", "*") for part in where.parts)
    stem = name.removesuffix(where.suffix).removesuffix("*")
    parts = [*parents, f"{stem}*{where.suffix}"]
    fixed = next(i for i, part in enumerate(parts) if "*" in part)
    yield from Path(*where.parts[:fixed]).glob(str(Path(*parts[fixed:])))


def _ended(path: Path, curves: Curves) -> str:
    """Return when the run ended, in a form that sorts."""
    try:
        written = datetime.fromisoformat(str(curves.facts.get("written", "")))
    except ValueError:
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return written.astimezone(UTC).isoformat(timespec="seconds")
