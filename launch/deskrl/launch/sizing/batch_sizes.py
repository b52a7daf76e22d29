"""Batch sizes of a run: episodes, updates, epochs, rows, tokens and images, and the limits that they must keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deskrl.core.config import AgentConfig, RunConfig
from deskrl.core.errors import UserError

_STEP_TOKENS = 12
"""Tokens that the chat format adds to each step around its screenshot and its answer."""


@dataclass(frozen=True)
class BatchSizes:
    """Composition of a run's updates. Values that depend on the number of tasks are None if it is unknown."""

    num_tasks: int | None
    tasks_per_update: int
    rollouts: int
    episodes_per_update: int
    optimizer_steps_per_update: int
    trajectories_per_optimizer_step: list[int]
    num_updates: int
    env_steps: int
    """Environment steps after which the run ends, if its last update does not come first; 0 for no limit."""
    updates_per_epoch: float | None
    num_epochs: float | None
    num_episodes: int
    """Lower bound: episodes of dropped groups come on top."""
    num_evaluation_episodes: int | None
    """Episodes of the evaluation before training; the one after training has as many."""


@dataclass(frozen=True)
class TrajectorySize:
    """Size of one trajectory as the learner packs it into rows."""

    image_size: tuple[int, int]
    """Screenshot size (width, height) after the image processor has scaled it."""
    tokens_per_image: int
    patches_per_image: int
    prompt_tokens: int
    action_tokens: int
    steps: int
    rows_per_trajectory: int
    images_per_row: int
    """Screenshots in the longest row."""
    tokens_per_row: int
    """Tokens in the longest row."""
    tokens_per_trajectory: int
    images_per_trajectory: int
    """Screenshots in all rows; one that is part of two rows counts twice."""


@dataclass(frozen=True)
class RowContent:
    """Number of screenshots and of answers in a row of the learner."""

    num_images: int
    num_answers: int
    """All answers up to the last step of the row, because each prompt has all earlier answers."""


def batch_sizes(config: RunConfig, num_tasks: int | None) -> BatchSizes:
    """Return the batch sizes of a run; `num_tasks` is None if the task list is missing."""
    grpo, rollouts = config.learner.grpo, config.tasks.num_rollouts
    episodes = grpo.groups_per_batch * rollouts
    steps = min(grpo.num_minibatches, episodes)
    min_episodes = config.learner.eval.num_episodes
    evaluated = None if min_episodes else 0
    if min_episodes and num_tasks is not None:
        evaluated = max(2, -(-min_episodes // num_tasks)) * num_tasks
    return BatchSizes(
        num_tasks=num_tasks,
        tasks_per_update=grpo.groups_per_batch,
        rollouts=rollouts,
        episodes_per_update=episodes,
        optimizer_steps_per_update=steps,
        trajectories_per_optimizer_step=[len(range(step, episodes, steps)) for step in range(steps)],
        num_updates=grpo.num_updates,
        env_steps=grpo.max_env_steps,
        updates_per_epoch=num_tasks / grpo.groups_per_batch if num_tasks else None,
        num_epochs=grpo.num_updates * grpo.groups_per_batch / num_tasks if num_tasks else None,
        num_episodes=grpo.num_updates * episodes,
        num_evaluation_episodes=evaluated,
    )


def trajectory_size(
    config: RunConfig,
    image_size: tuple[int, int],
    patches_per_image: int,
    tokens_per_image: int,
    prompt_tokens: int,
    action_tokens: int,
    steps: int | None = None,
) -> TrajectorySize:
    """Return the size of a trajectory.

    Args:
        config: run configuration.
        image_size: screenshot size (width, height) after scaling.
        patches_per_image: vision tower patches of one screenshot.
        tokens_per_image: prompt tokens of one screenshot.
        prompt_tokens: prompt tokens before the first screenshot.
        action_tokens: tokens of one answer.
        steps: number of steps; None for `tasks.max_steps`.
    """
    steps = config.tasks.max_steps if steps is None else steps
    rows = row_contents(config.agent, steps)
    lengths = [
        prompt_tokens + row.num_images * tokens_per_image + row.num_answers * (action_tokens + _STEP_TOKENS)
        for row in rows
    ]
    return TrajectorySize(
        image_size=image_size,
        tokens_per_image=tokens_per_image,
        patches_per_image=patches_per_image,
        prompt_tokens=prompt_tokens,
        action_tokens=action_tokens,
        steps=steps,
        rows_per_trajectory=len(rows),
        images_per_row=max(row.num_images for row in rows),
        tokens_per_row=max(lengths),
        tokens_per_trajectory=sum(lengths),
        images_per_trajectory=sum(row.num_images for row in rows),
    )


def trajectory_mix(size_of: Callable[[int], TrajectorySize], mean_steps: float) -> list[tuple[float, TrajectorySize]]:
    """Return (share, size) of the trajectories of floor(mean) and ceil(mean) steps that have this mean length.

    Args:
        size_of: returns the size of a trajectory with this number of steps.
        mean_steps: mean number of steps, 1 or more.
    """
    shorter = math.floor(mean_steps)
    longer_share = mean_steps - shorter
    return [(1 - longer_share, size_of(shorter)), *([(longer_share, size_of(shorter + 1))] if longer_share else [])]


def row_contents(agent: AgentConfig, steps: int) -> Sequence[RowContent]:
    """Return the rows of a trajectory: steps share a row until their context drops a screenshot."""
    by_first_image: dict[int, RowContent] = {}
    for num_images in range(1, steps + 1):
        first = agent.num_dropped_images(num_images)
        by_first_image[first] = RowContent(num_images - first, num_images)
    return list(by_first_image.values())


def check_limits(config: RunConfig, tokens_per_image: int) -> None:
    """Check that a prompt can hold the screenshots, and that there is an episode for each optimizer step.

    Raises:
        UserError: one of them is not the case.
    """
    limit, episodes = config.inference.max_model_len, config.learner.grpo.groups_per_batch * config.tasks.num_rollouts
    num_images = min(config.tasks.max_steps, config.agent.max_context_images or config.tasks.max_steps)
    if num_images * tokens_per_image > limit:
        raise UserError(
            f"{num_images} screenshots of {tokens_per_image} tokens have {num_images * tokens_per_image} tokens, "
            f"more than inference.max_model_len = {limit}",
            "raise it, or use fewer screenshots (agent.context, agent.window_images, agent.segment_images, "
            "tasks.max_steps) or smaller ones (agent.image_width, agent.image_height)",
        )
    if (num_minibatches := config.learner.grpo.num_minibatches) > episodes:
        raise UserError(
            f"learner.grpo.num_minibatches = {num_minibatches} optimizer steps, but an update has {episodes} episodes "
            "(learner.grpo.groups_per_batch x tasks.num_rollouts)",
            "lower learner.grpo.num_minibatches, or raise one of the others",
        )
