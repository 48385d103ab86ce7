r"""What `qstat -f -F dsv` of OpenPBS and PBS Pro prints, with and without ``-x``: one line for each job.

``Job Id: ID|name=value|name.resource=value|...``, where ``|`` in a value is ``\|`` (openpbs, src/cmds/qstat.c). Times
are those of ctime(3), in the local time of qstat; here, in UTC: run it with ``TZ=UTC``. The states are those of the PBS
Professional Reference Guide, "Job States".
"""

import calendar
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from hpc_bridge.job import Job, JobState
from hpc_bridge.scheduler import Usage

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_STATES = {
    "Q": JobState.QUEUED,
    "T": JobState.QUEUED,  # in transit
    "W": JobState.QUEUED,  # waits for the time it was submitted for
    "M": JobState.QUEUED,  # moved to another server, which knows more
    "H": JobState.HELD,
    "S": JobState.HELD,  # suspended
    "U": JobState.HELD,  # suspended, its workstation is busy
    "B": JobState.ACTIVE,  # an array, begun
    "R": JobState.ACTIVE,
    "E": JobState.ACTIVE,  # exiting: not over
}
_OVER = ("F", "X")
_TERMINATED = "91"
"""Substate of a job that was deleted, running or not (openpbs, src/include/job.h)."""

_SIGNALED = 256
"""Is added to the signal in the Exit_status of a job that died of one."""


def read_jobs(text: str) -> Sequence[Job]:
    """Return the jobs of a listing. A line that is none is left out, and logged."""
    return list(_read(text, _job))


def read_usages(text: str, since: float) -> Sequence[Usage]:
    """Return what the jobs of a listing cost that began after `since`: nodes times ``resources_used.walltime``."""
    return [usage for usage in _read(text, lambda attributes: _usage(attributes, since)) if usage is not None]


def _read(text: str, convert: Callable[[Mapping[str, str]], _T]) -> Iterator[_T]:
    for line in text.split("\n"):
        if line.strip():
            try:
                yield convert(_attributes(line))
            except (KeyError, ValueError, OverflowError) as error:
                logger.warning("qstat printed what is no job (%s: %s): %.200r", type(error).__name__, error, line)


def _attributes(line: str) -> Mapping[str, str]:
    head, *parts = re.split(r"(?<!\\)\|", line)
    match = re.fullmatch(r"Job Id: ?(\S+)", head)
    if match is None:
        raise ValueError("no Job Id")
    pairs = (part.replace(r"\|", "|").partition("=") for part in parts)
    return {"Job Id": match[1]} | {name: value for name, _, value in pairs}


def _job(attributes: Mapping[str, str]) -> Job:
    letter = attributes["job_state"]
    comment = attributes.get("comment", "").strip()
    status = int(attributes["Exit_status"]) if "Exit_status" in attributes else None
    exit_code = None
    if letter in _OVER:
        state = _end(attributes.get("substate"), status)
        if status is not None and status < 0:
            comment = f"Exit_status {status}: {comment}"
        elif status is not None:
            exit_code = status if status < _SIGNALED else status - _SIGNALED + 128
    else:
        state = _STATES[letter]
    began = state is not JobState.QUEUED and "stime" in attributes
    started = _time(attributes["stime"]) if began else None
    walltime = attributes.get("Resource_List.walltime")
    runs = int(attributes.get("run_count", "0"))
    return Job(
        id=attributes["Job Id"],
        name=attributes["Job_Name"],
        state=state,
        reason=comment,
        queue=attributes.get("queue", ""),
        account=attributes.get("Account_Name", ""),
        nodes=_hosts(attributes.get("exec_host", "")),
        exit_code=exit_code,
        submitted=_time(attributes["ctime"]) if "ctime" in attributes else None,
        started=started,
        ends=None if started is None or walltime is None else started + _duration(walltime),
        ended=_ended(attributes) if state.is_final else None,
        restarts=runs if started is None else max(0, runs - 1),
    )


def _usage(attributes: Mapping[str, str], since: float) -> Usage | None:
    walltime = attributes.get("resources_used.walltime")
    if walltime is None or "stime" not in attributes or _time(attributes["stime"]) < since:
        return None
    return Usage(
        id=attributes["Job Id"],
        name=attributes["Job_Name"],
        account=attributes.get("Account_Name", ""),
        node_seconds=int(attributes.get("Resource_List.nodect", "1")) * _duration(walltime),
    )


def _end(substate: str | None, status: int | None) -> JobState:
    if substate == _TERMINATED:
        return JobState.CANCELED
    return JobState.COMPLETED if status == 0 else JobState.FAILED


def _ended(attributes: Mapping[str, str]) -> float | None:
    """Return when a job was over: as its node said, or else as it became history."""
    if "obittime" in attributes:
        return _time(attributes["obittime"])
    if "history_timestamp" in attributes:
        return float(int(attributes["history_timestamp"]))
    return _time(attributes["mtime"]) if "mtime" in attributes else None


def _hosts(exec_host: str) -> tuple[str, ...]:
    """Return ``("b141", "b142")`` of ``b141/0*16+b142/0*16``."""
    return tuple(dict.fromkeys(chunk.partition("/")[0] for chunk in exec_host.split("+") if chunk))


def _time(ctime: str) -> float:
    return float(calendar.timegm(time.strptime(ctime)))


def _duration(text: str) -> float:
    """Return the seconds of ``64:26:16``, of ``26:16`` or of ``16``."""
    seconds = 0
    for part in text.split(":"):
        seconds = 60 * seconds + int(part)
    return float(seconds)
