"""What a configuration says, made of concrete classes; beside the command line the only place that names them."""

import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from stream.config import Configuration, SourceSection, address, live_at, there
from stream.curve import ClientKeys
from stream.errors import ConfigError
from stream.ingest import bluesky_kafka, bluesky_zmq
from stream.ingest.bluesky import BlueskySource
from stream.ingest.bluesky_files import BlueskyFiles
from stream.ingest.bluesky_messages import Documents
from stream.ingest.bluesky_roots import Roots
from stream.ingest.dectris import DectrisSource
from stream.ingest.hdf5 import Hdf5Source
from stream.ingest.recording import RecordingSource
from stream.ingest.rigaku import RigakuSource
from stream.ingest.simulated import SimulatedSource
from stream.ingest.zmq import ZmqSource
from stream.kafka import create_topic, read_properties
from stream.messages import Give
from stream.operators.g2 import delays
from stream.operators.roimap import RoiMap
from stream.protocols import Sink, Source
from stream.sinks.console import ConsoleSink
from stream.sinks.hdf5 import Hdf5Sink
from stream.sinks.live import LiveSink, read_token
from stream.sinks.zmq import ZmqSink

if TYPE_CHECKING:
    from stream.sinks.bluesky import BlueskySink
    from stream.sinks.bluesky_tiled import TiledDocuments


def proxy_keys(configuration: Configuration) -> ClientKeys | None:
    """Read the keys for Proxies of bluesky, if there are some."""
    if configuration.secret_key is None or configuration.proxy_key is None:
        return None
    return ClientKeys.read(Path(configuration.secret_key), Path(configuration.proxy_key))


def source_of(
    section: SourceSection,
    *,
    give: Give = "frames",
    kafka_properties: Path | None = None,
    keys: ClientKeys | None = None,
) -> Source:
    """Open where frames come from.

    Parameters
    ----------
    give
        "photons" is for operators only, "chunks" for `stream.regions` only.
    kafka_properties
        See `stream.kafka.read_properties`: for documents that come from there.
    keys
        For documents that come from a Proxy.
    """
    properties = read_properties(kafka_properties)
    if section.documents is None:
        return _frames_of(section, give, properties, keys)
    documents = documents_of(section.documents, properties, keys, wait=0.0)
    return BlueskySource(documents, _frames_of(section, give, properties, keys))


def documents_of(
    text: str, properties: Mapping[str, str], keys: ClientKeys | None, *, wait: float = bluesky_kafka.POLL
) -> Documents:
    """Open where Bluesky's documents come from."""
    where = address(text)
    if where.transport == "proxy":
        return bluesky_zmq.ZmqDocuments(where.target, keys=keys, wait=wait)
    bootstrap, _, topic = where.target.rpartition("/")
    return bluesky_kafka.KafkaDocuments(bootstrap, topic, properties=properties, wait=wait)


def _frames_of(section: SourceSection, give: Give, properties: Mapping[str, str], keys: ClientKeys | None) -> Source:
    where, options = address(section.address), section.options()
    match where.transport:
        case "dectris":
            return DectrisSource(where.target, **options, give=give)
        case "zmq":
            return ZmqSource(where.target, **options)
        case "hdf5":
            if "metadata" in options:
                options["metadata"] = Path(options["metadata"])
            return Hdf5Source(there(Path(where.target)), **options, give=give)
        case "rigaku":
            if "metadata" in options:
                options["metadata"] = Path(options["metadata"])
            return RigakuSource(there(Path(where.target)), **options)
        case "recording":
            return RecordingSource(there(Path(where.target)), **options, give=give)
        case "proxy" | "documents":
            directories = options.pop("roots", {})
            roots = Roots({called: Path(directory) for called, directory in directories.items()})
            return BlueskyFiles(documents_of(section.address, properties, keys), roots, **options, give=give)
        case "kafka" | "hub":
            raise ConfigError(f"{section.address}: what a gateway sends is for the workers of a beamline")
        case "tiled":
            raise ConfigError(f"{section.address}: documents are given to it, frames do not come from it")
        case "live":
            raise ConfigError(f"{section.address}: results are shown there, frames do not come from it")


def frames_of(text: str, batch: int | None, frame_time: float | None, otherwise: float | None = None) -> Source:
    """Open frames; an HDF5 file that does not tell its frame time has it from `otherwise`.

    Raises
    ------
    ConfigError
        There is nothing to tell the frame time, or no use for it.
    """
    section = SourceSection(address=text, batch=batch) if batch else SourceSection(address=text)
    if address(text).transport not in ("hdf5", "rigaku"):
        if frame_time is not None:
            raise ConfigError(f"--frame-time is for HDF5 and Rigaku files, not for {text}")
        return source_of(section)
    try:
        return source_of(section.model_copy(update={"frame_time": frame_time}))
    except ConfigError:
        if otherwise is None:
            raise
        return source_of(section.model_copy(update={"frame_time": otherwise}))


def sinks_of(
    configuration: Configuration,
    roimap: RoiMap,
    console: Console,
    on_written: Callable[[Path], None],
    *,
    stop: threading.Event,
    memory: Path | None = None,
    said: str | None = None,
) -> list[Sink]:
    """Make the sinks of a configuration, in the order in which they are to be opened and written to.

    Parameters
    ----------
    on_written
        Is told the name of each result file.
    stop
        Once it is set, none of them waits for long.
    memory
        Where is kept what was published of Bluesky runs, for a restart.
    said
        What result files say of how they were made. None: the configuration.
    """
    of_results: list[Sink] = []
    others: list[Sink] = []
    documents = _documents_of(configuration, roimap, stop, memory)

    def written(path: Path) -> None:
        on_written(path)
        if documents is not None:
            documents.written(path)

    for text in configuration.sinks:
        where = address(text) if text != "console" else None
        if where is None:
            is_live = address(configuration.source.address).transport not in ("hdf5", "recording", "rigaku")
            of_results.insert(0, ConsoleSink(console, q=roimap.dynamic_q.tolist(), is_live=is_live))
        elif where.transport == "zmq":
            others.append(ZmqSink(where.target, pattern="pub"))
        elif where.transport == "live":
            others.append(_live(text, configuration))
        elif where.transport == "hdf5":
            file, told = Path(where.target), configuration.text() if said is None else said
            of_results.append(Hdf5Sink(file, qmap=roimap.arrays(), configuration=told, on_written=written))
    # The display has ended when the name of a result file is printed; documents tell of files that are there.
    return [*of_results, *others, *([documents] if documents is not None else [])]


def _live(text: str, configuration: Configuration) -> LiveSink:
    host, port = live_at(text)
    token = read_token(Path(configuration.token_file) if configuration.token_file else None)
    qmap, source = Path(configuration.qmap), configuration.source.address
    places = [address(sink) for sink in configuration.sinks if sink != "console"]
    files = next((Path(where.target) for where in places if where.transport == "hdf5"), None)
    return LiveSink(host, port, qmap=qmap, source=source, token=token, files=files)


def _documents_of(
    configuration: Configuration, roimap: RoiMap, stop: threading.Event, memory: Path | None
) -> "BlueskySink | None":
    places = [address(text) for text in configuration.sinks if text != "console"]
    places = [where for where in places if where.transport in ("kafka", "proxy", "tiled")]
    if not places:
        return None
    # event_model and scipy take their time.
    from stream.sinks.bluesky import BlueskySink, Publisher
    from stream.sinks.bluesky_kafka import KafkaDocuments
    from stream.sinks.bluesky_zmq import ZmqDocuments

    properties = read_properties(Path(configuration.kafka_properties) if configuration.kafka_properties else None)
    publishers: list[Publisher] = []
    stores: list[Publisher] = []
    for where in places:
        if where.transport == "kafka":
            bootstrap, beamline = where.target.rsplit("/", 1)
            topic = f"{beamline}.xpcs.live.documents"
            create_topic(bootstrap, topic, 1, properties=properties)
            publishers.append(KafkaDocuments(bootstrap, topic, properties=properties, stop=stop))
        elif where.transport == "proxy":
            publishers.append(ZmqDocuments(where.target, keys=proxy_keys(configuration), stop=stop))
        else:
            stores.append(_tiled_documents(where.target, stop))
    multitau = configuration.operators.multitau
    return BlueskySink(
        publishers,
        stores=stores,
        qmap=roimap.arrays(),
        delays=lambda n_frames: delays(n_frames, multitau.delays_per_level, multitau.levels)[1],
        every=configuration.publish_every,
        analysis=multitau.model_dump(),
        memory=memory,
    )


def _tiled_documents(uri: str, stop: threading.Event) -> "TiledDocuments":
    try:
        from stream.sinks.bluesky_tiled import TiledDocuments
    except ModuleNotFoundError as error:
        raise ConfigError(f"{uri}: {error.name} is not installed: pip install 'xpcs-stream[tiled]'") from None
    return TiledDocuments(uri, stop=stop)


def simulated(
    roimap: RoiMap,
    *,
    diffusion: float,
    contrast: float,
    stretch: float,
    mean_counts: float,
    n_frames: int,
    frame_time: float,
    seed: int,
    sample: str,
    batch: int,
) -> SimulatedSource:
    """Return a detector whose shape, geometry and q are those of a map; |g1| = exp(-diffusion q^2 tau).

    Raises
    ------
    ConfigError
        The map does not tell q of every bin, or a number cannot be meant.
    """
    if not np.isfinite(roimap.dynamic_q).all():
        raise ConfigError("the map does not tell q of every bin")
    arrays = roimap.arrays()
    rate_of_bin = diffusion * roimap.dynamic_q**2
    geometry = {
        "incident_energy": arrays["energy"],
        "detector_distance": arrays["detector_distance"],
        "beam_center_x": arrays["beam_center_x"],
        "beam_center_y": arrays["beam_center_y"],
        "x_pixel_size": arrays["pixel_size"],
        "y_pixel_size": arrays["pixel_size"],
    }
    told = {name: float(value) for name, value in geometry.items() if np.isfinite(value)}
    return SimulatedSource(
        rate=np.concatenate([[0.0], rate_of_bin])[roimap.dynamic_roi_map],
        contrast=contrast,
        stretch=stretch,
        mean_counts=mean_counts,
        n_frames=n_frames,
        frame_time=frame_time,
        seed=seed,
        masked=np.asarray(arrays["mask"]) == 0,
        batch=batch,
        truth_rate=rate_of_bin.tolist(),
        metadata=told | {"sample": sample, "detector": "xpcs-stream simulate"},
    )


def try_to_write(path: Path) -> None:
    """Raise ConfigError if no file can be made beside `path`."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
