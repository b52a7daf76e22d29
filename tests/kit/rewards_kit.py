"""Rewards in tests: a desktop double that records its operations, ended episodes, and evaluations of terms."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import CommandResult, Desktop, DesktopError
from deskrl.actor.rewards.episode_reward import EpisodeReward
from deskrl.actor.rewards.reward_interface import EndedEpisode, EpisodeAction, ended_episode
from deskrl.actor.task import Task
from deskrl.actor.tasks.evaluators import Evaluation
from deskrl.actor.tasks.task_schema import parse_task
from deskrl.core.config import RewardConfig

TASK = {
    "id": "touch-it",
    "instruction": "Touch it.",
    "evaluator": {
        "func": "exact_match",
        "result": {"type": "vm_command_line", "command": "evaluate"},
        "expected": {"type": "rule", "rules": {"expected": "solved"}},
    },
}


@dataclass
class DesktopDouble(Desktop):
    """Desktop with files and windows that records its operations; the task is solved."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    titles: Sequence[str] = ()
    error: DesktopError | None = None
    """Error of every read of a file."""
    hangs: bool = False
    """Whether reads of files never return."""
    calls: list[str] = field(default_factory=list)

    async def reset(self) -> None: ...
    async def close(self) -> None: ...
    async def act(self, action: Action) -> None: ...

    async def is_alive(self) -> bool:
        return True

    async def screenshot(self) -> Image.Image:
        return Image.new("RGB", (28, 28))

    async def stop_policy_programs(self) -> None:
        self.calls.append("stop_policy_programs")

    async def stop_all_programs(self) -> None:
        self.calls.append("stop_all_programs")

    async def windows(self) -> list[dict[str, Any]]:
        self.calls.append("windows")
        return [{"title": title} for title in self.titles]

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        self.calls.append(f"execute {command}")
        return CommandResult(0, "solved", "")

    async def read_file(self, path: str) -> bytes:
        self.calls.append(f"read_file {path}")
        if self.error is not None:
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]


def end(desktop: Desktop, num_actions: int = 1, task: Task | None = None) -> EndedEpisode:
    """Return an episode with this many actions and screenshots; the last action ended it."""
    kinds = [ActionKind.CLICK] * (num_actions - 1) + [ActionKind.FINISHED] * min(num_actions, 1)
    actions = [EpisodeAction(str(index), Action(kind)) for index, kind in enumerate(kinds)]
    png_files = []
    for index in range(max(1, num_actions)):
        buffer = io.BytesIO()
        Image.new("RGB", (28, 28), (index, 0, 0)).save(buffer, "PNG")
        png_files.append(buffer.getvalue())
    task = task or parse_task(json.dumps(TASK).encode(), "task")
    return ended_episode(desktop, task, actions, png_files, actions[-1].action if actions else None, seed=1)


def reward_of(terms: Mapping[str, Any]) -> EpisodeReward:
    """Return the reward with these terms."""
    return EpisodeReward(RewardConfig.model_validate({"terms": terms}), 5.0, success_threshold=0.1)


def evaluate(
    reward: Mapping[str, Any] | EpisodeReward, desktop: Desktop | None = None, num_actions: int = 1
) -> Evaluation:
    """Return the evaluation of an episode by a reward, or by these terms."""
    made = reward if isinstance(reward, EpisodeReward) else reward_of(reward)
    double = desktop or DesktopDouble()

    async def scenario() -> Evaluation:
        return await made.evaluate(double, end(double, num_actions))

    return asyncio.run(scenario())
