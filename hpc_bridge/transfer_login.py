"""Who we are at Globus: the client of a beamline, which no human looks after, or a person who logs in now and then."""

import os
import stat
from pathlib import Path

from globus_sdk import (
    ClientApp,
    ConfidentialAppAuthClient,
    GlobusApp,
    GlobusAppConfig,
    NativeAppAuthClient,
    TransferClient,
    UserApp,
)
from globus_sdk.token_storage import JSONTokenStorage
from globus_sdk.transport import RequestsTransport, RetryConfig

from hpc_bridge.errors import ConfigError
from hpc_bridge.transfer_config import Globus

_NAME = "xpcs-stream"


class Login:
    """A client of the Transfer service that answers in seconds: it leaves it to us to ask again.

    Only what the library can mend at once is asked again: a token that the service took for old, a broken connection.

    Raises
    ------
    ConfigError
        The secret cannot be read, or can be read by others.
    """

    def __init__(self, settings: Globus) -> None:
        self._transports = tuple(
            RequestsTransport(http_timeout=settings.timeout.total_seconds()) for _ in ("auth", "transfer")
        )
        self.app = _app(settings, self._transports[0])
        self.client = TransferClient(app=self.app, transport=self._transports[1], retry_config=_retries())
        if settings.mapped_collections:
            self.client.add_app_data_access_scope(settings.mapped_collections)

    def close(self) -> None:
        """Let go of its connections."""
        self.client.close()
        self.app.close()
        for transport in self._transports:
            transport.close()


def _app(settings: Globus, transport: RequestsTransport) -> GlobusApp:
    if settings.client_secret is not None:
        return ClientApp(
            _NAME,
            login_client=ConfidentialAppAuthClient(
                settings.client_id,
                _secret(settings.client_secret),
                app_name=_NAME,
                transport=transport,
                retry_config=_retries(),
            ),
            config=GlobusAppConfig(token_storage="memory"),  # noqa: S106 - no password
        )
    assert settings.tokens is not None  # noqa: S101 - Globus sees to it
    return UserApp(
        _NAME,
        login_client=NativeAppAuthClient(
            settings.client_id, app_name=_NAME, transport=transport, retry_config=_retries()
        ),
        config=GlobusAppConfig(
            token_storage=JSONTokenStorage(settings.tokens.expanduser().absolute()),
            request_refresh_tokens=True,
            token_validation_error_handler=None,  # nobody is there to log in while the loop runs
        ),
    )


def _retries() -> RetryConfig:
    return RetryConfig(max_retries=1, max_sleep=1, retry_after_status_codes=(), transient_error_status_codes=())


def _secret(file: Path) -> str:
    file = file.expanduser()
    try:
        with file.open() as opened:
            status = os.fstat(opened.fileno())
            if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid != os.getuid():
                raise ConfigError(
                    f"{file}: others may read it (mode {stat.S_IMODE(status.st_mode):o}): chmod 600, and own it"
                )
            secret = opened.read(4096).strip()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not text") from None
    if not secret:
        raise ConfigError(f"{file}: it is empty")
    return secret
