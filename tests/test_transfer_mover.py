"""What a mover asks for, and what its record keeps: answers come from the test, and so does the time."""

from itertools import pairwise

import pytest

from hpc_bridge.errors import RecordError
from hpc_bridge.leases import Leases
from hpc_bridge.transfer import Progress, State, TransferRefused, TransferUnreachable
from hpc_bridge.transfer_mover import FLAT, LONGEST_BACKOFF, Do, Mover
from hpc_bridge.transfer_record import Moves
from tests.transfers import make_request


@pytest.fixture
def moves(tmp_path):
    with Moves.open(tmp_path / "moves") as moves:
        yield moves


@pytest.fixture
def requests(tmp_path):
    return [make_request(tmp_path, f"r{number}", sizes=(10,)) for number in range(6)]


def begun(moves, request):
    """A mover with a task of this request, and its time."""
    mover = Mover(moves, 3)
    move = mover.add(request, 0, 0.0).move
    for answer in ("document", "task"):
        [order] = mover.orders(0.0)
        mover.answered(order, answer, 0.0)
    return mover, move


def look(mover, now, **progress):
    [order] = mover.orders(now)
    assert order.do is Do.LOOK
    mover.answered(order, Progress(**progress), now)


def test_a_document_is_on_disk_before_it_is_submitted(moves, requests):
    mover = Mover(moves, 3)
    move = mover.add(requests[0], 0, 0.0).move
    [prepare] = mover.orders(0.0)
    mover.answered(prepare, "the document", 0.0)
    assert moves.get(move).document == "the document"
    [submit] = mover.orders(0.0)
    assert (submit.do, submit.move.document) == (Do.SUBMIT, "the document")


def test_a_mover_that_starts_again_submits_the_same_document(moves, requests):
    mover = Mover(moves, 3)
    mover.add(requests[0], 0, 0.0)
    [prepare] = mover.orders(0.0)
    mover.answered(prepare, "the document", 0.0)
    mover.orders(0.0)
    [submit] = Mover(moves, 3).orders(0.0)
    assert (submit.do, submit.move.document) == (Do.SUBMIT, "the document")


def test_no_more_tasks_than_there_may_be_and_the_highest_priority_first(moves, requests):
    mover = Mover(moves, 2)
    for number, request in enumerate(requests):
        mover.add(request, number // 2, float(number))
    orders = mover.orders(10.0)
    assert [order.move.request.run for order in orders] == ["r4", "r5"]
    assert mover.orders(10.0) == []


def test_nothing_is_asked_twice_before_it_is_answered(moves, requests):
    mover, _ = begun(moves, requests[0])
    assert len(mover.orders(5.0)) == 1
    assert mover.orders(100.0) == []


def test_the_same_request_again_is_no_other(moves, requests):
    first = moves.add(requests[0], 0, 0.0)
    again = moves.add(requests[0].model_copy(update={"deadline": 1e12}), 5, 9.0)
    assert (again.move, again.created, again.priority, again.request.deadline) == (first.move, 0.0, 5, 1e12)
    assert len(moves.open_moves()) == 1


def test_what_is_done_is_not_begun_again(moves, requests):
    mover, move = begun(moves, requests[0])
    look(mover, 5.0, state=State.DONE)
    [verify] = mover.orders(5.0)
    assert verify.do is Do.VERIFY
    mover.answered(verify, (), 6.0)
    assert mover.add(requests[0], 0, 7.0).may_release
    assert mover.orders(100.0) == []
    assert moves.get(move).ended == 6.0


def test_done_is_only_what_was_verified(moves, requests):
    mover, move = begun(moves, requests[0])
    look(mover, 5.0, state=State.DONE)
    assert not moves.get(move).may_release
    [verify] = mover.orders(5.0)
    mover.answered(verify, ("r0.h5: 9 bytes instead of 10",), 6.0)
    assert not moves.get(move).may_release
    assert "9 bytes" in moves.get(move).message


def test_faults_without_bytes_are_a_stall_and_bytes_end_it(moves, requests):
    mover, move = begun(moves, requests[0])
    look(mover, 10.0, state=State.ACTIVE, bytes=5, faults=1)
    look(mover, 10.0 + FLAT - 1, state=State.ACTIVE, bytes=5, faults=2)
    assert moves.get(move).state is State.ACTIVE
    look(mover, 15.0 + FLAT, state=State.ACTIVE, bytes=5, faults=3)
    assert moves.get(move).state is State.STALLED
    look(mover, 20.0 + FLAT, state=State.ACTIVE, bytes=6, faults=3)
    assert (moves.get(move).state, moves.get(move).stalled_since) == (State.ACTIVE, None)


def test_a_silent_service_is_asked_ever_more_seldom_and_for_ever(moves, requests):
    mover = Mover(moves, 3)
    mover.add(requests[0].model_copy(update={"deadline": 1e9}), 0, 0.0)
    asked, now = [], 0.0
    while len(asked) < 12:
        for order in mover.orders(now):
            asked.append(now)
            mover.answered(order, TransferUnreachable("no answer"), now)
        now += 0.5
    waits = [late - early for early, late in pairwise(asked)]
    assert waits[:4] == [1, 2, 4, 8]
    assert waits[-1] == LONGEST_BACKOFF


def test_one_that_is_refused_lets_others_have_their_turn(moves, requests):
    mover = Mover(moves, 1)
    for number, request in enumerate(requests[:2]):
        mover.add(request, -number, 0.0)
    [prepare] = mover.orders(0.0)
    mover.answered(prepare, "document", 0.0)
    [submit] = mover.orders(0.0)
    mover.answered(submit, TransferRefused("a consent is wanted"), 0.0)
    [other] = mover.orders(0.0)
    assert (other.do, other.move.request.run) == (Do.PREPARE, "r1")


def test_what_waits_for_its_turn_is_over_with_its_deadline(moves, requests):
    mover = Mover(moves, 3)
    move = mover.add(requests[0].model_copy(update={"deadline": 10.0}), 0, 0.0).move
    assert mover.orders(11.0) == []
    assert (moves.get(move).state, moves.get(move).may_release) == (State.FAILED, False)


def test_a_record_has_one_writer_and_any_reader(moves, requests, tmp_path):
    moves.add(requests[0], 0, 0.0)
    with pytest.raises(RecordError, match="another mover"):
        Moves.open(tmp_path / "moves")
    with Moves.look(tmp_path / "moves") as reader:
        assert [move.request for move in reader.all()] == [requests[0]]
        with pytest.raises(RecordError):
            reader.add(requests[1], 0, 0.0)


def test_another_record_is_not_taken_for_one(tmp_path):
    Leases.open(tmp_path / "leases").close()
    with pytest.raises(RecordError, match="no record of requests"):
        Moves.open(tmp_path / "leases")
    (tmp_path / "text").write_text("neither is this" * 100)
    with pytest.raises(RecordError, match="text"):
        Moves.open(tmp_path / "text")


def test_what_ended_before_it_was_wanted_once_more_begins_again_and_what_ended_since_does_not(moves, requests):
    mover, move = begun(moves, requests[0])
    look(mover, 5.0, state=State.DONE)
    [verify] = mover.orders(5.0)
    mover.answered(verify, (), 6.0)
    assert mover.add(requests[0], 0, 7.0, since=6.0).may_release
    again = mover.add(requests[0], 0, 8.0, since=7.5)
    assert (again.ended, again.attempt, again.document, again.task, again.begun) == (None, 2, None, None, None)
    assert moves.add(requests[0], 0, 9.0, since=9.0).attempt == 2  # it is not over
    moves.ended(move, State.FAILED, "no", 10.0)
    assert moves.add(requests[0], 0, 11.0, since=9.0).state is State.FAILED


def test_the_record_tells_when_a_task_began_and_forgets_what_ended_long_ago(moves, requests):
    _, move = begun(moves, requests[0])
    assert moves.get(move).begun is not None
    moves.ended(move, State.DONE, "", 10.0)
    moves.prune(10.0)
    assert moves.get(move).begun is not None
    moves.prune(11.0)
    assert moves.get(move) is None
