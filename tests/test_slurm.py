import time
import uuid
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from hpc_bridge.errors import ConfigError, SchedulerRefused, SchedulerUnreachable
from hpc_bridge.job import Attributes, JobSpec, JobState
from hpc_bridge.slurm import Slurm
from tests.slurm import ACCOUNT, SMALL_ACCOUNT, SMALL_CPU_MINUTES

TIMEOUT = 5


@pytest.fixture
def directory(slurm):
    directory = slurm.work / uuid.uuid4().hex
    directory.mkdir()
    directory.chmod(0o777)
    yield directory
    slurm.clear()


@pytest.fixture
def scheduler(slurm, directory):
    return Slurm(directory, submit_through=slurm.through, timeout=TIMEOUT)


def spec(directory, script="exec sleep 300", *, queue="batch", account=ACCOUNT, minutes=2.0, options=(), **more):
    return JobSpec(
        name=f"xb-8idi-{uuid.uuid4().hex[:12]}",
        executable="/bin/bash",
        arguments=("-c", script),
        directory=directory,
        attributes=Attributes(
            duration=timedelta(minutes=minutes), queue_name=queue, account=account, custom_attributes=options
        ),
        **more,
    )


def until(is_so, what="it is so", deadline=60):
    end = time.monotonic() + deadline
    while not (found := is_so()):
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        time.sleep(0.05)
    return found


def until_state(scheduler, job, *states):
    def known():
        told = scheduler.status([job]).get(job)
        return told if told and told.state in states else None

    return until(known, f"{job} is {states}")


def active(scheduler, job):
    return until_state(scheduler, job, JobState.ACTIVE)


def over(scheduler, job):
    return until_state(scheduler, job, JobState.COMPLETED, JobState.FAILED, JobState.CANCELED)


def test_a_job_runs_ends_and_its_exit_code_is_seen(scheduler, directory):
    asked = spec(directory, f"until [ -e {directory}/end ]; do sleep 0.05; done; echo said; exit 7")
    before = time.time()
    job = scheduler.submit(asked)
    runs = active(scheduler, job)
    assert runs.name.startswith(asked.name)
    assert (runs.queue, runs.account, runs.restarts, runs.exit_code) == ("batch", ACCOUNT, 0, None)
    assert len(runs.nodes) == 1
    assert int(before) <= runs.submitted <= runs.started <= time.time()
    assert runs.ends == runs.started + 120
    (directory / "end").touch()
    ended = over(scheduler, job)
    assert (ended.state, ended.reason, ended.exit_code) == (JobState.FAILED, "FAILED", 7)
    assert runs.started <= ended.ended <= time.time()
    assert next(directory.glob("*.stdout")).read_text() == "said\n"


def test_a_job_that_must_wait_is_queued_for_a_reason(scheduler, slurm, directory):
    scheduler.submit(spec(directory, options=("--exclusive", f"--nodelist={slurm.nodes[0]}")))
    waits = scheduler.submit(spec(directory, options=("--exclusive", f"--nodelist={slurm.nodes[0]}")))
    job = until(lambda: (told := scheduler.status([waits])[waits]).reason == "Resources" and told)
    assert (job.state, job.started, job.nodes) == (JobState.QUEUED, None, ())


def test_a_walltime_is_asked_for_in_whole_minutes_and_never_less(scheduler, directory):
    runs = active(scheduler, scheduler.submit(spec(directory, minutes=1.5)))
    assert runs.ends - runs.started == 120


def test_after_a_restart_jobs_are_found_by_how_their_name_begins(scheduler, slurm, directory):
    waiting, other = spec(directory, options=("--hold",)), spec(directory)
    done = spec(directory, "exit 0")
    ids = {asked.name: scheduler.submit(asked) for asked in (waiting, other, done)}
    over(scheduler, ids[done.name])
    again = Slurm(directory, submit_through=slurm.through)
    assert [job.id for job in again.list(waiting.name)] == [ids[waiting.name]]
    assert {job.id: job.state.is_final for job in again.list("xb-8idi-") if job.id in ids.values()} == {
        ids[waiting.name]: False,
        ids[other.name]: False,
        ids[done.name]: True,
    }
    assert again.list("xb-8id-") == []


def test_a_job_that_is_not_known_is_not_told_of(scheduler):
    assert scheduler.status(["999999"]) == {}
    assert scheduler.status([]) == {}


def test_what_is_canceled_gets_sigterm_and_is_over_when_it_has_gone(scheduler, directory):
    asked = spec(directory, f"trap 'echo TERM > {directory}/got; exit 3' TERM; touch {directory}/up; sleep 300 & wait")
    job = scheduler.submit(asked)
    until((directory / "up").exists)
    scheduler.cancel([job])
    assert over(scheduler, job).state is JobState.CANCELED
    assert (directory / "got").read_text() == "TERM\n"
    scheduler.cancel([job, "999999"])  # over, unknown
    scheduler.cancel([])


def test_the_payload_itself_gets_the_signal_it_asked_for_when_it_is_preempted(scheduler, slurm, directory):
    node = f"--nodelist={slurm.nodes[0]}"
    drains = (
        f"trap 'sleep 0.5; touch {directory}/drained; kill $!; exit 3' TERM; touch {directory}/up; sleep 300 & wait"
    )
    options = ("--exclusive", "--signal=B:TERM@30", node)
    job = scheduler.submit(spec(directory, drains, queue="preemptable", options=options))
    until((directory / "up").exists)  # what is sent before is lost
    demand = scheduler.submit(spec(directory, queue="demand", options=("--exclusive", node)))
    while not (directory / "drained").exists():
        told = scheduler.status([job])[job]
        assert not told.state.is_final or (directory / "drained").exists()
    ended = over(scheduler, job)
    assert ended.restarts == 0
    active(scheduler, demand)
    assert over(scheduler, job) == ended  # it does not come back


def test_slurm_is_told_not_to_requeue_a_job(scheduler, slurm, directory):
    job = scheduler.submit(spec(directory))
    assert " Requeue=0 " in slurm.run("scontrol", "show", "job", "--oneliner", job)


def test_a_job_that_the_site_requeues_all_the_same_waits_again_and_costs_what_it_cost(scheduler, directory):
    since = time.time() - 1
    # RequeueExit of this Slurm; --no-requeue is not heard then.
    job = scheduler.submit(spec(directory, "sleep 2; exit 85"))
    again = until(lambda: (told := scheduler.status([job])[job]).restarts and told)
    assert again.state is JobState.QUEUED
    scheduler.cancel([job])
    until(lambda: [usage.id for usage in scheduler.used(ACCOUNT, since) if usage.node_seconds >= 1] == [job])


def test_the_job_of_a_lost_node_runs_on_as_far_as_slurm_knows(scheduler, slurm, directory):
    lost = slurm.nodes[-1]
    job = scheduler.submit(spec(directory, f"touch {directory}/up; sleep 300", options=(f"--nodelist={lost}",)))
    until((directory / "up").exists)
    slurm.lose_node(lost)
    assert scheduler.status([job])[job].state is JobState.ACTIVE
    slurm.start_node(lost)


def test_a_controller_that_is_down_is_unreachable_and_nothing_is_lost_or_doubled(scheduler, slurm, directory):
    asked, never = spec(directory), spec(directory)
    job = scheduler.submit(asked)
    runs = active(scheduler, job)
    slurm.stop_controller()
    hasty = Slurm(directory, submit_through=slurm.through, timeout=1.2)
    calls = (
        lambda: hasty.submit(never),
        lambda: hasty.status([job]),
        lambda: hasty.list("xb-"),
        lambda: hasty.cancel([job]),
    )
    for call in calls:
        begin = time.monotonic()
        with pytest.raises(SchedulerUnreachable):
            call()
        assert time.monotonic() - begin < 20
    slurm.start_controller()
    assert scheduler.status([job]) == {job: runs}
    assert [found.id for found in scheduler.list(asked.name)] == [job]
    assert scheduler.list(never.name) == []


def test_what_squeue_has_forgotten_is_told_by_the_accounting_once_it_is_over(scheduler, slurm, directory):
    # To somebody else, squeue --me tells nothing of our jobs.
    as_other = 'case "$*" in *squeue*) exec runuser -u daemon -- "$@";; *) exec "$@";; esac'
    forgetful = Slurm(directory, submit_through=("sh", "-c", as_other, "sh", *slurm.through))
    asked, long = spec(directory, "exit 7"), spec(directory)
    done, runs = scheduler.submit(asked), scheduler.submit(long)
    active(scheduler, runs)
    assert over(forgetful, done).state is JobState.FAILED
    until(lambda: forgetful.status([done])[done].exit_code == 7)  # may be known later than that it is over
    until(lambda: [job.id for job in forgetful.list(asked.name)] == [done])
    assert forgetful.status([runs]) == {}
    assert forgetful.list(long.name) == []


def test_a_job_belongs_to_the_user_through_whom_it_was_submitted(slurm, directory):
    scheduler = Slurm(directory, submit_through=("runuser", "-u", "daemon", "--", *slurm.through))
    job = scheduler.submit(spec(directory, "id -un; exit 0"))
    over(scheduler, job)
    assert next(directory.glob("*.stdout")).read_text() == "daemon\n"


def test_a_shell_at_the_far_end_of_ssh_reads_the_same_words(slurm, directory):
    scheduler = Slurm(directory, submit_through=(*slurm.through, "sh", "-c", 'eval "$*"', "as-ssh-does"))
    asked = spec(directory)
    job = scheduler.submit(asked)
    active(scheduler, job)
    assert [found.id for found in scheduler.list(asked.name)] == [job]
    scheduler.cancel([job])
    over(scheduler, job)
    scheduler.used(ACCOUNT, since=time.time() - 60)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"account": "nobodys"}, "nobodys.*Invalid account"),
        ({"account": SMALL_ACCOUNT, "minutes": SMALL_CPU_MINUTES + 1}, f"{SMALL_ACCOUNT}.*AssocGrpCPUMinutesLimit"),
        ({"queue": "nowhere"}, "nowhere.*invalid partition"),
        ({"options": ("--constraint=gpu",)}, "Invalid feature"),
        ({"options": ("--fast",)}, "unrecognized option '--fast'"),
        ({"options": ("--hold\n#SBATCH --uid=0",)}, "cannot be an option"),
        ({"options": ("rm -rf",)}, "cannot be an option"),
        ({"account": "a\n#SBATCH --uid=0"}, "cannot be"),
        ({"queue": "a b"}, "cannot be"),
        ({"environment": {"A=1; B": "2"}}, "cannot be a variable"),
    ],
)
def test_what_is_refused_says_why_in_the_words_of_slurm(scheduler, directory, changes, words):
    asked = spec(directory, **changes)
    with pytest.raises(SchedulerRefused, match=words) as refused:
        scheduler.submit(asked)
    assert asked.name in str(refused.value)
    assert scheduler.list(asked.name) == []


def test_what_would_be_read_by_a_shell_is_refused(scheduler, slurm):
    with pytest.raises(SchedulerRefused, match="rm"):
        scheduler.cancel(["1; rm"])
    with pytest.raises(SchedulerRefused, match="--me"):
        scheduler.cancel(["--me"])
    with pytest.raises(SchedulerRefused, match="aps;"):
        scheduler.used("aps; rm", since=0)
    with pytest.raises(ConfigError, match="a b"):
        Slurm(Path("a b"), submit_through=slurm.through)


def test_a_job_gets_its_own_environment_and_no_secret_of_ours(scheduler, directory, monkeypatch):
    monkeypatch.setenv("BEAMLINE_TOKEN", "secret-of-the-manager")
    monkeypatch.setenv("SBATCH_PARTITION", "demand")  # sbatch would heed it rather than the script
    value = 'it\'s "quoted", $HOME\n#SBATCH --hold\nlast'
    before = "export BEFORE=$SAID; shopt -s extglob"
    asked = spec(directory, "env -0", environment={"SAID": value}, pre_launch=before)
    job = scheduler.submit(asked)
    assert over(scheduler, job).queue == "batch"
    (output,) = directory.glob("*.stdout")
    environment = dict(each.split("=", 1) for each in output.read_text().split("\0") if each)
    assert environment["SAID"] == environment["BEFORE"] == value
    written = "".join(file.read_text() for file in directory.iterdir())
    assert "secret-of-the-manager" not in written
    assert "BEAMLINE_TOKEN" not in written


def test_a_command_that_hangs_is_ended_in_time_and_leaves_nothing(directory):
    hung = Slurm(directory, submit_through=("sh", "-c", "sleep 61.7 & wait"), timeout=1.5)
    begin = time.monotonic()
    with pytest.raises(SchedulerUnreachable, match="squeue"):
        hung.status(["1"])
    assert time.monotonic() - begin < 20
    until(lambda: not [each for each in psutil.process_iter(["cmdline"]) if "61.7" in (each.info["cmdline"] or ())])


def test_a_way_to_slurm_that_does_not_lead_there_is_no_refusal(directory):
    for through in (("sh", "-c", "echo 'ssh: connect: No route to host' >&2; exit 255"), ("/no/such/command",)):
        with pytest.raises(SchedulerUnreachable, match=r"No route|No such file"):
            Slurm(directory, submit_through=through).submit(spec(directory))


def test_nor_is_that_slurm_itself_gives_up(directory):
    # After 9 s, really.
    for command, ask in (("sbatch", lambda at: at.submit(spec(directory))), ("scancel", lambda at: at.cancel(["3"]))):
        words = Path(__file__).parent / "data" / "slurm" / f"down.{command}.stderr.txt"
        with pytest.raises(SchedulerUnreachable, match="Unable to contact slurm controller"):
            ask(Slurm(directory, submit_through=("sh", "-c", f"cat {words} >&2; exit 1")))


def test_a_job_costs_its_time_on_all_of_its_nodes(scheduler, directory):
    since = time.time() - 1
    asked = spec(directory, "sleep 1.2; exit 0", options=("--nodes=2", "--exclusive"))
    job = scheduler.submit(asked)
    ended = over(scheduler, job)

    def cost():
        usages = {usage.id: usage for usage in scheduler.used(ACCOUNT, since)}
        return usages.get(job) if job in usages and usages[job].node_seconds else None

    usage = until(cost)
    assert usage.name.startswith(asked.name)
    assert usage.account == ACCOUNT
    assert usage.node_seconds == pytest.approx(2 * (ended.ended - ended.started))
    assert scheduler.used(SMALL_ACCOUNT, since) == []
    assert scheduler.used(ACCOUNT, time.time() + 60) == []


def test_where_the_accounting_is_down_squeue_is_enough(scheduler, slurm, directory, caplog):
    asked = spec(directory)
    job = scheduler.submit(asked)
    active(scheduler, job)
    slurm.stop_accounting()
    try:
        assert set(scheduler.status([job, "999999"])) == {job}
        assert [found.id for found in scheduler.list(asked.name)] == [job]
        with pytest.raises(SchedulerUnreachable, match="Connection refused"):
            scheduler.used(ACCOUNT, since=0)
    finally:
        slurm.start_accounting()
    assert "Connection refused" in caplog.text
