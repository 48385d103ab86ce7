"""What a node is good for, found out there and told to the manager: for `hpc-bridge check`."""

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hpc_bridge.child import Child
from hpc_bridge.curve import PilotKeys
from hpc_bridge.heartbeat import Do, Finding, State
from hpc_bridge.line import Line, Manager

WITHIN = 15.0
"""Seconds in which a file system or a network has to answer."""

COMMAND_WITHIN = 300.0
"""Seconds in which the command has to end: compilers are slow where disks are."""

FAREWELL = 30.0
"""Seconds in which the manager has to take what was found."""

LOOK = 0.1

SHOWN = 500
"""Bytes of the end of what the command wrote."""


def run(
    command: Sequence[str],
    *,
    lease: str,
    manager: Manager,
    every: float,
    writable: Sequence[Path],
    reach: Sequence[str],
    keys: PilotKeys | None = None,
) -> int:
    """Find out what this node is good for; return 0 if all is well and the manager knows, else 1.

    Heartbeats tell what is known so far; that of state "ended" tells everything.

    To be called before there is another thread, see `hpc_bridge.child`.

    Parameters
    ----------
    command
        Has to end with 0.
    manager
        Where it is.
    every
        Between heartbeats (s).
    writable
        Directories where a file has to last.
    reach
        ``HOST:PORT``, each of which has to take a connection.

    Raises
    ------
    ConfigError
        The address of the manager cannot be used.
    """
    with tempfile.TemporaryFile() as output:
        ran = _Ran(command, output.fileno())
        try:
            checks: list[_Ran | _Asked] = [
                ran,
                _Asked("python", _python),
                *(_Asked(f"{directory} can be written to", partial(_written, directory)) for directory in writable),
                *(_Asked(f"{address} can be reached", partial(_reached, address)) for address in reach),
            ]
            with Line(manager, lease, keys) as line:
                return _tell(line, checks, every)
        finally:
            ran.kill()


def _tell(line: Line, checks: "Sequence[_Ran | _Asked]", every: float) -> int:
    last: int | None = None
    told: tuple[Finding, ...] | None = None
    due = 0.0
    done_at: float | None = None
    while done_at is None or time.monotonic() < done_at + FAREWELL:
        findings = tuple(found for check in checks if (found := check.finding()) is not None)
        is_done, is_well = len(findings) == len(checks), all(found.ok for found in findings)
        if is_done and done_at is None:
            done_at = time.monotonic()
        if findings != told or time.monotonic() >= due:
            state, code = (State.ENDED, 0 if is_well else 1) if is_done else (State.STARTING, None)
            if line.say(state, exit_code=code, findings=findings):
                told, due = findings, time.monotonic() + every
                last = line.n if is_done else None
        line.wait(LOOK, to_speak=told is None)
        for answer in line.hear():
            if last is not None and answer.n >= last:
                return 0 if is_well else 1
            if answer.do is not Do.GO_ON:
                return 1
    return 1


class _Ran:
    """Whether a command ends well."""

    def __init__(self, command: Sequence[str], output: int) -> None:
        self._name = " ".join(command)
        self._output = output
        self._began = time.monotonic()
        self._child = Child(command, output)
        self._found: Finding | None = None

    def finding(self) -> Finding | None:
        """Return what was found, None as long as nothing was."""
        seconds = time.monotonic() - self._began
        code = self._child.exit_code()
        if self._found is None and (code is not None or seconds > COMMAND_WITHIN):
            self._child.kill()
            size = os.fstat(self._output).st_size
            said = self._child.why or os.pread(self._output, SHOWN, max(0, size - SHOWN)).decode(errors="replace")
            how = f"ended with {code}" if code is not None else f"did not end in {COMMAND_WITHIN:g} s"
            detail = " ".join(said.split()) if code == 0 else f"{how}: {' '.join(said.split())}"
            self._found = Finding(name=self._name, ok=code == 0, detail=detail, seconds=seconds)
        return self._found

    def kill(self) -> None:
        """Leave nothing behind."""
        self._child.kill()


class _Asked:
    """What does not answer is left behind: neither names nor file systems can be waited for with a deadline."""

    def __init__(self, name: str, ask: Callable[[], str]) -> None:
        self._name = name
        self._ask = ask
        self._began = time.monotonic()
        self._found: Finding | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def finding(self) -> Finding | None:
        """Return what was found, None as long as nothing was."""
        if self._found is None and time.monotonic() - self._began > WITHIN:
            self._found = Finding(name=self._name, ok=False, detail=f"no answer in {WITHIN:g} s", seconds=WITHIN)
        return self._found

    def _run(self) -> None:
        try:
            detail, ok = self._ask(), True
        except (OSError, ValueError, ImportError) as error:
            detail, ok = getattr(error, "strerror", None) or str(error), False
        found = Finding(name=self._name, ok=ok, detail=detail, seconds=time.monotonic() - self._began)
        self._found = self._found or found


def _python() -> str:
    version = importlib.metadata.version("xpcs-stream")
    cores = len(os.sched_getaffinity(0))
    return f"{platform.python_version()} at {sys.executable}, xpcs-stream {version}, {cores} cores"


def _written(directory: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".xb-") as file:
        file.write(b"xpcs-stream")
        file.flush()
        os.fsync(file.fileno())
    return f"{shutil.disk_usage(directory).free / 1e9:.1f} GB free"


def _reached(address: str) -> str:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=WITHIN) as connection:
        return f"connected to {connection.getpeername()[0]}"
