"""What is done with the disks of this machine for runs that go by file, in threads of its own: a disk may hang."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, PriorityQueue, SimpleQueue
from threading import Event, Thread

from hpc_bridge.bulk import Hash, Order
from hpc_bridge.bulk_files import is_name, known, runs_of
from hpc_bridge.bulk_record import Known, Run
from hpc_bridge.transfer import MOST_FILES
from hpc_bridge.transfer_copy import sync
from hpc_bridge.transfer_digest import BLOCK, sha256

_log = logging.getLogger(__name__)

SAFE = "safe"
"""The file in the folder of a spooled run by which the gateway knows that it may remove the run."""

STILL = 5.0
"""A file that has not changed for so long (s) is taken to be complete."""

_EVERY = 1.0
"""Between looks at a drop folder (s)."""

MOST_COMPLAINTS = 20
"""Of what lies in a drop folder, at one look."""

_TELL = 5.0
"""Between tellings of how far the hashing of a run is (s)."""

SUFFIXES = (".h5", ".hdf5", ".hdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """What the files of a run are; `is_all`: of all of them."""

    key: tuple[str, str]
    files: tuple[Known, ...]
    is_all: bool


@dataclass(frozen=True, slots=True)
class Released:
    """The spool was told."""

    key: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Failed:
    """The disk would not do what was asked for a run."""

    key: tuple[str, str]
    why: str


Answer = Hashed | Released | Failed


class _Stopped(Exception):
    """The thread is to end."""


_Orders = PriorityQueue[tuple[int, float, int, Order]]


class Disk:
    """Carries out orders: of each beamline one of a kind at a time, that of the highest priority first.

    Beamlines do not wait for each other, since the disk of one may hang; nor does a spool that wants room wait until
    some long run is read.

    Attributes
    ----------
    read
        Bytes that are read already, of each run that is being read.
    """

    def __init__(self) -> None:
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.read: dict[tuple[str, str], int] = {}
        self._lanes: dict[tuple[str, type[Order]], tuple[_Orders, Thread]] = {}
        self._n = 0
        self._stop = Event()

    def close(self) -> None:
        """End; what is under way is begun again by the next one."""
        self._stop.set()
        deadline = time.monotonic() + 5
        for _, thread in self._lanes.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def order(self, order: Order) -> None:
        """Have something done."""
        lane = order.run.beamline, type(order)
        if lane not in self._lanes:
            orders: _Orders = PriorityQueue()
            thread = Thread(target=self._carry_out, args=(orders,), name=f"disk {order.run.beamline}", daemon=True)
            self._lanes[lane] = orders, thread
            thread.start()
        self._n += 1
        self._lanes[lane][0].put((-order.run.priority, order.run.created, self._n, order))

    def _carry_out(self, orders: _Orders) -> None:
        while not self._stop.is_set():
            try:
                *_, order = orders.get(timeout=0.2)
            except Empty:
                continue
            try:
                answer = self._hash(order.run) if isinstance(order, Hash) else _release(order.run)
            except OSError as error:
                answer = Failed(order.run.key, f"{error.filename or order.run.folder}: {error.strerror}")
            except ValueError as error:  # a name that no file can have
                answer = Failed(order.run.key, f"{order.run.folder}: {error}")
            except _Stopped:
                return
            if isinstance(order, Hash):
                self.read.pop(order.run.key, None)
            self.answers.put(answer)

    def _hash(self, run: Run) -> Answer:
        files: list[Known] = []
        told = time.monotonic()
        for n, file in enumerate(run.files):
            path = Path(run.folder / file.name)
            before = known(path)
            digest = file.sha256 if replace(before, name=file.name, sha256=file.sha256) == file else ""
            self.read[run.key] = sum(each.size for each in files)
            found = replace(before, name=file.name, sha256=digest or sha256(path, lambda: self._go_on(run.key)))
            if known(path) != before:
                return Failed(run.key, f"{path}: it is still written")
            files.append(found)
            if time.monotonic() - told > _TELL:
                told = time.monotonic()
                self.answers.put(Hashed(key=run.key, files=(*files, *run.files[n + 1 :]), is_all=False))
        return Hashed(key=run.key, files=tuple(files), is_all=True)

    def _go_on(self, key: tuple[str, str]) -> None:
        self.read[key] += BLOCK
        if self._stop.is_set():
            raise _Stopped


def _release(run: Run) -> Answer:
    folder = Path(run.folder)
    try:
        (folder / SAFE).touch()
        sync(folder)
    except FileNotFoundError:
        if not folder.parent.is_dir():  # the spool itself is away
            raise
        _log.warning("%s: the run is not there any more", folder)
    return Released(run.key)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A run was put into a drop folder."""

    beamline: str
    run: str
    folder: str
    files: tuple[Known, ...]


class DropFolder:
    """Watches a folder: a file that has a name of HDF5 and has not changed for a while is a run.

    It is told of once by each process, whoever asks knows what he has. Links are not followed: who may put something
    there may not read for that all that we may read.
    """

    def __init__(self, beamline: str, folder: Path, found: "SimpleQueue[Dropped]", *, still: float = STILL) -> None:
        self._beamline, self._folder, self._found, self._still = beamline, folder, found, still
        self._seen: dict[str, tuple[Sequence[Known], float]] = {}
        self._told: dict[str, Sequence[Known]] = {}
        self._complaints: set[str] = set()
        self._stop = Event()
        self._thread = Thread(target=self._watch, name=f"drop {beamline}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more; a folder that hangs is left to itself."""
        self._stop.set()
        self._thread.join(2)

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                complaints = set(self._look())
            except OSError as error:
                complaints = {f"{self._folder}: {error.strerror}"}
            for new in sorted(complaints - self._complaints)[:MOST_COMPLAINTS]:
                _log.warning("%s: %s", self._beamline, new)
            self._complaints = complaints
            self._stop.wait(_EVERY)

    def _look(self) -> Iterator[str]:
        """Look; give what is wrong with what lies there: that keeps no other run."""
        there: dict[str, Known] = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.endswith(SUFFIXES) or entry.name.startswith("."):
                    continue
                if not is_name(entry.name):
                    yield f"{self._folder}: {entry.name!r:.300} is no name of a file that is taken"
                elif not entry.is_file(follow_symlinks=False):
                    yield f"{self._folder}: {entry.name} is not taken: it is no file, but a link, a folder or a device"
                else:
                    with suppress(FileNotFoundError):  # it is gone meanwhile
                        found = entry.stat(follow_symlinks=False)
                        there[entry.name] = Known(entry.name, found.st_size, found.st_mtime_ns)
        runs = runs_of(there)
        for gone in (self._seen.keys() | self._told.keys()) - runs.keys():
            self._seen.pop(gone, None)
            self._told.pop(gone, None)
        for name, (run, names) in runs.items():
            files = tuple(there[each] for each in names)
            now = time.monotonic()
            if files == self._told.get(name):
                continue
            if len(files) > MOST_FILES:
                yield f"{self._folder}: {name}: {len(files)} files are more than the {MOST_FILES:,} that a run may have"
                continue
            before, since = self._seen.get(name, ((), now))
            if files != before:
                since = now
            self._seen[name] = files, since
            if now - since >= self._still:
                self._told[name] = files
                del self._seen[name]
                self._found.put(Dropped(self._beamline, run, str(self._folder), files))
