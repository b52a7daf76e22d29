"""DesktopEnv: one desktop whose episodes are played by plain calls, and the configuration of environments."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - registers its function for the end of the process first
import os
import threading
import weakref
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deskrl.actor.actions import Action
from deskrl.actor.task import Task
from deskrl.core.config import RunConfig, load_config, load_values
from deskrl.core.errors import UserError
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
        self._owner_pid = 0

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
        """Remove the desktop. Idempotent; a later `reset` creates another one. The end of the process calls it too."""
        if self._loop is None or self._thread is None or self._owner_pid != os.getpid():
            return
        self._run(self._player.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None
        _open.discard(self)

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        if self._loop is None:
            self._start_loop()
        elif self._owner_pid != os.getpid():
            coroutine.close()
            raise UserError("the desktop belongs to another process", "create an environment in each process")
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(self._run_alone(coroutine), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: the episode ends; if the exception is the coroutine's, there is nothing to cancel
            raise

    async def _run_alone(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Await a coroutine after the one before it, which was possibly interrupted, has ended."""
        try:
            async with self._turn_lock:
                return await coroutine
        finally:
            coroutine.close()

    def _start_loop(self) -> None:
        # The thread does not start in the constructor, because vector environments fork after they construct one.
        self._loop = asyncio.new_event_loop()
        self._turn_lock = asyncio.Lock()
        self._owner_pid = os.getpid()
        self._thread = threading.Thread(target=self._loop.run_forever, name="deskrl-desktop", daemon=True)
        self._thread.start()
        _open.add(self)


_open: weakref.WeakSet[DesktopEnv] = weakref.WeakSet()


def _close_all() -> None:
    """Remove the desktops of this process that were not closed."""
    for env in list(_open):
        env.close()


# Functions of `atexit` are called after the end of executors, which the removal of a desktop needs. Executors use this
# function themselves, and what is registered last is called first.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
