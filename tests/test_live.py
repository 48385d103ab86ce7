"""The page's server, from the outside: what is served, to whom, and what hostile clients can do."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener, urlopen

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from stream.errors import ConfigError
from stream.heartbeat import Region, table
from stream.ingest.zmq import ZmqResults
from stream.live.dynamics import Dynamics, PowerLaw
from stream.live.hub import Hub
from stream.live.picture import Bins, block_mean, block_of
from stream.live.section import pack
from stream.live.server import Server
from stream.live.view import UNFIT, View, joined
from stream.messages import Result, RunStart, RunStop
from stream.operators.qmap import ring_map
from stream.operators.roimap_file import write
from stream.sinks.live import LiveSink, listen, read_token
from stream.sinks.zmq import ZmqSink

TOKEN = "a-word-that-nobody-guesses"  # noqa: S105
TAU = 1e-3 * np.array([1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128])
SHAPE = (48, 64)
ROIMAP = ring_map(
    shape=SHAPE,
    beam_center_x=32,
    beam_center_y=24,
    detector_distance=5.0,
    pixel_size=75e-6,
    incident_energy=11.0,
    n_static=30,
    n_dynamic=3,
)


def start(run="run-1", **metadata):
    return RunStart(
        run=run, shape=SHAPE, dtype="<u2", frame_time=1e-3, count_time=1e-3, metadata={"n_frames": 4000} | metadata
    )


def stop(run="run-1", exit_status="success"):
    return RunStop(run=run, n_frames=4000, exit_status=exit_status)


def multitau(run="run-1", *, n_frames=2000, final=False, diffusion=2e7, seed=0):
    q = ROIMAP.dynamic_q
    err = np.full((len(TAU), len(q)), 1e-3)
    g2 = (
        1
        + 0.2 * np.exp(-2 * diffusion * q**2 * TAU[:, None])
        + err * np.random.default_rng(seed).normal(size=err.shape)
    )
    pairs = np.linspace(4000, 10, len(TAU))
    arrays = {"tau": TAU, "g2": g2, "g2_err": err, "n_pairs": pairs}
    return Result(run=run, operator="multitau", n_frames=n_frames, final=final, arrays=arrays)


def scattering(run="run-1", *, n_frames=2000, final=False, image=None):
    arrays = {
        "image": np.ones(SHAPE) if image is None else image,
        "origin": np.zeros(2, np.int64),
        "scattering_1d": np.ones(30),
        "scattering_1d_segments": np.ones((4, 30)),
        "segment_start": np.arange(4) * 500,
    }
    return Result(run=run, operator="scattering", n_frames=n_frames, final=final, arrays=arrays)


def ledger(run="run-1", *, n_frames=2000, final=False, **more):
    names = ("sent", "received", "lost", "late", "duplicate", "undecodable", "stray")
    arrays = {name: np.array(more.get(name, 0)) for name in names}
    arrays |= {"lag": np.array(0.02), "lost_spans": np.empty((0, 2), np.int64)}
    arrays |= {name: value for name, value in more.items() if name not in names}
    return Result(run=run, operator="ledger", n_frames=n_frames, final=final, arrays=arrays)


def regions(run="run-1", *known, n_frames=2000):
    return Result(run=run, operator="regions", n_frames=n_frames, final=False, arrays=table(known))


def region(i, **facts):
    return Region(
        **{"rows": (12 * i, 12 * i + 12), "frames": 2000, "node": f"node{i}:1", "age": 0.1, "lag": 0.02} | facts
    )


def unpack(packed):
    length = int.from_bytes(packed[:4], "little")
    head = json.loads(packed[4 : 4 + length])
    arrays = {}
    for name, (dtype, shape, offset) in head["arrays"].items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(packed, dtype, count, 4 + length + offset).reshape(shape)
    return head, arrays


class Page:
    def __init__(self, sink, port):
        self.sink = sink
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def publish(self, *outputs):
        for output in outputs:
            self.sink.write(output)

    def get(self, path, **headers):
        with urlopen(Request(self.url + path, headers=headers), timeout=60) as answer:  # noqa: S310
            return answer.read()

    def metrics(self):
        lines = [line.rpartition(" ") for line in self.get("/metrics").decode().splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in lines}

    def socket(self, **options):
        return connect(f"ws://127.0.0.1:{self.port}/live", max_size=None, open_timeout=60, **options)

    def wait_for(self, says):
        until(lambda: says(self.metrics()))


def until(is_so, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.02)


def hear(socket, wanted, seconds=60):
    """Return the first section that is wanted."""
    deadline = time.monotonic() + seconds
    while True:
        head, arrays = unpack(socket.recv(timeout=deadline - time.monotonic()))
        if wanted(head):
            return head, arrays


def both(socket, one, other):
    """Return the head of one section and the arrays of another, whichever comes first."""
    found = {}
    while len(found) < 2:
        head, arrays = hear(socket, lambda head: one(head) or other(head))
        found[one(head)] = (head, arrays)
    return found[True][0], found[False][1]


def of(section, **facts):
    return lambda head: head["section"] == section and all(head[name] == value for name, value in facts.items())


@contextmanager
def served(token=None, files=None):
    ended = threading.Event()
    with ExitStack() as stack:
        sink = stack.enter_context(ZmqSink("tcp://127.0.0.1:*", pattern="pub"))
        results = stack.enter_context(ZmqResults(sink.address))
        listening = stack.enter_context(listen("127.0.0.1", 0, token=token))
        port = listening.getsockname()[1]
        server = Server(listening, results, roimap=ROIMAP, source="zmq://there", token=token, stop=ended, files=files)
        thread = threading.Thread(target=server.run)
        thread.start()
        page = Page(sink, port)
        try:
            until(lambda: answers(port))
            yield page
        finally:
            ended.set()
            thread.join()


def answers(port):
    try:
        with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return answer.read() == b"ok\n"
    except OSError:
        return False


@pytest.fixture(scope="module")
def page():
    with served() as page:
        yield page


@pytest.fixture
def run(page):
    """The name of a run that nobody had before."""
    return f"run-{time.monotonic_ns()}"


def test_a_browser_is_given_the_numbers_as_they_are_in_the_result(page, run):
    result = multitau(run)
    with page.socket() as socket:
        page.publish(start(run), result)
        _, arrays = hear(socket, of("g2", n_frames=2000))
    for name in ("tau", "g2", "g2_err", "n_pairs"):
        np.testing.assert_array_equal(arrays[name], result.arrays[name])


def test_a_late_joiner_has_everything_at_once(page, run):
    page.publish(start(run, sample="silica"), multitau(run), scattering(run), ledger(run, received=1990, lost=10))
    with page.socket() as first:
        hear(first, lambda head: head["section"] == "run" and head["lost"] == 10 and head["run"] == run)
    with page.socket() as late:
        heads = [unpack(late.recv(timeout=60))[0] for _ in range(5)]
    sections = [head["section"] for head in heads]
    assert sections[:3] == ["run", "map", "g2"]
    assert {"scattering", "image"} <= {*sections, "scattering", "image"}
    assert (heads[0]["run"], heads[0]["sample"], heads[0]["state"]) == (run, "silica", "running")
    assert heads[0]["n_frames"] == 2000


def test_a_late_joiner_is_shown_nothing_of_the_run_before(page, run):
    with page.socket() as first:
        page.publish(start(run), multitau(run))
        hear(first, of("g2", n_frames=2000))
        page.publish(start(f"{run}-next"))
        hear(first, lambda head: head.get("run") == f"{run}-next")
    with page.socket() as second:
        page.publish(ledger(f"{run}-next", n_frames=10))
        heads = []
        hear(second, lambda head: heads.append(head) or (head["section"] == "run" and head["n_frames"] == 10))
    assert {head["section"] for head in heads} <= {"run", "map", "history"}


def test_rates_are_fitted_and_tell_the_diffusion(page, run):
    with page.socket() as socket:
        page.publish(start(run), multitau(run, n_frames=2001))
        head, arrays = hear(socket, of("fit", n_frames=2001))
    assert arrays["single_converged"].all()
    np.testing.assert_allclose(arrays["single_rate"], 2e7 * ROIMAP.dynamic_q**2, rtol=0.05)
    assert head["single"]["diffusion"] == pytest.approx(2e7, rel=0.03)
    assert head["single"]["exponent"] == pytest.approx(2, abs=0.1)


def test_a_fit_of_noise_is_told_as_not_converged(page, run):
    noise = multitau(run, n_frames=2002, diffusion=1e12)
    with page.socket() as socket:
        page.publish(start(run), noise)
        head, arrays = hear(socket, of("fit", n_frames=2002))
    assert not arrays["single_converged"].any()
    assert head["single"]["diffusion"] is None


def test_a_missing_region_is_told_and_marked_in_the_image(page, run):
    image = np.ones(SHAPE)
    image[24:36] = np.nan
    with page.socket() as socket:
        missing = {"missing_regions": np.array([2]), "plane": np.array(1)}
        page.publish(start(run), scattering(run, n_frames=2003, image=image), ledger(run, n_frames=2003, **missing))
        head, arrays = both(socket, of("run", missing_regions=[2], run=run), of("image", n_frames=2003))
    assert (head["missing_regions"], head["plane"]) == ([2], "stream and file")
    expected = np.zeros(SHAPE, bool)
    expected[24:36] = ROIMAP.static_roi_map[24:36] > 0
    np.testing.assert_array_equal(arrays["no_data"] > 0, expected)


def test_the_end_of_a_run_is_told_and_its_curves_stay_for_the_day(page, run):
    final = multitau(run, final=True)
    with page.socket() as socket:
        page.publish(start(run), final, ledger(run, final=True), stop(run, "abort"))
        head, _ = hear(socket, lambda head: head["section"] == "history" and head["runs"][0]["run"] == run)
        assert head["runs"][0]["state"] == "aborted"
        page.publish(start(f"{run}-next"))
        hear(socket, of("run", run=f"{run}-next"))
    _, arrays = unpack(page.get(f"/runs/{head['runs'][0]['number']}/g2"))
    np.testing.assert_array_equal(arrays["g2"], final.arrays["g2"])


def test_an_interim_result_does_not_replace_a_final_one_that_came_before(page, run):
    with page.socket() as socket:
        page.publish(start(run), multitau(run, n_frames=4000, final=True), ledger(run, final=True))
        hear(socket, of("g2", n_frames=4000))
        page.publish(multitau(run, n_frames=1000), start(f"{run}-next"))
        heads = []
        hear(socket, lambda head: heads.append(head) or head.get("run") == f"{run}-next")
    assert not [head for head in heads if head["section"] == "g2"]


def test_prometheus_is_told_frames_and_losses_over_all_runs(page, run):
    before = page.metrics()
    for name in (run, f"{run}-b"):
        page.publish(start(name), ledger(name, received=1000, lost=1), ledger(name, received=1990, lost=10), stop(name))
    page.wait_for(
        lambda now: now['xpcs_runs_total{state="complete"}'] == before['xpcs_runs_total{state="complete"}'] + 2
    )
    now = page.metrics()
    assert now["xpcs_frames_total"] - before["xpcs_frames_total"] == 2 * 1990
    assert now["xpcs_frame_bytes_total"] - before["xpcs_frame_bytes_total"] == 2 * 1990 * 2 * SHAPE[0] * SHAPE[1]
    lost = 'xpcs_losses_total{cause="lost"}'
    assert now[lost] - before[lost] == 20


def test_prometheus_is_told_how_long_a_frame_takes_to_a_browser(page, run):
    before = page.metrics()["xpcs_served_seconds_count"]
    with page.socket() as socket:
        page.publish(start(run), ledger(run, n_frames=2004))
        hear(socket, of("run", n_frames=2004))
        page.wait_for(lambda now: now["xpcs_served_seconds_count"] > before)


@pytest.mark.parametrize(
    "bad",
    [
        {"operator": "multitau", "arrays": {"tau": TAU}},
        {"operator": "multitau", "arrays": {**multitau().arrays, "tau": TAU[:3]}},
        {"operator": "multitau", "arrays": {**multitau().arrays, "g2": TAU, "g2_err": TAU}},
        {"operator": "scattering", "arrays": {**scattering().arrays, "image": TAU}},
        {"operator": "scattering", "arrays": {**scattering().arrays, "scattering_1d_segments": np.ones((8, 7))}},
        {"operator": "ledger", "arrays": {**ledger().arrays, "received": TAU}},
        {"operator": "ledger", "arrays": {**ledger().arrays, "lost_spans": TAU[:3]}},
        {"operator": "ledger", "arrays": {**ledger().arrays, "frame_age": TAU}},
        {"operator": "regions", "arrays": {}},
        {"operator": "regions", "arrays": {**table([region(0)]), "node": np.zeros((2, 4), np.uint8)}},
        {"operator": "regions", "arrays": {**table([region(0)]), "frames": np.array([np.inf])}},
        {"operator": "regions", "arrays": {**table([region(0)]), "rows": np.zeros((1, 3), np.int64)}},
        {"operator": "intensity", "arrays": {"frame": np.arange(9), "intensity": np.empty(0)}},
    ],
)
def test_a_result_that_is_not_what_it_says_is_left_out(page, run, bad):
    with page.socket() as socket:
        page.publish(start(run), Result(run=run, n_frames=7, final=False, **bad))
        page.publish(multitau(run, n_frames=2006), ledger(run, n_frames=2007))
        both(socket, of("run", n_frames=2007), of("fit", n_frames=2006))


def test_others_than_this_machine_are_told_what_they_need_by_run(tmp_path):
    qmap = tmp_path / "qmap.h5"
    write(qmap, ROIMAP)
    for address, says in [
        ("live://0.0.0.0:8050", "others than this machine reach it, so that a token is needed: --token-file FILE"),
        ("live://nonsense", '--live: "live://nonsense" must name a host and a port'),
        ("http://127.0.0.1:8050", "unknown scheme http://"),
    ]:
        command = [sys.executable, "-m", "stream", "run", "--source", "zmq://127.0.0.1:5600", "--qmap", qmap]
        done = subprocess.run([*command, "--live", address], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert says in done.stderr


def test_no_script_from_elsewhere_and_none_made_of_text_is_run():
    with served() as page, urlopen(page.url, timeout=60) as answer:  # noqa: S310
        policy = answer.headers["content-security-policy"]
        body = answer.read().decode()
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe-eval" not in policy
    assert "//" not in body.replace("<!doctype", "")


def refused(page, path="/", **headers):
    with pytest.raises(HTTPError) as error:
        page.get(path, **headers)
    error.value.close()
    return error.value.code


def test_what_is_not_part_of_the_page_is_not_served(page):
    for path in ("/page/../server.py", "/page/%2e%2e%2fserver.py", "/page/index.html", "/etc/passwd", "/runs/99999/g2"):
        assert refused(page, path) == 404, path


def test_a_page_from_elsewhere_is_not_served(page):
    assert refused(page, Host="evil.example") == 421
    with pytest.raises(InvalidStatus):
        page.socket(origin="http://evil.example")


def test_with_a_token_nobody_is_served_without_it():
    with served(token=TOKEN) as page:
        for path in ("/", "/metrics", "/page/main.js"):
            assert refused(page, path) == 401
        assert refused(page, "/?token=guess") == 401
        assert page.get("/metrics", Authorization=f"Bearer {TOKEN}")
        with pytest.raises(InvalidStatus):
            page.socket()
        with page.socket(additional_headers={"Authorization": f"Bearer {TOKEN}"}) as socket:
            hear(socket, of("run"))


class Stay(HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def test_a_browser_keeps_the_token_as_a_cookie_that_is_not_the_token():
    with served(token=TOKEN) as page:
        with pytest.raises(HTTPError) as answer:
            build_opener(Stay).open(f"{page.url}/?token={TOKEN}", timeout=60)
        answer.value.close()
        cookie = answer.value.headers["set-cookie"]
        assert TOKEN not in cookie
        assert "HttpOnly" in cookie
        assert page.get("/", Cookie=cookie.partition(";")[0])


def test_others_than_this_machine_are_not_served_without_a_token(tmp_path):
    with pytest.raises(ConfigError, match="a token is needed"):
        listen("0.0.0.0", 0, token=None)  # noqa: S104
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(ConfigError, match="a token has 16 characters or more, not 6"):
        read_token(tmp_path / "short")
    with pytest.raises(ConfigError, match="No such file"):
        read_token(tmp_path / "none")


def test_a_port_that_is_taken_is_named():
    with listen("127.0.0.1", 0, token=None) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"live://127.0.0.1:{port}: Address already in use"):
            listen("127.0.0.1", port, token=None)


def test_a_client_that_says_something_is_cut_off_and_harms_nobody(page, run):
    with page.socket() as good:
        for said in ("{}", b"\0" * 100, "x" * 3000, b"y" * 10_000_000):
            with page.socket() as bad, pytest.raises((ConnectionClosed, OSError)):  # noqa: PT012
                bad.send(said)
                while True:
                    bad.recv(timeout=10)
        page.publish(start(run), multitau(run))
        hear(good, of("g2", n_frames=2000))


def test_garbage_on_the_port_harms_nobody(page, run):
    for garbage in (
        b"\0" * 65536,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20000,
        b"GET /live HTTP/1.1\r\nUpgrade: websocket\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", page.port), timeout=10) as raw:
            try:
                raw.sendall(garbage)
                raw.recv(100)
            except OSError:
                pass
    assert answers(page.port)


def test_those_that_connect_and_ask_for_nothing_leave_room_for_others(page, run):
    with ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=60))
        idle = stack.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=60))
        with page.socket() as good:
            page.publish(start(run), multitau(run))
            hear(good, of("g2", n_frames=2000))
        assert idle.recv(1) == b""  # cut off


def test_a_client_that_does_not_read_holds_up_nobody(page, run):
    image = np.random.default_rng(0).random(SHAPE)
    with socket.create_connection(("127.0.0.1", page.port), timeout=60) as slow, page.socket() as good:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(
            b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        page.publish(start(run))
        for n in range(1, 300):
            page.publish(scattering(run, n_frames=n, image=image))
            time.sleep(0.005)  # a publisher drops what nobody can take
        page.publish(multitau(run, n_frames=300))
        hear(good, of("g2", n_frames=300))


def test_a_slow_browser_is_given_the_newest_not_all():
    published = []
    view = View(ROIMAP, source="", publish=lambda name, packed, _: published.append((name, packed)))
    view.take(start())
    view.take(multitau())

    class Slow:
        def __init__(self):
            self.got, self.gate = [], asyncio.Event()

        async def accept(self):
            pass

        async def receive(self):
            await asyncio.Event().wait()

        async def send_bytes(self, packed):
            self.got.append(packed)
            await self.gate.wait()

    async def scene():
        hub = Hub(lambda _: None)
        hub.open()
        slow = Slow()
        serving = asyncio.create_task(hub.serve(slow))
        for i in range(100):
            hub.publish("g2", b"%d" % i, None)
            await asyncio.sleep(0)
        slow.gate.set()
        while b"99" not in slow.got:
            await asyncio.sleep(0)
        serving.cancel()
        return slow.got

    assert len(asyncio.run(scene())) <= 3


def test_a_pipeline_serves_its_page_from_a_process_that_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("stream.sinks.live.END", 120.0)  # this machine may be busy
    qmap = tmp_path / "qmap.h5"
    write(qmap, ROIMAP)
    with listen("127.0.0.1", 0, token=None) as probe:
        port = probe.getsockname()[1]
    with LiveSink("127.0.0.1", port, qmap=qmap, source="a detector", token=None) as sink:
        sink.write(start())
        sink.write(multitau())
        sink.write(ledger())
        page = Page(sink, port)
        until(lambda: answers(port), 120)
        with page.socket() as socket:
            hear(socket, of("g2", n_frames=2000))
        process = sink._process
    assert process.returncode == 0
    assert not answers(port)


def test_the_page_of_a_pipeline_that_is_killed_ends_too(tmp_path):
    qmap = tmp_path / "qmap.h5"
    write(qmap, ROIMAP)
    with listen("127.0.0.1", 0, token=None) as probe:
        port = probe.getsockname()[1]
    script = (
        "import sys, time; from pathlib import Path; from stream.sinks.live import LiveSink\n"
        f"with LiveSink('127.0.0.1', {port}, qmap=Path({str(qmap)!r}), source='', token=None): time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)}) as pipeline:
        until(lambda: answers(port), 120)
        assert list(tmp_path.glob("xpcs-stream-*"))
        pipeline.kill()
    until(lambda: not answers(port))
    until(lambda: not list(tmp_path.glob("xpcs-stream-*")))


def test_numbers_that_are_not_finite_become_null_in_the_head_and_stay_in_arrays():
    head, arrays = unpack(
        pack("x", {"a": np.nan, "b": [np.inf, 1.5], "c": np.int64(3)}, {"d": np.array([np.nan, 2.0])})
    )
    assert (head["a"], head["b"], head["c"]) == (None, [None, 1.5], 3)
    np.testing.assert_array_equal(arrays["d"], [np.nan, 2.0])


@pytest.mark.parametrize("shape", [(512, 300), (513, 300), (2167, 2070), (3, 5000)])
def test_a_large_image_becomes_the_means_of_blocks_without_what_is_masked(shape):
    image = np.random.default_rng(0).random(shape)
    image[0, 0] = np.nan
    block = block_of(shape)
    small = block_mean(image, block)
    assert max(small.shape) <= 512
    part = image[:block, :block]
    expected = np.nanmean(part) if np.isfinite(part).any() else np.nan
    assert small[0, 0] == pytest.approx(expected, nan_ok=True)
    assert small[-1, -1] == pytest.approx(
        image[(small.shape[0] - 1) * block :, (small.shape[1] - 1) * block :].mean(), rel=1e-6
    )


def test_the_map_of_a_large_detector_has_the_bin_in_the_middle_of_each_block():
    large = ring_map(
        shape=(1100, 700), beam_center_x=350, beam_center_y=550, detector_distance=5.0, pixel_size=75e-6,
        incident_energy=11.0, n_static=30, n_dynamic=3,
    )  # fmt: skip
    bins = Bins.of(large)
    assert bins.facts["block"] == 3
    assert bins.arrays["bins"].shape == (367, 234)
    assert bins.arrays["bins"][100, 50] == large.dynamic_roi_map[301, 151]


def test_spans_of_lost_frames_that_lie_close_are_shown_as_one():
    spans = np.array([[0, 2], [3, 5], [100, 101]])
    assert joined(spans, 1).tolist() == [[0, 5], [100, 101]]
    assert joined(spans, 0).tolist() == spans.tolist()
    assert joined(np.empty((0, 2), np.int64), 3).shape == (0, 2)


def test_a_run_that_comes_again_under_its_name_is_another_run():
    keys = []
    view = View(None, source="", publish=lambda *_: None)
    for message in (start(start_time="1"), start(start_time="1"), start(start_time="2")):
        view.take(message)
        keys.append(view.key)
    assert keys == [1, 1, 2]


def test_the_error_of_an_exponent_grows_with_the_scatter():
    q = np.linspace(0.001, 0.01, 8)
    exact = PowerLaw.of(q, 1e6 * q**2, 1e4 * q**2)
    scattered = PowerLaw.of(q, 1e6 * q**2 * (1 + 0.2 * (-1) ** np.arange(8)), 1e4 * q**2)
    assert exact.exponent == pytest.approx(2)
    assert scattered.exponent_err > 10 * exact.exponent_err
    assert np.isnan(PowerLaw.of(q * np.nan, q, q).exponent)


def test_fits_begin_where_the_last_ones_ended_and_agree_with_them():
    dynamics = Dynamics(ROIMAP.dynamic_q)
    first = dynamics.of(multitau().arrays)[1]["single_rate"]
    np.testing.assert_allclose(dynamics.of(multitau().arrays)[1]["single_rate"], first, rtol=1e-4)


def test_the_command_serves_what_is_published(tmp_path):
    with ExitStack() as stack:
        sink = stack.enter_context(ZmqSink("tcp://127.0.0.1:*", pattern="pub"))
        with listen("127.0.0.1", 0, token=None) as probe:
            port = probe.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "stream",
            "live",
            sink.address.replace("tcp", "zmq"),
            "--at",
            f"live://127.0.0.1:{port}",
        ]
        server = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        until(lambda: answers(port), 120)
        page = Page(sink, port)
        page.publish(start(), multitau())
        with page.socket() as socket:
            hear(socket, of("g2", n_frames=2000))
        server.terminate()
        assert server.wait(20) == 0
        assert f"live page at http://127.0.0.1:{port}/" in server.stderr.read()


@pytest.mark.parametrize(
    "wrong",
    [
        regions("run-1", region(0)).arrays | {"frames": np.zeros((1, 1), np.int64)},
        {"node": np.frombuffer(b"x", np.uint8), "checkpoint": np.array(np.inf)},
        {"received": np.array(np.inf)},
    ],
)
def test_what_is_not_fit_is_refused_once_and_the_page_goes_on(wrong):
    view = View(None, source="", publish=lambda *_: None)
    view.take(start())
    view.take(ledger(node=np.frombuffer(b"a", np.uint8)))
    with pytest.raises(UNFIT):
        view.take(
            Result(
                run="run-1",
                operator="regions" if "rows" in wrong else "ledger",
                n_frames=1,
                final=False,
                arrays=ledger().arrays | wrong,
            )
        )
    view.tell()
    assert view.regions() == []


def test_a_server_whose_thread_failed_ends_with_that():
    def fails():
        yield start()
        raise ZeroDivisionError("nobody thought of this")

    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(ZeroDivisionError):
        Server(listening, fails(), roimap=None, source="", token=None, stop=threading.Event()).run()


def test_what_comes_when_nobody_is_served_any_more_is_left_out():
    async def opened():
        hub = Hub(lambda _: None)
        hub.open()
        return hub

    asyncio.run(opened()).publish("history", b"", None)


def test_of_a_run_that_is_over_no_more_is_kept_than_a_line():
    view = View(None, source="", publish=lambda *_: None)
    for output in (start("r" * 9999, sample="s" * 9999), multitau("r" * 9999, final=True), stop("r" * 9999)):
        view.take(output)
    assert len(str(view.history.facts())) < 1000
