"""Who may talk to a gateway over ZeroMQ, and what those are told who may not."""

import stat
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from stream import curve
from stream.curve import ClientKeys, GatewayKeys
from stream.dealer import Hub as Address
from stream.errors import ConfigError, SinkError, SourceError
from stream.hub import PARTIALS, Hub, frames_log
from stream.hub_group import HubGroup
from stream.ingest.hub import HubSource
from stream.serving import Serving
from stream.sinks.hub import HubSink
from stream.wire import encode
from tests.kafka import free_ports
from tests.test_hub import Network, read
from tests.test_zmq import ANYWHERE, start, stop, whats

pytestmark = pytest.mark.timeout(400)

LOG = frames_log(0)


@dataclass
class Ring:
    """Keys of a gateway, and of some who go there."""

    directory: Path

    def __post_init__(self):
        self.allowed = self.directory / "allowed"
        self.allowed.mkdir()
        for name in ("gateway", "node", "stranger"):
            curve.make(self.directory, name)
        self.let_in("node")

    def let_in(self, name):
        (self.allowed / f"{name}.key").write_bytes((self.directory / f"{name}.key").read_bytes())

    def of(self, name, *, gateway="gateway"):
        return ClientKeys.read(self.directory / f"{name}.key_secret", self.directory / f"{gateway}.key")

    def of_gateway(self):
        return GatewayKeys.read(self.directory / "gateway.key_secret", self.allowed)


@pytest.fixture
def keys(tmp_path):
    return Ring(tmp_path)


@contextmanager
def opened(keys):
    with Hub(ANYWHERE, "beamline", 1, ring_bytes=2**20, keys=keys) as hub:
        hub.append(LOG, encode(start()), must_stay=True)
        yield hub


def test_a_secret_key_is_made_for_its_owners_eyes_only(tmp_path):
    public, secret = curve.make(tmp_path / "keys", "node")
    assert (public, secret) == (tmp_path / "keys" / "node.key", tmp_path / "keys" / "node.key_secret")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert b"secret-key" not in public.read_bytes()


def test_a_key_is_not_replaced(tmp_path):
    public, _ = curve.make(tmp_path, "node")
    before = public.read_bytes()
    with pytest.raises(ConfigError, match=r"node\.key: is there; a key is not replaced"):
        curve.make(tmp_path, "node")
    assert public.read_bytes() == before


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/keys: Not a directory"):
        curve.make(tmp_path / "file" / "keys", "node")


def test_a_secret_key_that_others_may_read_is_refused(keys, tmp_path):
    for name in ("node", "gateway"):
        (tmp_path / f"{name}.key_secret").chmod(0o640)
    with pytest.raises(ConfigError, match=r"node\.key_secret: others may read this secret key; chmod 600 it"):
        keys.of("node")
    with pytest.raises(ConfigError, match=r"gateway\.key_secret: others may read"):
        keys.of_gateway()


def test_what_is_not_a_key_is_named(keys, tmp_path):
    public, secret = tmp_path / "gateway.key", tmp_path / "node.key_secret"
    with pytest.raises(ConfigError, match=r"nobody\.key_secret: "):
        ClientKeys.read(tmp_path / "nobody.key_secret", public)
    with pytest.raises(ConfigError, match=r"node\.key: has no secret key"):
        ClientKeys.read(tmp_path / "node.key", public)
    for content in (
        b"",
        b"nonsense",
        b"\xff\xfe",
        b'curve\n    public-key = "short"\n',
        b'    public-key = "' + b"\xc3" * 40,
    ):
        (tmp_path / "odd.key").write_bytes(content)
        (tmp_path / "odd.key").chmod(0o600)
        with pytest.raises(ConfigError, match=r"odd\.key: "):
            ClientKeys.read(secret, tmp_path / "odd.key")
        with pytest.raises(ConfigError, match=r"odd\.key: "):
            ClientKeys.read(tmp_path / "odd.key", public)
    with pytest.raises(ConfigError, match="nowhere: no such directory"):
        GatewayKeys.read(tmp_path / "gateway.key_secret", tmp_path / "nowhere")


def test_no_secret_is_in_any_repr(keys):
    for holder in (keys.of("node"), keys.of_gateway(), Address("tcp://a:1", "beamline", keys.of("node"))):
        secret = (holder.keys if isinstance(holder, Address) else holder).secret
        for text in (repr(holder), str(holder)):
            assert secret.decode() not in text


def test_with_a_key_that_is_allowed_frames_and_results_get_through(keys):
    with opened(keys.of_gateway()) as hub:
        where = Address(hub.address, "beamline", keys.of("node"))
        with HubSource(where, LOG) as source, HubSink(where, PARTIALS) as sink:
            assert whats(read(source, 1)) == whats([start()])
            sink.write(stop())
            sink.flush()
        assert hub.wait_until_safe(0)[PARTIALS] == 1


def refused(where, says):
    """All kinds of clients end with a reason, and soon."""
    for use in (
        lambda: HubGroup(where).take_part(Serving(lambda region, stop: None), threading.Event()),
        lambda: wait_for_a_frame(where),
        lambda: flush(where),
    ):
        began = time.monotonic()
        with pytest.raises((SourceError, SinkError), match=says):
            use()
        assert time.monotonic() - began < 60  # not 300


def wait_for_a_frame(where):
    with HubSource(where, LOG) as source:
        read(source, 1)


def flush(where):
    with HubSink(where, PARTIALS) as sink:
        sink.write(stop())


def test_a_key_that_is_not_known_is_refused_and_that_is_logged(keys, caplog):
    stranger = keys.of("stranger")
    with opened(keys.of_gateway()) as hub:
        refused(Address(hub.address, "beamline", stranger), "the gateway does not know our key")
        assert hub.wait_until_safe(0) == {LOG: 1}
    assert f"somebody with the unknown key {stranger.public.decode()} was refused" in caplog.text


def test_the_wrong_key_of_a_gateway_is_noticed(keys):
    with opened(keys.of_gateway()) as hub:
        refused(Address(hub.address, "beamline", keys.of("node", gateway="stranger")), "the gateway has another key")


def test_without_keys_a_gateway_that_has_some_is_not_waited_for(keys):
    with opened(keys.of_gateway()) as hub:
        refused(Address(hub.address, "beamline"), "the gateway needs keys, and we have none")


def test_with_keys_a_gateway_that_has_none_is_not_trusted(keys):
    with opened(None) as hub:
        refused(
            Address(hub.address, "beamline", keys.of("node")),
            "the gateway has (no keys, and we have|another key than we were given for it, or none)",
        )


def test_a_gateway_that_is_away_is_waited_for_with_keys_too(keys):
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    with HubSource(Address(address, "beamline", keys.of("node")), LOG) as source:
        stream = iter(source)
        began = time.monotonic()
        while time.monotonic() - began < 3:
            assert next(stream) is None
        with Hub(address, "beamline", 1, ring_bytes=2**20, keys=keys.of_gateway()) as hub:
            hub.append(LOG, encode(start()), must_stay=True)
            assert whats(read(source, 1)) == whats([start()])


def test_a_key_that_is_added_or_removed_counts_at_once(keys):
    with opened(keys.of_gateway()) as hub:
        where = Address(hub.address, "beamline", keys.of("stranger"))
        with pytest.raises(SourceError, match="does not know our key"):
            wait_for_a_frame(where)
        keys.let_in("stranger")
        wait_for_a_frame(where)
        (keys.allowed / "stranger.key").unlink()
        with pytest.raises(SourceError, match="does not know our key"):
            wait_for_a_frame(where)


def test_what_lies_beside_the_keys_that_are_allowed_locks_nobody_out(keys, caplog):
    (keys.allowed / "a.key").write_bytes(b"nonsense")
    (keys.allowed / "b.key").mkdir()
    (keys.allowed / "c.key").symlink_to("nowhere")
    with opened(keys.of_gateway()) as hub:
        wait_for_a_frame(Address(hub.address, "beamline", keys.of("node")))
    for name in "abc":
        assert f"{name}.key: " in caplog.text


@pytest.mark.parametrize("has_keys", [True, False])
def test_only_with_keys_nobody_can_read_on_the_way(keys, has_keys):
    with opened(keys.of_gateway() if has_keys else None) as hub, Network(hub) as network:
        hub.append(LOG, encode(replace(start(), metadata={"sample": "the new alloy"})), must_stay=True)
        where = Address(network.address, "beamline", keys.of("node") if has_keys else None)
        with HubSource(where, LOG) as source:
            _, received = read(source, 2)
        assert received.metadata["sample"] == "the new alloy"
        assert (b"the new alloy" in network.seen) != has_keys
