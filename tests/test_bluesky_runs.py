"""Runs follow from Bluesky's documents in whatever order these come, and nothing hostile in them harms a later run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.ingest.bluesky_facts import merged, of_start, with_configuration
from stream.ingest.bluesky_messages import Ended, Master, Opened, Rows
from stream.ingest.bluesky_runs import Runs
from stream.messages import Rejected
from tests.conftest import make_start

SHAPE = [240, 320]


def documents(run="a", n_events=3, exit_status="success", **start):
    """What a run engine sends of an ophyd-async detector that writes HDF5, as bluesky 1.15 does."""
    key = {"source": "f.h5", "dtype": "array", "shape": [1, *SHAPE], "external": "STREAM:", "object_name": "det"}
    configuration = {
        "data": {"det-acquire_period": 2.0, "det-acquire_time": 1.5},
        "data_keys": {"det-acquire_period": {"units": "ms"}, "det-acquire_time": {"units": "ms"}},
    }
    yield "start", {"uid": run, "time": 1795334898.0, "scan_id": 7, "sample": "silica", "plan_name": "count"} | start
    yield (
        "descriptor",
        {
            "uid": f"{run}-d",
            "run_start": run,
            "name": "primary",
            "data_keys": {"det": key, "det-sum": key | {"shape": [1]}},
            "configuration": {"det": configuration},
        },
    )
    for key in ("det", "det-sum"):
        yield (
            "stream_resource",
            {
                "uid": f"{run}-{key}",
                "run_start": run,
                "data_key": key,
                "mimetype": "application/x-hdf5",
                "uri": f"file://localhost/data/{run}.h5",
                "parameters": {"dataset": f"/entry/{key}", "chunk_shape": [1, *SHAPE]},
            },
        )
    for i in range(n_events):
        for key in ("det", "det-sum"):
            yield (
                "stream_datum",
                {
                    "uid": f"{run}-{key}/{i}",
                    "stream_resource": f"{run}-{key}",
                    "descriptor": f"{run}-d",
                    "indices": {"start": i, "stop": i + 1},
                    "seq_nums": {"start": i + 1, "stop": i + 2},
                },
            )
    yield (
        "stop",
        {
            "uid": f"{run}-s",
            "run_start": run,
            "time": 1.0,
            "exit_status": exit_status,
            "num_events": {"primary": n_events},
        },
    )


def eiger(run="e", n_events=2):
    """What classic ophyd sends of an EIGER that writes master files."""
    key = {"source": "PV", "dtype": "array", "shape": [100, *SHAPE], "external": "FILESTORE:", "object_name": "eiger"}
    yield "start", {"uid": run, "time": 1.0}
    yield (
        "descriptor",
        {"uid": f"{run}-d", "run_start": run, "name": "primary", "data_keys": {"eiger_image": key}},
    )
    yield (
        "resource",
        {
            "uid": f"{run}-r",
            "spec": "AD_EIGER2",
            "root": "/data",
            "resource_path": "ab/cd",
            "resource_kwargs": {"images_per_file": 100},
        },
    )
    for i in range(n_events):
        yield (
            "datum",
            {"datum_id": f"{run}-r/{i}", "resource": f"{run}-r", "datum_kwargs": {"seq_id": 40 + i}},
        )
        yield (
            "event",
            {"uid": f"{run}-{i}", "descriptor": f"{run}-d", "seq_num": i + 1, "data": {"eiger_image": f"{run}-r/{i}"}},
        )
    yield "stop", {"uid": f"{run}-s", "run_start": run, "exit_status": "success", "num_events": {"primary": n_events}}


def told(given_documents, *, runs=None, until=None):
    """What is told of documents, and what is told once nothing more came for a long time."""
    runs = Runs() if runs is None else runs
    out = [each for name, document in given_documents for each in runs.feed(name, document, 0.0)]
    return out if until is None else [*out, *runs.expire(until)]


def outcome(messages, run):
    """What matters of a run: its frames, its end."""
    frames = [each for each in messages if isinstance(each, Rows | Master) and each.run == run]
    return frames, [each for each in messages if isinstance(each, Ended) and each.run == run]


def numbers(messages):
    return [message.facts.numbers for message in messages if isinstance(message, Opened) and message.is_described]


def test_frames_are_told_of_with_the_place_where_they_stand():
    rows = Rows(run="a", uri="file://localhost/data/a.h5", dataset="/entry/det", first=1, row=1, n=1)
    assert outcome(told(documents()), "a")[0][1] == rows


def test_a_run_is_told_of_from_its_start_to_its_stop():
    messages = told(documents())
    assert [type(each) for each in messages] == [Opened, Opened, Rows, Rows, Rows, Ended]
    assert messages[-1] == Ended(run="a", exit_status="success")


@given(st.permutations([*documents(), *documents("b", 2, "abort"), *eiger()]), st.data())
def test_the_outcome_is_the_same_in_whatever_order_documents_come_and_however_often(shuffled, data):
    twice = data.draw(st.lists(st.sampled_from(shuffled), max_size=5))
    messages = told([*shuffled, *twice])
    for run, in_order in {"a": documents(), "b": documents("b", 2, "abort"), "e": eiger()}.items():
        assert outcome(messages, run) == outcome(told(in_order), run)
    assert not [each for each in messages if isinstance(each, Rejected)]


def test_a_document_that_comes_twice_counts_once():
    twice = [each for pair in zip(documents(), documents(), strict=True) for each in pair]
    assert told(twice) == told(documents())


@given(st.sets(st.integers(1, len([*documents()]) - 2)))
def test_documents_that_never_come_end_their_run_late_and_are_reported(missing):
    some = [each for i, each in enumerate(documents()) if i not in missing]
    runs = Runs(within=10.0)
    early = told(some, runs=runs)
    late = list(runs.expire(10.0))
    frames, ended = outcome([*early, *late], "a")
    assert ended == [Ended(run="a", exit_status="success")]
    assert [each.first for each in frames] == sorted(each.first for each in frames)
    if set(frames) != set(outcome(told(documents()), "a")[0]):
        assert any(isinstance(each, Rejected) for each in late)
    assert outcome(told(documents("b"), runs=runs), "b") == outcome(told(documents("b")), "b")


def test_a_run_without_a_stop_fails_once_another_began_and_it_was_silent_for_long():
    runs = Runs(silence=60.0)
    told([*documents()][:-1], runs=runs)
    assert not [*runs.expire(1e6)]
    told([*documents("b")][:2], runs=runs)
    assert [*runs.expire(59.0)] == []
    # The second one is the newest: it may be paused.
    assert [each for each in runs.expire(61.0) if isinstance(each, Ended)] == [Ended(run="a", exit_status="fail")]


@pytest.mark.parametrize("status", ["success", "abort", "fail"])
def test_the_exit_status_is_that_of_the_run_engine(status):
    assert told(documents(exit_status=status))[-1] == Ended(run="a", exit_status=status)


def test_events_of_an_eiger_are_told_of_with_their_master_files():
    frames, ended = outcome(told(eiger()), "e")
    assert frames == [
        Master(run="e", path="/data/ab/cd_40_master.h5", event=0),
        Master(run="e", path="/data/ab/cd_41_master.h5", event=1),
    ]
    assert ended


def test_pages_are_the_same_as_what_is_in_them():
    start, descriptor, resource, *_, stop = eiger()
    datums = {"resource": "e-r", "datum_id": ["e-r/0", "e-r/1"], "datum_kwargs": {"seq_id": [40, 41]}}
    events = {
        "descriptor": "e-d",
        "uid": ["e-0", "e-1"],
        "seq_num": [1, 2],
        "data": {"eiger_image": datums["datum_id"]},
    }
    paged = [start, descriptor, resource, ("event_page", events), ("datum_page", datums), stop]
    assert outcome(told(paged), "e") == outcome(told(eiger()), "e")


def test_frames_that_come_after_the_end_of_their_run_are_lost_and_reported():
    runs = Runs()
    told(documents(), runs=runs)
    (*_, (name, late), _, _) = documents()
    assert told([(name, late)], runs=runs) == []
    (late_one,) = told([(name, late | {"indices": {"start": 3, "stop": 4}})], runs=runs)
    assert late_one == Rejected(reason="stream_datum: run 'a' ended before 3, which is lost")


HOSTILE = [
    ("start", {}),
    ("start", {"uid": 5}),
    ("start", {"uid": "x" * 10_000}),
    ("descriptor", {"uid": "a-d", "run_start": "a", "name": "primary", "data_keys": []}),
    ("descriptor", {"uid": "a-d", "run_start": "a", "name": "primary", "data_keys": {"det": 5}}),
    ("stream_resource", {"uid": None}),
    ("stream_datum", {"descriptor": "a-d", "stream_resource": "a-det"}),
    ("stream_datum", {"descriptor": "a-det", "stream_resource": "a-d", "indices": 3, "seq_nums": 1}),
    *(
        ("stream_datum", {"descriptor": "a-d", "stream_resource": "a-det", "indices": indices, "seq_nums": seq_nums})
        for indices, seq_nums in [
            ({"start": -1, "stop": 1}, {"start": 1, "stop": 2}),
            ({"start": 5, "stop": 1}, {"start": 1, "stop": 2}),
            ({"start": 0, "stop": 2**70}, {"start": 1, "stop": 2}),
            ({"start": 0.5, "stop": 1}, {"start": 1, "stop": 2}),
        ]
    ),
    ("datum", {"datum_id": "x", "resource": [], "datum_kwargs": {}}),
    ("datum_page", {"datum_id": ["x", "y"], "resource": "r", "datum_kwargs": {"seq_id": [1]}}),
    ("event", {"descriptor": "a-d", "seq_num": "1", "data": {}}),
    ("event_page", {"descriptor": "a-d", "seq_num": 1, "data": {}}),
    ("stop", {"run_start": "a", "exit_status": None}),
    ("stop", {}),
    ("bulk_events", {}),
]


@pytest.mark.parametrize(("name", "document"), HOSTILE)
def test_a_hostile_document_is_counted_and_harms_nobody(name, document):
    # The descriptor is not yet known for documents that take its place.
    known = [*documents()]
    known.insert(1 if name == "descriptor" else 4, (name, document))
    messages = told(known, until=100.0)
    assert [type(each) for each in messages if isinstance(each, Rejected)] == [Rejected]
    assert outcome(messages, "a") == outcome(told(documents()), "a")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "b", "a-d", "a-det", "e-r/0", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["start", "stop", "det"]), inner),
    max_leaves=5,
)


@given(st.data())
def test_no_document_whatever_is_in_it_raises_or_harms_a_later_run(data):
    runs = Runs()
    for name, document in [*documents(), *eiger()]:
        change = data.draw(st.dictionaries(st.sampled_from([*document]), values, max_size=2))
        told([(name, document | change)], runs=runs)
    assert outcome(told(documents("later"), runs=runs), "later") == outcome(told(documents("later")), "later")


def test_no_more_documents_wait_than_there_is_room_for():
    runs = Runs()
    datum = [*documents()][4][1]
    messages = told((("stream_datum", datum | {"descriptor": f"no {i}"}) for i in range(20_000)), runs=runs)
    assert 0 < len(messages) < 20_000
    assert {type(each) for each in messages} == {Rejected}


def test_the_configuration_of_the_detector_counts_more_than_the_start_document():
    assert numbers(told(documents(acquire_period=0.5, energy=9.0))) == [
        {"frame_time": 2e-3, "count_time": 1.5e-3, "incident_energy": 9.0}
    ]


@pytest.mark.parametrize(
    ("key", "value", "units", "known"),
    [
        ("eiger-detector-frame_time", 0.01, "s", {"frame_time": 0.01}),
        ("eiger4m_single_cam_acquire_period", 0.01, None, {"frame_time": 0.01}),
        ("det-driver-acquire_time", 500.0, "us", {"count_time": 5e-4}),
        ("eiger-detector-photon_energy", 11000.0, "eV", {"incident_energy": 11.0}),
        ("eiger4m_single_photon_energy", 11000.0, None, {"incident_energy": 11.0}),
        ("eiger4m_single_beam_center_x", 1000.5, "", {"beam_center_x": 1000.5}),
        ("eiger4m_single_detector_distance", 16200.0, "mm", {"detector_distance": 16.2}),
        ("eiger4m_single_x_pixel_size", 75.0, "µm", {"x_pixel_size": 75e-6}),
        ("eiger4m_single_count_time", [0.01], None, {"count_time": 0.01}),
    ],
)
def test_the_names_of_beamlines_are_known_with_their_units(key, value, units, known):
    configuration = {"data": {key: value}, "data_keys": {key: {"units": units}}}
    numbers = with_configuration(of_start("a", {}), configuration).numbers
    assert numbers == pytest.approx(known)


@pytest.mark.parametrize("value", [True, "0.1", float("nan"), float("inf"), -1.0, 0.0, [1.0, 2.0], None])
def test_what_is_no_time_is_left_out(value):
    assert of_start("a", {"acquire_period": value}).numbers == {}


def test_a_quantity_in_a_unit_that_nobody_knows_is_left_out():
    configuration = {"data": {"d_acquire_time": 1.0}, "data_keys": {"d_acquire_time": {"units": "parsec"}}}
    assert with_configuration(of_start("a", {}), configuration).numbers == {}


def test_energy_follows_from_a_wavelength():
    assert of_start("a", {"incident_wavelength": 1.2398419843320026}).metadata["incident_energy"] == pytest.approx(10)


def test_the_words_of_the_start_document_go_into_the_metadata():
    start = {"time": 0, "scan_id": 7, "sample_name": "silica", "data_session": "pass-1", "qmap_file": "q.h5"}
    assert of_start("a", start | {"unknown": 1}).metadata == {
        "start_time": "1970-01-01T00:00:00+00:00",
        "scan_id": 7,
        "scan_number": 7,
        "sample": "silica",
        "data_session": "pass-1",
        "qmap": "q.h5",
    }


def test_what_our_wire_does_not_take_is_left_out():
    assert "sample" not in of_start("a", {"sample": {"lot": {1, 2}}}).metadata


def test_both_are_put_together_and_the_detector_counts():
    start = make_start(frame_time=0.01, count_time=0.01, metadata={"incident_energy": 11.0, "start_time": "then"})
    facts = of_start("uid", {"time": 0, "energy": 11.0 * (1 + 1e-6), "acquire_period": 0.01, "sample": "silica"})
    both = merged(start, facts)
    assert (both.run, both.metadata) == ("uid", {"incident_energy": 11.0, "start_time": "then", "sample": "silica"})


def test_a_conflict_of_the_two_is_reported_and_told(caplog):
    both = merged(make_start(frame_time=0.01), of_start("uid", {"acquire_period": 0.02}))
    assert both.frame_time == 0.01
    assert both.metadata["conflicts"] == "frame_time is 0.01 by the detector, 0.02 by the documents"
    assert "frame_time is 0.01" in caplog.text
