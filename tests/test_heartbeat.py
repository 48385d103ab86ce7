"""What pilots and their manager say to each other, and what the manager makes of it whatever comes."""

import os
import time
from contextlib import contextmanager, suppress

import msgpack
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from hpc_bridge import hearing as hearing_module
from hpc_bridge.curve import ManagerKeys
from hpc_bridge.dialing import Addresses, announce, announced, file_of
from hpc_bridge.errors import ConfigError
from hpc_bridge.hearing import Hearing
from hpc_bridge.heartbeat import (
    MAX_BYTES,
    MAX_FINDINGS,
    MAX_MESSAGE,
    MAX_REGIONS,
    VERSION,
    Answer,
    Do,
    Finding,
    Heartbeat,
    State,
    Status,
    answer,
    heartbeat,
    pack,
)
from stream.curve import make

DEADLINE = 60
LEASE = "0123456789ab"


def beat(**changes):
    return Heartbeat(
        **{"lease": LEASE, "node": "n1", "pid": 7, "n": 3, "state": State.SERVING, "started": 1e9, "now": 1e9 + 5}
        | changes
    )


def fields(**changes):
    """A heartbeat as a map."""
    return msgpack.unpackb(pack(beat())) | changes


FULL = beat(
    state=State.ENDED,
    exit_code=0,
    status=Status(ready=True, regions=(0, 4095), frames=2**40, lag_s=0.25, message="µs"),
    findings=(Finding(name="reach", ok=False, detail="refused", seconds=0.5),),
)


@pytest.mark.parametrize("said", [beat(), FULL])
def test_a_heartbeat_comes_as_it_was_said(said):
    assert heartbeat(pack(said)) == said


def test_an_answer_comes_as_it_was_said():
    said = Answer(n=3, do=Do.DRAIN, why="another one is up")
    assert answer(pack(said)) == said


def test_what_a_later_version_adds_is_ignored():
    assert heartbeat(msgpack.packb(fields(gpu="H100", status={"regions": [1], "power": 3}))).status.regions == (1,)


def test_texts_that_are_too_long_are_cut_where_they_are_said():
    said = beat(node="n" * 9999, status=Status(message="m" * 9999))
    assert len(heartbeat(pack(said)).status.message) == MAX_MESSAGE


def test_the_longest_heartbeat_fits():
    long = "\U0001f600" * 9999
    findings = (Finding(name=long, ok=True, detail=long, seconds=1.0),) * MAX_FINDINGS
    status = Status(regions=(MAX_REGIONS - 1,) * MAX_REGIONS, message=long)
    assert len(pack(beat(node=long, status=status, findings=findings))) <= MAX_BYTES


def test_what_people_will_read_holds_nothing_that_moves_their_cursor():
    assert heartbeat(pack(beat(status=Status(message="a\x1b[2Jb\nc")))).status.message == "a [2Jb c"


WRONG = [
    (b"", "not MessagePack"),
    (b"\xc1", "not MessagePack"),
    (b"\xdd\xff\xff\xff\xff", "not MessagePack"),
    (b"\x91" * 5000, "not MessagePack"),
    (b"\x80" * 2, "not MessagePack"),
    (b" " * (MAX_BYTES + 1), "are more than"),
    (msgpack.packb([1]), "what was said"),
    (msgpack.packb({}), "version v = None"),
    (msgpack.packb(fields(v=VERSION + 1)), "version v = 2"),
    (msgpack.packb(fields(lease="")), "lease"),
    (msgpack.packb(fields(lease=7)), "lease"),
    (msgpack.packb(fields(lease="x" * 300)), "lease"),
    (msgpack.packb(fields(lease=b"bytes")), "lease"),
    (msgpack.packb(fields(node=None)), "node"),
    (msgpack.packb(fields(pid=-1)), "pid"),
    (msgpack.packb(fields(pid=True)), "pid"),
    (msgpack.packb(fields(n=2**60)), "n is"),
    (msgpack.packb(fields(n=1.0)), "n is"),
    (msgpack.packb(fields(state="happy")), "happy"),
    (msgpack.packb(fields(started=float("nan"))), "started"),
    (msgpack.packb(fields(now=float("inf"))), "now"),
    (msgpack.packb(fields(now=2**62)), "now"),
    (msgpack.packb(fields(now="12:00")), "now"),
    (msgpack.packb(fields(exit_code=256)), "exit_code"),
    (msgpack.packb(fields(exit_code="0")), "exit_code"),
    (msgpack.packb(fields(status=None)), "status"),
    (msgpack.packb(fields(status={"regions": [MAX_REGIONS]})), "a region"),
    (msgpack.packb(fields(status={"regions": [0.5]})), "a region"),
    (msgpack.packb(fields(status={"regions": {}})), "regions"),
    (msgpack.packb(fields(status={"regions": [1] * (MAX_REGIONS + 1)})), "not MessagePack"),
    (msgpack.packb(fields(status={"lag_s": -float("inf")})), "lag_s"),
    (msgpack.packb(fields(status={"ready": 1})), "ready"),
    (msgpack.packb(fields(status={"message": "x" * (MAX_MESSAGE + 1)})), "message"),
    (msgpack.packb(fields(findings=[{}] * (MAX_FINDINGS + 1))), "findings"),
    (msgpack.packb(fields(findings=[[]])), "a finding"),
    (msgpack.packb(fields(findings=[{"name": "x", "ok": True, "seconds": None}])), "seconds"),
]


@pytest.mark.parametrize(("packed", "words"), WRONG)
def test_what_is_no_heartbeat_is_refused_and_named(packed, words):
    with pytest.raises(ValueError, match=words):
        heartbeat(packed)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.sampled_from(list(fields())), ANYTHING), st.sampled_from([heartbeat, answer]))
def test_whatever_stands_in_a_field_it_is_read_or_refused(changes, read):
    with suppress(ValueError):
        read(msgpack.packb(fields(**changes)))


@given(st.binary(max_size=200), st.integers(0, 200))
def test_whatever_bytes_come_they_are_read_or_refused(junk, at):
    whole = pack(FULL)
    for packed in (junk, whole[:at] + junk, whole[:at] + junk + whole[at + len(junk) :]):
        with suppress(ValueError):
            heartbeat(packed)


@contextmanager
def hearing(answer=lambda lease: (Do.GO_ON, ""), **options):
    with Hearing("tcp://127.0.0.1:*", answer, **options) as ear:
        yield ear


@contextmanager
def dealer(address, **options):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        for name, value in options.items():
            setattr(socket, name, value)
        socket.connect(address)
        yield socket


def heard(ear, n=1):
    """Poll until so many heartbeats came."""
    found, deadline = [], time.monotonic() + DEADLINE
    while len(found) < n and time.monotonic() < deadline:
        found += ear.poll(0.1)
    assert len(found) == n
    return found


def answered(socket):
    assert socket.poll(1000 * DEADLINE)
    return answer(socket.recv())


def test_each_heartbeat_is_answered_at_once_with_what_its_lease_is_to_do():
    asked = []

    def wanted(lease):
        asked.append(lease)
        return Do.DRAIN, "its walltime ends"

    with hearing(wanted) as ear, dealer(ear.address) as pilot:
        pilot.send(pack(beat(n=41)))
        heard(ear)
        assert answered(pilot) == Answer(n=41, do=Do.DRAIN, why="its walltime ends")
    assert asked == [LEASE]


def test_the_newest_heartbeat_of_each_lease_is_kept_with_when_it_came():
    with hearing() as ear, dealer(ear.address) as pilot:
        for n, lease in enumerate(["one", "other", "one"]):
            pilot.send(pack(beat(n=n, lease=lease)))
        before = time.time()
        heard(ear, 3)
        assert {lease: each.heartbeat.n for lease, each in ear.heard.items()} == {"other": 1, "one": 2}
        assert before <= ear.heard["one"].at <= time.time()


def test_a_clock_that_is_wrong_is_noticed():
    with hearing() as ear, dealer(ear.address) as pilot:
        pilot.send(pack(beat(now=time.time() + 100, started=time.time() + 40)))
        (found,) = heard(ear)
        assert found.offset == pytest.approx(100, abs=20)
        assert found.began == pytest.approx(time.time() - 60, abs=20)


def test_polling_returns_in_its_time_when_nobody_speaks():
    with hearing() as ear:
        began = time.monotonic()
        assert ear.poll(0) == []
        assert ear.poll(0.2) == []
        assert 0.2 <= time.monotonic() - began < 10


def test_hostile_messages_are_counted_and_change_nothing_for_others():
    with hearing() as ear, dealer(ear.address) as hostile, dealer(ear.address) as pilot:
        messages = [packed for packed, _ in WRONG if len(packed) <= MAX_BYTES]
        for packed in messages:
            hostile.send(packed)
        hostile.send_multipart([pack(beat()), b"more"])
        hostile.send_multipart([b""] * 1000)
        deadline = time.monotonic() + DEADLINE
        while ear.n_rejected < len(messages) + 2 and time.monotonic() < deadline:
            assert ear.poll(0.1) == []
        assert ear.n_rejected == len(messages) + 2
        pilot.send(pack(beat()))
        heard(ear)
        assert answered(pilot).do == Do.GO_ON


def test_who_sends_more_than_a_heartbeat_can_be_is_disconnected():
    with hearing() as ear, dealer(ear.address) as hostile:
        monitor = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        hostile.send(b"x" * (MAX_BYTES + 1))
        assert monitor.poll(1000 * DEADLINE)
        assert ear.poll(0) == []
        hostile.disable_monitor()
        monitor.close()


def test_leases_that_nobody_knows_fill_no_memory(monkeypatch):
    monkeypatch.setattr(hearing_module, "MOST_LEASES", 3)
    with hearing() as ear, dealer(ear.address) as pilot:
        for n in range(5):
            pilot.send(pack(beat(lease=f"{n}")))
        heard(ear, 5)
        assert list(ear.heard) == ["2", "3", "4"]


@contextmanager
def waiting(**options):
    """A pilot that is to be dialled, and where."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        yield socket, f"tcp://127.0.0.1:{port}"


def test_pilots_that_wait_are_dialled_and_left_as_is_said():
    with Hearing(None, lambda lease: (Do.GO_ON, "")) as ear, waiting() as (one, first), waiting() as (other, second):
        ear.dial({LEASE: first, "stale": first, "other": second})
        one.send(pack(beat()))
        other.send(pack(beat(lease="other")))
        assert {each.heartbeat.lease for each in heard(ear, 2)} == {LEASE, "other"}
        assert answered(one).n == answered(other).n == 3
        ear.dial({LEASE: first})
        one.send(pack(beat(n=4)))
        other.sndtimeo = 500
        with suppress(zmq.Again):
            other.send(pack(beat(n=4, lease="other")))
        assert [each.heartbeat.lease for each in heard(ear)] == [LEASE]
        assert ear.poll(0.3) == []


def test_an_address_that_is_none_is_passed_by():
    with Hearing(None, lambda lease: (Do.GO_ON, "")) as ear, waiting() as (pilot, address):
        ear.dial({"one": "tcp://127.0.0.1:99999", "two": "nonsense", LEASE: address})
        pilot.send(pack(beat()))
        heard(ear)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"tcp://n1:5570", b"tcp://n1:0\n", b"tcp://n1:555555\n", b"ipc:///run/x\n", b"tcp://n1;x:1\n", b"\xff\n",
        b"tcp://n1:5570\ntcp://n2:1\n", b"tcp://" + b"n" * 400 + b":1\n", b"x" * 10**6,
    ],
)  # fmt: skip
def test_what_lies_in_place_of_an_address_and_is_none_is_passed_by(tmp_path, text):
    file = file_of(tmp_path, LEASE)
    file.write_bytes(text)
    assert announced(file) is None
    announce(file, "tcp://n1.alcf.anl.gov:5570")
    assert announced(file) == "tcp://n1.alcf.anl.gov:5570"
    assert list(tmp_path.iterdir()) == [file]


def test_neither_links_nor_pipes_nor_directories_are_read_for_an_address(tmp_path):
    announce(tmp_path / "elsewhere", "tcp://n1:5570")
    assert announced(tmp_path / "elsewhere") == "tcp://n1:5570"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    assert [announced(tmp_path / name) for name in ("link", "pipe", "", "none")] == [None] * 4


def test_addresses_are_those_of_the_leases_that_are_asked_for_and_files_of_others_are_removed(tmp_path):
    for lease in ("one", "two", "three"):
        announce(file_of(tmp_path, lease), f"tcp://{lease}:1")
    addresses = Addresses(tmp_path)
    until(lambda: addresses.look({"one", "two"}) == {"one": "tcp://one:1", "two": "tcp://two:1"})
    assert addresses.look({"one"}) == {"one": "tcp://one:1"}
    until(lambda: addresses.look({"one"}) and not file_of(tmp_path, "two").exists())
    assert file_of(tmp_path, "three").exists()


def until(is_so):
    deadline = time.monotonic() + DEADLINE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_of_two_pilots_with_one_lease_the_one_that_began_later_has_it():
    now = time.time()
    early = beat(node="lost", started=now - 100, now=now)
    late = beat(node="next", started=now - 500, now=now - 490)  # 10 s ago, by a clock that is slow
    with hearing() as ear, dealer(ear.address) as lost, dealer(ear.address) as successor:
        lost.send(pack(early))
        heard(ear)
        assert answered(lost).do == Do.GO_ON
        successor.send(pack(late))
        heard(ear)
        assert answered(successor).do == Do.GO_ON
        lost.send(pack(early))
        while not lost.poll(0):
            assert ear.poll(0.1) == [], "it does not count"
        assert answered(lost) == Answer(n=3, do=Do.END, why="the pilot on next has this lease now")
        assert ear.heard[LEASE].heartbeat.node == "next"


def test_a_pilot_that_comes_again_under_its_identity_is_let_in():
    with hearing() as ear, dealer(ear.address, identity=b"pilot") as before:
        before.send(pack(beat(n=1)))
        heard(ear)
        with dealer(ear.address, identity=b"pilot") as after:
            after.send(pack(beat(n=2)))
            heard(ear)
            assert answered(after).n == 2


def test_an_address_that_cannot_be_listened_on_is_named():
    with hearing() as ear, pytest.raises(ConfigError, match=ear.address):
        Hearing(ear.address, lambda lease: (Do.GO_ON, ""))


def test_listening_beyond_this_machine_without_keys_is_warned_of(caplog):
    with Hearing("tcp://0.0.0.0:*", lambda lease: (Do.GO_ON, "")):
        assert "may claim to be a pilot" in caplog.text


@pytest.fixture
def keys(tmp_path):
    for name in ("manager", "pilot", "stranger"):
        make(tmp_path, name)
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "pilot.key").write_bytes((tmp_path / "pilot.key").read_bytes())
    return tmp_path


def curve(keys, name):
    public, secret = zmq.auth.load_certificate(keys / f"{name}.key_secret")
    manager, _ = zmq.auth.load_certificate(keys / "manager.key")
    return {"curve_publickey": public, "curve_secretkey": secret, "curve_serverkey": manager}


def test_with_keys_only_those_that_are_allowed_are_heard(keys):
    ours = ManagerKeys.read(keys / "manager.key_secret", keys / "allowed")
    with (
        hearing(keys=ours) as ear,
        dealer(ear.address) as without,
        dealer(ear.address, **curve(keys, "stranger")) as stranger,
        dealer(ear.address, **curve(keys, "pilot")) as pilot,
    ):
        without.send(pack(beat(node="without")))
        stranger.send(pack(beat(node="stranger")))
        assert ear.poll(0.5) == []
        pilot.send(pack(beat(node="pilot")))
        assert heard(ear)[0].heartbeat.node == "pilot"
        assert answered(pilot).do == Do.GO_ON


@pytest.mark.parametrize("name", ["manager.key", "nothing", "key"])
def test_a_key_that_is_none_is_named(keys, name):
    (keys / "key").write_text("not a key")
    with pytest.raises(ConfigError, match=name):
        ManagerKeys.read(keys / name, keys / "allowed")


def test_a_secret_key_that_others_may_read_is_refused(keys):
    (keys / "manager.key_secret").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ManagerKeys.read(keys / "manager.key_secret", keys / "allowed")
