"""The hub of a gateway and its clients over real sockets, while connections break and beside clients that lie."""

import logging
import selectors
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

from stream import hub, hub_group, sharing
from stream.dealer import Hub as Address
from stream.errors import SinkError, SourceError
from stream.hub import PARTIALS, Hub, frames_log
from stream.hub_group import HubGroup
from stream.hub_wire import MAX_CONTROL_BYTES, OVERHEAD, Had, Here, Put, Read, Record, Refused, Yours, pack, unpack
from stream.ingest.hub import HubResults, HubSource
from stream.messages import FrameBatch, Rejected, Result
from stream.ring import EACH
from stream.serving import Serving
from stream.sinks import hub as sinks_hub
from stream.sinks.hub import HubFrames, HubSink
from stream.wire import encode
from tests import hostile
from tests.kafka import free_ports
from tests.test_zmq import ANYWHERE, batch, result, start, stop, what, whats

pytestmark = pytest.mark.timeout(400)

LOG = frames_log(0)
DEADLINE = 120
MEGABYTE = 2**20


@contextmanager
def opened(address=ANYWHERE, *, n_regions=1, ring_bytes=2**26):
    with Hub(address, "beamline", n_regions, ring_bytes=ring_bytes) as hub:
        yield hub


def at(hub, *, beamline="beamline"):
    return Address(hub.address, beamline)


def put_into(hub, *messages, log=LOG):
    for message in messages:
        hub.append(log, encode(message), must_stay=not isinstance(message, FrameBatch))


def large(first):
    """Frames of a megabyte."""
    return FrameBatch(run="a", first=first, frames=np.full((1, 1024, 512), first, "<u2"), timestamp_ns=0)


def final(n_frames, size=3):
    arrays = {"g2": np.full(size, n_frames, "<f8")}
    return Result(run="a", operator="multitau", n_frames=n_frames, final=True, arrays=arrays)


def until(is_so, what="it"):
    deadline = time.monotonic() + DEADLINE
    while not is_so():
        assert time.monotonic() < deadline, f"{what} did not come about"
        time.sleep(0.01)


def read(source, n):
    """The next messages, of a source that may be told to go on for ever."""
    taken, deadline = [], time.monotonic() + DEADLINE
    for message in source:
        if message is not None:
            taken.append(message)
        if len(taken) == n:
            return taken
        assert time.monotonic() < deadline, f"only {len(taken)} of {n} came: {whats(taken)[-3:]}"
    return taken


class Raw:
    """A client that says what it likes."""

    def __init__(self, hub, context, rcvhwm=1000):
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvhwm = rcvhwm
        self.socket.connect(hub.address)

    def say(self, said, *parts):
        self.socket.send_multipart([pack(said), *parts])

    def read(self, wants, *, ring="", log=LOG, safe=0, window=2**25, again=False, beamline="beamline"):
        self.say(Read(beamline=beamline, log=log, ring=ring, next=wants, safe=safe, window=window, again=again))

    def put(self, number, *parts, oldest=0, log=PARTIALS, writer="w", beamline="beamline"):
        put = Put(beamline=beamline, log=log, writer=writer, number=number, oldest=oldest, must_stay=False)
        self.say(put, *parts)

    def here(self, name, serving=(), *, heard=0, beamline="beamline"):
        self.say(Here(beamline=beamline, name=name, process=name, heard=heard, serving=list(serving)))

    def hear(self, kind, within=DEADLINE):
        """The next that is of a kind; None if there is none in time."""
        deadline = time.monotonic() + within
        while self.socket.poll(max(0, 1000 * (deadline - time.monotonic()))):
            said = unpack(self.socket.recv_multipart())
            if isinstance(said, kind):
                return said
        return None

    def records(self, n):
        """So many, behind which nothing comes."""
        records = [self.hear(Record) for _ in range(n)]
        assert self.hear(Record, within=0.3) is None
        return records


@pytest.fixture
def raw():
    with zmq.Context() as context, ExitStack() as stack:

        def connect(hub, **options):
            client = Raw(hub, context, **options)
            stack.enter_context(client.socket)
            return client

        yield connect


@pytest.fixture
def router():
    """A hub that says what it likes."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        socket.bind(ANYWHERE)
        yield socket


class Network:
    """Between clients and a hub; everything that goes through it can be cut."""

    def __init__(self, hub):
        self.port = int(hub.address.rpartition(":")[2])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.n_cut = self.n_to_cut = 0
        self.is_over = False
        self.seen = b""
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.is_over = True
        self.thread.join()
        self.listener.close()

    def cut(self):
        self.n_to_cut += 1
        until(lambda: self.n_cut == self.n_to_cut)

    def run(self):
        with selectors.DefaultSelector() as selector:
            selector.register(self.listener, selectors.EVENT_READ)
            ends = {}
            while not self.is_over:
                for key, _ in selector.select(0.005):
                    if key.fileobj is self.listener:
                        client, _ = self.listener.accept()
                        try:
                            server = socket.create_connection(("127.0.0.1", self.port))
                        except OSError:
                            server = None
                        if server is None:
                            client.close()
                            continue
                        ends |= {client: server, server: client}
                        for end in (client, server):
                            selector.register(end, selectors.EVENT_READ)
                    elif key.fileobj in ends:
                        try:
                            data = key.fileobj.recv(2**16)
                            self.seen += data
                            ends[key.fileobj].sendall(data)
                        except OSError:
                            data = b""
                        if not data:
                            for end in (key.fileobj, ends.pop(key.fileobj)):
                                ends.pop(end, None)
                                selector.unregister(end)
                                end.close()
                if self.n_cut < self.n_to_cut or self.is_over:
                    for end in ends:
                        selector.unregister(end)
                        end.close()
                    ends.clear()
                    self.n_cut = self.n_to_cut


def test_frames_arrive_in_order_and_complete():
    run = [start(), *(batch(2 * i) for i in range(500)), stop()]
    hub = Hub(ANYWHERE, "beamline", 1, ring_bytes=2**26)
    with HubFrames(hub, waits=False, stop=threading.Event()) as sink, HubSource(at(hub), LOG) as source:
        sender = threading.Thread(target=lambda: [sink.write(message) for message in run])
        sender.start()
        assert whats(read(source, len(run))) == whats(run)
        sender.join()
        source.acknowledge(source.position())


def test_every_region_has_a_log_of_its_own():
    with opened(n_regions=3) as hub:
        sink = HubFrames(hub, waits=False, stop=threading.Event())
        for region in (2, 0, 1):
            sink.write(start(region=region))
        for region in (0, 1, 2):
            with HubSource(at(hub), frames_log(region)) as source:
                assert whats(read(source, 1)) == whats([start(region=region)])


def test_a_gateway_ends_once_all_is_safe_or_it_is_stopped():
    told = threading.Event()
    hub = Hub(ANYWHERE, "beamline", 1, ring_bytes=2**26)
    with HubFrames(hub, waits=False, stop=told) as sink, HubSource(at(hub), LOG) as source:
        sink.write(start())
        read(source, 1)
        source.acknowledge(source.position())
    hub = Hub(ANYWHERE, "beamline", 1, ring_bytes=2**26)
    threading.Timer(0.3, told.set).start()
    with (
        pytest.raises(SinkError, match="workers or a merger had still to take 1 records of frames/0"),
        HubFrames(hub, waits=False, stop=told) as sink,
    ):
        sink.write(start())
    assert told.is_set()


def test_results_of_many_workers_arrive_each_in_order():
    with opened() as hub, ExitStack() as stack:
        sinks = [stack.enter_context(HubSink(at(hub), PARTIALS)) for _ in range(3)]
        for n in range(50):
            for region, sink in enumerate(sinks):
                sink.write(result(n, region=region))
        for sink in sinks:
            sink.flush()
        with HubResults(at(hub), PARTIALS) as source:
            came = read(source, 150)
    for region in range(3):
        assert [message.n_frames for message in came if message.region == region] == list(range(50))


def test_frames_among_results_and_results_among_frames_are_rejected():
    with opened() as hub:
        put_into(hub, batch(0), log=PARTIALS)
        put_into(hub, result(0), start())
        with HubResults(at(hub), PARTIALS) as results, HubSource(at(hub), LOG) as source:
            (rejected,) = read(results, 1)
            assert "partials, offset 0: frames of run 'a' stand where results are expected" in rejected.reason
            rejected, then = read(source, 2)
            assert "frames/0, offset 0: a result of 'multitau' stands where frames" in rejected.reason
            assert what(then) == what(start())


def test_what_is_not_our_wire_is_rejected_with_its_reason_and_the_next_frames_come():
    corpus = hostile.CORPUS[3:40]
    with opened() as hub:
        for _, parts, _ in corpus:
            hub.append(LOG, parts if len(parts) == 3 else [b"", b"", b""], must_stay=False)
        put_into(hub, batch(0))
        with HubSource(at(hub), LOG) as source:
            *rejected, good = read(source, len(corpus) + 1)
    assert all(isinstance(message, Rejected) for message in rejected)
    assert what(good) == what(batch(0))


def test_a_source_goes_on_behind_its_position():
    with opened() as hub:
        put_into(hub, *(batch(i) for i in range(20)))
        with HubSource(at(hub), LOG) as source:
            assert source.position() == {}
            read(source, 7)
            position = source.position()
        for _ in range(2):
            with HubSource(at(hub), LOG) as source:
                source.seek(position)
                assert source.position() == position
                assert whats(read(source, 13)) == whats(batch(i) for i in range(7, 20))


def test_a_source_without_a_position_begins_with_the_oldest_that_is_there():
    with opened(ring_bytes=5 * (OVERHEAD + 600)) as hub:
        put_into(hub, *(batch(i) for i in range(100)))
        with HubSource(at(hub), LOG) as source:
            (first,) = read(source, 1)
    assert 50 < first.first < 99


def test_a_position_in_another_log_is_refused():
    with opened(n_regions=2) as hub, HubSource(at(hub), LOG) as source:
        with pytest.raises(SourceError, match="frames/0 cannot go to frames/1 x = 3"):
            source.seek({"frames/1 x": 3})
        with pytest.raises(SourceError, match="frames/0 cannot go to topic:0 = 3"):
            source.seek({"topic:0": 3})


def test_none_comes_while_nothing_does():
    with opened() as hub, HubSource(at(hub), LOG) as source:
        began = time.monotonic()
        assert next(iter(source)) is None
        assert time.monotonic() - began < 20


def test_a_reader_that_stalls_is_sent_its_window_and_others_get_everything_meanwhile(raw):
    with opened() as hub, HubSource(at(hub), LOG) as source:
        put_into(hub, *(large(i) for i in range(20)))
        stalled = raw(hub)
        n_bytes = sum(len(bytes(part)) for part in encode(large(0))) + OVERHEAD
        stalled.read(0, window=5 * n_bytes + n_bytes // 2)
        assert len(read(source, 20)) == 20
        assert [record.offset for record in stalled.records(5)] == [0, 1, 2, 3, 4]


def test_a_window_moves_with_what_was_read_and_one_record_always_fits(raw):
    with opened() as hub:
        put_into(hub, *(large(i) for i in range(4)))
        reader = raw(hub)
        reader.read(0, window=1)
        (first,) = reader.records(1)
        assert first.offset == 0
        reader.read(1, ring=first.ring, window=1)
        assert reader.hear(Record).offset == 1


def test_a_window_bounds_the_number_of_small_records_too(raw):
    with opened() as hub:
        for _ in range(100):
            hub.append(LOG, [b"", b"", b""], must_stay=False)
        reader = raw(hub)
        reader.read(0, window=10 * OVERHEAD)
        assert [record.offset for record in reader.records(10)] == list(range(10))


def test_a_reader_that_missed_something_is_sent_it_once_more(raw):
    with opened() as hub:
        put_into(hub, *(batch(i) for i in range(5)))
        reader = raw(hub)
        reader.read(0)
        first, *_ = reader.records(5)
        reader.read(2, ring=first.ring, again=True)
        assert [(record.follows, record.offset) for record in reader.records(3)] == [(2, 2), (3, 3), (4, 4)]


def test_a_reader_that_is_silent_for_long_gets_nothing_beyond_its_window(raw, monkeypatch):
    monkeypatch.setattr(hub, "SILENT", 0.1)
    with opened() as here:
        for _ in range(100):
            here.append(LOG, [b"", b"", b""], must_stay=False)
        reader = raw(here)
        for n_records in (10, 0, 0):
            reader.read(0, window=10 * OVERHEAD)
            reader.records(n_records)


def test_a_reader_that_is_gone_is_forgotten(raw, monkeypatch):
    monkeypatch.setattr(hub, "SILENT", 0.1)
    with opened() as here:
        put_into(here, *(batch(i) for i in range(100)))
        reader = raw(here)
        reader.read(0, window=OVERHEAD)
        assert reader.hear(Record) is not None
        assert len(here._readers) == 1
        reader.socket.close()
        until(lambda: not here._readers, "forgetting")


def test_what_the_ring_no_longer_has_is_left_out_and_told(caplog):
    with opened(ring_bytes=30 * 2000) as hub:
        sink = HubFrames(hub, waits=False, stop=threading.Event())
        with HubSource(at(hub), LOG) as source:
            sink.write(start())
            sink.write(batch(0))
            assert whats(read(source, 2)) == whats([start(), batch(0)])
            position = source.position()
        for i in range(1, 500):
            sink.write(batch(2 * i))
        with HubSource(at(hub), LOG) as source:
            source.seek(position)
            (first,) = read(source, 1)
            assert first.first > 2
            n_left = 500 - first.first // 2
            assert [message.first for message in read(source, n_left - 1)] == list(range(first.first + 2, 1000, 2))
        gone = first.first // 2 - 1
        assert hub.lost(LOG) == gone + 1, "the first of all was not safe either"
    assert f"frames/0: {gone} records are gone before offset {gone + 2}" in caplog.text
    assert "region 0: 1 records are lost before a worker has them safe" in caplog.text


def test_partial_sums_for_which_there_is_no_room_are_told(monkeypatch, caplog):
    monkeypatch.setattr(hub, "PARTIALS_BYTES", 10_000)
    with opened(ring_bytes=10_000) as there, HubSink(at(there), PARTIALS) as sink:
        for n_frames in range(30):
            sink.write(final(n_frames, 300))
        sink.flush()
    assert "records of partial sums are gone before a merger was done with them" in caplog.text
    assert caplog.text.count("partial sums") < 8


def test_what_was_acknowledged_may_go_and_is_no_loss():
    with opened(ring_bytes=25 * 1000) as hub, HubSource(at(hub), LOG) as source:
        for i in range(0, 100, 10):
            put_into(hub, *(batch(j) for j in range(i, i + 10)))
            assert len(read(source, 10)) == 10
            source.acknowledge(source.position())
            next(iter(source))
            until(lambda i=i: hub._rings[LOG].safe >= i - 10 or next(iter(source)))
        assert hub.lost(LOG) == 0


def test_a_position_that_was_not_acknowledged_keeps_its_records():
    with opened() as hub, HubSource(at(hub), LOG) as source:
        put_into(hub, *(batch(i) for i in range(5)))
        read(source, 2)
        source.acknowledge(source.position())
        read(source, 3)
        until(lambda: next(iter(source)) or hub.wait_until_safe(0) == {LOG: 3})
        source.acknowledge(source.position())
        until(lambda: next(iter(source)) or hub.wait_until_safe(0) == {})


def test_where_a_source_goes_on_is_safe_though_the_one_before_it_did_not_live_to_say_so():
    with opened() as hub:
        put_into(hub, start(), batch(0), stop())
        with HubSource(at(hub), LOG) as killed:
            read(killed, 3)
            saved = killed.position()
        assert hub.wait_until_safe(0) == {LOG: 3}
        with HubSource(at(hub), LOG) as heir:
            heir.seek(saved)
            source = iter(heir)
            until(lambda: next(source) or hub.wait_until_safe(0) == {})


def test_what_closes_tells_what_is_safe():
    with opened() as hub:
        put_into(hub, start(), stop())
        with HubSource(at(hub), LOG) as source:
            read(source, 2)
            source.acknowledge(source.position())
        assert hub.wait_until_safe(DEADLINE) == {}


def test_a_source_that_can_wait_waits_for_room_and_loses_nothing():
    run = [start(), *(batch(2 * i) for i in range(300)), stop()]
    hub = Hub(ANYWHERE, "beamline", 1, ring_bytes=30 * 2000)
    with HubFrames(hub, waits=True, stop=threading.Event()) as sink, HubSource(at(hub), LOG) as source:
        sender = threading.Thread(target=lambda: [sink.write(message) for message in run])
        sender.start()
        taken = []
        while len(taken) < len(run):
            taken += read(source, 1)
            source.acknowledge(source.position())
        sender.join()
    assert whats(taken) == whats(run)
    assert hub.lost(LOG) == 0


def test_waiting_for_room_ends_once_it_is_stopped():
    told = threading.Event()
    threading.Timer(0.3, told.set).start()
    with opened(ring_bytes=2000) as hub:
        sink = HubFrames(hub, waits=True, stop=told)
        with pytest.raises(SinkError, match="stopped while frames/0 waited for a worker"):
            [sink.write(batch(i)) for i in range(100)]
    assert told.is_set()


def test_a_message_that_does_not_fit_our_wire_is_a_sink_error():
    with opened() as hub, HubSink(at(hub), PARTIALS) as sink:
        for bad in (sink, HubFrames(hub, waits=False, stop=threading.Event())):
            with pytest.raises(SinkError, match="run = ''"):
                bad.write(stop(run=""))


def test_a_connection_that_breaks_again_and_again_makes_frames_come_neither_twice_nor_never():
    run = [start(), *(batch(2 * i) for i in range(400)), stop()]
    with opened() as hub, Network(hub) as network, HubSource(Address(network.address, "beamline"), LOG) as source:
        taken = []
        for i in range(0, len(run), 67):
            put_into(hub, *run[i : i + 67])
            taken += read(source, 30 if i == 0 else 67)
            network.cut()
        taken += read(source, len(run) - len(taken))
    assert whats(taken) == whats(run)


def test_a_hub_that_comes_in_the_place_of_another_is_read_from_its_beginning(free_address, caplog):
    with opened(free_address) as hub:
        put_into(hub, *(batch(i) for i in range(5)))
        source = HubSource(at(hub), LOG)
        read(source, 5)
        position = source.position()
    with source, opened(free_address) as hub:
        put_into(hub, batch(100), batch(101))
        assert whats(read(source, 2)) == whats([batch(100), batch(101)])
        assert list(source.position().values()) == [2]
        assert source.position().keys() != position.keys()
        with HubSource(at(hub), LOG) as later:
            later.seek(position)
            assert whats(read(later, 2)) == whats([batch(100), batch(101)])
            later.acknowledge(position)
            next(iter(later))
        assert hub.wait_until_safe(0) == {LOG: 2}, "what was safe before is not what is safe now"
    assert "frames/0 goes on at a gateway that has begun anew" in caplog.text


def test_a_hub_that_is_not_there_yet_is_waited_for(free_address):
    with (
        HubSource(Address(free_address, "beamline"), LOG) as source,
        HubSink(Address(free_address, "beamline"), PARTIALS) as sink,
    ):
        assert next(iter(source)) is None
        sink.write(final(8))
        with opened(free_address) as hub:
            put_into(hub, start())
            assert whats(read(source, 1)) == whats([start()])
            sink.flush()
            assert hub.wait_until_safe(0) == {LOG: 1, PARTIALS: 1}


@pytest.fixture
def free_address():
    return f"tcp://127.0.0.1:{free_ports(1)[0]}"


def n_frames_in(hub, n):
    with HubResults(at(hub), PARTIALS) as results:
        return [message.n_frames for message in read(results, n)]


def test_results_arrive_once_and_in_order_though_the_connection_breaks():
    with opened() as hub, Network(hub) as network, HubSink(Address(network.address, "beamline"), PARTIALS) as sink:
        for i in range(300):
            sink.write(final(i, size=1000))
            if i % 50 == 20:
                network.cut()
        sink.flush()
        assert hub.wait_until_safe(0) == {PARTIALS: 300}
        assert n_frames_in(hub, 300) == list(range(300))


def test_of_what_a_writer_says_the_hub_takes_everything_once_and_in_order(raw):
    with opened() as hub:
        writer = raw(hub)
        for number in (3, 4, 4, 3, 6, 5, 6):
            writer.put(number, *encode(final(number)), oldest=3)
        assert [writer.hear(Had).number for _ in range(7)] == [4, 5, 5, 5, 5, 6, 7]
        assert n_frames_in(hub, 4) == [3, 4, 5, 6]


def test_a_hub_that_comes_in_the_place_of_another_gets_what_that_one_did_not_confirm(free_address):
    sink = HubSink(Address(free_address, "beamline"), PARTIALS)
    with opened(free_address) as hub:
        for i in range(10):
            sink.write(final(i))
        sink.flush()
    for i in range(10, 20):
        sink.write(final(i))
    with sink, opened(free_address) as hub:
        for i in range(20, 30):
            sink.write(final(i))
        sink.flush()
        assert hub.wait_until_safe(0) == {PARTIALS: 20}
        assert n_frames_in(hub, 20) == list(range(10, 30))


def test_nothing_is_said_twice_to_a_hub_that_takes_its_time(router):
    """What is on its way over a slow line is not put behind itself once more."""
    address = Address(router.get_string(zmq.LAST_ENDPOINT), "beamline")
    with HubSink(address, PARTIALS, timeout=1.5) as sink:
        sink.write(final(0))
        who = answer(router, sink, 1)  # it may be said once more over a connection that is new
        sink.write(final(1))
        with pytest.raises(SinkError, match=r"did not take everything in 1\.5 s"):
            sink.flush()
        assert unpack(router.recv_multipart()[1:]).number == 1
        assert not router.poll(0)
        router.send_multipart([who, pack(Had(number=2))])
        sink.flush()


def answer(router, sink, number):
    until(lambda: sink._hear(0.01) or router.poll(0))
    while router.poll(100):
        who, *_ = router.recv_multipart()
    router.send_multipart([who, pack(Had(number=number))])
    sink.flush()
    return who


def test_while_the_hub_is_away_interim_results_are_dropped_and_final_ones_are_waited_for(free_address, monkeypatch):
    monkeypatch.setattr(sinks_hub, "QUEUE_BYTES", 10_000)
    told = threading.Event()
    with HubSink(Address(free_address, "beamline"), PARTIALS, stop=told) as sink:
        with pytest.raises(SinkError, match="no room"):
            [sink.write(result(i)) for i in range(1000)]
        threading.Timer(0.3, told.set).start()
        began = time.monotonic()
        with pytest.raises(SinkError, match="stopped while the gateway had not taken everything"):
            sink.write(final(0, size=1000))
        assert 2 < time.monotonic() - began < 20  # not 300
        with opened(free_address) as hub:
            sink.write(final(1000, size=1000))
            sink.flush()
            n = hub.wait_until_safe(0)[PARTIALS]
            assert n_frames_in(hub, n) == [*range(n - 1), 1000]


def test_an_interim_result_larger_than_the_queue_gets_through_alone(monkeypatch):
    monkeypatch.setattr(sinks_hub, "QUEUE_BYTES", 100)
    with opened() as hub, HubSink(at(hub), PARTIALS) as sink:
        sink.write(result(8))
        sink.flush()
        assert n_frames_in(hub, 1) == [8]


def test_closing_a_sink_after_an_error_does_not_wait_for_long(free_address, caplog, monkeypatch):
    monkeypatch.setattr(sinks_hub, "GRACE", 0.5)
    began = time.monotonic()
    sink = HubSink(Address(free_address, "beamline"), PARTIALS)
    sink.write(final(0))
    with pytest.raises(SinkError, match="run = ''"), sink:
        sink.write(stop(run=""))
    assert time.monotonic() - began < 20  # not 300
    assert "the gateway did not take everything in 0.5 s" in caplog.text


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1"])
def test_a_bad_address_is_named(address):
    for refused, use in [
        (SourceError, lambda: HubSource(Address(address, "b"), LOG)),
        (SinkError, lambda: HubSink(Address(address, "b"), PARTIALS)),
        (SinkError, lambda: Hub(address, "b", 1, ring_bytes=1)),
    ]:
        with pytest.raises(refused, match=address.removeprefix("tcp://")):
            use()


def test_an_address_in_use_is_named():
    with opened() as hub, pytest.raises(SinkError, match=f"{hub.address}: Address already in use"):
        Hub(hub.address, "beamline", 1, ring_bytes=1)


def test_a_closed_hub_leaves_no_thread_and_frees_its_address(free_address):
    before = threading.active_count()
    for _ in range(2):
        with opened(free_address):
            pass
    assert threading.active_count() == before


def test_a_hub_closes_though_somebody_always_wants_more(raw):
    with opened(ring_bytes=2**28) as hub:
        put_into(hub, *(large(i) for i in range(100)))
        for _ in range(5):
            raw(hub).read(0)
        began = time.monotonic()
    assert time.monotonic() - began < 20


def test_clients_of_another_beamline_are_told_so():
    says = "this is the gateway of beamline, not of other"
    with opened() as hub:
        other = at(hub, beamline="other")
        with HubSource(other, LOG) as source, pytest.raises(SourceError, match=says):
            read(source, 1)
        with pytest.raises(SinkError, match=says), HubSink(other, PARTIALS) as sink:
            sink.write(final(0))
        with pytest.raises(SourceError, match=says):
            HubGroup(other).take_part(Serving(lambda region, stop: None), threading.Event())


def test_a_log_that_is_not_there_is_refused_with_its_name():
    says = "there is no log frames/7; there are 1 regions"
    with opened() as hub, HubSource(at(hub), frames_log(7)) as source, pytest.raises(SourceError, match=says):
        read(source, 1)


def test_nobody_writes_frames_from_outside():
    with opened() as hub:
        with pytest.raises(SinkError, match="the log frames/0 is not yours to write"), HubSink(at(hub), LOG) as sink:
            sink.write(start())
        assert hub.wait_until_safe(0) == {}


NONSENSE = [
    [b""],
    [b"\x00" * 100],
    [b"{}"],
    [msgpack.packb([])],
    [msgpack.packb({"s": ["read"], "v": 1})],
    [msgpack.packb({"s": "nothing", "v": 1})],
    [msgpack.packb({"s": "read", "v": 2})],
    [msgpack.packb({"s": "read", "v": 1})],
    [msgpack.packb({"s": "read", "v": 1, "x": "x" * MAX_CONTROL_BYTES})],
    [msgpack.packb({"s": "read", "v": 1, "beamline": 7})],
    [msgpack.packb({"s": "here", "v": 1, "beamline": "b", "name": "a\nb", "process": "p", "heard": 0, "serving": []})],
    [msgpack.packb({"s": "here", "v": 1, "beamline": "b", "name": "a", "process": "p", "heard": 0, "serving": [4096]})],
    [b"\xdd\xff\xff\xff\xff"],
    [b"\xdf\xff\xff\xff\xff"],
    [b"\x91" * 60_000],
    [pack(Here(beamline="beamline", name="x", process="x", heard=0, serving=[])), b"more"],
    [pack(Put(beamline="beamline", log=PARTIALS, writer="w", number=0, oldest=0, must_stay=True))],
    [pack(Had(number=0))],
    [pack(Yours(number=0, regions=[0]))],
    [pack(Refused(reason="because"))],
    [pack(Record(log=LOG, ring="r", offset=0, follows=0)), b"", b"", b""],
    [bytes(10)] * 1000,
]


def test_nonsense_is_counted_and_harms_nobody(raw, caplog):
    with opened() as hub, HubSource(at(hub), LOG) as source, HubSink(at(hub), PARTIALS) as sink:
        put_into(hub, start())
        read(source, 1)
        liar = raw(hub)
        for parts in NONSENSE:
            liar.socket.send_multipart(parts)
        until(lambda: hub._n_bad == len(NONSENSE), "counting")
        put_into(hub, batch(0))
        assert whats(read(source, 1)) == whats([batch(0)])
        sink.write(final(0))
        sink.flush()
    n_told = caplog.text.count("rejected: ")
    assert 0 < n_told < 10, "1, 2, 4, ... are told"


def test_an_absurdly_large_part_ends_its_connection_only(raw, monkeypatch):
    monkeypatch.setattr(hub, "MAX_BYTES", MEGABYTE)
    with opened() as here, HubSource(at(here), LOG) as source:
        liar = raw(here)
        liar.read(0)
        liar.put(0, b"", b"", bytes(2 * MEGABYTE))
        put_into(here, start())
        assert whats(read(source, 1)) == whats([start()])
        assert here.wait_until_safe(0) == {LOG: 1}


def test_what_a_hub_should_not_say_is_told_and_passed_over(router, caplog):
    with HubSource(Address(router.get_string(zmq.LAST_ENDPOINT), "beamline"), LOG) as source:
        until(lambda: next(iter(source)) or router.poll(0))
        who, *_ = router.recv_multipart()
        for parts in NONSENSE:
            if parts[0] != pack(Refused(reason="because")) and parts[0] != NONSENSE[-2][0]:
                router.send_multipart([who, *parts])
        for offset in (0, 1, 0, 1, 1, 2):
            record = Record(log=LOG, ring="r", offset=offset, follows=max(0, offset - 1))
            router.send_multipart([who, pack(record), *encode(batch(offset))])
        assert whats(read(source, 3)) == whats(batch(i) for i in range(3))
    assert "are not something said to a hub" in caplog.text


def test_numbers_of_clients_beyond_all_bounds_are_forgotten_and_harm_nobody(raw, monkeypatch):
    monkeypatch.setattr(hub, "MOST_READERS", 20)
    monkeypatch.setattr(hub, "MOST_WRITERS", 20)
    monkeypatch.setattr(sharing, "MOST_WORKERS", 20)
    with opened() as here, HubSource(at(here), LOG) as source, HubSink(at(here), PARTIALS) as sink:
        put_into(here, start())
        read(source, 1)
        crowd = [raw(here) for _ in range(200)]
        for i, client in enumerate(crowd):
            client.read(2**40, ring="r")
            client.put(2**40, b"", b"", b"", writer=f"w{i}")
            client.here(f"n{i}", range(4096))
        for client in crowd:
            assert client.hear(Yours) is not None
        assert (len(here._readers), len(here._writers)) == (20, 20)
        put_into(here, *(batch(i) for i in range(100)))
        assert whats(read(source, 100)) == whats(batch(i) for i in range(100))
        for i in range(100):
            sink.write(final(i))
        sink.flush()


def resident():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell how much memory is used")
@pytest.mark.parametrize("lies", [False, True])
def test_one_who_takes_nothing_does_not_make_the_memory_of_the_hub_grow(raw, monkeypatch, lies):
    monkeypatch.setattr(hub, "MOST_QUEUED", 20)
    with opened(ring_bytes=8 * MEGABYTE) as here:
        slow = raw(here, rcvhwm=1)
        slow.read(0, window=4 * MEGABYTE)
        put_into(here, large(0))
        ring = slow.hear(Record).ring
        before = resident()
        for i in range(300):
            put_into(here, large(i))
            if lies:
                slow.read(i, ring=ring, window=2**28, again=True)
            else:
                slow.read(1, ring=ring, window=4 * MEGABYTE)
        until(lambda: here._readers, "reading")
        with HubSource(at(here), LOG) as source:
            read(source, 5)
        assert resident() - before < 100 * MEGABYTE


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell how much memory is used")
def test_small_records_from_outside_take_no_more_memory_than_is_counted(raw):
    with opened() as here:
        writer = raw(here)
        before = resident()
        for number in range(3000):
            writer.put(number, b"", bytes(300), bytes(200))
            assert writer.hear(Had).number == number + 1
        assert here.wait_until_safe(0) == {PARTIALS: 3000}
        assert resident() - before < 3 * 3000 * (500 + EACH)


@contextmanager
def taking_part(group, serving):
    told = threading.Event()
    failures = []

    def take_part():
        try:
            group.take_part(serving, told)
        except SourceError as error:
            failures.append(str(error))

    thread = threading.Thread(target=take_part)
    thread.start()
    try:
        yield failures
    finally:
        told.set()
        thread.join()


def serving():
    return Serving(lambda region, stop: stop.wait())


def test_workers_share_the_regions_and_take_over_those_of_one_that_leaves(monkeypatch):
    monkeypatch.setattr(hub_group, "BEAT", 0.05)
    monkeypatch.setattr(sharing, "SETTLE", 0.1)
    one, other = serving(), serving()
    with opened(n_regions=5) as hub, taking_part(HubGroup(at(hub)), one):
        until(lambda: len(one.regions) == 5)
        with taking_part(HubGroup(at(hub)), other):
            until(lambda: sorted(one.regions + other.regions) == list(range(5)) and len(other.regions) == 2)
        until(lambda: len(one.regions) == 5)


def test_workers_keep_their_regions_when_the_gateway_is_replaced(free_address, caplog):
    caplog.set_level(logging.INFO)
    one, other = serving(), serving()
    where = Address(free_address, "beamline")
    with taking_part(HubGroup(where), one), taking_part(HubGroup(where), other):
        with opened(free_address, n_regions=4):
            until(lambda: sorted(one.regions + other.regions) == list(range(4)) and len(one.regions) == 2)
        caplog.clear()
        with opened(free_address, n_regions=4) as hub:
            until(lambda: sorted(hub._group.owners) == list(range(4)) and "shared out among 2" in caplog.text)
    assert "begins here" not in caplog.text


def test_of_two_workers_of_a_name_the_earlier_one_ends_with_a_reason(monkeypatch):
    monkeypatch.setattr(hub_group, "BEAT", 0.05)
    monkeypatch.setattr(sharing, "SETTLE", 0.1)
    one, other = serving(), serving()
    with opened(n_regions=2) as hub, taking_part(HubGroup(at(hub), name="me"), one) as failures:
        until(lambda: len(one.regions) == 2)
        with taking_part(HubGroup(at(hub), name="me"), other):
            until(lambda: failures and one.regions == [] and len(other.regions) == 2)
    assert "another worker has come under the name me" in failures[0]


def test_a_worker_that_died_is_missed_though_the_hub_always_has_something_to_send(raw, monkeypatch):
    monkeypatch.setattr(sharing, "SETTLE", 0.0)
    monkeypatch.setattr(sharing, "SESSION", 0.3)
    monkeypatch.setattr(hub, "MOST_QUEUED", 0)
    with opened(n_regions=2) as here:
        for _ in range(20_000):
            here.append(LOG, [b"", b"", b""], must_stay=False)
        dead, alive = raw(here), raw(here)
        dead.here("dead")
        assert dead.hear(Yours).regions == [0, 1]
        readers = [raw(here, rcvhwm=0) for _ in range(5)]
        for reader in readers:
            reader.read(0, window=2**28)
        regions = []
        while regions != [0, 1]:
            alive.here("alive", regions)
            regions = alive.hear(Yours).regions
        assert min(reader.next for reader in here._readers.values()) < 20_000, "it is still sending"
