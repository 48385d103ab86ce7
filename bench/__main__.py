"""Measure: `python -m bench NAME`. One name per question; without a name they are listed."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

from bench.measure import Figure
from bench.picture import draw

NAMES = {
    "multitau": "pixel-frames per second of the kernels, against other programs and the machine's limits",
    "kafka": "frames per second through Kafka into one merged g2, against the bare client; latency, failover",
    "zmq": "the same through the ZeroMQ plane",
    "allocate": "seconds from run start to first frame correlated on nodes of a real Slurm; a lost node replaced",
    "fallback": "seconds of every stage of a run of 878 MB that goes by file, beside the same run streamed",
    "bluesky": "documents per second in and out, against bluesky-kafka's own; delay from raw to derived event",
    "switch": "simulated: frames live, by file and in final results under the switch, against never switching",
    "live": "milliseconds from a result to the page on the screen, server CPU per browser, weight of the page",
    "stream": "frames per second over ZeroMQ into g2, against receiving only; latency from frame to result",
}


def main() -> int:
    """Print a table, or with --json one object per figure; then draw them."""
    listed = "\n".join(f"  {name:10}{question}" for name, question in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Measure one thing against another in the same run.\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=NAMES, help="what to measure")
    parser.add_argument("--json", action="store_true", help="one JSON object per figure and line")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its target")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="picture to write; bench-NAME.png if not given")
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"{'figure':38}{'median':>10} {'unit':16}{'ratio':>9}{'low':>9}{'high':>9}{'target':>8}  against")
    figures: list[Figure] = []
    for figure in importlib.import_module(f"bench.{arguments.name}").figures():
        figures.append(figure)
        print(_as_json(figure) if arguments.json else _as_row(figure), flush=True)
    draw(figures, arguments.plot or Path(f"bench-{arguments.name}.png"))
    return 0 if not arguments.check or all(figure.met for figure in figures) else 1


def _as_json(figure: Figure) -> str:
    return json.dumps(dataclasses.asdict(figure) | {"met": figure.met})


def _as_row(figure: Figure) -> str:
    target = "-" if figure.target is None else f"{'≤' if figure.less_is_better else '≥'}{figure.target:g}"
    return (
        f"{figure.figure:38}{figure.value:>10.4g} {figure.unit:16}{figure.ratio:>9.3g}{figure.low:>9.3g}"
        f"{figure.high:>9.3g}{target:>8}{' ' if figure.met else '!'} {figure.against} (median of {figure.median_of})"
    )


if __name__ == "__main__":
    sys.exit(main())
