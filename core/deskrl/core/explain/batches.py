"""What a run learns from, counted: episodes, updates, epochs, rows, tokens and images. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deskrl.core.config import RunConfig

_TURN_TOKENS = 12
"""Marks around a screenshot and an answer in the chat format."""


@dataclass(frozen=True)
class Batches:
    """How a run's updates are made up. What hangs on the number of tasks is None where the list is not here."""

    num_tasks: int | None
    tasks_per_update: int
    rollouts: int
    episodes_per_update: int
    optimizer_steps_per_update: int
    trajectories_per_optimizer_step: list[int]
    num_updates: int
    env_steps: int
    """By which the run ends, if it has not come to its last update before; 0: it does not."""
    updates_per_epoch: float | None
    num_epochs: float | None
    num_episodes: int
    """At the least: groups that are dropped are played too."""
    num_evaluation_episodes: int | None
    """Before, and as many after."""


@dataclass(frozen=True)
class Rows:
    """What a trajectory of full length is to the learner."""

    image_size: tuple[int, int]
    """(width, height) as the vision tower sees it."""
    tokens_per_image: int
    patches_per_image: int
    prompt_tokens: int
    action_tokens: int
    steps: int
    rows_per_trajectory: int
    images_per_row: int
    """Of the longest row."""
    tokens_per_row: int
    """Of the longest row."""
    tokens_per_trajectory: int
    images_per_trajectory: int
    """In all rows together: a screenshot in two rows counts twice."""


def count_batches(config: RunConfig, num_tasks: int | None) -> Batches:
    """The batch arithmetic of a run."""
    grpo, rollouts = config.learner.grpo, config.tasks.rollouts
    episodes = grpo.groups_per_batch * rollouts
    steps = min(grpo.minibatches, episodes)
    wanted = config.learner.eval.episodes
    evaluated = None if wanted else 0
    if wanted and num_tasks is not None:
        evaluated = max(2, -(-wanted // num_tasks)) * num_tasks
    return Batches(
        num_tasks=num_tasks,
        tasks_per_update=grpo.groups_per_batch,
        rollouts=rollouts,
        episodes_per_update=episodes,
        optimizer_steps_per_update=steps,
        trajectories_per_optimizer_step=[len(range(step, episodes, steps)) for step in range(steps)],
        num_updates=grpo.num_updates,
        env_steps=grpo.env_steps,
        updates_per_epoch=num_tasks / grpo.groups_per_batch if num_tasks else None,
        num_epochs=grpo.num_updates * grpo.groups_per_batch / num_tasks if num_tasks else None,
        num_episodes=grpo.num_updates * episodes,
        num_evaluation_episodes=evaluated,
    )


def count_rows(
    config: RunConfig,
    image_size: tuple[int, int],
    patches_per_image: int,
    tokens_per_image: int,
    prompt_tokens: int,
    action_tokens: int,
    steps: int | None = None,
) -> Rows:
    """Rows of a trajectory.

    Args:
        config: of the run.
        image_size: as the vision tower sees a screenshot.
        patches_per_image: of it.
        tokens_per_image: of it, in a prompt.
        prompt_tokens: of everything before the first screenshot.
        action_tokens: of an answer.
        steps: of the trajectory; None: as many as there may be.
    """
    steps = config.tasks.max_steps if steps is None else steps
    window = config.agent.window_images if config.agent.context == "window" else steps
    images = rows_by_images(steps, window)
    lengths = []
    answered = 0
    for index, num_images in enumerate(images):
        # The first row ends with the last step that still saw every screenshot; each later one is one step longer.
        answered = min(steps, window) if index == 0 else answered + 1
        lengths.append(prompt_tokens + num_images * tokens_per_image + answered * (action_tokens + _TURN_TOKENS))
    return Rows(
        image_size=image_size,
        tokens_per_image=tokens_per_image,
        patches_per_image=patches_per_image,
        prompt_tokens=prompt_tokens,
        action_tokens=action_tokens,
        steps=steps,
        rows_per_trajectory=len(images),
        images_per_row=max(images),
        tokens_per_row=max(lengths),
        tokens_per_trajectory=sum(lengths),
        images_per_trajectory=sum(images),
    )


def usual_rows(rows_of: Callable[[int], Rows], mean_steps: float) -> list[tuple[float, Rows]]:
    """Trajectories of the two whole numbers of steps around a mean, each with its share of them.

    Args:
        rows_of: a trajectory's, by its steps.
        mean_steps: 1 or more.
    """
    fewer = math.floor(mean_steps)
    longer = mean_steps - fewer
    return [(1 - longer, rows_of(fewer)), *([(longer, rows_of(fewer + 1))] if longer else [])]


def rows_by_images(steps: int, window: int) -> Sequence[int]:
    """Screenshots in each row: steps share one as long as none is taken out of their prompts."""
    return [min(steps, window), *[window] * max(0, steps - window)]
