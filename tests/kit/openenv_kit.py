"""Double of an OpenEnv server with the click game: the protocol of `/ws` and `/schema`, and faults on request.

The package openenv cannot be installed beside the engines. tests/long/test_openenv_server.py compares the double with a
server of that package.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import WSMsgType, web
from openenv_game import ClickGame
from ports_kit import free_port

ACTIONS = {"click": {"x": "{x}", "y": "{y}"}, "type": {"x": 0, "y": 0, "label": "{text}"}}
"""Templates of the game's actions. The label "bug" makes the game raise an exception."""
MAX_SESSIONS = 4
_MAX_LABEL_CHARACTERS = 3
_FIELDS = {
    "action": ("label", "metadata", "x", "y"),
    "observation": ("done", "metadata", "mission", "reward", "screenshot"),
}


class OpenEnvServer:
    """Server in a thread.

    Args:
        max_sessions: number of sessions at a time.
        port: port on which it listens; None: any free one.
    """

    def __init__(self, max_sessions: int = MAX_SESSIONS, port: int | None = None) -> None:
        self._port = port or free_port()
        self._max_sessions = max_sessions
        self._sockets: set[web.WebSocketResponse] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self.hangs = False
        """Whether steps are not answered."""

    @property
    def address(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the server."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def drop_connections(self) -> None:
        """Close all connections without a message, as the end of the process does."""

        async def drop() -> None:
            for socket in self._sockets:
                transport = socket._req.transport if socket._req is not None else None
                if transport is not None:
                    transport.abort()

        asyncio.run_coroutine_threadsafe(drop(), self._loop).result()

    def stop(self) -> None:
        """Stop the server."""

        async def clean_up() -> None:
            for socket in tuple(self._sockets):
                await socket.close()
            if self._runner is not None:
                await self._runner.cleanup()

        asyncio.run_coroutine_threadsafe(clean_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        app = web.Application()
        app.add_routes([web.get("/ws", self._serve), web.get("/schema", self._schema)])
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()

    async def _schema(self, request: web.Request) -> web.Response:
        schema = {
            part: {"properties": {field: {} for field in fields}, "additionalProperties": False}
            for part, fields in _FIELDS.items()
        }
        schema["action"]["required"] = ["x", "y"]
        return web.json_response(schema)

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if len(self._sockets) >= self._max_sessions:
            await socket.send_json(_error("CAPACITY_REACHED", f"Server at capacity: {self._max_sessions} sessions."))
            await socket.close()
            return socket
        self._sockets.add(socket)
        game = ClickGame()
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await socket.send_json(await self._answer(game, json.loads(message.data)))
        finally:
            self._sockets.discard(socket)
        return socket

    async def _answer(self, game: ClickGame, message: dict[str, Any]) -> dict[str, Any]:
        data = message.get("data", {})
        match message["type"]:
            case "state":
                return {"type": "state", "data": {"episode_id": "episode", "step_count": 0}}
            case "reset":
                return _observation(game.reset(data["seed"], data.get("quarter")))
        if self.hangs:
            await asyncio.sleep(1000)
        label = data.get("label", "")
        if label == "bug":
            return _error("EXECUTION_ERROR", "the game is broken")
        if len(label) > _MAX_LABEL_CHARACTERS:
            return _error("VALIDATION_ERROR", "Invalid message")
        return _observation(game.click(data["x"], data["y"]))


@contextmanager
def openenv_server(max_sessions: int = MAX_SESSIONS) -> Iterator[OpenEnvServer]:
    """Run a server for the duration of a block."""
    server = OpenEnvServer(max_sessions)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _observation(fields: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in fields.items() if key not in ("reward", "done")}
    data = {"observation": {"metadata": {}, **rest}, "reward": fields["reward"], "done": fields["done"]}
    return {"type": "observation", "data": data}


def _error(code: str, message: str) -> dict[str, Any]:
    return {"type": "error", "data": {"message": message, "code": code}}
