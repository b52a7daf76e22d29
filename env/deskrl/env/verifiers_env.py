"""Taskset and environment of desktops for verifiers: a model plays tasks in the action language of a run.

verifiers selects a taskset by the name of a top-level module: `examples/other_trainers/deskrl_desktops.py` is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import verifiers.v1 as vf

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.external_policy import data_url
from deskrl.actor.agent.language_registry import select_language
from deskrl.actor.agent.prompts import initial_prompt
from deskrl.core.ids import derive_seed
from deskrl.env.desktop_env import env_config
from deskrl.env.episode_player import EpisodeEnd, EpisodePlayer, Turn

REWARD_NAME = "desktop"
"""Name of the reward in traces."""


class DesktopTasksetConfig(vf.TasksetConfig):  # type: ignore[misc]  # its package may not be installed
    """Configuration of the taskset, under `--env.taskset`."""

    run_config: Path | None = None
    """Run configuration (TOML); unset: the defaults, with the tasks whose requirements this machine meets."""


class DesktopTaskData(vf.TaskData):  # type: ignore[misc]  # as above
    """Task: its `id` is the one in deskrl."""

    seed: int
    """Seed of the episodes; all of a task's episodes are one group."""


class DesktopTask(vf.Task[DesktopTaskData]):  # type: ignore[misc]  # as above
    """Task of a run configuration."""


class DesktopTaskset(vf.Taskset[DesktopTask, DesktopTasksetConfig]):  # type: ignore[misc]  # as above
    """Tasks of a run configuration, in its order."""

    def load(self) -> Iterator[DesktopTask]:
        """Yield the tasks.

        Raises:
            UserError: see `EpisodePlayer`.
        """
        config = env_config(self.config.run_config)
        language = select_language(config.agent)
        for task in EpisodePlayer(config).tasks.values():
            system_prompt = initial_prompt(language, config.agent, task.instruction).system
            seed = derive_seed(config.seed, task.id)
            data = DesktopTaskData(id=task.id, name=task.instruction, system_prompt=system_prompt, seed=seed)
            yield DesktopTask(data, self.config.task)


class DesktopEnvConfig(vf.EnvConfig):  # type: ignore[misc]  # as above
    """Configuration of the environment: its seat, which only chats, and runs in a process of this machine."""

    player: vf.AgentConfig = vf.AgentConfig(harness={"id": "null"}, runtime={"type": "subprocess"})


class DesktopVerifiersEnv(vf.Env[DesktopEnvConfig]):  # type: ignore[misc]  # as above
    """Environment in which a model plays a task. Each episode in progress has a desktop, which is used again.

    A fault raises DesktopFault, so that the episode fails with an error and without a reward, and is retried as
    `--env.retries` says. If the model's program ends before the task, the state that it has reached is evaluated.
    """

    def __init__(self, config: DesktopEnvConfig) -> None:
        super().__init__(config)
        self._run_config = env_config(config.taskset.run_config)
        self._idle: list[EpisodePlayer] = []

    async def run(self, task: DesktopTask, agents: vf.Agents) -> None:
        """Play one episode."""
        player = self._idle.pop() if self._idle else EpisodePlayer(self._run_config)
        try:
            turn = await player.start(task.data.seed, task.data.id)
            async with agents.player.interaction(task) as interaction:
                end = await _play(player, turn, interaction)
            if not interaction.trace.ok:
                return
            interaction.trace.record_reward(REWARD_NAME, end.reward)
            interaction.trace.info["deskrl"] = {"termination": end.termination, "evidence": end.evidence}
        finally:
            self._idle.append(player)

    async def stop(self) -> None:
        """Remove the desktops."""
        while self._idle:
            await self._idle.pop().close()


async def _play(player: EpisodePlayer, turn: Turn, interaction: Any) -> EpisodeEnd:
    """Play an episode whose first screenshot is that of `turn`; return its result."""
    content = [vf.TextContentPart(text=player.initial_prompt().user), _image(turn)]
    while turn.end is None:
        segment = await interaction.turn([vf.UserMessage(content=content)])
        turn = await player.act(Action(ActionKind.FINISHED) if segment.terminated else segment.last_reply)
        content = [_image(turn)]
    return turn.end


def _image(turn: Turn) -> vf.ImageUrlContentPart:
    return vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url=data_url(turn.png)))
