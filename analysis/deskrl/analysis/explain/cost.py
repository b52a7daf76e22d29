"""Duration and cost of a whole run: hours of training and evaluation, GPU hours, desktop hours and their price.

The warm start is not included: it ends when the policy reproduces its demonstrations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deskrl.analysis.explain.update_time import Assumptions, UpdateTiming
from deskrl.core.config import RunConfig
from deskrl.launch import gpu_assignment
from deskrl.launch.sizing.batch_sizes import BatchSizes


@dataclass(frozen=True)
class RunCost:
    """Duration and cost of a run, from its first evaluation to its last."""

    num_updates: int
    """Updates until the run ends, at its last update or at its limit of environment steps."""
    training_s: float
    num_evaluation_episodes: int | None
    """Episodes of both evaluations; None, and counted as no time, if the number of tasks is unknown."""
    evaluation_s: float
    run_s: float
    num_gpus: int
    gpu_hours: float
    desktop_hours: float
    cost: float | None
    """Cost in the currency of the prices; None if no price is given."""


def estimate_run_cost(config: RunConfig, batches: BatchSizes, timing: UpdateTiming, assumed: Assumptions) -> RunCost:
    """Estimate duration and cost of all updates and both evaluations."""
    num_updates = _num_updates(batches, timing.steps)
    training_s = num_updates * timing.update_s
    per_evaluation = batches.num_evaluation_episodes
    evaluation_s = 2 * math.ceil((per_evaluation or 0) / timing.desktops) * timing.episode_s
    run_s = training_s + evaluation_s
    num_gpus = gpu_assignment.num_gpus(config)
    gpu_hours, desktop_hours = num_gpus * run_s / 3600, timing.desktops * run_s / 3600
    cost = None
    if assumed.gpu_hour_price is not None or assumed.desktop_hour_price is not None:
        cost = gpu_hours * (assumed.gpu_hour_price or 0.0) + desktop_hours * (assumed.desktop_hour_price or 0.0)
    return RunCost(
        num_updates=num_updates,
        training_s=training_s,
        num_evaluation_episodes=None if per_evaluation is None else 2 * per_evaluation,
        evaluation_s=evaluation_s,
        run_s=run_s,
        num_gpus=num_gpus,
        gpu_hours=gpu_hours,
        desktop_hours=desktop_hours,
        cost=cost,
    )


def _num_updates(batches: BatchSizes, steps: float) -> int:
    if not batches.env_steps:
        return batches.num_updates
    return min(batches.num_updates, math.ceil(batches.env_steps / (batches.episodes_per_update * steps)))
