"""Regions and the workers that have them: what is heard of them while a run is on, and what the page shows of it."""

import os
import time
from contextlib import ExitStack, nullcontext
from urllib.request import urlopen

import numpy as np
import pytest
from websockets.sync.client import connect

from stream import checkpoint, heartbeat
from stream.heartbeat import Region, regions_of, table, worker
from stream.live.view import View
from stream.merger import Merger
from stream.messages import Result, RunStop
from stream.pipeline import Pipeline
from stream.regions import Regions
from tests.plane import REGIONS, Plane, until_said
from tests.sources import ListSink, ListSource
from tests.test_kill import frames, free, qmap
from tests.test_live import ROIMAP, answers, hear, ledger, page, region, regions, run, start, until
from tests.test_merger import EVERY, N_FRAMES, all_partials, operators, partials, run_of

pytestmark = pytest.mark.timeout(240)

__all__ = ["frames", "page", "qmap", "run"]

SOON = 60


def ledgers(outputs):
    return [each for each in outputs if isinstance(each, Result) and each.operator == "ledger"]


def without_who(stream):
    """What a worker publishes that does not say who it is."""
    return [
        Result(
            run=each.run, region=each.region, operator="ledger", n_frames=each.n_frames, final=each.final,
            arrays={name: array for name, array in each.arrays.items() if name not in heartbeat.OF_A_WORKER},
        )
        if isinstance(each, Result) and each.operator == "ledger"
        else each
        for each in stream
    ]  # fmt: skip


def fed(streams, until=N_FRAMES):
    """A merger that was given regions up to a frame, without their ends."""
    merger = Merger(operators, patience=1e9)
    for stream in streams:
        for message in stream:
            if not isinstance(message, RunStop) and getattr(message, "n_frames", 0) <= until:
                list(merger.take(message))
    return merger


def told(merger):
    [result] = merger.heartbeats()
    return regions_of(result.arrays)


class Paused(nullcontext):
    """A source whose frames pause until it is closed: nothing comes any more."""

    def __init__(self, messages, is_over):
        super().__init__(self)
        self.messages, self.is_over = messages, is_over

    def __iter__(self):
        yield from self.messages
        while not self.is_over():
            time.sleep(0.01)
            yield None

    def position(self):
        return {"message": 0}


def test_a_worker_says_who_it_is_and_what_is_saved(tmp_path):
    messages = [part for message in run_of() for part in Regions(2).cut(message) if part.region == 1]
    sink = ListSink()
    Pipeline(
        ListSource(messages),
        operators,
        [sink],
        partials=True,
        publish_every=EVERY,
        checkpoints=checkpoint.File(tmp_path / "checkpoint"),
        checkpoint_every=0,
    ).run()
    node = heartbeat.node_of(ledgers(sink.outputs)[-1].arrays)
    assert node == heartbeat.node_of(heartbeat.worker(0, 0.0))
    saved = [int(each.arrays["checkpoint"]) for each in ledgers(sink.outputs)]
    assert saved[0] == 0
    assert saved[-1] == N_FRAMES
    assert saved == sorted(saved)


def test_a_worker_to_whom_no_frame_comes_says_that_it_is_there(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.3)
    messages = [part for message in run_of()[:4] for part in Regions(2).cut(message) if part.region == 0]
    sink = ListSink()
    deadline = time.monotonic() + SOON
    over = lambda: len(ledgers(sink.outputs)) >= 3 or time.monotonic() > deadline  # noqa: E731
    began = time.monotonic()
    Pipeline(Paused(messages, over), operators, [sink], partials=True, publish_every=EVERY, runs=1).run()
    beats = [each for each in ledgers(sink.outputs) if not each.final]
    assert len(beats) >= 3
    assert time.monotonic() - began > 2 * heartbeat.BEAT, "it is not said all the time"
    assert {int(each.arrays["received"]) for each in beats[1:]} == {60}
    operators_told = {each.operator for each in sink.outputs if isinstance(each, Result) and not each.final}
    assert operators_told == {"ledger"}, "sums are not repeated"


def test_a_merger_tells_of_every_region_how_far_it_is_and_who_has_it():
    streams = [partials(run_of(lost=[60]) if region == 1 else run_of(), region) for region in range(REGIONS)]
    merger = fed(streams[:3], until=128)
    for message in streams[0]:
        if not isinstance(message, RunStop):
            list(merger.take(message))
    regions = told(merger)
    assert [region.frames for region in regions] == [300, 128, 128, 0]
    assert [region.lost for region in regions] == [0, 20, 0, 0]
    assert [region.rows for region in regions] == [(0, 2), (2, 4), (4, 6), (0, 0)]
    assert {region.node for region in regions[:3]} == {heartbeat.node_of(heartbeat.worker(0, 0.0))}
    assert np.isnan([region.age for region in regions]).tolist() == [False, False, False, True]


def test_of_a_region_that_says_nothing_it_is_known_for_how_long():
    merger = fed([stream[:1] for stream in all_partials(run_of())])
    before = told(merger)[0].age
    until(lambda: told(merger)[0].age > before + 0.2)
    list(merger.take(ledgers(partials(run_of(), 0))[0]))
    assert told(merger)[0].age < told(merger)[1].age


def test_workers_of_before_that_do_not_say_who_they_are_are_merged_all_the_same():
    merger = fed(list(map(without_who, all_partials(run_of()))))
    results = {each.operator: each for each in merger.interim()}
    assert results["multitau"].n_frames == N_FRAMES
    assert [(region.node, region.checkpoint, region.frames) for region in told(merger)] == [("", -1, N_FRAMES)] * 4


def test_who_computed_a_result_does_not_stand_in_it():
    merger, outputs = Merger(operators), []
    for stream in all_partials(run_of()):
        outputs += [each for message in stream for each in merger.take(message)]
    [final] = [each.arrays for each in ledgers(outputs)]
    assert not {*heartbeat.OF_A_WORKER} & final.keys()
    assert {each.operator for each in outputs if isinstance(each, Result) and not each.final} == {"regions"}


def test_names_longer_than_there_is_room_for_are_cut():
    [region] = regions_of(table([Region(node="é" * 100)]))
    assert region.node.startswith("é" * 31)
    assert len(region.node.encode()) <= 66
    assert heartbeat.node_of({"node": np.full(10**6, 65, np.uint8)}) == "A" * 64


@pytest.mark.parametrize(
    "damage",
    [
        {"frames": np.zeros((1, 1), np.int64)},
        {"lag": np.zeros(2)},
        {"rows": np.array([[-1, 8]])},
        {"rows": np.array([[8, 2**40]])},
        {"node": np.zeros((1, 0), np.uint8)},
        {"node": np.zeros(1, np.uint8)},
        {name: np.repeat(array, 4097, axis=0) for name, array in table([Region()]).items()},
    ],
)
def test_what_is_no_table_of_regions_is_refused(damage):
    with pytest.raises(ValueError, match=r"regions|rows"):
        regions_of({**table([Region()]), **damage})


def test_regions_are_told_with_who_has_them_and_those_that_are_silent_or_missing(page, run):
    known = [region(0), region(1, frames=1500, age=7.0), region(2, age=9.0, checkpoint=1200), Region()]
    with page.socket() as socket:
        page.publish(start(run), ledger(run, missing_regions=np.array([2])), regions(run, *known))
        head, arrays = hear(socket, lambda head: head["section"] == "regions" and head["n"] == 4)
    assert [each["state"] for each in head["regions"]] == ["well", "silent", "missing", "missing"]
    assert [each["behind"] for each in head["regions"]] == [0, 500, 0, 2000]
    assert [each["node"] for each in head["regions"]] == ["node0:1", "node1:1", "node2:1", ""]
    assert [each["checkpoint"] for each in head["regions"]] == [None, None, 1200, None]
    assert head["regions"][3]["age"] is None
    assert arrays["rows"].tolist() == [[0, 12], [12, 24], [24, 36], [0, 0]]


def test_of_many_regions_the_worst_are_told(page, run):
    known = [region(i, frames=2000 - i % 40) for i in range(100)]
    known[50] = region(50, age=60.0)
    with page.socket() as socket:
        page.publish(start(run), ledger(run, missing_regions=np.array([70])), regions(run, *known))
        head, _ = hear(socket, lambda head: head["section"] == "regions" and head["n"] == 100)
    told = [each["region"] for each in head["regions"]]
    assert len(told) == 16
    assert told == sorted(told)
    assert {50, 70} <= set(told)
    assert min(each["behind"] for each in head["regions"] if each["region"] not in (50, 70)) >= 33


def test_one_process_says_who_it_is(page, run):
    with page.socket() as socket:
        page.publish(start(run), ledger(run, **worker(1500, 0.3)))
        head, _ = hear(socket, lambda head: head["section"] == "regions" and head["n"] == 0)
    assert (head["node"].endswith(f":{os.getpid()}"), head["checkpoint"]) == (True, 1500)


def test_prometheus_is_told_of_the_regions_of_the_run_that_is_on_and_of_so_many_only(page, run):
    page.publish(start(run), ledger(run), regions(run, *[region(i, checkpoint=1000 + i) for i in range(100)]))
    page.wait_for(lambda now: now.get('xpcs_region_checkpoint_frame{region="63"}') == 1063)
    assert 'xpcs_region_frames{region="64"}' not in page.metrics()
    ended = region(1, frames=7, lost=3, ended=True, lag=np.nan)
    page.publish(start(f"{run}-b"), ledger(f"{run}-b"), regions(f"{run}-b", region(0), ended))
    page.wait_for(lambda now: now.get('xpcs_region_frames{region="1"}') == 7)
    now = {name: value for name, value in page.metrics().items() if name.startswith("xpcs_region_")}
    assert now.pop('xpcs_region_age_seconds{region="0"}') >= 0.1
    assert now == {
        'xpcs_region_frames{region="0"}': 2000,
        'xpcs_region_frames{region="1"}': 7,
        'xpcs_region_lost_frames{region="0"}': 0,
        'xpcs_region_lost_frames{region="1"}': 3,
        'xpcs_region_lag_seconds{region="0"}': 0.02,
    }


def test_a_word_of_the_regions_makes_no_result_younger():
    view = View(ROIMAP, source="", publish=lambda *_: None)
    for message in (start(), ledger()):
        view.take(message)
    age = view.state()[0]["age"]
    until(lambda: view.state()[0]["age"] > age)
    before = view.state()[0]["age"]
    view.take(regions("run-1", region(0)))
    assert view.state()[0]["age"] >= before


def test_how_long_a_result_waited_counts_until_it_is_served():
    ends = []
    view = View(ROIMAP, source="", publish=lambda _, __, end: ends.append(end))
    told = [start(), ledger(n_frames=10, **worker(0, 3.0)), ledger(n_frames=10, **worker(0, 9.0)), ledger(n_frames=20)]
    for message in told:
        view.take(message)
    known = [time.monotonic() - end for end in ends if end is not None]
    assert known == pytest.approx([3.0, 0.02], abs=1.0), "of frames that were served before it is not told again"


def test_the_page_shows_a_killed_worker_as_silent_and_then_who_has_its_regions(frames, qmap, tmp_path):
    with ExitStack() as stack:
        plane = Plane(f"zmq://{free()}/beamline", stack, tmp_path, qmap)
        first = plane.worker()
        plane.replay(frames, "20 Hz")
        page = free()
        plane.merger("--live", f"live://{page}")
        until(lambda: answers(int(page.rpartition(":")[2])), SOON)
        socket = stack.enter_context(connect(f"ws://{page}/live", max_size=None))

        def hear_all(says):
            def are_so(head):
                return (
                    head["section"] == "regions" and len(head["regions"]) == REGIONS and all(map(says, head["regions"]))
                )

            return hear(socket, are_so, SOON)[0]["regions"]

        def is_of(worker):
            return lambda region: region["state"] == "well" and region["node"].endswith(f":{worker.pid}")

        hear_all(lambda region: is_of(first)(region) and region["frames"] > 0 and region["checkpoint"] is not None)
        first.kill()
        hear_all(lambda region: region["state"] == "silent" and region["age"] > 5)
        second = plane.worker()
        until_said(second, "region 3 begins")
        regions = hear_all(is_of(second))
        assert [region["rows"] for region in regions] == [[0, 16], [16, 32], [32, 48], [48, 64]]
        with urlopen(f"http://{page}/metrics", timeout=SOON) as answer:
            numbers = answer.read().decode()
        assert 'xpcs_region_checkpoint_frame{region="3"}' in numbers
