"""For a run engine: correlate what its detectors take, beside it; and measure until that is precise.

from stream.bluesky import Live

RE.subscribe(Live(qmap="qmap.h5", out="/data/results/{run}.h5", roots={"/data": "/data"}))
"""

import atexit
import json
import logging
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from stream.bluesky_precision import fly_until_precise as fly_until_precise
from stream.bluesky_precision import until_precise as until_precise
from stream.documents import pack
from stream.errors import ConfigError
from stream.precision import Goal as Goal

_log = logging.getLogger(__name__)

MAX_QUEUED = 10_000
"""Documents that wait for the process. More are dropped; of starts and stops there may be as many more."""

_KEPT = ("start", "stop")


class Live:
    """A callback for `bluesky.RunEngine.subscribe`: result files of its runs, made in a process of its own.

    It never holds up a plan: documents are handed over beside. If the process is slow or gone the plan goes on, and
    what is missing is logged; a stop that did not get through is an error there.

    Parameters
    ----------
    qmap
        Map of pixels to q bins.
    out
        Result file; ``{run}`` in it stands for the uid of the run.
    roots
        Directories of which files may be read, by what the documents call them. For a detector that writes files.
    detector
        Instead of `roots`: the address of a detector that streams, as ``xpcs-stream run --source`` has it.
    publish
        ``zmq://HOST:PORT`` where live results are published, for `until_precise`.
    documents
        Where results go as documents of Bluesky runs, as ``xpcs-stream run --documents`` has it.
    publish_every
        Seconds between interim results.
    frame_time
        Start to start of frames (s), if neither file nor documents tell. Of files only.
    threads
        That correlate. None: one per core.
    ready_within
        How long the process may take to be ready (s): the first of an installation compiles.

    Raises
    ------
    ConfigError
        The process did not become ready; names why.
    """

    def __init__(
        self,
        qmap: str | Path,
        out: str | Path,
        *,
        roots: Mapping[str, str | Path] | None = None,
        detector: str | None = None,
        publish: str | None = None,
        documents: Sequence[str] = (),
        publish_every: float = 1.0,
        frame_time: float | None = None,
        threads: int | None = None,
        ready_within: float = 300.0,
    ) -> None:
        options = {
            "qmap": str(Path(qmap).absolute()),
            "out": str(Path(out).absolute()),
            "roots": {called: str(Path(directory).absolute()) for called, directory in (roots or {}).items()},
            "detector": detector,
            "publish": publish,
            "documents": [*documents],
            "publish_every": publish_every,
            "frame_time": frame_time,
            "threads": threads,
        }
        self._process = subprocess.Popen(  # noqa: S603 - of our own package
            [sys.executable, "-m", "stream.bluesky_live", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is the run engine's: it pauses a plan.
            start_new_session=True,
        )
        self._queue: deque[tuple[str, str, bytes]] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._n_dropped = 0
        impatient = threading.Timer(ready_within, self._process.kill)
        impatient.start()
        said = self._stdout.readline().decode().strip()
        impatient.cancel()
        if said != "ready":
            self._process.kill()
            self._process.communicate()
            raise ConfigError(said or f"the process that correlates was not ready within {ready_within:g} s")
        self._thread = threading.Thread(target=self._hand_over, name="stream.bluesky.Live", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __call__(self, name: str, document: Mapping[str, Any]) -> None:
        """Take a document; returns at once."""
        run = str(document.get("uid" if name == "start" else "run_start", ""))
        try:
            packed = pack(name, document)
        except ValueError as error:
            self._say(name, run, str(error))
            return
        with self._changed:
            room = MAX_QUEUED * (2 if name in _KEPT else 1)
            is_taken = not self._is_closing and len(self._queue) < room
            if is_taken:
                self._queue.append((name, run, packed))
                self._changed.notify()
        if not is_taken:
            self._say(name, run, f"{len(self._queue)} wait, or the process is gone")

    def close(self, timeout: float = 60.0) -> None:
        """Wait until all runs are correlated that were handed over, and end the process."""
        atexit.unregister(self.close)
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            _log.error("the process that correlates did not end within %g s: it is killed", timeout)
            self._process.kill()
            self._process.wait()
        self._thread.join()
        self._stdout.close()

    @property
    def _stdout(self) -> Any:
        return self._process.stdout

    def _hand_over(self) -> None:
        """Write documents to the process until it is gone or there are no more."""
        into: Any = self._process.stdin
        each = None
        try:
            while (each := self._take()) is not None:
                _, _, packed = each
                into.write(len(packed).to_bytes(4, "little") + packed)
                into.flush()
            into.close()
        except OSError:
            with suppress(OSError):
                into.close()
            self._give_up(each)

    def _give_up(self, each: tuple[str, str, bytes] | None) -> None:
        """Say what was not handed over, and take no more."""
        with self._changed:
            self._is_closing = True
            lost = [each, *self._queue] if each is not None else [*self._queue]
            self._queue.clear()
        _log.error("the process that correlates is gone (%s); the plan goes on", self._process.wait())
        for name, run, _ in lost:
            self._say(name, run, "the process is gone")

    def _take(self) -> tuple[str, str, bytes] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closing)
            return self._queue.popleft() if self._queue else None

    def _say(self, name: str, run: str, why: str) -> None:
        if name in _KEPT:
            _log.error("%s of run %s is not handed over: %s", name, run, why)
            return
        self._n_dropped += 1
        if self._n_dropped & (self._n_dropped - 1) == 0:
            _log.warning("%s is not handed over: %s (%d so far)", name, why, self._n_dropped)
