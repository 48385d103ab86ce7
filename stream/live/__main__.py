"""The process beside a pipeline that serves its page, see `stream.sinks.live`. It ends with the pipeline."""

import argparse
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from stream import logs
from stream.ingest.zmq import ZmqResults
from stream.live.server import Server
from stream.operators.roimap_file import read


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results")
    parser.add_argument("--listening", type=int, required=True)
    parser.add_argument("--qmap", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--results", type=Path, dest="files")
    arguments = parser.parse_args()
    logs.configure("xpcs-stream live")
    # A terminal sends Ctrl-C to us, too; the pipeline ends us once its last results are out.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = threading.Event()
    threading.Thread(target=_wait_for_end, args=(stop, arguments.results), daemon=True).start()
    with socket.socket(fileno=arguments.listening) as listening, ZmqResults(arguments.results) as results:
        Server(
            listening,
            results,
            roimap=read(arguments.qmap),
            source=arguments.source,
            token=os.environ.get("XPCS_STREAM_TOKEN") or None,
            files=arguments.files,
            stop=stop,
        ).run()


def _wait_for_end(stop: threading.Event, results: str) -> None:
    sys.stdin.buffer.read()
    # A pipeline that was killed leaves the directory of its socket behind.
    place = Path(results.removeprefix("ipc://"))
    with suppress(OSError):
        place.unlink(missing_ok=True)
        place.parent.rmdir()
    stop.set()


if __name__ == "__main__":
    main()
