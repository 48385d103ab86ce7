"""The files of a run by rsync over ssh."""

import re
import selectors
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hpc_bridge.transfer import Place, Request, TransferRefused, TransferUnreachable
from hpc_bridge.transfer_digest import missing_below
from hpc_bridge.transfer_here import Task, TaskFailed

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10")

_LOOK = 0.2
"""Between looks whether a task is to end (s)."""

_BYTES = re.compile(rb"[\r\n]\s*(\d+)\s+\d+%[^\r\n]*$")
"""The last line of ``--info=progress2``."""

_NO_CONNECTION = 255
"""Exit code of ssh itself."""


class Rsync:
    """Whoever is killed leaves an rsync that ends when it next tells how far it is, and what it brought is used.

    Parameters
    ----------
    shell
        With what a command is run at the far end: options of ssh are for its configuration file rather than for here.
    """

    def __init__(self, shell: Sequence[str] = SSH) -> None:
        self._shell = tuple(shell)

    def check(self, request: Request) -> None:
        """From this machine to another one, or back."""
        if bool(request.source.endpoint) == bool(request.destination.endpoint):
            raise TransferRefused(
                f"rsync brings files of this machine to another one, or back, not from"
                f" {request.source.endpoint or 'here'} to {request.destination.endpoint or 'here'}",
                is_final=True,
            )

    def carry(self, request: Request, task: Task) -> None:
        """Bring what is not there, by rsync's own checksums; a file has its name once it is whole."""
        if request.destination.endpoint:
            made = self._there(request, f"mkdir -p -- {shlex.quote(str(request.destination.path))}", "")
            if made.returncode != 0:
                raise TaskFailed(_line(made.stderr, -1))
        else:
            Path(request.destination.path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile() as names, tempfile.TemporaryFile() as complaints:
            names.write(b"\0".join(file.name.encode() for file in request.files))
            names.seek(0)
            process = subprocess.Popen(  # noqa: S603 - words, no shell
                [
                    *("rsync", "--checksum", "--times", "--partial-dir=.xpcs-stream-part", "--protect-args"),
                    *("--info=progress2", "--no-human-readable", "--files-from=-", "--from0"),
                    f"--rsh={shlex.join(self._shell)}",
                    _folder(request.source),
                    _folder(request.destination),
                ],
                stdin=names,
                stdout=subprocess.PIPE,
                stderr=complaints,
            )
            with process:
                try:
                    _follow(process, task)
                finally:
                    process.terminate()
            complaints.seek(0)
            if process.returncode != 0:
                raise TaskFailed(
                    f"rsync ended with {process.returncode}: {_line(complaints.read().decode(errors='replace'), 0)}"
                )
        task.files = len(request.files)

    def missing(self, request: Request) -> Sequence[str]:
        """Have what is there written to disk and read again, where it is."""
        if not request.destination.endpoint:
            return tuple(missing_below(Path(request.destination.path), request))
        folder = shlex.quote(str(request.destination.path))
        sums = "".join(f"{file.sha256}  {file.name}\n" for file in request.files)
        checked = self._there(request, f"cd -- {folder} && sync -f . && LC_ALL=C sha256sum --check --quiet", sums)
        if checked.returncode == 0:
            return ()
        return tuple(checked.stdout.splitlines()) or (_line(checked.stderr, -1),)

    def _there(self, request: Request, command: str, said: str) -> "subprocess.CompletedProcess[str]":
        host = request.destination.endpoint
        try:
            done = subprocess.run(  # noqa: S603 - words here; those of the far end are quoted
                [*self._shell, host, command], input=said, capture_output=True, text=True, errors="replace", check=False
            )
        except OSError as error:
            raise TransferUnreachable(f"{self._shell[0]}: {error.strerror}") from None
        if done.returncode == _NO_CONNECTION:
            raise TransferUnreachable(f"{host}: {_line(done.stderr, -1)}")
        return done


def _folder(place: Place) -> str:
    return f"{place.endpoint}:{place.path}/" if place.endpoint else f"{place.path}/"


def _follow(process: "subprocess.Popen[bytes]", task: Task) -> None:
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    told = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            task.go_on()
            if not selector.select(_LOOK):
                continue
            block = process.stdout.read1(65536)  # type: ignore[attr-defined]
            if not block:
                process.wait()
                return
            told = (told + block)[-200:]
            if match := _BYTES.search(told):
                task.bytes = int(match[1])


def _line(text: str, number: int) -> str:
    """Return what tells most: the first line of rsync, the last of a shell that may greet."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[number][:500] if lines else "it did not say why"
