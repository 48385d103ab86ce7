"""One result file per run, written when the run stops; what stands in it: `stream.sinks.nxxpcs`."""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any, Self

import h5py

from stream.errors import ConfigError, SinkError
from stream.messages import Output, Result, RunStart, RunStop
from stream.sinks import nxxpcs

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    start: RunStart
    announced: datetime
    results: dict[str, Result] = field(default_factory=dict)


class Hdf5Sink:
    """Write one result file per run when it stops.

    Only final results are used; of those of one operator the one that knows most frames.

    Parameters
    ----------
    path
        The file. ``{run}`` stands for the name of the run. A file there of another run is left alone; the new one is
        then called ``<stem>_<run><suffix>``, and if that is taken too, numbered. pyXpcsViewer lists .h5 and .hdf only.
    qmap
        What stands under /xpcs/qmap by name: arrays, numbers, lists of str as pySimpleMask names them, and
        "attributes", a map with "hash".
    configuration
        Text kept in the file.
    on_written
        Is told the name of every file once it is on disk.

    Raises
    ------
    ConfigError
        The map lacks something that pyXpcsViewer needs.
    SinkError
        No file can be written there.
    """

    def __init__(
        self,
        path: Path,
        *,
        qmap: Mapping[str, Any],
        configuration: str = "",
        on_written: Callable[[Path], None] = lambda _: None,
    ) -> None:
        if lacking := nxxpcs.lacking(qmap):
            raise ConfigError(f"qmap for {path} lacks {', '.join(lacking)}")
        self._path = path
        self._qmap = qmap
        self._configuration = configuration
        self._on_written = on_written
        self._runs: dict[str, _Run] = {}
        _try_to_write(path)

    def __enter__(self) -> Self:
        """Return the sink."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no file is open between two calls."""

    def write(self, output: Output) -> None:
        """Remember the run and its final results; write the file at its RunStop.

        Raises
        ------
        SinkError
            The file cannot be written, or a result does not fit the map.
        """
        run = self._runs.get(output.run)
        match output:
            case RunStart():
                self._runs[output.run] = _Run(output, _announced(output))
            case Result(final=True) if run:
                held = run.results.get(output.operator)
                if held is None or held.n_frames <= output.n_frames:
                    run.results[output.operator] = output
            case RunStop() if run:
                self._save(run, output)
                del self._runs[output.run]

    def flush(self) -> None:
        """Do nothing: a file is on disk when `write` returns."""

    def _save(self, run: _Run, stop: RunStop) -> None:
        image = nxxpcs.file_image(
            run.start,
            stop,
            run.results,
            qmap=self._qmap,
            configuration=self._configuration,
            announced=run.announced,
            date=datetime.now(UTC),
        )
        target = self._path
        try:
            target = file_of(self._path, run.start)
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace(target, image)
        except OSError as error:
            raise SinkError(f"{target}: {error.strerror or error}") from error
        self._on_written(target)


def _try_to_write(path: Path) -> None:
    """Find out before the beam is on, not when the run is over."""
    fixed = path.parents[sum("{run}" in str(parent) for parent in path.parents)]
    try:
        fixed.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=fixed):
            pass
    except OSError as error:
        raise SinkError(f"{path}: {error.strerror or error}") from error


def _announced(start: RunStart) -> datetime:
    with suppress(TypeError, ValueError):
        return datetime.fromisoformat(start.metadata.get("announced", ""))
    return datetime.now(UTC)


def file_of(path: Path, start: RunStart) -> Path:
    """Return where the result of a run is, or comes: the first name that is not taken by another one."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", start.run)[:80]
    if name != start.run or not name[:1].isalnum():
        name = f"run_{name}_{sha256(start.run.encode('utf-8', 'replace')).hexdigest()[:8]}"
    first = Path(str(path).replace("{run}", name))
    second = first.with_name(f"{first.stem}_{name}{first.suffix}")
    others = (second.with_stem(f"{second.stem}_{n}") for n in count(2))
    return next(target for target in chain((first, second), others) if _is_ours(target, start))


def _is_ours(path: Path, start: RunStart) -> bool:
    """Tell whether there is no file, or an earlier one of this very run.

    Names of runs may come again (a Dectris detector that is restarted counts its V1 series from 1): then the time that
    the run started must be the same, where it is told.
    """
    if not path.exists():
        return True
    run = began = ""
    with suppress(OSError, KeyError, TypeError, AttributeError), h5py.File(path) as file:
        run = file["entry/entry_identifier"].asstr()[()]
        began = file["entry/start_time"].asstr()[()]
    if run == start.run and began == start.metadata.get("start_time", began):
        return True
    logger.warning(
        "%s is kept: it belongs to %s, not to run %s", path, f"run {run} of {began}" if run else "no run", start.run
    )
    return False


def _replace(target: Path, image: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
