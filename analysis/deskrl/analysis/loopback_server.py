"""HTTP server on the loopback address for the pages of one command, and what protects these pages."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deskrl.core.errors import UserError

_HOST = "127.0.0.1"
_SHUTDOWN_S = 5
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self' 'unsafe-inline'; "
    "script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def loopback_middleware() -> list[Middleware]:
    """Return the middleware of an application on the loopback address: security headers and trusted-host check.

    The trusted-host check prevents DNS rebinding: a web page cannot read an application by pointing its own host name
    at this machine.
    """
    return [
        Middleware(_ResponseHeaders),
        Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"], www_redirect=False),
    ]


class LoopbackServer:
    """HTTP server of an application; a context manager that starts and stops it.

    `with` serves in a thread, `async with` in the event loop of the caller. Signals are left to the command.

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
        self._server = _Server(
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
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="http-server")

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

    async def __aenter__(self) -> Self:
        self._serving = asyncio.create_task(self._server.serve([self._socket]))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        await self._serving


class _Server(uvicorn.Server):
    """Server that installs no signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
