"""A beamline on one machine: a run engine takes frames, g2 goes live to whoever listens and into Tiled.

    pip install 'xpcs-stream[bluesky,tiled]' 'tiled[all]' 'ophyd-async[sim]'
    python docs/beamline.py [DIRECTORY]

                          documents                                  documents
    RunEngine + detector ----------> Proxy --> gateway ==> 2 workers ==> merger ----------> Proxy --> BestEffortCallback
                |                                 ^                        |                  and --> Tiled
                +---------> frames.h5 ------------+                        +----> result.h5

A detector of ophyd-async writes frames into a file that grows; the documents of the run engine say where they are. A
gateway cuts the frames into regions for two workers, and a merger makes one result of what these know. It publishes the
result as a Bluesky run of its own, which names the raw one. In the end g2 is read back from Tiled.

At a beamline each of these is a service of its own; `main` has their command lines. Only the detector is simulated, and
its sample, whose diffusion is known.
"""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import bluesky.plan_stubs as bps
import bluesky.preprocessors as bpp
import h5py
import matplotlib as mpl
import matplotlib.pyplot as plt
import msgpack
import numpy as np
from bluesky import RunEngine
from bluesky.callbacks.best_effort import BestEffortCallback
from bluesky.callbacks.zmq import Publisher, RemoteDispatcher
from ophyd_async.core import StaticPathProvider, TriggerInfo, UUIDFilenameProvider, init_devices
from ophyd_async.sim import PatternGenerator, SimBlobDetector
from tiled.client import from_uri
from tiled.queries import Eq

from stream.assembly import simulated
from stream.documents import read
from stream.figure import draw
from stream.messages import FrameBatch
from stream.operators.qmap import ring_map
from stream.operators.roimap_file import write

N_FRAMES, FRAME_TIME = 1000, 0.01  # s
RATE, CONTRAST = 2.0, 0.3  # of the sample: at the first q, 1/s
WITHIN = 180  # s, for anything that is waited for

MAP = ring_map(
    shape=(240, 320),
    beam_center_x=-60,
    beam_center_y=-60,
    detector_distance=5,
    pixel_size=75e-6,
    incident_energy=11,
    n_static=60,
    n_dynamic=6,
)


class Sample(PatternGenerator):
    """What ophyd-async's simulated detector sees: speckle that changes, in the place of a blob that stands still."""

    async def write_images_to_file(self):
        """Write frames as they come."""
        file, began = self._get_file(), time.monotonic()
        frames = simulated(
            MAP,
            diffusion=RATE / MAP.dynamic_q[0] ** 2,
            contrast=CONTRAST,
            stretch=1.0,
            mean_counts=0.2,
            n_frames=self._number_of_frames,
            frame_time=self._period,
            seed=1,
            sample="silica",
            batch=10,
        )
        messages = iter(frames)
        while (message := await asyncio.to_thread(next, messages, None)) is not None:
            if isinstance(message, FrameBatch):
                end = message.first + len(message.frames)
                await asyncio.sleep(began + end * self._period - time.monotonic())
                for dataset, values in ((file.data, message.frames), (file.sum, message.frames.sum(axis=(1, 2)))):
                    dataset.resize(end, axis=0)
                    dataset[message.first :] = values
                    dataset.flush()
                self._update_images_written(end)


def fly(detector, **metadata):
    """Take a run: frames come by themselves, one after the other. A plan."""

    @bpp.stage_decorator([detector])
    @bpp.run_decorator(md={"acquire_period": FRAME_TIME, **metadata})
    def taken():
        exposures = TriggerInfo(number_of_events=N_FRAMES, livetime=0.9 * FRAME_TIME, deadtime=0.1 * FRAME_TIME)
        yield from bps.prepare(detector, exposures, wait=True)
        yield from bps.declare_stream(detector, name="primary")
        yield from bps.kickoff(detector, wait=True)
        yield from bps.collect_while_completing([detector], [detector], flush_period=0.2, stream_name="primary")

    return (yield from taken())


def start(stack, log, *command, until):
    """Start a service, which ends with the stack; return it, and an Event that it is ready."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    is_ready = threading.Event()

    def listen():
        with process.stdout, log.open("w") as file:
            for line in process.stdout:
                file.write(line)
                if until in line:
                    is_ready.set()
        is_ready.set()  # or never will be

    listener = threading.Thread(target=listen)
    listener.start()
    stack.callback(listener.join)
    stack.callback(stop, process)
    return process, is_ready


def wait_for(*services):
    """Return once services are ready."""
    for process, is_ready in services:
        if not is_ready.wait(WITHIN) or process.poll() is not None:
            sys.exit(f"{process.args} is not ready; see its log")


def stop(process):
    """End a process, whatever it does."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tool(name):
    """Return a command of this environment."""
    return Path(sys.executable).with_name(name)


def free_ports(n):
    """Return addresses of this machine where nobody listens."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [f"127.0.0.1:{probe.getsockname()[1]}" for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main(directory, stack):
    """Start everything, measure, and compare what came out."""
    frames, results, logs, tiled = (directory / name for name in ("frames", "results", "logs", "tiled"))
    for each in (frames, results, logs, tiled):
        each.mkdir(parents=True, exist_ok=True)
    write(directory / "qmap.h5", MAP)
    raw_in, raw_out, live_in, live_out, plane, catalogue = free_ports(6)
    os.environ["TILED_API_KEY"] = os.environ["TILED_SINGLE_USER_API_KEY"] = secrets.token_hex(16)

    print("starting Tiled, two Proxies, gateway, two workers and merger", flush=True)
    store = ("--init", "--write", tiled / "data", "--write", f"duckdb:///{tiled}/tables.duckdb", "--read", results)
    serve = (tool("tiled"), "serve", "catalog", tiled / "catalog.db", *store, "--port", catalogue.rpartition(":")[2])
    services = [start(stack, logs / "tiled", *serve, until="startup complete")]
    for name, into, out in (("raw", raw_in, raw_out), ("live", live_in, live_out)):
        proxy = (tool("bluesky-0MQ-proxy"), "--in-address", f"tcp://{into}", "--out-address", f"tcp://{out}")
        services.append(start(stack, logs / f"proxy-{name}", *proxy, until="Receiving"))
    wait_for(*services)

    # The run engine's documents, in good time: what is sent before the Proxy is connected is lost.
    publisher = Publisher(raw_in, serializer=msgpack.dumps)
    # Whoever wants to look on, on any machine: live results are documents as any others.
    dispatcher = RemoteDispatcher(live_out, deserializer=read)  # MessagePack; bluesky's own default is pickle
    has_ended = threading.Event()
    dispatcher.subscribe(BestEffortCallback())
    dispatcher.subscribe(lambda *_: has_ended.set(), "stop")
    threading.Thread(target=dispatcher.start, daemon=True).start()

    xpcs_stream, at = (sys.executable, "-m", "stream"), f"zmq://{plane}/demo"
    source = ("--source", f"zmq+bluesky://{raw_out}", "--root", f"{frames}={frames}")
    shared = ("--source", at, "--qmap", directory / "qmap.h5")
    gateway = ("gateway", *source, "--to", at, "--regions", 2)
    worker = ("worker", *shared, "--checkpoints", directory / "checkpoints", "--threads", 1)
    shown = ("--documents", f"zmq+bluesky://{live_in}", "--documents", f"tiled+http://{catalogue}")
    merge = ("merge", *shared, "--out", results / "{run}.h5", *shown, "--runs", 1, "--quiet")
    merger = start(stack, logs / "merger", *xpcs_stream, *merge, until="taking partial sums")
    wait_for(
        start(stack, logs / "gateway", *xpcs_stream, *gateway, until="taking frames"),
        start(stack, logs / "worker-1", *xpcs_stream, *worker, until="taking regions"),
        start(stack, logs / "worker-2", *xpcs_stream, *worker, until="taking regions"),
        merger,
    )

    # The beamline's own session.
    engine = RunEngine()
    engine.subscribe(publisher)
    with init_devices():
        detector = SimBlobDetector(StaticPathProvider(UUIDFilenameProvider(), frames), Sample())
    print(f"measuring: {N_FRAMES} frames of {FRAME_TIME:g} s", flush=True)
    (uid,) = engine(fly(detector, sample="silica"))
    merger[0].wait(WITHIN)
    has_ended.wait(WITHIN)

    # Tiled has the run before anybody hears that it stopped.
    run = from_uri(f"http://{catalogue}").search(Eq("start.original_run_uid", uid)).values().last()
    last = run["primary"].read().isel(time=-1)
    plt.savefig(directory / "live.png")
    draw(results / f"{uid}.h5").savefig(directory / "g2.png", dpi=150)
    with h5py.File(results / f"{uid}.h5") as file:
        g2, lost = file["xpcs/multitau/normalized_g2"][()], file["xpcs/ledger/lost"][()]
    # How long the run would be nobody had said: all delays that there may be have a place, NaN where none was reached.
    kept, beyond = np.split(last["xpcs_g2"].values.T, [len(g2)])
    is_equal = np.array_equal(kept, g2) and np.isnan(beyond).all()
    rate, error = float(last["xpcs_relaxation_rate"]), float(last["xpcs_relaxation_rate_err"])
    rows = {
        "raw run": uid,
        "live run": run.metadata["start"]["uid"],
        "frames": f"{int(last['xpcs_frames'])}, {lost} of them lost",
        "updates": f"{run['primary'].read().sizes['time']} in Tiled",
        "rate": f"{rate:.2f} ± {error:.2f} 1/s at q = {MAP.dynamic_q[0]:.4f} 1/angstrom, in truth {RATE:.2f}",
        "g2": f"{g2.shape[0]} delays, {g2.shape[1]} q",
        "result": results / f"{uid}.h5",
        "pictures": f"{directory / 'g2.png'} {directory / 'live.png'}",
        "logs": logs,
    }
    print("\n".join(["", *(f"{name:>10}  {value}" for name, value in rows.items())]))
    print(f"\ng2 in Tiled and in the result file are {'equal, bit for bit' if is_equal else 'DIFFERENT'}")
    return 0 if is_equal else 1


if __name__ == "__main__":
    mpl.use("Agg")  # pictures are saved; windows would have to be in the main thread
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with ExitStack() as everything:
        sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/beamline").absolute(), everything))
