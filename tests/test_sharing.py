"""Who has which region, while workers come, go, fall silent, wake up, and what is said arrives late or never."""

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import count, permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.hub_wire import Here
from stream.sharing import MOST_WORKERS, SESSION, SETTLE, Group, share

BEAT = 0.25
NAMES = "abcde"
OWNERS = st.dictionaries(st.integers(0, 9), st.sampled_from(NAMES))
WORKERS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True)


@given(n_regions=st.integers(1, 40), workers=WORKERS, owners=OWNERS)
def test_every_region_has_a_worker_and_no_worker_two_more_than_another(n_regions, workers, owners):
    shared = share(n_regions, workers, owners)
    assert list(shared) == list(range(n_regions))
    n_each = {worker: list(shared.values()).count(worker) for worker in workers}
    assert sum(n_each.values()) == n_regions
    assert max(n_each.values()) - min(n_each.values()) <= 1


@given(n_regions=st.integers(1, 6), workers=st.lists(st.sampled_from("abc"), min_size=1, unique=True), owners=OWNERS)
def test_no_other_balanced_share_moves_fewer_regions(n_regions, workers, owners):
    def moved(shared):
        return sum(owners.get(region) != worker for region, worker in shared.items())

    least, n_more = divmod(n_regions, len(workers))
    wanted = sorted([least + 1] * n_more + [least] * (len(workers) - n_more))
    balanced = (
        dict(enumerate(shared))
        for shared in product(workers, repeat=n_regions)
        if sorted(shared.count(worker) for worker in workers) == wanted
    )
    assert moved(share(n_regions, workers, owners)) == min(map(moved, balanced))


@given(n_regions=st.integers(1, 20), workers=WORKERS, owners=OWNERS)
def test_what_is_shared_well_stays_as_it_is(n_regions, workers, owners):
    shared = share(n_regions, workers, owners)
    assert share(n_regions, workers, shared) == shared


def test_the_same_workers_always_share_in_the_same_way():
    assert share(5, ["b", "a"], {}) == share(5, ["b", "a"], {}) == {0: "b", 1: "b", 2: "b", 3: "a", 4: "a"}


def test_without_workers_nothing_is_shared():
    assert share(4, [], {0: "a"}) == {}


def here(name, serving=(), *, heard=0, process=None, leaving=False):
    return Here(
        beamline="b",
        name=name,
        process=process or f"process of {name}",
        heard=heard,
        serving=sorted(serving),
        leaving=leaving,
    )


def settled(n_regions, *names):
    """A group whose workers know what is theirs and serve it, and the time."""
    group, now = Group(n_regions), 100.0
    for name in names:
        group.hear(here(name), now)
    now += SETTLE
    group.expire(now)
    for name in names:
        yours = group.hear(here(name), now)
        group.hear(here(name, yours.regions, heard=yours.number), now)
    return group, now


def test_nothing_is_shared_out_before_others_had_time_to_come():
    group = Group(4)
    assert group.hear(here("a"), 0.0).regions == []
    assert group.hear(here("b"), SETTLE / 2).regions == []
    assert group.hear(here("a"), SETTLE).regions == [0, 1]
    assert group.hear(here("b"), SETTLE).regions == [2, 3]


def test_workers_that_were_there_before_the_gateway_keep_what_they_have():
    group = Group(4)
    assert group.hear(here("late"), 0.0).regions == []
    assert group.hear(here("a", [1, 3], heard=77), SETTLE * 0.9).regions == [1, 3]
    assert group.hear(here("b", [0, 2], heard=77), SETTLE * 0.9).regions == [0, 2]
    assert group.hear(here("late"), SETTLE).regions == []
    kept = group.hear(here("a", [1, 3]), SETTLE).regions + group.hear(here("b", [0, 2]), SETTLE).regions
    assert len(kept) == 3
    assert set(kept) < {0, 1, 2, 3}


def test_regions_that_the_gateway_does_not_have_are_nobodys():
    group = Group(2)
    assert group.hear(here("a", [1, 2, 4095]), 0.0).regions == [1]
    assert group.hear(here("a", [1, 2, 4095]), SETTLE).regions == [0, 1]


def test_a_region_goes_to_the_next_only_once_the_one_before_has_left_it():
    group, now = settled(2, "a")
    assert group.hear(here("b"), now).regions == []
    yours = group.hear(here("a", [0, 1]), now)
    assert len(yours.regions) == 1
    assert group.hear(here("b"), now).regions == []
    group.hear(here("a", [0, 1], heard=yours.number), now)
    assert group.hear(here("b"), now).regions == []
    group.hear(here("a", yours.regions, heard=yours.number), now)
    assert group.hear(here("b"), now).regions == [1 - yours.regions[0]]


def test_a_worker_that_may_not_know_yet_what_it_was_given_still_has_it():
    group, now = settled(2, "a")
    yours = group.hear(here("a", [0, 1]), now)
    group.hear(here("b"), now)
    group.hear(here("a", heard=yours.number - 1), now)  # said before it was given both
    assert group.hear(here("b"), now).regions == []


def test_numbers_that_were_heard_from_a_gateway_before_mean_nothing():
    """Else one that happens to be the same would say that a worker has left what it is about to be told."""
    assert len({Group(1).hear(here("a"), 0.0).number for _ in range(10)}) == 10


def test_regions_of_a_silent_worker_go_to_the_others():
    group, now = settled(2, "a", "b")
    group.expire(now + SESSION / 2)
    group.hear(here("b", [1]), now + SESSION / 2)
    assert group.expire(now + SESSION) == []
    assert group.expire(now + SESSION + 0.1) == ["a"]
    assert group.hear(here("b", [1]), now + SESSION + 0.1).regions == [0, 1]


def test_a_gateway_that_was_paused_itself_takes_nobody_for_dead():
    group, now = settled(2, "a", "b")
    assert group.expire(now + 100 * SESSION) == []
    assert group.hear(here("a", [0]), now + 100 * SESSION).regions == [0]


def test_a_worker_that_wakes_up_takes_nothing_from_its_heirs():
    group, now = settled(2, "a", "b")
    for _ in range(9):
        now += BEAT
        group.expire(now)
        group.hear(here("b", [1]), now)
    yours = group.hear(here("b", [1]), now)
    assert yours.regions == [0, 1]
    woken = group.hear(here("a", [0, 1]), now)
    kept = group.hear(here("b", [0, 1], heard=yours.number), now)
    assert woken.regions == []
    assert len(kept.regions) == 1


def test_a_worker_that_leaves_is_not_waited_for():
    group, now = settled(2, "a", "b")
    group.hear(here("a", leaving=True), now)
    assert group.hear(here("b", [1]), now).regions == [0, 1]


def test_one_that_is_started_again_under_its_name_has_its_regions_at_once():
    group, now = settled(4, "a", "b")
    before = group.owners
    assert group.hear(here("a", process="another"), now).regions == [0, 1]
    assert group.owners == before


def test_of_two_with_the_same_name_the_later_one_has_it_and_the_other_is_told_so():
    group, now = settled(2, "a")
    assert group.hear(here("a", process="another"), now).regions == [0, 1]
    assert group.hear(here("a", [0, 1]), now) is None
    assert group.hear(here("a", [0, 1], leaving=True), now) is None
    assert group.hear(here("a", [0, 1], process="another"), now).regions == [0, 1]


def test_of_thousands_of_workers_only_so_many_are_taken_note_of():
    group = Group(4096)
    for i in range(3 * MOST_WORKERS):
        group.hear(here(f"x{i}"), 0.0)
    group.expire(SETTLE)
    assert len(set(group.owners.values())) == MOST_WORKERS
    assert group.hear(here("one more"), SETTLE).regions == []


def test_the_order_in_which_workers_leave_and_come_back_never_leaves_a_region_alone():
    for order in permutations("abc"):
        group, now = settled(3, *"abc")
        for name in order[:2]:
            group.hear(here(name, leaving=True), now)
        assert group.hear(here(order[2]), now).regions == [0, 1, 2]


@dataclass(eq=False)
class Worker:
    """What `stream.hub_group` does, and what the connection of one holds."""

    name: str
    process: str
    heard: int = 0
    serving: set = field(default_factory=set)
    wanted: set = field(default_factory=set)
    without_right: set = field(default_factory=set)
    """What it serves although the gateway had to take it for dead."""
    is_known: bool = False
    """To the gateway in its present life."""
    said: deque = field(default_factory=deque)
    replies: deque = field(default_factory=deque)
    """With whether the gateway has forgotten since that it said so."""

    def beat(self):
        self.said.append(here(self.name, self.serving, heard=self.heard, process=self.process))

    def hear(self):
        yours, is_void = self.replies.popleft()
        self.heard = yours.number
        self.wanted = set(yours.regions)
        if is_void:
            self.without_right |= self.wanted - self.serving
        self.serving |= self.wanted

    def leave(self):
        self.serving &= self.wanted
        self.without_right &= self.wanted

    def lose_what_was_said(self):
        self.said.clear()
        self.replies = deque((yours, True) for yours, _ in self.replies)

    def be_forgotten(self):
        self.without_right |= self.serving
        self.replies = deque((yours, True) for yours, _ in self.replies)


class Walk:
    """A random walk through all that can happen to workers and a gateway between which everything may take its time."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.now = 100.0
        self.n_regions = self.dice.randint(1, 4)
        self.group = Group(self.n_regions)
        self.processes = count()
        self.workers = []

    def step(self):
        self.dice.choice([*[Walk.talk] * 60, *[Walk.time_goes_by] * 12, *[Walk.come] * 3, *self.ACCIDENTS])(self)

    def one(self):
        return self.dice.choice(self.workers)

    def maybe(self):
        return self.dice.random() < 0.7

    def talk(self):
        if self.workers:
            worker = self.one()
            worker.beat()
            if self.maybe():
                self.arrive(worker)
            if self.maybe() and worker.replies:
                worker.hear()
            if self.maybe():
                worker.leave()

    def time_goes_by(self):
        for _ in range(self.dice.randint(1, 4)):
            self.tick()

    def come(self):
        """Under a name that another one has, dead or alive, now and then."""
        if len(self.workers) < 4:
            self.workers.append(Worker(self.dice.choice(NAMES), str(next(self.processes))))

    def one_dies(self):
        if self.workers:
            self.workers.remove(self.one())

    def one_is_started_again(self):
        if self.workers:
            worker = self.one()
            self.workers[self.workers.index(worker)] = Worker(worker.name, str(next(self.processes)))

    def one_goes(self):
        if self.workers:
            worker = self.one()
            self.workers.remove(worker)
            self.group.hear(here(worker.name, process=worker.process, leaving=True), self.now)

    def one_loses_its_connection(self):
        if self.workers:
            worker = self.one()
            worker.said.clear()
            worker.replies.clear()

    def one_falls_silent(self):
        """The others go on meanwhile."""
        if self.workers:
            silent = self.one()
            for _ in range(round(self.dice.uniform(0.5, 1.5) * SESSION / BEAT)):
                for worker in [worker for worker in self.workers if worker is not silent]:
                    self.catch_up(worker)
                self.time_goes_by()

    def the_gateway_is_paused(self):
        self.now += self.dice.uniform(SESSION / 2 + 0.1, 5 * SESSION)
        assert self.group.expire(self.now) == []

    def the_gateway_is_replaced(self):
        self.group = Group(self.n_regions)
        for worker in self.workers:
            worker.lose_what_was_said()
            worker.is_known = False

    def all_is_well_for_a_while(self):
        for _ in range(round((SESSION + SETTLE + 1) / BEAT)):
            for worker in list(self.workers):
                self.catch_up(worker)
                worker.leave()
            for _ in range(3):
                self.tick()

    ACCIDENTS = (
        one_dies,
        one_is_started_again,
        one_goes,
        one_loses_its_connection,
        one_falls_silent,
        the_gateway_is_paused,
        the_gateway_is_replaced,
        all_is_well_for_a_while,
    )

    def tick(self):
        self.now += 0.1
        silent = self.group.expire(self.now)
        is_settled = bool(self.group.owners) or not any(worker.is_known for worker in self.workers)
        for worker in self.workers:
            if worker.name in silent or (not worker.is_known and is_settled):
                worker.be_forgotten()

    def catch_up(self, worker):
        worker.beat()
        while worker in self.workers and worker.said:
            self.arrive(worker)
        while worker.replies:
            worker.hear()

    def arrive(self, worker):
        yours = self.group.hear(worker.said.popleft(), self.now)
        if yours is None:
            self.workers.remove(worker)
            return
        for other in self.workers:
            if other is not worker and other.name == worker.name:
                other.be_forgotten()
            if not other.is_known:  # what it has may be given to others: who was to tell?
                other.without_right |= other.serving & set(yours.regions)
        worker.is_known = True
        worker.replies.append((yours, False))
        worker.without_right.difference_update(yours.regions)

    def served(self):
        return Counter(region for worker in self.workers for region in worker.serving - worker.without_right)


SEEDS = range(100)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_no_region_has_two_workers_and_each_has_one_once_all_is_well(seed):
    walk = Walk(seed)
    for _ in range(300):
        walk.step()
        assert max(walk.served().values(), default=0) <= 1
    walk.come()
    walk.all_is_well_for_a_while()
    assert walk.served() == dict.fromkeys(range(walk.n_regions), 1)
    n_each = [len(worker.serving) for worker in walk.workers]
    assert max(n_each) - min(n_each) <= 1
    assert len({worker.name for worker in walk.workers}) == len(walk.workers)
