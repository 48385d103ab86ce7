"""What is done with the disks of this machine for runs that go by file, in threads of its own: a disk may hang."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, PriorityQueue, SimpleQueue
from threading import Event, Thread

from hpc_bridge.bulk import Hash, Order
from hpc_bridge.bulk_files import is_part, known, run_of
from hpc_bridge.bulk_record import Known, Run
from hpc_bridge.errors import BridgeError
from hpc_bridge.transfer_digest import BLOCK, sha256

_log = logging.getLogger(__name__)

SAFE = "safe"
"""The file in the folder of a spooled run by which the gateway knows that it may remove the run."""

STILL = 5.0
"""A file that has not changed for so long (s) is taken to be complete."""

_EVERY = 1.0
"""Between looks at a drop folder (s)."""

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


class Disk:
    """Carries out orders, one at a time, that of the highest priority first.

    Attributes
    ----------
    read
        Bytes of the run that is being read that are read already, with its key.
    """

    def __init__(self) -> None:
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.read: tuple[tuple[str, str] | None, int] = None, 0
        self._orders: PriorityQueue[tuple[int, float, int, Order]] = PriorityQueue()
        self._n = 0
        self._stop = Event()
        self._thread = Thread(target=self._carry_out, name="disk", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End; what is under way is begun again by the next one."""
        self._stop.set()
        self._thread.join(5)

    def order(self, order: Order) -> None:
        """Have something done."""
        self._n += 1
        self._orders.put((-order.run.priority, order.run.created, self._n, order))

    def _carry_out(self) -> None:
        while not self._stop.is_set():
            try:
                *_, order = self._orders.get(timeout=0.2)
            except Empty:
                continue
            try:
                self.answers.put(self._hash(order.run) if isinstance(order, Hash) else _release(order.run))
            except OSError as error:
                self.answers.put(Failed(order.run.key, f"{error.filename or order.run.folder}: {error.strerror}"))
            except _Stopped:
                return
            finally:
                self.read = None, 0

    def _hash(self, run: Run) -> Answer:
        files: list[Known] = []
        told = time.monotonic()
        for n, file in enumerate(run.files):
            path = Path(run.folder / file.name)
            before = known(path)
            digest = file.sha256 if replace(before, name=file.name, sha256=file.sha256) == file else ""
            self.read = run.key, sum(each.size for each in files)
            found = replace(before, name=file.name, sha256=digest or sha256(path, self._go_on))
            if known(path) != before:
                return Failed(run.key, f"{path}: it is still written")
            files.append(found)
            if time.monotonic() - told > _TELL:
                told = time.monotonic()
                self.answers.put(Hashed(key=run.key, files=(*files, *run.files[n + 1 :]), is_all=False))
        return Hashed(key=run.key, files=tuple(files), is_all=True)

    def _go_on(self) -> None:
        key, n_bytes = self.read
        self.read = key, n_bytes + BLOCK
        if self._stop.is_set():
            raise _Stopped


def _release(run: Run) -> Answer:
    (Path(run.folder) / SAFE).touch()
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

    It is told of once by each process, whoever asks knows what he has.
    """

    def __init__(self, beamline: str, folder: Path, found: "SimpleQueue[Dropped]", *, still: float = STILL) -> None:
        self._beamline, self._folder, self._found, self._still = beamline, folder, found, still
        self._seen: dict[str, tuple[Sequence[Known], float]] = {}
        self._told: dict[str, Sequence[Known]] = {}
        self._complained = ""
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
                self._look()
                self._complained = ""
            except (OSError, BridgeError) as error:
                if str(error) != self._complained:
                    self._complained = str(error)
                    _log.warning("%s: %s", self._beamline, error)
            self._stop.wait(_EVERY)

    def _look(self) -> None:
        names = {path.name for path in self._folder.iterdir() if _may_be_run(path.name)}
        for gone in (self._seen.keys() | self._told.keys()) - names:
            self._seen.pop(gone, None)
            self._told.pop(gone, None)
        for name in sorted(names):
            run, folder, files = run_of(self._folder / name)
            now = time.monotonic()
            if files == self._told.get(name):
                continue
            before, since = self._seen.get(name, ((), now))
            if files != before:
                since = now
            self._seen[name] = files, since
            if now - since >= self._still:
                self._told[name] = files
                del self._seen[name]
                self._found.put(Dropped(self._beamline, run, str(folder), files))


def _may_be_run(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(".") and not is_part(name)
