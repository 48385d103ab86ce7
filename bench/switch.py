"""What `hpc_bridge.switch` is good for, over drawn histories of links, queues and spools; see `bench.links`.

All of it is simulated: nothing here is a time of this machine. Beside it, in the same histories: frames are always
streamed and no file ever goes (what is lost is lost); frames are always streamed and the files of runs that lost some
go; all frames go both ways.
"""

from collections.abc import Callable, Iterator

from bench.links import History, Policy, Told, always, history, ours, simulate
from bench.measure import Figure, asked_for, compare
from hpc_bridge.switch import Plane

HISTORIES = 16
"""Of two hours."""

MOST_SWITCHES = 6
"""Per fault: there and back by way of stream+file is four, and each that is tried in vain two more."""


def figures(n: int = HISTORIES, policy: Callable[[], Policy] = ours) -> Iterator[Figure]:
    """Let every policy go through the same histories."""
    histories = [history(seed) for seed in range(n)]
    mine = [simulate(each, policy()) for each in histories]
    live_only = [simulate(each, always(Plane.STREAM), sends_none=True) for each in histories]
    lost_too = [simulate(each, always(Plane.STREAM)) for each in histories]
    both = [simulate(each, always(Plane.BOTH)) for each in histories]

    def pairs(theirs: list[Told], of: Callable[[Told, History], float]) -> list[tuple[float, float]]:
        rows = zip(mine, theirs, histories, strict=True)
        return [(of(one, where), of(other, where)) for one, other, where in rows]

    for against, theirs, target in (
        ("always streamed, no file", live_only, 1.0),
        ("always streamed, lossy runs' files", lost_too, None),
        ("always both ways", both, None),
    ):
        yield compare("frames in final results", "share", against, pairs(theirs, _complete), target=target)
        yield compare("frames live", "share", against, pairs(theirs, _live))
        if theirs is not live_only:
            yield compare("until the final result", "s", against, pairs(theirs, _wait), less_is_better=True)
            is_both = theirs is both
            found = pairs(theirs, _by_file)
            yield compare("by file", "GB", against, found, target=1.0 if is_both else None, less_is_better=True)
    switches = [told.switches / max(1, len(each.faults)) for told, each in zip(mine, histories, strict=True)]
    yield asked_for("switches per fault", "1", switches, MOST_SWITCHES, less_is_better=True)


def _complete(told: Told, _: History) -> float:
    return told.complete


def _live(told: Told, _: History) -> float:
    return told.live


def _wait(told: Told, where: History) -> float:
    return told.until_final(where.seconds)


def _by_file(told: Told, _: History) -> float:
    return max(told.by_file, 1e-3)
