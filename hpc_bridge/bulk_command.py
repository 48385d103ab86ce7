"""The commands by which people hand in files of runs."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from hpc_bridge.commands import STATE, State, stopped_by_signals

_LOOK = 0.5
"""Between looks while runs are waited for (s)."""

_OVER = ("done", "failed", "canceled")


def submit(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...",
            help="A run each; a master comes with the parts beside it, and a folder stands for all files in it.",
            show_default=False,
        ),
    ],
    beamline: Annotated[str, typer.Option(metavar="NAME", help="Whose sites, commands and nodes.")],
    site: Annotated[str | None, typer.Option(metavar="NAME", help="Where. None: wherever it is possible.")] = None,
    run: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the one run whose files these are, the first is opened.")
    ] = None,
    priority: Annotated[
        int | None, typer.Option(min=-1000, max=1000, help="The highest goes first. None: that of the beamline.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until all is done; Ctrl-C leaves it to the manager.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    state: State = STATE,
) -> None:
    """Have files brought to nodes, computed there, and the results brought back.

    The manager has to be there: see `hpc-bridge up`. It sees to it from then on, whatever happens; what it does is
    shown by `hpc-bridge status`. The files stay where they are, and may be removed once it is done. With --wait the
    results' names are printed, one a line. The same files again are no other run; one that failed begins again.

    hpc-bridge submit /data/A001_master.h5 --beamline 8idi --wait
    """
    from hpc_bridge.bulk_files import run_of
    from hpc_bridge.control import ask
    from hpc_bridge.errors import ConfigError

    found = [run_of(file) for file in files]
    if run is not None:
        if len({folder for _, folder, _ in found}) > 1:
            raise ConfigError(f"the files of run {run} are not in one folder")
        every = {known.name: known for _, _, known_ones in found for known in known_ones}
        found = [(run, found[0][1], tuple(every.values()))]
    runs = [
        {
            "run": name,
            "folder": str(folder),
            "files": [{"name": file.name, "size": file.size, "mtime_ns": file.mtime_ns} for file in known],
        }
        for name, folder, known in found
    ]
    submission = {"beamline": beamline, "runs": runs, "site": site, "priority": priority, "is_named": run is not None}
    state = state.expanduser()
    names = list(dict.fromkeys(ask(state, {"do": "submit", "submission": submission})["runs"]))
    if not wait:
        if as_json:
            typer.echo(json.dumps({"beamline": beamline, "runs": names}))
        else:
            typer.echo(f"{beamline}: {', '.join(names)}: see hpc-bridge status", err=True)
        return
    told = _until_over(state, beamline, names)
    if as_json:
        typer.echo(json.dumps({"beamline": beamline, "runs": told}))
    for each in told:
        if each["stage"] == "done" and not as_json:
            for result in each["results"]:
                typer.echo(result)
        elif each["stage"] in ("failed", "canceled"):
            typer.echo(f"hpc-bridge: {beamline} {each['run']} {each['stage']}: {each['why']}", err=True)
    if any(each["stage"] not in _OVER for each in told):
        typer.echo(f"hpc-bridge: {beamline}: the manager goes on with it: see hpc-bridge status", err=True)
        raise typer.Exit(130)
    raise typer.Exit(0 if all(each["stage"] == "done" for each in told) else 1)


def cancel(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="As hpc-bridge status calls them.")],
    beamline: Annotated[str, typer.Option(metavar="NAME", help="Whose.")],
    state: State = STATE,
) -> None:
    """Let runs go that go by file: their transfers and their work on nodes end. Their files stay where they are.

    hpc-bridge cancel A001 --beamline 8idi
    """
    from hpc_bridge.control import ask

    ask(state.expanduser(), {"do": "cancel", "beamline": beamline, "runs": runs})


def _until_over(state: Path, beamline: str, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Follow runs until they are over, or until a signal; return how they are then."""
    from hpc_bridge.control import NoManager, ask

    told: list[Mapping[str, Any]] = []
    with _Shown() as shown, stopped_by_signals() as stop:
        while not stop.is_set():
            try:
                told = list(ask(state, {"do": "files", "beamline": beamline, "runs": names})["runs"])
            except NoManager:
                shown.say("nobody manages it at present: hpc-bridge up goes on with it")
            else:
                shown.show(told)
                if all(each["stage"] in _OVER for each in told):
                    break
            stop.wait(_LOOK)
    return told


class _Shown:
    """How runs are: bars on a terminal, else a line for each change."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._progress = Progress(
            TextColumn("{task.fields[run]}"),
            TextColumn("{task.fields[stage]:<10}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[said]}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._bars: dict[str, Any] = {}
        self._said: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, told: Sequence[Mapping[str, Any]]) -> None:
        """Show how they are."""
        for each in told:
            name, fields = each["run"], {"stage": each["stage"], "said": each["why"] or each["nice_status"]}
            if name not in self._bars:
                self._bars[name] = self._progress.add_task("", run=name, total=each["bytes"], **fields)
            self._progress.update(self._bars[name], completed=each["moved"], total=each["bytes"], **fields)
            at = f" at {each['site']}" if each["site"] else ""
            self.say(f"{name} {each['stage']}{at}{': ' if fields['said'] else ''}{fields['said']}", name)

    def say(self, line: str, about: str = "") -> None:
        """Say something, once."""
        if self._said.get(about) != line and self._progress.disable:
            typer.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)
        self._said[about] = line
