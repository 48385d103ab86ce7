"""What an error of Globus means for a request: again later, no, or never."""

from globus_sdk import GlobusAPIError, GlobusError, NetworkError, TransferAPIError
from globus_sdk.token_storage import TokenValidationError

from hpc_bridge.errors import BridgeError
from hpc_bridge.transfer import TransferRefused, TransferUnreachable

_LONGEST_WAIT = 3600.0
"""That a service may ask for (s)."""

_MALFORMED = (400, 422)
"""Of Transfer: the request itself is wrong. Of Auth it would be what we ask to be allowed, which can be mended."""

_BUSY = (408, 409, 425, 429)
"""And everything from 500 on. 409: too many tasks wait already."""

_STOPS = ("PermissionDenied", "NotDirectory", "InvalidPath", "QuotaExceeded")
"""Last words of codes of endpoint errors (502) that stay until somebody does something."""


def judge(error: GlobusError) -> BridgeError:
    """Return the error of ours that one of the library stands for."""
    if isinstance(error, NetworkError):
        return TransferUnreachable(f"Globus: {error.message}: {error.underlying_exception}")
    if isinstance(error, TokenValidationError):
        return TransferRefused(f"Globus: {error}: run hpc-bridge login")
    if not isinstance(error, GlobusAPIError):
        return TransferRefused(f"Globus: {type(error).__name__}: {error}")
    text = " ".join((error.message or error.text or error.http_reason).split())[:500]
    said = f"Globus: {error.http_status} {error.code or ''}: {text}"
    if consent := error.info.consent_required:
        scopes = " ".join(consent.required_scopes or ())
        return TransferRefused(f"{said}: it wants a consent to {scopes}: run hpc-bridge login")
    if error.http_status == 502 and (error.code or "").endswith(_STOPS):
        return TransferRefused(said)
    if error.http_status >= 500 or error.http_status in _BUSY:
        return TransferUnreachable(said, _retry_after(error))
    if error.http_status == 401:
        return TransferRefused(
            f"{said}: neither a new token helps: check the client and its secret, or hpc-bridge login"
        )
    return TransferRefused(said, is_final=isinstance(error, TransferAPIError) and error.http_status in _MALFORMED)


def _retry_after(error: GlobusAPIError) -> float | None:
    said = error.headers.get("Retry-After", "")
    return min(float(said), _LONGEST_WAIT) if said.isascii() and said.isdigit() else None
