"""What a run engine's documents tell of runs to those who allocate nodes."""

import time
from contextlib import suppress

import msgpack
import numpy as np
import pytest
from bluesky_kafka import Publisher
from event_model import compose_run
from hypothesis import given
from hypothesis import strategies as st

from hpc_bridge.errors import ConfigError
from hpc_bridge.runs import Points, Told, runs_of, told, told_by_proxy
from stream.documents import frame, pack
from stream.sinks.bluesky_zmq import ZmqDocuments
from tests.test_bluesky_transport import proxy

DEADLINE = 90


def until_told(runs, n, meanwhile=lambda: None):
    """The first n things that are told."""
    found, deadline = [], time.monotonic() + DEADLINE
    while len(found) < n:
        assert time.monotonic() < deadline, f"told only {found}"
        found += runs.look()
        meanwhile()
    return found


def documents():
    run = compose_run(metadata={"sample": {"name": "latex"}, "dark": np.ones((3, 4))})
    return [("start", run.start_doc), ("stop", run.compose_stop())], run.start_doc["uid"]


def test_a_start_and_a_stop_tell_of_their_run_in_both_encodings():
    made, uid = documents()
    expected = [Told(uid, began=True), Told(uid, began=False)]
    assert [told(pack(*each)) for each in made] == expected
    assert [told_by_proxy(frame(*each, b"8idi")) for each in made] == expected


def resource(**changes):
    found = {"uid": "r", "run_start": "u", "mimetype": "application/x-hdf5", "uri": "file://localhost/a.h5", **changes}
    return pack("stream_resource", {"parameters": {"dataset": "/a", "chunk_shape": (1, 2)}, **found})


def test_a_resource_tells_where_a_file_of_hdf5_of_its_run_is_in_both_encodings():
    bundle = compose_run()
    uri = "file://localhost/data/a.h5"
    made = bundle.compose_stream_resource(
        mimetype="application/x-hdf5", uri=uri, data_key="detector", parameters={"dataset": "/entry/data/data"}
    ).stream_resource_doc
    expected = Points(bundle.start_doc["uid"], uri)
    assert told(pack("stream_resource", made)) == expected
    assert told_by_proxy(frame("stream_resource", made, b"8idi")) == expected
    assert told(resource(mimetype="application/x-hdf5;type=swmr")) == Points("u", "file://localhost/a.h5")


@pytest.mark.parametrize(
    "changes", [{"run_start": None}, {"run_start": "u" * 201}, {"uri": 5}, {"uri": ""}, {"uri": "u" * 3000}]
)
def test_a_resource_that_cannot_be_meant_is_refused(changes):
    with pytest.raises(ValueError, match=r"its (uri|run_start) is not"):
        told(resource(**changes))


def test_other_documents_tell_nothing():
    assert told(pack("event", {"uid": "1", "data": {}})) is None
    assert told(resource(mimetype="image/tiff")) is None
    assert told(resource(mimetype=["application/x-hdf5"])) is None
    assert told(msgpack.packb(["no document", 5])) is None


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xc1",
        msgpack.packb(5),
        msgpack.packb(["start"]),
        msgpack.packb(["start", 5]),
        msgpack.packb(["start", {}]),
        msgpack.packb(["start", {"uid": 5}]),
        msgpack.packb(["start", {"uid": "u" * 201}]),
        msgpack.packb(["start", {"uid": "u"}])[:-1],
        msgpack.packb(["stream_resource", 5]),
        resource()[:-1],
        b"\x92\xa5start" + b"\xdf\xff\xff\xff\xff",
        b"\x92\xa5start\x81\xa1x" + b"\x91" * 100_000,
        b"\x92\xa5start\x81\xa3uid\x81\x91\x01\x02",
    ],
)
def test_what_is_no_document_is_refused(value):
    with pytest.raises(ValueError):  # noqa: PT011 - whatever the words
        told(value)


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_tells_nothing(value):
    for read in (told, told_by_proxy):
        with suppress(ValueError):
            read(value)


def test_runs_are_told_by_kafka_as_bluesky_publishes_them_also_those_of_a_time_when_nobody_listened(broker, topic):
    address = f"kafka+bluesky://{broker.bootstrap}/{topic}"
    publisher = Publisher(topic, broker.bootstrap, key="k", flush_on_stop_doc=True)
    probe, _ = documents()
    with runs_of(address, group=f"{topic}.hpc") as runs:
        until_told(runs, 1, lambda: publisher(*probe[0]))
    made, uid = documents()
    for each in made:
        publisher(*each)
    with runs_of(address, group=f"{topic}.hpc") as runs:
        found = []
        while Told(uid, began=False) not in found:
            found += until_told(runs, 1)
    assert Told(uid, began=True) in found


def test_runs_are_told_by_a_proxy():
    made, uid = documents()
    with (
        proxy() as (into, out),
        ZmqDocuments(into) as publisher,
        runs_of(out.replace("tcp", "zmq+bluesky"), group="") as runs,
    ):
        until_told(runs, 1, lambda: publisher.publish("probe", "start", {"uid": "probe"}, may_be_lost=False))
        for each in made:
            publisher.publish(uid, *each, may_be_lost=False)
        found = []
        while Told(uid, began=False) not in found:
            found += until_told(runs, 1)
    assert Told(uid, began=True) in found


def test_properties_that_kafka_does_not_know_are_named(tmp_path):
    file = tmp_path / "kafka.properties"
    file.write_text("# to log in\nno.such.thing = 5\n")
    with pytest.raises(ConfigError, match=r"no\.such\.thing"):
        runs_of("kafka+bluesky://127.0.0.1:9092/8idi.x", group="g", properties=file)
