"""HTTP application of `deskrl record`: the page, the live screen, and the input of the person.

Whoever may see or control the desktop knows the token, which is in the address that the command prints. The page sends
it with every request in a header, which a page of another origin cannot do. Requests that change something must not
have another origin either.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.demonstrations import DemonstrationStep
from deskrl.actor.person_input import read_action
from deskrl.actor.recording import Phase, Recording, RecordingState
from deskrl.analysis import report, viewer
from deskrl.analysis.loopback_server import loopback_middleware
from deskrl.analysis.report.step_frames import action_badge

TOKEN_HEADER = "X-Deskrl-Token"
_POLL_S = 20.0
"""Time in seconds after which a request for changes is answered although there are none."""
_MAX_BODY_BYTES = 100_000
_NEWLINE = "\n"
_ASSETS = {
    "/style.css": (report.__name__, "templates/report.css", "text/css"),
    "/icon.svg": (viewer.__name__, "templates/icon.svg", "image/svg+xml"),
    "/record.css": (__package__, "static/record.css", "text/css"),
    "/record.js": (__package__, "static/record.js", "text/javascript"),
}

_Handler = Callable[[Request], Awaitable[Response]]


class RecorderApp:
    """Application of one recording; it runs in the event loop of the recording.

    Args:
        recording: recording to show and to control.
        token: secret that every request must have.
    """

    def __init__(self, recording: Recording, token: str) -> None:
        self.token = token
        self._recording = recording
        self._is_shown = False
        self._end_was_sent = asyncio.Event()
        self.application = Starlette(
            routes=[
                Route("/", self._with_token(self._page, in_query=True)),
                Route("/state", self._with_token(self._state)),
                Route("/screen/{number:int}", self._with_token(self._screen, in_query=True)),
                Route("/action", self._with_token(self._act), methods=["POST"]),
                Route("/hand_over", self._with_token(self._call(recording.hand_over)), methods=["POST"]),
                Route("/take_over", self._with_token(self._call(recording.take_over)), methods=["POST"]),
                Route("/discard", self._with_token(self._call(recording.discard)), methods=["POST"]),
                *(Route(path, _asset) for path in _ASSETS),
            ],
            middleware=loopback_middleware(),
        )

    async def wait_until_seen(self, timeout_s: float) -> None:
        """Wait until a page has received the state of the ended recording, if one is open."""
        if self._is_shown:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._end_was_sent.wait(), timeout_s)

    def _with_token(self, handle: _Handler, *, in_query: bool = False) -> _Handler:
        """Return a handler that rejects requests without the token, and changes requested by other origins.

        Args:
            handle: handler.
            in_query: whether the token can be in the query, for requests that cannot have a header.
        """

        async def respond(request: Request) -> Response:
            sent = request.headers.get(TOKEN_HEADER) or (request.query_params.get("token", "") if in_query else "")
            if not hmac.compare_digest(sent.encode(), self.token.encode()):
                return _refuse(403, "open the address that deskrl record has printed: the token is missing or invalid")
            origin = request.headers.get("origin")
            if request.method != "GET" and origin is not None and origin != f"http://{request.headers.get('host')}":
                return _refuse(403, "requests of other origins are refused")
            return await handle(request)

        return respond

    async def _page(self, request: Request) -> Response:
        return Response(_read("static/record.html"), media_type="text/html")

    async def _state(self, request: Request) -> Response:
        """Respond with the state once it is newer than the version `after`."""
        self._is_shown = True
        after = request.query_params.get("after", "")
        state = await self._recording.wait_for_change(int(after) if after.isdecimal() else 0, _POLL_S)
        if state.phase is Phase.ENDED:
            self._end_was_sent.set()
        return JSONResponse(_state_record(state))

    async def _screen(self, request: Request) -> Response:
        jpeg = self._recording.screen()
        return Response(jpeg, media_type="image/jpeg") if jpeg else _refuse(404, "there is no screen yet")

    async def _act(self, request: Request) -> Response:
        if int(request.headers.get("content-length", _MAX_BODY_BYTES + 1)) > _MAX_BODY_BYTES:
            return _refuse(413, "the action is too large")
        try:
            action = read_action(await request.body(), *self._recording.size)
        except ValueError as error:
            return _refuse(422, str(error))
        self._recording.act(action)
        return Response(status_code=204)

    def _call(self, function: Callable[[], None]) -> _Handler:
        async def handle(request: Request) -> Response:
            function()
            return Response(status_code=204)

        return handle


async def _asset(request: Request) -> Response:
    package, path, media_type = _ASSETS[request.url.path]
    return Response(_read(path, package), media_type=media_type)


def _read(path: str, package: str | None = None) -> bytes:
    return resources.files(package or __package__).joinpath(path).read_bytes()


def _refuse(status: int, message: str) -> Response:
    return Response(message, status, media_type="text/plain")


def _state_record(state: RecordingState) -> dict[str, Any]:
    return asdict(state) | {"steps": [_step_record(step) for step in state.steps]}


def _step_record(step: DemonstrationStep) -> dict[str, Any]:
    return {"player": step.player, "action": describe_action(step.action), "thought": step.thought}


def describe_action(action: Action) -> str:
    """Return an action in a few words."""
    caption, _ = action_badge(action.to_record())
    keys = "".join(f"{key} + " for key in action.keys)
    match action.kind:
        case ActionKind.TYPE:
            return f"type “{action.text.replace(_NEWLINE, '↵')}”"
        case ActionKind.HOTKEY:
            return f"press {caption}"
        case ActionKind.DRAG:
            return f"{keys}drag ({action.x}, {action.y}) to ({action.end_x}, {action.end_y})"
        case ActionKind.SCROLL:
            return f"{keys}{caption} at ({action.x}, {action.y})"
        case _ if action.has_point:
            return f"{keys}{action.kind.replace('_', ' ')} ({action.x}, {action.y})"
    return caption
