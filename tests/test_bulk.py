"""What becomes of runs that go by file, by a clock of ours: movers, nodes and disks are played."""

import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from pydantic import ValidationError

from hpc_bridge import tasks
from hpc_bridge.bulk import KEPT, Bulk, Hash, Noticed, Release, Routes, Sight
from hpc_bridge.bulk_config import Files, words
from hpc_bridge.bulk_record import Known, Origin, Runs, Stage
from hpc_bridge.config import Beamline, read
from hpc_bridge.errors import ConfigError
from hpc_bridge.heartbeat import Digest
from hpc_bridge.tasks import Tasks
from hpc_bridge.transfer import Progress, State
from hpc_bridge.transfer_record import Moves

SHA = "0123456789abcdef" * 4
REMOTE = {
    "by": "copy",
    "there": {"path": "/there"},
    "command": ["xpcs-stream", "run", "{file}", "--out", "{result}"],
    "repair": ["xpcs-stream", "backfill", "{run}", "--source", "{file}"],
}


def files_of(*sites, **settings):
    routes = {site: REMOTE | {"there": {"path": f"/{site}"}} for site in sites or ("near",)}
    return Files.model_validate({"results": "/results", "sites": routes, **settings})


def routes_of(files):
    return Routes(
        files=files, roots=dict.fromkeys(files.sites, PurePosixPath("/")), identities=dict.fromkeys(files.sites, "copy")
    )


class World:
    """Everything besides the core: what was moved, what nodes did; the clock."""

    def __init__(self, folder, files=None):
        self.folder, self.now = folder, 1e9
        self.files = {"8idi": files or files_of()}
        self.unreachable = {}
        self.orders = []
        self.done = Counter()
        self.open()

    def open(self):
        self.runs = Runs.open(self.folder / "bulk.sqlite")
        self.tasks = Tasks.open(self.folder / "tasks.sqlite")
        self.moves = Moves.open(self.folder / "moves.sqlite")
        self.bulk = Bulk(self.runs, self.tasks)

    def kill(self):
        """Die and come back; orders of the disk that were not answered are forgotten."""
        self.close()
        self.orders = []
        self.open()

    def close(self):
        for each in (self.runs, self.tasks, self.moves):
            each.close()

    def notice(self, run="one", *, origin=Origin.SUBMITTED, beamline="8idi", **more):
        known = (Known(f"{run}.h5", 5, 7),)
        noticed = Noticed(beamline=beamline, run=run, origin=origin, folder=PurePosixPath("/data"), files=known)
        return self.bulk.notice(replace(noticed, **more), self.files[beamline], self.now)

    def step(self, seconds=1.0):
        self.now += seconds
        held = {name: routes_of(files) for name, files in self.files.items()}
        wanted = list(self.bulk.wanted(held))
        for _, _, each in wanted:
            self.moves.add(each.request, each.priority, self.now, each.since)
        seen = {name: self.moves.get(name) for _, name, _ in wanted}
        self.orders += self.bulk.step(Sight(beamlines=held, moves=seen, unreachable=self.unreachable), self.now)

    def answer(self):
        """The disk does what it was told."""
        orders, self.orders = self.orders, []
        for order in orders:
            if isinstance(order, Hash):
                files = [replace(file, sha256=SHA) for file in order.run.files]
                self.bulk.hashed(order.run.key, files, self.now)
            else:
                self.bulk.released(order.run.key, self.now)

    def run(self, name="one"):
        return self.bulk.get("8idi", name)

    def move(self, name="one"):
        return self.moves.get(self.run(name).move)

    def arrive(self, name="one"):
        self.moves.ended(self.run(name).move, State.DONE, "", self.now)

    def compute(self, name="one"):
        run = self.run(name)
        task = self.tasks.get(run.task)
        self.done[name] += 1
        digests = [Digest(path=path, size=3, sha256=SHA) for path in task.results]
        self.tasks.handed(run.task, "lease", self.now)
        self.tasks.done(run.task, digests, self.now + 1)

    def to(self, stage, name="one"):
        """Let everything go well up to a stage."""
        for _ in range(20):
            if self.run(name).stage is stage:
                return self.run(name)
            self.answer()
            match self.run(name).stage:
                case Stage.SENDING | Stage.RETURNING if self.run(name).move and self.move(name):
                    self.arrive(name)
                case Stage.COMPUTING if self.tasks.get(self.run(name).task):
                    self.compute(name)
            self.step()
        raise AssertionError(self.run(name))


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def test_a_run_is_hashed_sent_computed_and_its_result_comes_back(world):
    world.notice()
    world.step()
    assert [type(order) for order in world.orders] == [Hash]
    world.to(Stage.SENDING)
    world.step()
    world.step()
    request = world.move().request
    assert (str(request.source.path), str(request.destination.path)) == ("/data", "/near/8idi/one")
    assert request.files[0].sha256 == SHA
    world.to(Stage.COMPUTING)
    world.step()
    [task] = world.tasks.open_tasks("8idi")
    assert task.command == ("xpcs-stream", "run", "/near/8idi/one/one.h5", "--out", "/near/8idi/one/one_result.h5")
    world.to(Stage.RETURNING)
    world.step()
    back = world.move().request
    assert (str(back.source.path), str(back.destination.path)) == ("/near/8idi/one", "/results")
    assert [(file.name, file.size, file.sha256) for file in back.files] == [("one_result.h5", 3, SHA)]
    run = world.to(Stage.DONE)
    assert None not in (run.hashed, run.arrived, run.begun, run.computed, run.ended)


def test_what_is_never_answered_is_not_ordered_twice(world):
    world.notice()
    for _ in range(5):
        world.step()
    assert len(world.orders) == 1


@pytest.mark.parametrize("stage", [Stage.HASHING, Stage.SENDING, Stage.COMPUTING, Stage.RETURNING])
def test_a_manager_killed_at_any_stage_goes_on_with_one_transfer_and_one_task(world, stage):
    world.notice()
    world.to(stage)
    world.kill()
    world.step()
    world.kill()
    world.step()
    world.to(Stage.DONE)
    assert [move.attempt for move in world.moves.all()] == [1, 1]
    assert [task.attempt for task in world.tasks.of("8idi")] == [1]


def test_a_run_of_the_stream_is_released_only_when_all_is_done(world):
    world.notice(origin=Origin.STREAM, lost=True)
    world.to(Stage.COMPUTING)
    world.step()
    [task] = world.tasks.open_tasks("8idi")
    assert task.command == ("xpcs-stream", "backfill", "one", "--source", "/near/8idi/one/one.h5")
    assert task.results == ()
    assert not any(isinstance(order, Release) for order in world.orders)
    world.compute()
    world.step()
    assert world.run().stage is Stage.RELEASING
    assert [type(order) for order in world.orders] == [Release]
    world.kill()
    world.step()
    world.to(Stage.DONE)


def test_a_spool_that_hangs_at_the_very_end_fails_nothing(world):
    world.notice(origin=Origin.STREAM)
    world.to(Stage.RELEASING)
    world.step(10 * 86400)
    world.to(Stage.DONE)


def test_a_run_of_the_stream_that_lost_nothing_is_only_brought_there(world):
    world.notice(origin=Origin.STREAM)
    world.to(Stage.DONE)
    assert world.tasks.of("8idi") == []


@pytest.mark.parametrize("stage", [Stage.HASHING, Stage.SENDING, Stage.RELEASING, Stage.DONE])
def test_a_loss_that_shows_late_is_repaired_all_the_same(world, stage):
    world.notice(origin=Origin.STREAM)
    world.to(stage)
    world.orders = [order for order in world.orders if not isinstance(order, Release)]
    world.notice(origin=Origin.STREAM, lost=True)
    world.kill()
    world.to(Stage.DONE)
    assert [task.command[1] for task in world.tasks.of("8idi")] == ["backfill"]
    assert world.done["one"] == 1


def test_a_run_that_failed_is_not_released(world):
    world.notice(origin=Origin.STREAM, lost=True)
    world.to(Stage.COMPUTING)
    world.step()
    world.tasks.cancel(world.run().task, "it was tried 3 times", world.now)
    world.step()
    assert world.run().stage is Stage.FAILED
    assert world.run().why == "at near: it was tried 3 times"
    assert not any(isinstance(order, Release) for order in world.orders)


def test_the_same_files_again_are_no_other_run_and_other_files_are(world):
    assert world.notice().name == world.notice().name == "one"
    assert world.notice(files=(Known("one.h5", 6, 8),)).name == "one_2"
    with pytest.raises(ConfigError, match="run one is taken by other files"):
        world.notice(files=(Known("one.h5", 9, 9),), is_named=True)


def test_a_run_that_failed_and_is_handed_in_again_begins_again(world):
    world.notice()
    world.to(Stage.COMPUTING)
    world.step()
    first = world.run().task
    world.tasks.cancel(first, "no", world.now)
    world.step()
    assert world.run().stage is Stage.FAILED
    world.notice()
    assert world.to(Stage.DONE).task != first


def test_what_is_still_said_of_a_transfer_of_an_earlier_attempt_does_not_count(world):
    world.notice()
    world.to(Stage.COMPUTING)
    world.step()
    [old] = world.moves.all()
    world.tasks.cancel(world.run().task, "no", world.now)
    world.step()
    world.notice()
    world.to(Stage.SENDING)
    held = {"8idi": routes_of(world.files["8idi"])}
    for _ in range(3):
        world.bulk.step(Sight(beamlines=held, moves={old.move: old}, unreachable={}), world.now)
    assert world.run().move == old.move
    assert world.run().stage is Stage.SENDING


def test_a_run_is_not_taken_again_after_it_is_done_whoever_sees_it(world):
    world.notice(origin=Origin.DROPPED)
    world.to(Stage.DONE)
    world.kill()
    for origin in (Origin.DROPPED, Origin.SUBMITTED):
        assert world.notice(origin=origin).stage is Stage.DONE


def test_a_site_that_refuses_is_left_for_the_next_and_the_last_refusal_is_the_end(tmp_path):
    world = World(tmp_path, files_of("near", "far"))
    world.notice()
    world.to(Stage.SENDING)
    world.step()
    world.step()
    assert world.run().site == "near"
    world.moves.ended(world.run().move, State.FAILED, "no consent", world.now)
    for _ in range(3):
        world.step()
    assert world.run().site == "far"
    world.moves.ended(world.run().move, State.FAILED, "disk full", world.now)
    for _ in range(3):
        world.step()
    assert (world.run().stage, world.run().why) == (Stage.FAILED, "near: no consent; far: disk full")
    world.close()


def test_a_transfer_that_gets_nowhere_is_left_for_the_next_site_after_a_while(tmp_path):
    world = World(tmp_path, files_of("near", "far", patience="1 min"))
    world.notice()
    world.to(Stage.SENDING)
    world.step()
    world.step()
    old = world.run().move
    stalled = Progress(state=State.STALLED, nice_status="CONNECT_FAILED", message="cannot connect")
    world.moves.seen(old, stalled, world.now)
    world.step(50)
    world.moves.seen(old, replace(stalled, bytes=1), world.now)
    world.step(50)
    assert world.run().site == "near"
    world.step(50)
    world.step(20)
    assert world.run().site == "far"
    assert old not in world.bulk.moves
    world.to(Stage.DONE)
    world.close()


def test_a_site_that_was_left_is_tried_again_after_the_others(tmp_path):
    world = World(tmp_path, files_of("near", "far", patience="1 min"))
    world.notice()
    world.to(Stage.SENDING)
    for site in ("near", "far", "near"):
        world.step()
        world.step()
        assert world.run().site == site
        left = world.run().move
        stalled = Progress(state=State.STALLED, nice_status="CONNECT_FAILED", message="cannot connect")
        world.moves.seen(left, stalled, world.now)
        world.step(1)
        world.step(70)
        world.moves.ending(left, "nobody wants it any more")  # as a mover does, when it comes to it
    world.step()
    assert world.run().site == "far"
    assert world.move().ending is not None  # of the visit before
    world.moves.ended(world.run().move, State.CANCELED, "nobody wants it any more", world.now)
    world.step()
    assert (world.run().site, world.run().refused) == ("far", {})
    world.to(Stage.DONE)
    world.close()


@pytest.mark.parametrize("stage", [Stage.SENDING, Stage.RETURNING])
def test_other_routes_hold_for_what_is_under_way(world, stage):
    world.notice()
    world.to(stage)
    world.step()
    before = world.run().move
    world.files["8idi"] = Files.model_validate(
        {"results": "/elsewhere", "sites": {"near": REMOTE | {"there": {"path": "/moved"}}}}
    )
    world.step()
    world.step()
    assert world.run().move != before
    assert before not in world.bulk.moves
    assert world.move() is not None
    world.to(Stage.DONE)


def test_a_transfer_that_waits_for_its_turn_or_is_read_again_is_not_left(tmp_path):
    world = World(tmp_path, files_of("near", "far", patience="1 min"))
    world.notice()
    world.to(Stage.SENDING)
    for said in ("", "arrived; reads it again"):
        world.step()
        world.step()
        world.moves.seen(world.run().move, Progress(state=State.ACTIVE, message=said), world.now)
        for _ in range(5):
            world.step(60)
        assert world.run().site == "near"
    world.close()


def test_a_site_whose_scheduler_does_not_answer_is_not_chosen_and_left_after_a_while(tmp_path):
    world = World(tmp_path, files_of("near", "far", "last", patience="1 min"))
    world.unreachable = {"near": world.now}
    world.notice()
    world.to(Stage.COMPUTING)
    assert world.run().site == "far"
    world.unreachable = {"near": world.now, "far": world.now}
    world.step(50)
    task = world.run().task
    world.step(50)
    assert (world.run().site, world.run().stage) == ("last", Stage.SENDING)
    assert world.tasks.get(task).state is tasks.State.FAILED
    world.to(Stage.DONE)
    world.close()


def test_a_run_that_is_asked_for_at_one_site_goes_nowhere_else(tmp_path):
    world = World(tmp_path, files_of("near", "far", patience="1 min"))
    world.unreachable = {"far": 0.0}
    world.notice(site="far")
    world.to(Stage.COMPUTING)
    for _ in range(5):
        world.step(600)
    assert (world.run().site, world.run().stage) == ("far", Stage.COMPUTING)
    with pytest.raises(ConfigError, match="go to near, far, not to moon"):
        world.notice("two", site="moon")
    world.close()


@pytest.mark.parametrize("stage", [Stage.HASHING, Stage.SENDING, Stage.COMPUTING, Stage.RETURNING])
def test_after_its_deadline_a_run_is_over_and_says_where_it_was(world, stage):
    world.notice()
    world.to(stage)
    world.step()
    world.step(86400)
    world.step()
    assert world.run().stage is Stage.FAILED
    assert f"its deadline has passed while it was {stage}" in world.run().why
    assert world.tasks.open_tasks("8idi") == []
    assert world.bulk.moves == set()


def test_a_canceled_run_wants_nothing_any_more(world):
    world.notice()
    world.to(Stage.COMPUTING)
    world.step()
    world.bulk.cancel("8idi", "one", "enough", world.now)
    assert world.tasks.open_tasks("8idi") == []
    assert (world.run().stage, world.run().why) == (Stage.CANCELED, "enough")
    with pytest.raises(ConfigError, match="no run one goes by file"):
        world.bulk.cancel("8idi", "one", "again", world.now)


def test_a_run_canceled_before_its_task_was_has_none_after_a_restart(world):
    world.notice()
    world.to(Stage.COMPUTING)
    world.step()
    world.runs.put(replace(world.run(), stage=Stage.CANCELED, ended=world.now))  # and there the manager was killed
    world.kill()
    world.step()
    assert world.tasks.open_tasks("8idi") == []


def test_a_result_that_does_not_come_back_says_where_it_is(world):
    world.notice()
    world.to(Stage.RETURNING)
    world.step()
    world.moves.ended(world.run().move, State.FAILED, "no space left", world.now)
    world.step()
    assert world.run().why == "its result is at near: /near/8idi/one, and does not come back: no space left"


def test_runs_of_a_beamline_that_is_not_held_rest(world):
    world.notice()
    world.to(Stage.SENDING)
    world.step()
    files = world.files.pop("8idi")
    for _ in range(5):
        world.step(600)
    assert world.run().stage is Stage.SENDING
    assert world.run().move in world.bulk.moves
    world.files["8idi"] = files
    world.to(Stage.DONE)


def test_the_disk_is_asked_again_for_what_it_would_not_do(world):
    world.notice()
    world.step()
    [order] = world.orders
    world.bulk.failed(order.run.key, "it is still written", world.now)
    world.step()
    assert len(world.orders) == 1
    assert world.run().why == "it is still written"
    world.step(5)
    assert len(world.orders) == 2
    world.to(Stage.DONE)


def test_a_run_may_have_any_name(world):
    for run in ("../../etc/passwd", "0" * 300, "ünï", "a b", ""):
        name = world.notice(run, files=(Known(f"{abs(hash(run))}.h5", 1, 1),)).name
        assert 0 < len(name) < 64
        assert "/" not in name
        world.to(Stage.DONE, name)


def test_old_runs_are_forgotten_but_not_those_that_would_be_seen_again(world):
    world.notice("handed in")
    world.notice("dropped", origin=Origin.DROPPED)
    world.to(Stage.DONE, "handed_in")
    world.to(Stage.DONE, "dropped")
    world.step(KEPT + 100)
    assert world.run("handed_in") is None
    assert world.run("dropped").stage is Stage.DONE


def test_a_run_with_the_name_of_one_that_is_forgotten_is_computed_anew(world):
    world.notice()
    world.to(Stage.DONE)
    world.step(KEPT + 100)
    world.notice(files=(Known("one.h5", 6, 8),))
    run = world.to(Stage.DONE)
    assert world.tasks.get(run.task).created > run.created > 1e9 + KEPT


def test_of_many_runs_that_are_handed_in_all_are_taken_or_none(world):
    noticed = [
        Noticed(beamline="8idi", run=run, origin=Origin.SUBMITTED, folder=PurePosixPath("/data"), files=(file,), **more)
        for run, file, more in [
            ("one", Known("one.h5", 1, 1), {}),
            ("two", Known("two.h5", 1, 1), {}),
            ("one", Known("other.h5", 1, 1), {"is_named": True}),
        ]
    ]
    with pytest.raises(ConfigError, match="run one is taken by other files"):
        world.bulk.notice_all(noticed, world.files["8idi"], world.now)
    assert world.bulk.open_runs == []
    world.kill()
    assert world.bulk.open_runs == []
    world.bulk.notice_all(noticed[:2], world.files["8idi"], world.now)
    world.kill()
    assert {run.name for run in world.bulk.open_runs} == {"one", "two"}


def test_a_file_may_be_called_like_a_word_that_stands_for_another():
    told = words(("{file}", "--run={run}", "{result}"), file="/a/{run}.h5", run="{result}", result="/b/{file}")
    assert told == ["/a/{run}.h5", "--run={result}", "/b/{file}"]


def test_results_do_not_come_back_to_where_files_are_dropped():
    with pytest.raises(ValidationError, match="is where results come back to"):
        files_of(drop="/results/../results/")


def test_files_outside_of_what_a_collection_sees_cannot_go(world):
    routes = replace(routes_of(world.files["8idi"]), roots={"near": PurePosixPath("/mnt/data")})
    world.notice()
    world.step()
    world.answer()
    for _ in range(3):
        world.bulk.step(Sight(beamlines={"8idi": routes}, moves={}, unreachable={}), world.now)
    assert "/data is not below /mnt/data" in world.run().why
    assert world.run().stage is Stage.FAILED


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_every_run_comes_to_an_end_and_is_computed_once_where_nobody_else_failed(tmp_path, seed):
    chance = random.Random(seed)
    world = World(tmp_path, files_of("near", "far", patience="5 min"))
    names = [f"run{n}" for n in range(6)]
    visits = defaultdict(set)
    for name in names:
        origin = chance.choice(list(Origin))
        world.notice(
            name, origin=origin, lost=True, priority=chance.randrange(3), folder=PurePosixPath(f"/data/{name}")
        )
    for _ in range(4000):
        if not world.bulk.open_runs:
            break
        world.step(chance.choice([0.1, 1, 60]))
        name = chance.choice(names)
        run = world.run(name)
        if run.site:
            visits[name].add(run.visit)
        match chance.randrange(8), run.stage:
            case 0, _:
                world.kill()
            case 1, _:
                world.unreachable = {} if world.unreachable else {chance.choice(["near", "far"]): world.now}
            case 2 | 3, _:
                world.answer()
            case 4 | 5, Stage.SENDING | Stage.RETURNING if run.move and world.move(name) and not world.move(name).ended:
                world.arrive(name)
            case 6, Stage.SENDING if run.move and world.move(name) and not world.move(name).ended:
                stalled = Progress(state=State.STALLED, nice_status="PAUSED", message="paused")
                world.moves.seen(run.move, stalled, world.now)
            case 4 | 5, Stage.COMPUTING if world.tasks.get(run.task):
                world.compute(name)
    assert not world.bulk.open_runs
    for name in names:
        assert world.run(name).stage is Stage.DONE, world.run(name)
        assert world.done[name] == 1
        assert len(world.tasks.of("8idi")) >= len(names)
    assert not world.tasks.open_tasks("8idi")
    world.close()


def test_the_example_says_all_that_can_be_said_of_files_with_the_defaults_that_there_are():
    files = read(Path(__file__).parents[1] / "docs" / "beamline.example.yaml", Beamline).files
    assert files.model_fields_set == set(Files.model_fields)
    assert files.switch.model_fields_set == set(type(files.switch).model_fields)
    defaults = Files(sites=files.sites, results=files.results)
    others = {"switch", "sites", "results", "nodes", "drop", "roots", "gateway", "plane"}
    assert files.model_dump(exclude=others) == defaults.model_dump(exclude=others)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"by": "globus"}, "names the identity"),
        ({"by": "rsync"}, "names an endpoint"),
        ({"here": "abc"}, "collection of this machine"),
        ({"command": ["xpcs-stream", "run"]}, "does not say {file}"),
        ({"path": "relative"}, "not absolute"),
        ({"there": {"path": "relative"}}, "absolute path of a folder"),
        ({"by": "carrier pigeon"}, "'globus', 'copy' or 'rsync'"),
    ],
)
def test_a_route_that_cannot_be_meant_is_refused(changes, why):
    with pytest.raises(ValidationError, match=why):
        Files.model_validate({"results": "/results", "sites": {"near": REMOTE | changes}})
