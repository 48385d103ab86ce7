"""The command `live`."""

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from stream.options import TokenFile, say_where, stopped_by_signals


def live(
    address: Annotated[
        str,
        typer.Argument(help="zmq://HOST:PORT, where `run` or `merge` publishes results.", metavar="ADDRESS"),
    ],
    qmap: Annotated[
        Path | None,
        typer.Option(help="Map of pixels to q bins of these results; without it, bins have numbers.", metavar="FILE"),
    ] = None,
    at: Annotated[
        str, typer.Option(help="Where browsers come to: live://HOST:PORT.", metavar="ADDRESS")
    ] = "live://127.0.0.1:8050",
    token_file: TokenFile = None,
    files: Annotated[
        Path | None,
        typer.Option(
            "--results",
            help="Where result files of the last day are, which the page shows as earlier runs: their directory, or "
            "what --out was given.",
            metavar="DIR",
        ),
    ] = None,
) -> None:
    """Serve a page that shows results as they are published, and the runs of the day.

    xpcs-stream live zmq://127.0.0.1:5600 --qmap qmap.h5

    Prometheus is served at /metrics, and /healthz answers while the page is well.
    """
    from stream.config import address as read_address
    from stream.config import live_at, there
    from stream.errors import ConfigError
    from stream.ingest.zmq import ZmqResults
    from stream.live.server import Server
    from stream.operators.roimap_file import read
    from stream.sinks.live import listen, read_token

    where = read_address(address)
    if where.transport != "zmq":
        raise ConfigError(f'"{address}" publishes no results: zmq://HOST:PORT does')
    token = read_token(token_file)
    roimap = read(there(qmap)) if qmap else None
    with ExitStack() as stack:
        listening = stack.enter_context(listen(*live_at(at), token=token))
        results = stack.enter_context(ZmqResults(where.target))
        stop: threading.Event = stack.enter_context(stopped_by_signals())
        say_where(at, token_file)
        Server(listening, results, roimap=roimap, source=address, token=token, stop=stop, files=files).run()
