"""An agent finds the best attenuation of the beam from live g2: an adaptive plan of Bluesky, with results out of Tiled.

    pip install 'xpcs-stream[tiled]' 'bluesky>=1.15' 'bluesky-adaptive>=1.0' 'tiled[all]' ophyd-async
    python docs/adaptive.py

With too little light the rate of the sample drowns in noise, with too much the beam itself makes it faster. For each
attenuation that the agent suggests, a run engine measures a fresh spot, exposes it on, and measures it again. The rates
of both runs come live out of the detector's stream, by way of Tiled, where they are found by the uid of the raw run.
How uncertain the first one is, and how much the beam changed it, say how far off it is: this the agent makes small.

The beamline is simulated, so that the truth is known: in the end all attenuations are tried out, and compared.
"""

import asyncio
import itertools
import math
import os
import secrets
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import bluesky.plan_stubs as bps
import bluesky.plans as bp
import numpy as np
from bluesky import RunEngine
from bluesky.preprocessors import set_run_key_wrapper
from bluesky_adaptive import optimize
from bluesky_adaptive.protocols import OptimizationProblem
from ophyd_async.core import AsyncStatus, StandardReadable, StandardReadableFormat, init_devices, soft_signal_rw
from tiled.client import from_uri
from tiled.queries import Eq
from tiled.server import SimpleTiledServer

from stream.assembly import simulated
from stream.bluesky import Live
from stream.messages import FrameBatch, RunStart
from stream.operators.multitau import MultiTau
from stream.operators.qmap import ring_map
from stream.operators.roimap_file import write
from stream.sinks.dectris import DectrisSink
from stream.uncertainty import estimate

ATTENUATION = (0.0, 2.2)  # decades
N_FRAMES, FRAME_TIME = 1000, 1e-3
EXPOSED_ON = 3  # times as long as a run
MAX_SUGGESTIONS = 8
WITHIN = 60.0  # s, for a result

MAP = ring_map(
    shape=(64, 64),
    beam_center_x=-20,
    beam_center_y=-20,
    detector_distance=5,
    pixel_size=75e-6,
    incident_energy=11,
    n_static=60,
    n_dynamic=3,
)

# The truth, which the agent does not know: of the innermost q, and in the full beam.
RATE, MEAN_COUNTS = 50.0, 3.0  # 1/s; per pixel and frame
DAMAGE = 2.0  # by how much, relatively, a run makes it faster


def speckle(attenuation, dose, seed):
    """Return a detector that sees a spot which had a dose, counted in runs in the full beam."""
    transmission = 10**-attenuation
    # As in the middle of the run.
    rate = RATE * (1 + DAMAGE * (dose + transmission / 2))
    return simulated(
        MAP,
        diffusion=rate / MAP.dynamic_q[0] ** 2,
        contrast=0.3,
        stretch=1.0,
        mean_counts=MEAN_COUNTS * transmission,
        n_frames=N_FRAMES,
        frame_time=FRAME_TIME,
        seed=seed,
        sample="sensitive",
        batch=50,
    )


class Beamline(StandardReadable):
    """An attenuator, a stage, and a detector that sends its frames as an EIGER does."""

    def __init__(self, stream, name=""):
        with self.add_children_as_readables(StandardReadableFormat.CONFIG_SIGNAL):
            self.attenuation = soft_signal_rw(float, units="decades")
            self.spot = soft_signal_rw(int)
        self._stream, self._seeds, self._doses = stream, itertools.count(), defaultdict(float)
        super().__init__(name=name)

    @AsyncStatus.wrap
    async def trigger(self):
        """Take the frames of a run."""
        attenuation, spot = await self.attenuation.get_value(), await self.spot.get_value()
        for message in speckle(attenuation, self._doses[spot], next(self._seeds)):
            await asyncio.to_thread(self._stream.write, message)
        self._doses[spot] += 10**-attenuation

    @AsyncStatus.wrap
    async def set(self, n_runs):
        """Expose the spot as long as so many runs do, without taking frames."""
        self._doses[await self.spot.get_value()] += n_runs * 10 ** -(await self.attenuation.get_value())


def fresh_and_exposed(suggestions, actuators, sensors, md=None):
    """Measure a fresh spot, expose it on, and measure it again; returns both uids. An AcquisitionPlan."""
    (suggestion,), (attenuation,), (beamline,) = suggestions, actuators, sensors
    spot = yield from bps.rd(beamline.spot)
    yield from bps.mv(beamline.spot, spot + 1, attenuation, suggestion[attenuation.name])
    # They have keys, since the plan of the agent is a run itself, around them.
    fresh = yield from set_run_key_wrapper(bp.count([beamline], md=md), "fresh")
    yield from bps.mv(beamline, EXPOSED_ON)
    exposed = yield from set_run_key_wrapper(bp.count([beamline], md=md), "exposed")
    return fresh, exposed


class HowFarOff:
    """How far off the rate of a fresh spot is, relatively, to be made small. An EvaluationFunction."""

    def __init__(self, runs):
        self._runs = runs

    def __call__(self, uid, suggestions):
        """Return the outcome of what `fresh_and_exposed` measured."""
        (suggestion,), (fresh, exposed) = suggestions, uid
        (rate, error), (later, error_later) = self._rate(fresh), self._rate(exposed)
        # Of what happens between the middles of the two runs, this share has happened by the middle of the first.
        share = 0.5 / (1 + EXPOSED_ON)
        change, noise = share * (later - rate), share * math.hypot(error, error_later)
        off = math.sqrt(error**2 + max(0.0, change**2 - noise**2)) / rate
        # Where no rate was found nothing is known.
        off = min(off, 1.0) if math.isfinite(off) else 1.0
        attenuation = suggestion["beamline-attenuation"]
        print(f"  {attenuation:.2f} decades: {rate:.1f} ± {error:.1f} 1/s, off by {off:.1%}", flush=True)
        return [{"_id": suggestion["_id"], "off": off}]

    def _rate(self, uid):
        """Wait for the result of a raw run; return its rate, and the error of that."""
        deadline = time.monotonic() + WITHIN
        while time.monotonic() < deadline:
            for run in self._runs.search(Eq("start.original_run_uid", uid)).values():
                if run.metadata.get("stop"):
                    last = run["primary"].read().isel(time=-1)
                    return float(last["xpcs_relaxation_rate"]), float(last["xpcs_relaxation_rate_err"])
            time.sleep(0.1)
        raise TimeoutError(f"no result of run {uid} came within {WITHIN:g} s")


class Parabola:
    """Suggests the lowest point of a parabola through what is known. An Optimizer of bluesky-adaptive's kind.

    Of its own, version 1.0, that of scipy does not minimize, and the others need torch.

    A response surface (Box & Wilson, J. R. Stat. Soc. B 13, 1 (1951)) in one dimension, of the logarithm; low points
    count more. It stops where it would suggest the same again.
    """

    def __init__(self, name, bounds, outcome):
        self._name, self._bounds, self._outcome = name, bounds, outcome
        self._x, self._y = [], []

    def suggest(self, num_points=1):  # noqa: ARG002 - of the protocol; one at a time is all there is
        """Return the next point: at first three that share the range."""
        n = len(self._x)
        self._x.append(self._lowest() if n >= 3 else float(np.interp((n + 0.5) / 3, (0, 1), self._bounds)))
        return [{"_id": n, self._name: self._x[n]}]

    def ingest(self, points):
        """Take what was measured, in the order of suggestions."""
        self._y += [point[self._outcome] for point in points]

    def should_stop(self):
        """Tell whether it is done, and why."""
        return len(self._y) > 3 and abs(self._lowest() - self._x[-1]) < 0.1, "it suggests the same again"

    def get_best_points(self):
        """Return the lowest point: all that is known counts, not the luck of one measurement."""
        x = self._lowest()
        return [(len(self._x), {self._name: x}, {self._outcome: 10 ** np.polyval(self._parabola(), x)})]

    def _parabola(self):
        return np.polyfit(self._x, np.log10(self._y), 2, w=np.power(self._y, -0.5))

    def _lowest(self):
        bend, slope, _ = self._parabola()
        return float(np.clip(-slope / (2 * bend) if bend > 0 else self._x[np.argmin(self._y)], *self._bounds))


def measure(folder):
    """Let the agent measure; return the attenuation it has found, and in how many runs."""
    write(folder / "qmap.h5", MAP)
    key = os.environ["TILED_API_KEY"] = secrets.token_hex(16)
    optimizer, engine = Parabola("beamline-attenuation", ATTENUATION, "off"), RunEngine(context_managers=[])
    with (
        SimpleTiledServer(folder / "tiled", key, readable_storage=[folder]) as server,
        DectrisSink("tcp://127.0.0.1:*") as stream,
        Live(
            folder / "qmap.h5",
            folder / "{run}.h5",
            detector=f"zmq+dectris://{stream.address.removeprefix('tcp://')}",
            documents=[f"tiled+http://127.0.0.1:{server.port}"],
        ) as live,
    ):
        engine.subscribe(live)
        with init_devices():
            beamline = Beamline(stream, name="beamline")
        runs = from_uri(f"http://127.0.0.1:{server.port}")
        problem = OptimizationProblem(
            optimizer, [beamline.attenuation], [beamline], HowFarOff(runs), acquisition_plan=fresh_and_exposed
        )
        engine(optimize(problem, iterations=MAX_SUGGESTIONS))
        n_runs = len(runs)
    ((_, best, _),) = optimizer.get_best_points()
    return best["beamline-attenuation"], n_runs


def off_the_truth(attenuation, n=8):
    """Return how far off the rates of so many fresh spots are, relatively (rms)."""
    members = np.flatnonzero(MAP.dynamic_of_static == 1)
    rates = []
    for seed in range(n):
        for message in speckle(attenuation, 0.0, 1000 + seed):
            match message:
                case RunStart():
                    operator = MultiTau(message, MAP)
                case FrameBatch():
                    operator.push(message)
        rates.append(estimate(operator.result(), "rate", members, MAP.static_q[members]).value)
    return float(np.sqrt(np.mean((np.array(rates) / RATE - 1) ** 2)))


def main():
    """Let the agent find an attenuation, and try out all of them."""
    print("the agent measures:")
    with tempfile.TemporaryDirectory() as folder:
        chosen, n_runs = measure(Path(folder))
    print("all attenuations, as the simulation knows them:")
    scan = {}
    for attenuation in np.linspace(*ATTENUATION, 12):
        scan[attenuation] = off_the_truth(attenuation)
        print(f"  {attenuation:.2f} decades: off by {scan[attenuation]:.1%}", flush=True)
    best = min(scan, key=scan.get)
    print(f"the best of them: {best:.2f} decades, off by {scan[best]:.1%}")
    print(f"the agent chose:  {chosen:.2f} decades, off by {off_the_truth(chosen):.1%}, after {n_runs} runs")


if __name__ == "__main__":
    main()
