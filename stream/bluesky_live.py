"""The process of a `stream.bluesky.Live`: documents come by standard input (`stream.ingest.bluesky_pipe`)."""

import json
import logging
import os
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stream.assembly import compile_kernels, operators_of, source_of, there
from stream.config import SourceSection, check
from stream.errors import XpcsStreamError
from stream.ingest.bluesky import BlueskySource
from stream.ingest.bluesky_files import BlueskyFiles
from stream.ingest.bluesky_pipe import PipedDocuments
from stream.ingest.bluesky_roots import Roots
from stream.operators.roimap_file import read
from stream.pipeline import Pipeline
from stream.protocols import Source
from stream.sinks.hdf5 import Hdf5Sink

_log = logging.getLogger(__name__)


def main() -> None:
    """Say "ready", or why not, by standard output; then correlate until standard input ends."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    said = os.fdopen(os.dup(1), "w")
    options = json.loads(sys.argv[1])
    stop = threading.Event()
    with ExitStack() as stack:
        try:
            pipeline = _pipeline(options, stack, stop)
        except XpcsStreamError as error:
            print(error, file=said, flush=True)
            sys.exit(1)
        print("ready", file=said, flush=True)
        try:
            pipeline.run()
        except XpcsStreamError as error:
            _log.error("%s", error)
            sys.exit(1)


def _pipeline(options: dict[str, Any], stack: ExitStack, stop: threading.Event) -> Pipeline:
    roimap = read(there(Path(options["qmap"])))
    document = {"source": {"address": options["detector"] or "documents.h5"}, "qmap": options["qmap"]}
    if options["threads"]:
        document["threads"] = options["threads"]
    make = operators_of(check(document), roimap)
    sink = Hdf5Sink(Path(options["out"]), qmap=roimap.arrays(), configuration=json.dumps(options))
    compile_kernels(make, roimap, lambda text: _log.warning("%s", text))
    source: Source
    if options["detector"]:
        detector = source_of(SourceSection(address=options["detector"]), give="photons")
        source = BlueskySource(PipedDocuments(0, wait=0.0, at_end=stop.set), detector)
    else:
        roots = Roots({called: Path(directory) for called, directory in options["roots"].items()})
        source = BlueskyFiles(PipedDocuments(0), roots, frame_time=options["frame_time"], give="photons")
    stack.enter_context(sink)
    stack.enter_context(source)
    return Pipeline(source, make, [sink], stop=stop)


if __name__ == "__main__":
    main()
