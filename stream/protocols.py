"""The three seams of the package. A class fits by its shape; there is nothing to inherit."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol, Self

from stream.messages import Arrays, FrameBatch, Message, Output, Position


class Source(AbstractContextManager["Source"], Protocol):
    """Where messages come from. Iteration ends when the source is exhausted (a file); a live source never ends."""

    def __iter__(self) -> Iterator[Message | None]:
        """Yield messages in order; None when nothing came for one poll (at most 0.1 s), so that the caller can act.

        Raises
        ------
        SourceError
            The transport is gone for good.
        """

    def position(self) -> Position:
        """Return where to `seek` to go on just after the message yielded last; {} if the source cannot seek."""

    def seek(self, position: Position) -> None:
        """Go to a `position` before iterating.

        Raises
        ------
        NotSeekable
            The source cannot go back.
        """


class Operator(Protocol):
    """Something computed from frames as they come.

    push(a); push(b) equals push(a then b); restore(snapshot()) equals the original; merge over disjoint pixels equals
    the whole frames, also of what was restored from partial(); result() changes nothing. All of them bit for bit:
    tests/test_operator_laws.py.
    """

    name: str
    n_frames: int
    """One past the last frame pushed; lost frames count."""

    def push(self, batch: FrameBatch) -> None:
        """Fold in frames, never doing I/O. `batch.first` is at least `n_frames`; a jump leaves frames out."""

    def result(self) -> Arrays:
        """Return what is known so far."""

    def merge(self, other: Self) -> None:
        """Add what another operator knows of the same frames and other pixels. Nothing can be pushed afterwards."""

    def snapshot(self) -> Arrays:
        """Return the whole state, with a digest of the roi maps. Later pushes do not change it.

        It may still be being copied: then reading it waits, and so does a push that would change what is not copied.
        """

    def miss(self, n_frames: int) -> None:
        """Go on to n_frames, not fewer than before: frames before that were not pushed are missing for good."""

    def partial(self) -> Arrays:
        """Return what `merge` needs, which later pushes do not change: where the state is large, much less than it."""

    def restore(self, state: Arrays) -> None:
        """Take over a `snapshot`, or a `partial`: then nothing can be pushed afterwards.

        Raises
        ------
        CheckpointError
            The state belongs to other roi maps or other parameters.
        """


class Sink(AbstractContextManager["Sink"], Protocol):
    """Where messages and results go. It is given the RunStart, then results, then the RunStop of every run."""

    def write(self, output: Output) -> None:
        """Take one output. What a sink has no use for it ignores.

        Raises
        ------
        SinkError
            It could not be delivered.
        """

    def flush(self) -> None:
        """Return once the far side has everything.

        Raises
        ------
        SinkError
            It could not be delivered.
        """
