"""A derived Bluesky run: what its documents say, and that it is one run whatever happens in the middle of it."""

import json
import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace

import event_model
import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
from bluesky.callbacks import LivePlot, LiveTable
from bluesky.callbacks.best_effort import BestEffortCallback

from stream import checkpoint
from stream.documents import pack, unpack
from stream.errors import CheckpointError, ConfigError, SinkError
from stream.messages import Result, RunStop
from stream.pipeline import Pipeline
from stream.sinks.hdf5 import Hdf5Sink
from tests import bluesky
from tests.bluesky import (
    CONTRAST,
    LAG,
    N_FRAMES,
    N_UPDATES,
    RATES,
    RUN,
    Kept,
    Killed,
    assert_valid,
    delays,
    documents_of,
)
from tests.sources import ListSink


def given():
    return bluesky.outputs()[1]


def final(operator):
    return next(each for each in given() if isinstance(each, Result) and each.final and each.operator == operator)


def of(documents, wanted):
    return [document for name, document in documents if name == wanted]


def without(given, *operators):
    return [each for each in given if getattr(each, "operator", None) not in operators]


def with_metadata(**metadata):
    start, *rest = given()
    return [replace(start, metadata={**start.metadata, **metadata}), *rest]


@pytest.fixture
def file(tmp_path):
    """The result file of the run, and its documents."""
    kept = Kept()
    with (
        bluesky.sink(kept) as sink,
        Hdf5Sink(tmp_path / "r.h5", qmap=bluesky.outputs()[0], on_written=sink.written) as to,
    ):
        for output in given():
            to.write(output)
            sink.write(output)
    return tmp_path / "r.h5", kept.documents


def test_documents_are_one_valid_run():
    assert_valid(documents_of())


def test_documents_are_valid_once_they_were_sent():
    assert_valid([unpack(pack(name, document)) for name, document in documents_of()])


def test_documents_with_lists_in_the_place_of_arrays_are_valid():
    assert_valid([(name, event_model.sanitize_doc(document)) for name, document in documents_of()])


def test_documents_with_a_result_file_are_valid(file):
    assert_valid(file[1])


def test_the_run_names_the_raw_run_and_how_it_was_analysed():
    (start,) = of(documents_of(analysis={"levels": 16}), "start")
    assert start["original_run_uid"] == RUN
    assert start["uid"] != RUN
    assert (start["plan_name"], start["plan_type"], start["purpose"]) == ("xpcs_live", "generator", "analysis")
    assert start["analysis"]["levels"] == 16
    assert start["analysis"]["frame_period_s"] == 1e-3
    assert start["analysis"]["qmap"]["sha256"] == bluesky.outputs()[0]["attributes"]["hash"]


def test_facts_of_the_raw_run_are_copied():
    told = {
        "scan_id": 117,
        "sample": {"name": "silica"},
        "data_session": "pass-317000",
        "tiled_access_tags": ["pass-317000"],
        "plan_name": "count",
        "announced": "now",
    }
    (start,) = of(documents_of(with_metadata(**told)), "start")
    assert {name: start[name] for name in ("scan_id", "sample", "data_session", "tiled_access_tags")} == {
        name: told[name] for name in ("scan_id", "sample", "data_session", "tiled_access_tags")
    }
    assert start["original_plan_name"] == "count"
    assert "announced" not in start


def test_a_fact_that_event_model_does_not_take_is_left_out_and_said(caplog):
    documents = documents_of(with_metadata(data_session=5, scan_number="x", sample="silica"))
    (start,) = of(documents, "start")
    assert "data_session" not in start
    assert start["scan_id"] == -1
    assert start["sample"] == "silica"
    assert "data_session = 5: left out" in caplog.text
    assert_valid(documents)


def test_axes_are_in_the_configuration():
    configuration = of(documents_of(), "descriptor")[0]["configuration"]["xpcs"]["data"]
    np.testing.assert_allclose(configuration["xpcs_tau"], final("multitau").arrays["tau"])
    qmap = bluesky.outputs()[0]
    assert configuration["xpcs_q"] == qmap["dynamic_v_list_dim0"].tolist()
    assert configuration["xpcs_phi"] == [0.0] * 4


def test_bins_of_a_map_with_two_axes_have_both():
    qmap = {
        **bluesky.outputs()[0],
        "dynamic_num_pts": np.array([2, 3]),
        "dynamic_v_list_dim0": np.array([0.1, 0.2]),
        "dynamic_v_list_dim1": np.array([0.0, 120.0, 240.0]),
        "dynamic_index_mapping": np.array([0, 2, 3, 4], "u1"),
    }
    kept = Kept()
    with bluesky.BlueskySink([kept], qmap=qmap, delays=delays) as sink:
        sink.write(given()[0])
    configuration = kept.documents[1][1]["configuration"]["xpcs"]["data"]
    assert configuration["xpcs_q"] == [0.1, 0.1, 0.2, 0.2]
    assert configuration["xpcs_phi"] == [0.0, 240.0, 0.0, 120.0]


def test_the_last_event_is_the_final_result():
    event = of(documents_of(), "event")[-1]["data"]
    multitau = final("multitau").arrays
    np.testing.assert_array_equal(event["xpcs_g2"], multitau["g2"].T)
    np.testing.assert_array_equal(event["xpcs_g2_err"], multitau["g2_err"].T)
    np.testing.assert_array_equal(event["xpcs_n_pairs"], multitau["n_pairs"])
    np.testing.assert_array_equal(event["xpcs_saxs_1d"], final("scattering").arrays["scattering_1d"])
    assert event["xpcs_mean_intensity"] == final("intensity").arrays["intensity"].mean()
    assert (event["xpcs_frames"], event["xpcs_frames_dropped"], event["xpcs_lag"]) == (N_FRAMES, 3, LAG)
    assert (event["xpcs_source_start"], event["xpcs_source_stop"]) == (0, N_FRAMES)


def test_contrast_and_rate_are_those_of_the_sample_at_the_bin_that_was_asked_for():
    for fitted in (1, 3):
        event = of(documents_of(fitted=fitted), "event")[-1]["data"]
        assert abs(event["xpcs_contrast"] - CONTRAST) < 0.2 * CONTRAST
        assert abs(event["xpcs_relaxation_rate"] - RATES[fitted]) < 0.3 * RATES[fitted]
        assert 0 < event["xpcs_contrast_err"] < 0.2 * CONTRAST
        assert 0 < event["xpcs_relaxation_rate_err"] < 0.3 * RATES[fitted]


def test_arrays_have_one_shape_and_nan_where_a_delay_is_not_reached():
    events = of(documents_of(), "event")
    for event in events:
        n_known = len(delays(event["data"]["xpcs_frames"]))
        assert event["data"]["xpcs_g2"].shape == (4, len(delays(N_FRAMES)))
        assert np.isfinite(event["data"]["xpcs_g2"][:, :n_known]).all()
        assert np.isnan(event["data"]["xpcs_g2"][:, n_known:]).all()
        assert (event["data"]["xpcs_n_pairs"][n_known:] == 0).all()
    assert np.isnan(events[0]["data"]["xpcs_g2"]).any()


def test_a_run_that_nobody_planned_has_all_delays_that_there_are():
    documents = documents_of(with_metadata(n_frames=0))
    assert of(documents, "event")[-1]["data"]["xpcs_g2"].shape == (4, 68)
    assert_valid(documents)


def test_delays_beyond_the_plan_are_left_out():
    documents = documents_of(with_metadata(n_frames=100))
    n_tau = len(delays(100))
    np.testing.assert_array_equal(
        of(documents, "event")[-1]["data"]["xpcs_g2"], final("multitau").arrays["g2"][:n_tau].T
    )
    assert_valid(documents)


def test_an_event_alone_tells_all_that_is_known():
    last = of(documents_of(), "event")[-1]
    (alone,) = of(documents_of(given()[:1] + given()[-5:]), "event")
    np.testing.assert_equal(alone["data"], last["data"])


def test_every_update_is_an_event_and_the_end_is_one_more():
    assert [event["seq_num"] for event in of(documents_of(), "event")] == list(range(1, N_UPDATES + 2))


def test_events_come_at_most_as_often_as_asked_for():
    assert [event["data"]["xpcs_frames"] for event in of(documents_of(every=3600.0), "event")] == [
        N_FRAMES // (N_UPDATES + 1),
        N_FRAMES,
    ]


def test_operators_that_are_not_there_leave_nan():
    documents = documents_of(without(given(), "scattering", "intensity"))
    event = of(documents, "event")[-1]["data"]
    assert np.isnan(event["xpcs_saxs_1d"]).all()
    assert np.isnan(event["xpcs_mean_intensity"])
    assert_valid(documents)


@pytest.mark.parametrize("exit_status", ["success", "abort", "fail"])
def test_the_exit_status_is_that_of_the_raw_run(exit_status):
    documents = documents_of([*given()[:-1], replace(given()[-1], exit_status=exit_status)])
    (stop,) = of(documents, "stop")
    assert (stop["exit_status"], stop["raw_exit_status"]) == (exit_status, exit_status)
    assert stop["reason"] == ("" if exit_status == "success" else f"{exit_status} after {N_FRAMES} frames")
    assert_valid(documents)


def test_a_run_that_ended_before_anything_was_known_is_a_run_without_events():
    documents = documents_of([given()[0], RunStop(run=RUN, n_frames=0, exit_status="abort")])
    assert_valid(documents)
    assert of(documents, "stop")[0]["num_events"] == {"primary": 0}


def test_the_result_file_is_told_where_what_stands_in_it(file):
    path, documents = file
    (descriptor,) = [each for each in of(documents, "descriptor") if each["name"] == "result"]
    resources = {each["data_key"]: each for each in of(documents, "stream_resource")}
    assert set(resources) == set(descriptor["data_keys"])
    with h5py.File(path) as result:
        for key, resource in resources.items():
            assert resource["uri"] == f"file://localhost{path}"
            dataset = result[resource["parameters"]["dataset"]]
            assert (
                list(dataset.shape)[-len(descriptor["data_keys"][key]["shape"]) :]
                == descriptor["data_keys"][key]["shape"]
            )
            assert descriptor["data_keys"][key]["dtype_numpy"] == dataset.dtype.str
    assert {each["stream_resource"] for each in of(documents, "stream_datum")} == {
        each["uid"] for each in resources.values()
    }


def test_a_file_that_is_no_result_is_not_told_of(tmp_path, caplog):
    kept = Kept()
    (tmp_path / "r.h5").write_text("no")
    with bluesky.sink(kept) as sink:
        for output in given():
            if isinstance(output, RunStop):
                sink.written(tmp_path / "r.h5")
            sink.write(output)
    assert "r.h5 is not told of in documents" in caplog.text
    assert_valid(kept.documents)


def test_a_file_that_is_gone_is_not_told_of(tmp_path, caplog):
    kept = Kept()
    with (
        bluesky.sink(kept) as sink,
        Hdf5Sink(tmp_path / "r.h5", qmap=bluesky.outputs()[0], on_written=sink.written) as to,
    ):
        for output in given():
            to.write(output)
        (tmp_path / "r.h5").unlink()
        for output in given():
            sink.write(output)
    assert "r.h5 is not told of in documents" in caplog.text
    assert_valid(kept.documents)


def test_runs_that_overlap_are_told_apart():
    other = [replace(output, run="other") for output in given()]
    kept = Kept()
    with bluesky.sink(kept) as sink:
        for pair in zip(given(), other, strict=True):
            for output in pair:
                sink.write(output)
    routed = {}

    def factory(name, start):
        mine = routed.setdefault(start["original_run_uid"], [])

        def keep(name, document):
            pages = event_model.unpack_event_page(document) if name == "event_page" else None
            mine.extend([("event", event) for event in pages] if pages else [(name, document)])

        return [keep], []

    router = event_model.RunRouter([factory])
    for name, document in kept.documents:
        router(name, document)
    assert set(routed) == {RUN, "other"}
    for documents in routed.values():
        assert_valid(documents)


def test_a_pipeline_publishes_what_stands_in_its_result_file(tmp_path):
    kept = Kept()
    with (
        bluesky.sink(kept) as sink,
        Hdf5Sink(tmp_path / "r.h5", qmap=bluesky.outputs()[0], on_written=sink.written) as file,
        bluesky.source() as source,
    ):
        Pipeline(source, bluesky.operators, [file, sink], publish_every=0.0).run()
    assert_valid(kept.documents)
    assert {document["name"] for document in of(kept.documents, "descriptor")} == {"primary", "result"}
    events = of(kept.documents, "event")
    assert len(events) > 2
    with h5py.File(tmp_path / "r.h5") as result:
        np.testing.assert_array_equal(events[-1]["data"]["xpcs_g2"], result["xpcs/multitau/normalized_g2"][()].T)
    np.testing.assert_array_equal(events[-1]["data"]["xpcs_g2"], final("multitau").arrays["g2"].T)


def piped(directory, until):
    """What a pipeline publishes that is stopped after so many frames, and may have begun in another process."""
    kept, stop = Kept(), threading.Event()
    stopper = ListSink(lambda output: getattr(output, "n_frames", 0) >= until and stop.set())
    with bluesky.sink(kept, memory=directory / "m.json") as sink, bluesky.source() as source:
        options = {"checkpoints": checkpoint.File(directory / "checkpoint"), "publish_every": 0.0, "stop": stop}
        Pipeline(source, bluesky.operators, [sink, stopper], **options).run()
    return kept.documents


def test_a_pipeline_that_is_stopped_and_resumed_publishes_one_run(tmp_path):
    first, second = piped(tmp_path, 300), piped(tmp_path, N_FRAMES)
    assert "stop" not in dict(first)
    assert_valid(first + second)
    np.testing.assert_array_equal(of(second, "event")[-1]["data"]["xpcs_g2"], final("multitau").arrays["g2"].T)


def uid_of(*given, **options):
    return of(documents_of(given, **options), "start")[0]["uid"]


def test_the_same_run_has_the_same_uids_and_another_analysis_has_others():
    start = given()[0]
    uid = uid_of(start)
    assert uid_of(start) == uid
    assert uid_of(replace(start, run="other")) != uid
    assert uid_of(*with_metadata(start_time="2026-11-22T00:00:00")[:1]) != uid
    assert uid_of(start, fitted=1) != uid
    assert uid_of(start, analysis={"levels": 3}) != uid


N_DOCUMENTS = len(documents_of())


@pytest.mark.parametrize("n", range(1, len(given())))
def test_a_sink_that_dies_between_two_outputs_publishes_nothing_twice(tmp_path, n):
    documents = documents_of(given()[:n], memory=tmp_path / "m.json")
    documents += documents_of([given()[0], *given()[n:]], memory=tmp_path / "m.json")
    assert_valid(documents)


@pytest.mark.parametrize("at", range(N_DOCUMENTS))
@pytest.mark.parametrize("when", ["dies_before", "dies_after"])
def test_a_sink_that_dies_at_any_document_goes_on_with_the_same_run(tmp_path, at, when):
    kept = Kept(**{when: at})
    n_done = 0
    with suppress(Killed), bluesky.sink(kept, memory=tmp_path / "m.json") as sink:
        for n_done, output in enumerate(given()):  # noqa: B007
            sink.write(output)
        pytest.fail("it did not die")
    again = Kept()
    # As a pipeline does: the start comes again, then what is new; the end, if that had begun, all of it.
    rest = given()[-5:] if isinstance(given()[n_done], RunStop) else given()[max(n_done, 1) :]
    with bluesky.sink(again, memory=tmp_path / "m.json") as sink:
        for output in [given()[0], *rest]:
            sink.write(output)
    both = kept.documents + again.documents
    uids = [document["uid"] for _, document in both]
    once = [document for i, document in enumerate(both) if uids[i] not in uids[:i]]
    assert_valid(once)
    for i, uid in enumerate(uids):  # what comes twice is the same
        np.testing.assert_equal(both[i], both[uids.index(uid)])
    # What comes twice was under way when the process died.
    assert (
        len(both) - len(once) <= {"start": 2, "descriptor": 2, "event": 2, "stop": 2}[both[at - (at == N_DOCUMENTS)][0]]
    )


def test_a_sink_that_died_at_the_end_says_nothing_that_is_newer_than_the_end(tmp_path):
    """A merger that is started again goes through the run from its beginning."""
    kept, again = Kept(dies_after=N_DOCUMENTS - 1), Kept()
    with suppress(Killed), bluesky.sink(kept, memory=tmp_path / "m.json") as sink:
        for output in given():
            sink.write(output)
    with bluesky.sink(again, memory=tmp_path / "m.json") as sink:
        for output in given():
            sink.write(output)
    np.testing.assert_equal(again.documents, kept.documents[-2:])


def test_a_run_that_is_published_is_not_published_again(tmp_path):
    memory = tmp_path / "m.json"
    assert_valid(documents_of(memory=memory))
    assert documents_of(memory=memory) == []


def test_the_memory_does_not_grow_for_ever(tmp_path):
    kept = Kept()
    with bluesky.sink(kept, memory=tmp_path / "m.json") as sink:
        for i in range(80):
            sink.write(replace(given()[0], run=f"run-{i}"))
    runs = json.loads((tmp_path / "m.json").read_text())["runs"]
    assert list(runs) == [start["uid"] for start in of(kept.documents, "start")][-64:]


def test_a_bin_that_is_not_there_cannot_be_fitted():
    with pytest.raises(ConfigError, match="bin 4 cannot be fitted: the map has 4"):
        bluesky.sink(fitted=4)


def test_a_memory_that_is_damaged_is_an_error(tmp_path):
    (tmp_path / "m.json").write_text('{"runs": 3}')
    with pytest.raises(CheckpointError, match=r"m\.json: not what was published"):
        bluesky.sink(memory=tmp_path / "m.json")


def test_a_memory_that_cannot_be_written_is_an_error(tmp_path):
    with (
        bluesky.sink(Kept(), memory=tmp_path / "no" / "m.json") as sink,
        pytest.raises(SinkError, match="No such file"),
    ):
        sink.write(given()[0])


class Broken(Kept):
    def publish(self, run, name, document, *, may_be_lost):
        raise SinkError(f"{name} was not taken")


def test_a_publisher_that_fails_does_not_keep_documents_from_the_others(caplog):
    kept = Kept()
    with bluesky.sink(Broken(), kept) as sink:
        for output in given():
            if isinstance(output, RunStop):
                with pytest.raises(SinkError):
                    sink.write(output)
            else:
                sink.write(output)
    assert_valid(kept.documents)
    assert [name for name, _ in kept.documents].count("event") == N_UPDATES + 1
    assert "how it began is told again at its end: start was not taken" in caplog.text


class Away(Kept):
    """A publisher that is away, or does not answer, until it is back."""

    def __init__(self, *, is_silent=False):
        super().__init__()
        self.is_back, self._is_silent = threading.Event(), is_silent

    def publish(self, run, name, document, *, may_be_lost):
        if self._is_silent:
            assert self.is_back.wait(30)
        elif not self.is_back.is_set():
            raise SinkError("is away")
        super().publish(run, name, document, may_be_lost=may_be_lost)

    def flush(self):
        if not self.is_back.is_set():
            raise SinkError("is away")


@pytest.mark.parametrize("is_silent", [False, True])
def test_who_is_away_when_a_run_begins_holds_nothing_up_and_has_a_run_if_it_is_back_by_the_end(
    monkeypatch, tmp_path, is_silent
):
    monkeypatch.setattr("stream.sinks.bluesky.OPENING", 0.2)
    away, other = Away(is_silent=is_silent), Kept()
    with bluesky.sink(other, away, memory=tmp_path / "m.json") as sink:
        begin = time.monotonic()
        for output in given()[:-1]:
            sink.write(output)
            sink.flush()
        assert time.monotonic() - begin < 20
        away.is_back.set()
        sink.write(given()[-1])
    for documents in (away.documents, other.documents):
        assert_valid(documents)
        np.testing.assert_array_equal(of(documents, "event")[-1]["data"]["xpcs_g2"], final("multitau").arrays["g2"].T)


def test_a_pipeline_goes_on_without_a_publisher_and_its_result_file_is_there(tmp_path):
    with (
        bluesky.sink(Broken()) as sink,
        Hdf5Sink(tmp_path / "r.h5", qmap=bluesky.outputs()[0]) as file,
        bluesky.source() as source,
        pytest.raises(SinkError, match="was not taken"),
    ):
        Pipeline(source, bluesky.operators, [sink, file], publish_every=0.0).run()
    with h5py.File(tmp_path / "r.h5") as result:
        assert result["xpcs/multitau/normalized_g2"].shape[1] == len(RATES)


class Logged(Kept):
    """A publisher that logs what happens to it, and may fail at an end."""

    def __init__(self, name, log, fails=False):
        super().__init__()
        self.name, self.log, self.fails = name, log, fails

    def publish(self, run, name, document, *, may_be_lost):
        super().publish(run, name, document, may_be_lost=may_be_lost)
        self.log.append((self.name, name))

    def flush(self):
        self.log.append((self.name, "flush"))
        if self.fails and self.documents[-1][0] == "stop":
            raise SinkError(f"{self.name} is gone")


def test_a_store_has_the_end_before_others_are_told():
    log = []
    with bluesky.sink(Logged("other", log), stores=[Logged("store", log)]) as sink:
        for output in given():
            sink.write(output)
    end = [("store", "stop"), ("store", "flush"), ("other", "stop"), ("other", "flush")]
    assert log[-4:] == end
    assert [what for name, what in log if name == "store"] == [what for name, what in log if name == "other"]


def test_a_store_that_fails_at_the_end_keeps_it_from_nobody_and_is_said():
    other = Kept()
    with bluesky.sink(other, stores=[Logged("store", [], fails=True)]) as sink:
        for output in given()[:-1]:
            sink.write(output)
        with pytest.raises(SinkError, match="store is gone"):
            sink.write(given()[-1])
    assert_valid(other.documents)


def test_a_sink_that_goes_on_with_a_run_tells_a_store_again_how_it_began(tmp_path):
    begun, store, other = Kept(), Kept(), Kept()
    for stores, others, outputs in (
        ([begun], [], given()[:5]),
        ([store], [other], [given()[0], *given()[5:]]),
    ):
        with bluesky.sink(*others, stores=stores, memory=tmp_path / "m.json") as sink:
            for output in outputs:
                sink.write(output)
    np.testing.assert_equal(store.documents[:2], begun.documents[:2])
    assert [name for name, _ in store.documents[:2]] == ["start", "descriptor"]
    np.testing.assert_equal(store.documents[2:], other.documents)


@pytest.fixture
def quiet(caplog, capsys):
    """Nothing that follows prints or logs a traceback."""
    yield
    plt.close("all")
    said = "".join(capsys.readouterr()) + "".join(
        logging.Formatter().format(record) for record in caplog.get_records("call")
    )
    assert "Traceback" not in said
    assert "Error" not in said


def test_live_table_shows_it(quiet, file):
    lines = []
    table = LiveTable(["xpcs_frames", "xpcs_contrast", "xpcs_relaxation_rate"], out=lines.append)
    for name, document in file[1]:
        table(name, document)
    text = "\n".join(lines)
    assert all(f" {n} |" in text for n in (200, 400, 600, 800, 1000))
    assert "generator xpcs_live" in text


def test_best_effort_callback_shows_it(quiet, file, capsys):
    callback = BestEffortCallback()
    for name, document in file[1]:
        callback(name, document)
    (figure,) = [plt.figure(number) for number in plt.get_fignums()]
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert labels == {"xpcs_contrast", "xpcs_relaxation_rate"}
    assert {axes.get_xlabel() for axes in figure.axes} >= {"xpcs_frames"}
    assert all(axes.lines[0].get_xdata()[-1] == N_FRAMES for axes in figure.axes)


def test_live_plot_shows_it(quiet):
    _, axes = plt.subplots()
    plot = LivePlot("xpcs_relaxation_rate", x="xpcs_frames", ax=axes)
    for name, document in documents_of():
        plot(name, document)
    assert list(axes.lines[0].get_xdata()) == [200, 400, 600, 800, 1000]
