"""Interface of rewards: what a reward gets of an episode, and what it returns."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, overload

from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import Desktop
from deskrl.actor.rewards.desktop_handle import BlockingDesktopHandle, DesktopHandle
from deskrl.actor.task import Task


@dataclass(frozen=True)
class EpisodeAction:
    """Action of the policy with its thought. The thought is the policy's own text, and no evidence."""

    thought: str
    action: Action


class Screenshots(Sequence[Image.Image]):
    """Screenshots of an episode as the policy saw them, decoded when they are accessed.

    Args:
        png_files: screenshots as PNG files, in order.
    """

    def __init__(self, png_files: Sequence[bytes]) -> None:
        self.png_files = tuple(png_files)

    def __len__(self) -> int:
        """Return the number of screenshots."""
        return len(self.png_files)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> Screenshots: ...

    def __getitem__(self, index: int | slice) -> Image.Image | Screenshots:
        """Return a screenshot as an RGB image, or some of the screenshots."""
        if isinstance(index, slice):
            return Screenshots(self.png_files[index])
        return Image.open(io.BytesIO(self.png_files[index])).convert("RGB")


@dataclass(frozen=True)
class EndedEpisode:
    """Episode whose end state is evaluated."""

    task: Task
    actions: Sequence[EpisodeAction]
    """Actions in order, including one that ended the episode; without an action that could not be parsed."""
    screenshots: Screenshots
    """Screenshot before each action, and after the last one if it did not end the episode."""
    final_action: Action | None
    """Action that ended the episode; None at the step limit, or if an action could not be parsed."""
    seed: int
    """Seed of the rollout."""
    desktop: DesktopHandle
    """Desktop in its end state, for coroutines."""
    blocking_desktop: BlockingDesktopHandle
    """Desktop in its end state, for plain functions."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Values of the terms that were computed before, by name."""

    @property
    def instruction(self) -> str:
        """Instruction of the task."""
        return self.task.instruction


def ended_episode(
    desktop: Desktop,
    task: Task,
    actions: Sequence[EpisodeAction],
    png_files: Sequence[bytes],
    final_action: Action | None,
    seed: int,
) -> EndedEpisode:
    """Return the episode with handles on its desktop; called in the event loop of the desktop."""
    handle = DesktopHandle(desktop)
    blocking = BlockingDesktopHandle(handle, asyncio.get_running_loop())
    return EndedEpisode(task, tuple(actions), Screenshots(png_files), final_action, seed, handle, blocking)


@dataclass(frozen=True)
class Score:
    """Value of a reward with the evidence for it."""

    value: float
    """Value in [0, 1]."""
    evidence: Any = None
    """What led to the value, as JSON values; it is stored with the episode and shown by the viewer."""


class Reward(Protocol):
    """Reward as a class. It is constructed with an instance of its attribute `Options`, or without arguments.

    One instance judges all episodes of an actor, several at the same time.
    """

    needs_session: ClassVar[bool]
    """Whether the setup's applications still run, so that windows exist; False if it is not defined."""

    def score(self, episode: EndedEpisode) -> float | Score | Awaitable[float | Score]:
        """Return the value of an end state, in [0, 1]; a method that is not a coroutine runs in a thread.

        An exception is a fault of the kind `evaluator`, unless it is one of the desktop's.
        """
