"""What the options of several commands have in common."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream.errors import ConfigError
from stream.logs import say

if TYPE_CHECKING:
    from stream.config import Place


def measured(unit: str) -> Any:
    """Return the reader of an option that is given with its unit."""

    def quantity_of(text: str | float) -> float:
        from stream.units import quantity

        if isinstance(text, float):  # the default
            return text
        try:
            value = quantity(text, unit)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from None
        if value <= 0:
            raise typer.BadParameter(f'"{text}" is not above 0')
        return value

    return quantity_of


Qmap = Annotated[Path, typer.Option(help="Map of pixels to q bins (HDF5: pySimpleMask, NXxpcs).", metavar="FILE")]
FrameTime = Annotated[
    float | None,
    typer.Option(
        parser=measured("s"),
        metavar="TIME",
        help='Start to start of frames, for an HDF5 file that does not tell: "500 us".',
    ),
]

KafkaProperties = Annotated[
    Path | None,
    typer.Option(
        "--kafka-properties",
        metavar="FILE",
        help="Settings of librdkafka, name=value a line. Secrets stand elsewhere: sasl.password=file:PATH or env:NAME.",
    ),
]
SecretKey = Annotated[
    Path | None,
    typer.Option("--secret-key", metavar="FILE", help="zmq: encrypt with this key, see `xpcs-stream keys`."),
]
ProxyKey = Annotated[
    Path | None,
    typer.Option(
        "--proxy-key",
        metavar="FILE",
        help="zmq+bluesky: the public key of the Proxy, of every one that is named; goes with --secret-key.",
    ),
]
RunEngine = Annotated[
    str | None,
    typer.Option(
        "--run-engine",
        help="Documents of Bluesky that go with the detector's frames: kafka+bluesky://HOST:PORT/TOPIC, or "
        "zmq+bluesky://HOST:PORT of a Proxy.",
        metavar="ADDRESS",
    ),
]
Roots = Annotated[
    list[str] | None,
    typer.Option(
        "--root",
        help="For frames in files that documents of Bluesky point to: NAME=DIR lets files of DIR be read, which they "
        "call NAME.",
        metavar="NAME=DIR",
    ),
]
Documents = Annotated[
    list[str] | None,
    typer.Option(
        help="Publish results as a Bluesky run: kafka://HOST:PORT/BEAMLINE, zmq+bluesky://HOST:PORT of a Proxy, or "
        "tiled+http://HOST:PORT of a Tiled server (its key in TILED_API_KEY); may be given several times.",
        metavar="ADDRESS",
    ),
]


Live = Annotated[
    str | None,
    typer.Option(
        "--live",
        help="Serve a page that shows the results: live://HOST:PORT; 127.0.0.1 for this machine only.",
        metavar="ADDRESS",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="Show the page only to those who know what stands in FILE; asked for where others than this machine "
        "reach it. Else XPCS_STREAM_TOKEN.",
        metavar="FILE",
    ),
]

TwoTime = Annotated[
    int | None,
    typer.Option(
        "--two-time",
        min=2,
        max=8192,
        help="Two-time correlation, too: of so many newest frames one by one, and of the whole run in so many times.",
        metavar="FRAMES",
    ),
]
TwoTimeBy = Annotated[
    str | None,
    typer.Option(
        "--two-time-normalisation",
        help="By the mean of each 'dynamic' bin, or of each 'static' bin in it, as boost_corr does. 'dynamic' if not "
        "given.",
    ),
]


def two_time_of(frames: int | None, normalisation: str | None) -> dict[str, Any]:
    """Return the section of the configuration."""
    if frames is None and normalisation is not None:
        raise typer.BadParameter("--two-time-normalisation goes with --two-time FRAMES")
    return {"frames": frames, "normalisation": normalisation}


def say_where(at: str, token_file: Path | str | None) -> None:
    """Tell where the page is."""
    asks = "?token=..." if token_file or os.environ.get("XPCS_STREAM_TOKEN") else ""
    say(f"live page at {at.replace('live://', 'http://')}/{asks}")


def roots_of(texts: list[str] | None) -> dict[str, str]:
    """Return directories by what documents call them."""
    pairs = [text.partition("=") for text in texts or ()]
    if wrong := [name for name, equals, directory in pairs if not (name and equals and directory)]:
        raise typer.BadParameter(f'--root "{wrong[0]}" is not NAME=DIR')
    return {name: directory for name, _, directory in pairs}


def only_given(document: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is None or empty, at every depth."""
    nested = {name: only_given(value) if isinstance(value, dict) else value for name, value in document.items()}
    return {name: value for name, value in nested.items() if value not in (None, {}, [])}


def option_of(place: "Place", document: Mapping[str, Any]) -> str:
    """Return the option that says what stands at a place of the configuration."""
    match place:
        case ("source", "address", *_):
            return "--source"
        case ("source", "documents", *_):
            return "--run-engine"
        case ("source", "roots", *_):
            return "--root"
        case ("checkpoint", *_):
            return "--checkpoint"
        case ("operators", "twotime", name, *_):
            return "--two-time" if name == "frames" else f"--two-time-{name}"
        case ("sinks", int(index), *_):
            scheme, has_scheme, _ = document["sinks"][index].partition("://")
            option = {"zmq": "--publish", "live": "--live"}.get(scheme, "--documents")
            return option if has_scheme else "--out"
        case _:
            return f"--{place[-1]}".replace("_", "-")


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an Event that SIGINT and SIGTERM set; a second SIGINT ends the process at once.

    A second SIGTERM does nothing, to the end: schedulers send it to all processes of a job, and again.
    """
    stop = threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _: FrameType | None) -> None:
        stop.set()
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])
        else:
            before[signal.SIGTERM] = signal.SIG_IGN

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
