"""The record of leases on disk, with real processes that have it and are killed."""

import signal
import sqlite3
import subprocess
import sys

import pytest

from hpc_bridge.errors import RecordError
from hpc_bridge.leases import LONGEST_RUN, Leases, Pause, Stage

HOUR = 3600.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "leases"


@pytest.fixture
def leases(path):
    with Leases.open(path) as leases:
        yield leases


def begin(leases, now=0.0, **changes):
    asked = {"beamline": "8ID", "site": "polaris", "queue": "demand", "account": "xpcs", "walltime": HOUR} | changes
    return leases.begin(now=now, **asked)


def ran(leases, started, ended=None, **changes):
    lease = begin(leases, now=started, **changes).lease
    leases.submitted(lease, f"job {lease}", started)
    leases.started(lease, started, "n1")
    return leases.get(lease) if ended is None else leases.ended(lease, ended, "done")


def python(program, *arguments):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_a_lease_is_on_record_before_there_is_a_job(leases, path):
    lease = begin(leases, now=5.0)
    with Leases.look(path) as others:
        assert others.open_leases() == [lease]
    assert (lease.stage, lease.job_id, lease.created) == (Stage.SUBMITTING, None, 5.0)
    assert lease.name == f"xb-8ID-{lease.lease}"
    assert len(lease.lease) == 12


def test_a_lease_goes_its_way_and_is_open_until_it_ended(leases):
    lease = begin(leases).lease
    assert leases.submitted(lease, "17", 1.0).stage is Stage.SUBMITTED
    leases.started(lease, 2.0, "n1")
    leases.serving(lease, 3.0)
    assert leases.leaving(lease, Stage.DRAINING, "enough", 4.0).stage is Stage.DRAINING
    [still] = leases.open_leases("8ID")
    assert leases.open_leases("2BM") == []
    over = leases.ended(lease, 5.0, "COMPLETED")
    assert leases.open_leases() == []
    assert over.reason == "enough; COMPLETED"
    times = (over.submitted, over.started, over.serving_since, over.leaving_since, over.ended)
    assert times == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert still.ended is None


def test_what_was_said_first_holds(leases):
    lease = begin(leases).lease
    for at, node in ((2.0, "n1"), (9.0, "n2")):
        leases.started(lease, at, node)
        leases.serving(lease, at)
        last = leases.leaving(lease, Stage.DRAINING, "", at)
    assert (last.started, last.serving_since, last.leaving_since, last.node) == (2.0, 2.0, 2.0, "n1")


def test_a_job_that_is_told_of_late_does_not_bring_back_a_lease_that_leaves(leases):
    lease = begin(leases).lease
    leases.leaving(lease, Stage.CANCELLING, "enough", 1.0)
    late = leases.submitted(lease, "17", 2.0)
    assert (late.stage, late.job_id) == (Stage.CANCELLING, "17")


def test_nothing_changes_a_lease_that_is_over(leases):
    lease = begin(leases).lease
    over = leases.ended(lease, 1.0, "refused")
    leases.submitted(lease, "17", 2.0)
    leases.leaving(lease, Stage.DRAINING, "enough", 2.0)
    assert leases.ended(lease, 3.0, "again") == over


def test_a_lease_that_is_not_there_is_named(leases):
    with pytest.raises(RecordError, match="lease ffff"):
        leases.submitted("ffff", "17", 0.0)
    assert leases.get("ffff") is None


def test_an_account_pays_from_start_to_end_and_for_the_time_that_is_asked_about(leases):
    ran(leases, 0.0, 100.0)
    ran(leases, 50.0, 150.0, nodes=3)
    ran(leases, 0.0, 900.0, account="other")
    ran(leases, 0.0, 900.0, site="aurora")
    leases.ended(begin(leases).lease, 900.0, "never started")
    assert leases.cost("8ID", "polaris", "xpcs", since=0, now=1000) == 100 + 300
    assert leases.cost("8ID", "polaris", "xpcs", since=80, now=1000) == 20 + 3 * 70
    assert leases.cost("8ID", "polaris", "xpcs", since=0, now=60) == 60 + 3 * 10


def test_a_job_whose_end_nobody_saw_pays_until_its_walltime(leases):
    ran(leases, 0.0)
    assert leases.cost("8ID", "polaris", "xpcs", since=0, now=10) == 10
    assert leases.cost("8ID", "polaris", "xpcs", since=0, now=9 * HOUR) == HOUR


def test_a_run_costs_what_ran_while_it_was_on(leases):
    leases.run_began("8ID", "a", 100.0)
    leases.run_ended("8ID", "a", 200.0)
    leases.run_began("8ID", "b", 150.0)
    leases.run_began("8ID", "c", 5000.0)
    leases.run_began("2BM", "other", 0.0)
    ran(leases, 0.0, 160.0)
    ran(leases, 190.0, 300.0, nodes=2)
    assert leases.cost_by_run("8ID", since=0, now=1000) == {"a": 60 + 20, "b": 10 + 220, "c": 0}
    assert list(leases.cost_by_run("8ID", since=250, now=1000)) == ["b", "c"]


def test_a_run_without_a_stop_does_not_cost_for_ever(leases):
    leases.run_began("8ID", "a", 0.0)
    ran(leases, 0.0, 10 * LONGEST_RUN)
    assert leases.cost_by_run("8ID", since=0, now=10 * LONGEST_RUN) == {"a": LONGEST_RUN}


def test_runs_are_those_that_are_on_or_ended_since(leases):
    for run, began in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("c", 9.0)):
        leases.run_began("8ID", run, began)
    leases.run_ended("8ID", "a", 5.0)
    leases.run_ended("8ID", "b", 7.0)
    leases.run_ended("8ID", "b", 8.0)
    leases.run_ended("8ID", "nobody's", 7.0)
    assert [(run.run, run.began, run.ended) for run in leases.runs("8ID", 6.0)] == [("b", 2.0, 7.0), ("c", 3.0, None)]


def test_a_pause_is_of_one_beamline_and_passes(leases):
    leases.pause("8ID", Pause(site="polaris", queue="demand", until=5.0, why="full"))
    leases.pause("8ID", Pause(site="polaris", queue="demand", until=9.0, why="refused"))
    assert [pause.why for pause in leases.pauses("8ID", 6.0)] == ["refused"]
    assert leases.pauses("2BM", 6.0) == leases.pauses("8ID", 9.0) == []


def test_leases_are_counted_by_when_they_began_and_by_rung(leases):
    for now in (1.0, 2.0, 3.0):
        begin(leases, now=now, beamline="2BM")
    leases.ended(begin(leases, now=4.0, beamline="2BM").lease, 5.0, "")
    assert leases.begun("polaris", 1.0) == 3
    assert leases.taken(besides="8ID") == {("polaris", "demand"): 3}
    assert leases.taken(besides="2BM") == {}


def test_all_of_a_beamline_are_those_that_ended_since_or_did_not(leases):
    ran(leases, 0.0, 10.0)
    late, on = ran(leases, 1.0, 20.0), ran(leases, 2.0)
    assert leases.all("8ID", 15.0) == [late, on]


def test_a_record_is_read_while_a_manager_has_it_and_afterwards(path):
    with Leases.open(path) as leases:
        begin(leases)
        with Leases.look(path) as others:
            assert len(others.open_leases()) == 1
            begin(leases)
            assert len(others.open_leases()) == 2
            with pytest.raises(RecordError, match="readonly"):
                begin(others)
    before = sorted(path.parent.iterdir())
    with Leases.look(path) as others:
        assert len(others.open_leases()) == 2
        assert sorted(path.parent.iterdir()) == before


def test_a_record_that_is_not_there_is_not_made_to_be_looked_at(path):
    with pytest.raises(RecordError, match="no such record"):
        Leases.look(path)
    assert not path.exists()


def test_a_record_in_no_directory_is_refused(path):
    with pytest.raises(RecordError, match="No such file"):
        Leases.open(path / "below")


def test_a_record_of_a_newer_version_is_refused_by_its_number(path):
    Leases.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    for way in (Leases.open, Leases.look):
        with pytest.raises(RecordError, match="version 7"):
            way(path)


def test_what_is_no_record_is_refused_and_stays_as_it_is(path):
    path.write_bytes(b"something else entirely" * 1000)
    with pytest.raises(RecordError, match="not a database"):
        Leases.open(path)
    assert path.read_bytes() == b"something else entirely" * 1000
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE others (a)")
    connection.close()
    with pytest.raises(RecordError, match="no record of leases"):
        Leases.open(path)


HOLDER = """
import sys
from pathlib import Path
from hpc_bridge.leases import Leases
with Leases.open(Path(sys.argv[1])):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_only_one_manager_has_a_record_and_the_second_is_told_who(path):
    path.with_name("leases.lock").write_text("1" * 20)  # of an earlier one
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(RecordError, match=f"process {holder.pid}$"):
            Leases.open(path)
        holder.kill()
    Leases.open(path).close()


WRITER = """
import sys
from pathlib import Path
from hpc_bridge.leases import Leases, Stage
with Leases.open(Path(sys.argv[1])) as leases:
    for i in range(10**9):
        lease = leases.begin(beamline="8ID", site="s", queue="q", account="a", walltime=9.0, now=float(i)).lease
        print("begun", lease, flush=True)
        leases.submitted(lease, f"job {lease}", i + 0.1)
        print("submitted", lease, flush=True)
        if i % 2:
            leases.ended(lease, i + 0.2, "done")
            print("ended", lease, flush=True)
"""


@pytest.mark.parametrize("n_lines", [1, 2, 20, 61])
def test_a_manager_that_is_killed_has_written_down_all_that_it_went_on_from(path, n_lines):
    with python(WRITER, path) as writer:
        lines = [writer.stdout.readline().split() for _ in range(n_lines)]
        writer.kill()
        lines += [line.split() for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    assert writer.returncode == -signal.SIGKILL
    with Leases.open(path) as leases:
        for what, lease in lines:
            is_so = {"begun": "created", "submitted": "job_id", "ended": "ended"}[what]
            assert getattr(leases.get(lease), is_so) is not None, (what, lease)
        assert len(leases.all("8ID", -1.0)) - len({lease for _, lease in lines}) in (0, 1)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
