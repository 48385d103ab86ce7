"""numba's cache on disk, where many processes may start at once.

numba (0.68) puts index and data of its cache in place by rename, but reads, changes and writes the index without a
lock. Of processes that save at the same moment some lose their entry, or two kernels get one file name: from then on
the wrong machine code is loaded. So whoever has to compile waits for its turn here.
"""

import fcntl
import logging
from collections.abc import Callable
from pathlib import Path
from typing import IO

from numba.core import event

_log = logging.getLogger(__name__)


class _NotInCache(Exception):
    pass


class _NoCompiler(event.Listener):
    def on_start(self, event: event.Event) -> None:
        raise _NotInCache(event.data["dispatcher"])

    def on_end(self, event: event.Event) -> None:
        pass


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
            with event.install_listener("numba:compile", _NoCompiler()):
                exercise()
        except _NotInCache:
            # Two that hold the lock and wait for more of it would wait for each other where it is one of POSIX (NFS).
            _lock(lock, fcntl.LOCK_UN)
            _lock(lock, fcntl.LOCK_EX)
            exercise()


def _lock(lock: IO[bytes], operation: int) -> None:
    try:
        fcntl.flock(lock, operation)
    except OSError as error:  # a file system without locks, as Lustre may be
        _log.warning("%s: %s; start one process alone first, that compiles the kernels", lock.name, error.strerror)
