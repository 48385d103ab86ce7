"""Who may talk to a gateway over ZeroMQ: CURVE (https://rfc.zeromq.org/spec/26), a pair of keys for each of us.

A key is a file in ZeroMQ's own format: ``NAME.key`` is public, ``NAME.key_secret`` nobody else may read. Those who may
talk to a gateway have their public keys in a directory there. It is read at every connection: a key is added or removed
without anything being started again.
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import zmq
import zmq.auth
from zmq.utils.z85 import Z85CHARS

from stream.errors import ConfigError

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

_log = logging.getLogger(__name__)

_LENGTH = 40
"""Of a key in Z85 (https://rfc.zeromq.org/spec/32)."""

BROKEN = 20
"""Connections, ten in a second, that break one after another while they begin: our key of the other side is wrong."""


def make(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a pair of keys; return the files of the public one and of the secret one.

    Raises
    ------
    ConfigError
        They are there, or cannot be written.
    """
    public, secret = directory / f"{name}.key", directory / f"{name}.key_secret"
    if public.exists() or secret.exists():
        raise ConfigError(f"{public}: is there; a key is not replaced")
    before = os.umask(0o077)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        zmq.auth.create_certificates(directory, name)
        public.chmod(0o644)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from None
    finally:
        os.umask(before)
    return public, secret


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or 'no such file'}") from None
    except ValueError:
        public = secret = b""
    if not all(len(key) == _LENGTH and set(key) <= set(Z85CHARS) for key in (public, secret) if key is not None):
        raise ConfigError(f"{path}: not a key as `xpcs-stream keys` makes them")
    return public, secret


def _load_secret(path: Path) -> tuple[bytes, bytes]:
    public, secret = _load(path)
    if secret is None:
        raise ConfigError(f"{path}: has no secret key; it stands in the file that ends in _secret")
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path}: others may read this secret key; chmod 600 it")
    return public, secret


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """Of one who goes to a gateway, or to a Proxy of bluesky."""

    public: bytes
    secret: bytes = field(repr=False)
    gateway: bytes

    @classmethod
    def read(cls, secret: Path, gateway: Path) -> "ClientKeys":
        """Read our own secret key, and the public one of the gateway.

        Raises
        ------
        ConfigError
            One of the files is not what it should be.
        """
        return cls(*_load_secret(secret), gateway=_load(gateway)[0])

    def use(self, socket: "zmq.Socket[bytes]") -> None:
        """Encrypt what goes through a socket that will connect."""
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = self.public, self.secret, self.gateway


class Handshakes:
    """What a socket's monitor tells of its connections: why there will be none, where ZeroMQ says nothing.

    Parameters
    ----------
    keys
        With which we go there.

    Attributes
    ----------
    refusal
        What is wrong with the other side; empty if nothing is, or it is not known yet.
    """

    EVENTS = (
        zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    )

    def __init__(self, keys: ClientKeys | None) -> None:
        self.refusal = ""
        self._keys = keys
        self._n_broken = 0
        """Connections since the last that was made."""

    def take(self, event: int) -> None:
        """Take an event."""
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._n_broken = 0
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.refusal = "does not know our key"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self.refusal = "needs keys, and we have none" if self._keys is None else "has no keys, and we have"
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._n_broken += 1
        if self._keys is not None and self._n_broken >= BROKEN:
            self.refusal = "has another key than we were given for it, or none, or is not there"


@dataclass(frozen=True, slots=True)
class GatewayKeys:
    """Of a gateway, and who may talk to it."""

    public: bytes
    secret: bytes = field(repr=False)
    allowed: Path
    """Directory of public keys."""

    @classmethod
    def read(cls, secret: Path, allowed: Path) -> "GatewayKeys":
        """Read our own secret key; those that are allowed are read when they are needed.

        Raises
        ------
        ConfigError
            The file is not what it should be, or the directory is not there.
        """
        if not allowed.is_dir():
            raise ConfigError(f"{allowed}: no such directory")
        return cls(*_load_secret(secret), allowed=allowed)

    def use(self, socket: "zmq.Socket[bytes]") -> "ThreadAuthenticator":
        """Encrypt what goes through a socket that will bind, and ask who comes; the caller stops that at the end."""
        from zmq.auth.thread import ThreadAuthenticator  # with it comes asyncio, and a worker is to start fast

        authenticator = ThreadAuthenticator(socket.context, log=_log)
        authenticator.start()
        authenticator.configure_curve_callback(domain="*", credentials_provider=self)
        socket.curve_publickey, socket.curve_secretkey, socket.curve_server = self.public, self.secret, True
        return authenticator

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - pyzmq calls it so
        """Tell whether somebody with this public key may talk to us."""
        for path in sorted(self.allowed.glob("*.key")):
            try:
                if _load(path)[0] == key:
                    return True
            except ConfigError as error:
                _log.warning("%s", error)
        _log.warning("somebody with the unknown key %s was refused", key.decode())
        return False
