"""Where Prometheus comes to: the server of `prometheus_client`, in a thread of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, start_http_server

from stream.errors import ConfigError
from stream.logs import say


@contextmanager
def served(at: str, registry: CollectorRegistry) -> Iterator[None]:
    """Serve a registry at ``HOST:PORT``, or ``PORT`` of this machine only, meanwhile.

    Raises
    ------
    ConfigError
        The address cannot be used.
    """
    host, port = _address(at)
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--metrics {at}: {getattr(error, 'strerror', None) or error}") from None
    try:
        shown = f"[{host}]" if ":" in host else host
        say(f"metrics at http://{shown}:{server.server_port}/metrics")
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _address(at: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//127.0.0.1:{at}" if at.isdecimal() else f"//{at}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"--metrics {at}: {error}") from None
    if not host or port is None or parts.username is not None or parts.path:
        raise ConfigError(f"--metrics {at} is not HOST:PORT")
    return host, port
