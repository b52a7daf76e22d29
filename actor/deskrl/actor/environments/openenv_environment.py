"""Session with an OpenEnv server, by the WebSocket protocol of OpenEnv's clients.

The protocol is spoken here because the package `openenv` has dependencies that conflict with those of the engines. A
session is one connection to `/ws`. Requests are `{"type": "reset", "data": {"seed": 1}}`, `{"type": "state"}` and
`{"type": "step", "data": action}`. A reply is `{"type": "observation", "data": {"observation": {...}, "reward": 0.0,
"done": false}}`, a state, or `{"type": "error", "data": {"message": "...", "code": "..."}}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from deskrl.actor.desktops.base import DesktopError, DesktopGone
from deskrl.actor.environments.environment_desktop import Environment, Observation
from deskrl.actor.environments.gestures import Gesture, fill, placeholders
from deskrl.actor.environments.openenv_image import decode_observation_image
from deskrl.actor.image_decoding import ImageError, decode_off_loop
from deskrl.core import rpc
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError

MAX_REPLY_BYTES = 256 * 1024**2
"""Size limit of a reply in bytes; a longer one is an error."""
_INVALID_MESSAGE = "VALIDATION_ERROR"
_ERROR_CHARACTERS = 300


class OpenEnvEnvironment(Environment):
    """One session.

    Args:
        address: base URL of the server, such as http://127.0.0.1:8000.
        actions: templates of the environment's actions by gesture.
        image_key: key of the observation with the image (see `openenv_image`).
        shape_key: key of the observation with the shape of an image that is a flat array; empty if there is none.
        instruction_key: key of the observation of a reset with the instruction; empty if there is none.
    """

    def __init__(
        self, address: str, actions: Mapping[str, Any], image_key: str, shape_key: str, instruction_key: str
    ) -> None:
        self._address = address
        self._actions = actions
        self._image_keys = (image_key, shape_key)
        self._instruction_key = instruction_key
        self._http: Any = None
        self._socket: Any = None

    async def open(self) -> None:
        """Connect to the server, and check that it has a free session (see the base class)."""
        import aiohttp  # imported on first use: commands that only check a configuration do not need it

        uses_proxy = not rpc.is_loopback(urlsplit(self._address).hostname or "")
        # The time limits are those of the desktop.
        self._http = aiohttp.ClientSession(trust_env=uses_proxy, timeout=aiohttp.ClientTimeout(total=None))
        try:
            async with self._http.get(f"{self._address}/schema") as response:
                schema = await response.json() if response.status == HTTPStatus.OK else {}
            self._socket = await self._http.ws_connect(f"{self._address}/ws", max_msg_size=MAX_REPLY_BYTES)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = one_line(error, _ERROR_CHARACTERS)
            raise DesktopError(f"the OpenEnv server at {self._address} cannot be reached: {reason}") from error
        if (problem := schema_problem(schema, self._actions, self._image_keys[0])) is not None:
            raise UserError(f"desktop.provider_options.{problem}", f"see {self._address}/schema")
        await self._request({"type": "state"})

    async def reset(self, seed: int, parameters: Mapping[str, Any]) -> Observation:
        """Reset the environment; `parameters` are further arguments of its reset (see the base class)."""
        data = await self._request({"type": "reset", "data": {**parameters, "seed": seed}})
        try:
            return await self._observation(data, self._instruction(data))
        except ImageError as error:
            raise UserError(f"desktop.provider_options: {self._address}: {error}", "correct image_key") from error

    async def step(self, gesture: Gesture) -> Observation | None:
        """Execute a gesture (see the base class)."""
        template = self._actions.get(gesture.name)
        if template is None:
            return None
        action = fill(template, gesture)
        reply = await self._exchange({"type": "step", "data": action})
        if _error_code(reply) == _INVALID_MESSAGE and any(placeholders(template)):
            return None  # the values of the policy do not fit, such as a text that is too long
        data = self._check(reply, f"the action {json.dumps(action)}")
        try:
            return await self._observation(data, None)
        except ImageError as error:
            raise DesktopError(f"{self._address}: {error}") from error

    async def close(self) -> None:
        """End the session."""
        if self._http is not None:
            await self._http.close()  # and with it the connection, at whose end the server removes the session

    def end_cause(self) -> str | None:
        """Return why the server is not connected; None if it is connected."""
        if self._socket is None:
            return "the OpenEnv server is not connected"
        return self._lost() if self._socket.closed else None

    def _lost(self) -> str:
        return f"the OpenEnv server at {self._address} closed the connection"

    async def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._check(await self._exchange(message), f"the request {message['type']}")

    async def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        import aiohttp

        try:
            await self._socket.send_str(json.dumps(message))
            reply = await self._socket.receive()
        except (aiohttp.ClientError, OSError) as error:
            raise DesktopGone(f"{self._lost()}: {one_line(error, _ERROR_CHARACTERS)}") from error
        if reply.type is not aiohttp.WSMsgType.TEXT:
            raise DesktopGone(self._lost())
        try:
            found = json.loads(reply.data)
            if not isinstance(found["data"], dict):
                raise TypeError("data is not an object")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DesktopError(f"{self._address} sent no reply of OpenEnv's protocol: {one_line(error)}") from error
        return dict(found)

    def _check(self, reply: dict[str, Any], what: str) -> dict[str, Any]:
        """Return the data of a reply; raises DesktopError if it is an error."""
        data: dict[str, Any] = reply["data"]
        if (code := _error_code(reply)) is not None:
            details = one_line(json.dumps(data.get("errors", data.get("message"))), _ERROR_CHARACTERS)
            raise DesktopError(f"the OpenEnv server at {self._address} answered {what} with {code}: {details}")
        return data

    async def _observation(self, data: dict[str, Any], instruction: str | None) -> Observation:
        """Return what a reply contains; raises ImageError or DesktopError."""
        reward = data.get("reward") or 0.0
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            raise DesktopError(f"the environment returned the reward {reward!r}")
        fields = data.get("observation")
        if not isinstance(fields, dict):
            raise DesktopError(f"{self._address} sent no observation")
        image = await decode_off_loop(lambda: decode_observation_image(fields, *self._image_keys))
        return Observation(image, float(reward), "done" if data.get("done") else "", instruction)

    def _instruction(self, data: dict[str, Any]) -> str | None:
        """Return the instruction that the reply to a reset contains; raises UserError."""
        if not self._instruction_key:
            return None
        fields = data.get("observation")
        value = fields.get(self._instruction_key) if isinstance(fields, dict) else None
        if not isinstance(value, str):
            raise UserError(
                f"desktop.provider_options: {self._address}: the observation of a reset has no text "
                f"{self._instruction_key!r}",
                "correct instruction_key, or leave it out",
            )
        return value


def schema_problem(schema: Any, actions: Mapping[str, Any], image_key: str) -> str | None:
    """Return which option contradicts the schema that a server publishes; None if none does.

    Args:
        schema: JSON schemas of `action` and `observation`; anything else contradicts nothing.
        actions: templates of actions by gesture.
        image_key: key of the observation with the image.
    """
    known, required, is_closed = _fields(schema, "action")
    for name, template in actions.items():
        fields = template.keys() if isinstance(template, Mapping) else set()
        if missing := sorted(required - fields):
            return f"actions: {name}: {missing[0]} is missing"
        if is_closed and (unknown := sorted(fields - known)):
            return f"actions: {name}: the action has no {unknown[0]}, but {', '.join(sorted(known))}"
    known, _, is_closed = _fields(schema, "observation")
    if is_closed and image_key not in known:
        return f"image_key: the observation has no {image_key}, but {', '.join(sorted(known))}"
    return None


def _fields(schema: Any, part: str) -> tuple[set[str], set[str], bool]:
    """Return the fields of a part of a schema, the required ones, and whether there are no others."""
    found = schema.get(part) if isinstance(schema, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("properties"), dict):
        return set(), set(), False
    return set(found["properties"]), set(found.get("required", ())), found.get("additionalProperties") is False


def _error_code(reply: Mapping[str, Any]) -> str | None:
    """Return the code of an error; None for any other reply."""
    return str(reply["data"].get("code", "an error")) if reply.get("type") == "error" else None
