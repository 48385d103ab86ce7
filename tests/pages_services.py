"""What readers of the documentation already have, where a page says so: `needs` of tests/pages.py."""

import json
import sys
import uuid
from contextlib import suppress

import h5py
from confluent_kafka.admin import NewTopic

from hpc_bridge.control import NoManager, ask
from stream.assembly import simulated
from stream.messages import FrameBatch
from stream.operators.qmap import ring_map
from stream.operators.roimap_file import write
from tests import kafka as of_broker
from tests import tiled
from tests.pages import ROOT
from tests.test_command_line import xpcs_stream

MAP = ring_map(
    shape=(64, 64),
    beam_center_x=-20,
    beam_center_y=-20,
    detector_distance=5,
    pixel_size=75e-6,
    incident_energy=11,
    n_static=30,
    n_dynamic=3,
)
N_FRAMES = 400


def qmap(page):
    """Of a small detector, if the page has made none."""
    if not (page.folder / "qmap.h5").exists():
        write(page.folder / "qmap.h5", MAP)


def source(seed=1):
    sample = {"diffusion": 1e6, "contrast": 0.3, "stretch": 1.0, "mean_counts": 1.0, "sample": "latex"}
    return simulated(MAP, **sample, n_frames=N_FRAMES, frame_time=1e-3, seed=seed, batch=100)


def frames_at(path, seed=1, *, frame_time=1e-3):
    with h5py.File(path, "w") as file:
        data = file.create_dataset("entry/data/data", (N_FRAMES, *MAP.shape), "u2", chunks=(1, *MAP.shape))
        if frame_time:
            file["entry/instrument/detector/frame_time"] = frame_time
        for message in source(seed):
            if isinstance(message, FrameBatch):
                data[message.first : message.first + len(message.frames)] = message.frames
    return path


def frames(page):
    frames_at(page.folder / "frames.h5")


def silent_frames(page):
    frames_at(page.folder / "silent.h5", frame_time=None)


def results(page):
    """Two of the same sample."""
    (page.folder / "results").mkdir(exist_ok=True)
    for seed, name in enumerate(("results/A001.h5", "theirs.hdf")):
        at = frames_at(page.folder / f"of{seed}.h5", seed)
        said = xpcs_stream(
            "run", "--source", at, "--qmap", page.folder / "qmap.h5", "--out", page.folder / name, "--quiet"
        )
        assert said.exit_code == 0, said.stderr


def detector(page):
    """Sends one run to whoever comes."""
    qmap(page)
    simulate = "xpcs-stream simulate --qmap qmap.h5 --to zmq+dectris://127.0.0.1:31001 --frames 100"
    page.run(f'{simulate} --rate "200 Hz" --diffusion "1e6 angstrom^2/s" &')


def large_detector(page):
    """Sends few frames."""
    simulate = "xpcs-stream simulate --qmap qmap.h5 --to zmq+dectris://127.0.0.1:31001 --frames 8"
    page.run(f"{simulate} --as-fast-as-possible &")


def publisher(page):
    """Publishes the results of a run, and goes on publishing them to those who come late."""
    detector(page)
    run = "xpcs-stream run --source zmq+dectris://127.0.0.1:31001 --qmap qmap.h5 --quiet --publish zmq://127.0.0.1:5556"
    page.run(f"{run} --out 'published/{{run}}.h5'", until="published/.*h5")


def kafka(page):
    """A broker; this page's topics are of a beamline of its own, which has a run engine."""
    broker = page.fixture("broker")
    page.is_at(9092, int(broker.bootstrap.rpartition(":")[2]))
    beamline = f"b{uuid.uuid4().hex[:8]}"
    page.replaced.append((r"(?<=:9092/)8idi", beamline))
    topic = f"{beamline}.bluesky.runengine.documents"
    client = of_broker.admin(broker)  # what it was asked for ends with it
    client.create_topics([NewTopic(topic, 1, 1)])[topic].result(of_broker.DEADLINE)


def proxy(page):
    """Bluesky's own: takes documents at 5577, gives them at 5578."""
    code = "import sys; from bluesky.callbacks.zmq import Proxy; Proxy(*sys.argv[1:]).start()"
    page.run(f'{sys.executable} -c "{code}" tcp://127.0.0.1:5577 tcp://127.0.0.1:5578 &')


def tiled_server(page):
    server = tiled.Server(page.folder, page.folder).start()
    page.stack.callback(server.kill)
    page.is_at(8000, server.port)
    page.environment["TILED_API_KEY"] = tiled.KEY


def run_engine(page):
    """What the code of a page has: a run engine, here one that does not run."""
    page.preamble = "from bluesky import RunEngine\n\nRE = RunEngine({}, context_managers=[])\n"


DETECTOR = """
from bluesky import RunEngine
from tests.test_until_precise import Detector

RE = RunEngine({}, context_managers=[])
RE.subscribe(lambda name, document: print(document["reason"]), "stop")
detector = Detector("simulate", "--qmap", "qmap.h5", "--to", "zmq+dectris://127.0.0.1:31001", "--frames", "1000000",
    "--mean-counts", "1", "--contrast", "0.5", "--diffusion", "4e6 angstrom^2/s")
"""


def precise(page):
    """A run engine, a detector and its live results."""
    qmap(page)
    run = "xpcs-stream run --source zmq+dectris://127.0.0.1:31001 --qmap qmap.h5 --publish zmq://127.0.0.1:5556 --quiet"
    page.run(f'{run} --publish-every "0.1 s"', until="taking frames from")
    page.preamble = DETECTOR


def file_only(page):
    """A detector, a map, and word that frames go by file only."""
    detector(page)
    (page.folder / "plane.json").write_text(json.dumps({"plane": "file", "why": "of the tests", "since": 0}))


def workers(page):
    page.run("xpcs-stream worker --source zmq://127.0.0.1:5555/8idi --qmap qmap.h5 --checkpoints checkpoints &")


def name_of_run(page):
    """RUN is the one in the spool."""
    [master] = (page.folder / "spool").glob("*/*_master.h5")
    page.replaced.append((r"\bRUN\b", master.parent.name))


def prepare(page):
    """Folders of this page; on a node of this machine the commands are there."""
    written = "/tmp/xpcs-"  # noqa: S108 - it is replaced
    page.replaced += [(written, f"{page.folder}/"), (r"prepare: .*", f"prepare: cd {page.folder}")]


def site(page):
    """That of nodes-on-demand."""
    text = (ROOT / "docs/how-to/nodes-on-demand.md").read_text()
    (page.folder / "site.yaml").write_text(page.here(text[text.index("# site.yaml") :].partition("```")[0]))
    no_manager(page)


def no_manager(page):
    """That goes on after the page."""

    def down():
        with suppress(NoManager):
            ask(page.folder / "state", {"do": "status"})
            page.run("hpc-bridge down")

    page.stack.callback(down)


def master(page):
    frames_at(page.folder / "A001_master.h5")


SERVICES = {
    "qmap": qmap,
    "frames": frames,
    "silent-frames": silent_frames,
    "results": results,
    "detector": detector,
    "large-detector": large_detector,
    "publisher": publisher,
    "kafka": kafka,
    "proxy": proxy,
    "tiled": tiled_server,
    "run-engine": run_engine,
    "precise": precise,
    "file-only": file_only,
    "workers": workers,
    "name-of-run": name_of_run,
    "prepare": prepare,
    "site": site,
    "no-manager": no_manager,
    "master": master,
}
