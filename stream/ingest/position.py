"""Where in a file of frames a source stands."""

from stream.errors import SourceError
from stream.messages import Position


def place_of(run: str) -> str:
    """Return the key of a `Position` in the file of a run."""
    return f"{run}:frame"


def frame_at(position: Position, run: str, n_frames: int) -> int:
    """Return the next frame of a position: -1 before the RunStart (and if it is empty), n_frames + 1 after the RunStop.

    Raises
    ------
    SourceError
        It is that of another source, or the file has no such frame.
    """
    place = place_of(run)
    if position.keys() - {place}:
        raise SourceError(f"{run}: {dict(position)} is a position of another source: not {place}")
    frame = position.get(place, -1)
    if not -1 <= frame <= n_frames + 1:
        raise SourceError(f"{run}: position {frame} is outside a file of {n_frames} frames")
    return frame
