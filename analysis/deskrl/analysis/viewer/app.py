"""HTTP application of the viewer and its server on the loopback address."""

from __future__ import annotations

import errno
import socket
import sqlite3
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deskrl.analysis.viewer.pages import ASSETS, Page, PageNotFound, ViewerPages
from deskrl.core.errors import UserError
from deskrl.replay.store_reader import ImageDamaged

_HOST = "127.0.0.1"
_SHUTDOWN_S = 5
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self' 'unsafe-inline'; "
    "script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(pages: ViewerPages) -> Starlette:
    """Return the application that serves the pages of a run.

    The trusted-host check prevents DNS rebinding: a web page cannot read a run by pointing its own host name at this
    machine.
    """

    def route(path: str, render: Callable[[Request], Page]) -> Route:
        def handle(request: Request) -> Response:  # not async: Starlette runs it in a thread
            return _response(render(request))

        return Route(path, handle)

    def not_found(request: Request, error: Exception) -> Response:
        return _response(pages.error(str(error)), status=404)

    def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"no page at {request.url.path}" if error.status_code == 404 else error.detail
        return _response(pages.error(message), status=error.status_code)

    def unreadable(request: Request, error: Exception) -> Response:
        return _response(pages.error(_describe(error, pages)), status=500)

    return Starlette(
        routes=[
            route("/", lambda request: pages.episodes(request.query_params)),
            route("/pulse", lambda request: pages.pulse()),
            route("/episode/{name:path}", lambda request: pages.episode(_name(request), request.query_params)),
            route("/group/{name:path}", lambda request: pages.group(_name(request))),
            route("/image/{name}", lambda request: pages.image(_name(request), request.query_params)),
            *(route(f"/{name}", lambda request: pages.asset(request.url.path[1:])) for name in ASSETS),
        ],
        middleware=[
            Middleware(_ResponseHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"], www_redirect=False),
        ],
        exception_handlers={
            HTTPException: http_error,
            PageNotFound: not_found,
            # A damaged page of the database, a damaged step (CodecError is a ValueError), screenshot or file.
            **dict.fromkeys((sqlite3.Error, ValueError, ImageDamaged, OSError), unreadable),
        },
    )


class ViewerServer:
    """HTTP server of an application in a thread; a context manager that starts and stops it.

    Args:
        app: application.
        port: port on the loopback address; 0: any free port.

    Raises:
        UserError: the port cannot be used.
    """

    def __init__(self, app: Starlette, port: int) -> None:
        try:
            self._socket = socket.create_server((_HOST, port))
        except (OSError, OverflowError) as error:
            is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            message = f"port {port} is in use" if is_taken else f"port {port} cannot be used: {error}"
            raise UserError(message, "choose another one with --port, or any free one with --port 0") from error
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                access_log=False,
                log_level="warning",
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=_SHUTDOWN_S,
            )
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="viewer")

    @property
    def url(self) -> str:
        """Address of the first page."""
        return f"http://{_HOST}:{self._socket.getsockname()[1]}/"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()


class _ResponseHeaders:
    """ASGI middleware that adds the security headers to every response, and forbids caching by default."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_SECURITY_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    return name


def _response(page: Page, status: int = 200) -> Response:
    headers = {"Cache-Control": "max-age=31536000, immutable"} if page.is_immutable else None
    return Response(page.body, status, headers, media_type=page.media_type)


def _describe(error: Exception, pages: ViewerPages) -> str:
    match error:
        case OSError():
            return f"{error.filename or 'a file of this run'} cannot be read: {error.strerror}"
        case ImageDamaged():
            return f"{error}; restore the replay folder from a copy"
        case _:
            return f"{pages.store_path.name}: this part cannot be read: {error}"
