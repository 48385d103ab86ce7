"""What Slurm's commands print, as `hpc_bridge.job.Job`; slurm.schedmd.com/squeue.html and sacct.html.

Fields are told apart, and lines known to be whole, by `SEPARATOR` after each. A line that is of no job is left out and
logged: it must not hide the others. A job with a field that cannot be read is told of without it: a job that is not
listed may be taken for one that is gone.
"""

import itertools
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from hpc_bridge.job import Job, JobState
from hpc_bridge.scheduler import Usage

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

SEPARATOR = "@@"
"""No shell on the way reads it, and nothing of ours has it in it."""

SQUEUE = (
    "JobID", "State", "exit_code", "SubmitTime", "StartTime", "EndTime",
    "Partition", "Account", "NodeList", "RestartCnt", "Name", "Reason",
)  # fmt: skip
SACCT = ("JobID", "State", "ExitCode", "Submit", "Start", "End", "Partition", "Account", "NodeList", "JobName")
USAGE = ("JobID", "Start", "ElapsedRaw", "NNodes", "Account", "JobName")
"""What the commands are asked for. Free text comes last, so that a separator in it does no harm."""

_STATES = {
    "PENDING": JobState.QUEUED,
    "REQUEUED": JobState.QUEUED,
    "REQUEUE_FED": JobState.QUEUED,
    "CONFIGURING": JobState.QUEUED,  # its nodes are only being switched on
    "REQUEUE_HOLD": JobState.HELD,
    "SPECIAL_EXIT": JobState.HELD,
    "RESV_DEL_HOLD": JobState.HELD,
    "SUSPENDED": JobState.HELD,
    "STOPPED": JobState.HELD,
    "RUNNING": JobState.ACTIVE,
    "COMPLETING": JobState.ACTIVE,
    "RESIZING": JobState.ACTIVE,
    "SIGNALING": JobState.ACTIVE,
    "STAGE_OUT": JobState.ACTIVE,
    "COMPLETED": JobState.COMPLETED,
    "CANCELLED": JobState.CANCELED,
    "PREEMPTED": JobState.CANCELED,
    "REVOKED": JobState.CANCELED,
    "BOOT_FAIL": JobState.FAILED,
    "DEADLINE": JobState.FAILED,
    "FAILED": JobState.FAILED,
    "NODE_FAIL": JobState.FAILED,
    "OUT_OF_MEMORY": JobState.FAILED,
    "TIMEOUT": JobState.FAILED,
}

_UNREACHABLE = re.compile(
    r"unable to contact|timed out|connection refused|connection failure|connect failure|connection reset|not connected"
    r"|zero bytes were transmitted|authentication|standby|shutting down|temporarily unable"
    r"|name or service not known|unknown host|could not establish|persistconn|persist_conn|problem talking",
    re.IGNORECASE,
)

_MAX_NODES = 100_000
"""Of one job; more would be a line made to use up memory."""


def read_squeue(text: str) -> Sequence[Job]:
    """Read ``squeue -h -t all -O SQUEUE``."""
    return _each(text, len(SQUEUE), _of_squeue)


def read_sacct(text: str) -> Sequence[Job]:
    """Read ``sacct -X -n -p -o SACCT``: when the walltime of a job ends is not in it, nor how often it began anew."""
    return _each(text, len(SACCT), _of_sacct)


def read_usages(text: str, since: float) -> Sequence[Usage]:
    """Read ``sacct -X -D -n -p -o USAGE``: what jobs cost that began after `since`, each in all of its starts."""
    usages: dict[str, Usage] = {}
    for started, usage in _each(text, len(USAGE), _of_usage):
        if started is not None and started >= since:
            before = usages[usage.id].node_seconds if usage.id in usages else 0.0
            usages[usage.id] = replace(usage, node_seconds=before + usage.node_seconds)
    return list(usages.values())


def is_unreachable(words: str) -> bool:
    """Whether a command complains that nobody answers, rather than of an answer."""
    return _UNREACHABLE.search(words) is not None


def _each(text: str, n_fields: int, read: Callable[[Sequence[str]], _T]) -> Sequence[_T]:
    rows = []
    for line in filter(None, text.split("\n")):
        fields = [field.strip() for field in line.removesuffix(SEPARATOR).split(SEPARATOR, n_fields - 1)]
        if len(fields) < n_fields or not line.endswith(SEPARATOR):
            logger.warning("left out a line of Slurm that is not of %d fields: %.300r", n_fields, line)
            continue
        try:
            rows.append(read(fields))
        except ValueError as error:
            logger.warning("left out a line of Slurm (%s): %.300r", error, line)
    return rows


def _of_squeue(fields: Sequence[str]) -> Job:
    *others, restarts, name, reason = fields
    return _job(*others, name=name, reason=reason, restarts=_whole(restarts))


def _of_sacct(fields: Sequence[str]) -> Job:
    *others, name = fields
    return _job(*others, name=name)


def _job(
    job_id: str,
    words: str,
    code: str,
    submitted: str,
    started: str,
    ends: str,
    partition: str,
    account: str,
    node_list: str,
    *,
    name: str,
    reason: str = "",
    restarts: int = 0,
) -> Job:
    nodes = _nodes(node_list)
    word = words.partition(" ")[0]  # "CANCELLED by 0"
    if word not in _STATES:
        logger.warning("job %s (%s) is in a state of Slurm that is not known: %.100r", job_id, name, words)
    state = _STATES.get(word, JobState.ACTIVE if nodes else JobState.QUEUED)
    if state is JobState.QUEUED and "held" in reason.lower():  # JobHeldUser, launch failed requeued held
        state = JobState.HELD
    exit_code = _exit_code(code) if state.is_final else None
    if state is not JobState.COMPLETED:
        exit_code = exit_code or None  # 0 is also what is said of a job that was ended, until more is known
    return Job(
        id=_id(job_id),
        name=name,
        state=state,
        reason={"PENDING": reason, "RUNNING": ""}.get(word, words),
        queue=partition,
        account=account,
        nodes=nodes,
        exit_code=exit_code,
        submitted=_time(submitted),
        started=_time(started) if nodes else None,  # of a job that has none it is a guess, or when it was canceled
        ends=_time(ends) if nodes and not state.is_final else None,
        ended=_time(ends) if state.is_final else None,
        restarts=restarts,
    )


def _of_usage(fields: Sequence[str]) -> tuple[float | None, Usage]:
    job_id, started, elapsed, n_nodes, account, name = fields
    usage = Usage(id=_id(job_id), name=name, account=account, node_seconds=float(_whole(elapsed) * _whole(n_nodes)))
    return _time(started), usage


def _id(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(_\S+|\+[0-9]+)?", text):
        raise ValueError(f"id {text!r}")
    return text


def _time(text: str) -> float | None:
    return float(_whole(text)) if _is_whole(text) else None  # N/A, Unknown, None


def _exit_code(text: str) -> int | None:
    """Turn ``0:15`` of sacct, and what waitpid(2) says of squeue, to what a shell would call it: 143."""
    code, colon, by_signal = text.partition(":")
    if not colon and _is_whole(code):
        code, by_signal = str(int(code) >> 8), str(int(code) & 0x7F)
    if not (_is_whole(code) and _is_whole(by_signal)):
        return None
    return 128 + int(by_signal) if int(by_signal) else int(code)


def _nodes(text: str) -> tuple[str, ...]:
    """Turn ``a[1-2,07],b`` to a1, a2, a07, b; what is not of that kind stays as it is."""
    if text in ("", "(null)", "None assigned", "n/a"):
        return ()
    nodes: list[str] = []
    for part in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", text):
        pieces = re.split(r"\[([^\]]*)\]", part)
        choices = [_numbers(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        if not 0 < math.prod(len(choice) for choice in choices) <= _MAX_NODES - len(nodes):
            return (text,)
        nodes += ("".join(chosen) for chosen in itertools.product(*choices))
    return tuple(nodes)


def _numbers(ranges: str) -> Sequence[str]:
    """Return none if there is anything else in it."""
    numbers: list[str] = []
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        last = last or first
        if not (_is_whole(first) and _is_whole(last)) or int(last) - int(first) >= _MAX_NODES:
            return ()
        numbers += (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return numbers


def _whole(text: str) -> int:
    if not _is_whole(text):
        raise ValueError(f"number {text!r}")
    return int(text)


def _is_whole(text: str) -> bool:
    return re.fullmatch("[0-9]{1,12}", text) is not None
