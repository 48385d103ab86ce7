"""The commands of the streaming plane. What they name is made by `stream.plane`."""

import gc
import os
import re
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

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

# As in `stream.__main__`: only what `--help` needs is imported up here.
if TYPE_CHECKING:
    from stream.correlators import Make
    from stream.gateway_runs import GatewayRuns
    from stream.gateway_status import GatewayStatus
    from stream.operators.roimap import RoiMap
    from stream.plane import Plane
    from stream.sinks.spool import Spool

_PLANE = "kafka://HOST:PORT/BEAMLINE or zmq://HOST:PORT/BEAMLINE"

Source = Annotated[str, typer.Option(help=f"{_PLANE}: that of the gateway.", metavar="ADDRESS")]
GatewayKey = Annotated[
    Path | None, typer.Option("--gateway-key", metavar="FILE", help="zmq: the public key of the gateway.")
]


def _plane(text: str, properties: Path | None, secret_key: Path | None, peers: Path | None, *, binds: bool) -> "Plane":
    """Return the plane at an address; `peers` are the keys that may come, or the one that we go to."""
    from stream.config import address

    where = address(text)
    if where.transport not in ("kafka", "hub"):
        raise typer.BadParameter(f'"{text}" is not {_PLANE}')
    if where.transport == "kafka":
        if secret_key or peers:
            raise typer.BadParameter(f"keys of ZeroMQ are not for {text}; see --kafka-properties")
        from stream.kafka import read_properties
        from stream.kafka_plane import KafkaPlane

        return KafkaPlane(where.target, read_properties(properties))
    if properties:
        raise typer.BadParameter(f"--kafka-properties are not for {text}")
    from stream.curve import ClientKeys, GatewayKeys
    from stream.zmq_plane import ZmqPlane

    if (secret_key is None) != (peers is None):
        raise typer.BadParameter(f"--secret-key and {'--allowed' if binds else '--gateway-key'} go together")
    keys: ClientKeys | GatewayKeys | None = None
    if secret_key is not None and peers is not None:
        keys = (GatewayKeys if binds else ClientKeys).read(secret_key, peers)
    hub, _, beamline = where.target.rpartition("/")
    return ZmqPlane(hub, beamline, keys)


def _scraped(
    at: str, runs: "GatewayRuns", status: "GatewayStatus", to: list[str], spool: "Spool | None"
) -> AbstractContextManager[None]:
    from stream import gateway_metrics
    from stream.scraped import served

    return served(at, gateway_metrics.registry(runs, status, to, spool))


def _is_loopback(target: str) -> bool:
    host = urlsplit(target).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, or "*"
        return host == "localhost"


def gateway(
    source: Annotated[str, typer.Option(help="Where frames come from.", metavar="ADDRESS")],
    to: Annotated[list[str], typer.Option(help=f"{_PLANE}; may be given twice.", metavar="ADDRESS")],
    regions: Annotated[int, typer.Option(min=1, max=4096, help="Bands of rows, each correlated by one worker.")],
    channel: Annotated[str | None, typer.Option(help="Threshold channel of a DECTRIS stream.")] = None,
    frame_time: FrameTime = None,
    run_engine: RunEngine = None,
    root: Roots = None,
    keep: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GB of frames kept of each region: 10 on the disk of Kafka; 0.5 in memory for zmq, and as much for "
            "partial sums. If not given.",
            show_default=False,
        ),
    ] = None,
    kafka_properties: KafkaProperties = None,
    secret_key: SecretKey = None,
    allowed: Annotated[
        Path | None, typer.Option(metavar="DIR", help="zmq: public keys of the workers and mergers that may come.")
    ] = None,
    proxy_key: ProxyKey = None,
    spool: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the frames of every run here too, to DIR/RUN/RUN_master.h5, which run and gateway take as a "
            "source. Whoever has them safe elsewhere makes a file DIR/RUN/safe.",
        ),
    ] = None,
    spool_keep: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GB of all runs in DIR; 100 if not given. The oldest that are safe make room, the others never.",
            show_default=False,
        ),
    ] = None,
    plane_file: Annotated[
        Path | None,
        typer.Option(
            "--plane",
            metavar="FILE",
            help='Which way frames go, as JSON, looked at all the time: {"plane": "stream", "stream+file" or "file", '
            '"why": text, "since": seconds of the Unix epoch}. By "file" they are in the spool only, and workers hear '
            "of starts and ends of runs; that needs --spool. Without the file they are streamed.",
        ),
    ] = None,
    status: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Tell here how the gateway is, as JSON: every second, and at once when a run begins or ends. run, "
            "frames: those of now; frames_per_s, bytes_per_s; plane, why: which way frames go; ack_lag_s: how long ago "
            "the oldest was sent that no worker has safe; lost: records of the run that went before a worker had them "
            "safe, lost_in_all: of all runs; null where that is not known; spool: directory, lost (frames), full_in_s, "
            "held_bytes; runs: the last ones, also those found in the spool, with path, files, bytes, began, ended, "
            "exit_status, frames, spooled, unsent (that went by file only), lost, planes, unsafe (workers have not all "
            "of it yet), safe.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve Prometheus at http://HOST:PORT/metrics; a PORT alone is for this machine only. Whoever reaches "
            "it sees rates, losses and addresses of the beamline, no names of runs, no data and no secrets.",
        ),
    ] = None,
) -> None:
    """Send a detector's frames to the workers, cut into regions.

    Over Kafka, which keeps them (the topics BEAMLINE.xpcs.frames and BEAMLINE.xpcs.partials are made if they are not
    there); or over ZeroMQ, where workers and mergers come to this process, which keeps in memory what they do not have
    safe yet, and stays until they have it.

    xpcs-stream gateway --source zmq+dectris://127.0.0.1:31001 --to zmq://127.0.0.1:5555/8idi --regions 4
    """
    from stream import plane
    from stream.assembly import proxy_keys, source_of
    from stream.config import address, check
    from stream.gateway_runs import GatewayRuns
    from stream.gateway_status import GatewayStatus
    from stream.plane_file import PlaneFile
    from stream.regions import Regions
    from stream.sinks.spool import Spool, Spooled

    given = {
        "address": source,
        "channel": channel,
        "frame_time": frame_time and f"{frame_time!r} s",
        "documents": run_engine,
        "roots": roots_of(root),
    }
    document = only_given(
        {"source": given, "qmap": "any", **_for_proxies(secret_key, proxy_key)}
    )  # no map is asked for
    configuration = check(document, lambda place: f"{option_of(place, document)}: ")
    keys_of_plane = (secret_key if allowed or not proxy_key else None, allowed)
    if any(keys_of_plane) and all(address(text).transport == "kafka" for text in to):
        raise typer.BadParameter("--secret-key and --allowed are for zmq; for Kafka see --kafka-properties")
    open_to_all = [text for text in to if address(text).transport == "hub" and not _is_loopback(address(text).target)]
    if secret_key and not allowed and open_to_all:
        raise typer.BadParameter(f"--secret-key without --allowed: anyone could come to {open_to_all[0]}, unencrypted")
    is_file = address(source).transport in ("hdf5", "recording", "rigaku", "documents")
    if spool and address(source).transport not in ("dectris", "zmq"):
        raise typer.BadParameter(f"--spool is for a detector's stream; {source} is files, which are their own spool")
    if spool_keep and not spool:
        raise typer.BadParameter("--spool-keep is for --spool DIR")
    with stopped_by_signals() as stop, ExitStack() as stack:
        raw: Spool | None = None
        if spool:
            keep_bytes = round(1e9 * (spool_keep if spool_keep is not None else 100.0))
            raw = stack.enter_context(Spool(spool, keep_bytes=keep_bytes))
        sinks: list[plane.Sent] = []
        runs = GatewayRuns(PlaneFile(plane_file) if plane_file else None, raw)
        # These two also while workers take what they have not.
        told = stack.enter_context(GatewayStatus(status, runs, sinks, raw, is_watched=metrics is not None))
        if metrics is not None:
            stack.enter_context(_scraped(metrics, runs, told, to, raw))
        for text in to:
            is_kafka = address(text).transport == "kafka"
            properties, keys = (kafka_properties, (None, None)) if is_kafka else (None, keys_of_plane)
            there = _plane(text, properties, *keys, binds=True)
            ring_bytes = round(1e9 * (keep if keep is not None else 10.0 if is_kafka else 0.5))
            # A detector without a spool is held up by Kafka: what waits in it is not lost.
            waits = is_file or (is_kafka and raw is None)
            sinks.append(there.gateway(regions, ring_bytes=ring_bytes, waits=waits, stop=stop))
            stack.enter_context(sinks[-1])
        of_proxy = proxy_keys(configuration)
        frames = stack.enter_context(
            source_of(configuration.source, give="chunks", kafka_properties=kafka_properties, keys=of_proxy)
        )
        if raw is not None:
            frames = Spooled(frames, raw)
        say(f"taking frames from {source}")
        ledger = plane.send(frames, sinks, Regions(regions), stop, runs.is_sent)
        say(f"sent {ledger.received:,} frames to {regions} regions of {' and '.join(to)}, {ledger.lost:,} lost before")
    if raw is not None:
        say(f"{raw.lost:,} frames are not in the spool {spool}")


def worker(
    source: Source,
    qmap: Qmap,
    checkpoints: Annotated[
        Path, typer.Option(help="Directory that all workers of the beamline reach; a region goes on from there.")
    ],
    delays_per_level: Annotated[int, typer.Option(help="4 at the APS.")] = 4,
    levels: Annotated[int, typer.Option(help="Levels of multi-tau.")] = 16,
    two_time: TwoTime = None,
    two_time_normalisation: TwoTimeBy = None,
    publish_every: Annotated[
        float, typer.Option(parser=measured("s"), metavar="TIME", help='Between partial sums: "1 s".')
    ] = 1.0,
    checkpoint_every: Annotated[
        float, typer.Option(parser=measured("s"), metavar="TIME", help="What is replayed at most after a kill.")
    ] = 30.0,
    threads: Annotated[int | None, typer.Option(help="Threads that correlate; one per core if not given.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Keeps its regions for one that is started again under this name soon.")
    ] = None,
    status: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Tell here how this worker is, as JSON: every second, and at once when its regions change. ready: its "
            "kernels are compiled; regions: those that it has; frames: that it has correlated; "
            "lag_s: how long ago the frames ended at which it is, 0 when there are none left, null where that is not "
            "known; message: what it waits for.",
        ),
    ] = None,
    kafka_properties: KafkaProperties = None,
    secret_key: SecretKey = None,
    gateway_key: GatewayKey = None,
) -> None:
    """Correlate the regions that this worker is given, together with all others of the beamline.

    Start as many as there are nodes, and stop or kill any of them at any time: the others go on with its regions.

    xpcs-stream worker --source zmq://127.0.0.1:5555/8idi --qmap qmap.h5 --checkpoints checkpoints
    """
    from stream import kernel_cache, plane
    from stream.correlators import compile_kernels
    from stream.status import Status

    there = _plane(source, kafka_properties, secret_key, gateway_key, binds=False)
    if name is not None and re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) is None:
        raise typer.BadParameter(f'--name "{name}" is not of letters, digits, ".", "_" and "-"')
    operators = _section(delays_per_level, levels, two_time, two_time_normalisation)
    make, roimap = _operators(qmap, operators, threads, there)
    with ExitStack() as stack:
        told = stack.enter_context(Status(status))
        told.say("compiling kernels")
        with kernel_cache.alone():
            compile_kernels(make, roimap, say)
        gc.freeze()  # looking through all that numba made takes a second when a process ends
        told.say("waiting for a gateway", ready=True)
        stop = stack.enter_context(stopped_by_signals())
        there.wait(stop)
        if stop.is_set():
            return
        say(f"taking regions of {source}")
        told.say("", ready=True)
        plane.work(
            there,
            make,
            checkpoints=checkpoints,
            name=name,
            publish_every=publish_every,
            checkpoint_every=checkpoint_every,
            stop=stop,
            watch=told.watch,
        )


def merge(
    ctx: typer.Context,
    source: Source,
    qmap: Qmap,
    out: Annotated[
        str | None, typer.Option(help="Result file, NXxpcs; {run} in it stands for the run.", metavar="FILE")
    ] = None,
    publish: Annotated[str | None, typer.Option(help="Publish results at zmq://HOST:PORT.", metavar="ADDRESS")] = None,
    documents: Documents = None,
    live: Live = None,
    token_file: TokenFile = None,
    position: Annotated[
        Path | None, typer.Option(help="Keep here which runs are done, so that a restart does not repeat them.")
    ] = None,
    delays_per_level: Annotated[int, typer.Option(help="As the workers.")] = 4,
    levels: Annotated[int, typer.Option(help="As the workers.")] = 16,
    two_time: TwoTime = None,
    two_time_normalisation: TwoTimeBy = None,
    publish_every: Annotated[
        float, typer.Option(parser=measured("s"), metavar="TIME", help='Between interim results: "1 s".')
    ] = 1.0,
    patience: Annotated[
        float,
        typer.Option(parser=measured("s"), metavar="TIME", help="A region that is further behind is left out for now."),
    ] = 10.0,
    repair_within: Annotated[
        float,
        typer.Option(
            parser=measured("s"),
            metavar="TIME",
            show_default=False,
            help="Hold a run with lost frames open so long for `xpcs-stream backfill`; until then its results are "
            "interim ones. Not at all if not given.",
        ),
    ] = 0.0,
    plane_file: Annotated[
        Path | None,
        typer.Option("--plane", metavar="FILE", help="Where it is told which way frames go; results say it."),
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Stop after so many runs.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No live display.")] = False,
    kafka_properties: KafkaProperties = None,
    secret_key: SecretKey = None,
    gateway_key: GatewayKey = None,
    proxy_key: ProxyKey = None,
) -> None:
    """Add up what the workers know of their regions. Prints the name of every result file.

    xpcs-stream merge --source zmq://127.0.0.1:5555/8idi --qmap qmap.h5 --out result-{run}.h5
    """
    from stream import plane
    from stream.assembly import sinks_of
    from stream.config import address, check
    from stream.plane_file import WAYS, PlaneFile

    way = PlaneFile(plane_file) if plane_file is not None else None
    # What is only for documents is not for the plane.
    to_kafka = any(text.startswith("kafka://") for text in documents or ())
    properties = kafka_properties if address(source).transport == "kafka" or not to_kafka else None
    there = _plane(source, properties, secret_key if gateway_key or not proxy_key else None, gateway_key, binds=False)
    operators = _section(delays_per_level, levels, two_time, two_time_normalisation)
    make, roimap = _operators(qmap, operators, None, there)
    sinks = [sink for sink in (None if quiet else "console", out, publish, live, *(documents or ())) if sink]
    configuration = check(
        {
            "source": {"address": source},
            "qmap": str(qmap),
            "operators": operators,
            "sinks": sinks or ["console"],
            "token_file": token_file and str(token_file),
            "kafka_properties": kafka_properties and str(kafka_properties),
            **_for_proxies(secret_key, proxy_key),
            "publish_every": f"{publish_every!r} s",
        }
    )
    with stopped_by_signals() as stop, ExitStack() as stack:
        memory = Path(f"{position}.documents") if position else None
        made = sinks_of(configuration, roimap, ctx.obj, typer.echo, stop=stop, memory=memory) if sinks else []
        open_sinks = [stack.enter_context(sink) for sink in made]
        if live:
            say_where(live, token_file)
        there.wait(stop)
        if stop.is_set():
            return
        partials = stack.enter_context(there.results())
        say(f"taking partial sums from {source}")
        plane.merge_partials(
            partials,
            make,
            open_sinks,
            position=position,
            publish_every=publish_every,
            patience=patience,
            repair_within=repair_within,
            went=lambda: WAYS.index(way.look().plane) if way is not None else 0,
            runs=runs,
            stop=stop,
        )


def backfill(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    source: Annotated[
        Path,
        typer.Option(help="File of the run (HDF5), or the directory of a spool, or of the run in it.", metavar="FILE"),
    ],
    qmap: Qmap,
    plane: Annotated[
        str | None, typer.Option(help=f"Repair the regions that lost frames: {_PLANE}.", metavar="ADDRESS")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Replace this result file, if the source has more frames of the run.", metavar="FILE"),
    ] = None,
    publish: Annotated[
        str | None, typer.Option(help="With --out: publish results at zmq://HOST:PORT, too.", metavar="ADDRESS")
    ] = None,
    documents: Documents = None,
    regions: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="That the gateway cuts frames into, where the plane knows nothing of it."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep the state here, so that a restart goes on.", metavar="FILE")
    ] = None,
    checkpoint_every: Annotated[
        float, typer.Option(parser=measured("s"), metavar="TIME", help="What is repeated at most after a kill.")
    ] = 30.0,
    delays_per_level: Annotated[int, typer.Option(help="As the workers.")] = 4,
    levels: Annotated[int, typer.Option(help="As the workers.")] = 16,
    two_time: TwoTime = None,
    two_time_normalisation: TwoTimeBy = None,
    threads: Annotated[int | None, typer.Option(help="Threads that correlate; one per core if not given.")] = None,
    kafka_properties: KafkaProperties = None,
    secret_key: SecretKey = None,
    gateway_key: GatewayKey = None,
    proxy_key: ProxyKey = None,
) -> None:
    """Compute anew from its file what of a run is without the frames that were lost on their way.

    With --plane regions that lost frames, and a merger that waits for them (merge --repair-within) has the run's
    final result then. With --out the whole run. Ends with 0 if there is nothing to repair, with 75 if it was told to
    stop before it was done.

    xpcs-stream backfill scan-7 --source spool --qmap qmap.h5 --plane zmq://127.0.0.1:5555/8idi

    xpcs-stream backfill scan-7 --source spool --qmap qmap.h5 --out result-{run}.h5
    """
    from stream import backfill as repairing
    from stream import backfill_file, backfill_result
    from stream.assembly import sinks_of
    from stream.config import check
    from stream.correlators import compile_kernels
    from stream.sinks.hdf5 import file_of

    if (plane is None) == (out is None):
        raise typer.BadParameter("give --plane or --out")
    if plane is not None and (publish or documents):
        raise typer.BadParameter("--publish and --documents go with --out; with --plane that is the merger's")
    operators = _section(delays_per_level, levels, two_time, two_time_normalisation)
    there = None if plane is None else _plane(plane, kafka_properties, secret_key, gateway_key, binds=False)
    make, roimap = _operators(qmap, operators, threads, there)
    file = backfill_file.look(backfill_file.find(source, run), run)

    is_done = True
    with stopped_by_signals() as stop, ExitStack() as stack:
        compile_kernels(make, roimap, say)
        if there is not None:
            there.wait(stop)
            is_done = not stop.is_set() and repairing.backfill(
                run,
                file,
                there,
                make,
                n_regions=regions,
                saved=checkpoint,
                checkpoint_every=checkpoint_every,
                say=say,
                stop=stop,
            )
        elif out is not None:
            configuration = check(
                {
                    "source": {"address": str(file.path)},
                    "qmap": str(qmap),
                    "operators": operators,
                    "sinks": [sink for sink in (out, publish, *(documents or ())) if sink],
                    "kafka_properties": kafka_properties and str(kafka_properties),
                    **_for_proxies(secret_key, proxy_key),
                }
            )
            memory = Path(f"{checkpoint}.documents") if checkpoint else None
            sinks = sinks_of(configuration, roimap, ctx.obj, typer.echo, stop=stop, memory=memory)
            is_done = backfill_result.recompute(
                run,
                file,
                file_of(Path(out), replace(file.start, run=run)),
                make,
                [stack.enter_context(sink) for sink in sinks],
                saved=checkpoint,
                checkpoint_every=checkpoint_every,
                publish_every=configuration.publish_every,
                say=say,
                stop=stop,
            )
    if not is_done:
        say(f"run {run}: stopped before it was repaired")
        raise typer.Exit(os.EX_TEMPFAIL)


def _for_proxies(secret_key: Path | None, proxy_key: Path | None) -> dict[str, str | None]:
    """Return what of the keys is for Proxies of bluesky: the secret one may be for a plane only."""
    return {
        "secret_key": str(secret_key) if secret_key and proxy_key else None,
        "proxy_key": str(proxy_key) if proxy_key else None,
    }


def _section(
    delays_per_level: int, levels: int, two_time: int | None, two_time_normalisation: str | None
) -> dict[str, Any]:
    """Return what is configured of operators."""
    multitau = {"delays_per_level": delays_per_level, "levels": levels}
    return only_given({"multitau": multitau, "twotime": two_time_of(two_time, two_time_normalisation)})


def _operators(
    qmap: Path, operators: dict[str, Any], threads: int | None, plane: "Plane | None"
) -> "tuple[Make, RoiMap]":
    """Return what makes the operators of a region, and the map; refuse what does not fit the plane."""
    from stream.config import check, there
    from stream.correlators import check_partials, operators_of
    from stream.operators.roimap_file import read

    document = {
        "source": {"address": "any.h5"},  # where frames come from is not asked for
        "qmap": str(qmap),
        "operators": operators,
        "threads": threads,
    }
    configuration = check(only_given(document), lambda place: f"{option_of(place, document)}: ")
    roimap = read(there(qmap))
    if plane is not None:
        check_partials(configuration, roimap, plane.partial_bytes)
    return operators_of(configuration, roimap), roimap


def broker(
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Where records, settings and log lie; ~/.local/share/xpcs-stream/kafka if not given.", metavar="DIR"
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9092,
    listen: Annotated[
        str,
        typer.Option(
            help="Address of this machine to listen on, and that clients are told. Whoever reaches it may read and "
            "write everything: only this machine does, if not given.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1",
) -> None:
    """Run an Apache Kafka broker, for those who have none. Prints its address once it answers.

    It needs Java 17 and, the first time, Maven and the network. It ends on Ctrl-C or SIGTERM; what it was sent stays in
    DIR for the next start, a week long unless a topic says otherwise.

    xpcs-stream broker --port 9092
    """
    from stream.broker import Broker

    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    kafka = Broker(
        directory or home / "xpcs-stream/kafka",
        port=port,
        listen=listen,
        say=say,
    )
    with stopped_by_signals() as stop, kafka:
        typer.echo(kafka.bootstrap)
        say(f"records and {kafka.log.name} are in {kafka.directory}")
        kafka.watch(stop)


def keys(
    name: Annotated[str, typer.Argument(help="Whose they are: gateway, node17.")],
    directory: Annotated[Path, typer.Option("--directory", metavar="DIR", help="Where they are written.")] = Path(),
) -> None:
    """Make a pair of keys for the ZeroMQ plane: NAME.key for others, NAME.key_secret for the one who has this name.

    The gateway lets in whose NAME.key lies in the directory --allowed, from the moment that it lies there; workers and
    mergers know the gateway by its own.

    xpcs-stream keys gateway; xpcs-stream keys node17

    mkdir allowed; cp node17.key allowed

    xpcs-stream gateway --source ... --to zmq://*:5555/8idi --secret-key gateway.key_secret --allowed allowed

    xpcs-stream worker --source zmq://HOST:5555/8idi --secret-key node17.key_secret --gateway-key gateway.key ...
    """
    from stream.curve import make

    for path in make(directory, name):
        typer.echo(path)
