"""Pilots that run tasks, in processes of their own: what becomes of a command, and what the manager is told of it."""

import hashlib
import json
import os
import signal
import sys
from contextlib import suppress
from threading import Thread

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_bridge.heartbeat import (
    MAX_BYTES,
    MAX_COMMAND,
    MAX_MESSAGE,
    MAX_PATH,
    MAX_RESULTS,
    Answer,
    Assignment,
    Digest,
    Do,
    Heartbeat,
    State,
    TaskReport,
    TaskState,
    answer,
    heartbeat,
    pack,
)
from tests.test_pilot import LEASE, POLITE, STUBBORN, TELLING, Manager, gone, start

__all__ = ["start"]

pytestmark = pytest.mark.timeout(400)

FAST = {"options": ("--tasks", "--grace", 0.5)}


class Tasker(Manager):
    """Has a task for all pilots."""

    def __init__(self):
        self.given = None
        super().__init__(task=lambda heard, do: self.given)

    def give(self, *command, results=(), task="one", attempt=1):
        words = tuple(map(str, command))
        self.given = Assignment(task=task, attempt=attempt, command=words, results=tuple(map(str, results)))

    def until_task(self, state, task="one"):
        """Return what a pilot tells of a task once it is so."""
        return self.until(lambda beat: beat.task and (beat.task.task, beat.task.state) == (task, state)).task


@pytest.fixture
def manager():
    with Tasker() as manager:
        yield manager


def shell(script):
    return "sh", "-c", script


def told_pids(pilot):
    """Return descriptors of the processes that a task tells of: its output is among the pilot's own."""
    while not (line := pilot.stderr.readline()).startswith("pid"):
        assert line, "it told of no process"
    return [os.pidfd_open(int(word)) for word in line.split()[1:]]


def test_a_task_that_ended_well_is_told_with_size_and_sha256_of_its_results(start, manager, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    manager.give(*shell(f"printf g2 > {one}; head -c 3000000 /dev/zero > {two}"), results=(one, two))
    start(manager.address, **FAST)
    report = manager.until_task(TaskState.DONE)
    assert (report.attempt, report.exit_code) == (1, 0)
    expected = [(str(file), hashlib.sha256(file.read_bytes()).hexdigest()) for file in (one, two)]
    assert [(each.path, each.sha256) for each in report.digests] == expected
    assert [each.size for each in report.digests] == [2, 3_000_000]


def test_a_pilot_without_a_task_serves_and_waits(start, manager):
    start(manager.address, **FAST)
    beat = manager.until(lambda beat: beat.n == 5)
    assert (beat.state, beat.task) == (State.SERVING, None)


def test_what_became_of_a_task_is_told_until_there_is_another_one_or_none(start, manager):
    start(manager.address, **FAST)
    manager.give("true")
    first = manager.until_task(TaskState.DONE)
    n = manager.beats[-1].n
    assert manager.until(lambda beat: beat.n > n + 3).task == first
    manager.given = None
    manager.until(lambda beat: beat.task is None)
    manager.give("true", task="two")
    manager.until_task(TaskState.DONE, "two")
    manager.give("true", task="two", attempt=2)
    assert manager.until(lambda beat: beat.task.attempt == 2 and beat.task.state is TaskState.DONE)


def test_tasks_run_one_after_the_other(start, manager, tmp_path):
    told = tmp_path / "told"
    start(manager.address, **FAST)
    for i in range(5):
        manager.give(*shell(f"echo begin {i} >> {told}; sleep 0.1; echo end {i} >> {told}"), task=f"task {i}")
        manager.until_task(TaskState.DONE, f"task {i}")
    assert told.read_text().split() == [word for i in range(5) for word in ("begin", str(i), "end", str(i))]


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (shell("echo working; echo 'no such dataset: /entry' >&2; echo; exit 3"), 3, "no such dataset: /entry"),
        (shell("kill -KILL $$"), 137, ""),
        (("/does/not/exist",), 127, "/does/not/exist: No such file or directory"),
        (shell("yes | head -c 3000000; echo the end; exit 1"), 1, "the end"),
    ],
)
def test_a_task_that_failed_is_told_with_its_exit_code_and_last_words(start, manager, command, code, message):
    pilot = start(manager.address, **FAST)
    manager.give(*command)
    # What it writes goes where the pilot's own output goes: here to a pipe, which has to be emptied.
    reader = Thread(target=pilot.stderr.read)
    reader.start()
    report = manager.until_task(TaskState.FAILED)
    assert (report.exit_code, report.message) == (code, message)
    assert manager.beats[-1].state is State.SERVING
    pilot.kill()
    reader.join()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file or directory"),
        (os.mkdir, "it is no regular file"),
        (os.mkfifo, "it is no regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_a_task_without_its_results_has_failed(start, manager, tmp_path, make, words):
    result = tmp_path / "result"
    make(result)
    manager.give("true", results=(result,))
    start(manager.address, **FAST)
    report = manager.until_task(TaskState.FAILED)
    assert report.exit_code == 0
    assert report.message.startswith(f"result {result}: ")
    assert words in report.message


def test_how_far_a_task_is_can_be_told(start, manager, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text(json.dumps({"ready": True, "frames": 7, "message": "half of it"}) + "\n")
    code = TELLING + "import time; time.sleep(1)"
    manager.give(sys.executable, "-c", code, "{status}", "{name}", lines)
    start(manager.address, **FAST)
    beat = manager.until(lambda beat: beat.task and beat.task.message == "half of it")
    assert (beat.task.state, beat.status.frames) == (TaskState.RUNNING, 7)


def test_the_name_of_a_pilot_is_known_to_its_tasks(start, manager, tmp_path):
    told = tmp_path / "told"
    manager.give(*shell(f"printf {{name}} > {told}"))
    start(manager.address, **FAST)
    manager.until_task(TaskState.DONE)
    assert told.read_text() == LEASE


@pytest.mark.parametrize("code", [POLITE, STUBBORN])
def test_when_the_node_is_taken_the_task_is_stopped_and_handed_back(start, manager, code):
    manager.give(sys.executable, "-c", code)
    pilot = start(manager.address, **FAST)
    manager.until_task(TaskState.RUNNING)
    left = told_pids(pilot)
    pilot.send_signal(signal.SIGTERM)
    last, _ = manager.until_ended(pilot)
    assert (last.state, last.task.state) == (State.ENDED, TaskState.STOPPED)
    assert last.task.message == "the scheduler takes the node"
    assert pilot.returncode == 85
    assert gone(left)


def test_when_the_manager_says_so_a_pilot_goes_with_its_task(start, manager):
    manager.give(sys.executable, "-c", POLITE)
    pilot = start(manager.address, **FAST)
    manager.until_task(TaskState.RUNNING)
    left = told_pids(pilot)
    manager.do = Do.DRAIN, "no more wanted"
    last, _ = manager.until_ended(pilot)
    assert (last.task.state, pilot.returncode) == (TaskState.STOPPED, 0)
    assert gone(left)


def test_a_pilot_that_does_not_hear_of_the_manager_goes_with_its_task(start, manager):
    manager.give(sys.executable, "-c", STUBBORN)
    pilot = start(manager.address, options=(*FAST["options"], "--alone", 5))  # long enough to tell its processes
    manager.until_task(TaskState.RUNNING)
    left = told_pids(pilot)
    assert pilot.wait(90) == 0
    assert gone(left)


def test_a_pilot_that_is_killed_takes_its_task_with_it(start, manager):
    manager.give(sys.executable, "-c", POLITE)
    pilot = start(manager.address, **FAST)
    manager.until_task(TaskState.RUNNING)
    left = told_pids(pilot)
    pilot.kill()
    assert gone(left)


@pytest.mark.parametrize("code", [POLITE, STUBBORN])
def test_a_task_that_is_not_its_own_any_more_is_stopped_and_the_pilot_takes_the_next_one(start, manager, code):
    manager.give(sys.executable, "-c", code)
    pilot = start(manager.address, **FAST)
    manager.until_task(TaskState.RUNNING)
    left = told_pids(pilot)
    manager.give("true", task="two")
    manager.until_task(TaskState.DONE, "two")
    assert gone(left)
    assert {beat.state for beat in manager.beats} == {State.SERVING}


def test_what_was_done_before_a_pilot_has_to_go_is_still_told(start, manager):
    manager.give("true")
    pilot = start(manager.address, **FAST)
    manager.until_task(TaskState.DONE)
    pilot.send_signal(signal.SIGTERM)
    last, _ = manager.until_ended(pilot)
    assert (last.state, last.task.state) == (State.ENDED, TaskState.DONE)


def test_a_pilot_has_either_a_command_or_tasks(start, manager):
    for options, command in ((("--tasks",), ("true",)), ((), ())):
        pilot = start(manager.address, *command, options=options)
        assert "either COMMAND or --tasks" in pilot.communicate(timeout=30)[1]
        assert pilot.returncode == 2


# What is said

REPORT = TaskReport(
    task="8ID/17", attempt=2, state=TaskState.DONE, exit_code=0, message="fine",
    digests=(Digest(path="/eagle/" + "x" * 300, size=2**40, sha256="a" * 64),),
)  # fmt: skip
BEAT = Heartbeat(lease=LEASE, node="n1", pid=1, n=0, state=State.SERVING, started=1.0, now=2.0, task=REPORT)
ANSWER = Answer(
    n=3, task=Assignment(task="8ID/17", attempt=2, command=("sh", "-c", "x\n" * 999), results=("/r" * 200,))
)


def test_what_is_said_of_tasks_is_read_as_it_was_said():
    assert heartbeat(pack(BEAT)) == BEAT
    assert answer(pack(ANSWER)) == ANSWER


def test_all_that_may_be_said_of_a_task_fits_into_a_message():
    digests = tuple(Digest(path="ä" * (MAX_PATH // 2), size=2**53, sha256="a" * 64) for _ in range(MAX_RESULTS))
    report = TaskReport(task="x" * 128, attempt=1, state=TaskState.DONE, digests=digests, message="x" * MAX_MESSAGE)
    assert len(pack(Heartbeat(**(fields(BEAT) | {"task": report})))) < MAX_BYTES
    given = Assignment(
        task="x" * 128, attempt=1, command=("x" * MAX_COMMAND,), results=("ä" * (MAX_PATH // 2),) * MAX_RESULTS
    )
    assert len(pack(Answer(n=1, task=given))) < MAX_BYTES


def test_pilots_and_managers_that_know_of_no_tasks_are_understood():
    for said, read in ((BEAT, heartbeat), (ANSWER, answer)):
        fields = msgpack.unpackb(pack(said))
        del fields["task"]
        assert read(msgpack.packb(fields)).task is None


def fields(said):
    return {name: getattr(said, name) for name in said.__slots__}


@pytest.mark.parametrize(
    ("said", "changes", "words"),
    [
        (BEAT, {"task": None, "state": "done"}, "task is None"),
        (BEAT, {"task": ""}, "task is ''"),
        (BEAT, {"state": "happy"}, "happy"),
        (BEAT, {"attempt": -1}, "attempt"),
        (BEAT, {"exit_code": 256}, "exit_code"),
        (BEAT, {"message": "x" * (MAX_MESSAGE + 1)}, "message"),
        (BEAT, {"digests": [{}]}, "sha256 is ''"),
        (BEAT, {"digests": [{"path": "/r", "size": 1, "sha256": "A" * 64}]}, "not 64 hex digits"),
        (BEAT, {"digests": [{"path": "/r", "size": -1, "sha256": "a" * 64}]}, "size"),
        (BEAT, {"digests": [{"path": 1, "size": 1, "sha256": "a" * 64}]}, "path is 1"),
        (BEAT, {"digests": [{}] * (MAX_RESULTS + 1)}, "digests"),
        (ANSWER, {"command": []}, "has no command"),
        (ANSWER, {"command": ["sh", 1]}, "a word of its command is 1"),
        (ANSWER, {"command": ["\0"]}, "a word of its command"),
        (ANSWER, {"command": "sh"}, "command is 'sh'"),
        (ANSWER, {"results": ["x" * (MAX_PATH + 1)]}, "a result"),
        (ANSWER, {"results": ["/r"] * (MAX_RESULTS + 1)}, "results"),
    ],
)
def test_what_is_no_task_is_refused_and_named(said, changes, words):
    fields = msgpack.unpackb(pack(said))
    fields["task"] |= changes
    with pytest.raises(ValueError, match=words):
        (heartbeat if said is BEAT else answer)(msgpack.packb(fields))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
NAMES = ["task", "attempt", "state", "exit_code", "digests", "message", "command", "results"]


@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING) | ANYTHING, st.sampled_from([BEAT, ANSWER]))
def test_whatever_is_said_of_a_task_it_is_read_or_refused(task, said):
    fields = msgpack.unpackb(pack(said))
    fields["task"] = fields["task"] | task if isinstance(task, dict) else task
    with suppress(ValueError):
        (heartbeat if said is BEAT else answer)(msgpack.packb(fields))
