"""What a whole run takes: hours of training and evaluation, hours of GPUs and desktops, and their price. Pure.

The warm start is left out: it ends by itself, once the policy repeats its demonstrations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deskrl.core import devices
from deskrl.core.config import RunConfig
from deskrl.core.explain.batches import Batches
from deskrl.core.explain.timing import Assumptions, Timing


@dataclass(frozen=True)
class Whole:
    """A run from its first evaluation to its last."""

    num_updates: int
    """Until the run ends: by its last update, or by environment steps."""
    training_s: float
    num_evaluation_episodes: int | None
    """Before and after together; None where the number of tasks is not known, and no time is counted for them."""
    evaluation_s: float
    run_s: float
    num_gpus: int
    gpu_hours: float
    desktop_hours: float
    cost: float | None
    """In the unit of the prices; None where none is told."""


def add_up(config: RunConfig, batches: Batches, timing: Timing, assumed: Assumptions) -> Whole:
    """All updates and both evaluations, and what is paid for the time in between."""
    num_updates = _num_updates(batches, timing.steps)
    training_s = num_updates * timing.update_s
    of_one = batches.num_evaluation_episodes
    evaluation_s = 2 * math.ceil((of_one or 0) / timing.desktops) * timing.episode_s
    run_s = training_s + evaluation_s
    num_gpus = devices.num_gpus(config)
    gpu_hours, desktop_hours = num_gpus * run_s / 3600, timing.desktops * run_s / 3600
    cost = None
    if assumed.gpu_hour_price is not None or assumed.desktop_hour_price is not None:
        cost = gpu_hours * (assumed.gpu_hour_price or 0.0) + desktop_hours * (assumed.desktop_hour_price or 0.0)
    return Whole(
        num_updates=num_updates,
        training_s=training_s,
        num_evaluation_episodes=None if of_one is None else 2 * of_one,
        evaluation_s=evaluation_s,
        run_s=run_s,
        num_gpus=num_gpus,
        gpu_hours=gpu_hours,
        desktop_hours=desktop_hours,
        cost=cost,
    )


def _num_updates(batches: Batches, steps: float) -> int:
    if not batches.env_steps:
        return batches.num_updates
    return min(batches.num_updates, math.ceil(batches.env_steps / (batches.episodes_per_update * steps)))
