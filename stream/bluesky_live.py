"""The process of a `stream.bluesky.Live`: documents come by standard input (`stream.ingest.bluesky_pipe`)."""

import json
import logging
import os
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from stream import logs
from stream.assembly import sinks_of, source_of
from stream.config import SourceSection, check, there
from stream.correlators import compile_kernels, operators_of
from stream.errors import XpcsStreamError
from stream.ingest.bluesky import BlueskySource
from stream.ingest.bluesky_files import BlueskyFiles
from stream.ingest.bluesky_pipe import PipedDocuments
from stream.ingest.bluesky_roots import Roots
from stream.operators.roimap_file import read
from stream.pipeline import Pipeline
from stream.protocols import Source

_log = logging.getLogger(__name__)


def main() -> None:
    """Say "ready", or why not, by standard output; then correlate until standard input ends."""
    logs.configure("xpcs-stream bluesky")
    said = os.fdopen(os.dup(1), "w")
    options = json.loads(sys.argv[1])
    with ExitStack() as stack:
        try:
            pipeline = _pipeline(options, stack)
        except XpcsStreamError as error:
            print(error, file=said, flush=True)
            sys.exit(1)
        print("ready", file=said, flush=True)
        try:
            pipeline.run()
        except XpcsStreamError as error:
            _log.error("%s", error)
            sys.exit(1)


def _pipeline(options: dict[str, Any], stack: ExitStack) -> Pipeline:
    roimap = read(there(Path(options["qmap"])))
    configuration = check(
        {
            # Files are those that documents tell of: none is opened by its address.
            "source": {"address": options["detector"] or "documents.h5"},
            "qmap": options["qmap"],
            "sinks": [sink for sink in (options["out"], options["publish"], *options["documents"]) if sink],
            "publish_every": f"{options['publish_every']} s",
            "threads": options["threads"],
        }
    )
    make = operators_of(configuration, roimap)
    never = threading.Event()
    sinks = sinks_of(configuration, roimap, Console(), _written, stop=never, said=json.dumps(options))
    for sink in sinks:
        stack.enter_context(sink)
    compile_kernels(make, roimap, lambda text: _log.warning("%s", text))
    source = stack.enter_context(_source(options))
    return Pipeline(source, make, sinks, publish_every=configuration.publish_every)


def _source(options: dict[str, Any]) -> Source:
    if options["detector"]:
        detector = source_of(SourceSection(address=options["detector"]), give="photons")
        return BlueskySource(PipedDocuments(0, wait=0.0), detector)
    roots = Roots({called: Path(directory) for called, directory in options["roots"].items()})
    return BlueskyFiles(PipedDocuments(0), roots, frame_time=options["frame_time"], give="photons")


def _written(path: Path) -> None:
    _log.info("%s is written", path)


if __name__ == "__main__":
    main()
