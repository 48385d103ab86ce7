"""How runs that go by file are, as plain values for JSON and as a table for people."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hpc_bridge.bulk_record import Run, Stage
from hpc_bridge.transfer_record import Move

_STYLES = {"done": "dim", "failed": "bold red", "canceled": "dim", "computing": "green"}


def report_run(run: Run, move: Move | None, *, read: int, results: PurePosixPath, now: float) -> dict[str, Any]:
    """Return how a run is. Times in seconds; those of the Unix epoch where they are moments.

    Parameters
    ----------
    move
        Its request, if it waits for one.
    read
        Bytes of its files that were read so far, while they are hashed.
    results
        Where results come back to.
    """
    is_sent = run.stage not in (Stage.HASHING, Stage.SENDING)
    moved = run.size if is_sent else read if run.stage is Stage.HASHING else 0 if move is None else move.bytes
    return {
        "run": run.name,
        "stage": run.stage.value,
        "origin": run.origin.value,
        "site": run.site,
        "files": len(run.files),
        "bytes": run.size,
        "moved": min(moved, run.size),
        "faults": 0 if move is None else move.faults,
        "nice_status": "" if move is None else move.nice_status,
        "transfer": None if move is None else move.task,
        "why": run.why if move is None else move.message or run.why,
        "priority": run.priority,
        "created": run.created,
        "age_s": (run.ended or now) - run.created,
        "seconds": seconds(run),
        "results": [str(results / result.name) for result in run.results] if run.stage is Stage.DONE else [],
    }


def seconds(run: Run) -> dict[str, float | None]:
    """Return how long each stage of a run took (s), the last time if there were several; None: not yet, or never."""
    times = {
        "hash": (run.created, run.hashed),
        "wait": (run.hashed, run.moving),
        "transfer": (run.moving, run.arrived),
        "start": (run.arrived, run.begun),
        "compute": (run.begun, run.computed),
        "return": (run.computed, run.ended if run.results else None),
    }
    return {name: None if None in ends else ends[1] - ends[0] for name, ends in times.items()}  # type: ignore[operator]


def plane_text(plane: Mapping[str, Any]) -> Text:
    """Say which way the frames of a beamline go."""
    why = f": {plane['why']}" if plane["why"] else ""
    return Text(f'frames go by "{plane["plane"]}"{why}', style="" if plane["plane"] == "stream" else "bold yellow")


def table(beamline: str, runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return what `hpc-bridge status` shows of runs that go by file."""
    title = f"{beamline}: {sum(run['stage'] not in ('done', 'failed', 'canceled') for run in runs)} runs go by file"
    found = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("run", "stage", "site"):
        found.add_column(heading, no_wrap=True)
    for heading in ("moved", "of", "faults", "age", "priority"):
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("what is said")
    for run in runs:
        said = " ".join(word for word in (run["nice_status"], run["why"]) if word and word != "OK")
        found.add_row(
            run["run"],
            Text(run["stage"], style=_STYLES.get(run["stage"], "")),
            run["site"] or "",
            size(run["moved"]),
            size(run["bytes"]),
            str(run["faults"] or ""),
            _age(run["age_s"]),
            str(run["priority"]),
            said,
        )
    return found


def size(n_bytes: float) -> str:
    """Write bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _age(age: float) -> str:
    if age < 90:
        return f"{age:.0f} s"
    return f"{age / 60:.0f} min" if age < 5400 else f"{age / 3600:.1f} h"
