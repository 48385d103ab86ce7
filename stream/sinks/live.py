"""A page in the browser, served by a process beside the pipeline."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from stream.errors import ConfigError
from stream.messages import Output, Result
from stream.sinks.zmq import ZmqSink

TOKEN = "XPCS_STREAM_TOKEN"  # noqa: S105  the name of the variable
"""Where the token is looked for that `live` asks for, unless a file is given."""

SHORTEST_TOKEN = 16
SHARE = 0.05
"""Of the time, that handing on the interim results of one operator may take: images of 4 Mpixel are 36 MB each."""

END = 10.0
"""Seconds that the process beside has to end."""


class LiveSink:
    """Serve results as a page. A `stream.protocols.Sink`.

    The page is a process of its own (`stream.live`) that hears results as other subscribers do: whatever browsers do,
    and however many they are, none of it is done here. If it dies, the run goes on without it.

    Parameters
    ----------
    host, port
        Where browsers come to.
    qmap
        File of the map.
    source
        Where frames come from, for those who read the page.
    token
        Without it nobody is served. None: only for this machine.
    files
        Where result files are written, so that the page has the runs of the day.

    Raises
    ------
    ConfigError
        The address cannot be used, or others than this machine could reach it without a token.
    """

    def __init__(
        self, host: str, port: int, *, qmap: Path, source: str, token: str | None, files: Path | None = None
    ) -> None:
        self._qmap = qmap
        self._source = source
        self._token = token
        self._files = files
        self._listening = listen(host, port, token=token)
        self._open = ExitStack()
        self._due: dict[str, float] = {}
        """By operator, when its next interim result is handed on."""

    def __enter__(self) -> Self:
        """Start the process; it answers browsers once it has read the map."""
        with ExitStack() as stack:
            listening = stack.enter_context(self._listening)
            # Nobody else may look into this directory, nor hear what is said in it.
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="xpcs-stream-"))
            address = f"ipc://{directory}/results"
            self._results = stack.enter_context(ZmqSink(address, pattern="pub"))
            fd = listening.fileno()
            self._process = subprocess.Popen(  # noqa: S603  no shell
                [
                    *(sys.executable, "-m", "stream.live", address, "--listening", str(fd)),
                    *("--qmap", str(self._qmap), "--source", self._source),
                    *(() if self._files is None else ("--results", str(self._files))),
                ],
                stdin=subprocess.PIPE,
                pass_fds=[fd],
                env={**os.environ, TOKEN: self._token or ""},
            )
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Its standard input ends, and so does it.
        with self._open:
            try:
                self._process.communicate(timeout=END)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def write(self, output: Output) -> None:
        """Hand on results; frames are left out, and interim results so large that handing them on would take long."""
        interim = output.operator if isinstance(output, Result) and not output.final else None
        begin = time.monotonic()
        if interim is not None and begin < self._due.get(interim, begin):
            return
        self._results.write(output)
        if interim is not None:
            end = time.monotonic()
            self._due[interim] = end + (end - begin) / SHARE

    def flush(self) -> None:
        """Return at once: a page that is late holds up nothing."""


def listen(host: str, port: int, *, token: str | None) -> socket.socket:
    """Return a socket for the page.

    Raises
    ------
    ConfigError
        The address cannot be used, or others than this machine could reach it without a token.
    """
    called = f"live://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"{called}: {error.strerror}") from None
    if token is None and address[0] not in ("127.0.0.1", "::1"):
        raise ConfigError(f"{called}: others than this machine reach it, so that a token is needed: --token-file FILE")
    listening = socket.socket(family, kind)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise ConfigError(f"{called}: {error.strerror}") from None
    return listening


def read_token(file: Path | None) -> str | None:
    """Return the token that stands in a file, else in XPCS_STREAM_TOKEN; None if there is none.

    Raises
    ------
    ConfigError
        It cannot be read, or could be guessed.
    """
    try:
        token = file.read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN, "")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {getattr(error, 'strerror', 'not a text')}") from None
    if (file or token) and len(token) < SHORTEST_TOKEN:
        raise ConfigError(f"{file or TOKEN}: a token has {SHORTEST_TOKEN} characters or more, not {len(token)}")
    return token or None
