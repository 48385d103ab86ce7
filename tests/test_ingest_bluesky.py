"""A real RunEngine's documents, through a real Kafka and a real Proxy, lead to the frames that its detector took."""

import pickle
import queue
import re
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from itertools import zip_longest
from pathlib import Path

import bluesky_kafka
import h5py
import hdf5plugin
import msgpack
import numpy as np
import pytest
import zmq
from bluesky import RunEngine
from bluesky import plan_stubs as bps
from bluesky.callbacks.zmq import Publisher
from bluesky.preprocessors import finalize_wrapper
from bluesky.utils import RunEngineInterrupted
from ophyd_async.core import StaticPathProvider, UUIDFilenameProvider, init_devices, soft_signal_rw
from ophyd_async.sim import SimBlobDetector

from stream import curve
from stream.documents import frame, unpack
from stream.errors import ConfigError, DecodeError, NotSeekable, SourceError
from stream.ingest.bluesky import BlueskySource
from stream.ingest.bluesky_files import BlueskyFiles
from stream.ingest.bluesky_kafka import KafkaDocuments
from stream.ingest.bluesky_roots import Roots
from stream.ingest.bluesky_zmq import ZmqDocuments
from stream.ingest.dectris import DectrisSource
from stream.ingest.hdf5 import Hdf5Source
from stream.messages import FrameBatch, Rejected, Result, RunStart, RunStop
from stream.operators.multitau import MultiTau
from stream.pipeline import Pipeline
from stream.sinks.dectris import DectrisSink
from tests import kafka
from tests.conftest import make_roimap, make_start
from tests.plane import until_said
from tests.test_bluesky_runs import documents as made_up
from tests.test_bluesky_runs import eiger
from tests.test_command_line import finished, started, xpcs_stream

pytestmark = pytest.mark.timeout(400)

DEADLINE = 60
FRAME_TIME = 0.02


class Handed:
    """Documents handed over within the process: from any thread, until they are ended."""

    def __init__(self, *given):
        self._queue = queue.Queue()
        for each in given:
            self._queue.put(each)

    def __call__(self, name, document):
        self._queue.put((name, document))

    def end(self):
        self._queue.put(...)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        while True:
            try:
                each = self._queue.get(timeout=0.02)
            except queue.Empty:
                each = None
            if each is ...:
                return
            yield each

    def position(self):
        return {}

    def seek(self, position):
        if position:
            raise NotSeekable("no")


@pytest.fixture
def engine():
    engine = RunEngine({}, context_managers=[])
    yield engine
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join(DEADLINE)
    engine.loop.close()


@pytest.fixture
def detector(engine, tmp_path):
    period = soft_signal_rw(float, FRAME_TIME * 1e3, units="ms")
    with init_devices():
        detector = SimBlobDetector(
            StaticPathProvider(UUIDFilenameProvider(), tmp_path), config_sigs=[period], name="detector"
        )
    period.set_name("detector-acquire_period")
    return detector


def moving(detector, n_events=5):
    """A plan in which no frame is as the one before."""
    yield from bps.open_run(md={"sample": "silica", "plan_name": "moving"})
    for i in range(n_events):
        detector.pattern_generator.set_x(float(i))
        yield from bps.checkpoint()
        yield from bps.trigger_and_read([detector])
    yield from bps.close_run()


def staged(detector, plan):
    yield from bps.stage(detector)
    yield from finalize_wrapper(plan, bps.unstage(detector))


@contextmanager
def running(engine, plan, *ends):
    """Run a plan beside, as far as it goes, and then call what ends it."""

    def run():
        for do in [lambda: engine(plan), *ends]:
            with suppress(RunEngineInterrupted, ZeroDivisionError):
                do()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def documents_of(engine, plan):
    """The documents of a plan, once it is through."""
    kept = []
    token = engine.subscribe(lambda *each: kept.append(each))
    with running(engine, plan):
        pass
    engine.unsubscribe(token)
    return kept


def collected(source, n_runs=1):
    """What a source yields until so many runs ended."""
    messages = []
    deadline = time.monotonic() + DEADLINE
    with source:
        for message in source:
            assert time.monotonic() < deadline, messages
            if message is not None:
                messages.append(message)
            n_runs -= isinstance(message, RunStop)
            if n_runs == 0:
                break
    return messages


def frames_of(messages, run):
    """The frames of a run, of which none is missing."""
    batches = [each for each in messages if isinstance(each, FrameBatch) and each.run == run]
    firsts = [each.first for each in batches]
    assert firsts == np.cumsum([0, *(len(each.frames) for each in batches)])[:-1].tolist()
    return np.concatenate([each.frames for each in batches])


def frames_in(document):
    with h5py.File(Path(document["uri"].removeprefix("file://localhost"))) as file:
        return file[document["parameters"]["dataset"]][()]


def uid_of(documents):
    return documents[0][1]["uid"]


def frames_written(documents):
    (resource,) = [d for name, d in documents if name == "stream_resource" and not d["data_key"].endswith("-sum")]
    return frames_in(resource)


def the(kind, messages):
    (message,) = [each for each in messages if isinstance(each, kind)]
    return message


def files(documents, tmp_path, **options):
    return BlueskyFiles(documents, Roots({str(tmp_path): tmp_path}), **options)


ENGINE = """
import sys
from pathlib import Path
from bluesky import RunEngine
from bluesky import plan_stubs as bps
from ophyd_async.core import StaticPathProvider, UUIDFilenameProvider, init_devices
from ophyd_async.sim import SimBlobDetector
from stream.documents import pack

engine = RunEngine({})
with init_devices():
    detector = SimBlobDetector(StaticPathProvider(UUIDFilenameProvider(), Path(sys.argv[1])))

def plan():
    yield from bps.stage(detector)
    yield from bps.open_run(md={"acquire_period": 0.1})
    for i in range(5):
        detector.pattern_generator.set_x(float(i))
        yield from bps.trigger_and_read([detector])
    # The file stays open until all of it was read.
    yield from bps.input_plan("")
    yield from bps.unstage(detector)
    yield from bps.close_run()

engine(plan(), lambda *each: print(pack(*each).hex(), flush=True))
"""


@contextmanager
def process(code, *arguments):
    """Another Python, which has a file open that cannot be opened twice in one."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_frames_are_read_while_their_file_grows(tmp_path):
    documents, kept = Handed(), []

    def hand_over():
        for line in engine.stdout:
            if re.fullmatch("[0-9a-f]+\n", line):
                kept.append(unpack(bytes.fromhex(line)))
                documents(*kept[-1])

    with process(ENGINE, tmp_path) as engine, files(documents, tmp_path) as source:
        thread = threading.Thread(target=hand_over)
        thread.start()
        messages, n_frames, deadline = [], 0, time.monotonic() + DEADLINE
        for message in source:
            messages += [message] if message is not None else []
            n_frames += len(message.frames) if isinstance(message, FrameBatch) else 0
            if n_frames == 5 and isinstance(message, FrameBatch):
                engine.stdin.write("\n")
                engine.stdin.flush()
            if isinstance(message, RunStop):
                break
            assert time.monotonic() < deadline
        thread.join(DEADLINE)
    np.testing.assert_array_equal(frames_of(messages, uid_of(kept)), frames_written(kept))


def test_a_run_says_what_its_documents_say(engine, detector, tmp_path):
    kept = documents_of(engine, staged(detector, moving(detector)))
    messages = collected(files(Handed(*kept), tmp_path))
    start, stop = the(RunStart, messages), the(RunStop, messages)
    assert (start.run, start.shape, start.dtype, start.frame_time) == (uid_of(kept), (240, 320), "|u1", FRAME_TIME)
    assert start.metadata["sample"] == "silica"
    assert start.metadata["plan_name"] == "moving"
    assert start.metadata["scan_id"] == kept[0][1]["scan_id"]
    assert datetime.fromisoformat(start.metadata["start_time"]).timestamp() == pytest.approx(kept[0][1]["time"])
    assert (stop.run, stop.n_frames, stop.exit_status) == (uid_of(kept), 5, "success")


class Results(nullcontext):
    """Keeps the last result."""

    def __init__(self):
        super().__init__(self)
        self.last = None

    def write(self, output):
        if isinstance(output, Result) and output.operator == "multitau":
            self.last = output

    def flush(self):
        pass


def result_of(source):
    roimap, results = make_roimap((240, 320)), Results()
    with source:
        Pipeline(source, lambda start: [MultiTau(start, roimap, threads=1)], [results], runs=1).run()
    return results.last


def test_the_result_is_that_of_the_file_bit_for_bit(engine, detector, tmp_path):
    kept = documents_of(engine, staged(detector, moving(detector, 20)))
    (path,) = tmp_path.glob("*.h5")
    ours = result_of(files(Handed(*kept), tmp_path))
    theirs = result_of(Hdf5Source(path, frame_time=FRAME_TIME))
    assert (ours.run, ours.n_frames, ours.final) == (uid_of(kept), 20, True)
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, array in theirs.arrays.items():
        np.testing.assert_array_equal(ours.arrays[name], array, strict=True)


def test_documents_come_through_kafka_of_several_partitions(engine, detector, tmp_path, broker):
    topic = kafka.new_topic(broker, 3)
    source = files(KafkaDocuments(broker.bootstrap, topic), tmp_path)
    publisher = bluesky_kafka.Publisher(topic, broker.bootstrap, key=str(uuid.uuid4()), flush_on_stop_doc=True)
    engine.subscribe(publisher)
    kept = []
    engine.subscribe(lambda *each: kept.append(each))
    with running(engine, staged(detector, moving(detector))):
        messages = collected(source)
    np.testing.assert_array_equal(frames_of(messages, uid_of(kept)), frames_written(kept))


def sent(broker, topic, *documents):
    publisher = bluesky_kafka.Publisher(topic, broker.bootstrap, key="key")
    for document in documents:
        publisher(*document)
    publisher.flush()


def test_documents_from_before_are_read_only_if_that_is_wanted(broker, topic):
    sent(broker, topic, ("start", {"uid": "before"}))
    late = KafkaDocuments(broker.bootstrap, topic)
    early = KafkaDocuments(broker.bootstrap, topic, begin="beginning")
    sent(broker, topic, ("start", {"uid": "after"}))
    first = []
    for documents in (late, early):
        with documents:
            first.append(next(each for each in documents if each is not None))
    assert first == [("start", {"uid": "after"}), ("start", {"uid": "before"})]


def test_what_is_no_document_is_rejected_with_its_place(broker, topic):
    with KafkaDocuments(broker.bootstrap, topic) as documents:
        producer = bluesky_kafka.Publisher(topic, broker.bootstrap, key="key")._producer
        producer.produce(topic, value=pickle.dumps(("start", {})))
        producer.flush(DEADLINE)
        rejected = next(each for each in documents if each is not None)
    assert isinstance(rejected, Rejected)
    assert "partition 0, offset 0" in rejected.reason


def test_after_a_restart_a_run_goes_on_where_it_was(engine, detector, tmp_path, broker, topic):
    kept = documents_of(engine, staged(detector, moving(detector, 6)))
    with KafkaDocuments(broker.bootstrap, topic) as documents:
        begin = documents.position()
    sent(broker, topic, ("start", {"uid": "another"}), *kept[:-5])
    before, position = [], None
    with files(KafkaDocuments(broker.bootstrap, topic, begin="beginning"), tmp_path, batch=1, silence=0.1) as source:
        for message in source:
            before += [message] if isinstance(message, FrameBatch) else []
            if len(before) == 3:
                position = source.position()
                break
    assert begin == {f"{topic}:0": 0}
    sent(broker, topic, *kept[-5:])
    after = files(KafkaDocuments(broker.bootstrap, topic), tmp_path, silence=0.1)
    after.seek(position)
    messages = [*before, *collected(after)]
    np.testing.assert_array_equal(frames_of(messages, uid_of(kept)), frames_written(kept))


class Logged(Handed):
    """Documents that are kept, so that one can go back to them."""

    def __init__(self, *given):
        super().__init__()
        self._given, self._next = given, 0

    def __iter__(self):
        while self._next < len(self._given):
            self._next += 1
            yield self._given[self._next - 1]

    def position(self):
        return {"log:0": self._next}

    def seek(self, position):
        self._next = position["log:0"]


def test_wherever_it_is_restarted_no_run_is_lost_and_none_comes_twice_though_they_overlap(
    engine, detector, tmp_path, monkeypatch
):
    monkeypatch.setattr("stream.ingest.bluesky_files.LOOK", 0.0)  # files are read after every document
    one, other, last = (documents_of(engine, staged(detector, moving(detector, n))) for n in (2, 3, 1))
    given = [*one[:2], *other[:-1], *one[2:-1], other[-1], *last, one[-1]]
    for n_yielded in range(1, 12):
        before, position = [], None
        with files(Logged(*given), tmp_path, batch=1) as source:
            for message in source:
                position = source.position()
                before += [message] if message is not None else []
                if len(before) == n_yielded:
                    break
        after = files(Logged(*given), tmp_path, batch=1)
        after.seek(position)
        messages = [*before, *(each for each in after if each is not None)]
        for each in (one, other, last):
            np.testing.assert_array_equal(frames_of(messages, uid_of(each)), frames_written(each))
        ends = [each.run for each in messages if isinstance(each, RunStop)]
        assert ends == [uid_of(other), uid_of(one), uid_of(last)]


def test_a_broker_that_is_not_there_is_an_error_in_time():
    (port,) = kafka.free_ports(1)
    begin = time.monotonic()
    with pytest.raises(SourceError, match=str(port)):
        KafkaDocuments(f"127.0.0.1:{port}", "bl.bluesky.runengine.documents", timeout=1.0)
    assert time.monotonic() - begin < 10


def test_a_topic_that_is_not_there_is_an_error(broker):
    with pytest.raises(SourceError, match="nowhere"):
        KafkaDocuments(broker.bootstrap, "nowhere.bluesky.runengine.documents")


PROXY = """
import sys
from bluesky.callbacks.zmq import Proxy, ServerCurve

into, out, *keys = sys.argv[1:]
proxy = Proxy(into, out, out_curve=ServerCurve(*keys, None) if keys else None)
print("there", flush=True)
proxy.start()
"""


@contextmanager
def proxy(*keys):
    """bluesky's own; yields where to send and where to receive."""
    into, out = (f"tcp://127.0.0.1:{port}" for port in kafka.free_ports(2))
    with process(PROXY, into, out, *keys) as there:
        assert there.stdout.readline() == "there\n"
        yield into, out


def arrived(documents, publish):
    """What comes first: what is published before the connection is made is lost."""
    deadline = time.monotonic() + DEADLINE
    with documents:
        for each in documents:
            if each is not None:
                return each
            publish()
            assert time.monotonic() < deadline
    return None


def test_documents_come_through_a_proxy(engine, detector, tmp_path):
    with proxy() as (into, out):
        publisher = Publisher(into, serializer=msgpack.dumps)
        documents = ZmqDocuments(out)
        through = iter(documents)
        deadline = time.monotonic() + DEADLINE
        while next(through) is None:
            publisher("start", {"uid": "are you there"})
            assert time.monotonic() < deadline
        kept = []
        engine.subscribe(publisher)
        engine.subscribe(lambda *each: kept.append(each))
        with running(engine, staged(detector, moving(detector))):
            messages = collected(files(documents, tmp_path))
        publisher.close()
    np.testing.assert_array_equal(frames_of(messages, uid_of(kept)), frames_written(kept))


class Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_a_pickle_is_rejected_and_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with proxy() as (into, out):
        publisher = Publisher(into, serializer=lambda _: pickle.dumps(Harm()))
        documents = ZmqDocuments(out)
        came = arrived(documents, lambda: publisher("start", {"uid": "a"}))
        publisher.close()
    assert isinstance(came, Rejected)
    assert not Path("harm").exists()


def test_only_those_with_a_key_are_let_in(tmp_path, caplog):
    allowed = tmp_path / "allowed"
    public, secret = curve.make(tmp_path, "proxy")
    _, our_secret = curve.make(allowed, "ours")
    _, stranger = curve.make(tmp_path, "stranger")
    with proxy(secret, allowed) as (into, out):
        publisher = Publisher(into, serializer=msgpack.dumps)
        documents = ZmqDocuments(out, keys=curve.ClientKeys.read(our_secret, public))
        came = arrived(documents, lambda: publisher("start", {"uid": "a"}))
        assert came == ("start", {"uid": "a"})
        documents = ZmqDocuments(out, keys=curve.ClientKeys.read(stranger, public))
        with pytest.raises(SourceError, match="the Proxy does not know our key"):
            arrived(documents, lambda: publisher("start", {"uid": "a"}))
        publisher.close()


def test_a_proxy_that_is_away_is_told_of(caplog):
    (port,) = kafka.free_ports(1)
    with ZmqDocuments(f"tcp://127.0.0.1:{port}", wait=0.01) as documents:
        deadline = time.monotonic() + DEADLINE
        for _ in documents:
            if "is away; waiting for it" in caplog.text:
                break
            assert time.monotonic() < deadline


@contextmanager
def heard(address, look):
    """What sends numbers as a Proxy does, from when it is heard; once it is gone, they have arrived."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as out:
        out.bind(address)
        deadline = time.monotonic() + DEADLINE
        while not out.poll(10):
            look()
            assert time.monotonic() < deadline
        yield lambda i: out.send(frame("event", {"seq_num": i}))


def test_what_was_not_read_when_a_proxy_went_is_read_and_then_what_the_next_one_sends():
    address = f"tcp://127.0.0.1:{kafka.free_ports(1)[0]}"
    numbers = []
    with ZmqDocuments(address, wait=0.01) as source:
        documents = iter(source)

        def look():
            if (each := next(documents)) is not None:
                numbers.append(each[1]["seq_num"])

        with heard(address, look) as send:
            for i in range(100):
                send(i)
        with heard(address, look) as send:
            send(100)
        deadline = time.monotonic() + DEADLINE
        while 100 not in numbers and time.monotonic() < deadline:
            look()
    assert numbers == list(range(101))


def pausing(detector):
    yield from bps.open_run()
    for i in range(5):
        detector.pattern_generator.set_x(float(i))
        yield from bps.checkpoint()
        yield from bps.trigger_and_read([detector])
        if i == 2:
            yield from bps.checkpoint()
            yield from bps.pause()
    yield from bps.close_run()


def rewound(detector):
    yield from bps.open_run()
    for i in range(4):
        detector.pattern_generator.set_x(float(i))
        if i != 2:
            yield from bps.checkpoint()
        yield from bps.trigger_and_read([detector])
        if i == 2:
            # From here the run engine goes back to frame 1, and takes both once more.
            yield from bps.pause()
    yield from bps.close_run()


def failing(detector):
    yield from bps.open_run()
    for i in range(3):
        detector.pattern_generator.set_x(float(i))
        yield from bps.trigger_and_read([detector])
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("plan", "how", "n_frames", "exit_status"),
    [
        (pausing, "resume", 5, "success"),
        (rewound, "resume", 6, "success"),
        (pausing, "abort", 3, "abort"),
        (failing, None, 3, "fail"),
    ],
)
def test_a_run_that_is_paused_aborted_or_failed_has_its_frames(
    engine, detector, tmp_path, plan, how, n_frames, exit_status
):
    documents, kept = Handed(), []
    engine.subscribe(documents)
    engine.subscribe(lambda *each: kept.append(each))
    with running(engine, staged(detector, plan(detector)), *([getattr(engine, how)] if how else [])):
        messages = collected(files(documents, tmp_path))
    stop = the(RunStop, messages)
    assert (stop.n_frames, stop.exit_status) == (n_frames, exit_status)
    assert len(frames_of(messages, uid_of(kept))) == n_frames
    np.testing.assert_array_equal(frames_of(messages, uid_of(kept)), frames_written(kept)[:n_frames])


def test_runs_that_overlap_come_one_after_the_other(engine, detector, tmp_path):
    one, other = (documents_of(engine, staged(detector, moving(detector, n))) for n in (3, 5))
    mixed = [each for pair in zip_longest(one, other) for each in pair if each is not None]
    messages = collected(files(Handed(*mixed), tmp_path), 2)
    assert [each.run for each in messages if isinstance(each, RunStart | RunStop)] == [
        *[uid_of(one)] * 2,
        *[uid_of(other)] * 2,
    ]
    for each in (one, other):
        np.testing.assert_array_equal(frames_of(messages, uid_of(each)), frames_written(each))


def test_a_run_without_frames_does_not_hold_up_those_within_it(engine, detector, tmp_path):
    around = [*made_up("around", 0)]
    inside = documents_of(engine, staged(detector, moving(detector)))
    messages = collected(files(Handed(*around[:2], *inside), tmp_path))
    np.testing.assert_array_equal(frames_of(messages, uid_of(inside)), frames_written(inside))


def test_a_run_after_documents_that_lie_is_as_it_should_be(engine, detector, tmp_path):
    kept = documents_of(engine, staged(detector, moving(detector)))
    outside = tmp_path.parent / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["/entry/det"] = np.ones((3, 240, 320), np.uint8)
    (tmp_path / "there.h5").hardlink_to(outside)
    lies = []
    for run, uri in [
        ("outside", f"file://localhost{outside}"),
        ("up", f"file://localhost{tmp_path}/../outside.h5"),
        ("host", f"file://elsewhere{tmp_path}/there.h5"),
        ("scheme", f"http://localhost{tmp_path}/there.h5"),
        ("absent", f"file://localhost{tmp_path}/absent.h5"),
    ]:
        resources = {"uri": uri}
        lies += [(name, d | resources if name == "stream_resource" else d) for name, d in made_up(run)]
    messages = collected(files(Handed(*lies, *kept), tmp_path, within=0.3))
    assert [each.run for each in messages if isinstance(each, RunStart)] == [uid_of(kept)]
    reasons = "\n".join(each.reason for each in messages if isinstance(each, Rejected))
    assert all(f"run {run}:" in reasons for run in ("outside", "up", "host", "scheme", "absent"))
    np.testing.assert_array_equal(frames_of(messages, uid_of(kept)), frames_written(kept))


def test_frames_that_are_told_of_and_never_come_are_lost(engine, detector, tmp_path):
    kept = documents_of(engine, staged(detector, moving(detector)))
    more = [
        (name, d | {"indices": {"start": 4, "stop": 7}, "seq_nums": {"start": 5, "stop": 8}})
        if name == "stream_datum" and d["indices"]["start"] == 4
        else (name, d | {"num_events": {"primary": 7}} if name == "stop" else d)
        for name, d in kept
    ]
    messages = collected(files(Handed(*more), tmp_path, within=0.2))
    assert len(frames_of(messages, uid_of(kept))) == 5
    assert "frames 5 to 6 are told of, and not there" in the(Rejected, messages).reason


def test_a_link_that_leads_out_of_the_directories_is_not_followed(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside.h5"
    inside.mkdir()
    outside.touch()
    (inside / "link.h5").symlink_to(outside)
    with pytest.raises(DecodeError, match="may be read"):
        Roots({"/data": inside}).of_path("/data/link.h5")


def test_directories_have_the_names_that_documents_give_them(tmp_path):
    (tmp_path / "nested").mkdir()
    roots = Roots({"/data": tmp_path, "/data/more": tmp_path / "nested"})
    assert roots.of_uri("file://localhost/data/a%20b.h5") == tmp_path / "a b.h5"
    assert roots.of_uri("file:///data/more/c.h5") == tmp_path / "nested" / "c.h5"
    with pytest.raises(ConfigError, match="no directory"):
        Roots({})


def master(path, n_frames, seed):
    """What the file writer of an EIGER leaves, in two data files; returns its frames."""
    frames = np.random.default_rng(seed).poisson(0.1, (n_frames, 24, 32)).astype("<u4")
    with h5py.File(path, "w") as file:
        detector = file.create_group("/entry/instrument/detector")
        detector["frame_time"], detector["count_time"] = 0.01, 0.009
        detector.create_group("detectorSpecific")
        file.create_group("/entry/data")
        for i, part in enumerate(np.array_split(frames, 2), start=1):
            name = path.name.replace("master", f"data_{i:06}")
            with h5py.File(path.with_name(name), "w") as data:
                data.create_dataset(
                    "/entry/data/data", data=part, chunks=(1, 24, 32), compression=hdf5plugin.Bitshuffle()
                )
            file[f"/entry/data/data_{i:06}"] = h5py.ExternalLink(name, "/entry/data/data")
    return frames


def test_events_of_an_eiger_are_read_from_their_master_files(tmp_path):
    (tmp_path / "ab").mkdir()
    frames = [master(tmp_path / "ab" / f"cd_{40 + i}_master.h5", 10, i) for i in range(2)]
    source = BlueskyFiles(Handed(*eiger()), Roots({"/data": tmp_path}))
    messages = collected(source, 2)
    for i, run in enumerate(["e", "e/2"]):
        np.testing.assert_array_equal(frames_of(messages, run), frames[i])
    assert [each.exit_status for each in messages if isinstance(each, RunStop)] == ["success", "success"]


def test_a_master_file_that_comes_late_is_waited_for(tmp_path):
    (tmp_path / "ab").mkdir()
    source = BlueskyFiles(Handed(*eiger(n_events=1)), Roots({"/data": tmp_path}))
    frames = []
    timer = threading.Timer(0.3, lambda: frames.append(master(tmp_path / "ab" / "cd_40_master.h5", 10, 0)))
    timer.start()
    messages = collected(source)
    timer.join()
    np.testing.assert_array_equal(frames_of(messages, "e"), frames[0])


def test_a_master_file_is_read_as_its_data_files_come(tmp_path):
    (tmp_path / "ab").mkdir()
    frames = master(tmp_path / "ab" / "cd_40_master.h5", 10, 0)
    last = tmp_path / "ab" / "cd_40_data_000002.h5"
    away = last.rename(tmp_path / "away.h5")
    messages = []
    for message in BlueskyFiles(Handed(*eiger(n_events=1)), Roots({"/data": tmp_path})):
        messages.append(message)
        if isinstance(message, RunStop):
            break
        if away.exists() and isinstance(message, FrameBatch) and message.first + len(message.frames) == 5:
            away.rename(last)
    np.testing.assert_array_equal(frames_of(messages, "e"), frames)
    assert [type(message) for message in messages if message].count(RunStart) == 1


def test_a_frame_that_is_told_of_and_not_yet_written_is_waited_for(tmp_path):
    frames = np.random.default_rng(0).integers(0, 9, (3, 24, 32)).astype("u1")
    for name, written in [("a.h5", [0, 2]), ("later.h5", [0, 1, 2])]:
        with h5py.File(tmp_path / name, "w") as file:
            dataset = file.create_dataset("/entry/det", frames.shape, "u1", chunks=(1, 24, 32))
            for i in written:
                dataset[i] = frames[i]
    timer = threading.Timer(0.3, lambda: (tmp_path / "later.h5").replace(tmp_path / "a.h5"))
    timer.start()
    messages = collected(BlueskyFiles(Handed(*made_up("a")), Roots({"/data": tmp_path})))
    timer.join()
    np.testing.assert_array_equal(frames_of(messages, "a"), frames)


def detector_file(path, n_frames=4):
    """What stands for the detector's own stream."""
    with h5py.File(path, "w") as file:
        file["/entry/data/data"] = np.arange(n_frames * 12, dtype=np.uint16).reshape(n_frames, 3, 4)
        file["/entry/instrument/detector/frame_time"] = 0.01
        file["/entry/start_time"] = "2026-11-22T00:00:00+00:00"
    return Hdf5Source(path, batch=1)


class Beside(Handed):
    """Documents that never wait."""

    def __iter__(self):
        while True:
            each = None if self._queue.empty() else self._queue.get()
            if each is ...:
                return
            yield each


def test_a_run_of_the_detector_is_called_and_described_by_bluesky(tmp_path, caplog):
    *documents, _ = made_up("uid", energy=11.0)
    messages = collected(BlueskySource(Beside(*documents), detector_file(tmp_path / "series_1.h5")))
    start = the(RunStart, messages)
    assert {each.run for each in messages} == {"uid"}
    assert (start.frame_time, start.metadata["incident_energy"], start.metadata["scan_id"]) == (0.01, 11.0, 7)
    assert "frame_time is 0.01 by the detector, 0.002 by the documents" in start.metadata["conflicts"]
    assert frames_of(messages, "uid").shape == (4, 3, 4)


def test_runs_are_paired_in_the_order_in_which_they_were_armed(tmp_path):
    one, other = ([*made_up(run)][:-1] for run in ("one", "other"))
    start = the(RunStart, collected(BlueskySource(Beside(*one, *other), detector_file(tmp_path / "s.h5"))))
    assert start.run == "one"


def test_a_uid_in_the_detectors_stream_pairs_whatever_the_order(tmp_path):
    one, other = ([*made_up(run)][:-1] for run in ("one", "other"))
    detector = detector_file(tmp_path / "series_other.h5")
    start = the(RunStart, collected(BlueskySource(Beside(*one, *other), detector)))
    assert start.run == "other"


def test_a_detector_that_names_a_run_that_nobody_knows_is_not_taken_for_another(tmp_path):
    source = detector_file(tmp_path / "series_1.h5")
    source.__exit__()
    with h5py.File(tmp_path / "series_1.h5", "a") as file:
        file["/entry/sample/name"] = str(uuid.uuid4())
    *documents, _ = made_up("uid")
    source = BlueskySource(Beside(*documents), Hdf5Source(tmp_path / "series_1.h5"), within=0.1)
    assert the(RunStart, collected(source)).run == "series_1"


def test_the_uid_in_the_user_data_of_a_dectris_detector_pairs():
    uid = str(uuid.uuid4())
    documents = Beside(*[*made_up("another")][:-1], *[*made_up(uid)][:-1])
    start = make_start(metadata={"n_frames": 3, "run_uid": uid})
    frames = np.arange(900, dtype="<u2").reshape(3, 6, 50)
    with DectrisSink("tcp://127.0.0.1:*", timeout=10) as sink:
        source = BlueskySource(documents, DectrisSource(sink.address))
        sink.write(start)
        sink.write(FrameBatch(run=start.run, first=0, frames=frames, timestamp_ns=0))
        sink.write(RunStop(run=start.run, n_frames=3, exit_status="success"))
        messages = collected(source)
    np.testing.assert_array_equal(frames_of(messages, uid), frames)
    assert the(RunStart, messages).frame_time == start.frame_time


def test_an_abort_of_the_run_engine_is_told_where_the_detector_knows_of_none(tmp_path):
    *documents, _ = made_up("uid", detectors=["det"])
    source = BlueskySource(Beside(*documents), detector_file(tmp_path / "s.h5"))
    messages = []
    with source:
        for message in source:
            messages.append(message)
            if isinstance(message, RunStart):
                source._documents(*[*made_up("uid", exit_status="abort")][-1])
    assert messages[-1] == RunStop(run="uid", n_frames=4, exit_status="abort")


class Streaming:
    """A detector whose stream does not end."""

    def __init__(self, source):
        self._source = source

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._source.__exit__()

    def __iter__(self):
        yield from self._source
        while True:
            yield None

    def position(self):
        return self._source.position()


def streamed(documents, tmp_path):
    """A run of a detector, of which the documents tell; None is for those that come with its next message."""
    return collected(BlueskySource(Beside(*documents), Streaming(detector_file(tmp_path / "s.h5")), within=DEADLINE))


def test_an_abort_that_is_told_after_the_detectors_end_is_waited_for(tmp_path):
    *documents, stop = made_up("uid", exit_status="abort", detectors=["det"])
    # The detector's end is its sixth message.
    messages = streamed([*documents, *[None] * 9, stop], tmp_path)
    assert messages[-1] == RunStop(run="uid", n_frames=4, exit_status="abort")


def test_a_run_that_is_over_before_it_was_described_is_found_though_the_next_one_is_open(tmp_path):
    start, *rest = made_up("uid", detectors=["det"])
    *following, _ = made_up("next", detectors=["det"])
    assert the(RunStart, streamed([start, None, *rest, *following], tmp_path)).run == "uid"


def test_a_run_that_names_detectors_is_that_of_the_detector_and_not_the_one_around_it(tmp_path):
    around, within = [*made_up("around")][:2], made_up("within", detectors=["det"])
    assert the(RunStart, streamed([*around, *within], tmp_path)).run == "within"


def test_a_run_that_names_detectors_is_waited_for_though_the_one_around_it_is_described(tmp_path):
    around, within = [*made_up("around")][:2], made_up("within", detectors=["det"])
    assert the(RunStart, streamed([*around, None, None, *within], tmp_path)).run == "within"


def test_runs_are_found_however_far_documents_are_ahead_of_a_detector_that_was_never_idle(tmp_path):
    one, other = ([*made_up(run, detectors=["det"])] for run in ("one", "other"))
    *following, _ = made_up("next", detectors=["det"])

    class Behind(Streaming):
        def __iter__(self):
            yield from self._source
            threading.Event().wait(0.3)
            yield from detector_file(tmp_path / "again.h5")

    detector = Behind(detector_file(tmp_path / "s.h5"))
    messages = collected(BlueskySource(Beside(*one, *other, *following), detector, within=0.1), 2)
    assert [message.run for message in messages if isinstance(message, RunStart)] == ["one", "other"]


def test_a_run_that_ended_while_the_detector_was_idle_is_not_its(tmp_path):
    class Later(Streaming):
        def __iter__(self):
            yield from [None] * 3
            yield from self._source

    *documents, stop = made_up("uid", detectors=["det"])
    documents = Beside(*made_up("scan", detectors=["motor"]), None, *documents, *[None] * 12, stop)
    detector = Later(detector_file(tmp_path / "s.h5"))
    assert the(RunStart, collected(BlueskySource(documents, detector, within=DEADLINE))).run == "uid"


def test_the_end_of_the_documents_ends_the_stream_once_the_detector_sent_its_run(tmp_path):
    documents = Beside(*made_up("uid"), ...)
    source = BlueskySource(documents, Streaming(detector_file(tmp_path / "s.h5")), within=0.2)
    with source:
        messages = [message for message in source if message is not None]
    assert messages[-1] == RunStop(run="uid", n_frames=4, exit_status="success")


def test_a_run_that_bluesky_says_nothing_of_goes_on_by_its_own_name(caplog):
    start = make_start(metadata={"n_frames": 3})
    frames = np.arange(900, dtype="<u2").reshape(3, 6, 50)
    with DectrisSink("tcp://127.0.0.1:*", timeout=10) as sink:
        source = BlueskySource(Beside(), DectrisSource(sink.address), within=0.1)
        sink.write(start)
        sink.write(FrameBatch(run=start.run, first=0, frames=frames, timestamp_ns=0))
        sink.write(RunStop(run=start.run, n_frames=3, exit_status="success"))
        messages = collected(source)
    (name,) = {each.run for each in messages}
    np.testing.assert_array_equal(frames_of(messages, name), frames)
    assert f"run {name}: Bluesky said nothing of it within 0.1 s" in caplog.text


def test_the_position_is_that_of_the_detector_after_what_was_yielded_last(tmp_path):
    *documents, _ = made_up("uid")
    # They come when three messages of the detector are held for them.
    late = Beside(None, None, None, *documents)
    with BlueskySource(late, detector_file(tmp_path / "series_1.h5")) as source:
        for message in source:
            if isinstance(message, FrameBatch):
                assert (message.run, source.position()) == ("uid", {"series_1:frame": message.first + 1})


def test_the_command_correlates_the_files_that_a_run_engine_tells_of(engine, detector, tmp_path, broker, topic):
    geometry = (
        *("--shape", "240x320", "--beam-center-x", "160", "--beam-center-y", "120", "--detector-distance", "5 m"),
        *("--pixel-size", "75 um", "--incident-energy", "11 keV"),
    )
    assert xpcs_stream("qmap", *geometry, "--out", tmp_path / "qmap.h5").exit_code == 0
    command = ("run", "--source", f"kafka+bluesky://{broker.bootstrap}/{topic}", "--root", f"{tmp_path}={tmp_path}")
    options = ("--qmap", "qmap.h5", "--out", "result.h5", "--runs", 1, "--quiet")
    with started(*command, *options, cwd=tmp_path) as process:
        until_said(process, "taking frames from")
        publisher = bluesky_kafka.Publisher(topic, broker.bootstrap, key="key", flush_on_stop_doc=True)
        engine.subscribe(publisher)
        kept = documents_of(engine, staged(detector, moving(detector)))
        finished(process)
    with h5py.File(tmp_path / "result.h5") as result:
        assert result["entry/entry_identifier"].asstr()[()] == uid_of(kept)
        assert result["xpcs/ledger/received"][()] == len(frames_written(kept))
