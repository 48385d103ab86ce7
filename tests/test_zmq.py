import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import zmq

from stream.errors import NotSeekable, SinkError, SourceError
from stream.ingest.zmq import ZmqResults, ZmqSource
from stream.messages import FrameBatch, Rejected, Result, RunStart, RunStop
from stream.sinks.faults import Faults
from stream.sinks.zmq import ZmqSink
from tests import hostile
from tests.kafka import free_ports

pytestmark = pytest.mark.timeout(400)

ANYWHERE = "tcp://127.0.0.1:*"


def start(run="a", region=0):
    return RunStart(run=run, region=region, shape=(3, 4), dtype="<u2", frame_time=0.001, count_time=0.001)


def batch(first, run="a"):
    return FrameBatch(run=run, first=first, frames=np.full((2, 3, 4), first, "<u2"), timestamp_ns=first)


def stop(run="a", region=0):
    return RunStop(run=run, region=region, n_frames=2, exit_status="success")


def result(n_frames, run="a", operator="multitau", region=0):
    return Result(
        run=run,
        region=region,
        operator=operator,
        n_frames=n_frames,
        final=False,
        arrays={"g2": np.full(3, n_frames, "<f8")},
    )


def take(n, source):
    return list(islice((message for message in source if message is not None), n))


def what(message):
    """What tells a message from others."""
    match message:
        case RunStart():
            return "start", message.run, message.region
        case FrameBatch():
            return "frames", message.run, message.first, message.frames.tolist()
        case RunStop():
            return "stop", message.run, message.region
        case Result():
            return "result", message.run, message.region, message.operator, message.n_frames, message.arrays["g2"][0]


def whats(messages):
    return [what(message) for message in messages]


@pytest.mark.parametrize("sink_binds", [True, False])
def test_frames_arrive_in_order_and_the_sender_waits_for_a_slow_receiver(sink_binds):
    run = [start(), *(batch(2 * i) for i in range(200)), stop()]

    with ExitStack() as stack:
        if sink_binds:
            sink = stack.enter_context(ZmqSink(ANYWHERE, pattern="push"))
            source = stack.enter_context(ZmqSource(sink.address))
        else:
            source = stack.enter_context(ZmqSource(ANYWHERE, bind=True))
            sink = stack.enter_context(ZmqSink(source.address, pattern="push", bind=False))
        sender = threading.Thread(target=lambda: [sink.write(message) for message in run])
        sender.start()
        received = take(len(run), source)
        sender.join()
    assert whats(received) == whats(run)


def test_what_is_unreadable_is_rejected_with_its_reason_and_the_next_frames_still_come():
    corpus = [bad for bad in hostile.CORPUS if bad[1]]  # ZeroMQ has no message without parts
    with ZmqSource(ANYWHERE, bind=True) as source, zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(source.address)
        stream = iter(source)
        for name, parts, says in corpus:
            socket.send_multipart(parts)
            (rejected,) = take(1, stream)
            assert isinstance(rejected, Rejected), name
            assert says in rejected.reason, name
            assert rejected.reason.startswith(source.address), name
        socket.send_multipart(hostile.frames())
        (good,) = take(1, stream)
    assert good.frames.tobytes() == hostile.PAYLOAD


def test_a_start_that_a_pipeline_could_not_add_to_is_rejected():
    full = replace(start(), metadata={f"k{i}": i for i in range(4096)})
    with ZmqSink(ANYWHERE, pattern="push") as sink, ZmqSource(sink.address) as source:
        sink.write(full)
        sink.write(start())
        rejected, then = take(2, source)
    assert rejected.reason == f"{source.address}: run 'a': start: metadata has 4104 entries, more than 4096"
    assert what(then) == what(start())


def test_a_result_is_rejected_where_frames_are_expected():
    with ZmqSink(ANYWHERE, pattern="push") as sink, ZmqSource(sink.address) as source:
        sink.write(result(8))
        sink.write(stop())
        rejected, then = take(2, source)
    assert "a result of 'multitau' came where frames are expected" in rejected.reason
    assert what(then) == what(stop())


def test_none_is_yielded_while_nothing_comes():
    with ZmqSource(ANYWHERE, bind=True) as source:
        began = time.monotonic()
        assert next(iter(source)) is None
        assert time.monotonic() - began < 20


def test_a_source_has_no_position_and_cannot_go_back():
    with ZmqSource(ANYWHERE, bind=True) as source:
        assert source.position() == {}
        source.seek({})
        with pytest.raises(NotSeekable, match="frame"):
            source.seek({"frame": 3})


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1", "carrier-pigeon://loft"])
def test_a_bad_address_is_named(address):
    for refused, use in [
        (SourceError, lambda: ZmqSource(address)),
        (SourceError, lambda: ZmqResults(address)),
        (SinkError, lambda: ZmqSink(address, pattern="push")),
        (SinkError, lambda: ZmqSink(address, pattern="pub")),
    ]:
        with pytest.raises(refused, match=address):
            use()


def test_an_address_in_use_is_named():
    with ZmqSink(ANYWHERE, pattern="pub") as sink:
        with pytest.raises(SinkError, match=f"{sink.address}: Address already in use"):
            ZmqSink(sink.address, pattern="push")
        with pytest.raises(SourceError, match=f"{sink.address}: Address already in use"):
            ZmqSource(sink.address, bind=True)


@pytest.mark.parametrize("bind", [True, False])
def test_a_push_fails_when_nobody_takes_anything(bind):
    address = ANYWHERE if bind else "tcp://127.0.0.1:9"  # discard: nobody listens
    began = time.monotonic()
    with ZmqSink(address, pattern="push", bind=bind, timeout=0.2) as sink:
        writes = (sink.write(batch(i)) for i in range(100))
        with pytest.raises(SinkError, match=f"{sink.address}: nobody took anything for 0.2 s"):
            list(writes)
    assert 0.2 <= time.monotonic() - began < 20


def test_a_push_that_nobody_takes_ends_soon_once_it_is_stopped():
    stop_sending = threading.Event()
    timer = threading.Timer(0.2, stop_sending.set)
    began = time.monotonic()
    timer.start()
    with (
        ZmqSink(ANYWHERE, pattern="push", stop=stop_sending) as sink,
        pytest.raises(SinkError, match=f"{sink.address}: stopped while nobody received"),
    ):
        sink.write(start())
    assert 0.2 <= time.monotonic() - began < 10  # not 60
    timer.join()


def test_a_stopped_push_still_reaches_a_receiver_that_takes_it():
    stop_sending = threading.Event()
    stop_sending.set()
    with ZmqSink(ANYWHERE, pattern="push", stop=stop_sending) as sink, ZmqSource(sink.address) as source:
        stream = iter(source)
        assert next(stream) is None
        sink.write(stop())
        assert whats(take(1, stream)) == whats([stop()])


def test_a_stopped_push_is_not_held_up_on_closing_by_a_receiver_that_takes_nothing(address_of_nobody):
    stop_sending = threading.Event()
    sink = ZmqSink(address_of_nobody, pattern="push", bind=False, stop=stop_sending)
    with sink:
        sink.write(start())
        stop_sending.set()
        began = time.monotonic()
    assert time.monotonic() - began < 10  # not 60


def test_a_message_that_does_not_fit_our_wire_is_a_sink_error():
    with ZmqSink(ANYWHERE, pattern="push") as sink, pytest.raises(SinkError, match="run = ''"):
        sink.write(stop(run=""))


@pytest.fixture
def address_of_nobody():
    return f"tcp://127.0.0.1:{free_ports(1)[0]}"


def test_frames_may_be_overwritten_once_they_are_written(address_of_nobody):
    with ZmqSink(address_of_nobody, pattern="push", bind=False) as sink:
        frames = np.full((4, 512, 512), 1, "<u2")
        sink.write(FrameBatch(run="a", first=0, frames=frames, timestamp_ns=0))
        frames[:] = 2
        with ZmqSource(address_of_nobody, bind=True) as source:
            (received,) = take(1, source)
            assert (received.frames == 1).all()


def test_closing_waits_until_what_was_written_is_taken(address_of_nobody):
    written = threading.Event()

    def send():
        with ZmqSink(address_of_nobody, pattern="push", bind=False) as sink:
            sink.write(start())
            sink.write(stop())
            written.set()

    sender = threading.Thread(target=send)
    sender.start()
    written.wait()
    with ZmqSource(address_of_nobody, bind=True) as source:
        assert whats(take(2, source)) == whats([start(), stop()])
    sender.join()


def test_faults_spoil_frames_but_neither_start_nor_stop():
    with (
        ZmqSink(ANYWHERE, pattern="push", faults=Faults(lose=1.0)) as sink,
        ZmqSource(sink.address) as source,
    ):
        for message in (start(), batch(0), batch(2), stop()):
            sink.write(message)
        assert whats(take(2, source)) == whats([start(), stop()])


def test_frames_held_back_by_a_fault_come_before_the_stop():
    with (
        ZmqSink(ANYWHERE, pattern="push", faults=Faults(reorder=1.0)) as sink,
        ZmqSource(sink.address) as source,
    ):
        for message in (start(), batch(0), batch(2), batch(4), stop()):
            sink.write(message)
        assert whats(take(5, source)) == whats([start(), batch(2), batch(0), batch(4), stop()])


def subscribed(sink, source):
    """Publish until the first message arrives: subscribing takes a moment."""
    stream = iter(source)
    sink.write(start(run="sentinel", region=99))
    assert what(take(1, stream)[0]) == ("start", "sentinel", 99)
    return stream


@pytest.mark.parametrize("sink_binds", [True, False])
def test_results_are_published_in_order_and_frames_are_left_out(sink_binds):
    run = [start(), result(8), result(16), result(16, operator="scattering"), stop()]
    with ExitStack() as stack:
        if sink_binds:
            sink = stack.enter_context(ZmqSink(ANYWHERE, pattern="pub"))
            results = stack.enter_context(ZmqResults(sink.address))
        else:
            results = stack.enter_context(ZmqResults(ANYWHERE, bind=True))
            sink = stack.enter_context(ZmqSink(results.address, pattern="pub", bind=False))
        stream = subscribed(sink, results)
        for message in run:
            sink.write(batch(0))
            sink.write(message)
        received = take(len(run), (m for m in stream if m is None or m.run != "sentinel"))
    assert whats(received) == whats(run)


def test_a_late_subscriber_gets_the_newest_of_every_operator_and_region_and_nothing_of_older_runs():
    with ZmqSink(ANYWHERE, pattern="pub") as sink:
        for message in (
            start("old"),
            result(99, "old", "twotime"),
            stop("old"),
            start("b", region=1),
            start("a"),
            result(8),
            result(5, "b", region=1),
            result(16),
            result(16, operator="scattering"),
            stop(),
        ):
            sink.write(message)
        newest = [
            start("b", region=1),
            start("a"),
            result(16),
            result(5, "b", region=1),
            result(16, operator="scattering"),
            stop(),
        ]
        with ZmqResults(sink.address) as late:
            assert whats(take(6, late)) == whats(newest)
            with ZmqResults(sink.address) as later:
                assert whats(take(6, later)) == whats(newest)


def test_the_last_result_reaches_a_subscriber_although_the_publisher_closes_at_once():
    with ZmqSink(ANYWHERE, pattern="pub") as sink:
        results = ZmqResults(sink.address)
        stream = subscribed(sink, results)
        for i in range(50):
            sink.write(result(i))
    with results:
        assert whats(take(50, (m for m in stream if m is None or m.run != "sentinel"))) == whats(map(result, range(50)))


def test_publishing_never_waits():
    with ZmqSink(ANYWHERE, pattern="pub") as sink:
        began = time.monotonic()
        for i in range(1000):
            sink.write(result(i))
        sink.flush()
        assert time.monotonic() - began < 20


def test_frames_are_rejected_where_results_are_expected():
    with ZmqResults(ANYWHERE, bind=True) as results, zmq.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.connect(results.address)
        stream = iter(results)
        while not socket.poll(0):  # until it has subscribed
            next(stream)
        socket.send_multipart(hostile.frames())
        socket.send_multipart([b"result/", b"rubbish", b""])
        frames, rubbish = take(2, stream)
    assert "frames of run '9f3c' came where results are expected" in frames.reason
    assert "MessagePack" in rubbish.reason


@pytest.mark.parametrize("pattern", ["push", "pub"])
def test_a_closed_sink_leaves_no_thread_and_frees_its_address(pattern):
    before = threading.active_count()
    with ZmqSink(ANYWHERE, pattern=pattern) as sink:
        address = sink.address
    with ZmqSink(address, pattern=pattern):
        pass
    assert threading.active_count() == before
