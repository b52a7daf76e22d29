"""DesktopEnv: one desktop whose episodes are played by plain calls, and the configuration of environments."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deskrl.actor.actions import Action
from deskrl.actor.task import Task
from deskrl.core.config import RunConfig, load_config, load_values
from deskrl.env.episode_player import EpisodePlayer, Turn

ConfigSource = RunConfig | Mapping[str, Any] | Path | str | None
"""Run configuration; its values as nested tables; path of a TOML file; or None for the defaults."""

_T = TypeVar("_T")


def env_config(source: ConfigSource = None) -> RunConfig:
    """Return the run configuration of an environment.

    Without a configuration or a file, tasks whose requirements this machine does not meet are left out.

    Raises:
        UserError: the configuration is invalid.
    """
    if isinstance(source, RunConfig):
        return source
    if isinstance(source, str | Path):
        return load_config(Path(source))
    values = dict(source or {})
    tasks = values.get("tasks", {})
    if isinstance(tasks, Mapping):
        values["tasks"] = {"unmet_requirements": "skip", **tasks}
    return load_values(values, "the configuration of the environment")


class DesktopEnv:
    """One desktop whose episodes are played by plain calls; its event loop runs in a thread of its own.

    Args:
        source: configuration; the sections `desktop`, `tasks`, `agent` and `reward` and the seed are used.

    Raises:
        UserError: see `EpisodePlayer`.
    """

    def __init__(self, source: ConfigSource = None) -> None:
        self._player = EpisodePlayer(env_config(source))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def config(self) -> RunConfig:
        """Run configuration."""
        return self._player.config

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks by id."""
        return self._player.tasks

    def reset(self, seed: int, task_id: str | None = None, group: str | None = None) -> Turn:
        """Start an episode; arguments and errors are those of `EpisodePlayer.start`."""
        return self._run(self._player.start(seed, task_id, group))

    def step(self, answer: Action | str) -> Turn:
        """Execute an action; arguments and errors are those of `EpisodePlayer.act`."""
        return self._run(self._player.act(answer))

    def close(self) -> None:
        """Remove the desktop. Idempotent; a later `reset` creates another one."""
        if self._loop is None or self._thread is None:
            return
        self._run(self._player.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        # The thread does not start in the constructor, because vector environments fork after they construct one.
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="deskrl-desktop", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
