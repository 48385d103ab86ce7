"""Proxies of bluesky that let in only whom they know, and our commands with keys for them, or without."""

import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager

import h5py
import msgpack
import numpy as np
import pytest
import zmq.auth
from bluesky.callbacks.zmq import Publisher, RemoteDispatcher

from stream.documents import read
from tests.kafka import free_ports
from tests.plane import Plane, until_said
from tests.test_bluesky_runs import documents
from tests.test_command_line import finished, started, xpcs_stream
from tests.test_documents_command import assert_last_event_is
from tests.test_kill import frames, free, qmap

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap"]

DEADLINE = 120
SOON = 30
"""Seconds: not for ever, on a machine that is busy."""

PROXY = """
import sys
from pathlib import Path
from bluesky.callbacks.zmq import Proxy, ServerCurve
into, out, side, *keys = sys.argv[1:]
proxy = Proxy(into, out, **{side: ServerCurve(*map(Path, keys), None)})
print("there", flush=True)
proxy.start()
"""


@pytest.fixture
def keys(tmp_path):
    """Keys of a Proxy, of one that it knows and of one that it does not know."""
    for name, folder in (("proxy", "."), ("node", "allowed"), ("stranger", ".")):
        assert xpcs_stream("keys", name, "--directory", tmp_path / folder).exit_code == 0
    (tmp_path / "allowed" / "node.key_secret").rename(tmp_path / "node.key_secret")
    return {
        "node": ("--secret-key", "node.key_secret", "--proxy-key", "proxy.key"),
        "stranger": ("--secret-key", "stranger.key_secret", "--proxy-key", "proxy.key"),
        "of another": ("--secret-key", "node.key_secret", "--proxy-key", "stranger.key"),
        "none": (),
    }


@pytest.fixture
def proxy(tmp_path, keys):
    """Start Proxies that ask who comes to one of their sides; bluesky 1.15 cannot do so on both."""

    @contextmanager
    def running(side):
        into, out = (f"127.0.0.1:{port}" for port in free_ports(2))
        of_proxy = (tmp_path / "proxy.key_secret", tmp_path / "allowed")
        command = [sys.executable, "-c", PROXY, f"tcp://{into}", f"tcp://{out}", side, *of_proxy]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "there\n"
                yield into, out
            finally:
                process.kill()

    with ExitStack() as stack:
        yield lambda side: stack.enter_context(running(side))


@pytest.fixture
def secrets(tmp_path, keys):
    """The secret keys themselves: nobody is told them."""
    return [zmq.auth.load_certificate(path)[1].decode() for path in tmp_path.glob("*.key_secret")]


@contextmanager
def dispatched(out, keys=None):
    """What a RemoteDispatcher of bluesky is given, and the event that a run stopped."""
    came, has_stopped = [], threading.Event()

    def take(name, document):
        came.append((name, document))
        if name == "stop":
            has_stopped.set()

    dispatcher = RemoteDispatcher(out, deserializer=read, curve_config=keys)
    dispatcher.subscribe(take)
    threading.Thread(target=dispatcher.start, daemon=True).start()
    yield came, has_stopped


@contextmanager
def published(into, given):
    """Publish documents again and again, since what is sent before somebody listens is lost."""
    publisher = Publisher(f"tcp://{into}", serializer=msgpack.dumps)
    is_enough = threading.Event()

    def publish():
        while not is_enough.wait(0.2):
            for each in given:
                publisher(*each)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        is_enough.set()
        thread.join()
        publisher.close()


def written(folder, run, n_frames=5):
    """Write the file of frames that documents of a run point to, and return these."""
    with h5py.File(folder / f"{run}.h5", "w") as file:
        file["/entry/det"] = np.random.default_rng(0).poisson(1.0, (n_frames, 64, 64)).astype("u1")
    told = list(documents(run, n_frames))
    for name, document in told:
        if name == "descriptor":
            document["data_keys"]["det"]["shape"] = [1, 64, 64]
    return told


def test_documents_go_to_a_proxy_that_knows_our_key(frames, qmap, tmp_path, keys, proxy, secrets):
    into, out = proxy("in_curve")
    with dispatched(out) as (came, has_stopped):
        command = ("run", "--source", frames, "--qmap", qmap, "--out", "result.h5", "--quiet")
        with started("-v", *command, "--documents", f"zmq+bluesky://{into}", *keys["node"], cwd=tmp_path) as process:
            said = "".join(finished(process))
        assert has_stopped.wait(DEADLINE)
    assert_last_event_is(tmp_path / "result.h5", came)
    with h5py.File(tmp_path / "result.h5") as file:
        said += file["xpcs/configuration"].asstr()[()]
    assert "node.key_secret" in said
    assert not [secret for secret in secrets if secret in said]


REFUSED = [
    ("none", "the Proxy needs keys, and we have none"),
    ("stranger", "the Proxy does not know our key"),
    ("of another", "the Proxy has another key than we were given for it, or none, or is not there"),
]


def refused(command, cwd, says, secrets):
    """A command ends, soon, in one line, and tells no secret."""
    with started("-v", *command, "--out", "result.h5", "--quiet", cwd=cwd) as process:
        until_said(process, "taking frames from")
        out, err = process.communicate(timeout=SOON)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("xpcs-stream: tcp://127.0.0.1:")
    assert err.splitlines()[-1].endswith(says)
    assert "Traceback" not in err
    assert not [secret for secret in secrets if secret in out + err]


@pytest.mark.parametrize(("who", "says"), REFUSED)
def test_a_proxy_that_takes_no_documents_of_ours_is_told_of(frames, qmap, tmp_path, keys, proxy, secrets, who, says):
    into, _ = proxy("in_curve")
    refused(
        ("run", "--source", frames, "--qmap", qmap, "--documents", f"zmq+bluesky://{into}", *keys[who]),
        tmp_path,
        says,
        secrets,
    )


@pytest.mark.parametrize(("who", "says"), REFUSED)
def test_a_proxy_that_gives_us_no_documents_is_told_of(qmap, tmp_path, keys, proxy, secrets, who, says):
    _, out = proxy("out_curve")
    command = ("run", "--source", f"zmq+bluesky://{out}", "--root", f"/data={tmp_path}", "--qmap", qmap, *keys[who])
    refused(command, tmp_path, says, secrets)


def test_documents_come_from_a_proxy_that_knows_our_key(qmap, tmp_path, keys, proxy):
    _, out = into_and_out = proxy("out_curve")
    command = ("run", "--source", f"zmq+bluesky://{out}", "--root", f"/data={tmp_path}", "--qmap", qmap)
    options = ("--out", "result.h5", "--runs", 1, "--quiet", *keys["node"])
    with published(into_and_out[0], written(tmp_path, "a")), started(*command, *options, cwd=tmp_path) as process:
        finished(process)
    with h5py.File(tmp_path / "result.h5") as file:
        assert file["entry/entry_identifier"].asstr()[()] == "a"
        assert file["xpcs/ledger/received"][()] == 5


def test_facts_of_a_run_come_from_a_proxy_that_knows_our_key(frames, qmap, tmp_path, keys, proxy):
    into, out = proxy("out_curve")
    address = f"zmq://{free()}"
    command = ("run", "--source", address, "--run-engine", f"zmq+bluesky://{out}", "--qmap", qmap)
    options = ("--out", "result.h5", "--runs", 1, "--quiet", *keys["node"])
    told = list(documents("b"))[:-1]
    with published(into, told), started(*command, *options, cwd=tmp_path) as process:
        until_said(process, "taking frames from")
        with started("replay", frames, "--to", address, "--as-fast-as-possible", cwd=tmp_path) as replay:
            finished(replay)
            finished(process)
    with h5py.File(tmp_path / "result.h5") as file:
        assert file["entry/entry_identifier"].asstr()[()] == "b"


def test_whoever_goes_to_a_gateway_and_to_a_proxy_is_the_same_to_both(qmap, tmp_path, keys, proxy):
    """One secret key for the gateway, for those who go there, and for the Proxies on both sides."""
    (raw_in, raw_out), (into, out) = proxy("out_curve"), proxy("in_curve")
    to_gateway = ("--secret-key", "node.key_secret", "--gateway-key", "allowed/node.key")
    of_proxy = ("--proxy-key", "proxy.key")
    with ExitStack() as stack:
        plane = Plane(f"zmq://{free()}/beamline", stack, tmp_path, qmap)
        came, has_stopped = stack.enter_context(dispatched(out))
        plane.gateway(
            f"zmq+bluesky://{raw_out}",
            *("--root", f"/data={tmp_path}", "--secret-key", "node.key_secret", "--allowed", "allowed", *of_proxy),
        )
        plane.worker(*to_gateway)
        merger = plane.merger("--documents", f"zmq+bluesky://{into}", *to_gateway, *of_proxy)
        stack.enter_context(published(raw_in, written(tmp_path, "c")))
        plane.result(merger)
        assert has_stopped.wait(DEADLINE)
    assert came[0][1]["original_run_uid"] == "c"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--proxy-key", "p.key"), "--proxy-key: secret_key and proxy_key go together"),
        (("--secret-key", "s.key_secret"), "--proxy-key: secret_key and proxy_key go together"),
        (("--secret-key", "s", "--proxy-key", "p"), "--proxy-key: there is no zmq+bluesky:// whose key it is"),
        (
            ("--documents", "zmq+bluesky://127.0.0.1:5", "--secret-key", "none", "--proxy-key", "p"),
            "none: no such file",
        ),
    ],
)
def test_keys_that_cannot_be_meant_are_told_of_before_anything_is_opened(frames, qmap, options, says):
    said = xpcs_stream("run", "--source", frames, "--qmap", qmap, "--quiet", "--out", "r.h5", *options)
    assert said.exit_code == 1
    assert said.stderr == f"xpcs-stream: {says}\n"


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "[::]", "node7"])  # noqa: S104
def test_a_gateway_with_a_key_that_does_not_say_who_may_come_is_not_opened_to_all(host):
    said = xpcs_stream(
        *("gateway", "--source", "zmq+bluesky://127.0.0.1:5", "--root", "/data=/data", "--regions", "1"),
        *("--to", f"zmq://{host}:5555/x", "--secret-key", "k.key_secret", "--proxy-key", "p.key"),
    )
    assert said.exit_code == 2
    assert f"--secret-key without --allowed: anyone could come to zmq://{host}" in plain(said.stderr)


def plain(text):
    return " ".join(text.replace("\u2502", " ").split())
