"""What takes its time: fits, two-time maps, drift of the scattering. In a thread of its own, of the newest results."""

import logging
import threading

from stream.live.view import UNFIT, View
from stream.messages import Result

_log = logging.getLogger(__name__)


class Calculation:
    """Calculates until it is closed; results that are overtaken by newer ones are left out."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._newest: dict[str, tuple[int, Result]] = {}
        self._closed = False
        self._changed = threading.Condition()

    def put(self, key: int, result: Result) -> None:
        """Take a result of the run `key`, see `View.key`."""
        with self._changed:
            self._newest[result.operator] = key, result
            self._changed.notify()

    def close(self) -> None:
        """Let `run` return."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        """Calculate what is put."""
        from stream.damage import drift  # scipy takes its time; the page is there meanwhile

        view = self._view
        dynamics, of = view.new_dynamics(), view.key
        while (item := self._next()) is not None:
            key, result = item
            if key != of:
                dynamics, of = view.new_dynamics(), key
            try:
                if result.operator == "multitau":
                    view.dynamics(key, result.n_frames, *dynamics.of(result.arrays))
                elif result.operator == "twotime":
                    view.two_time(key, result)
                elif view.dynamic_of_static is not None:
                    found = drift(result.arrays, result.n_frames, view.dynamic_of_static)
                    view.drift(key, {"change": found.change, "p_value": found.p_value})
            except UNFIT as error:  # e.g. results of another map than the one that we were given
                _log.warning("nothing can be calculated from %s of run %s: %r", result.operator, result.run, error)

    def _next(self) -> tuple[int, Result] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._closed)
            if self._closed:
                return None
            return self._newest.pop(next(iter(self._newest)))
