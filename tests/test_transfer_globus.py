"""Files by Globus: the unmodified library against a FAKE of the service on loopback (tests/fake_globus.py)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import PurePosixPath
from threading import Event
from uuid import UUID

import pytest

from hpc_bridge.errors import ConfigError
from hpc_bridge.transfer import Place, State, TransferRefused
from hpc_bridge.transfer_command import login
from hpc_bridge.transfer_config import Globus
from hpc_bridge.transfer_globus import GlobusTransfer
from hpc_bridge.transfer_mover import Do, Mover, carry_out
from hpc_bridge.transfer_record import Moves
from hpc_bridge.transfer_run import run
from tests.fake_globus import CLIENT, DATA_ACCESS, HOLD_REPLY, LOSE_REPLY, SECRET, FakeGlobus, error
from tests.kafka import free_ports
from tests.transfers import WITHIN, Driven, make_request

BEAMLINE = "c5a1b2c3-0000-4000-8000-00000000000a"
CENTRE = "c5a1b2c3-0000-4000-8000-00000000000b"

CHILD = """
import sys, threading, time
from pathlib import Path
from hpc_bridge.transfer import Request
from hpc_bridge.transfer_config import Globus
from hpc_bridge.transfer_globus import GlobusTransfer
from hpc_bridge.transfer_mover import Mover
from hpc_bridge.transfer_record import Moves
from hpc_bridge.transfer_run import run

settings, path, request = sys.argv[1:]
with GlobusTransfer(Globus.model_validate_json(settings)) as transfer, Moves.open(Path(path)) as moves:
    mover = Mover(moves, transfer.most_active, poll=0.02, backoff=0.05)
    mover.add(Request.model_validate_json(request), 0, time.time())
    run(mover, transfer, threading.Event(), until_done=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    with FakeGlobus({BEAMLINE: tmp_path / "data", CENTRE: tmp_path / "centre"}) as fake:
        for name, value in fake.environment.items():
            monkeypatch.setenv(name, value)
        yield fake


@pytest.fixture
def settings(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    return Globus(client_id=CLIENT, client_secret=secret, timeout=2)


@pytest.fixture
def driven(fake, settings, tmp_path):
    with GlobusTransfer(settings) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        yield driven
        driven.moves.close()


@pytest.fixture
def request_of(tmp_path):
    def request_of(name="42", **changes):
        return make_request(
            tmp_path,
            name,
            source=Place(endpoint=BEAMLINE, path=PurePosixPath("/") / name),
            destination=Place(endpoint=CENTRE, path=PurePosixPath("/xpcs") / name),
            **changes,
        )

    return request_of


def has_arrived(tmp_path, request):
    """And is still where it was."""
    return all(
        (tmp_path / "centre/xpcs" / request.run / file.name).read_bytes()
        == (tmp_path / "data" / request.run / file.name).read_bytes()
        for file in request.files
    )


def test_files_arrive_and_only_then_may_the_source_go(driven, fake, request_of, tmp_path):
    fake.going.clear()
    move = driven.add(request_of())
    driven.until(lambda: driven.moves.get(move).state is State.ACTIVE)
    assert not driven.moves.get(move).may_release
    fake.going.set()
    done = driven.until_done(move)
    assert (done.bytes, done.files, done.faults) == (100_003, 2, 0)
    assert has_arrived(tmp_path, done.request)


def test_the_document_leaves_nothing_to_defaults_of_the_service(driven, fake, request_of):
    request = request_of("scan_7", beamline="8idi")
    driven.until_done(driven.add(request))
    [document] = fake.documents
    [first, *_] = document.pop("DATA")
    said = {key: value for key, value in document.items() if key not in ("submission_id", "label", "deadline")}
    assert said == {
        "DATA_TYPE": "transfer",
        "source_endpoint": BEAMLINE,
        "destination_endpoint": CENTRE,
        "sync_level": 3,
        "verify_checksum": True,
        "preserve_timestamp": False,
        "encrypt_data": True,
        "skip_source_errors": False,
        "fail_on_quota_errors": True,
        "delete_destination_extra": False,
        "notify_on_succeeded": False,
        "notify_on_failed": False,
        "notify_on_inactive": False,
    }
    assert document["label"].endswith(" 8idi scan_7")
    assert document["deadline"].endswith("+00:00")
    assert first == {
        "DATA_TYPE": "transfer_item",
        "source_path": "/scan_7/scan_7.h5",
        "destination_path": "/xpcs/scan_7/scan_7.h5",
        "recursive": False,
        "external_checksum": request.files[0].sha256,
        "checksum_algorithm": "sha256",
    }


def test_a_lost_reply_is_asked_for_again_and_there_is_one_task(driven, fake, request_of, tmp_path):
    fake.answers["transfer"].extend([LOSE_REPLY] * 4)  # twice as often as the library tries
    done = driven.until_done(driven.add(request_of()))
    assert fake.heard.count("transfer") == 5
    assert len(fake.tasks) == 1
    assert has_arrived(tmp_path, done.request)


def test_a_task_whose_reply_was_lost_is_found_though_its_document_is_refused_now(driven, fake, request_of):
    fake.answers["transfer"].extend([LOSE_REPLY, LOSE_REPLY, error(400, "ClientError.BadRequest", "of another day")])
    assert driven.until_done(driven.add(request_of())).attempt == 1
    assert len(fake.tasks) == 1


def test_an_old_token_is_renewed_once_and_nobody_notices(driven, fake, request_of):
    fake.going.clear()
    move = driven.add(request_of())
    driven.until(lambda: driven.moves.get(move).state is State.ACTIVE)
    fake.tokens.clear()
    fake.going.set()
    driven.until_done(move)
    assert fake.n_tokens == 2
    assert {state for state, _, _ in driven.seen} <= {State.QUEUED, State.ACTIVE}


def test_a_secret_that_is_no_more_good_stalls_requests_until_it_is(fake, settings, request_of, tmp_path):
    settings.client_secret.write_text("an old secret")
    with GlobusTransfer(settings) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        move = driven.add(request_of())
        stalled = driven.until_said(move, "401", "check the client and its secret")
        assert stalled.state is State.STALLED
        driven.moves.close()
    settings.client_secret.write_text(SECRET)
    with GlobusTransfer(settings) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        driven.until_done(move)
        driven.moves.close()


def test_a_scope_that_nobody_knows_stalls_requests_rather_than_lose_them(driven, fake, request_of):
    fake.answers["token"].append((400, {"error": "unknown_scope"}, {}))
    move = driven.add(request_of())
    assert driven.until_said(move, "unknown_scope").state is State.STALLED
    driven.step(600)
    driven.until_done(move)


def test_a_consent_that_is_wanted_is_named_with_what_gives_it(driven, fake, request_of):
    scope = DATA_ACCESS.format(CENTRE)
    fake.answers["transfer"].append(error(403, "ConsentRequired", "Missing consent", required_scopes=[scope]))
    move = driven.add(request_of())
    stalled = driven.until_said(move, scope, "hpc-bridge login")
    assert stalled.state is State.STALLED
    assert not any(driven.step() for _ in range(10))  # nobody is bothered meanwhile
    driven.step(600)
    driven.until_done(move)


def test_the_service_is_left_alone_for_as_long_as_it_asked(driven, fake, request_of):
    fake.answers["transfer"].append(error(429, "TooManyRequests", "slower", {"Retry-After": "60"}))
    move = driven.add(request_of())
    driven.until_said(move, "429")
    heard = len(fake.heard)
    driven.step(59)
    assert len(fake.heard) == heard
    driven.step(1)
    driven.until_done(move)
    assert len(fake.tasks) == 1


@pytest.mark.parametrize("operation", ["token", "submission_id", "transfer", "task", "ls"])
@pytest.mark.parametrize(
    "answer",
    [
        error(500, "InternalError"),
        error(502, "ExternalError.DirListingFailed.GCDisconnected", "not connected"),
        error(503, "ServiceUnavailable", "down for maintenance", {"Retry-After": "3"}),
        (503, "<html>down for maintenance</html>", {}),
        error(409, "TooManyPendingJobs"),
        (200, {"DATA_TYPE": "of something else"}, {}),
    ],
    ids=["500", "502", "503", "maintenance page", "busy", "nonsense"],
)
def test_what_passes_is_waited_for(driven, fake, request_of, operation, answer):
    fake.answers[operation].extend([answer, answer])
    driven.until_done(driven.add(request_of()))
    assert len(fake.tasks) == 1
    assert {state for state, _, _ in driven.seen} <= {State.QUEUED, State.ACTIVE}


def test_no_connection_loses_nothing(settings, request_of, tmp_path, monkeypatch):
    [port] = free_ports(1)
    for service in ("TRANSFER", "AUTH"):
        monkeypatch.setenv(f"GLOBUS_SDK_SERVICE_URL_{service}", f"http://127.0.0.1:{port}/")
    with GlobusTransfer(settings) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        move = driven.add(request_of())
        assert driven.until_said(move, "refused").state is State.QUEUED
        with FakeGlobus({BEAMLINE: tmp_path / "data", CENTRE: tmp_path / "centre"}, port):
            driven.until_done(move)
        driven.moves.close()


def test_an_endpoint_that_forbids_stalls_a_request_and_is_asked_again(driven, fake, request_of):
    fake.answers["ls"].append(error(502, "ExternalError.DirListingFailed.PermissionDenied", "not yours"))
    move = driven.add(request_of())
    assert driven.until_said(move, "PermissionDenied", "not yours").state is State.STALLED
    assert not driven.moves.get(move).may_release
    driven.step(600)
    driven.until_done(move)


def test_a_malformed_request_fails_at_once_and_stays_on_record(driven, fake, request_of):
    fake.answers["transfer"].append(error(400, "ClientError.BadRequest", "no such field"))
    move = driven.add(request_of())
    over = driven.until_over(move)
    assert (over.state, over.may_release) == (State.FAILED, False)
    assert "no such field" in over.message
    driven.add(over.request)
    driven.until_done(move)


@pytest.mark.parametrize(("behaviour", "word"), [("pause", "PAUSED_BY_ADMIN"), ("connect", "CONNECT_FAILED")])
def test_a_task_that_waits_for_somebody_is_stalled_whatever_its_status(driven, fake, request_of, behaviour, word):
    fake.behaviours.append(behaviour)
    move = driven.add(request_of())
    driven.until(lambda: driven.moves.get(move).state is State.STALLED)
    stalled = driven.moves.get(move)
    assert (stalled.nice_status, stalled.message) == (word, "as it was told")
    assert stalled.stalled_since is not None
    fake.resume()
    assert driven.until_done(move).stalled_since is None


def test_what_failed_is_sent_again_under_a_new_id_and_only_what_lacks(driven, fake, request_of, tmp_path):
    fake.behaviours.append("fail")  # once the first file is there
    done = driven.until_done(driven.add(request_of()))
    assert done.attempt == 2
    assert len({document["submission_id"] for document in fake.documents}) == 2
    assert fake.tasks[done.task]["files_skipped"] == 1
    assert has_arrived(tmp_path, done.request)


def test_a_byte_that_changed_on_the_way_is_sent_again(driven, fake, request_of, tmp_path):
    fake.behaviours.append("corrupt")
    move = driven.add(request_of())
    driven.until_said(move, "CHECKSUM_MISMATCH")
    assert not driven.moves.get(move).may_release
    assert driven.until_done(move).attempt == 2
    assert has_arrived(tmp_path, driven.moves.get(move).request)


def test_a_byte_that_changed_unseen_is_found_where_the_destination_is_mounted(fake, settings, request_of, tmp_path):
    mounted = settings.model_copy(update={"mounted": {UUID(CENTRE): tmp_path / "centre"}})
    fake.behaviours.append("corrupt unseen")
    with GlobusTransfer(mounted) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        move = driven.add(request_of())
        driven.until_said(move, "on arrival", "sha256")
        assert not driven.moves.get(move).may_release
        assert driven.until_done(move).attempt == 2
        assert has_arrived(tmp_path, driven.moves.get(move).request)
        driven.moves.close()


def test_what_the_service_calls_done_and_is_not_there_is_sent_again(driven, fake, request_of, tmp_path):
    fake.answers["ls"].append((200, {"DATA_TYPE": "file_list", "DATA": []}, {}))
    move = driven.add(request_of(sizes=(1000,)))
    driven.until_said(move, "on arrival: 42.h5: not there")
    assert driven.until_done(move).attempt == 2


def test_a_task_that_the_service_forgot_is_begun_again(driven, fake, request_of, tmp_path):
    fake.going.clear()
    move = driven.add(request_of())
    driven.until(lambda: driven.moves.get(move).task is not None)
    fake.expire(driven.moves.get(move).task)
    driven.until(lambda: driven.moves.get(move).attempt == 2)
    fake.going.set()
    driven.until_done(move)


def test_a_task_that_is_only_unknown_by_its_id_is_found_by_its_label(driven, fake, request_of):
    fake.going.clear()
    move = driven.add(request_of())
    driven.until(lambda: driven.moves.get(move).task is not None)
    real = driven.moves.get(move).task
    driven.mover._put(driven.moves.submitted(move, "00000000-0000-4000-8000-000000000000", driven.now))
    driven.until(lambda: driven.moves.get(move).task == real)
    fake.going.set()
    driven.until_done(move)
    assert len(fake.tasks) == 1


def test_a_task_that_is_called_unknown_and_is_listed_is_not_begun_twice(driven, fake, request_of):
    fake.going.clear()
    move = driven.add(request_of())
    driven.until(lambda: driven.moves.get(move).state is State.ACTIVE)
    fake.answers["task"].append(error(404, "ClientError.NotFound", "Could not find task"))
    driven.until_said(move, "unknown", "listed")
    fake.going.set()
    driven.until_done(move)
    assert len(fake.tasks) == 1


def test_who_cancels_is_obeyed_by_the_service_too(driven, fake, request_of):
    fake.going.clear()
    move = driven.add(request_of())
    driven.until(lambda: driven.moves.get(move).state is State.ACTIVE)
    driven.mover.cancel(move, "the sample was upside down")
    driven.step()
    fake.going.set()
    over = driven.until_over(move)
    assert (over.state, over.message, over.may_release) == (State.CANCELED, "the sample was upside down", False)
    assert fake.tasks[over.task]["fatal_error"]["code"] == "CANCELED"


def test_a_cancel_finds_a_task_whose_reply_was_lost(driven, fake, request_of):
    fake.going.clear()
    fake.answers["transfer"].extend([LOSE_REPLY] * 2)
    move = driven.add(request_of())
    driven.until(lambda: len(fake.tasks) == 1)
    driven.mover.cancel(move, "the sample was upside down")
    driven.until(lambda: "cancel" in fake.heard, 1)
    fake.going.set()
    assert driven.until_over(move).state is State.CANCELED
    assert [task["status"] for task in fake.tasks.values()] == ["FAILED"]


def test_what_somebody_else_canceled_is_not_begun_again(driven, fake, request_of):
    fake.behaviours.append("cancel")
    assert driven.until_over(driven.add(request_of())).state is State.CANCELED
    assert len(fake.tasks) == 1


def test_a_deadline_ends_the_task_and_says_so(driven, fake, request_of):
    fake.going.clear()
    move = driven.add(request_of(within=50))
    driven.until(lambda: driven.moves.get(move).state is State.ACTIVE)
    driven.step(51)
    fake.going.set()
    over = driven.until_over(move)
    assert (over.state, over.may_release) == (State.FAILED, False)
    assert "deadline" in over.message
    assert [task["status"] for task in fake.tasks.values()] == ["FAILED"]


def test_twenty_requests_of_three_beamlines_arrive_once_each_in_their_order(fake, settings, request_of, tmp_path):
    requests = [request_of(f"r{n}", beamline=f"{n % 3}id", sizes=(1000 + n,)) for n in range(20)]
    priority = {request.run: number * 7 % 5 for number, request in enumerate(requests)}
    with GlobusTransfer(settings) as transfer, Moves.open(tmp_path / "moves") as moves:
        mover = Mover(moves, transfer.most_active, poll=0.02, backoff=0.05)
        for request in requests:
            mover.add(request, priority[request.run], time.time())
        run(mover, transfer, Event(), until_done=True)
        assert [move.state for move in moves.all()] == [State.DONE] * 20
    begun = [document["label"].split()[-1] for document in fake.documents]
    assert sorted(begun) == sorted(request.run for request in requests)
    assert 1 <= fake.most_active <= 3
    assert all(priority[early] >= priority[late] for early, late in zip(begun, begun[3:], strict=False))
    assert all(has_arrived(tmp_path, request) for request in requests)


@pytest.mark.parametrize("operation", ["submission_id", "transfer", "task", "ls"])
def test_whoever_is_killed_goes_on_with_the_same_task(fake, settings, request_of, tmp_path, operation):
    request = request_of()
    words = [
        sys.executable,
        "-c",
        CHILD,
        settings.model_dump_json(),
        str(tmp_path / "moves"),
        request.model_dump_json(),
    ]
    fake.answers[operation].append(HOLD_REPLY)
    with subprocess.Popen(words) as first:
        end = time.monotonic() + WITHIN
        while fake.heard.count(operation) < 1:
            assert time.monotonic() < end
            os.sched_yield()
        first.send_signal(signal.SIGKILL)
    subprocess.run(words, check=True, timeout=WITHIN)
    assert len(fake.tasks) == 1
    assert has_arrived(tmp_path, request)
    with Moves.look(tmp_path / "moves") as moves:
        [move] = moves.all()
    assert (move.state, move.attempt) == (State.DONE, 1)


@pytest.mark.parametrize("was_asked", [True, False], ids=["asked", "not asked"])
def test_it_may_be_killed_before_and_after_everything_it_asks(fake, settings, request_of, tmp_path, was_asked):
    with GlobusTransfer(settings) as transfer:
        for killed_at in range(WITHIN):
            request = request_of(f"k{killed_at}", sizes=(10,))
            first = Driven(tmp_path / f"moves{killed_at}", transfer)
            move = first.add(request)
            n_orders = 0
            while n_orders < killed_at and first.mover.open_moves:
                n_orders += len(first.step())
            for order in first.mover.orders(first.now + 1):
                if was_asked:
                    carry_out(order, transfer)
            first.moves.close()
            second = Driven(tmp_path / f"moves{killed_at}", transfer)
            assert second.until_done(move).attempt == 1
            second.moves.close()
            assert has_arrived(tmp_path, request)
            assert len(fake.tasks) == killed_at + 1
            if n_orders < killed_at:
                return
    pytest.fail("it asked for ever")


def test_a_person_who_has_not_logged_in_is_told_how(fake, request_of, tmp_path):
    person = Globus(client_id=CLIENT, tokens=tmp_path / "tokens")
    with GlobusTransfer(person) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        assert driven.until_said(driven.add(request_of()), "hpc-bridge login").state is State.STALLED
        driven.moves.close()


def test_login_tries_what_a_client_may(fake, settings, tmp_path, capsys):
    file = tmp_path / "globus.yaml"
    file.write_text(f"client_id: {CLIENT}\nclient_secret: {settings.client_secret}\nmapped_collections: [{CENTRE}]\n")
    login(file)
    assert "knows us" in capsys.readouterr().err
    fake.answers["task_list"].append(error(403, "ConsentRequired", required_scopes=[DATA_ACCESS.format(CENTRE)]))
    with pytest.raises(TransferRefused, match="data_access"):
        login(file)


def test_requests_are_small_in_time_even_if_nobody_answers(driven, fake, request_of):
    fake.answers["submission_id"].extend([HOLD_REPLY] * 2)
    move = driven.add(request_of())
    began = time.monotonic()
    assert driven.step() == [Do.PREPARE]
    assert time.monotonic() - began < 10  # two tries of 2 s each, as it was told, where the library's own take 360 s
    assert "timed out" in driven.moves.get(move).message.lower() or "timeout" in driven.moves.get(move).message.lower()
    fake.held.set()
    driven.until_done(move)


def test_a_secret_that_others_can_read_is_no_secret(settings):
    settings.client_secret.chmod(0o640)
    with pytest.raises(ConfigError, match=r"secret.*640"):
        GlobusTransfer(settings)


def test_a_collection_that_is_none_fails_by_name(driven, request_of):
    request = request_of().model_copy(update={"destination": Place(endpoint="polaris", path=PurePosixPath("/x"))})
    over = driven.until_over(driven.add(request))
    assert over.state is State.FAILED
    assert "'polaris'" in over.message


def test_a_secret_is_in_no_message_and_no_record(driven, request_of, tmp_path):
    driven.until_done(driven.add(request_of()))
    assert SECRET not in json.dumps([move.message for move in driven.moves.all()])
    assert SECRET.encode() not in b"".join(file.read_bytes() for file in tmp_path.glob("moves*"))
