"""What a gateway knows of its runs: how many frames came, and which way they went."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream.messages import FrameBatch, RunStart, RunStop
from stream.plane_file import WAYS, PlaneFile, Told, Way
from stream.sinks.spool import Spool, n_bytes

_log = logging.getLogger(__name__)

MOST_RUNS = 100
"""That are told of."""


@dataclass(slots=True)
class Run:
    """A run that came by."""

    number: int
    """Of those of this gateway, from 1."""
    start: RunStart
    began: float
    """Seconds of the Unix epoch."""
    planes: set[Way]
    """Which way its frames went."""
    frames: int = 0
    """That came."""
    unsent: int = 0
    """Of these, that went by file only."""
    stop: RunStop | None = None
    ended: bool = False
    """Also when it never stopped, but another one began."""

    def ways(self) -> list[Way]:
        """Return the same as `planes`, in the order of how bad they are."""
        return [way for way in WAYS if way in self.planes]


class GatewayRuns:
    """Decides which way frames go, and counts them.

    By file only is told by the plane file, and done only while a spool takes all of them: one that loses frames has to
    be told anew.

    Parameters
    ----------
    plane
        Where it is told which way frames go. None: they are streamed.
    spool
        Where they are, too.

    Attributes
    ----------
    plane, why
        Which way frames go now.
    frames, n_bytes
        That came so far, of all runs.
    unsent
        Frames of these that went by file only.
    runs
        The last ones.
    """

    def __init__(self, plane: PlaneFile | None, spool: Spool | None) -> None:
        self.plane: Way = "stream"
        self.why = ""
        self.frames = self.n_bytes = self.unsent = 0
        self.runs: deque[Run] = deque(maxlen=MOST_RUNS)
        self.lock = threading.Lock()
        """Of all of these."""
        self.has_changed: Callable[[], object] = lambda: None
        """Called when a run begins or ends, or frames go another way."""
        self._file, self._spool = plane, spool
        self._n_starts = 0
        self._told = Told()
        self._refused: tuple[Told, str] | None = None
        """What was told and cannot be done, and why."""
        self._lost_before = 0
        """Frames that the spool had lost when frames began to go by file only."""

    @property
    def run(self) -> Run | None:
        """The run that is on."""
        return self.runs[-1] if self.runs and not self.runs[-1].ended else None

    @property
    def n_runs(self) -> int:
        """How many began."""
        return self._n_starts

    def is_sent(self, message: RunStart | FrameBatch | RunStop) -> bool:
        """Take note of what came; tell whether it goes to the workers. Only frames ever do not."""
        with self.lock:
            has_changed = self.look() | (not isinstance(message, FrameBatch))
            is_sent = True
            match message:
                case RunStart():
                    self._end(None)
                    self._n_starts += 1
                    self.runs.append(Run(self._n_starts, message, time.time(), {self.plane}))
                case FrameBatch(frames=frames):
                    self.frames += len(frames)
                    self.n_bytes += n_bytes(frames)
                    is_sent = self.plane != "file"
                    self.unsent += 0 if is_sent else len(frames)
                    if self.run is not None and self.run.start.run == message.run:
                        self.run.frames += len(frames)
                        self.run.unsent += 0 if is_sent else len(frames)
                case RunStop() if self.run is not None and self.run.start.run == message.run:
                    self._end(message)
        if has_changed:
            self.has_changed()
        return is_sent

    def look(self) -> bool:
        """Look which way frames go; tell whether that changed."""
        if self._file is None:
            return False
        told = self._file.look()
        before = self.plane, self.why
        if told != self._told:
            self._told, self._refused = told, None
            self._lost_before = self._spool.lost if self._spool is not None else 0
        self._refuse(told)
        if self._refused is not None:
            self.plane, self.why = ("stream" if self._spool is None else "stream+file"), self._refused[1]
        else:
            self.plane, self.why = told.plane, told.why
        if self.plane != before[0]:
            _log.warning('frames go by "%s"%s', self.plane, f": {self.why}" if self.why else "")
            if self.run is not None:
                self.run.planes.add(self.plane)
        return before != (self.plane, self.why)

    def _refuse(self, told: Told) -> None:
        if told.plane != "file" or self._refused is not None:
            return
        if self._spool is None:
            why = "told to go by file only, but there is no --spool"
        elif lost := self._spool.lost - self._lost_before:
            why = f"told to go by file only, but the spool lost {lost} frames"
        else:
            return
        self._refused = told, why
        _log.error("%s: frames are streamed", why)

    def _end(self, stop: RunStop | None) -> None:
        if self.run is not None:
            self.run.stop = stop
            self.run.ended = True


def remember(directory: Path, run: dict[str, Any]) -> None:
    """Write beside the files of a run which way its frames went: the next gateway tells of it, too.

    Raises
    ------
    OSError
        It cannot be written.
    """
    path = _way_path(directory)
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(json.dumps(run))
    hidden.replace(path)


def remembered(directory: Path) -> dict[str, Any]:
    """Return what `remember` wrote, as far as it is there."""
    try:
        said = json.loads(_way_path(directory).read_bytes()[:4096])
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    kinds = {"began": float, "frames": int, "unsent": int, "lost": int, "planes": list, "unsafe": bool}
    return {name: said[name] for name, kind in kinds.items() if isinstance(said.get(name), kind)}


def _way_path(directory: Path) -> Path:
    return directory / f"{directory.name}_way.json"
