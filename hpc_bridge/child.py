"""A command that does not outlive who started it."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence

NOT_RUN = 127

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


class Child:
    """A running command, in a process group of its own.

    The kernel kills it with the thread that started it, however that ends (PR_SET_PDEATHSIG of prctl(2)). It is asked
    for between fork and exec, where Python is only safe while there is no other thread of it: so it is to be started
    while there is none (those of ZeroMQ have no locks of Python). `setpriv --pdeathsig` would do without that, but is
    not on RHEL 8, and leaves a gap in which its parent may have died before it asks.

    SIGKILL, since nobody is left to see to it that the command obeys.

    Parameters
    ----------
    command
        Program and arguments. One that cannot be run ends with 127, as of a shell.
    output
        Descriptor of a file for its standard output and error; None: they go where ours do.

    Attributes
    ----------
    why
        It cannot be run.
    """

    def __init__(self, command: Sequence[str], output: int | None = None) -> None:
        self.why = ""
        parent = os.getpid()

        def die_with_parent() -> None:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(  # noqa: S603 - it is what we are for
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            self._process = None
            self.why = f"{command[0]}: {error.strerror}"

    def stop(self) -> None:
        """Tell it, and what it started, to stop."""
        self._signal(signal.SIGTERM)

    def exit_code(self) -> int | None:
        """Return its exit code, 128 + N after signal N; None while it runs. What it left behind is killed."""
        if self._process is None:
            return NOT_RUN
        if self._process.returncode is None:
            if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            self.kill()
        code = self._process.returncode
        return 128 - code if code < 0 else code

    def kill(self) -> None:
        """Kill it, and what it started, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def _signal(self, number: int) -> None:
        # Its number is not given to another one before it was waited for.
        if self._process is not None and self._process.returncode is None:
            os.killpg(self._process.pid, number)
