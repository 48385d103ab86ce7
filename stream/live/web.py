"""What browsers may ask for. Nothing can be changed from there."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from stream.live.hub import Hub
from stream.live.metrics import Metrics
from stream.live.view import View

PAGE = Path(__file__).parent / "page"

# Bokeh draws on canvases (logarithmic axes, error bars, 30 curves of 60 delays in 35 ms; Plotly's SVG: 200 ms) and
# ships its 1.3 MB of JavaScript with the package (Plotly: 4.8 MB).
BOKEH = Path(str(files("bokeh"))) / "server/static/js"

COOKIE = "xpcs-stream"

HEADERS = {
    # Bokeh puts its styles into elements; scripts come from here only, and none is made from text.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def application(view: View, hub: Hub, metrics: Metrics, *, token: str | None, local: bool) -> "Guard":
    """Return the application.

    Parameters
    ----------
    token
        Without it nobody is served; None: everybody who reaches us is.
    local
        Only this machine reaches us: what does not ask for a name of it was sent here by a page from elsewhere.
    """

    async def page(_: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def part(request: Request) -> Response:
        name = request.path_params["name"]
        path = _parts().get(name)
        if path is None:
            return PlainTextResponse("no such file\n", 404)
        kept = "max-age=86400" if path.parent == BOKEH else "no-cache"
        return FileResponse(path, media_type=_TYPES[path.suffix], headers={"cache-control": kept})

    async def g2(request: Request) -> Response:
        packed = view.history.g2(request.path_params["number"])
        if packed is None:
            return PlainTextResponse("no such run\n", 404)
        return Response(packed, media_type="application/octet-stream")

    async def is_well(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def numbers(_: Request) -> Response:
        text = metrics.text(view.state()[0], view.regions(), hub.n_clients)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def live(socket: WebSocket) -> None:
        await hub.serve(socket)

    routes = [
        Route("/", page),
        Route("/page/{name}", part),
        Route("/runs/{number:int}/g2", g2),
        Route("/healthz", is_well),
        Route("/metrics", numbers),
        WebSocketRoute("/live", live),
    ]
    return Guard(Starlette(routes=routes), token=token, local=local)


class Guard:
    """Lets in whom it should, and says to every browser what the page may do."""

    def __init__(self, inside: Starlette, *, token: str | None, local: bool) -> None:
        self._inside = inside
        self._token = token
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; see ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._inside(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        inside = self._refusal(scope) or self._inside
        await inside(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | Callable[[Scope, Receive, Send], Awaitable[None]] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        says: Response | None = None
        if self._local and self._token is None and _name(host) not in ("127.0.0.1", "localhost", "[::1]"):
            says = PlainTextResponse(f"this is not {host}\n", 421)
        elif scope["type"] == "websocket" and headers.get("origin", f"http://{host}").partition("://")[2] != host:
            says = PlainTextResponse("pages from elsewhere are not served\n", 403)
        elif self._token is not None and scope["path"] != "/healthz":
            says = self._ask(scope, headers)
        if says is None or scope["type"] == "http":
            return says
        return _closed

    def _ask(self, scope: Scope, headers: Headers) -> Response | None:
        token = self._token or ""
        request = Request({**scope, "type": "http"})
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if _same(request.cookies.get(COOKIE, ""), _digest(token)) or _same(bearer, token):
            return None
        if scope["type"] == "http" and _same(request.query_params.get("token", ""), token):
            # From now on by a cookie, so that it stands in no address that is copied.
            response = RedirectResponse(scope["path"], 303)
            response.set_cookie(COOKIE, _digest(token), httponly=True, samesite="strict", max_age=30 * 86400)
            return response
        return PlainTextResponse("a token is needed: /?token=..., or Authorization: Bearer ...\n", 401)


async def _closed(_: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008})


@cache
def _parts() -> dict[str, Path]:
    """Return the files of the page by name: there are no others."""
    ours = {path.name: path for path in PAGE.iterdir() if path.suffix in _TYPES and path.name != "index.html"}
    return ours | {name: BOKEH / name for name in ("bokeh.min.js", "bokeh-api.min.js")}


def _name(host: str) -> str:
    """Return a host without its port."""
    return host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]


def _digest(token: str) -> str:
    return hashlib.sha256(f"xpcs-stream live {token}".encode()).hexdigest()


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())
