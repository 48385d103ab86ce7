"""The lifecycle table of `stream.pipeline`, and what remains of a run that is interrupted anywhere."""

import contextlib
import itertools
import logging
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from stream import checkpoint, logs, pipeline, wire
from stream import ledger as ledger_module
from stream.errors import CheckpointError, DecodeError, RoiMapError, SinkError, SourceError
from stream.ledger import Ledger
from stream.messages import FrameBatch, Rejected, Result, RunStart, RunStop
from stream.operators.intensity import Intensity
from stream.operators.multitau import MultiTau
from stream.operators.scattering import Scattering
from stream.pipeline import Pipeline
from tests import hostile
from tests.conftest import events_of, make_roimap, make_start
from tests.sources import ListSink, ListSource, LiveSource

SHAPE = (6, 50)
ROIMAP = make_roimap(SHAPE)
FRAMES = np.random.default_rng(0).poisson(1.5, (60, *SHAPE)).astype("<u2")


def operators(start):
    return [MultiTau(start, ROIMAP), Scattering(start, ROIMAP), Intensity(start, ROIMAP)]


def batch(first, stop, run="run-1", **changes):
    return FrameBatch(**{"run": run, "first": first, "frames": FRAMES[first:stop], "timestamp_ns": 0} | changes)


def stop(n_frames=60, run="run-1", exit_status="success"):
    return RunStop(run=run, n_frames=n_frames, exit_status=exit_status)


RUN = [make_start(SHAPE), *(batch(first, first + 12) for first in range(0, 60, 12)), stop()]


def process(messages, *, sinks=None, source=ListSource, publish_every=1e9, **options):
    sink = ListSink()
    sinks = [sink] if sinks is None else sinks
    Pipeline(source(messages), operators, sinks, publish_every=publish_every, **options).run()
    return sink


def ledger(sink, run="run-1"):
    arrays = sink.results(final=True)[run, "ledger"]
    return {name: int(arrays[name]) for name in arrays if arrays[name].dtype == np.int64 and arrays[name].ndim == 0}


def assert_same_results(a, b):
    assert a.keys() == b.keys()
    for key in a:
        for name in a[key].keys() - {"lag"}:
            np.testing.assert_array_equal(a[key][name], b[key][name], err_msg=f"{key} {name}")


# The lifecycle table


def test_a_run_gives_its_start_its_final_results_and_its_end():
    sink = process(RUN)
    names = [o.operator if isinstance(o, Result) else type(o).__name__ for o in sink.outputs]
    assert names == ["RunStart", "multitau", "scattering", "intensity", "ledger", "RunStop"]
    assert sink.flushed == len(sink.outputs)
    assert all(o.final and o.n_frames == 60 for o in sink.outputs[1:-1])


def test_idle_frames_and_an_end_without_a_run_are_ignored():
    sink = process([batch(0, 12), stop(), None, Rejected(reason="x"), *RUN])
    assert_same_results(sink.results(final=True), process(RUN).results(final=True))


def test_the_start_of_the_running_run_again_is_ignored():
    assert_same_results(process([*RUN[:3], RUN[0], *RUN[3:]]).results(final=True), process(RUN).results(final=True))


def test_the_next_run_ends_one_whose_end_never_came():
    sink = process([*RUN[:3], make_start(SHAPE, run="run-2"), stop(0, "run-2")])
    ends = [(o.run, o.n_frames, o.exit_status) for o in sink.outputs if isinstance(o, RunStop)]
    assert ends == [("run-1", 24, "fail"), ("run-2", 0, "success")]
    assert ledger(sink)["sent"] == -1
    assert ledger(sink, "run-2") | {"sent": 0, "received": 0} == ledger(sink, "run-2")


def test_another_run_of_the_same_name_is_not_the_same_run():
    again = make_start(SHAPE, metadata={"start_time": "2026-11-22T10:00:00+00:00"})
    sink = process([*RUN[:3], again, batch(0, 12), stop(12)])
    ends = [(o.n_frames, o.exit_status) for o in sink.outputs if isinstance(o, RunStop)]
    assert ends == [(24, "fail"), (12, "success")]


def test_frames_and_ends_of_another_run_are_strays_and_change_nothing():
    sink = process([*RUN[:3], batch(0, 12, "old"), stop(5, "old"), *RUN[3:]])
    assert ledger(sink)["stray"] == 2
    assert_same_results(
        {k: v for k, v in sink.results(final=True).items() if k[1] != "ledger"},
        {k: v for k, v in process(RUN).results(final=True).items() if k[1] != "ledger"},
    )


def test_frames_of_another_region_are_strays():
    assert ledger(process([*RUN[:2], batch(12, 24, region=1), *RUN[2:]]))["stray"] == 1


def test_rejected_messages_are_counted():
    assert ledger(process([*RUN[:2], Rejected(reason="x"), *RUN[2:]]))["undecodable"] == 1


@pytest.mark.parametrize("frames", [FRAMES[12:24, :3], FRAMES[12:24].astype("<u4")])
def test_frames_that_do_not_fit_their_run_are_lost_and_the_run_goes_on(frames):
    counts = ledger(process([*RUN[:2], batch(12, 24, frames=frames), *RUN[3:]]))
    assert (counts["received"], counts["lost"], counts["undecodable"]) == (48, 12, 1)


def test_a_run_that_no_map_fits_is_refused_and_the_next_one_processed():
    def choosy(start):
        if start.run == "bad":
            raise RoiMapError("the map does not fit")
        return operators(start)

    sink = ListSink()
    messages = [make_start(SHAPE, run="bad"), batch(0, 3, "bad"), stop(3, "bad"), *RUN]
    with pytest.raises(RoiMapError, match="does not fit"):
        Pipeline(ListSource(messages), choosy, [sink]).run()
    assert_same_results(sink.results(final=True), process(RUN).results(final=True))


def test_a_refused_run_is_an_error_once_all_wanted_runs_are_done():
    def never(start):
        raise RoiMapError("the map does not fit")

    with pytest.raises(RoiMapError, match="does not fit"):
        Pipeline(ListSource(RUN), never, [], runs=1).run()
    assert "run" not in logs._known.get()  # what is logged from now on is not of that run


def test_after_the_wanted_number_of_runs_it_returns():
    source = ListSource([*RUN, *(make_start(SHAPE, run="run-2"), stop(0, "run-2"))])
    Pipeline(source, operators, [], runs=1).run()
    assert source.next == len(RUN)


# The ledger


def test_what_was_sent_is_what_was_received_and_lost():
    sink = process([RUN[0], batch(3, 12), batch(20, 24), stop()])
    counts = ledger(sink)
    assert (counts["sent"], counts["received"], counts["lost"]) == (60, 13, 47)
    spans = sink.results(final=True)["run-1", "ledger"]["lost_spans"]
    assert spans.tolist() == [[0, 3], [12, 20], [24, 60]]


def test_late_and_duplicate_frames_are_told_apart_and_not_used():
    out_of_order = [RUN[0], batch(0, 12), batch(24, 36), batch(12, 24), batch(30, 48), batch(48, 60), stop()]
    sink = process(out_of_order)
    counts = ledger(sink)
    assert {name: counts[name] for name in ("received", "lost", "late", "duplicate")} == {
        "received": 48, "lost": 12, "late": 12, "duplicate": 6,
    }  # fmt: skip
    without = process([RUN[0], batch(0, 12), batch(24, 60), stop()])
    key = ("run-1", "multitau")
    np.testing.assert_array_equal(sink.results(final=True)[key]["G2"], without.results(final=True)[key]["G2"])


def test_events_that_are_late_duplicate_or_do_not_fit_are_treated_as_dense_frames_are():
    spans = [(0, 12), (24, 36), (12, 24), (30, 48), (48, 60)]
    dense = process([RUN[0], *(batch(*span) for span in spans), stop()])
    events = [batch(*span, frames=events_of(FRAMES[slice(*span)])) for span in spans]
    sparse = process([RUN[0], *events, stop()])
    assert_same_results(dense.results(final=True), sparse.results(final=True))
    wrong = [batch(12, 24, frames=events_of(frames)) for frames in (FRAMES[12:24, :3], FRAMES[12:24].astype("<u4"))]
    counts = ledger(process([RUN[0], events[0], *wrong, stop()]))
    assert (counts["received"], counts["undecodable"]) == (12, 2)


def test_frames_beyond_what_was_planned_are_rejected_and_do_not_spoil_the_rest():
    start = make_start(SHAPE, metadata={"n_frames": 60})
    counts = ledger(process([start, RUN[1], replace(batch(0, 12), first=2**40), *RUN[2:]]))
    assert (counts["received"], counts["lost"], counts["undecodable"]) == (60, 0, 1)


@pytest.mark.parametrize(("came", "expected"), [(60, (60, 0, "success")), (24, (60, 36, "abort"))])
def test_a_source_that_does_not_know_how_many_were_sent_is_closed_on_what_was_planned(came, expected):
    start = make_start(SHAPE, metadata={"n_frames": 60})
    sink = process([start, *(batch(first, first + 12) for first in range(0, came, 12)), stop(0)])
    counts = ledger(sink)
    assert (counts["sent"], counts["lost"], sink.outputs[-1].exit_status) == expected
    assert sink.outputs[-1].n_frames == 60


def test_a_ledger_of_many_gaps_stays_small_and_covers_them(monkeypatch):
    monkeypatch.setattr(ledger_module, "MAX_SPANS", 3)
    one = Ledger()
    for first in range(2, 40, 4):
        one.admit(first, 2)
    assert one.lost == 20
    assert one.arrays()["lost_spans"].tolist() == [[0, 2], [4, 6], [8, 38]]


# Sinks that fail


def test_an_interim_result_that_is_refused_is_dropped(caplog):
    sink = ListSink(refuse=lambda output: isinstance(output, Result) and not output.final)
    process(RUN, sinks=[sink], publish_every=0)
    assert_same_results(sink.results(final=True), process(RUN).results(final=True))
    assert "dropped" in caplog.text


def test_interim_results_are_published_while_the_run_is_on():
    sink = process(RUN, publish_every=0)
    counted = [o.n_frames for o in sink.outputs if isinstance(o, Result) and o.operator == "multitau" and not o.final]
    assert counted == [0, 12, 24, 36, 48, 60]


class Slow(Intensity):
    """Results of it take long."""

    TAKES = 0.02

    def result(self):
        time.sleep(self.TAKES)
        return super().result()

    def partial(self):
        time.sleep(self.TAKES)
        return super().partial()


@pytest.mark.parametrize("partials", [False, True])
def test_interim_results_that_take_long_are_few_and_frames_go_on(partials):
    n_batches, n, every = 500, 4, 0.004

    def batches():
        for first in range(0, n * n_batches, n):
            time.sleep(every)  # of the detector
            yield FrameBatch(run="run-1", first=first, frames=FRAMES[:n], timestamp_ns=0)

    coming = batches()
    sink, began = ListSink(), time.monotonic()
    messages = [make_start(SHAPE, frame_time=every / n), *[lambda: next(coming)] * n_batches, stop(n * n_batches)]
    make = lambda start: [Slow(start, ROIMAP)]  # noqa: E731
    Pipeline(ListSource(messages), make, [sink], publish_every=every, partials=partials).run()
    took = time.monotonic() - began
    interim = [o.n_frames for o in sink.outputs if isinstance(o, Result) and o.operator == "intensity" and not o.final]
    assert 3 < len(interim) < 3 + 1.5 * pipeline.SHARE * took / Slow.TAKES
    if partials:
        assert all(n_frames % n == 0 for n_frames in interim)
        # They would be multiples of 64 n where nothing else runs.
        assert sum(n_frames % (2 * n) == 0 for n_frames in interim) >= len(interim) - 3, "other regions have them, too"


def test_a_final_result_that_is_refused_is_an_error_and_delivered_by_a_restart(tmp_path):
    path = tmp_path / "checkpoint"
    refusing = ListSink(refuse=lambda output: isinstance(output, Result) and output.final)
    source = ListSource(RUN)
    with pytest.raises(SinkError, match="refused"):
        Pipeline(source, operators, [refusing], checkpoints=checkpoint.File(path)).run()
    sink = process([], checkpoints=checkpoint.File(path))
    assert_same_results(sink.results(final=True), process(RUN).results(final=True))
    assert isinstance(sink.outputs[-1], RunStop)


def test_a_sink_that_fails_does_not_keep_results_from_the_others():
    refusing, good = ListSink(refuse=lambda output: getattr(output, "final", False)), ListSink()
    with pytest.raises(SinkError, match="refused"):
        process(RUN, sinks=[refusing, good])
    assert_same_results(good.results(final=True), process(RUN).results(final=True))
    assert isinstance(good.outputs[-1], RunStop)
    assert good.flushed == len(good.outputs)


def test_a_sink_that_refuses_the_start_does_not_lose_the_run_of_a_live_source(tmp_path):
    path = tmp_path / "checkpoint"
    refusing = ListSink(refuse=lambda output: isinstance(output, RunStart))
    with pytest.raises(SinkError, match="refused"):
        process(RUN, sinks=[refusing], source=LiveSource, checkpoints=checkpoint.File(path))
    sink = process(RUN[1:], source=LiveSource, checkpoints=checkpoint.File(path))
    assert_same_results(sink.results(final=True), process(RUN).results(final=True))
    assert isinstance(sink.outputs[0], RunStart)


# Nothing to do


def test_a_source_of_which_nothing_can_be_read_is_an_error():
    with pytest.raises(SourceError, match="nothing could be read: no such channel"):
        process([Rejected(reason="no such channel"), None])


def test_a_source_that_was_done_before_is_said_to_be(tmp_path, caplog):
    process(RUN, checkpoints=checkpoint.File(tmp_path / "checkpoint"))
    process(RUN, checkpoints=checkpoint.File(tmp_path / "checkpoint"))
    assert f"nothing is left to do after {tmp_path / 'checkpoint'}" in caplog.text


# Interruptions


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


def killed():
    raise Killed


@pytest.mark.parametrize("at", range(len(RUN) + 1))
def test_killed_at_any_message_and_resumed_the_result_is_bit_identical(tmp_path, at):
    path = tmp_path / "checkpoint"
    first = ListSink()
    with pytest.raises(Killed):
        Pipeline(
            ListSource([*RUN[:at], killed]),
            operators,
            [first],
            checkpoints=checkpoint.File(path),
            checkpoint_every=0,
            publish_every=0,
        ).run()
    second = process(RUN, checkpoints=checkpoint.File(path))
    delivered = first.results(final=True) | second.results(final=True)
    assert_same_results(delivered, process(RUN).results(final=True))


TWO_RUNS = [
    make_start(SHAPE),
    batch(0, 12),
    batch(30, 42),
    make_start(SHAPE, run="run-2"),
    batch(0, 12, "run-2"),
    stop(12, "run-2"),
]


@pytest.mark.parametrize("at", range(1, 30))
def test_killed_at_any_step_of_two_runs_of_which_one_end_was_lost_both_are_delivered(tmp_path, monkeypatch, at):
    """Steps are checkpoints saved and outputs written; run-1 has gaps and never ends."""
    path, steps = tmp_path / "checkpoint", itertools.count(1)
    save = checkpoint.save

    def step():
        if next(steps) == at:
            raise Killed

    def counted_save(path, state):
        step()
        save(path, state)
        step()

    first = ListSink(refuse=lambda output: step())
    monkeypatch.setattr(checkpoint, "save", counted_save)
    with contextlib.suppress(Killed):
        process(TWO_RUNS, sinks=[first], checkpoints=checkpoint.File(path), checkpoint_every=0)
    monkeypatch.setattr(checkpoint, "save", save)
    second = process(TWO_RUNS, checkpoints=checkpoint.File(path))
    delivered = first.results(final=True) | second.results(final=True)
    assert_same_results(delivered, process(TWO_RUNS).results(final=True))


def test_killed_between_checkpoints_the_source_replays_what_was_not_saved(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        Pipeline(
            ListSource([*RUN[:4], killed]), operators, [], checkpoints=checkpoint.File(path), checkpoint_every=1e9
        ).run()
    sink = process(RUN, checkpoints=checkpoint.File(path))
    assert_same_results(sink.results(final=True), process(RUN).results(final=True))


def test_a_run_whose_end_never_came_ends_where_its_source_stands_also_after_a_restart(tmp_path):
    path = tmp_path / "checkpoint"
    store = checkpoint.File(path)
    with pytest.raises(Killed):
        Pipeline(ListSource([*RUN[:3], killed]), operators, [], checkpoints=store, checkpoint_every=0).run()
    saved = []

    class Store(checkpoint.File):
        def save(self, state):
            saved.append(dict(state.position))
            super().save(state)

    process([*RUN[:3], *TWO_RUNS[-3:]], checkpoints=Store(path))
    assert all(saved), "the beginning is no place to go on from"


def test_what_comes_without_a_run_is_not_needed_again_and_yet_not_passed_by_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "OFTEN", 0.0)
    source = ListSource([batch(0, 12), stop(12), None])
    store = checkpoint.Acknowledged(checkpoint.File(tmp_path / "checkpoint"), source)
    process([], source=lambda _: source, checkpoints=store)
    assert source.acknowledged == {"message": 3}
    assert checkpoint.load(tmp_path / "checkpoint") is None


def test_frames_are_taken_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    save, taken, written = checkpoint.save, threading.Event(), []

    def slow_save(path, state):
        if state.running is not None and state.running.stop is None and written:
            assert taken.wait(30), "no frame was taken until the checkpoint was written"
        save(path, state)
        written.append(state)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    sink = process(
        [*RUN[:-1], taken.set, RUN[-1]], checkpoints=checkpoint.File(tmp_path / "checkpoint"), checkpoint_every=1e-9
    )
    assert_same_results(sink.results(final=True), process(RUN).results(final=True))
    assert len(written) > 3


def test_a_checkpoint_that_cannot_be_written_is_an_error_while_the_run_is_on(tmp_path, monkeypatch):
    save, failed = checkpoint.save, threading.Event()

    def failing_save(path, state):
        if path.exists():
            failed.set()
            raise CheckpointError(f"{path}: no space left")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", failing_save)
    messages = [*RUN[:2], lambda: failed.wait(30), *RUN[2:5]]
    with pytest.raises(CheckpointError, match="no space left"):
        process(messages, checkpoints=checkpoint.File(tmp_path / "checkpoint"), checkpoint_every=1e-9)


def test_without_a_way_back_what_came_meanwhile_is_counted_as_lost(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        Pipeline(
            LiveSource([*RUN[:3], killed]), operators, [], checkpoints=checkpoint.File(path), checkpoint_every=0
        ).run()
    sink = process([RUN[5], stop()], source=LiveSource, checkpoints=checkpoint.File(path))
    counts = ledger(sink)
    assert (counts["sent"], counts["received"], counts["lost"]) == (60, 36, 24)


def test_told_to_stop_it_leaves_a_run_that_can_be_resumed(tmp_path):
    path, event = tmp_path / "checkpoint", threading.Event()
    messages = [*RUN[:3], lambda: event.set(), *RUN[3:]]
    first = process(messages, checkpoints=checkpoint.File(path), stop=event)
    assert not first.results(final=True)
    assert first.results(final=False)["run-1", "ledger"]["received"] == 24
    second = process(messages, checkpoints=checkpoint.File(path))
    assert_same_results(second.results(final=True), process(RUN).results(final=True))


def test_told_to_stop_what_a_live_source_holds_is_taken_first(tmp_path):
    path, event = tmp_path / "checkpoint", threading.Event()
    event.set()
    first = process([*RUN[:4], None, *RUN[4:]], source=LiveSource, checkpoints=checkpoint.File(path), stop=event)
    assert first.results(final=False)["run-1", "ledger"]["received"] == 36


def test_told_to_stop_without_a_checkpoint_it_ends_the_run_with_what_came():
    event = threading.Event()
    sink = process([*RUN[:3], lambda: event.set(), *RUN[3:]], stop=event)
    assert sink.outputs[-1].exit_status == "abort"
    assert ledger(sink)["received"] == 24


def test_a_source_that_ends_within_a_run_ends_it():
    sink = process(RUN[:3])
    assert sink.outputs[-1].exit_status == "abort"
    assert ledger(sink)["received"] == 24


def test_a_transport_that_is_gone_is_an_error_and_what_came_is_delivered():
    sink = ListSink()
    with pytest.raises(SourceError, match="gone"):
        Pipeline(ListSource([*RUN[:3], SourceError("gone")]), operators, [sink]).run()
    assert ledger(sink)["received"] == 24


def test_a_finished_run_is_not_done_again(tmp_path):
    process(RUN, checkpoints=checkpoint.File(tmp_path / "checkpoint"))
    assert process(RUN, checkpoints=checkpoint.File(tmp_path / "checkpoint")).outputs == []


# Damaged checkpoints


def saved(tmp_path):
    path, event = tmp_path / "checkpoint", threading.Event()
    process([*RUN[:3], lambda: event.set()], checkpoints=checkpoint.File(path), stop=event)
    return path


@pytest.mark.parametrize("where", [0, 30, 40, 200, 0.5, -1])
def test_a_checkpoint_with_one_wrong_bit_is_refused(tmp_path, where):
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(where * len(content)) if isinstance(where, float) else where] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        process(RUN, checkpoints=checkpoint.File(path))


@pytest.mark.parametrize("length", [0, 10, 33, 100, -1])
def test_a_checkpoint_that_is_cut_short_is_refused(tmp_path, length):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=str(path)):
        process(RUN, checkpoints=checkpoint.File(path))


def test_a_checkpoint_of_other_roi_maps_is_refused(tmp_path):
    other = make_roimap(SHAPE, seed=1)
    with pytest.raises(CheckpointError, match="roimap"):
        Pipeline(
            ListSource(RUN),
            lambda start: [MultiTau(start, other), Scattering(start, other), Intensity(start, other)],
            [],
            checkpoints=checkpoint.File(saved(tmp_path)),
        ).run()


def test_a_checkpoint_of_other_operators_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="made with multitau, scattering, intensity, not with intensity"):
        Pipeline(
            ListSource(RUN), lambda start: [Intensity(start, ROIMAP)], [], checkpoints=checkpoint.File(saved(tmp_path))
        ).run()


def test_an_open_run_of_another_source_is_refused(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="run run-1 in it is of another source"):
        process(RUN, source=LiveSource, checkpoints=checkpoint.File(path))


def test_after_a_finished_run_another_source_begins_at_its_beginning(tmp_path):
    path = tmp_path / "checkpoint"
    process(RUN, checkpoints=checkpoint.File(path))
    sink = process(RUN, source=LiveSource, checkpoints=checkpoint.File(path))
    assert_same_results(sink.results(final=True), process(RUN).results(final=True))


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        process(RUN, checkpoints=checkpoint.File(tmp_path / "nowhere" / "checkpoint"))


# What anyone may send


@pytest.mark.parametrize(("name", "parts", "said"), hostile.CORPUS, ids=[name for name, *_ in hostile.CORPUS])
def test_after_a_malformed_message_good_frames_still_count(name, parts, said, caplog):
    caplog.set_level(logging.CRITICAL)

    def decoded(parts):
        try:
            return wire.decode(parts)
        except DecodeError as error:
            return Rejected(reason=str(error))

    good = [[bytes(part) for part in wire.encode(message)] for message in RUN]
    messages = [decoded(parts) for parts in [*good[:3], parts, *good[3:]]]
    counts = ledger(process(messages))
    assert (counts["received"], counts["lost"], counts["undecodable"]) == (60, 0, 1)


def test_a_restart_tells_when_the_run_was_first_announced(tmp_path):
    path, event = tmp_path / "checkpoint", threading.Event()
    messages = [*RUN[:3], lambda: event.set(), *RUN[3:]]
    first = process(messages, checkpoints=checkpoint.File(path), stop=event)
    second = process(messages, checkpoints=checkpoint.File(path))
    assert datetime.fromisoformat(first.outputs[0].metadata["announced"]) <= datetime.now(UTC)
    assert second.outputs[0].metadata == first.outputs[0].metadata
