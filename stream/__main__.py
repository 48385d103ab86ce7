"""The command line. What it names is made by `stream.assembly`."""

import importlib.metadata
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from stream import live_command, logs, plane_commands, result_commands
from stream.errors import ConfigError, SinkError, XpcsStreamError
from stream.logs import say
from stream.options import (
    Documents,
    FrameTime,
    KafkaProperties,
    Live,
    ProxyKey,
    Qmap,
    Roots,
    RunEngine,
    SecretKey,
    TokenFile,
    TwoTime,
    TwoTimeBy,
    measured,
    only_given,
    option_of,
    roots_of,
    say_where,
    stopped_by_signals,
    two_time_of,
)
from stream.result_commands import save, show_facts

# Only what `--help` needs is imported up here: numba, h5py, matplotlib, pint and pydantic take their time.
if TYPE_CHECKING:
    from stream.config import Configuration
    from stream.sinks.dectris import DectrisSink
    from stream.sinks.faults import Faults
    from stream.sinks.zmq import ZmqSink

_log = logging.getLogger("stream")


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Say what went wrong in one line, without a traceback."""
        try:
            return super().invoke(ctx)
        except XpcsStreamError as error:
            for line in str(error).splitlines():
                say(line if logs.is_json() else f"xpcs-stream: {line}", logging.ERROR)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"xpcs-stream {importlib.metadata.version('xpcs-stream')}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo("xpcs-stream, not installed")
        raise typer.Exit


@app.callback()
def main(
    ctx: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what happens.")] = False,
    log_format: Annotated[
        logs.Format,
        typer.Option(
            envvar=logs.VARIABLE,
            help="Of what is told by standard error: in words, or as one JSON object a line, for machines.",
        ),
    ] = "text",
    _version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    r"""Live X-ray photon correlation spectroscopy: detector streams in, g2 out.

    [bold]A map of q, a simulated detector, and its correlation:[/bold]

    xpcs-stream qmap --shape 256x256 --beam-center-x 128 --beam-center-y 128 \
        --detector-distance "5 m" --pixel-size "75 um" \
        --incident-energy "11 keV" --out qmap.h5

    xpcs-stream simulate --qmap qmap.h5 --to zmq+dectris://127.0.0.1:31001

    xpcs-stream run --source zmq+dectris://127.0.0.1:31001 --qmap qmap.h5 \
        --out result.h5 --runs 1

    Quantities are written with their units. ADDRESS is one of

    zmq+dectris://HOST:PORT    a DECTRIS detector, Stream V1 or V2
    zmq://HOST:PORT            another xpcs-stream
    FILE                       .h5 .hdf5 .nxs .hdf, or recorded .cbors .cbors.xz
    """
    # Results go to standard output, everything meant for eyes to standard error.
    ctx.obj = console = Console(stderr=True, quiet=log_format == "json")
    logs.configure(
        f"xpcs-stream {ctx.invoked_subcommand}",
        level=logging.INFO if verbose else logging.WARNING,
        how=log_format,
        console=console,
    )


To = Annotated[str, typer.Option(help="zmq+dectris://HOST:PORT or zmq://HOST:PORT to listen on.", metavar="ADDRESS")]
StreamVersion = Annotated[Literal["1", "2"], typer.Option(help="Version of the DECTRIS stream.")]
Unpaced = Annotated[bool, typer.Option("--as-fast-as-possible", help="Send without waiting, whatever the rate.")]


@app.command()
def run(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="YAML file, instead of the options.", show_default=False)
    ] = None,
    source: Annotated[str | None, typer.Option(help="Where frames come from.", metavar="ADDRESS")] = None,
    qmap: Annotated[str | None, typer.Option(help="Map of pixels to q bins (HDF5).", metavar="FILE")] = None,
    out: Annotated[
        str | None, typer.Option(help="Result file, NXxpcs; {run} in it stands for the run.", metavar="FILE")
    ] = None,
    publish: Annotated[str | None, typer.Option(help="Publish results at zmq://HOST:PORT.", metavar="ADDRESS")] = None,
    documents: Documents = None,
    live: Live = None,
    token_file: TokenFile = None,
    run_engine: RunEngine = None,
    root: Roots = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Keep the state here, so that a restart goes on.", metavar="FILE")
    ] = None,
    channel: Annotated[str | None, typer.Option(help="Threshold channel of a DECTRIS stream.")] = None,
    frame_time: Annotated[
        str | None, typer.Option(help='Start to start of frames, for an HDF5 file that does not tell: "500 us".')
    ] = None,
    delays_per_level: Annotated[int | None, typer.Option(help="4 at the APS.")] = None,
    levels: Annotated[int | None, typer.Option(help="Levels of multi-tau, 16 if not given.")] = None,
    error: Annotated[
        str | None, typer.Option(help="Error bars from the spread over 'static' bins, or over each 'pixel'.")
    ] = None,
    segments: Annotated[
        int | None, typer.Option(help="Parts of the run of which g2 is told too, 8 if not given.")
    ] = None,
    two_time: TwoTime = None,
    two_time_normalisation: TwoTimeBy = None,
    publish_every: Annotated[str | None, typer.Option(help='Time between interim results: "1 s".')] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that correlate; one per core if not given.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Stop after so many runs.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No live display.")] = False,
    kafka_properties: KafkaProperties = None,
    secret_key: SecretKey = None,
    proxy_key: ProxyKey = None,
) -> None:
    """Correlate frames as they come. Prints the name of every result file.

    xpcs-stream run --source zmq+dectris://127.0.0.1:31001 --qmap qmap.h5 --out result.h5 --runs 1

    xpcs-stream run docs/run.example.yaml
    """
    from stream.config import check, load

    given = only_given(
        {
            "source": {
                "address": source,
                "channel": channel,
                "frame_time": frame_time,
                "documents": run_engine,
                "roots": roots_of(root),
            },
            "qmap": qmap,
            "operators": {
                "multitau": {
                    "delays_per_level": delays_per_level,
                    "levels": levels,
                    "error": error,
                    "segments": segments,
                },
                "twotime": two_time_of(two_time, two_time_normalisation),
            },
            "sinks": [sink for sink in (None if quiet else "console", out, publish, live, *(documents or ())) if sink],
            "token_file": token_file and str(token_file),
            "kafka_properties": kafka_properties and str(kafka_properties),
            "secret_key": secret_key and str(secret_key),
            "proxy_key": proxy_key and str(proxy_key),
            "checkpoint": {"path": checkpoint},
            "publish_every": publish_every,
            "threads": threads,
        }
    )
    if config is None:
        if source is None or qmap is None:
            raise typer.BadParameter("give a CONFIG file, or --source and --qmap")
        configuration = check(given, lambda place: f"{option_of(place, given)}: ")
    elif given == {"sinks": ["console"]}:
        configuration = load(config)
    else:
        raise typer.BadParameter(f"{config} says what to do; beside it only --runs can be given")
    _correlate(configuration, runs, ctx.obj)


@app.command("compile")
def compile_ahead() -> None:
    """Compile the kernels now, so that the next run starts within seconds.

    The first run of an installation, and the first on another kind of CPU, does so by itself before it listens. They
    are kept beside the package, or in the user's cache directory where that cannot be written to, or in
    NUMBA_CACHE_DIR.

    xpcs-stream compile
    """
    from stream.correlators import compile_all

    compile_all(say)


def _correlate(configuration: "Configuration", runs: int | None, console: Console) -> None:
    from stream import checkpoint as checkpoints
    from stream.assembly import proxy_keys, sinks_of, source_of, try_to_write
    from stream.config import address, there
    from stream.correlators import compile_kernels, operators_of
    from stream.operators.roimap_file import read
    from stream.pipeline import Pipeline

    roimap = read(there(Path(configuration.qmap)))
    make = operators_of(configuration, roimap)
    checkpoint = configuration.checkpoint
    where = address(configuration.source.address)
    if where.transport in ("hdf5", "recording"):
        there(Path(where.target))
    if checkpoint:
        try_to_write(Path(checkpoint.path))
    with ExitStack() as stack:
        stop = stack.enter_context(stopped_by_signals())
        properties = Path(configuration.kafka_properties) if configuration.kafka_properties else None
        memory = Path(f"{checkpoint.path}.documents") if checkpoint else None
        sinks = sinks_of(configuration, roimap, console, typer.echo, stop=stop, memory=memory)
        for sink in sinks:
            stack.enter_context(sink)
        # A detector that waits for a receiver must find one that is ready.
        compile_kernels(make, roimap, say)
        keys = proxy_keys(configuration)
        source = stack.enter_context(
            source_of(configuration.source, give="photons", kafka_properties=properties, keys=keys)
        )
        for at in configuration.sinks:
            if at.startswith("live://"):
                say_where(at, configuration.token_file)
        say(f"taking frames from {configuration.source.address}")
        Pipeline(
            source,
            make,
            sinks,
            checkpoints=checkpoints.File(Path(checkpoint.path)) if checkpoint else None,
            checkpoint_every=checkpoint.every if checkpoint else 30.0,
            publish_every=configuration.publish_every,
            runs=runs,
            stop=stop,
        ).run()
    left = checkpoints.load(Path(checkpoint.path)) if checkpoint and stop.is_set() else None
    if checkpoint and left and left.running and left.running.stop is None:
        run, frame = left.running.start.run, int(left.running.ledger["next_frame"])
        say(f"run {run} left at frame {frame} in {checkpoint.path}; start again to go on")


@app.command()
def simulate(
    qmap: Qmap,
    to: To,
    stream: StreamVersion = "2",
    frames: Annotated[int, typer.Option(min=1, help="Frames of the run.")] = 10_000,
    rate: Annotated[
        float,
        typer.Option(
            parser=measured("1/s"), metavar="RATE", help="Of the frames; 1 kHz if not given.", show_default=False
        ),
    ] = 1000.0,
    as_fast_as_possible: Unpaced = False,
    mean_counts: Annotated[float, typer.Option(help="Per pixel and frame.")] = 0.1,
    contrast: Annotated[float, typer.Option(help="beta in g2 = 1 + beta |g1|^2, up to 1.")] = 0.2,
    diffusion: Annotated[
        float,
        typer.Option(
            parser=measured("angstrom^2/s"),
            metavar="D",
            help='|g1| = exp(-D q^2 tau); "1e6 angstrom^2/s" if not given.',
            show_default=False,
        ),
    ] = 1e6,
    stretch: Annotated[float, typer.Option(help="gamma in exp(-(D q^2 tau)^gamma), up to 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed, the same counts and faults.")] = 0,
    sample: Annotated[str, typer.Option(help="Name of the sample.")] = "simulated diffusion",
    lose: Annotated[float, typer.Option(help="Probability that a message with frames is lost ...")] = 0.0,
    duplicate: Annotated[float, typer.Option(help="... is sent twice ...")] = 0.0,
    reorder: Annotated[float, typer.Option(help="... is sent after the next ...")] = 0.0,
    delay: Annotated[float, typer.Option(help="... is held up for 50 ms ...")] = 0.0,
    truncate: Annotated[float, typer.Option(help="... is cut.")] = 0.0,
) -> None:
    """Send what a detector would: speckle with known dynamics. Its shape, geometry and q are those of the map.

    xpcs-stream simulate --qmap qmap.h5 --to zmq+dectris://127.0.0.1:31001 --rate "1 kHz" --lose 0.01
    """
    from stream.assembly import simulated
    from stream.config import there
    from stream.operators.roimap_file import read
    from stream.sending import send
    from stream.sinks.faults import Faults

    source = simulated(
        read(there(qmap)),
        diffusion=diffusion,
        contrast=contrast,
        stretch=stretch,
        mean_counts=mean_counts,
        n_frames=frames,
        frame_time=1 / rate,
        seed=seed,
        sample=sample,
        batch=_frames_at_once(rate),
    )
    faults = Faults(lose=lose, duplicate=duplicate, reorder=reorder, truncate=truncate, delay=delay, seed=seed)
    with _detector(to, stream, faults) as (sink, stop):
        sent = send(source, sink, stop, paced=not as_fast_as_possible, rate=rate)
        say(f"sent {sent}")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="Frames (HDF5), or recorded messages (.cbors, .cbors.xz).")],
    to: To,
    rate: Annotated[
        float | None,
        typer.Option(parser=measured("1/s"), metavar="RATE", help='Frames: "1 kHz". As recorded if not given.'),
    ] = None,
    frame_time: FrameTime = None,
    stream: StreamVersion = "2",
    as_fast_as_possible: Unpaced = False,
) -> None:
    """Send the frames of a file as a detector would; recorded messages are sent byte for byte.

    xpcs-stream replay frames.h5 --to zmq+dectris://127.0.0.1:31001 --rate "500 Hz"
    """
    from stream.assembly import frames_of
    from stream.config import address, there
    from stream.ingest.recording import messages
    from stream.sending import send, send_recorded
    from stream.sinks.dectris import DectrisSink
    from stream.sinks.faults import Faults

    paced = not as_fast_as_possible
    is_recording = address(str(there(file))).transport == "recording" and address(to).transport == "dectris"
    if is_recording and paced and rate is None:
        raise ConfigError("recorded messages are sent at a --rate, or --as-fast-as-possible")
    with ExitStack() as stack:
        if not is_recording:
            source = stack.enter_context(
                frames_of(str(file), _frames_at_once(rate), frame_time, otherwise=1 / rate if rate else None)
            )
        sink, stop = stack.enter_context(_detector(to, stream, Faults()))
        if is_recording and isinstance(sink, DectrisSink):
            sent = send_recorded(messages(file), sink.send, stop, rate=rate if paced else None)
        else:
            sent = send(source, sink, stop, paced=paced, rate=rate)
        say(f"sent {sent}")


def _frames_at_once(rate: float | None) -> int:
    """Return how many frames go out together: those of 50 ms, so that they come as evenly as from a detector."""
    return max(1, min(64, int((rate or 1000) / 20)))


@contextmanager
def _detector(to: str, stream: str, faults: "Faults") -> Iterator[tuple["DectrisSink | ZmqSink", threading.Event]]:
    """Yield where frames go, and the Event that ends it; nobody receiving is no error once it is set."""
    from stream.config import address
    from stream.sinks.dectris import DectrisSink
    from stream.sinks.zmq import ZmqSink

    where = address(to)
    with stopped_by_signals() as stop:
        try:
            sink: DectrisSink | ZmqSink
            match where.transport:
                case "dectris":
                    sink = DectrisSink(where.target, version=1 if stream == "1" else 2, faults=faults, stop=stop)
                case "zmq":
                    sink = ZmqSink(where.target, pattern="push", faults=faults, stop=stop)
                case _:
                    raise ConfigError(f"{to}: frames are sent to zmq+dectris://HOST:PORT or zmq://HOST:PORT")
            with sink:
                say(f"waiting for a receiver at {sink.address}")
                yield sink, stop
        except SinkError as error:
            if not stop.is_set():
                raise
            say(error)


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(metavar="FILE|ADDRESS")],
    frames: Annotated[int, typer.Option(min=1, help="Look at so many frames at most.")] = 1000,
    frame_time: FrameTime = None,
) -> None:
    """Tell what a file or a stream holds.

    A stream gives each frame to one receiver only: frames looked at are missing elsewhere.

    xpcs-stream inspect result.h5
    """
    from stream import inspection
    from stream.assembly import frames_of
    from stream.config import address
    from stream.operators.roimap_file import read
    from stream.sinks.console import g2_table

    where = address(what)
    console = Console()
    kind = inspection.kind(Path(where.target)) if where.transport == "hdf5" else "frames"
    if kind == "frames":
        is_told = True
        try:
            opened = frames_of(what, None, frame_time)
        except ConfigError:
            is_told, opened = False, frames_of(what, None, frame_time, otherwise=1.0)
        with stopped_by_signals() as stop, opened as source:
            facts = dict(inspection.of_frames(source, stop, frames))
        if not is_told:
            facts |= {"frame time": "not told", "count time": "not told"}
        show_facts(console, facts)
        return
    roimap = read(Path(where.target))
    if kind == "map":
        show_facts(console, {"map": what, **inspection.of_map(roimap)})
        return
    of_result, g2 = inspection.of_result(Path(where.target))
    show_facts(console, {"result": what, **of_result, **inspection.of_map(roimap)})
    console.print(g2_table(g2, roimap.dynamic_q.tolist(), console.width, roimap.n_dynamic))


@app.command()
def qmap(
    shape: Annotated[str, typer.Option(help="Rows and columns of the detector: 514x1030.", metavar="ROWSxCOLUMNS")],
    beam_center_x: Annotated[float, typer.Option(help="Column of the direct beam (pixel).")],
    beam_center_y: Annotated[float, typer.Option(help="Row of the direct beam (pixel).")],
    detector_distance: Annotated[float, typer.Option(parser=measured("m"), metavar="LENGTH", help='"5 m"')],
    pixel_size: Annotated[float, typer.Option(parser=measured("m"), metavar="LENGTH", help='"75 um"')],
    incident_energy: Annotated[float, typer.Option(parser=measured("keV"), metavar="ENERGY", help='"11 keV"')],
    out: Annotated[Path, typer.Option(help="Map file to write (HDF5, as pySimpleMask).", metavar="FILE")],
    mask: Annotated[
        Path | None,
        typer.Option(help="Pixels to use: .npy (0 = not), or the mask or pixel_mask of an HDF5 file.", metavar="FILE"),
    ] = None,
    n_dynamic: Annotated[int, typer.Option(help="Rings that g2 is told for.")] = 9,
    n_static: Annotated[int, typer.Option(help="Rings that g2 is normalised in; a multiple of n-dynamic.")] = 90,
    n_phi: Annotated[int, typer.Option(help="Sectors of every ring.")] = 1,
    q_min: Annotated[
        float | None, typer.Option(parser=measured("1/angstrom"), metavar="Q", help='"0.002 1/angstrom"')
    ] = None,
    q_max: Annotated[
        float | None, typer.Option(parser=measured("1/angstrom"), metavar="Q", help='"0.03 1/angstrom"')
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the map.", metavar="FILE")] = None,
) -> None:
    """Divide a detector into rings of equal q.

    xpcs-stream qmap --shape 256x256 --beam-center-x 128 --beam-center-y 128 --detector-distance "5 m"
    --pixel-size "75 um" --incident-energy "11 keV" --out qmap.h5
    """
    from stream.inspection import of_map
    from stream.operators.qmap import ring_map
    from stream.operators.roimap_file import read_mask, write

    rows, _, columns = shape.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise typer.BadParameter(f"shape {shape} is not ROWSxCOLUMNS, e.g. 514x1030")
    roimap = ring_map(
        shape=(int(rows), int(columns)),
        beam_center_x=beam_center_x,
        beam_center_y=beam_center_y,
        detector_distance=detector_distance,
        pixel_size=pixel_size,
        incident_energy=incident_energy,
        mask=None if mask is None else read_mask(mask),
        n_static=n_static,
        n_dynamic=n_dynamic,
        n_phi=n_phi,
        q_min=q_min,
        q_max=q_max,
    )
    write(out, roimap)
    if png is not None:
        from stream.figure import draw_map

        save(draw_map(roimap), png)
    show_facts(Console(), {"map": out, **of_map(roimap)})


for command in (
    plane_commands.gateway,
    plane_commands.worker,
    plane_commands.merge,
    live_command.live,
    plane_commands.backfill,
    plane_commands.broker,
    plane_commands.keys,
    result_commands.show,
    result_commands.compare,
    result_commands.export,
):
    app.command()(command)


if __name__ == "__main__":
    app(prog_name="xpcs-stream")
