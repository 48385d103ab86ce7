"""The files that the documents of runs point to, until a run is over and its files are complete: then it goes by file.

What documents told is on disk, so that neither a manager that is killed during a run loses them, nor one that is killed
before its files are complete.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

from pydantic import TypeAdapter

from hpc_bridge.bulk import Noticed
from hpc_bridge.bulk_files import run_of
from hpc_bridge.bulk_record import Known, Origin
from hpc_bridge.errors import BridgeError, ConfigError, RecordError
from hpc_bridge.section import Section
from hpc_bridge.transfer import MOST_FILES, File

_log = logging.getLogger(__name__)

MAX_RUNS = 64
"""That are not over, or not complete; of more the oldest is forgotten."""

MAX_URIS = 64
"""Of a run."""

_EVERY = 1.0
"""Between looks at files (s)."""


class _Pointed(Section):
    """A run, the files that its documents name, in their order, and when it ended."""

    uris: tuple[str, ...] = ()
    ended: float | None = None


_Record = TypeAdapter(dict[str, _Pointed])

_Complete = tuple[str, PurePosixPath, tuple[Known, ...]]
"""A run, the folder that its files are below, and these; none: of those that were told of none may be taken."""


class PointedFiles:
    """Of the runs of one beamline.

    Parameters
    ----------
    roots
        Directories as documents call them, and where they are here. Files elsewhere are not taken.
    record
        A file for what has to outlive the process.
    within
        How long after its end a run's files may take to be there (s).
    still
        A file that has not changed for so long (s) is taken to be complete.
    """

    def __init__(self, beamline: str, roots: Mapping[str, Path], record: Path, *, within: float, still: float) -> None:
        self._beamline, self._record, self._within, self._still = beamline, record, within, still
        self._roots = {PurePosixPath(called): path for called, path in roots.items()}
        self._runs = self._read()
        self._written = dict(self._runs)
        self._ended = self._those_that_ended()
        """What the thread looks at: never changed, but replaced."""
        self._found: SimpleQueue[_Complete] = SimpleQueue()
        self._seen: dict[str, tuple[Sequence[Known], float]] = {}
        self._complained: dict[str, str] = {}
        self._stop = Event()
        self._thread = Thread(target=self._watch, name=f"files of runs {beamline}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more; a disk that hangs is left to itself."""
        self._stop.set()
        self._thread.join(2)

    def points(self, run: str, uri: str) -> None:
        """Take note of a file of a run; a second time is no matter."""
        try:
            self._of_uri(uri)
        except ConfigError as error:
            _log.warning("%s: run %s: %s", self._beamline, run, error)
            return
        pointed = self._runs.get(run, _Pointed())
        if uri in pointed.uris:
            return
        if len(pointed.uris) == MAX_URIS:
            _log.warning("%s: run %s has more than %d files: %s is left", self._beamline, run, MAX_URIS, uri)
            return
        self._runs[run] = _Pointed(uris=(*pointed.uris, uri), ended=pointed.ended)
        if len(self._runs) > MAX_RUNS:
            oldest = next(iter(self._runs))
            del self._runs[oldest]
            _log.warning("%s: more than %d runs are on: the files of %s are left", self._beamline, MAX_RUNS, oldest)

    def ended(self, run: str, now: float) -> None:
        """Take note that a run is over, however it ended; a second time, or without files, is no matter."""
        pointed = self._runs.get(run)
        if pointed is not None and pointed.ended is None:
            self._runs[run] = _Pointed(uris=pointed.uris, ended=now)

    def keep(self) -> None:
        """Write down what changed.

        Raises
        ------
        RecordError
            It cannot be written.
        """
        if self._runs == self._written:
            return
        temporary = self._record.with_suffix(".new")
        try:
            with temporary.open("wb") as file:
                file.write(_Record.dump_json(self._runs))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._record)
        except OSError as error:
            raise RecordError(f"{self._record}: {error.strerror}") from None
        self._written = dict(self._runs)
        self._ended = self._those_that_ended()

    def look(self, now: float) -> list[Noticed]:
        """Return the runs that are complete, again and again until they are `taken`."""
        found = []
        while True:
            try:
                run, folder, files = self._found.get_nowait()
            except Empty:
                break
            if run in self._runs and files:
                found.append(
                    Noticed(beamline=self._beamline, run=run, origin=Origin.RUN_ENGINE, folder=folder, files=files)
                )
            else:
                self.taken(run)
        for run, pointed in list(self._runs.items()):
            if pointed.ended is not None and now - pointed.ended > self._within:
                _log.error("%s: run %s: its files did not come: %s", self._beamline, run, ", ".join(pointed.uris))
                self.taken(run)
        return found

    def taken(self, run: str) -> None:
        """Forget a run."""
        self._runs.pop(run, None)

    def _read(self) -> dict[str, _Pointed]:
        try:
            return _Record.validate_json(self._record.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RecordError(f"{self._record}: {error.strerror}") from None
        except ValueError:
            raise RecordError(f"{self._record}: it is no record of runs that point to files") from None

    def _those_that_ended(self) -> dict[str, tuple[str, ...]]:
        return {run: pointed.uris for run, pointed in self._runs.items() if pointed.ended is not None}

    def _of_uri(self, uri: str) -> tuple[Path, Path]:
        """Return the root of a ``file://localhost/path``, and where the file is here; links may yet lead elsewhere."""
        try:
            parts = urlsplit(uri)
        except ValueError:
            raise ConfigError(f"{uri[:200]!r} is no URI") from None
        there = PurePosixPath(unquote(parts.path))
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{uri[:200]!r} is not file://localhost/...")
        inside = [called for called in self._roots if there.is_relative_to(called)]
        if not inside or not str(there).isprintable():
            raise ConfigError(f"{uri[:200]!r} is in no directory of roots: {', '.join(map(str, self._roots))}")
        called = max(inside, key=lambda each: len(each.parts))
        return self._roots[called], self._roots[called] / there.relative_to(called)

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY):
            ended = self._ended
            self._seen = {run: seen for run, seen in self._seen.items() if run in ended}
            self._complained = {run: why for run, why in self._complained.items() if run in ended}
            for run, uris in ended.items():
                try:
                    self._look_at(run, uris)
                except (OSError, RuntimeError, BridgeError) as error:  # RuntimeError: links that go round
                    self._complain(run, str(error))

    def _look_at(self, run: str, uris: Sequence[str]) -> None:
        paths = dict.fromkeys(path for uri in uris for path in self._files(run, uri))
        if not paths:
            self._found.put((run, PurePosixPath("/"), ()))
            return
        if len(paths) > MOST_FILES:
            raise ConfigError(f"it has {len(paths):,} files; at most {MOST_FILES:,} go")
        folder = PurePosixPath(os.path.commonpath([path.parent for path in paths]))
        files = tuple(_known(path, folder) for path in paths)
        now = time.monotonic()
        before, since = self._seen.get(run, ((), now))
        if files != before:
            since = now
        self._seen[run] = files, since
        if now - since >= self._still:
            self._found.put((run, folder, files))

    def _files(self, run: str, uri: str) -> Iterator[Path]:
        """Give a file, and the parts beside it if it is a master; those that may not be taken are left, and said."""
        root, called = self._of_uri(uri)
        root, path = root.resolve(strict=True), called.resolve(strict=True)
        if not path.is_file():
            self._complain(run, f"{called} is no file: it is left")
            return
        _, folder, files = run_of(path)
        for file in files:
            part = Path(folder / file.name).resolve(strict=True)
            if part.is_relative_to(root) and part.is_file():
                yield part
            else:
                self._complain(run, f"{folder / file.name} is no file in {root}: it is left")

    def _complain(self, run: str, why: str) -> None:
        if self._complained.get(run) != why:
            _log.warning("%s: run %s: %s", self._beamline, run, why)
        self._complained[run] = why


def _known(path: Path, folder: PurePosixPath) -> Known:
    found, name = path.stat(), str(PurePosixPath(path).relative_to(folder))
    try:
        File(name=name, size=found.st_size, sha256="0" * 64)  # what will be asked for has to be one that can be
    except ValueError:
        raise ConfigError(f"{name!r} cannot be the name of a file that goes") from None
    return Known(name, found.st_size, found.st_mtime_ns)
