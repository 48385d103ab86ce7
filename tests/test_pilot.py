"""Pilots in processes of their own: what they run goes when they go, and the manager knows."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from hpc_bridge import hearing as hearing_module
from hpc_bridge import line as line_module
from hpc_bridge.curve import ManagerKeys, PilotKeys
from hpc_bridge.dialing import announced, file_of
from hpc_bridge.hearing import Hearing
from hpc_bridge.heartbeat import Answer, Do, State, pack
from hpc_bridge.line import Awaited, Line
from hpc_bridge.status_file import StatusFile
from stream.curve import make
from tests.plane import REGIONS, Plane
from tests.test_kill import N_FRAMES, assert_identical, frames, free, qmap, result_of_frames

__all__ = ["frames", "qmap"]

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(400)

DEADLINE = 60
LEASE = "0123456789ab"

FOREVER = ("sleep", "1000")

POLITE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(3)))
print("pid", os.getpid(), flush=True)
while True: signal.pause()
"""
"""Needs its time to end."""

STUBBORN = """
import os, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
print("pid", os.getpid(), child.pid, flush=True)
while True: signal.pause()
"""

TELLING = """
import json, os, sys
def tell(**status):
    with open(sys.argv[1] + ".new", "w") as file: json.dump(status, file)
    os.rename(sys.argv[1] + ".new", sys.argv[1])
tell(ready=False, message=sys.argv[2])
for line in sys.stdin if sys.argv[3:] == ["stdin"] else open(sys.argv[3]): tell(**json.loads(line))
"""
"""Tells what it reads from a pipe."""


class Manager(Hearing):
    """Says the same to all pilots."""

    file = None

    def __init__(self, address="tcp://127.0.0.1:*", **options):
        self.do = Do.GO_ON, ""
        self.beats = []
        super().__init__(address, lambda lease: self.do, **options)

    def until(self, reached):
        """Return the first heartbeat from now on that is wanted."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            self.go()
            found = [each.heartbeat for each in self.poll(0.05)]
            self.beats += found
            for beat in found:
                if reached(beat):
                    return beat
        raise AssertionError(f"it did not come about: {self.beats}")

    def go(self):
        """Dial whom a file tells of, if it is us who dial."""
        if self.file is not None:
            address = announced(self.file)
            self.dial({} if address is None else {LEASE: address})

    def until_ended(self, pilot, meanwhile=lambda: None):
        """Return the last heartbeat of a pilot, and what it wrote to standard error."""
        while pilot.poll() is None:
            meanwhile()
            self.go()
            self.beats += [each.heartbeat for each in self.poll(0.02)]
        deadline = time.monotonic() + DEADLINE  # what it said last may still be on its way
        while self.beats[-1].state is not State.ENDED and time.monotonic() < deadline:
            self.beats += [each.heartbeat for each in self.poll(0.02)]
        return self.beats[-1], pilot.communicate(timeout=DEADLINE)[1]


def serving(beat):
    return beat.state is State.SERVING


@pytest.fixture
def manager():
    with Manager() as manager:
        yield manager


@pytest.fixture
def start(tmp_path):
    """Start pilots, which do not outlive the test."""
    with ExitStack() as stack:

        def start(address, *command, options=(), every=0.05, lease=LEASE):
            folder = tmp_path / "tmp"
            folder.mkdir(exist_ok=True)
            way = ("--manager", address) if isinstance(address, str) else ("--announce", address)
            told = ["--lease", lease, *way, "--every", every, *options, "--", *command]
            pilot = subprocess.Popen(
                [sys.executable, "-m", "hpc_bridge", "pilot", *map(str, told)],
                env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(pilot)
            stack.callback(pilot.kill)
            return pilot

        yield start


def pids(pilot):
    """Return descriptors of the processes that the command tells of, which can be waited for."""
    return [os.pidfd_open(int(word)) for word in pilot.stdout.readline().split()[1:]]


def gone(descriptors):
    """Tell whether processes have ended, waiting for it."""
    deadline = time.monotonic() + DEADLINE
    left = [each for each in descriptors if not select.select([each], [], [], max(0, deadline - time.monotonic()))[0]]
    for each in descriptors:
        os.close(each)
    return not left


def test_a_pilot_is_heard_every_so_often(start, manager):
    start(manager.address, *FOREVER, every=0.1)
    first = manager.until(serving)
    began = time.monotonic()
    last = manager.until(lambda beat: beat.n == first.n + 10)
    assert 0.9 < time.monotonic() - began < 8  # not the 10 s of beats every second
    assert last.lease == LEASE
    assert last.node == socket.gethostname()
    assert last.started == first.started
    assert 0.9 < last.now - first.now < 8


def test_on_a_virtual_node_of_slurm_it_tells_the_name_that_slurm_has_for_it(start, manager, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n17")
    start(manager.address, *FOREVER)
    assert manager.until(serving).node == "n17"


def test_it_serves_once_its_command_says_so_and_what_changes_is_told_at_once(start, manager, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    start(manager.address, sys.executable, "-c", TELLING, "{status}", "{name}", pipe, every=1000)
    assert manager.until(lambda beat: True).state is State.STARTING
    with pipe.open("w", buffering=1) as told:
        began = time.monotonic()
        for status in ({"ready": True}, {"ready": True, "regions": [3], "frames": 9, "lag_s": 0.5, "message": "x"}):
            told.write(json.dumps(status) + "\n")
            beat = manager.until(lambda beat: True)
            assert beat.state is State.SERVING
        assert time.monotonic() - began < 20  # not 1000
        assert (beat.status.regions, beat.status.frames, beat.status.lag_s) == ((3,), 9, 0.5)


def test_words_of_the_command_are_filled_in(start, manager):
    start(manager.address, sys.executable, "-c", TELLING, "{status}", "I am {name}", "stdin")
    assert manager.until(lambda beat: beat.status.message).status.message == f"I am {LEASE}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_when_the_scheduler_takes_the_node_the_command_may_end_and_the_job_is_run_again(start, manager, number):
    pilot = start(manager.address, sys.executable, "-c", POLITE)
    manager.until(serving)
    command = pids(pilot)
    pilot.send_signal(number)
    manager.until(lambda beat: beat.state is State.DRAINING)
    last, _ = manager.until_ended(pilot, meanwhile=lambda: pilot.send_signal(number))  # as schedulers do
    assert (last.state, last.exit_code, last.status.message) == (State.ENDED, 3, "the scheduler takes the node")
    assert pilot.returncode == 85
    assert gone(command)


@pytest.mark.parametrize("do", [Do.DRAIN, Do.END])
def test_when_the_manager_says_so_it_goes_for_good(start, manager, do):
    pilot = start(manager.address, sys.executable, "-c", POLITE)
    manager.until(serving)
    command = pids(pilot)
    manager.do = do, "nobody needs it"
    manager.until(lambda beat: beat.state is State.DRAINING)
    last, said = manager.until_ended(pilot)
    assert (last.state, last.exit_code) == (State.ENDED, 3)
    assert (pilot.returncode, gone(command)) == (0, True)
    assert f"the manager says: {do}, nobody needs it" in said


def test_without_a_manager_it_goes_by_itself_and_says_so(start):
    pilot = start("tcp://127.0.0.1:9", sys.executable, "-c", POLITE, options=["--alone", "0.5"])
    command = pids(pilot)
    _, said = pilot.communicate(timeout=DEADLINE)
    assert (pilot.returncode, gone(command)) == (0, True)
    assert "tcp://127.0.0.1:9 was not heard of for 0.5 s" in said


def test_a_manager_that_is_away_for_less_than_that_is_waited_for_and_hears_what_is_so_now(start):
    with Manager() as before:
        pilot = start(before.address, *FOREVER, options=["--alone", "60"])
        before.until(serving)
    time.sleep(3)  # for which it is away
    with Manager(before.address) as after:
        (heard, *_) = after.poll(DEADLINE)
    assert -2 < heard.offset < 0.1
    assert pilot.poll() is None


@pytest.mark.parametrize(("ends", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_it_ends_as_its_command_ends(start, manager, ends, code):
    pilot = start(manager.address, "sh", "-c", ends)
    last, _ = manager.until_ended(pilot)
    assert (last.state, last.exit_code, pilot.returncode) == (State.ENDED, code, code)


def test_a_command_that_cannot_be_run_is_named(start, manager):
    pilot = start(manager.address, "no-such-program")
    last, said = manager.until_ended(pilot)
    assert (last.exit_code, pilot.returncode) == (127, 127)
    assert last.status.message == "no-such-program: No such file or directory"
    assert last.status.message in said


def test_whatever_happens_to_a_pilot_its_command_goes_with_it(start, manager):
    pilot = start(manager.address, sys.executable, "-c", STUBBORN)
    manager.until(serving)
    command, _ = descriptors = pids(pilot)
    pilot.kill()
    assert gone([command])
    signal.pidfd_send_signal(descriptors[1], signal.SIGKILL)  # which the command started is not ours to know of
    os.close(descriptors[1])


def test_a_command_that_does_not_end_is_killed_with_all_that_it_started(start, manager):
    pilot = start(manager.address, sys.executable, "-c", STUBBORN, options=["--grace", "0.3"])
    manager.until(serving)
    processes = pids(pilot)
    pilot.terminate()
    last, said = manager.until_ended(pilot)
    assert (last.exit_code, pilot.returncode) == (137, 85)
    assert gone(processes)
    assert "has not ended in 0.3 s" in said


def test_what_a_command_leaves_behind_is_killed(start, manager):
    pilot = start(manager.address, "sh", "-c", "sleep 1000 & echo pid $!; sleep 0.2")
    processes = pids(pilot)
    manager.until_ended(pilot)
    assert pilot.returncode == 0
    assert gone(processes)


def test_nothing_stays_on_the_node(start, manager, tmp_path):
    pilot = start(manager.address, "sh", "-c", "ls -d {status}* $(dirname {status}); sleep 0.1")
    manager.until_ended(pilot)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_answers_that_are_none_change_nothing(start):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger, router.rcvtimeo = 0, 1000 * DEADLINE
        port = router.bind_to_random_port("tcp://127.0.0.1")
        pilot = start(f"tcp://127.0.0.1:{port}", *FOREVER, options=["--alone", "3"])
        for junk in (b"", b"\xc1", b"x" * 10_000, pack(Answer(n=0))[:-3], pack(Answer(n=0, do="dance"))):
            who, _ = router.recv_multipart()
            router.send_multipart([who, junk])
            router.send_multipart([who, b"several", b"parts"])
            router.send_multipart([who, pack(Answer(n=0))])
        assert pilot.poll() is None
        while pilot.poll() is None:  # junk is no sign of life
            if router.poll(100):
                router.send_multipart([router.recv_multipart()[0], b"junk"])
        assert pilot.returncode == 0


STATUSES = [
    "",
    "{",
    "null",
    "[]",
    '{"ready": 1}',
    '{"regions": [9999]}',
    '{"lag_s": NaN}',
    '{"frames": 1e999}',
    "[" * 5000,
]


@pytest.mark.parametrize("text", [*STATUSES, '{"frames": ' + "9" * 5000 + "}", '{"message": "' + "x" * 300_000 + '"}'])
def test_a_status_that_cannot_be_read_is_none(tmp_path, text):
    path = tmp_path / "status"
    file = StatusFile(path)
    assert file.look() is None, "it is not there yet"
    path.write_text(text)
    assert file.look() is None
    path.write_text('{"ready": true, "frames": 3, "later": {}}')
    assert file.look().frames == 3
    assert file.look() is None, "nothing new"


@pytest.fixture
def keys(tmp_path):
    for name in ("manager", "pilot", "stranger"):
        make(tmp_path / "keys", name)
    allow(tmp_path / "keys", "pilot")
    return tmp_path / "keys"


def allow(keys, name):
    (keys / "allowed").mkdir(exist_ok=True)
    (keys / "allowed" / f"{name}.key").write_bytes((keys / f"{name}.key").read_bytes())


def test_with_a_key_it_is_heard(start, keys):
    with Manager(keys=ManagerKeys.read(keys / "manager.key_secret", keys / "allowed")) as manager:
        options = ["--secret-key", keys / "pilot.key_secret", "--manager-key", keys / "manager.key"]
        start(manager.address, *FOREVER, options=options)
        manager.until(serving)


def test_one_whose_key_is_not_known_knows_why_it_is_not_heard_and_is_heard_once_it_is_known(keys, monkeypatch):
    monkeypatch.setattr(line_module, "ANEW", 0.3)
    ours = PilotKeys.read(keys / "stranger.key_secret", keys / "manager.key")
    known = ManagerKeys.read(keys / "manager.key_secret", keys / "allowed")
    with Manager(keys=known) as manager, Line(manager.address, LEASE, ours) as line:
        deadline = time.monotonic() + DEADLINE
        while not line.trouble and time.monotonic() < deadline:
            line.hear()
            line.wait(0.05)
        assert line.trouble == "it does not know our key"
        allow(keys, "stranger")
        while not manager.poll(0.05) and time.monotonic() < deadline:
            line.hear()
            line.say(State.SERVING)
        line.wait(DEADLINE)
        assert line.hear()
        assert not line.trouble


@pytest.fixture
def dialling(tmp_path, keys):
    """A manager, with keys, that goes to its pilots, and what these are given."""
    with Manager(None, keys=ManagerKeys.read(keys / "manager.key_secret", keys / "allowed")) as manager:
        manager.file = file_of(tmp_path, LEASE)
        yield manager, ["--secret-key", keys / "pilot.key_secret", "--manager-key", keys / "manager.key"]


def test_a_pilot_that_is_dialled_is_heard_and_heeds_and_leaves_no_file(start, dialling):
    manager, options = dialling
    pilot = start(manager.file, *FOREVER, options=options)
    manager.until(serving)
    manager.do = Do.DRAIN, "nobody needs it"
    last, _ = manager.until_ended(pilot)
    assert (last.state, pilot.returncode) == (State.ENDED, 0)
    assert not manager.file.exists()


def test_one_that_is_started_again_elsewhere_is_dialled_there(start, dialling):
    manager, options = dialling
    first = start(manager.file, *FOREVER, options=options)
    manager.until(serving)
    first.kill()
    second = start(manager.file, *FOREVER, options=options)
    manager.until(lambda beat: beat.pid == second.pid)


def test_one_that_nobody_dials_goes_by_itself_and_says_so(start, dialling):
    manager, options = dialling
    pilot = start(manager.file, *FOREVER, options=[*options, "--alone", "0.5"])
    _, said = pilot.communicate(timeout=DEADLINE)
    assert pilot.returncode == 0
    assert f"the manager that reads {manager.file} was not heard of for 0.5 s" in said


def test_another_manager_may_dial_once_the_first_is_gone(start, dialling, keys):
    manager, options = dialling
    start(manager.file, *FOREVER, options=options)
    manager.until(serving)
    manager.close()
    with Manager(None, keys=ManagerKeys.read(keys / "manager.key_secret", keys / "allowed")) as after:
        after.file = manager.file
        after.until(serving)


def test_one_whose_key_is_not_known_is_heard_once_it_is_known_when_it_is_dialled_too(dialling, keys, monkeypatch):
    monkeypatch.setattr(line_module, "ANEW", 0.3)
    monkeypatch.setattr(hearing_module, "ANEW", 0.3)
    manager, _ = dialling
    ours = PilotKeys.read(keys / "stranger.key_secret", keys / "manager.key")
    with Line(Awaited("tcp://127.0.0.1", manager.file), LEASE, ours) as line:
        deadline = time.monotonic() + DEADLINE
        while not line.trouble and time.monotonic() < deadline:
            manager.go()
            assert not manager.poll(0.05)
            line.hear()
        assert line.trouble == "it does not know our key"
        allow(keys, "stranger")
        while not manager.poll(0.05) and time.monotonic() < deadline:
            manager.go()
            line.hear()
            line.say(State.SERVING)
        line.wait(DEADLINE)
        assert line.hear()


def test_a_pilot_listens_on_the_interface_that_it_is_told(start, manager, tmp_path):
    manager.file = file_of(tmp_path, LEASE)
    start(manager.file, *FOREVER, options=["--listen", "tcp://lo"])
    manager.until(serving)
    assert announced(manager.file).startswith("tcp://127.0.0.1:")


def test_options_that_do_not_go_together_are_refused(start, manager, keys):
    pilot = start(manager.address, *FOREVER, options=["--secret-key", keys / "pilot.key_secret"])
    assert "go together" in pilot.communicate(timeout=DEADLINE)[1]
    assert pilot.returncode == 2


def test_a_key_that_is_not_there_is_named_in_one_line(start, manager, keys):
    pilot = start(manager.address, *FOREVER, options=["--secret-key", "/none", "--manager-key", keys / "manager.key"])
    assert pilot.communicate(timeout=DEADLINE)[1] == "hpc-bridge: /none: no such file\n"
    assert pilot.returncode == 1


def test_a_pilot_loads_nothing_that_takes_its_time():
    code = "import sys, hpc_bridge.__main__, hpc_bridge.pilot; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    slow = {"numba", "numpy", "h5py", "parsl", "pydantic", "pint", "yaml", "rich", "asyncio", "sqlite3", "stream"}
    assert slow & set(loaded.stdout.split()) == set()


@pytest.mark.timeout(400)
def test_workers_of_pilots_that_come_and_go_give_the_result_of_one_that_nobody_disturbed(
    start, manager, tmp_path, qmap, frames
):
    undisturbed = result_of_frames(tmp_path, qmap, range(N_FRAMES))
    with ExitStack() as stack:
        plane = Plane(f"zmq://{free()}/8idi", stack, tmp_path, qmap)
        told = ("--source", plane.address, "--qmap", qmap, "--checkpoints", tmp_path / "checkpoints", "--threads", 1)
        worker = (sys.executable, "-m", "stream", "worker", *told, "--name", "{name}", "--status", "{status}")
        first = start(manager.address, *worker, lease="first")
        assert manager.until(lambda beat: True).state is State.STARTING
        waiting = manager.until(serving)
        assert waiting.status.regions == ()
        merger = plane.merger()
        plane.replay(frames, "200 Hz")
        manager.until(lambda beat: beat.status.regions == tuple(range(REGIONS)) and beat.status.frames > 100)
        first.terminate()
        asked = time.monotonic()
        ended = manager.until(lambda beat: beat.state is State.ENDED)
        assert time.monotonic() - asked < 20  # 0.4 s where little else runs
        assert (ended.exit_code, ended.status.regions) == (0, ())
        assert first.wait(DEADLINE) == 85
        start(manager.address, *worker, lease="next")
        assert_identical(plane.result(merger), undisturbed)


def trial(start, manager, *command, **options):
    told = [word for name, values in options.items() for value in values for word in (f"--{name}", value)]
    pilot = start(manager.address, *command, options=["--trial", *told])
    last, _ = manager.until_ended(pilot)
    assert last.state is State.ENDED
    return pilot.returncode, {finding.name: finding for finding in last.findings}


def test_a_trial_of_a_good_node_finds_nothing_wrong(start, manager, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as plane:
        address = f"127.0.0.1:{plane.getsockname()[1]}"
        where = {"writable": [tmp_path / "checkpoints"], "reach": [address]}
        code, findings = trial(start, manager, "sh", "-c", "echo xpcs-stream 0.1.0", **where)
    assert code == 0
    assert all(finding.ok for finding in findings.values())
    assert findings["sh -c echo xpcs-stream 0.1.0"].detail == "xpcs-stream 0.1.0"
    assert sys.version.split()[0] in findings["python"].detail
    assert f"{address} can be reached" in findings
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_trial_tells_all_that_is_wrong_and_why(start, manager):
    where = {"writable": ["/proc/none"], "reach": ["127.0.0.1:9", "nonsense"]}
    code, findings = trial(start, manager, "sh", "-c", "echo no module numba; exit 4", **where)
    assert code == 1
    assert {finding.detail for finding in findings.values() if not finding.ok} == {
        "ended with 4: no module numba",
        "No such file or directory",
        "Connection refused",
        "invalid literal for int() with base 10: 'nonsense'",
    }


def test_a_trial_whose_command_cannot_be_run_says_so(start, manager):
    _, findings = trial(start, manager, "no-such-program")
    assert findings["no-such-program"].detail == "ended with 127: no-such-program: No such file or directory"


def test_a_trial_that_the_manager_ends_leaves_nothing_behind(start, manager):
    pilot = start(manager.address, *FOREVER, options=["--trial"])
    manager.do = Do.END, "enough"
    manager.until(lambda beat: True)
    assert pilot.wait(DEADLINE) == 1
