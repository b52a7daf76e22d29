"""OpenEnv server of desktops: each session has a desktop of its own, at most `desktop.num_envs` at a time.

    python -m deskrl.env.openenv_server [RUN.toml] [--host 127.0.0.1] [--port 8000]

Whoever reaches the port can use the desktops: it listens on the loopback unless `--host` says otherwise.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import State

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import derive_seed, new_id
from deskrl.env.desktop_env import DesktopEnv, env_config
from deskrl.env.episode_player import Turn
from deskrl.env.openenv_messages import DesktopAction, DesktopObservation


class OpenEnvDesktop(Environment):  # type: ignore[misc]  # its package may not be installed
    """One desktop with the tasks of a configuration.

    Args:
        config: run configuration.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self._desktop = DesktopEnv(config)
        self._state = State()

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        task: str | None = None,
        group: str | None = None,
        **options: Any,
    ) -> DesktopObservation:
        """Start an episode; arguments and errors are those of `EpisodePlayer.start`.

        Args:
            seed: seed of the episode; None: derived from `episode_id`.
            episode_id: name of the episode; None: a new one.
            task: id of the task; None: the seed chooses one.
            group: see `EpisodePlayer.start`.
            options: others, which are rejected.
        """
        if options:
            raise UserError(f"reset has no option {min(options)!r}", "give seed, episode_id, task or group")
        name = episode_id or new_id("episode")
        turn = self._desktop.reset(derive_seed(name) if seed is None else seed, task, group)
        self._state = State(episode_id=name, step_count=0)
        return _observation(turn)

    def step(self, action: DesktopAction, timeout_s: float | None = None, **options: Any) -> DesktopObservation:
        """Execute an action; errors are those of `EpisodePlayer.act`. Timeouts are those of the configuration."""
        turn = self._desktop.step(action.answer())
        self._state.step_count = turn.num_steps
        return _observation(turn)

    @property
    def state(self) -> State:
        """Name of the episode and number of steps."""
        return self._state

    def close(self) -> None:
        """Remove the desktop."""
        self._desktop.close()


def _observation(turn: Turn) -> DesktopObservation:
    values: dict[str, Any] = {"reward": 0.0 if turn.num_steps else None}
    if (end := turn.end) is not None:
        values = {"done": True, "reward": end.reward, "truncated": end.is_truncated}
        values |= {"termination": end.termination, "evidence": end.evidence}
    return DesktopObservation(
        screenshot=base64.b64encode(turn.png).decode(),
        instruction=turn.instruction,
        task=turn.task_id,
        seed=turn.seed,
        num_steps=turn.num_steps,
        **values,
    )


def make_app(config: RunConfig) -> FastAPI:
    """Return the application of the server.

    Raises:
        UserError: the configuration is invalid, or its desktops cannot run on this machine.
    """
    DesktopEnv(config)  # reports errors of the configuration before the first session, whose error has no cause

    def make_environment() -> OpenEnvDesktop:
        return OpenEnvDesktop(config)

    num_sessions = config.desktop.num_envs
    app: FastAPI = create_fastapi_app(make_environment, DesktopAction, DesktopObservation, num_sessions)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal arrives; return 2 after an error of the configuration."""
    import uvicorn

    parser = argparse.ArgumentParser(description="OpenEnv server of desktops.")
    parser.add_argument("config", nargs="?", type=Path, help="run configuration; default: deskrl's suite")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; default: 8000")
    options = parser.parse_args(arguments)
    try:
        app = make_app(env_config(options.config))
    except UserError as error:
        print(f"openenv_server: {error}", file=sys.stderr)
        return 2
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
