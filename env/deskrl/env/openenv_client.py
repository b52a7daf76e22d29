"""Client of the OpenEnv server of desktops."""

from __future__ import annotations

from typing import Any

from openenv.core.client_types import StepResult
from openenv.core.env_client import EnvClient
from openenv.core.env_server.types import State

from deskrl.env.desktop_fault import DesktopFault
from deskrl.env.openenv_messages import DesktopAction, DesktopObservation


class DesktopClient(EnvClient):  # type: ignore[misc]  # its package may not be installed
    """Session with a desktop of a server.

    `reset` has the arguments `seed`, `episode_id`, `task` and `group`. A fault raises DesktopFault, and any other error
    of the server, such as an unknown task, RuntimeError.
    """

    def _step_payload(self, action: DesktopAction) -> dict[str, Any]:
        payload: dict[str, Any] = action.model_dump(mode="json", exclude_defaults=True)
        return payload

    def _parse_result(self, payload: dict[str, Any]) -> StepResult:
        reward, done = payload.get("reward"), bool(payload.get("done", False))
        observation = DesktopObservation(**payload["observation"], reward=reward, done=done)
        return StepResult(observation=observation, reward=reward, done=done)

    def _parse_state(self, payload: dict[str, Any]) -> State:
        return State(**payload)

    async def _send_and_receive(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            response: dict[str, Any] = await super()._send_and_receive(message)
        except RuntimeError as error:
            if fault := DesktopFault.find_in(str(error)):
                raise fault from error
            raise
        return response
