"""What is going on, for the person at the terminal."""

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stream.messages import Arrays, Output, Result, RunStart, RunStop

WIDTH = 90
FEWEST_BINS = 12
"""q shown however low the terminal is; more where they fit."""

OTHER_LINES = 10
"""Lines of the display that are not of a q."""

MOST_DELAYS = 6

LONGEST_LAG = 3600.0
"""Seconds above which it is the clocks that differ, or frames that were measured long ago."""

FEW_PAIRS = 32
"""g2 of delays with fewer pairs of frames is shown pale."""

MOST_RUNS = 64
"""That have no end yet, and are remembered."""

LINE_EVERY = 1.0
"""Seconds between lines where nothing can be drawn over."""

_STATES = {"success": "complete", "abort": "aborted", "fail": "failed"}

_FAULTS = ("lost", "late", "duplicate", "undecodable", "stray")


class ConsoleSink:
    """Show the run, its losses and g2; drawn anew with every output that is written.

    On a terminal the display stays in its place. Elsewhere (a log file, a pipe) there is a line every second, and the
    whole display once at the end of each run. Of runs that go on at once the newest is displayed, the others when they
    end.

    Parameters
    ----------
    console
        Where to; standard output if None.
    q
        (n_dynamic,) Of each dynamic bin (1/angstrom), NaN if unknown.
    is_live
        Whether frames come from a detector now: only then it is said how long ago they were.
    """

    def __init__(self, console: Console | None = None, *, q: Sequence[float], is_live: bool = True) -> None:
        self._console = console or Console()
        self._q = q
        self._is_live = is_live
        self._live: Live | None = None
        self._runs: dict[str, _Run] = {}
        self._shown: _Run | None = None
        self._line_due = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish()

    def write(self, output: Output) -> None:
        """Take the start, results and end of runs; leave out frames and runs that did not begin here."""
        run = self._runs.get(output.run)
        match output:
            case RunStart():
                self._finish()
                self._shown = run = self._runs[output.run] = _Run(output, is_live=self._is_live)
                while len(self._runs) > MOST_RUNS:
                    del self._runs[next(iter(self._runs))]
                if self._console.is_terminal:
                    self._live = Live(console=self._console, auto_refresh=False)
                    self._live.start()
            case Result() if run is not None:
                run.take(output)
            case RunStop() if run is not None:
                run.stop = output
                del self._runs[output.run]
            case _:
                return
        if self._live and run is self._shown:
            self._live.update(_display(run, self._q, self._console), refresh=True)
        elif isinstance(output, RunStop) and run is not self._shown:
            self._console.print(_display(run, self._q, self._console))
        elif self._is_line_due(output):
            self._line_due = time.monotonic() + LINE_EVERY
            self._console.print(_line(run), soft_wrap=True, highlight=False)
        if isinstance(output, RunStop) and run is self._shown:
            self._finish()

    def flush(self) -> None:
        """Do nothing: what is written is shown."""

    def _is_line_due(self, output: Output) -> bool:
        is_last = isinstance(output, Result) and output.operator == "ledger"
        return is_last and not self._live and time.monotonic() >= self._line_due

    def _finish(self) -> None:
        if self._live:
            self._live.stop()
        elif self._shown and self._shown.stop:
            self._console.print(_display(self._shown, self._q, self._console))
        self._live = self._shown = None


class _Run:
    def __init__(self, start: RunStart, *, is_live: bool) -> None:
        self.start = start
        self._is_live = is_live
        self.stop: RunStop | None = None
        self.ledger: Arrays = {name: np.array(0) for name in ("received", *_FAULTS)} | {"lag": np.array(np.nan)}
        self.multitau: Arrays | None = None
        self.n_frames = 0
        self.frames_per_s = math.nan
        self._began = self._seen = (time.monotonic(), 0)

    def take(self, result: Result) -> None:
        self.n_frames = max(self.n_frames, result.n_frames)
        if result.operator == "multitau":
            self.multitau = result.arrays
        if result.operator == "ledger":
            self.ledger = result.arrays
            now = (time.monotonic(), int(result.arrays["received"]))
            # The last interval may be short; the whole run tells more.
            since, before = self._began if result.final else self._seen
            if now[0] > since:
                self.frames_per_s = (now[1] - before) / (now[0] - since)
            self._seen = now

    @property
    def planned(self) -> int | None:
        n_frames = self.start.metadata.get("n_frames")
        return n_frames if isinstance(n_frames, int) and n_frames > 0 else None

    @property
    def speed(self) -> str:
        if math.isnan(self.frames_per_s):
            return "waiting for frames"
        frame_bytes = math.prod(self.start.shape) * np.dtype(self.start.dtype).itemsize
        return f"{self.frames_per_s:,.0f} frames/s, {self.frames_per_s * frame_bytes / 1e6:,.1f} MB/s"

    @property
    def lag(self) -> str:
        seconds = float(self.ledger["lag"])
        return f"lag {_time(seconds if self._is_live and abs(seconds) < LONGEST_LAG else math.nan)}"

    @property
    def how(self) -> str:
        """Tell how frames came, where they did not come as they should."""
        said = []
        if plane := int(self.ledger.get("plane", 0)):
            said.append(f"by {('stream', 'stream and file', 'file')[min(plane, 2)]}")
        if late := int(self.ledger.get("from_file", 0)):
            regions = ", ".join(map(str, self.ledger["repaired_regions"].tolist()))
            said.append(f"{late:,} late, from the file (region {regions})")
        if "missing_regions" in self.ledger and self.ledger["missing_regions"].size:
            said.append(f"without region {', '.join(map(str, self.ledger['missing_regions'].tolist()))}")
        return "; ".join(said)

    @property
    def state(self) -> str:
        if self.stop is None:
            return "waits for lost frames from a file" if int(self.ledger.get("awaits_file", 0)) else "running"
        return _STATES[self.stop.exit_status]


def _line(run: _Run) -> str:
    of_planned = f" of {run.planned}" if run.planned else ""
    faults = "".join(f", {int(run.ledger[name])} {name}" for name in _FAULTS if int(run.ledger[name]))
    how = f", {run.how}" if run.how else ""
    waits = f", {run.state}" if run.stop is None and run.state != "running" else ""
    return f"run {run.start.run}: {run.n_frames}{of_planned} frames, {run.speed}, {run.lag}{faults}{how}{waits}"


def _display(run: _Run, q: Sequence[float], console: Console) -> RenderableType:
    width = min(WIDTH, console.width)
    parts: list[RenderableType] = [_progress(run), Text(run.speed, "cyan"), _losses(run)]
    if run.how:
        parts.append(Text(run.how, "yellow"))
    if run.multitau is not None and np.any(run.multitau["n_pairs"] > 0):
        parts += [Text(), g2_table(run.multitau, q, width - 6, console.height - OTHER_LINES)]
    colour = {"running": "cyan", "complete": "green"}.get(run.state, "yellow")
    return Panel(
        Group(*parts),
        box=ROUNDED,
        border_style="dim",
        title=Text.assemble(("run ", "dim"), (run.start.run, "bold")),
        title_align="left",
        subtitle=Text(run.state, colour),
        subtitle_align="right",
        padding=(1, 2),
        width=width,
    )


def _progress(run: _Run) -> RenderableType:
    if run.planned is None:
        return Text(f"{run.n_frames:,} frames")
    row = Table.grid(padding=(0, 2))
    row.add_column(width=40)
    row.add_column()
    bar = ProgressBar(
        total=run.planned, completed=run.n_frames, width=40, complete_style="cyan", finished_style="green"
    )
    row.add_row(bar, f"{run.n_frames:,} of {run.planned:,} frames")
    return row


def _losses(run: _Run) -> Text:
    text = Text(run.lag, "dim")
    for name in _FAULTS:
        n = int(run.ledger[name])
        text.append("   ")
        text.append(f"{name} {n:,}", "not dim bold yellow" if n else "dim")
    return text


def g2_table(multitau: Arrays, q: Sequence[float], width: int, height: int) -> Table:
    """Return g2 of q (rows) at a few delays (columns), and how many q are left out.

    Parameters
    ----------
    multitau
        ``tau`` (n_delay,) s, ``n_pairs`` (n_delay,), ``g2`` and ``g2_err`` (n_delay, n_dynamic).
    q
        (n_dynamic,) 1/angstrom, NaN if unknown.
    width
        Characters of a line; with fewer there are fewer delays.
    height
        Lines; with fewer there are fewer q, but `FEWEST_BINS` at least.
    """
    tau, pairs = multitau["tau"], multitau["n_pairs"]
    bins = _spread(np.arange(len(q)), max(FEWEST_BINS, height))
    delays = _spread(np.flatnonzero(pairs > 0), max(2, min(MOST_DELAYS, (width - 11) // 12)), np.log(tau))
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("q (1/Å)", justify="right", style="bold", no_wrap=True, min_width=8)
    for delay in delays:
        table.add_column(_time(float(tau[delay])), justify="right", no_wrap=True)
    for b in bins:
        values = [
            Text(
                _short(float(multitau["g2"][d, b]), float(multitau["g2_err"][d, b])),
                "dim" if pairs[d] < FEW_PAIRS else "",
            )
            for d in delays
        ]
        table.add_row(f"{q[b]:.3g}" if math.isfinite(q[b]) else f"bin {b + 1}", *values)
    if len(bins) < len(q):
        table.caption = f"{len(q) - len(bins)} more q are not shown"
        table.caption_justify = "left"
    return table


def _spread(indices: NDArray[np.intp], n: int, scale: NDArray[np.float64] | None = None) -> NDArray[np.intp]:
    """Choose at most `n`, the first and the last among them, evenly on a scale."""
    if len(indices) <= n:
        return indices
    at = indices.astype(float) if scale is None else scale[indices]
    wanted = np.linspace(at[0], at[-1], n)
    nearest = np.unique(np.abs(at[:, None] - wanted).argmin(axis=0))
    return np.take(indices, nearest)


def _short(value: float, error: float) -> str:
    """Write a value with its uncertainty as 1.1832(15): 1.1832 +- 0.0015."""
    if not math.isfinite(value):
        return "–"
    if not (math.isfinite(error) and 0 < error < 1):
        return f"{value:.4f}"
    exponent = math.floor(math.log10(float(f"{error:.1e}")))
    decimals = min(4, 1 - exponent)
    return f"{value:.{decimals}f}({max(1, round(error * 10**decimals))})"


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size * 0.9995:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
