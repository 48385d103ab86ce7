"""The commands of people."""

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc_bridge.logs import say

# Only what `--help` needs is imported up here: every job begins with a command of this program.
if TYPE_CHECKING:
    from hpc_bridge.config import Beamline, Site

State = Annotated[
    Path,
    typer.Option(
        envvar="HPC_BRIDGE_STATE",
        metavar="DIR",
        help="Of the manager: its record and what it holds. On a disk of its machine.",
    ),
]
STATE = Path("~/.local/state/hpc-bridge")
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]


def up(
    beamlines: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BEAMLINE.yaml...]", help="None: those that are held.", show_default=False),
    ] = None,
    site: Annotated[
        list[Path] | None, typer.Option(metavar="SITE.yaml", help="Where nodes come from. May be repeated.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Manage in the background; the log is in the state directory.")
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve Prometheus at http://HOST:PORT/metrics; a PORT alone is for this machine only. Whoever reaches "
            "it sees sites, accounts and what is used of them, no names of runs and no secrets.",
        ),
    ] = None,
    state: State = STATE,
) -> None:
    """Hold compute nodes for beamlines, from now on until `down`.

    This becomes the manager of the state directory, or tells the one that is there. A manager may be killed and started
    again at any time: it adopts its jobs. SIGTERM or Ctrl-C end it, and its pilots go on until they were alone for too
    long: start it again, or `hpc-bridge down`.

    hpc-bridge up 8idi.yaml --site polaris.yaml --site crux.yaml
    """
    from hpc_bridge.config import Beamline, Site, read
    from hpc_bridge.control import NoManager, ask

    state = state.expanduser()
    sites = {each.site: each for each in (read(file, Site) for file in site or ())}
    wanted = [read(file, Beamline) for file in beamlines or ()]
    try:
        ask(state, {"do": "status"})
    except NoManager:
        if detach:
            files = [str(file.absolute()) for file in beamlines or ()]
            at = [] if metrics is None else ["--metrics", metrics]
            _detach(state, [*files, *(word for file in site or () for word in ("--site", str(file.absolute()))), *at])
        else:
            _manage(state, wanted, sites, metrics)
        return
    if metrics is not None:
        raise typer.BadParameter("--metrics is for who becomes the manager; there is one")
    for beamline in wanted:
        there = [sites[name].model_dump(mode="json") for name in beamline.sites if name in sites]
        ask(state, {"do": "up", "beamline": beamline.model_dump(mode="json"), "sites": there})
        say(f"{beamline.beamline}: {beamline.nodes} nodes are wanted; see hpc-bridge status")


def down(
    beamlines: Annotated[
        list[str] | None, typer.Argument(metavar="[BEAMLINE...]", help="None: all.", show_default=False)
    ] = None,
    state: State = STATE,
) -> None:
    """Let the nodes of beamlines go: pilots hand over and end, waiting jobs are cancelled.

    Returns once that is so; the manager ends when it holds no beamline any more.
    """
    from hpc_bridge.control import NoManager, ask

    state = state.expanduser()
    try:
        there = list(ask(state, {"do": "status"})["beamlines"])
        gone = list(beamlines or there)
        for name in gone:
            ask(state, {"do": "down", "beamline": name})
        _wait_until_gone(state, gone)
    except NoManager:
        from hpc_bridge.manager import Manager  # which takes its time to load

        with Manager(state) as manager, stopped_by_signals() as stop:
            for name in beamlines or manager.beamlines:
                manager.down(name)
            manager.run(stop)


def status(as_json: AsJson = False, state: State = STATE) -> None:
    """Show the pilots: where they are, what they do, how far behind, how long yet, and what they cost."""
    from rich.console import Console

    from hpc_bridge.report import tables

    reported = _reported(state.expanduser())
    if as_json:
        typer.echo(json.dumps(reported))
    else:
        Console().print(tables(reported, time.time()))


def watch(
    every: Annotated[float, typer.Option(min=0.1, metavar="S", help="Seconds between looks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="One line per look.")] = False,
    state: State = STATE,
) -> None:
    """Follow `status` until Ctrl-C."""
    from rich.live import Live

    from hpc_bridge.report import tables

    state = state.expanduser()
    with stopped_by_signals() as stop:
        if as_json:
            while not stop.is_set():
                typer.echo(json.dumps(_reported(state)))
                stop.wait(every)
            return
        with Live(tables(_reported(state), time.time()), auto_refresh=False) as live:
            while not stop.wait(every):
                live.update(tables(_reported(state), time.time()), refresh=True)


def costs(
    beamlines: Annotated[
        list[str] | None, typer.Argument(metavar="[BEAMLINE...]", help="None: all.", show_default=False)
    ] = None,
    days: Annotated[float, typer.Option(min=0.01, help="How far back.")] = 30.0,
    as_json: AsJson = False,
    state: State = STATE,
) -> None:
    """Show what nodes cost: per beamline, account and run; and where the scheduler's accounting differs."""
    from rich.console import Console

    from hpc_bridge.costs import costs_of, tables

    found = costs_of(state.expanduser(), beamlines or [], since=time.time() - days * 86400, now=time.time())
    if as_json:
        typer.echo(json.dumps(found))
    else:
        Console().print(tables(found))


def check(
    site: Annotated[Path, typer.Argument(metavar="SITE.yaml")],
    beamline: Annotated[Path, typer.Option(metavar="BEAMLINE.yaml", help="Whose account, command and environment.")],
    reach: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="That a node has to reach: the data plane. May be repeated."),
    ] = None,
    writable: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="That a node has to write to: checkpoints. May be repeated."),
    ] = None,
    queue: Annotated[list[str] | None, typer.Option(help="Of the ladder. None: all of them.")] = None,
    within: Annotated[float, typer.Option(min=1, metavar="S", help="That a trial may take in a queue.")] = 600.0,
    run: Annotated[
        str, typer.Option(metavar="COMMAND", help="What has to end well on a node: that kernels compile.")
    ] = "xpcs-stream compile",
    as_json: AsJson = False,
) -> None:
    """Prove the way before there is beam: the scheduler answers, a node starts, it comes through, it can work.

    A trial job per queue finds out on its node whether it reaches the manager and the data plane, numba compiles, the
    checkpoints can be written, and how far its clock is off. Says what failed, and why; exits with 1 then.

    hpc-bridge check polaris.yaml --beamline 8idi.yaml --reach kafka:9092 --writable /eagle/aps/xpcs/checkpoints
    """
    import shlex

    from hpc_bridge.check import prove
    from hpc_bridge.config import Beamline, Site, read

    steps = prove(
        read(site, Site),
        read(beamline, Beamline),
        queues=queue or [],
        command=shlex.split(run),
        reach=reach or [],
        writable=writable or [],
        within=within,
    )
    is_well = True
    for step in steps:
        is_well = is_well and step.ok
        if as_json:
            told = {"where": step.where, "name": step.name, "ok": step.ok, "detail": step.detail, "s": step.seconds}
            typer.echo(json.dumps(told))
        else:
            mark = typer.style("ok    ", fg="green") if step.ok else typer.style("FAILED", fg="red", bold=True)
            typer.echo(f"{mark} {step.where}: {step.name} ({step.seconds:.1f} s) {step.detail}")
    raise typer.Exit(0 if is_well else 1)


def _manage(state: Path, wanted: "Sequence[Beamline]", sites: "Mapping[str, Site]", metrics: str | None) -> None:
    from hpc_bridge.manager import Manager

    logging.getLogger("hpc_bridge").setLevel(logging.INFO)
    logging.getLogger("parsl").setLevel(logging.CRITICAL)  # what goes wrong is told by us, once
    with ExitStack() as stack:
        manager = stack.enter_context(Manager(state))
        stop = stack.enter_context(stopped_by_signals())
        if metrics is not None:
            from hpc_bridge.metrics import Metrics
            from hpc_bridge.scraped import served

            told = Metrics()
            manager.watch = told.take
            stack.enter_context(served(metrics, told.registry))
        for beamline in wanted:
            manager.up(beamline, sites)
        say(f"manages {', '.join(manager.beamlines) or 'nothing: name a beamline'}")
        manager.run(stop)


def _detach(state: Path, arguments: Sequence[str]) -> None:
    from hpc_bridge.control import NoManager, ask
    from hpc_bridge.errors import BridgeError

    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = state / "manager.log"
    with log.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603 - of our own package
            [sys.executable, "-m", "hpc_bridge", "up", *arguments, "--state", str(state.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    stop = Event()
    while process.poll() is None:
        try:
            ask(state, {"do": "status"})
        except NoManager:
            stop.wait(0.05)
            continue
        say(f"manager {process.pid} writes {log}")
        return
    said = log.read_text(errors="replace").splitlines() or ["nothing"]
    raise BridgeError(f"the manager ended with {process.returncode}, and said: {said[-1]}")


def _wait_until_gone(state: Path, beamlines: Sequence[str]) -> None:
    from hpc_bridge.control import NoManager, ask
    from hpc_bridge.errors import BridgeError
    from hpc_bridge.leases import Leases
    from hpc_bridge.state import StateDirectory

    with stopped_by_signals() as stop:
        there = set(beamlines)
        while there & set(beamlines):
            if stop.wait(0.2):
                raise BridgeError(f"{', '.join(beamlines)}: not gone yet; the manager goes on with it")
            try:
                there = set(ask(state, {"do": "status"})["beamlines"])
            except NoManager:
                break
    with Leases.look(StateDirectory(state).record) as leases:
        if left := [lease.name for name in beamlines for lease in leases.open_leases(name)]:
            raise BridgeError(f"the manager was ended before {', '.join(left)} were gone: again hpc-bridge down")


def _reported(state: Path) -> Mapping[str, Any]:
    from hpc_bridge.control import ask

    return ask(state, {"do": "status"})


@contextmanager
def stopped_by_signals() -> Iterator[Event]:
    """Give an event that SIGINT and SIGTERM set."""
    stop = Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
