"""HTTP application of the viewer."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deskrl.analysis.loopback_server import loopback_middleware
from deskrl.analysis.viewer.pages import ASSETS, Page, PageNotFound, ViewerPages
from deskrl.replay.store_reader import ImageDamaged


def create_app(pages: ViewerPages) -> Starlette:
    """Return the application that serves the pages of a run."""

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
            route("/live", lambda request: pages.live()),
            route("/live/desktops", lambda request: pages.live_desktops()),
            route("/pulse", lambda request: pages.pulse()),
            route("/episode/{name:path}", lambda request: pages.episode(_name(request), request.query_params)),
            route("/group/{name:path}", lambda request: pages.group(_name(request))),
            route("/image/{name}", lambda request: pages.image(_name(request), request.query_params)),
            *(route(f"/{name}", lambda request: pages.asset(request.url.path[1:])) for name in ASSETS),
        ],
        middleware=loopback_middleware(),
        exception_handlers={
            HTTPException: http_error,
            PageNotFound: not_found,
            # A damaged page of the database, a damaged step (CodecError is a ValueError), screenshot or file.
            **dict.fromkeys((sqlite3.Error, ValueError, ImageDamaged, OSError), unreadable),
        },
    )


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
