"""The command line."""

import logging
from typing import Annotated, Any

import typer

from hpc_bridge import bulk_command, commands, logs, pilot_command, transfer_command
from hpc_bridge.errors import BridgeError


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Say what went wrong in one line, without a traceback."""
        try:
            return super().invoke(ctx)
        except BridgeError as error:
            for line in str(error).splitlines():
                logs.say(line if logs.is_json() else f"hpc-bridge: {line}", logging.ERROR)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    ctx: typer.Context,
    log_format: Annotated[
        logs.Format,
        typer.Option(
            envvar=logs.VARIABLE,
            help="Of what is told by standard error: in words, or as one JSON object a line, for machines.",
        ),
    ] = "text",
) -> None:
    """Compute nodes from on-demand and preemptable queues, for a beamline."""
    logs.configure(f"hpc-bridge {ctx.invoked_subcommand}", log_format)


# Every job begins with it: nothing that takes its time to import may be imported up here.
for command in (
    commands.up,
    commands.status,
    commands.watch,
    commands.down,
    commands.check,
    commands.costs,
    bulk_command.submit,
    bulk_command.cancel,
    transfer_command.login,
    pilot_command.pilot,
):
    app.command()(command)


if __name__ == "__main__":
    app(prog_name="hpc-bridge")
