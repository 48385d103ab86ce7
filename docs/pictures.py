"""Make the pictures of the documentation: ``python docs/pictures.py [NAME...]``. The one of a kill is of a real run."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from stream.ingest.zmq import ZmqResults
from stream.messages import Result, RunStart, RunStop
from stream.operators.multitau import delays
from stream.result import read

OUT = Path(__file__).with_name("pictures")
COMMAND = [sys.executable, "-m", "stream"]
N_FRAMES, RATE = 6_000, 300
KILLED_AT = 3_000
"""Frames in the result when a worker is killed."""

mpl.rcParams |= {"svg.hashsalt": "xpcs-stream", "font.family": "sans-serif", "svg.fonttype": "none"}


def architecture() -> None:
    """Draw the straight line, and where it is cut."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    axes.set(xlim=(-2, 101), ylim=(2, 41))
    axes.axis("off")
    top, bottom = 30, 9
    _box(axes, 8, top, "source", "detector, files,\ndocuments")
    _box(axes, 36, top, "pipeline", "ledger, checkpoints")
    _box(axes, 64, top, "operators", "g2, c2, scattering,\nintensity")
    _box(axes, 91, top, "sinks", "file, page, ZeroMQ,\nBluesky, Tiled")
    for begin, end in ((17, 27), (45, 55), (73, 82)):
        _arrow(axes, (begin, top), (end, top))
    _box(axes, 8, bottom, "gateway", "cuts frames\ninto regions")
    for i, y in enumerate((bottom + 4.5, bottom - 4.5)):
        _box(axes, 50, y, f"worker {i + 1}", "operators of some regions", height=7)
        _arrow(axes, (17, bottom), (41, y))
        _arrow(axes, (59, y), (82, bottom))
    _box(axes, 91, bottom, "merger", "adds up\npartial sums")
    axes.text(29, bottom + 7, "frames", ha="center", color="0.4", fontsize=9)
    axes.text(71, bottom + 7, "sums", ha="center", color="0.4", fontsize=9)
    axes.text(0, 39, "in one process", fontsize=9, color="0.4")
    axes.text(0, 18.5, "among nodes, over ZeroMQ or Kafka", fontsize=9, color="0.4")
    _save(figure, "architecture")


def _box(axes: Axes, x: float, y: float, title: str, text: str, height: float = 11) -> None:
    axes.add_patch(plt.Rectangle((x - 9, y - height / 2), 18, height, fill=True, fc="#eef3f8", ec="#2b5c8a"))
    axes.text(x, y + height / 2 - 1.2, title, ha="center", va="top", weight="bold", fontsize=10)
    axes.text(x, y - height / 2 + 0.8, text, ha="center", va="bottom", fontsize=8, color="0.25")


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, begin, arrowprops={"arrowstyle": "->", "color": "#2b5c8a"})


def levels() -> None:
    """Draw the delays of every level."""
    d, n_levels = 4, 16
    level, delay = delays(2**19, d, n_levels)
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for each in range(n_levels):
        of_level = delay[level == each]
        axes.plot(of_level, np.full(len(of_level), each), "o", ms=4, color=f"C{each % 2}")
    axes.set(xscale="log", xlabel="delay (frames)", ylabel="level", title=f"{len(delay)} delays: {d} per level")
    axes.grid(alpha=0.3)
    _save(figure, "levels")


def kill() -> None:
    """Draw what is in the result while a worker is killed."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        beamline = _Beamline(folder, stack)
        sent, came, killed = beamline.follow()
        master = next((folder / "spool").glob("*/*_master.h5"))
        subprocess.run(
            [*COMMAND, "run", "--source", master, "--qmap", "qmap.h5", "--out", "alone.h5", "--quiet"],
            cwd=folder, check=True,
        )  # fmt: skip
        merged, alone = read(folder / "merged.h5"), read(folder / "alone.h5")
        is_same = np.array_equal(merged.g2, alone.g2) and np.array_equal(merged.g2_err, alone.g2_err)
    if not is_same:
        raise RuntimeError("the result is not that of one process")
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.plot(*np.array(sent).T, color="0.6", label="that came to the gateway")
    axes.step(*np.array(came).T, where="post", label="in the merged result")
    axes.axvline(killed, color="C3", lw=1)
    axes.annotate(
        "kill -9 of one\nof two workers", (killed, N_FRAMES / 15), xytext=(6, 0), textcoords="offset points", color="C3"
    )
    axes.set(xlabel="time (s)", ylabel="frames", title="in the end g2 is that of one process, bit for bit")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    _save(figure, "kill")


class _Beamline:
    """A detector, a gateway, two workers and a merger; all end with the stack."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.services: list[subprocess.Popen[bytes]] = []
        self.detector, self.plane, self.results = (f"127.0.0.1:{_free_port()}" for _ in range(3))
        geometry = "--shape 128x128 --beam-center-x 64 --beam-center-y 70 --detector-distance 5m --pixel-size 75um"
        rest = "--incident-energy 11keV --n-dynamic 4 --n-static 80 --out qmap.h5"
        subprocess.run([*COMMAND, "qmap", *geometry.split(), *rest.split()], cwd=folder, check=True)
        plane = f"zmq://{self.plane}/picture"
        self.start(
            *("gateway", "--source", f"zmq+dectris://{self.detector}", "--to", plane, "--regions", "4"),
            *("--spool", "spool", "--status", "gateway.json"),
        )
        work = ("worker", "--source", plane, "--qmap", "qmap.h5", "--checkpoints", "checkpoints", "--threads", "1")
        self.workers = [self.start(*work, "--checkpoint-every", "2 s", "--publish-every", "0.2 s") for _ in range(2)]
        self.start(
            *("merge", "--source", plane, "--qmap", "qmap.h5", "--out", "merged.h5", "--quiet", "--runs", "1"),
            *("--publish", f"zmq://{self.results}", "--publish-every", "0.2 s"),
        )

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start a process."""
        process = subprocess.Popen([*COMMAND, *arguments], cwd=self.folder)
        if arguments[0] in ("gateway", "merge"):
            self.services.append(process)
        self.stack.callback(process.wait)
        self.stack.callback(process.terminate)
        return process

    def follow(self) -> tuple[list[tuple[float, int]], list[tuple[float, int]], float]:
        """Return how many frames had come to the gateway when, and were in the result; when a worker was killed."""
        began = killed = 0.0
        sent: list[tuple[float, int]] = []
        came: list[tuple[float, int]] = []
        detector = None
        with ZmqResults(f"tcp://{self.results}") as results:
            for message in results:
                if detector is None:  # it waits for the gateway, and that for nobody
                    detector = self.start(
                        *("simulate", "--qmap", "qmap.h5", "--to", f"zmq+dectris://{self.detector}"),
                        *("--frames", str(N_FRAMES), "--rate", f"{RATE} Hz", "--mean-counts", "0.3"),
                    )
                if any(each.poll() for each in self.services):
                    raise RuntimeError("a process ended, and said why")
                now = time.monotonic() - began
                if began and (n_sent := self.came_to_gateway()):
                    sent.append((now, n_sent))
                match message:
                    case RunStart():
                        began = time.monotonic()
                    case Result(operator="multitau"):
                        came.append((now, message.n_frames))
                        if not killed and message.n_frames > KILLED_AT:
                            os.kill(self.workers[0].pid, signal.SIGKILL)
                            killed = now
                    case RunStop():
                        break
        while not (self.folder / "merged.h5").exists():
            time.sleep(0.1)
        return sent, came, killed

    def came_to_gateway(self) -> int:
        """Return what the gateway told last."""
        told = json.loads((self.folder / "gateway.json").read_text())
        return int(told["frames"] or 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _save(figure: plt.Figure, name: str) -> None:
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / f"{name}.svg", metadata={"Date": None})
    print(OUT / f"{name}.svg")


if __name__ == "__main__":
    for picture in sys.argv[1:] or ("architecture", "levels", "kill"):
        {"architecture": architecture, "levels": levels, "kill": kill}[picture]()
