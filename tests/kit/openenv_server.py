"""OpenEnv server of the click game, which runs with the package openenv and without deskrl.

python openenv_server.py PORT SESSIONS
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from openenv_game import ClickGame
from pydantic import Field


class Click(Action):
    """Click at a pixel of the image."""

    x: int = Field(ge=0)
    y: int = Field(ge=0)
    label: str = Field(default="", max_length=3)


class Screen(Observation):
    """Image and instruction."""

    screenshot: str
    mission: str


class ClickEnvironment(Environment[Click, Screen, State]):
    """The game as an environment."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._game = ClickGame()

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, quarter: int | None = None, **kwargs: Any
    ) -> Screen:
        """Start an episode."""
        return Screen(**self._game.reset(seed, quarter))

    def step(self, action: Click, timeout_s: float | None = None, **kwargs: Any) -> Screen:
        """Click."""
        if action.label == "bug":
            raise ZeroDivisionError("the game is broken")
        return Screen(**self._game.click(action.x, action.y))

    @property
    def state(self) -> State:
        """State of the session."""
        return State(episode_id="episode", step_count=0)


if __name__ == "__main__":
    app = create_fastapi_app(ClickEnvironment, Click, Screen, max_concurrent_envs=int(sys.argv[2]))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
