"""Who may tell a manager that it lives: CURVE (https://rfc.zeromq.org/spec/26), with keys of `xpcs-stream keys`.

``NAME.key`` is public, ``NAME.key_secret`` nobody else may read. The public keys of those who may come lie in a
directory, which is read at every connection: a key is added or removed without anything being started again.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import zmq
import zmq.auth
from zmq.utils.z85 import Z85CHARS

from hpc_bridge.errors import ConfigError

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

_log = logging.getLogger(__name__)

_LENGTH = 40
"""Of a key in Z85 (https://rfc.zeromq.org/spec/32)."""


@dataclass(frozen=True, slots=True)
class PilotKeys:
    """A pilot's own key, and the manager's."""

    public: bytes
    secret: bytes = field(repr=False)
    manager: bytes

    @classmethod
    def read(cls, secret: Path, manager: Path) -> "PilotKeys":
        """Read our secret key, and the manager's public one.

        Raises
        ------
        ConfigError
            One of the files is not what it should be.
        """
        return cls(*_load_secret(secret), manager=_load(manager)[0])

    def use(self, socket: "zmq.Socket[bytes]") -> None:
        """Encrypt what goes through a socket that will connect."""
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = self.public, self.secret, self.manager


@dataclass(frozen=True, slots=True)
class ManagerKeys:
    """The manager's own key, and who may come."""

    public: bytes
    secret: bytes = field(repr=False)
    allowed: Path
    """Directory of public keys."""

    @classmethod
    def read(cls, secret: Path, allowed: Path) -> "ManagerKeys":
        """Read our secret key; those that are allowed are read when they are needed.

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
        from zmq.auth.thread import ThreadAuthenticator  # not for pilots, which are to start fast

        authenticator = ThreadAuthenticator(socket.context, log=_log)
        authenticator.start()
        authenticator.configure_curve_callback(domain="*", credentials_provider=self)
        socket.curve_publickey, socket.curve_secretkey, socket.curve_server = self.public, self.secret, True
        return authenticator

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - pyzmq calls it so
        """Tell whether somebody with this public key may come."""
        for path in sorted(self.allowed.glob("*.key")):
            try:
                if _load(path)[0] == key:
                    return True
            except ConfigError as error:
                _log.warning("%s", error)
        _log.warning("somebody with the unknown key %s was refused", key.decode())
        return False


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
