"""`hpc-bridge pilot`, with which every job begins."""

from pathlib import Path
from typing import Annotated

import typer

from hpc_bridge.logs import bind


def pilot(
    lease: Annotated[str, typer.Option(metavar="ID", help="The manager's name for this pilot.")],
    manager: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Where the manager listens.", show_default=False)
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="tcp://INTERFACE", help="Wait here for a manager that dials ...")
    ] = "tcp://*",
    announce: Annotated[
        Path | None, typer.Option(metavar="FILE", help="... and tell it here at which address.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.01, metavar="S", help="Seconds between heartbeats.")] = 1.0,
    alone: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Go if the manager is not heard of for so many seconds.")
    ] = 120.0,
    grace: Annotated[
        float, typer.Option(min=0.0, metavar="S", help="Seconds that COMMAND may take to end before it is killed.")
    ] = 20.0,
    requeue_code: Annotated[
        int, typer.Option(min=1, max=255, metavar="N", help="End with it when the scheduler takes the node.")
    ] = 85,
    secret_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Encrypt with this key, see `xpcs-stream keys`.")
    ] = None,
    manager_key: Annotated[Path | None, typer.Option(metavar="FILE", help="The public key of the manager.")] = None,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Run what the manager hands out, one after the other, and no COMMAND.")
    ] = False,
    trial: Annotated[
        bool, typer.Option("--trial", help="Find out what this node is good for, tell the manager, and end.")
    ] = False,
    writable: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Trial: a file can be written there. May be repeated.")
    ] = None,
    reach: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="Trial: takes connections. May be repeated.")
    ] = None,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND...",
            help="After --. {status} in it stands for a file where it tells how it is, {name} for the lease.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run COMMAND on this node, tell the manager that it lives, and go when the node or the manager wants it.

    SIGTERM goes to COMMAND, and once that has ended this ends with the code of --requeue-code. It ends with 0 when the
    manager says so or is not heard of for too long, and as COMMAND does when that ends by itself. COMMAND never
    outlives it; a shell should `exec` what it runs last. With --tasks it has a task after the other instead, and only
    node and manager end it: the task that it has then is handed back.

    hpc-bridge pilot --lease 3f2a... --manager tcp://gateway:5570 --
    xpcs-stream worker --name {name} --status {status} ...
    """
    bind(lease=lease)
    from hpc_bridge.curve import PilotKeys
    from hpc_bridge.line import Awaited

    if (secret_key is None) != (manager_key is None):
        raise typer.BadParameter("--secret-key and --manager-key go together")
    if not trial and (writable or reach):
        raise typer.BadParameter("--writable and --reach are for a --trial")
    if tasks == bool(command):
        raise typer.BadParameter("either COMMAND or --tasks")
    if (manager is None) == (announce is None):
        raise typer.BadParameter("either --manager or --announce")
    home = Awaited(listen, announce) if announce is not None else str(manager)
    keys = PilotKeys.read(secret_key, manager_key) if secret_key and manager_key else None
    if trial:
        from hpc_bridge.trial import run as try_out

        code = try_out(
            command or [],
            lease=lease,
            manager=home,
            every=every,
            writable=writable or [],
            reach=reach or [],
            keys=keys,
        )
    else:
        from hpc_bridge.pilot import Terms, run
        from hpc_bridge.task_pilot import run as run_tasks

        terms = Terms(every=every, alone=alone, grace=grace, requeue_code=requeue_code)
        if command:
            code = run(command, lease=lease, manager=home, terms=terms, keys=keys)
        else:
            code = run_tasks(lease=lease, manager=home, terms=terms, keys=keys)
    raise typer.Exit(code)
