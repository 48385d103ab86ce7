"""A scheduler's command, run so that it cannot hold up whoever asks."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from hpc_bridge.errors import SchedulerRefused, SchedulerUnreachable

_HEAD_START = 0.5
"""A command that has gone on for too long ends itself (s) before it is killed from here, which sudo would not let."""

_NO_TIME = (124, 137, -signal.SIGKILL)
"""Exit codes of one that has."""


def run(command: Sequence[str], *, through: Sequence[str], deadline: float) -> tuple[int, str, str]:
    """Return exit code, output and complaints of a command that gets no input.

    Parameters
    ----------
    command
        Words that need no quotes, so that a shell at the far end of ssh may read them.
    through
        Words before it: ``sudo -n -u USER``, ``ssh HOST``.
    deadline
        When it is killed, by time.monotonic().

    Raises
    ------
    SchedulerRefused
        A word would need quotes.
    SchedulerUnreachable
        It was killed, or is not there at all. Whether it did what it was asked is not known.
    """
    for word in command:
        if shlex.quote(word) != word:
            raise SchedulerRefused(f"{word!r} in a command of a scheduler must do without quotes in a shell")
    left = max(deadline - time.monotonic(), 2 * _HEAD_START)
    gone_on = f"{shlex.join(command)}: no answer in time, and it may have been heard all the same"
    limited = (*through, "timeout", "--signal=KILL", f"{left - _HEAD_START:.3f}", *command)
    try:
        process = subprocess.Popen(  # noqa: S603 - words, no shell
            limited,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
    except OSError as error:
        raise SchedulerUnreachable(f"{limited[0]}: {error.strerror}") from None
    with process:
        try:
            output, complaints = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            with suppress(PermissionError, ProcessLookupError):  # of somebody else, who does not hear us; or just gone
                os.killpg(process.pid, signal.SIGKILL)
            raise SchedulerUnreachable(gone_on) from None
    if process.returncode in _NO_TIME:
        raise SchedulerUnreachable(f"{gone_on}: {complaints.strip()}" if complaints else gone_on)
    return process.returncode, output, complaints
