"""This machine as a scheduler: real processes, and what another `Local` on the same directory knows of them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from hpc_bridge.errors import ConfigError, SchedulerRefused
from hpc_bridge.job import Attributes, JobSpec, JobState
from hpc_bridge.local import Local

DEADLINE = 60.0

DRAINS = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("drained", flush=True), sys.exit(85)))
print("up", flush=True)
signal.pause()
"""
"""Ends with the requeue code when it is told to go."""

STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def local(tmp_path):
    scheduler = Local(tmp_path, grace=10.0)
    yield scheduler
    alive = [job.id for job in scheduler.list("") if not job.state.is_final]
    scheduler.cancel(alive)
    until(lambda: all(job.state.is_final for job in scheduler.status(alive).values()))


def spec(local, *command, name="xb-8idi-0123456789ab", seconds=60.0, **changes):
    attributes = {"duration": timedelta(seconds=seconds), "queue_name": "here", "account": "staff"}
    attributes |= changes.pop("attributes", {})
    return JobSpec(
        name=name,
        executable=command[0],
        arguments=command[1:],
        directory=local._directory,
        attributes=Attributes(**attributes),
        **changes,
    )


def python(local, text, **changes):
    return spec(local, sys.executable, "-c", text, **changes)


def until(is_so):
    deadline = time.monotonic() + DEADLINE
    while not (found := is_so()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
    return found


def ended(local, job):
    return until(lambda: (now := local.status([job])[job]).state.is_final and now)


def said(tmp_path, job, what):
    return until(lambda: (out := tmp_path / f"{job}.sh.out").exists() and what in out.read_text())


def is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_job_runs_and_its_exit_code_is_seen(local):
    done, failed = local.submit(spec(local, "true")), local.submit(spec(local, "sh", "-c", "exit 7"))
    assert (ended(local, done).state, ended(local, done).exit_code) == (JobState.COMPLETED, 0)
    assert (ended(local, failed).state, ended(local, failed).exit_code) == (JobState.FAILED, 7)


def test_a_job_that_runs_says_what_was_asked_for_and_since_when(local, tmp_path):
    before = time.time()
    job = local.submit(python(local, DRAINS, seconds=50))
    said(tmp_path, job, "up")
    seen = local.status([job])[job]
    assert (seen.id, seen.state, seen.queue, seen.account) == (job, JobState.ACTIVE, "here", "staff")
    assert seen.name.startswith("xb-8idi-0123456789ab")
    assert before <= seen.submitted <= seen.started <= time.time()
    assert seen.ends == pytest.approx(seen.started + 50)
    assert seen.nodes == (os.uname().nodename,)


def test_jobs_are_listed_by_how_their_names_begin(local):
    ours = local.submit(spec(local, "true", name="xb-8idi-aaaaaaaaaaaa"))
    local.submit(spec(local, "true", name="xb-9id-bbbbbbbbbbbb"))
    assert [job.id for job in local.list("xb-8idi-")] == [ours]
    assert len(local.list("xb-")) == 2


def test_another_process_finds_a_job_and_cancels_it_and_sees_how_it_ended(local, tmp_path):
    job = local.submit(python(local, DRAINS))
    said(tmp_path, job, "up")
    other = f"""
from pathlib import Path
from hpc_bridge.local import Local
local = Local(Path({str(tmp_path)!r}))
[job] = local.list("xb-8idi-")
assert job.state == "active", job
local.cancel([job.id])
"""
    subprocess.run([sys.executable, "-c", other], check=True, timeout=DEADLINE)
    assert (ended(local, job).state, ended(local, job).exit_code) == (JobState.CANCELED, 85)


def test_a_job_outlives_the_process_that_submitted_it(local, tmp_path):
    submit = f"""
import os, signal
from datetime import timedelta
from pathlib import Path
from hpc_bridge.job import Attributes, JobSpec
from hpc_bridge.local import Local
directory = Path({str(tmp_path)!r})
attributes = Attributes(duration=timedelta(minutes=1))
command = dict(executable={sys.executable!r}, arguments=("-c", {DRAINS!r}))
Local(directory).submit(JobSpec(name="xb-8idi-0123456789ab", directory=directory, attributes=attributes, **command))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", submit], timeout=DEADLINE).returncode == -signal.SIGKILL
    [job] = local.list("xb-")
    said(tmp_path, job.id, "up")
    assert local.status([job.id])[job.id].state is JobState.ACTIVE


def test_sigterm_goes_to_the_command_alone_which_may_have_to_tell_its_own(local, tmp_path):
    tells = """
import signal, subprocess, sys, time
child = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('child', flush=True)); print('up', flush=True)"
signal.signal(signal.SIGTERM, lambda *_: print("command", flush=True))
subprocess.Popen([sys.executable, "-c", child + "; signal.pause()"])
signal.pause()
time.sleep(0.2)
"""
    job = local.submit(python(local, tells))
    said(tmp_path, job, "up")
    local.cancel([job])
    assert ended(local, job).exit_code == 0
    assert (tmp_path / f"{job}.sh.out").read_text().split() == ["up", "command"]


def test_a_job_that_does_not_go_is_killed_after_the_grace(tmp_path):
    local = Local(tmp_path, grace=2.0)
    job = local.submit(python(local, STUBBORN))
    said(tmp_path, job, "up")
    asked = time.time()
    local.cancel([job])
    killed = ended(local, job)
    assert (killed.state, killed.exit_code) == (JobState.CANCELED, 128 + signal.SIGKILL)
    assert killed.ended - asked >= 2, "it was not given time"


def test_a_job_that_is_canceled_at_once_does_not_stay(local):
    jobs = [local.submit(spec(local, "sleep", "60")) for _ in range(5)]
    local.cancel(jobs)
    assert {ended(local, job).state for job in jobs} == {JobState.CANCELED}


def test_a_job_ends_with_its_walltime_and_keeps_its_exit_code(local):
    # A shell, which has its trap long before 2 s are over, however slow the machine is.
    drains = spec(local, "sh", "-c", "trap 'exit 85' TERM; while :; do sleep 0.1; done", seconds=2)
    job = ended(local, local.submit(drains))
    assert (job.state, job.reason, job.exit_code) == (JobState.FAILED, "TIMEOUT", 85)
    assert 2 <= job.ended - job.started < 10


def test_what_a_command_leaves_behind_ends_with_the_job(local, tmp_path):
    job = local.submit(spec(local, "sh", "-c", "sleep 60 & echo $! left"))
    assert ended(local, job).state is JobState.COMPLETED
    pid = int((tmp_path / f"{job}.sh.out").read_text().split()[0])
    until(lambda: not is_alive(pid))


def test_a_process_that_gets_away_does_not_keep_a_job_alive(local, tmp_path):
    job = local.submit(spec(local, "sh", "-c", "setsid sleep 60 & echo $! left"))
    assert ended(local, job).state is JobState.COMPLETED
    with suppress(ProcessLookupError):  # it was too slow to get away
        os.kill(int((tmp_path / f"{job}.sh.out").read_text().split()[0]), signal.SIGKILL)


def test_a_job_whose_processes_were_killed_from_outside_is_over(local, tmp_path):
    job = local.submit(python(local, "import os; print(os.getpid(), flush=True); import signal; signal.pause()"))
    said(tmp_path, job, "\n")
    payload = int((tmp_path / f"{job}.sh.out").read_text())
    timeout = parent_of(payload)
    for pid in (parent_of(timeout), timeout, payload):
        os.kill(pid, signal.SIGKILL)
    seen = ended(local, job)
    assert (seen.state, seen.reason, seen.exit_code) == (JobState.FAILED, "killed", None)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_process_that_has_the_id_of_one_that_was_killed_is_not_taken_for_the_job(local, tmp_path):
    job = local.submit(spec(local, "true"))
    ended(local, job)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        (tmp_path / f"{job}.sh.record").write_text(f"{stranger.pid} {time.time()}\n")
        assert local.status([job])[job].state is JobState.FAILED
        local.cancel([job])
        with pytest.raises(subprocess.TimeoutExpired):
            stranger.wait(0.2)
        stranger.kill()


def test_of_the_environment_a_job_gets_what_its_spec_says_and_nothing_of_the_manager(local, tmp_path, monkeypatch):
    monkeypatch.setenv("MANAGERS_SECRET", "hunter2")
    environment = {"GREETING": 'it\'s "$HOME"\n; exit 3'}
    job = local.submit(
        spec(local, "sh", "-c", 'env; echo "<$GREETING>"', environment=environment, pre_launch="export FROM=before")
    )
    assert ended(local, job).exit_code == 0
    out = (tmp_path / f"{job}.sh.out").read_text()
    assert f"<{environment['GREETING']}>" in out
    assert "FROM=before" in out
    assert "hunter2" not in out
    assert all("hunter2" not in file.read_text() for file in tmp_path.iterdir())


def test_what_is_not_known_is_not_there(local):
    assert local.status(["xb-nobody.1.5"]) == {}
    assert local.list("xb-nobody") == []
    local.cancel(["xb-nobody.1.5"])


def test_used_are_the_node_seconds_of_an_account_since_a_time(local):
    job = ended(local, local.submit(spec(local, "sleep", "0.3")))
    ended(local, local.submit(spec(local, "true", attributes={"account": "others"})))
    [usage] = local.used("staff", 0.0)
    assert (usage.id, usage.account) == (job.id, "staff")
    assert usage.node_seconds == pytest.approx(job.ended - job.started)
    assert usage.node_seconds >= 0.3
    assert local.used("staff", job.started + 0.001) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"node_count": 2}, "not 2"),
        ({"name": "a;b"}, "a;b"),
        ({"environment": {"A B": ""}}, "A B"),
        ({"directory": Path("/elsewhere")}, "/elsewhere"),
        ({"attributes": Attributes(duration=timedelta(0))}, "0:00:00"),
        ({"attributes": Attributes(duration=timedelta(1), custom_attributes=("--gpu",))}, "--gpu"),
        ({"attributes": Attributes(duration=timedelta(1), reservation_id="R12")}, "R12"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_by_name(tmp_path, changes, named):
    asked = {"name": "xb", "executable": "true", "directory": tmp_path}
    asked |= {"attributes": Attributes(duration=timedelta(1))}
    with pytest.raises(SchedulerRefused, match=named):
        Local(tmp_path).submit(JobSpec(**asked | changes))
    assert Local(tmp_path).list("") == []


def test_a_directory_that_a_shell_would_misread_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a b"):
        Local(tmp_path / "a b")
