"""Tasks for nodes: handed out in their order, each to one pilot, and none is lost, whoever dies."""

import hashlib
import os
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from hpc_bridge.config import Account
from hpc_bridge.demand import FilesDemand
from hpc_bridge.dispatch import ATTEMPTS, Dispatch
from hpc_bridge.errors import ConfigError, RecordError
from hpc_bridge.heartbeat import Digest, Heard, Heartbeat, TaskReport, TaskState
from hpc_bridge.heartbeat import State as Pilot
from hpc_bridge.leases import Kind, Leases, Pause
from hpc_bridge.pool import Pool
from hpc_bridge.tasks import State, Tasks
from tests.bridge import Bridge, processes, stand_in
from tests.world import beamline, queue, site

NOW = 1000.0
DIGEST = Digest(path="/eagle/r.h5", size=3, sha256="0" * 64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks"


@pytest.fixture
def tasks(path):
    with Tasks.open(path) as tasks:
        yield tasks


@pytest.fixture
def dispatch(tasks):
    return Dispatch("8ID", tasks, retry_after=10.0)


def add(tasks, task="one", *, at=NOW, **changes):
    asked = {"beamline": "8ID", "site": "near", "command": ("compute", task), "results": (DIGEST.path,)} | changes
    return tasks.add(task, now=at, **asked)


def told(task="one", state=TaskState.RUNNING, attempt=1, **changes):
    return TaskReport(task=task, attempt=attempt, state=state, **changes)


def beat(lease, task=None, *, state=Pilot.SERVING, at=NOW):
    said = Heartbeat(lease=lease, node="n1", pid=1, n=0, state=state, started=NOW, now=at, task=task)
    return Heard(heartbeat=said, at=at, monotonic=at)


def ask(dispatch, lease="a", task=None, *, where="near", may_begin=True, **changes):
    """Return which task a pilot is told to run."""
    given = dispatch.answer(beat(lease, task, **changes), site=where, may_begin=may_begin)
    return None if given is None else (given.task, given.attempt)


# The record


def test_a_task_is_added_once_however_often_it_is_asked_for(tasks, path):
    first = add(tasks)
    assert add(tasks, at=NOW + 5) == first
    assert (first.state, first.attempt, first.command) == (State.WAITING, 1, ("compute", "one"))
    tasks.handed("one", "a", NOW)
    done = tasks.done("one", [DIGEST], NOW + 9)
    assert add(tasks) == done == tasks.get("one")
    assert (done.digests, done.exit_code, done.ended) == ((DIGEST,), 0, NOW + 9)
    tasks.close()
    with Tasks.open(path) as again:
        assert again.of("8ID") == [done]


def test_one_that_waits_gets_the_priority_that_it_has_now(tasks):
    add(tasks)
    assert add(tasks, priority=4).priority == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": ""}, "an id is"),
        ({"task": "x" * 129}, "an id is"),
        ({"task": "a\nb"}, "an id is"),
        ({"command": ()}, "1 to 1024 words"),
        ({"command": ("x" * 70_000,)}, "65,536 bytes"),
        ({"command": ("\0",)}, "zero byte"),
        ({"command": ("\ud800",)}, "cannot be told"),
        ({"results": ("here.h5",)}, "'here.h5' is no absolute path"),
        ({"results": ("/" + "x" * 1024,)}, "no absolute path"),
        ({"results": ("/a\n",)}, "no absolute path"),
        ({"results": ("/r",) * 65}, "65 results"),
    ],
)
def test_what_could_not_be_told_to_a_pilot_is_refused(tasks, changes, words):
    with pytest.raises(ConfigError, match=words):
        add(tasks, **changes)
    assert tasks.of("8ID") == []


def test_another_command_under_the_same_id_is_refused(tasks):
    add(tasks)
    with pytest.raises(ConfigError, match="on record as another one"):
        add(tasks, command=("other",))


def test_a_task_that_is_over_can_be_wanted_once_more(tasks):
    add(tasks)
    assert tasks.again("one", "why not", NOW).attempt == 1
    tasks.done("one", [DIGEST], NOW)
    again = tasks.again("one", "the file was lost", NOW + 1)
    assert (again.state, again.attempt, again.digests, again.ended) == (State.WAITING, 2, (), None)


def test_a_record_has_one_writer_and_any_readers(tasks, path):
    add(tasks)
    with pytest.raises(RecordError, match=f"process {os.getpid()}"):
        Tasks.open(path)
    with Tasks.look(path) as others:
        assert [task.task for task in others.open_tasks("8ID")] == ["one"]
    with pytest.raises(RecordError, match="no such record"):
        Tasks.look(path.with_name("none"))


def test_a_record_of_something_else_is_refused(path):
    Leases.open(path).close()
    with pytest.raises(RecordError, match="no record of tasks"):
        Tasks.open(path)


# Who gets which


def test_the_highest_priority_goes_first_and_among_equals_the_oldest(tasks, dispatch):
    for name, priority, at in (("low", 0, 1), ("old", 5, 2), ("new", 5, 3), ("top", 9, 4)):
        add(tasks, name, priority=priority, at=at)
    order = []
    for _ in range(4):
        given, _ = ask(dispatch)
        order.append(given)
        tasks.done(given, [DIGEST], NOW)
    assert order == ["top", "old", "new", "low"]
    assert ask(dispatch) is None


def test_a_task_goes_to_pilots_at_its_site_only(tasks, dispatch):
    add(tasks, site="far", priority=9)
    add(tasks, "two")
    assert ask(dispatch, "a") == ("two", 1)
    assert ask(dispatch, "b") is None
    assert ask(dispatch, "c", where="far") == ("one", 1)


def test_tasks_of_other_beamlines_are_not_handed_out(tasks, dispatch):
    add(tasks, beamline="2BM")
    assert ask(dispatch) is None


def test_a_task_is_on_record_before_its_pilot_is_told_and_is_told_again_until_it_is_over(tasks, dispatch):
    add(tasks)
    add(tasks, "two")
    assert ask(dispatch) == ("one", 1)
    assert (tasks.get("one").state, tasks.get("one").lease, tasks.get("one").began) == (State.RUNNING, "a", NOW)
    assert ask(dispatch) == ("one", 1)
    assert ask(Dispatch("8ID", tasks, retry_after=10.0), task=told()) == ("one", 1)
    assert ask(dispatch, "b") == ("two", 1)


@pytest.mark.parametrize("state", [Pilot.STARTING, Pilot.DRAINING, Pilot.ENDED])
def test_a_pilot_that_does_not_serve_gets_no_task(tasks, dispatch, state):
    add(tasks)
    assert ask(dispatch, state=state) is None
    assert ask(dispatch, may_begin=False) is None


def test_a_done_task_has_its_digests_and_its_pilot_gets_the_next_one_in_the_same_answer(tasks, dispatch):
    add(tasks)
    add(tasks, "two")
    ask(dispatch)
    assert ask(dispatch, task=told(state=TaskState.DONE, exit_code=0, digests=(DIGEST,)), at=NOW + 3) == ("two", 1)
    assert (tasks.get("one").state, tasks.get("one").digests, tasks.get("one").ended) == (
        State.DONE, (DIGEST,), NOW + 3,
    )  # fmt: skip


def test_what_is_told_again_changes_nothing(tasks, dispatch):
    add(tasks)
    add(tasks, "two")
    ask(dispatch)
    done = told(state=TaskState.DONE, exit_code=0, digests=(DIGEST,))
    ask(dispatch, task=done)
    before = tasks.of("8ID")
    assert ask(dispatch, task=done, at=NOW + 9) == ("two", 1)
    assert ask(dispatch, task=told(state=TaskState.FAILED, exit_code=1)) == ("two", 1)
    assert tasks.of("8ID") == before


def test_a_command_that_fails_is_tried_three_times_and_then_fails_with_its_last_words(tasks, dispatch):
    add(tasks)
    for attempt in range(1, ATTEMPTS + 1):
        assert tasks.get("one").state is State.WAITING
        now = NOW + 100 * attempt
        assert ask(dispatch, at=now) == ("one", attempt)
        failed = told(state=TaskState.FAILED, attempt=attempt, exit_code=3, message="no such dataset")
        assert ask(dispatch, task=failed, at=now) is None
    task = tasks.get("one")
    assert (task.state, task.failures, task.exit_code) == (State.FAILED, 3, 3)
    assert task.why == "exit code 3: no such dataset"
    assert ask(dispatch, at=NOW + 1000) is None


def test_what_failed_is_not_tried_again_at_once_and_the_next_time_later_still(tasks, dispatch):
    add(tasks)
    ask(dispatch)
    assert ask(dispatch, task=told(state=TaskState.FAILED, exit_code=3)) is None
    assert ask(dispatch, at=NOW + 9.9) is None
    assert ask(dispatch, at=NOW + 10) == ("one", 2)
    assert ask(dispatch, task=told(state=TaskState.FAILED, attempt=2, exit_code=3), at=NOW + 10) is None
    assert ask(dispatch, at=NOW + 49.9) is None
    assert ask(dispatch, at=NOW + 50) == ("one", 3)


def test_others_have_their_turn_while_what_failed_rests(tasks, dispatch):
    add(tasks, priority=5)
    add(tasks, "two")
    add(tasks, "far", site="far")
    ask(dispatch)
    assert ask(dispatch, task=told(state=TaskState.FAILED, exit_code=3)) == ("two", 1)
    assert tasks.asked("8ID", ["near", "far"], 9, NOW + 1) == ["near", "far", "near"]
    assert tasks.asked("8ID", ["near", "far"], 9, NOW + 10) == ["near", "near", "far"]


def test_a_command_that_was_told_to_stop_before_it_was_done_has_not_failed_however_often(tasks, dispatch):
    add(tasks)
    for attempt in range(1, 9):
        now = NOW + 10 * attempt
        assert ask(dispatch, at=now) == ("one", attempt)
        stopped = told(state=TaskState.FAILED, attempt=attempt, exit_code=75, message="stopped at frame 7")
        assert ask(dispatch, task=stopped, at=now) is None
    task = tasks.get("one")
    assert (task.state, task.failures, task.why) == (State.WAITING, 0, "exit code 75: stopped at frame 7")


def test_a_task_that_is_wanted_once_more_does_not_wait(tasks, dispatch):
    add(tasks)
    ask(dispatch)
    ask(dispatch, task=told(state=TaskState.FAILED, exit_code=3))
    tasks.cancel("one", "not wanted", NOW)
    tasks.again("one", "wanted", NOW + 1)
    assert ask(dispatch, at=NOW + 1) == ("one", 3)


def test_tasks_that_ended_long_ago_are_forgotten_and_others_are_not(tasks, dispatch):
    add(tasks, "over")
    add(tasks, "over-2")
    add(tasks, "waits")
    tasks.cancel("over", "", NOW)
    tasks.cancel("over-2", "", NOW + 10)
    tasks.prune(NOW + 10)
    assert tasks.get("over") is None
    assert {task.task for task in tasks.of("8ID")} == {"waits", "over-2"}


def test_a_failure_that_is_told_again_counts_once_though_the_same_pilot_tries_again(tasks, dispatch):
    add(tasks)
    ask(dispatch)
    failed = told(state=TaskState.FAILED, exit_code=3)
    ask(dispatch, task=failed)
    assert ask(dispatch, task=failed, at=NOW + 10) == ask(dispatch, task=failed, at=NOW + 10) == ("one", 2)
    assert (tasks.get("one").state, tasks.get("one").failures) == (State.RUNNING, 1)


def test_a_pilot_that_tells_of_other_results_has_not_done_the_task(tasks, dispatch):
    add(tasks)
    ask(dispatch)
    ask(dispatch, task=told(state=TaskState.DONE, exit_code=0), may_begin=False)
    assert (tasks.get("one").state, tasks.get("one").failures) == (State.WAITING, 1)


def test_a_task_of_a_lost_pilot_waits_again_however_often(tasks, dispatch):
    add(tasks)
    for attempt in range(1, 9):
        assert ask(dispatch, f"pilot {attempt}") == ("one", attempt)
        dispatch.take_back({f"pilot {attempt}"}, {})
        assert tasks.get("one").state is State.RUNNING
        dispatch.take_back(set(), {f"pilot {attempt}": "PREEMPTED"})
        assert tasks.get("one").why == f"lost with its pilot pilot {attempt}: PREEMPTED"
    assert (tasks.get("one").state, tasks.get("one").failures) == (State.WAITING, 0)


def test_what_a_pilot_tells_of_a_task_that_another_one_has_counts_for_nothing_and_it_is_told_to_stop(tasks, dispatch):
    add(tasks)
    ask(dispatch, "lost")
    dispatch.take_back(set(), {})
    assert ask(dispatch, "other") == ("one", 2)
    assert ask(dispatch, "lost", told()) is None
    assert ask(dispatch, "lost", told(state=TaskState.DONE, digests=(DIGEST,)), may_begin=False) is None
    assert (tasks.get("one").state, tasks.get("one").lease) == (State.RUNNING, "other")


def test_a_pilot_that_runs_what_is_not_its_own_gets_another_task_only_once_it_has_stopped(tasks, dispatch):
    add(tasks)
    add(tasks, "two")
    ask(dispatch)
    tasks.cancel("one", "not wanted", NOW)
    assert ask(dispatch, task=told()) is None
    assert ask(dispatch, task=told(state=TaskState.STOPPED)) == ("two", 1)
    assert (tasks.get("one").state, tasks.get("one").why) == (State.FAILED, "not wanted")


def test_a_task_that_is_handed_back_waits_again(tasks, dispatch):
    add(tasks)
    ask(dispatch)
    assert ask(dispatch, task=told(state=TaskState.STOPPED, message="preempted"), state=Pilot.DRAINING) is None
    assert (tasks.get("one").state, tasks.get("one").attempt) == (State.WAITING, 2)
    assert tasks.get("one").why == "handed back by a: preempted"


def test_a_pilot_that_ended_has_no_task(tasks, dispatch):
    add(tasks)
    ask(dispatch)
    ask(dispatch, state=Pilot.ENDED)
    assert tasks.get("one").state is State.WAITING


class Walk:
    """Pilots that die, are cut off and fail, messages that are lost or told again, a manager that is killed."""

    def __init__(self, path, seed):
        self.path, self.dice = path, random.Random(seed)
        self.now = NOW
        self.pilots = {}
        """Reports of pilots that live, by lease."""
        self.living = {}
        """Sites of pilots of which the manager holds that they live."""
        self.cut = set()
        self.old = []
        self.n = 0
        self.tasks = Tasks.open(path)
        self.dispatch = Dispatch("8ID", self.tasks, retry_after=3.0)

    def close(self):
        self.tasks.close()

    def step(self):
        self.now += 1
        for lease in list(self.pilots):
            self._pilot(lease)
        for lease in [lease for lease in self.living if lease not in self.pilots or lease in self.cut]:
            if self.dice.random() < 0.3:
                del self.living[lease]
        if self.dice.random() < 0.3:
            self.cut -= {lease for lease in self.cut if self.dice.random() < 0.5}
        self.dispatch.take_back(self.living, {})
        if self.old and self.dice.random() < 0.3:
            self._hear(self.dice.choice(self.old))
        if self.dice.random() < 0.05:
            self.tasks.close()
            self.tasks = Tasks.open(self.path)
            self.dispatch = Dispatch("8ID", self.tasks, retry_after=3.0)
        if len(self.living) < 4:
            self.n += 1
            self.pilots[f"p{self.n}"] = None
            self.living[f"p{self.n}"] = self.dice.choice(("near", "far"))
        self._see_that_it_is_sound()

    def _pilot(self, lease):
        report, luck = self.pilots[lease], self.dice.random()
        if luck < 0.02:
            del self.pilots[lease]
            return
        if luck < 0.04:
            self.cut.add(lease)
        if report is not None and report.state is TaskState.RUNNING and self.dice.random() < 0.4:
            report = self.pilots[lease] = self._ended(report)
        said = beat(lease, report, at=self.now)
        self.old = [*self.old, said][-50:]
        if lease in self.cut or self.dice.random() < 0.1:
            return
        given = self._hear(said)
        if lease not in self.living:
            del self.pilots[lease]  # it was told to end
        elif self.dice.random() > 0.1:
            self._take(lease, given)

    def _ended(self, report):
        is_bad = report.task.startswith("bad") or (report.task.startswith("flaky") and report.attempt == 1)
        if is_bad:
            return told(report.task, TaskState.FAILED, report.attempt, exit_code=1)
        return told(report.task, TaskState.DONE, report.attempt, exit_code=0, digests=(DIGEST,))

    def _hear(self, said):
        lease = said.heartbeat.lease
        waiting = {task.task: task for task in self.tasks.of("8ID") if task.state is State.WAITING}
        where = self.living.get(lease, "near")
        given = self.dispatch.answer(said, site=where, may_begin=lease in self.living)
        if given is not None:
            task = self.tasks.get(given.task)
            assert (task.state, task.lease, task.attempt) == (State.RUNNING, lease, given.attempt)
            better = [
                t
                for t in waiting.values()
                if t.site == where
                and t.not_before <= said.at
                and (-t.priority, t.created) < (-task.priority, task.created)
            ]
            assert given.task not in waiting or not better
        return given

    def _take(self, lease, given):
        report = self.pilots[lease]
        is_busy = report is not None and report.state is TaskState.RUNNING
        if given is None:
            self.pilots[lease] = None
        elif report is None or (report.task, report.attempt) != (given.task, given.attempt):
            stopped = told(report.task, TaskState.STOPPED, report.attempt) if is_busy else None
            self.pilots[lease] = stopped or told(given.task, TaskState.RUNNING, given.attempt)

    def _see_that_it_is_sound(self):
        running = self.tasks.running("8ID")
        assert len({task.lease for task in running}) == len(running)
        assert {task.lease for task in running} <= set(self.living)
        has = {(task.task, task.attempt): task.lease for task in running}
        mine = [
            (report.task, report.attempt)
            for lease, report in self.pilots.items()
            if report is not None
            and report.state is TaskState.RUNNING
            and has.get((report.task, report.attempt)) == lease
        ]
        assert len(set(mine)) == len(mine)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_no_task_is_lost_and_none_is_done_twice(path, seed):
    walk = Walk(path, seed)
    kinds = ["good"] * 20 + ["flaky"] * 6 + ["bad"] * 4
    for i, kind in enumerate(kinds):
        add(
            walk.tasks,
            f"{kind}-{i}",
            priority=walk.dice.randrange(3),
            site=walk.dice.choice(("near", "far")),
            at=NOW + i,
        )
    with closing(walk):
        for _ in range(1000):
            walk.step()
            if not walk.tasks.open_tasks("8ID"):
                break
        for task in walk.tasks.of("8ID"):
            is_bad = task.task.startswith("bad")
            assert task.state is (State.FAILED if is_bad else State.DONE)
            assert task.digests == (() if is_bad else (DIGEST,))
            assert task.failures <= ATTEMPTS


# How many nodes


def test_as_many_nodes_are_wanted_as_there_are_tasks_up_to_the_most(tasks):
    demand = FilesDemand(3, 60.0, {}, NOW)
    assert demand.wanted(NOW, []) == {}
    assert demand.wanted(NOW, ["near"]) == {"near": 1}
    assert demand.wanted(NOW, ["near", "far", "near", "far"]) == {"near": 2, "far": 1}


def test_idle_nodes_linger_unless_another_site_wants_them():
    demand = FilesDemand(2, 60.0, {}, NOW)
    demand.wanted(NOW, ["near", "near"])
    assert demand.wanted(NOW + 50, []) == {"near": 2}
    assert demand.wanted(NOW + 51, ["far"]) == {"near": 1, "far": 1}
    assert demand.wanted(NOW + 61, ["far"])["near"] == 0


def test_a_new_manager_lets_the_nodes_linger_that_are_there():
    demand = FilesDemand(2, 60.0, {"near": 1}, NOW)
    assert demand.wanted(NOW + 59, []) == {"near": 1}
    assert demand.wanted(NOW + 60, []) == {"near": 0}


def test_tasks_that_wait_at_sites_out_of_reach_ask_for_no_nodes(tasks):
    add(tasks, "lost", site="far", priority=9)
    add(tasks, "runs", site="far")
    tasks.handed("runs", "a", NOW)
    add(tasks, "waits")
    assert tasks.asked("8ID", ["near"], 9, NOW) == ["far", "near"]
    assert tasks.asked("8ID", ["near", "far"], 2, NOW) == ["far", "far"]


# Leases of two kinds


@contextmanager
def pools(folder, **changes):
    near = site("near", (queue("demand", max_jobs=2),))
    with Leases.open(folder / "leases") as leases:
        both = [
            Pool(beamline(**changes), {"near": near}, leases, now=NOW, kind=kind, at=at)
            for kind, at in ((Kind.STREAM, None), (Kind.FILES, "near"))
        ]
        for pool in both:
            pool.listed("near", NOW, [])
        yield leases, *both


def test_a_pool_has_leases_of_its_own_kind_and_site_only(tmp_path):
    with pools(tmp_path) as (leases, stream, files):
        [of_stream], [of_files] = stream.orders(NOW, 1), files.orders(NOW, 1)
        assert (of_stream.lease.name[:3], of_files.lease.name[:3]) == ("xb-", "xf-")
        assert files.answer(of_stream.lease.lease) is stream.answer(of_files.lease.lease) is None
        assert files.answer(of_files.lease.lease) is not None
        assert (len(stream.views(NOW)), len(files.views(NOW))) == (1, 1)
        assert stream.orders(NOW, 0) == []
        assert len(leases.open_leases("8ID", Kind.FILES)) == 1
        far = Pool(
            beamline(sites=("near", "far")), {"near": site("near"), "far": site("far")}, leases, now=NOW,
            kind=Kind.FILES, at="far",
        )  # fmt: skip
        assert far.views(NOW) == []


BEFORE = """
CREATE TABLE leases (
    lease TEXT PRIMARY KEY, beamline TEXT NOT NULL, site TEXT NOT NULL, queue TEXT NOT NULL, account TEXT NOT NULL,
    nodes INTEGER NOT NULL, walltime REAL NOT NULL, replaces TEXT, stage TEXT NOT NULL, reason TEXT NOT NULL,
    job_id TEXT, node TEXT NOT NULL,
    created REAL NOT NULL, submitted REAL, started REAL, serving_since REAL, leaving_since REAL, ended REAL
);
CREATE TABLE runs (
    beamline TEXT NOT NULL, run TEXT NOT NULL, began REAL NOT NULL, ended REAL, PRIMARY KEY (beamline, run)
);
CREATE TABLE pauses (
    beamline TEXT NOT NULL, site TEXT NOT NULL, queue TEXT NOT NULL, until REAL NOT NULL, why TEXT NOT NULL,
    PRIMARY KEY (beamline, site, queue)
);
INSERT INTO leases VALUES (
    '0123456789ab', '8ID', 'near', 'demand', '', 1, 600, NULL, 'submitted', '', '17', 'n1', 1, 2, 3, 4, NULL, NULL
);
PRAGMA user_version = 1;
"""


def test_leases_of_a_manager_that_knew_of_no_tasks_are_for_the_stream(tmp_path):
    path = tmp_path / "leases"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(BEFORE)
    with Leases.look(path) as leases:
        [before] = leases.open_leases()
    with Leases.open(path) as leases:
        assert leases.open_leases("8ID", Kind.STREAM) == [before]
        assert (before.name, before.serving_since) == ("xb-8ID-0123456789ab", 4)
        begun = leases.begin(
            beamline="8ID", site="near", queue="demand", account="", walltime=9.0, now=NOW, kind=Kind.FILES
        )
        for kind in Kind:
            leases.pause("8ID", Pause(site="near", queue="demand", until=NOW, why=kind.value, kind=kind))
    with Leases.open(path) as leases:
        assert leases.open_leases("8ID", Kind.FILES) == [begun]
        assert [pause.why for pause in leases.pauses("8ID", NOW - 1)] == ["stream", "files"]


def test_the_room_of_a_queue_is_shared_by_both_kinds(tmp_path):
    with pools(tmp_path) as (_, stream, files):
        assert len(stream.orders(NOW, 1)) == 1
        assert len(files.orders(NOW, 5)) == 1
        assert stream.orders(NOW, 5) == []


def test_an_account_pays_for_both_kinds(tmp_path):
    walltime = 600 / 3600
    accounts = {"near": Account(account="xpcs", node_hours=1.5 * walltime)}
    with pools(tmp_path, accounts=accounts) as (leases, stream, files):
        assert len(stream.orders(NOW, 1)) == 1
        assert files.orders(NOW, 1) == []
        [pause] = leases.pauses("8ID", NOW)
        assert (pause.kind, "node hours left" in pause.why) == (Kind.FILES, True)


# All of it

TASK = """
import pathlib, sys, time
result, gate = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[3])
while not gate.exists():
    time.sleep(0.05)
new = result.with_suffix(".new")
new.write_text(sys.argv[2])
new.replace(result)
"""

N_TASKS = 20


@pytest.mark.timeout(400)
def test_tasks_are_all_done_though_pilots_and_manager_are_killed(tmp_path):
    route = {"by": "copy", "there": {"endpoint": "", "path": str(tmp_path)}}
    files = {"sites": {"here": route}, "nodes": 3, "linger": "1 s", "results": str(tmp_path)}
    with closing(Bridge(tmp_path, stand_in(), nodes=0, max_nodes=1, files=files)) as bridge:
        bridge.state.mkdir()
        record = bridge.state / "tasks.sqlite"
        results = [tmp_path / f"result-{i}" for i in range(N_TASKS)]
        gates = [tmp_path / f"gate-{i}" for i in range(3)]
        gates[0].touch()
        with Tasks.open(record) as tasks:
            for i, result in enumerate(results):
                gate = gates[0 if i < 3 else 1 if i < 10 else 2]
                command = (sys.executable, "-c", TASK, str(result), f"g2 of {i}", str(gate))
                about = {"site": "here", "command": command, "results": [str(result)], "priority": i < 10}
                tasks.add(f"task-{i}", beamline=bridge.name, **about, now=time.time())

        def all_tasks():
            with Tasks.look(record) as tasks:
                return tasks.of(bridge.name)

        def n_done():
            return sum(task.state is State.DONE for task in all_tasks())

        def kill_one():
            bridge.until(lambda: any(task.state is State.RUNNING for task in all_tasks()))
            lease = next(task.lease for task in all_tasks() if task.state is State.RUNNING)
            for pid in processes(f"--lease {lease}"):
                os.kill(pid, signal.SIGKILL)

        manager = bridge.up()
        bridge.until(lambda: n_done() == 3)
        assert {pilot["kind"] for pilot in bridge.pilots()} == {"files"}
        assert "for files" in bridge.run("status").stdout
        kill_one()
        bridge.until(lambda: any(task.attempt > 1 for task in all_tasks()))  # before other tasks take all nodes
        gates[1].touch()
        bridge.until(lambda: n_done() == 10)
        manager.kill()
        manager.wait()
        kill_one()
        gates[2].touch()
        bridge.up_again()
        bridge.until(lambda: n_done() == N_TASKS)
        bridge.until(lambda: bridge.status() is not None and not bridge.status()["pilots"])

        done = all_tasks()
        assert bridge.status()["files"]["tasks"] == {"done": N_TASKS}
        assert len(done) == N_TASKS
        assert sum(task.attempt for task in done) > N_TASKS
        assert sum(task.failures for task in done) == 0
        for i, result in enumerate(results):
            [task] = [task for task in done if task.task == f"task-{i}"]
            [digest] = task.digests
            assert result.read_text() == f"g2 of {i}"
            assert digest.sha256 == hashlib.sha256(result.read_bytes()).hexdigest()
            assert (Path(digest.path), digest.size) == (result, result.stat().st_size)
