"""numba's cache on disk, where many processes may start at once.

numba (0.68) puts index and data of its cache in place by rename, but reads, changes and writes the index without a
lock. Of processes that save at the same moment some lose their entry, or two kernels get one file name: from then on
the wrong machine code is loaded. So whoever has to compile waits for its turn here.
"""

import fcntl
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from numba.core import entrypoints, event

_log = logging.getLogger(__name__)


class _NotInCache(Exception):
    pass


class _NoCompiler(event.Listener):
    def on_start(self, event: event.Event) -> None:
        raise _NotInCache(event.data["dispatcher"])

    def on_end(self, event: event.Event) -> None:
        pass


@contextmanager
def alone() -> Iterator[None]:
    """Keep numba from importing what no kernel of ours needs: for processes in which nobody else uses it.

    That is linear algebra of scipy, and whatever extends numba, as awkward does: half of the time of a start.
    """
    entrypoints._already_initialized = True
    is_there = "scipy.linalg" in sys.modules
    if not is_there:
        sys.modules["scipy.linalg"] = None  # type: ignore[assignment]  # Python's way to say that there is none
    try:
        yield
    finally:
        if not is_there:
            del sys.modules["scipy.linalg"]


def fill(directory: Path, exercise: Callable[[], None]) -> None:
    """Load all kernels that `exercise` calls; if one is missing, compile them all while no other process does.

    Parameters
    ----------
    directory
        Where numba keeps the kernels.
    exercise
        Calls the kernels. It is called twice if one is missing: the first time it ends there.
    """
    with (directory / "xpcs-stream.lock").open("ab+") as lock:
        # Many may load at once, while nobody saves.
        _lock(lock, fcntl.LOCK_SH)
        try:
            with event.install_listener("numba:compile", _NoCompiler()), _no_garbage():
                exercise()
        except _NotInCache:
            # Two that hold the lock and wait for more of it would wait for each other where it is one of POSIX (NFS).
            _lock(lock, fcntl.LOCK_UN)
            _lock(lock, fcntl.LOCK_EX)
            exercise()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Spare the time in which garbage is looked for among what is made to stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _lock(lock: IO[bytes], operation: int) -> None:
    try:
        fcntl.flock(lock, operation)
    except OSError as error:  # a file system without locks, as Lustre may be
        _log.warning("%s: %s; start one process alone first, that compiles the kernels", lock.name, error.strerror)
