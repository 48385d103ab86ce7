"""What `Pbs` asks of PBS, and what it makes of the answers: fake qsub, qstat, qselect and qdel that play back.

The real ones are in tests/test_pbs.py.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from hpc_bridge.errors import ConfigError, SchedulerRefused, SchedulerUnreachable
from hpc_bridge.job import Attributes, JobSpec, JobState
from hpc_bridge.pbs import Pbs

WAITS = "Job Id: {id}|Job_Name=xb-8idi-0123456789ab.1.5|job_state=Q|queue=demand|Account_Name=xpcs::8idi\n"


class FakeCommands:
    """Programs that write down how they are called, and answer what they are told to."""

    def __init__(self, directory):
        self.directory = directory / "fake-bin"
        self.directory.mkdir()
        self.through = ("env", f"PATH={self.directory}:{os.environ['PATH']}")
        self.answer("id", "beamline\n")

    def answer(self, name, output="", complaints="", code=0, unless_given=None, *, then=""):
        """Let a command answer so; `unless_given` an option, with which it answers `then`."""
        for suffix, text in (("output", output), ("complaints", complaints), ("then", then)):
            (self.directory / f"{name}.{suffix}").write_text(text)
        other = f'case " $* " in *" {unless_given} "*) ;; *) cat {name}.then; exit 0 ;; esac\n' if unless_given else ""
        script = f'#!/bin/sh\ncd {self.directory}\necho "$*" >> {name}.calls\n{other}'
        script += f"cat {name}.output\ncat {name}.complaints >&2\nexit {code}\n"
        self.program(name, script)

    def program(self, name, script):
        file = self.directory / name
        file.write_text(script)
        file.chmod(0o755)

    def calls(self, name):
        file = self.directory / f"{name}.calls"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def fake(tmp_path):
    return FakeCommands(tmp_path)


@pytest.fixture
def pbs(fake, tmp_path):
    return Pbs(tmp_path, submit_through=fake.through, timeout=10.0)


def spec(directory, **changes):
    attributes = {"duration": timedelta(hours=1), "queue_name": "demand", "account": "xpcs::8idi"}
    attributes |= changes.pop("attributes", {})
    known = {"name": "xb-8idi-0123456789ab", "executable": "hpc-bridge", "arguments": ("pilot", "--lease", "a b")}
    return JobSpec(directory=directory, attributes=Attributes(**attributes), **known | changes)


def script_of(fake):
    [call] = fake.calls("qsub")
    return Path(call.split()[-1]).read_text().splitlines()


def test_a_job_is_submitted_with_its_queue_account_and_walltime(pbs, fake, tmp_path):
    fake.answer("qsub", "7592554.polaris-pbs-01.hsn.cm.polaris.alcf.anl.gov\n")
    assert pbs.submit(spec(tmp_path)) == "7592554.polaris-pbs-01"
    [call] = fake.calls("qsub")
    assert call.startswith(f"-q demand -A xpcs::8idi {tmp_path}/xb-8idi-0123456789ab.")
    script = script_of(fake)
    assert any(line.startswith("#PBS -N xb-8idi-0123456789ab.") for line in script)
    assert "#PBS -l walltime=01:00:00" in script
    assert "#PBS -l select=1" in script
    assert script[-1] == "exec hpc-bridge pilot --lease 'a b'"


def test_a_job_can_be_rerun_since_others_are_not_preempted_by_requeue(pbs, fake, tmp_path):
    fake.answer("qsub", "1.pbs\n")
    pbs.submit(spec(tmp_path))
    assert "#PBS -r y" in script_of(fake)


def test_options_of_a_site_stand_in_the_script_and_its_select_for_ours(pbs, fake, tmp_path):
    fake.answer("qsub", "1.pbs\n")
    options = ("-l select=1:ncpus=64:ngpus=4", "-l place=free", "-l filesystems=home:eagle")
    pbs.submit(spec(tmp_path, attributes={"custom_attributes": options}))
    script = script_of(fake)
    assert [line for line in script if "select" in line] == ["#PBS -l select=1:ncpus=64:ngpus=4"]
    assert {"#PBS -l place=free", "#PBS -l filesystems=home:eagle"} <= set(script)


def test_a_reservation_is_asked_for_by_its_queue(pbs, fake, tmp_path):
    fake.answer("qsub", "1.pbs\n")
    pbs.submit(spec(tmp_path, attributes={"reservation_id": "R123.polaris-pbs-01"}))
    assert fake.calls("qsub")[0].startswith("-q R123 ")


def test_the_environment_of_a_spec_is_in_the_script_and_that_of_the_manager_is_not(pbs, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("MANAGERS_SECRET", "hunter2")
    fake.answer("qsub", "1.pbs\n")
    pbs.submit(spec(tmp_path, environment={"GREETING": "it's $HOME"}, pre_launch="module load xpcs"))
    script = script_of(fake)
    assert script.index("export GREETING='it'\"'\"'s $HOME'") < script.index("module load xpcs")
    assert "hunter2" not in "\n".join(script)
    assert " -V" not in fake.calls("qsub")[0]


@pytest.mark.parametrize(
    "words",
    [
        "qsub: Unknown queue",
        "qsub: Job violates queue and/or server resource limits",
        "qsub: would exceed queue generic's per-user limit of jobs in 'Q' state",
        "qsub: Unauthorized Request",
    ],
)
def test_what_qsub_refuses_is_told_in_its_words_with_queue_and_account(pbs, fake, tmp_path, words):
    fake.answer("qsub", complaints=f"{words}\n", code=170)
    with pytest.raises(SchedulerRefused) as raised:
        pbs.submit(spec(tmp_path))
    assert words in str(raised.value)
    assert "(account xpcs::8idi, queue demand)" in str(raised.value)


@pytest.mark.parametrize(
    "words",
    [
        "Connection refused\nqsub: cannot connect to server pbs (errno=15010)",
        "qsub: Communication failure.",
        "sudo: a password is required",
        "ssh: connect to host login port 22: Connection timed out",
    ],
)
def test_whoever_does_not_answer_for_pbs_is_no_refusal(pbs, fake, tmp_path, words):
    for command in ("qsub", "qstat", "qdel", "qselect"):
        fake.answer(command, complaints=f"{words.replace('qsub', command)}\n", code=255)
    for ask in (
        lambda: pbs.submit(spec(tmp_path)),
        lambda: pbs.status(["1.pbs"]),
        lambda: pbs.cancel(["1.pbs"]),
        lambda: pbs.list("xb-"),
        lambda: pbs.used("xpcs", 0.0),
    ):
        with pytest.raises(SchedulerUnreachable):
            ask()


def test_a_command_that_hangs_is_left_in_time(fake, tmp_path):
    fake.program("qstat", "#!/bin/sh\nexec sleep 60\n")
    before = time.monotonic()
    with pytest.raises(SchedulerUnreachable, match="may have been heard"):
        Pbs(tmp_path, submit_through=fake.through, timeout=1.0).status(["1.pbs"])
    assert time.monotonic() - before < 20


def test_a_command_ends_itself_in_time_where_it_cannot_be_killed_from_here(fake, tmp_path):
    fake.program("sudo", f'#!/bin/sh\necho "$*" >> {fake.directory}/sudo.calls\nexec "$@"\n')
    fake.answer("qstat")
    Pbs(tmp_path, submit_through=(*fake.through, "sudo"), timeout=10.0).status(["1.pbs"])
    [call] = fake.calls("sudo")
    assert call.startswith("timeout --signal=KILL 9.")


def test_a_command_that_is_not_there_is_no_refusal(tmp_path):
    with pytest.raises(SchedulerUnreachable, match="no-such-program"):
        Pbs(tmp_path, submit_through=("no-such-program",)).submit(spec(tmp_path))


def test_an_answer_of_qsub_that_is_no_id_leaves_it_open_whether_the_job_runs(pbs, fake, tmp_path):
    fake.answer("qsub", "Welcome to the machine\n")
    with pytest.raises(SchedulerUnreachable, match="Welcome to the machine"):
        pbs.submit(spec(tmp_path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "8idi"}, "8idi"),
        ({"name": "a;b"}, "a;b"),
        ({"environment": {"A B": ""}}, "A B"),
        ({"attributes": {"queue_name": "demand -V"}}, "demand -V"),
        ({"attributes": {"account": "$(reboot)"}}, "reboot"),
        ({"attributes": {"custom_attributes": ("-l a=b\nreboot",)}}, "reboot"),
    ],
)
def test_nothing_gets_into_a_script_or_a_command_that_was_not_meant(pbs, fake, tmp_path, changes, named):
    fake.answer("qsub", complaints="qsub: illegal\n", code=1)
    with pytest.raises(SchedulerRefused, match=named):
        pbs.submit(spec(tmp_path, **changes))


def test_all_jobs_that_are_asked_for_are_told_with_those_over(pbs, fake):
    fake.answer("qstat", WAITS.format(id="1.pbs") + WAITS.format(id="2.pbs"))
    assert {job.id for job in pbs.status(["1.pbs", "2.pbs"]).values()} == {"1.pbs", "2.pbs"}
    assert fake.calls("qstat") == ["-x -f -F dsv 1.pbs 2.pbs"]


def test_a_job_has_the_id_that_qsub_gave_it(pbs, fake):
    fake.answer("qstat", WAITS.format(id="1.pbs"))
    [(name, job)] = pbs.status(["1.pbs.anl.gov"]).items()
    assert name == job.id == "1.pbs.anl.gov"


def test_a_job_that_pbs_does_not_know_is_not_there_and_no_error(pbs, fake):
    fake.answer("qstat", WAITS.format(id="1.pbs"), "qstat: Unknown Job Id 2.pbs\n", 153)
    assert set(pbs.status(["1.pbs", "2.pbs"])) == {"1.pbs"}


def test_a_server_without_history_is_asked_without(pbs, fake):
    no_history = "qstat: PBS is not configured to maintain job history\n"
    fake.answer("qstat", "", no_history, 1, "-x", then=WAITS.format(id="1.pbs"))
    assert pbs.status(["1.pbs"])["1.pbs"].state is JobState.QUEUED
    assert fake.calls("qstat") == ["-x -f -F dsv 1.pbs", "-f -F dsv 1.pbs"]


def test_our_own_jobs_are_listed_by_how_their_names_begin(pbs, fake):
    fake.answer("qselect", "1.pbs\n2.pbs\n")
    fake.answer("qstat", WAITS.format(id="1.pbs") + WAITS.format(id="2.pbs").replace("8idi", "9id"))
    assert [job.id for job in pbs.list("xb-8idi-")] == ["1.pbs"]
    live, recent = fake.calls("qselect")
    assert live == "-u beamline"
    assert recent.startswith("-u beamline -x -tm.gt.20")
    assert fake.calls("qstat") == ["-x -f -F dsv 1.pbs 2.pbs"]


def test_a_job_is_the_same_by_whichever_name_of_its_server_it_is_called(pbs, fake, tmp_path):
    fake.answer("qsub", "1.pbs\n")
    fake.answer("qselect", "1.pbs\n")
    fake.answer("qstat", WAITS.format(id="1.pbs.anl.gov"))
    assert [job.id for job in pbs.list("xb-8idi-")] == [pbs.submit(spec(tmp_path))]


def test_without_jobs_nothing_is_asked_of_qstat_which_would_tell_of_all(pbs, fake):
    fake.answer("qselect", "")
    fake.answer("qstat", WAITS.format(id="1.pbs"))
    assert pbs.list("xb-") == []
    assert pbs.status([]) == {}
    assert fake.calls("qstat") == []


def test_more_jobs_than_one_command_takes_are_all_asked_for(pbs, fake):
    fake.answer("qstat")
    ids = [f"{n}.pbs" for n in range(1200)]
    pbs.status(ids)
    assert [job for call in fake.calls("qstat") for job in call.split()[4:]] == ids


@pytest.mark.parametrize(
    "words", ["Unknown Job Id 1.pbs", "Job has finished 1.pbs", "Request invalid for state of job 1.pbs"]
)
def test_to_cancel_a_job_that_is_over_is_no_error(pbs, fake, words):
    fake.answer("qdel", complaints=f"qdel: {words}\n", code=35)
    pbs.cancel(["1.pbs", "2.pbs"])
    assert fake.calls("qdel") == ["1.pbs 2.pbs"]


def test_to_cancel_somebody_elses_job_is_refused(pbs, fake):
    fake.answer("qdel", complaints="qdel: Unauthorized Request  1.pbs\n", code=159)
    with pytest.raises(SchedulerRefused, match="Unauthorized Request"):
        pbs.cancel(["1.pbs"])


def test_used_are_jobs_of_the_account_that_is_asked_for(pbs, fake):
    cost = "|stime=Tue Nov 21 10:00:00 2026|resources_used.walltime=00:01:00|Resource_List.nodect=2\n"
    fake.answer("qselect", "1.pbs\n2.pbs\n")
    ours, others = WAITS.format(id="1.pbs"), WAITS.format(id="2.pbs").replace("::8idi", "")
    fake.answer("qstat", "".join(line.rstrip() + cost for line in (ours, others)))
    assert [(usage.id, usage.node_seconds) for usage in pbs.used("xpcs::8idi", 0.0)] == [("1.pbs", 120.0)]
    assert fake.calls("qselect") == ["-u beamline -x -A xpcs::8idi"]


def test_qstat_tells_times_that_do_not_depend_on_where_it_runs(pbs, fake, monkeypatch):
    monkeypatch.setenv("TZ", "JST-9")
    fake.program("qstat", '#!/bin/sh\necho "Job Id: 1.pbs|Job_Name=xb|job_state=Q|ctime=$(date -d @1700000000 +%c)"\n')
    assert pbs.status(["1.pbs"])["1.pbs"].submitted == 1.7e9


def test_a_directory_that_a_shell_would_misread_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a b"):
        Pbs(tmp_path / "a b")
