import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_bridge.job import Job, JobState
from hpc_bridge.scheduler import Usage
from hpc_bridge.slurm_text import SACCT, SEPARATOR, SQUEUE, USAGE, is_unreachable, read_sacct, read_squeue, read_usages

DATA = Path(__file__).parent / "data" / "slurm"


def saved(name):
    return (DATA / f"{name}.txt").read_text()


def listed(name):
    """By name: in each recording, names are of one job only."""
    read = read_squeue if name.endswith("squeue") else read_sacct
    return {job.name: job for job in read(saved(name))}


def state_and_reason(job):
    return job.state, job.reason


def test_a_running_job_has_its_node_its_start_and_when_its_walltime_is_over():
    assert listed("preempted.squeue")["demand"] == Job(
        id="10",
        name="demand",
        state=JobState.ACTIVE,
        queue="demand",
        account="aps-8idi",
        nodes=("node1", "node2"),
        submitted=1795345180,
        started=1795345193,
        ends=1795345253,
    )


def test_a_job_that_waits_has_neither_nodes_nor_a_start_though_slurm_guesses_one():
    assert listed("waiting.squeue")["resources"] == Job(
        id="19",
        name="resources",
        state=JobState.QUEUED,
        reason="Resources",
        queue="batch",
        account="aps-8idi",
        submitted=1795345206,
    )


@pytest.mark.parametrize(
    ("name", "state", "reason"),
    [
        ("resources", JobState.QUEUED, "Resources"),
        ("x" * 180, JobState.QUEUED, "Priority"),
        ("later", JobState.QUEUED, "BeginTime"),
        ("depends", JobState.QUEUED, "Dependency"),
        ("too-many", JobState.QUEUED, "PartitionConfig"),
        ("held", JobState.HELD, "JobHeldUser"),
        ("suspended", JobState.HELD, "SUSPENDED"),
        ("many-nodes", JobState.ACTIVE, ""),
    ],
)  # fmt: skip
def test_why_a_job_waits_is_told_in_the_words_of_slurm(name, state, reason):
    assert state_and_reason(listed("waiting.squeue")[name]) == (state, reason)


def test_nodes_are_named_one_by_one():
    assert listed("waiting.squeue")["many-nodes"].nodes == ("node1", "node3", "node4")
    line = saved("waiting.squeue").splitlines()[0].split(SEPARATOR)
    line[SQUEUE.index("NodeList")] = "x[08-10]a,b,c[1,3]d[1-2]"
    expected = ("x08a", "x09a", "x10a", "b", "c1d1", "c1d2", "c3d1", "c3d2")
    assert read_squeue(SEPARATOR.join(line))[0].nodes == expected


def test_a_job_that_is_completing_still_holds_its_node():
    job = listed("completing.squeue")["completing"]
    assert state_and_reason(job) == (JobState.ACTIVE, "COMPLETING")
    assert job.nodes == ("node1",)


@pytest.mark.parametrize("by", ["squeue", "sacct"])
@pytest.mark.parametrize(
    ("name", "state", "reason", "exit_code"),
    [
        ("completed", JobState.COMPLETED, "COMPLETED", 0),
        ("failed", JobState.FAILED, "FAILED", 7),
        ("killed", JobState.FAILED, "FAILED", 128 + 9),
        ("canceled", JobState.CANCELED, "CANCELLED", 128 + 15),
        ("no-oom", JobState.CANCELED, "CANCELLED", None),
        ("no-requeue", JobState.CANCELED, "PREEMPTED", 128 + 15),
        ("xb-8idi-0123456789ab.1795344169.123", JobState.COMPLETED, "COMPLETED", 0),
    ],
)
def test_how_a_job_ended_is_told_by_both_commands(by, name, state, reason, exit_code):
    job = listed(f"over.{by}")[name]
    assert (*state_and_reason(job), job.exit_code) == (state, reason, exit_code)
    assert job.ended is not None
    assert job.ends is None


@pytest.mark.parametrize("by", ["squeue", "sacct"])
@pytest.mark.parametrize(("id_", "reason"), [("31", "NODE_FAIL"), ("32", "TIMEOUT")])
def test_a_lost_node_and_a_walltime_that_is_over_are_failures(by, id_, reason):
    read = read_squeue if by == "squeue" else read_sacct
    (job,) = (job for job in read(saved(f"over.{by}")) if job.id == id_)
    assert state_and_reason(job) == (JobState.FAILED, reason)
    assert job.ended > job.started


def test_an_exit_code_of_zero_is_not_believed_of_a_job_that_was_ended():
    # The accounting learns the signal later.
    assert "8@@PREEMPTED@@0:0@@" in saved("preempted.sacct")
    assert listed("preempted.sacct")["no-requeue"].exit_code is None


def test_a_job_that_never_ran_has_an_end_but_no_start():
    for name in ("over.squeue", "over.sacct"):
        job = listed(name)["no-oom"]
        assert (job.started, job.ended) == (None, 1795345180)


def test_a_requeued_job_waits_and_has_begun_anew():
    for name, job in (("preempted.squeue", "requeued"), ("code-85.squeue", "code-85")):
        again = listed(name)[job]
        assert (again.state, again.restarts, again.exit_code) == (JobState.QUEUED, 1, None)
    assert listed("preempted.sacct")["requeued"].state is JobState.QUEUED
    assert listed("completing.sacct")["code-85"].state is JobState.QUEUED  # REQUEUED


def test_a_line_that_cannot_be_read_is_left_out_and_logged_and_hides_no_other(caplog):
    names = [job.name for job in read_squeue(saved("waiting.squeue"))]
    assert "lines" not in names
    assert "two" not in names
    assert {"odd", "x" * 180, "resources"} < set(names)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "two" in caplog.text


def test_a_line_that_was_cut_is_no_job():
    whole = saved("over.squeue").splitlines()[0]
    assert len(read_squeue(whole)) == 1
    for end in range(len(whole)):
        assert read_squeue(whole[:end]) == []


def with_field(field, value):
    line = saved("over.squeue").splitlines()[-1].split(SEPARATOR)  # the preempted one
    line[SQUEUE.index(field)] = value
    return read_squeue(SEPARATOR.join(line))


@pytest.mark.parametrize(("field", "value"), [("JobID", "--me"), ("RestartCnt", "many")])
def test_a_line_that_is_of_no_job_is_named(field, value, caplog):
    assert with_field(field, value) == []
    assert value in caplog.text


@pytest.mark.parametrize("field", ["SubmitTime", "StartTime", "EndTime", "exit_code"])
@pytest.mark.parametrize("value", ["2026-11-22T10:40:02", "9" * 5000, "-1", "١"])
def test_a_job_with_a_strange_number_is_told_of_without_it(field, value):
    (job,) = with_field(field, value)
    assert (job.name, job.reason) == ("no-requeue", "PREEMPTED")
    assert [job.submitted, job.started, job.ended, job.exit_code].count(None) == 1


@pytest.mark.parametrize("nodes", ["n[1-9999999999]", "n[1-99999]m[1-99999]", "n[1-x]", "n[3-1]"])
def test_a_strange_list_of_nodes_stays_as_it_is(nodes):
    (job,) = with_field("NodeList", nodes)
    assert job.nodes == (nodes,)


def test_a_job_in_a_state_that_is_new_to_us_is_not_over(caplog):
    (job,) = with_field("State", "DREAMING deeply")
    assert state_and_reason(job) == (JobState.ACTIVE, "DREAMING deeply")
    assert (job.exit_code, job.ended) == (None, None)
    assert "DREAMING" in caplog.text


odd = """1 0 -1 768 0:15 85:0 9:9:9 1795345180 N/A 999999999999 node[1-3] node[3-1] [ ] a[,] n[1-9999999] (null)
RUNNING FAILED CANCELLED٣ \x00 xb-8idi-1"""
fields = st.one_of(st.sampled_from(["", "CANCELLED by 0", "9" * 5000, *odd.split()]), st.text(max_size=5))
lines = st.one_of(
    st.text(max_size=80),
    *(st.lists(fields, min_size=n, max_size=n + 1) for n in (len(USAGE), len(SACCT), len(SQUEUE))),
)


@given(st.lists(lines, max_size=5), st.integers(0, 5))
def test_garbage_raises_nothing_and_hides_no_job(garbage, place):
    texts = [each if isinstance(each, str) else SEPARATOR.join((*each, "")) for each in garbage]
    for read, name in ((read_squeue, "preempted.squeue"), (read_sacct, "preempted.sacct")):
        text = "\n".join((*texts[:place], saved(name).strip(), *texts[place:]))
        assert set(read(saved(name))) <= set(read(text))
    read_usages("\n".join(texts), since=0)


def test_a_job_costs_its_nodes_in_all_of_its_starts():
    usages = {usage.name: usage for usage in read_usages(saved("usage.sacct"), since=0)}
    assert usages["many-nodes"] == Usage(id="14", name="many-nodes", account="aps-8idi", node_seconds=3 * 41)
    assert usages["no-requeue"].node_seconds == 13
    starts = read_usages("1@@100@@7@@1@@a@@x@@\n1@@200@@5@@2@@a@@x@@\n1@@Unknown@@0@@1@@a@@x@@", since=0)
    assert starts == [Usage(id="1", name="x", account="a", node_seconds=17)]


def test_what_began_before_or_never_costs_nothing():
    names = {usage.name for usage in read_usages(saved("usage.sacct"), since=1795345193)}
    assert "demand" in names
    assert not {"no-requeue", "resources"} & names


@pytest.mark.parametrize("name", [file.name.removesuffix(".txt") for file in DATA.glob("*.stderr.txt")])
def test_a_scheduler_that_is_down_is_told_from_one_that_says_no(name):
    assert is_unreachable(saved(name)) == name.startswith("down.")
