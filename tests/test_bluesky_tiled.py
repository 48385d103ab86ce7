"""Runs in a real Tiled server, whatever happens to the server, to the network and to us in the middle of them."""

import logging
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from bluesky.callbacks.zmq import Proxy, RemoteDispatcher

from stream.config import address
from stream.documents import read
from stream.errors import ConfigError, SinkError
from stream.messages import Result
from stream.sinks.bluesky_tiled import TiledDocuments
from stream.sinks.hdf5 import Hdf5Sink
from tests import bluesky
from tests.bluesky import N_UPDATES, Kept
from tests.kafka import free_ports
from tests.test_command_line import finished, started, xpcs_stream
from tests.test_kill import frames, qmap
from tests.tiled import DEADLINE, KEY, Network, Server

pytestmark = pytest.mark.timeout(300)

__all__ = ["frames", "qmap"]

HERE = Path(__file__).parents[1]
ARRAYS = ("xpcs_g2", "xpcs_g2_err", "xpcs_n_pairs", "xpcs_saxs_1d")


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    """Directory of the files that the server may read."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def server(tmp_path_factory, readable):
    server = Server(tmp_path_factory.mktemp("tiled"), readable).start()
    yield server
    server.kill()


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TILED_API_KEY", KEY)


@pytest.fixture
def given():
    """What a sink is given of a run that nobody else has."""
    run = str(uuid.uuid4())
    return [replace(output, run=run) for output in bluesky.outputs()[1]]


def is_update(output):
    return isinstance(output, Result) and output.operator == "ledger" and not output.final


def write(sink, given):
    """Give outputs one after the other, each once the one before has arrived."""
    for output in given:
        sink.write(output)
        sink.flush()


def publish(given, *stores, **options):
    """Return the documents as they were made."""
    kept = Kept()
    with bluesky.sink(kept, stores=stores, **options) as sink:
        write(sink, given)
    return kept.documents


def assert_is_kept(client, documents):
    """The server has the run: every event of it once, and its end."""
    run = client[documents[0][1]["uid"]]
    events = [document for name, document in documents if name == "event"]
    stream = run["primary"]
    assert stream.base["internal"].read()["seq_num"].tolist() == [event["seq_num"] for event in events]
    for key in (*ARRAYS, "xpcs_frames", "xpcs_relaxation_rate"):
        np.testing.assert_array_equal(stream[key].read(), [event["data"][key] for event in events], err_msg=key)
    assert run.metadata["stop"]["uid"] == documents[-1][1]["uid"]


def test_every_update_of_a_run_is_kept(server, client, given):
    documents = publish(given, TiledDocuments(server.uri))
    assert [name for name, _ in documents].count("event") == N_UPDATES + 1
    assert_is_kept(client, documents)


def test_who_hears_of_the_end_finds_the_run(server, client, given):
    ends = []

    class Listener(Kept):
        def publish(self, run, name, document, **options):
            if name == "stop":
                metadata = client[run].metadata
                ends.append(metadata["stop"]["uid"] == document["uid"])
            super().publish(run, name, document, **options)

    with bluesky.sink(Listener(), stores=[TiledDocuments(server.uri)]) as sink:
        write(sink, given)
    assert ends == [True]


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_where_requests_or_answers_are_lost_no_event_is_kept_twice_nor_by_half(server, client, given, lost):
    with Network(server, lost) as network:
        publisher = TiledDocuments(network.uri)
        chance = random.Random(1)
        network.loses = lambda *_: chance.random() < 0.08
        documents = publish(given, publisher)
    uid, *_, last = [each.get("seq_num", each["uid"]) for _, each in documents if _ in ("start", "event")]
    kept = client[uid]["primary"].base["internal"].read()["seq_num"].tolist()
    assert kept[-1] == last
    assert_is_kept(client, [each for each in documents if each[0] != "event" or each[1]["seq_num"] in kept])


def test_the_last_event_is_kept_once_though_the_answer_to_its_row_is_lost(server, client, given):
    rows = []

    def is_last_row(method, path):
        if method == "PATCH" and "/table/" in path:
            rows.append(path)
            return len(rows) == N_UPDATES + 1
        return False

    with Network(server, "answer") as network:
        network.loses = is_last_row
        assert_is_kept(client, publish(given, TiledDocuments(network.uri)))
    assert len(rows) == N_UPDATES + 1


def test_a_server_that_is_killed_in_mid_run_and_started_again_has_the_whole_run(server, client, given, monkeypatch):
    # After ten attempts in half a minute Tiled's client gives an update up; a busy machine starts a server more slowly.
    monkeypatch.setattr("tiled.client.utils.TILED_RETRY_ATTEMPTS", 1000)
    monkeypatch.setattr("tiled.client.utils.TILED_RETRY_TIMEOUT", DEADLINE)
    kept = Kept()
    with bluesky.sink(kept, stores=[TiledDocuments(server.uri, timeout=DEADLINE)]) as sink:
        for output in given:
            sink.write(output)
            if is_update(output) and output.n_frames == 400:
                server.kill()  # while it is given the update
                server.start()
            sink.flush()
    assert_is_kept(client, kept.documents)


def go(uri, memory, run, n):
    """Publish a run up to update n, say so before it has arrived, and wait to be killed."""
    given = [replace(output, run=run) for output in bluesky.outputs()[1]]
    with bluesky.sink(stores=[TiledDocuments(uri)], memory=Path(memory)) as sink:
        write(sink, [given[0], *given[4 * n - 3 : 4 * n]])
        sink.write(given[4 * n])
        print("there", flush=True)  # noqa: T201
        sys.stdin.read()


def test_a_sink_that_was_killed_goes_on_with_the_same_run(server, client, given, tmp_path):
    memory, run = tmp_path / "m.json", given[0].run
    for n in (1, 2):
        code = f"from tests.test_bluesky_tiled import go; go({server.uri!r}, {str(memory)!r}, {run!r}, {n})"
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=HERE) as process:
            assert process.stdout.readline() == b"there\n"
            process.kill()
    end = publish([given[0], *given[9:]], TiledDocuments(server.uri), memory=memory)
    (uid,) = [key for key in client if client[key].metadata["start"]["original_run_uid"] == run]
    run = client[uid]
    rows = run["primary"].base["internal"].read()
    numbers = rows["seq_num"].tolist()
    assert numbers == sorted({*numbers}), "no event is there twice"
    assert numbers[-3:] == [3, 4, 5]
    np.testing.assert_array_equal(rows["xpcs_frames"], 200 * rows["seq_num"])
    for key in ARRAYS:
        array = run["primary"][key].read()
        assert len(array) == len(numbers)
        np.testing.assert_array_equal(array[-1], dict(end)["event"]["data"][key])
    assert run.metadata["stop"] == {**dict(end)["stop"], "num_events": run.metadata["stop"]["num_events"]}


def test_an_event_whose_writing_was_cut_off_is_written_over(server, client, given, tmp_path):
    memory = tmp_path / "m.json"
    begun = publish(given[:9], TiledDocuments(server.uri), memory=memory)
    stream = client[begun[0][1]["uid"]]["primary"].base
    for key in ARRAYS[:2]:  # what the first two requests of an event do
        stream[key].patch(np.zeros_like(stream[key].read()[:1]), offset=(2,), extend=True)
    ended = publish([given[0], *given[9:]], TiledDocuments(server.uri), memory=memory)
    assert_is_kept(client, begun + ended)


def test_a_sink_that_remembers_nothing_of_a_run_counts_on_behind_what_is_kept(server, client, given):
    begun = publish(given[:17], TiledDocuments(server.uri))
    ended = publish([given[0], *given[17:]], TiledDocuments(server.uri))
    run = client[begun[0][1]["uid"]]
    rows = run["primary"].base["internal"].read()
    n_begun = [name for name, _ in begun].count("event")
    assert rows["seq_num"].tolist() == list(range(1, n_begun + 2))
    assert rows["xpcs_frames"].tolist()[-1] == bluesky.N_FRAMES
    for key in ARRAYS:
        np.testing.assert_array_equal(run["primary"][key].read()[-1], dict(ended)["event"]["data"][key])
    assert run.metadata["stop"]["num_events"] == {"primary": n_begun + 1}


def test_a_run_that_is_there_with_its_end_is_left_as_it_is(server, client, given, caplog):
    documents = publish(given, TiledDocuments(server.uri))
    publish(given[:5] + given[9:], TiledDocuments(server.uri))
    assert_is_kept(client, documents)
    assert "is there already, with its end: it is left as it is" in caplog.text


@contextmanager
def stopped(server):
    """The server does nothing: as one that is slow."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_of_updates_a_slow_server_gets_the_newest_and_the_others_are_said(server, client, given, caplog):
    start, updates, end = given[0], given[1:-5], given[-5:]
    kept = Kept()
    with bluesky.sink(kept, stores=[TiledDocuments(server.uri)]) as sink:
        write(sink, [start])
        with stopped(server):
            begin = time.monotonic()
            for output in updates:
                sink.write(output)
            assert time.monotonic() - begin < 20
        write(sink, end)
    events = [each for each in kept.documents if each[0] == "event"]
    # The first was being written, and the last two are that of the last update and that of the end.
    waited = events[1:-2]
    assert_is_kept(client, [each for each in kept.documents if each not in waited])
    assert "waited until there was a newer one (2 so far)" in caplog.text


def test_a_server_that_is_away_when_a_run_begins_has_it_if_it_is_back_by_the_end(server, client, given, monkeypatch):
    monkeypatch.setattr("stream.sinks.bluesky.OPENING", 0.2)
    kept = Kept()
    with Network(server) as network, bluesky.sink(kept, stores=[TiledDocuments(network.uri)]) as sink:
        network.loses = lambda *_: True
        write(sink, given[:-1])
        network.loses = lambda *_: False
        write(sink, given[-1:])
    assert_is_kept(client, [each for each in kept.documents if each[0] != "event"][:2] + kept.documents[-2:])


def test_runs_whose_end_never_comes_make_room_for_others(server, given, monkeypatch):
    monkeypatch.setattr("stream.sinks.bluesky_tiled.MAX_RUNS", 2)
    publisher = TiledDocuments(server.uri)
    with bluesky.sink(stores=[publisher]) as sink:
        write(sink, [replace(given[0], run=str(uuid.uuid4())) for _ in range(4)])
        assert len(publisher._runs) == 2


def test_a_document_that_is_not_as_it_should_be_is_said(server):
    with TiledDocuments(server.uri) as publisher:
        run = str(uuid.uuid4())
        publisher.publish(run, "start", {"uid": run, "time": 1.0}, may_be_lost=False)
        descriptor = {"uid": "d", "run_start": run, "name": "primary", "time": "now", "data_keys": {}}
        publisher.publish(run, "descriptor", descriptor, may_be_lost=False)
        says = f"{server.uri}: descriptor of run {run}: 'now' is not of type 'number'"
        with pytest.raises(SinkError, match=says):
            publisher.flush()
        publisher.publish(run, "stop", {"uid": "s", "run_start": run, "time": 2.0}, may_be_lost=False)
        with pytest.raises(SinkError, match=says):
            publisher.flush()


def test_a_server_that_is_gone_at_the_end_is_an_error_and_others_have_the_end(server, given):
    kept = Kept()
    with (
        Network(server) as network,
        suppress(KeyboardInterrupt),
        bluesky.sink(kept, stores=[publisher := TiledDocuments(network.uri)]) as sink,
    ):
        write(sink, given[:-1])
        publisher._timeout = 2  # only now: a busy machine may take longer for what goes well
        network.loses = lambda *_: True
        begin = time.monotonic()
        with pytest.raises(SinkError, match=f"{network.uri}: Tiled did not take everything"):
            sink.write(given[-1])
        assert time.monotonic() - begin < 30
        assert kept.documents[-1][0] == "stop"
        raise KeyboardInterrupt  # it does not wait again for so long
    assert time.monotonic() - begin < 50  # not 60


def test_a_sink_that_was_told_to_stop_does_not_wait_for_a_server(server, given):
    stop = threading.Event()
    publisher = TiledDocuments(server.uri, stop=stop)
    with bluesky.sink(stores=[publisher]) as sink:
        write(sink, given[:1])
        with stopped(server):
            stop.set()
            begin = time.monotonic()
            with pytest.raises(SinkError, match="did not take everything"):
                sink.write(given[-1])
            assert time.monotonic() - begin < 20  # not 60


def result_file(given, path):
    with Hdf5Sink(path, qmap=bluesky.outputs()[0]) as file:
        for output in given:
            file.write(output)
    return path


@contextmanager
def with_result(path, store):
    kept = Kept()
    with bluesky.sink(kept, stores=[store]) as sink:
        sink.written(path)
        yield kept, sink


def test_the_result_file_is_read_through_the_server(server, client, readable, given, caplog):
    path = result_file(given, readable / f"{given[0].run}.h5")
    with with_result(path, TiledDocuments(server.uri)) as (kept, sink):
        write(sink, given)
    run = client[kept.documents[0][1]["uid"]]
    with h5py.File(path) as file:
        g2 = file["xpcs/multitau/normalized_g2"][()]
    np.testing.assert_array_equal(run["result"]["xpcs_result_g2"].read()[0], g2)
    assert not caplog.text


def test_a_result_file_that_the_server_may_not_read_is_said_and_the_run_is_whole(
    server, client, tmp_path, given, caplog
):
    path = result_file(given, tmp_path / "r.h5")
    with with_result(path, TiledDocuments(server.uri)) as (kept, sink):
        write(sink, given)
    assert caplog.text.count("cannot read") == 1
    assert f"the server cannot read file://localhost{path}" in caplog.text
    assert_is_kept(client, kept.documents)


@pytest.mark.parametrize(("value", "words"), [("wrong", "Invalid API key"), (None, "requires API key")])
def test_a_key_that_does_not_fit_is_an_error_that_says_where_it_comes_from(server, monkeypatch, value, words):
    monkeypatch.delenv("TILED_API_KEY") if value is None else monkeypatch.setenv("TILED_API_KEY", value)
    with pytest.raises(SinkError, match=f"{words}.*TILED_API_KEY") as caught:
        TiledDocuments(server.uri)
    assert "wrong" not in str(caught.value)


def test_a_server_that_is_not_there_is_an_error_at_once():
    begin = time.monotonic()
    with pytest.raises(SinkError, match=r"http://127\.0\.0\.1:1: no Tiled server answers: .*refused"):
        TiledDocuments("http://127.0.0.1:1")
    assert time.monotonic() - begin < 20  # not 45


def test_the_key_is_never_logged(server, given, caplog):
    caplog.set_level(logging.DEBUG)
    publish(given[:5], TiledDocuments(server.uri))
    assert "127.0.0.1" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("rest", [f"?api_key={KEY}", f"/api/v1?api_key={KEY}", f"#{KEY}"])
def test_an_address_with_a_key_in_it_is_refused_without_showing_it(rest):
    for text in (f"tiled+http://127.0.0.1:8000{rest}", f"tiled+https://{KEY}@127.0.0.1:8000", f"tiled+http://{rest}"):
        with pytest.raises(ConfigError, match="TILED_API_KEY") as caught:
            address(text)
        assert KEY not in str(caught.value)


def test_what_is_missing_is_named_with_the_extra_that_has_it(frames, qmap, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "stream.sinks.bluesky_tiled")
    monkeypatch.setitem(sys.modules, "bluesky_tiled_plugins", None)
    command = ("run", "--source", frames, "--qmap", qmap, "--quiet", "--documents", "tiled+http://127.0.0.1:1")
    said = xpcs_stream(*command)
    assert said.exit_code == 1
    assert "bluesky_tiled_plugins is not installed: pip install 'xpcs-stream[tiled]'" in said.output


def test_a_command_publishes_to_several(server, client, readable, frames, qmap):
    inside, outside = (f"127.0.0.1:{port}" for port in free_ports(2))
    of_tiled, has_stopped = [], threading.Event()

    def take(name, document):
        if name == "stop":
            of_tiled.append(client[document["run_start"]])
            has_stopped.set()

    proxy = Proxy(f"tcp://{inside}", f"tcp://{outside}")
    dispatcher = RemoteDispatcher(outside, deserializer=read)
    dispatcher.subscribe(take)
    for each in (proxy, dispatcher):
        threading.Thread(target=each.start, daemon=True).start()
    out = readable / f"{uuid.uuid4()}.h5"
    command = ("run", "--source", frames, "--qmap", qmap, "--out", out, "--quiet")
    to = ("--documents", f"tiled+{server.uri}", "--documents", f"zmq+bluesky://{inside}")
    with started(*command, *to, cwd=out.parent) as process:
        _, said = finished(process)
    assert KEY not in said
    assert has_stopped.wait(DEADLINE)
    (run,) = of_tiled
    assert run.metadata["stop"]["exit_status"] == "success"
    assert run.metadata["start"]["original_run_uid"] == "scan-7"
    with h5py.File(out) as file:
        g2 = file["xpcs/multitau/normalized_g2"][()]
    np.testing.assert_array_equal(run["primary"]["xpcs_g2"].read()[-1].T[: len(g2)], g2)
