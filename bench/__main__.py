"""Measure: `python -m bench NAME`. One name per question; without a name they are listed."""

import argparse
import dataclasses
import importlib
import json
import sys

NAMES = {
    "multitau": "pixel-frames per second of the kernel, against plain numpy and the read bandwidth",
    "stream": "frames per second over ZeroMQ into g2, against receiving only; latency from frame to result",
}


def main() -> int:
    """Print a table, or with --json one object per figure."""
    listed = "\n".join(f"  {name:10}{question}" for name, question in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Measure one thing against another in the same run.\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=NAMES, help="what to measure")
    parser.add_argument("--json", action="store_true", help="one JSON object per figure and line")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its target")
    arguments = parser.parse_args()
    met = True
    if not arguments.json:
        print(f"{'figure':34}{'median':>10} {'unit':16}{'ratio':>8}{'low':>8}{'high':>8}{'target':>8}  against")
    for figure in importlib.import_module(f"bench.{arguments.name}").figures():
        met &= figure.met
        if arguments.json:
            print(json.dumps(dataclasses.asdict(figure)), flush=True)
        else:
            target = "-" if figure.target is None else f"{'≤' if figure.less_is_better else '≥'}{figure.target:g}"
            print(
                f"{figure.figure:34}{figure.value:>10.4g} {figure.unit:16}{figure.ratio:>8.3g}{figure.low:>8.3g}"
                f"{figure.high:>8.3g}{target:>8}  {figure.against} (median of {figure.median_of})",
                flush=True,
            )
    return 0 if met or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
