"""What goes wrong between a detector and a computer, on purpose and the same every time."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from stream.errors import ConfigError
from stream.wire import Buffer


class Faults:
    """Spoil image messages at random; start, end and results are never given to it.

    Every message draws once for each fault, so the pattern of one fault does not depend on the others.

    Parameters
    ----------
    lose, duplicate, reorder, truncate, delay
        Probability (0..1) that a message is not sent; sent twice; sent after the next one; cut at a random byte;
        preceded by a stall.
    delay_seconds
        Length of a stall (s).
    seed
        Same seed, same faults.

    Raises
    ------
    ConfigError
        A probability is not in 0..1, or the stall is negative.
    """

    def __init__(
        self,
        *,
        lose: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        truncate: float = 0.0,
        delay: float = 0.0,
        delay_seconds: float = 0.05,
        seed: int = 0,
    ) -> None:
        chances = {"lose": lose, "duplicate": duplicate, "reorder": reorder, "truncate": truncate, "delay": delay}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise ConfigError(f"{name}={chance} is not a probability, 0 to 1")
        if not 0 <= delay_seconds < float("inf"):
            raise ConfigError(f"delay_seconds={delay_seconds} is not a time")
        self._chances = np.array(list(chances.values()))
        self._delay_seconds = delay_seconds
        self._random = np.random.default_rng(seed)
        self._held: list[Buffer] | None = None

    def apply(self, parts: Sequence[Buffer]) -> Iterator[list[Buffer]]:
        """Yield what is to be sent for one image message, waiting first when it is delayed."""
        lose, duplicate, reorder, truncate, delay = self._random.random(len(self._chances)) < self._chances
        cut_at = self._random.random()
        if lose:
            return
        message = _cut(parts, cut_at) if truncate else list(parts)
        if reorder and self._held is None:
            self._held = [bytes(part) for part in message]  # the caller may reuse its buffers
            return
        if delay:
            time.sleep(self._delay_seconds)  # the fault itself: a sender that stalls
        yield message
        if duplicate:
            yield message
        yield from self.flush()

    def flush(self) -> Iterator[list[Buffer]]:
        """Yield what is still kept back: call it before the end message."""
        if self._held is not None:
            held, self._held = self._held, None
            yield held


def _cut(parts: Sequence[Buffer], at: float) -> list[Buffer]:
    """Keep the first `at` (0 <= at < 1) of the bytes: at least one part, at least one byte missing."""
    views = [memoryview(part).cast("B") for part in parts]
    left = int(at * sum(view.nbytes for view in views))
    kept: list[Buffer] = []
    for view in views:
        kept.append(view[:left])
        if left < view.nbytes:
            break
        left -= view.nbytes
    return kept
