"""A ring against a plain list of what was appended."""

import time
from collections import Counter
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stream.ring import EACH, MOST_RUNS, Ring

ROOM = 10 * EACH
N_BYTES = st.integers(0, 5 * EACH)


def filled(n, n_bytes=0, *, room=ROOM, must_stay=lambda offset: False):
    ring = Ring(room)
    for offset in range(n):
        ring.append([bytes([offset]), bytes(n_bytes)], must_stay=must_stay(offset))
    return ring


def offsets(ring):
    """What is there, found as a reader finds it."""
    there, offset = [], 0
    while (found := ring.at(offset)) is not None:
        there.append(found[0])
        offset = found[0] + 1
    return there


def test_a_record_has_its_parts_as_they_were_given():
    ring = filled(3, 7)
    offset, kept = ring.at(1)
    assert (offset, kept.parts, kept.n_bytes) == (1, [b"\x01", bytes(7)], 8)


def test_nothing_is_at_the_end_or_behind_it():
    assert Ring(ROOM).at(0) is None
    assert (filled(3).at(3), filled(3).at(2**62)) == (None, None)


def test_in_place_of_what_is_gone_a_reader_gets_the_first_that_is_there():
    ring = filled(20, EACH)
    first = offsets(ring)[0]
    assert first > 0
    assert ring.at(0)[0] == ring.at(first - 1)[0] == ring.at(first)[0] == first


def test_starts_and_ends_of_runs_stay_while_frames_go():
    ring = filled(40, EACH, must_stay=lambda offset: offset in (0, 7))
    assert offsets(ring)[:2] == [0, 7]
    assert offsets(ring)[-1] == 39
    assert ring.lost == 40 - len(offsets(ring))


def test_what_is_safe_goes_before_everything_else_even_if_it_had_to_stay():
    """Else final results of runs long ago would one day leave no room for any others."""
    ring = filled(8, EACH - 1, room=16 * EACH, must_stay=lambda offset: True)
    ring.release(8)
    for _ in range(8):
        ring.append([bytes(EACH)], must_stay=False)
    assert offsets(ring) == list(range(8, 16))
    assert ring.lost == 0


def test_the_newest_record_is_there_however_large_it_is():
    ring = filled(3, must_stay=lambda offset: True)
    ring.append([bytes(2 * ROOM)], must_stay=False)
    assert offsets(ring) == [3]
    assert ring.lost == 3


def test_many_records_of_nothing_need_room_too():
    ring = filled(0)
    for _ in range(1000):
        ring.append([], must_stay=True)
    assert len(offsets(ring)) == ROOM / EACH


def test_losses_of_runs_long_ago_are_forgotten():
    ring = Ring(0)
    for run in range(2 * MOST_RUNS + 1):
        ring.append([], must_stay=False, run=run)
    assert sorted(ring.lost_of) == list(range(MOST_RUNS, 2 * MOST_RUNS))
    assert ring.lost == 2 * MOST_RUNS


def test_a_record_that_is_not_safe_gets_older():
    ring = filled(3)
    ring.release(1)
    at = ring.unsafe.at
    assert ring.at(0)[1].at <= at <= time.monotonic()
    ring.release(3)
    assert ring.unsafe is None


def test_two_rings_have_names_of_their_own():
    assert Ring(ROOM).name != Ring(ROOM).name


@dataclass
class Record:
    offset: int
    size: int
    must_stay: bool
    run: int


class Model(RuleBasedStateMachine):
    """The same with a list that is searched from the start every time."""

    def __init__(self):
        super().__init__()
        self.ring = Ring(ROOM)
        self.there = []
        self.end = self.safe = self.lost = 0
        self.lost_of = Counter()

    def is_safe(self, record):
        return record.offset < self.safe

    def dropped_for(self, size):
        """Which records go for another one: the safe ones, those that pass, those that stay; of each the oldest."""
        in_turn = sorted(self.there, key=lambda r: (not self.is_safe(r), r.must_stay and not self.is_safe(r), r.offset))
        free = ROOM - sum(record.size for record in self.there)
        dropped = []
        while free < size and in_turn:
            dropped.append(in_turn.pop(0))
            free += dropped[-1].size
        return dropped

    @rule(n_bytes=N_BYTES, must_stay=st.booleans(), run=st.integers(0, 5))
    def append(self, n_bytes, must_stay, run):
        dropped = self.dropped_for(n_bytes + EACH)
        loses = sum(not self.is_safe(record) for record in dropped)
        assert self.ring.has_room(n_bytes) == (loses == 0)
        parts = [self.end.to_bytes(4, "big")[: min(4, n_bytes)], bytes(max(0, n_bytes - 4))]
        self.ring.append(parts, must_stay=must_stay, run=run)
        self.there = [record for record in self.there if record not in dropped]
        self.there.append(Record(self.end, n_bytes + EACH, must_stay, run))
        self.end += 1
        self.lost += loses
        self.lost_of.update(record.run for record in dropped if not self.is_safe(record))

    @rule(ahead=st.integers(-5, 5))
    def release(self, ahead):
        """Acknowledgements may come late, twice, and from those who lie."""
        offset = max(0, self.safe + ahead)
        self.ring.release(offset)
        self.safe = max(self.safe, min(offset, self.end))

    @precondition(lambda self: self.end)
    @rule(data=st.data())
    def read_from_anywhere(self, data):
        offset = data.draw(st.integers(0, self.end + 1))
        found = self.ring.at(offset)
        expected = next((record for record in self.there if record.offset >= offset), None)
        assert (found and found[0]) == (expected and expected.offset)

    @invariant()
    def the_same_is_there_in_order(self):
        assert offsets(self.ring) == [record.offset for record in self.there]
        assert (self.ring.end, self.ring.safe, self.ring.lost) == (self.end, self.safe, self.lost)
        assert self.ring.lost_of == self.lost_of
        unsafe = [record.run for record in self.there if not self.is_safe(record)]
        assert (self.ring.unsafe and self.ring.unsafe.run) == (unsafe[0] if unsafe else None)

    @invariant()
    def bytes_are_bounded(self):
        kept = [self.ring.at(offset)[1].n_bytes + EACH for offset in offsets(self.ring)]
        assert len(kept) <= 1 or sum(kept) <= ROOM


TestModel = Model.TestCase
