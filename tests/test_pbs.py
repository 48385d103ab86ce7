"""`Pbs` against a live OpenPBS or PBS Pro: `make test-pbs`, where its commands are; not among the other tests.

The server keeps history (``job_history_enable``), and has the queues `demand` (priority 200, above preempt_queue_prio)
and `preemptable`, whose jobs it requeues for the sake of the former (``preempt_order=R``). A job takes 2 cores, free to
share a host. ``PBS_THROUGH`` has the words that lead to the commands, if any.
"""

import os
import shlex
import sys
import time
from datetime import timedelta
from uuid import uuid4

import pytest

from hpc_bridge.errors import SchedulerRefused, SchedulerUnreachable
from hpc_bridge.job import Attributes, JobSpec, JobState
from hpc_bridge.pbs import Pbs

pytestmark = pytest.mark.pbs

THROUGH = shlex.split(os.environ.get("PBS_THROUGH", ""))
DEADLINE = 60.0
VNODES = 4

DRAINS = """
import pathlib, signal, sys, time
directory = pathlib.Path(sys.argv[1])
def drain(*_):
    (directory / "drained").touch()
    sys.exit(85)
signal.signal(signal.SIGTERM, drain)
(directory / "up").touch()
while True:
    signal.pause()
"""


@pytest.fixture
def pbs(tmp_path):
    pbs = Pbs(tmp_path / "jobs", submit_through=THROUGH)
    yield pbs
    left = [job.id for job in pbs.list(PREFIX) if not job.state.is_final]
    pbs.cancel(left)
    until(lambda: all(job.state.is_final for job in pbs.status(left).values()))


PREFIX = f"xb-test{uuid4().hex[:6]}-"


def spec(tmp_path, *command, queue="preemptable", **changes):
    attributes = {"duration": timedelta(minutes=5), "queue_name": queue, "account": "xpcs::8idi"}
    attributes |= {"custom_attributes": ("-l select=1:ncpus=2", "-l place=free")} | changes.pop("attributes", {})
    return JobSpec(
        name=PREFIX + uuid4().hex[:12],
        executable=command[0],
        arguments=command[1:],
        directory=tmp_path / "jobs",
        attributes=Attributes(**attributes),
        **changes,
    )


def until(is_so):
    deadline = time.monotonic() + DEADLINE
    while not (found := is_so()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)
    return found


def state_of(pbs, job):
    return pbs.status([job])[job].state


def over(pbs, job):
    return until(lambda: (now := pbs.status([job])[job]).state.is_final and now)


def test_a_job_is_listed_runs_and_its_exit_code_is_seen(pbs, tmp_path):
    before = time.time()
    job = pbs.submit(spec(tmp_path, "sh", "-c", "exit 7"))
    assert job in {listed.id for listed in pbs.list(PREFIX)}
    ended = over(pbs, job)
    assert (ended.state, ended.exit_code, ended.account) == (JobState.FAILED, 7, "xpcs::8idi")
    assert before - 2 <= ended.submitted <= ended.started <= ended.ended <= time.time() + 2
    assert ended.ends == ended.started + 300


def test_a_job_that_ends_well_is_completed(pbs, tmp_path):
    ended = over(pbs, pbs.submit(spec(tmp_path, "true")))
    assert (ended.state, ended.exit_code) == (JobState.COMPLETED, 0)


def test_another_object_lists_the_same_jobs_and_two_are_told_at_once(pbs, tmp_path):
    jobs = {pbs.submit(spec(tmp_path, "sleep", "60")) for _ in range(2)}
    other = Pbs(tmp_path / "jobs", submit_through=THROUGH)
    assert jobs <= {job.id for job in other.list(PREFIX)}
    assert set(other.status(sorted(jobs))) == jobs
    assert other.list(PREFIX + "zz") == []


def test_a_canceled_job_gets_sigterm(pbs, tmp_path):
    job = pbs.submit(spec(tmp_path, sys.executable, "-c", DRAINS, str(tmp_path)))
    until(lambda: (tmp_path / "up").exists())
    assert state_of(pbs, job) is JobState.ACTIVE
    pbs.cancel([job])
    assert over(pbs, job).state is JobState.CANCELED
    assert (tmp_path / "drained").exists()
    pbs.cancel([job])


def test_a_job_that_waits_can_be_canceled(pbs, tmp_path):
    job = pbs.submit(spec(tmp_path, "true", attributes={"custom_attributes": ("-l select=1:ncpus=2", "-h")}))
    assert state_of(pbs, job) is JobState.HELD
    pbs.cancel([job])
    assert over(pbs, job).state is JobState.CANCELED


def test_a_job_that_is_preempted_is_not_over_but_says_that_it_began_before(pbs, tmp_path):
    jobs = [pbs.submit(spec(tmp_path, "sleep", "120")) for _ in range(VNODES)]
    until(lambda: all(job.state is JobState.ACTIVE for job in pbs.status(jobs).values()))
    demand = pbs.submit(spec(tmp_path, "sleep", "120", queue="demand"))
    until(lambda: state_of(pbs, demand) is JobState.ACTIVE)
    told = until(lambda: [job for job in pbs.status(jobs).values() if job.restarts])
    assert {job.state for job in told} == {JobState.QUEUED}
    assert all(not job.state.is_final for job in pbs.status(jobs).values())


def test_the_environment_is_the_one_of_the_spec(pbs, tmp_path, monkeypatch):
    monkeypatch.setenv("MANAGERS_SECRET", "hunter2")
    told = tmp_path / "environment"
    greeting = 'it\'s "$HOME"'
    job = pbs.submit(spec(tmp_path, "sh", "-c", f"env > {told}", environment={"GREETING": greeting}))
    assert over(pbs, job).exit_code == 0
    assert f"GREETING={greeting}\n" in told.read_text()
    assert "hunter2" not in told.read_text()


def test_a_queue_that_is_not_there_is_refused_by_name(pbs, tmp_path):
    with pytest.raises(SchedulerRefused, match="nowhere"):
        pbs.submit(spec(tmp_path, "true", queue="nowhere"))


def test_a_server_that_is_gone_is_no_refusal_and_ends_nothing(pbs, tmp_path):
    job = pbs.submit(spec(tmp_path, "sleep", "60"))
    gone = Pbs(tmp_path / "jobs", submit_through=(*THROUGH, "env", "PBS_BATCH_SERVICE_PORT=1"))
    for ask in (
        lambda: gone.submit(spec(tmp_path, "true")),
        lambda: gone.status([job]),
        lambda: gone.list(PREFIX),
        lambda: gone.cancel([job]),
    ):
        with pytest.raises(SchedulerUnreachable):
            ask()
    assert not state_of(pbs, job).is_final


def test_what_was_never_there_is_not_known(pbs):
    assert pbs.status(["99999999"]) == {}
    pbs.cancel(["99999999"])


def test_used_are_node_seconds_of_the_account(pbs, tmp_path):
    began = time.time() - 2
    job = over(pbs, pbs.submit(spec(tmp_path, "sleep", "3")))
    usages = {usage.id.partition(".")[0]: usage for usage in pbs.used("xpcs::8idi", began)}
    assert 0 <= usages[job.id.partition(".")[0]].node_seconds <= 10
    assert pbs.used("nobody", began) == []
