"""What qstat prints: real output (tests/data/pbs/README), and lines built after openpbs' own source."""

import calendar
import logging
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_bridge.job import JobState
from hpc_bridge.pbs_text import read_jobs, read_usages

DATA = Path(__file__).parent / "data" / "pbs"


def utc(text):
    return calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


def saved(name):
    return (DATA / f"{name}.dsv").read_text()


def built(**attributes):
    """A line as `qstat -F dsv` writes it."""
    known = {"Job_Name": "xb-8idi-0123456789ab.1.5", "job_state": "R", "queue": "demand"}
    pairs = {name.replace("__", "."): value for name, value in (known | attributes).items() if value is not None}
    escaped = (f"{name}={value}".replace("|", r"\|") for name, value in pairs.items())
    return "|".join((f"Job Id: {attributes.pop('id', '7.pbs')}", *escaped)) + "\n"


def only(text):
    [job] = read_jobs(text)
    return job


def test_a_running_job_of_nscc():
    job = only(saved("nscc_running"))
    assert (job.id, job.name, job.state, job.queue) == ("13.pbsworks", "STDIN", JobState.ACTIVE, "workq")
    assert (job.nodes, job.exit_code, job.restarts) == (("pbsworks",), None, 0)
    assert job.submitted == job.started == utc("2018-04-09 09:34:07")
    assert job.reason == "Job run at Mon Apr 09 at 09:34 on (pbsworks:ncpus=1)"


def test_a_finished_job_of_katana():
    job = only(saved("katana_finished"))
    assert (job.state, job.exit_code) == (JobState.COMPLETED, 0)
    assert (job.started, job.ended) == (utc("2023-08-10 16:10:55"), utc("2023-08-10 16:11:09"))
    assert job.ends == job.started + 3600


def test_jobs_that_wait_run_and_are_held_in_one_listing():
    waits, runs, held = read_jobs(saved("aiida_waiting_running_held"))
    assert (waits.state, runs.state, held.state) == (JobState.QUEUED, JobState.ACTIVE, JobState.HELD)
    assert waits.reason == "Not Running: Node is in an ineligible state: offline"
    assert (waits.started, waits.ends, waits.nodes) == (None, None, ())
    assert runs.nodes == ("b141", "b142", "b143", "b144")
    assert runs.account == "lsu"
    assert runs.ends - runs.started == 72 * 3600


def test_usage_is_nodes_times_walltime_of_jobs_that_began_since():
    [usage] = read_usages(saved("aiida_waiting_running_held"), 0.0)
    assert (usage.id, usage.account) == ("69301.mycluster", "lsu")
    assert usage.node_seconds == 4 * (64 * 3600 + 26 * 60 + 16)
    assert read_usages(saved("aiida_waiting_running_held"), utc("2013-04-20 01:37:00")) == []


@pytest.mark.parametrize(
    ("letter", "state"),
    [
        ("Q", JobState.QUEUED),
        ("W", JobState.QUEUED),
        ("T", JobState.QUEUED),
        ("M", JobState.QUEUED),
        ("H", JobState.HELD),
        ("S", JobState.HELD),
        ("U", JobState.HELD),
        ("R", JobState.ACTIVE),
        ("B", JobState.ACTIVE),
        ("E", JobState.ACTIVE),
    ],
)
def test_no_state_but_finished_is_over_whatever_else_is_told(letter, state):
    job = only(built(job_state=letter, Exit_status="0", substate="92"))
    assert job.state is state
    assert not job.state.is_final
    assert job.exit_code is None


@pytest.mark.parametrize(
    ("substate", "status", "state", "exit_code"),
    [
        ("92", "0", JobState.COMPLETED, 0),
        ("93", "85", JobState.FAILED, 85),
        ("93", "271", JobState.FAILED, 143),  # 256 and SIGTERM
        ("91", "271", JobState.CANCELED, 143),  # deleted while it ran
        ("91", "0", JobState.CANCELED, 0),
        ("91", None, JobState.CANCELED, None),  # deleted before it ran
        ("93", "-29", JobState.FAILED, None),  # walltime
        ("93", None, JobState.FAILED, None),
        (None, "0", JobState.COMPLETED, 0),
    ],
)
def test_how_a_finished_job_ended(substate, status, state, exit_code):
    job = only(built(job_state="F", substate=substate, Exit_status=status, history_timestamp="1700000000"))
    assert (job.state, job.exit_code, job.ended) == (state, exit_code, 1.7e9)


def test_why_pbs_ended_a_job_is_its_reason():
    job = only(built(job_state="F", substate="93", Exit_status="-29", comment="job killed: walltime exceeded"))
    assert job.reason == "Exit_status -29: job killed: walltime exceeded"


def test_a_job_that_was_requeued_waits_again_and_says_so():
    stime = "Tue Nov 21 10:00:00 2026"
    first = only(built(job_state="R", run_count="1", stime=stime, Resource_List__walltime="01:00:00"))
    again = only(built(job_state="Q", run_count="1", Resource_List__walltime="01:00:00"))
    second = only(built(job_state="R", run_count="2", stime=stime))
    assert (first.state, first.restarts) == (JobState.ACTIVE, 0)
    assert (again.state, again.restarts, again.started) == (JobState.QUEUED, 1, None)
    assert (second.state, second.restarts) == (JobState.ACTIVE, 1)


def test_a_bar_in_a_value_does_not_end_it():
    job = only(built(comment="a|b=c|job_state=F", queue="demand"))
    assert (job.reason, job.state, job.queue) == ("a|b=c|job_state=F", JobState.ACTIVE, "demand")


@pytest.mark.parametrize(
    "bad",
    [
        "Connection refused\n",
        "Job Id: 8.pbs\n",
        "Job Id: 8.pbs|Job_Name=x\n",
        built(id="8.pbs", job_state="?"),
        built(id="8.pbs", ctime="yesterday"),
        built(id="8.pbs", job_state="F", Exit_status="many"),
        built(id="8.pbs", job_state="F", history_timestamp="9" * 400),
        built(id="8.pbs", run_count="9" * 5000),
    ],
)
def test_a_line_that_is_no_job_is_logged_and_the_others_are_read(bad, caplog):
    with caplog.at_level(logging.WARNING):
        jobs = read_jobs(built(id="7.pbs") + bad + built(id="9.pbs"))
    assert [job.id for job in jobs] == ["7.pbs", "9.pbs"]
    assert bad[:9].strip() in caplog.text


@given(st.text())
def test_no_text_is_an_error(text):
    read_jobs(text)
    read_usages(text, 0.0)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "job_state",
                "ctime",
                "stime",
                "Exit_status",
                "run_count",
                "exec_host",
                "comment",
                "Resource_List.walltime",
            ]
        ),
        st.text(st.characters(exclude_characters="\n")) | st.sampled_from(["R", "F", "-1", "1:2:3", "x\\"]),
    )
)
def test_no_value_is_an_error(attributes):
    read_jobs(built(**attributes))
    read_usages(built(**attributes, resources_used__walltime=attributes.get("Exit_status", "1")), 0.0)
