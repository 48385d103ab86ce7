"""One simulated run as a sink sees it, and what makes documents one valid run."""

import contextlib
from functools import cache

import event_model
import numpy as np

from stream.ingest.simulated import SimulatedSource
from stream.messages import Result, RunStart, RunStop
from stream.operators.g2 import delays as delays_of
from stream.operators.intensity import Intensity
from stream.operators.multitau import MultiTau
from stream.operators.roimap import RoiMap
from stream.operators.scattering import Scattering
from stream.sinks.bluesky import BlueskySink
from tests.test_sinks_hdf5 import make_qmap

N_FRAMES, N_UPDATES = 1000, 4
RUN = "3c0efdee-93a5-4def-a41a-226f1c0b446f"
RATES = np.array([3.0, 6.0, 12.0, 24.0])
CONTRAST = 0.5
LAG = 0.25


def delays(n_frames):
    return delays_of(n_frames, 4, 16)[1]


@cache
def roimap():
    qmap = make_qmap(static_per_dynamic=6)
    return RoiMap(static_roi_map=qmap["static_roi_map"], dynamic_roi_map=qmap["dynamic_roi_map"], qmap=qmap)


def source():
    """A sample whose rates are `RATES` in the dynamic bins."""
    return SimulatedSource(
        rate=np.concatenate([[0.0], RATES])[roimap().dynamic_roi_map],
        contrast=CONTRAST,
        mean_counts=2.0,
        n_frames=N_FRAMES,
        frame_time=1e-3,
        run=RUN,
        batch=100,
        seed=5,
        start_time_ns=1795289949 * 10**9,
    )


def operators(start):
    return [make(start, roimap(), threads=1) for make in (MultiTau, Scattering, Intensity)]


@cache
def outputs():
    """The map; and the start, results four times and at the end, and the stop of a run."""
    given = []
    for message in source():
        match message:
            case RunStart():
                working = operators(message)
                given.append(message)
            case RunStop():
                given += [*results(working, N_FRAMES, final=True), message]
            case None:
                pass
            case batch:
                for operator in working:
                    operator.push(batch)
                n_frames = working[0].n_frames
                if n_frames % (N_FRAMES // (N_UPDATES + 1)) == 0 and n_frames < N_FRAMES:
                    given += results(working, n_frames, final=False)
    return roimap().arrays(), given


def results(working, n_frames, *, final):
    ledger = {"sent": -1, "received": n_frames, "lost": 3, "lag": LAG}
    arrays = [(operator.name, operator.result()) for operator in working]
    arrays.append(("ledger", {name: np.array(value) for name, value in ledger.items()}))
    return [Result(run=RUN, operator=name, n_frames=n_frames, final=final, arrays=values) for name, values in arrays]


class Kept(contextlib.nullcontext):
    """A publisher that keeps documents; it dies at some of them if it is told so."""

    def __init__(self, *, dies_before=None, dies_after=None):
        super().__init__(self)
        self.documents = []
        self.dies_before, self.dies_after = dies_before, dies_after

    def publish(self, run, name, document, *, may_be_lost):
        if len(self.documents) == self.dies_before:
            raise Killed
        self.documents.append((name, document))
        if len(self.documents) - 1 == self.dies_after:
            raise Killed

    def flush(self):
        pass


class Killed(BaseException):
    """Nobody catches it: as if the process ended there."""


def sink(*publishers, **options):
    return BlueskySink(publishers, qmap=outputs()[0], delays=delays, **{"every": 0.0} | options)


def documents_of(given=None, **options):
    """What is published of a run."""
    kept = Kept()
    with sink(kept, **options) as to:
        for output in outputs()[1] if given is None else given:
            to.write(output)
        to.flush()
    return kept.documents


def assert_valid(documents):
    """One run, complete, in order, every document once and as event_model wants it."""
    router = event_model.SingleRunDocumentRouter()
    for name, document in documents:
        event_model.schema_validators[event_model.DocumentNames[name]].validate(document)
        router(name, dict(document))
    names = [name for name, _ in documents]
    assert (names[0], names[-1]) == ("start", "stop")
    assert (names.count("start"), names.count("stop")) == (1, 1)
    uids = [document["uid"] for _, document in documents]
    assert len(set(uids)) == len(uids)
    streams = [document["name"] for name, document in documents if name == "descriptor"]
    assert len(set(streams)) == len(streams)
    numbers = [document["seq_num"] for name, document in documents if name == "event"]
    assert all(np.diff(numbers) > 0)
    assert documents[-1][1]["num_events"]["primary"] == max(numbers, default=0)
    frames = [document["data"]["xpcs_frames"] for name, document in documents if name == "event"]
    assert frames == sorted(frames)
