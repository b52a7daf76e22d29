"""Shaped rewards and group-relative advantages, as pure functions of rewards, and the registry of advantages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from deskrl.core.config import GrpoConfig
from deskrl.core.errors import UserError
from deskrl.core.registry import Extension, Registry, missing_arguments

MIN_REWARD_RANGE = 1e-6
"""Rewards whose range is not above this count as equal: their group has zero variance."""
STD_EPSILON = 1e-6
"""Added to the standard deviation, so that a zero-variance group has advantages of 0."""


def shaped_reward(reward: float, format_ok: bool, format_penalty: float) -> float:
    """Return the evaluator's reward, less the penalty if an action of the episode could not be parsed.

    Source: the format reward of ARPO (arXiv:2505.16282).
    """
    return reward if format_ok else reward - format_penalty


Advantage = Callable[[Sequence[float], Any], Sequence[float]]
"""Function `advantage(rewards, options)` of the shaped rewards of a group's trajectories, at least two, and an instance
of its own `Options` or None. It returns one advantage for each trajectory, which all of its action tokens share, and
depends on nothing else."""

ADVANTAGES: Registry[Advantage] = Registry(
    "advantage",
    "learner.grpo.advantage",
    "deskrl.advantages",
    lambda found: missing_arguments(found, "rewards", "options"),
)


def select_advantage(config: GrpoConfig) -> Extension[Advantage]:
    """Return the configured advantage with its options; raises UserError if it cannot be selected."""
    return ADVANTAGES.select(config.advantage, config.advantage_options)


@ADVANTAGES.register("centred")
def centred(rewards: Sequence[float], options: None = None) -> list[float]:
    """Return A_i = r_i - mean(r). Source: Dr. GRPO (arXiv:2503.20783)."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


@ADVANTAGES.register("standardised")
def standardised(rewards: Sequence[float], options: None = None) -> list[float]:
    """Return A_i = (r_i - mean(r)) / (std(r) + 1e-6), with the sample standard deviation (n - 1).

    Dividing by it gives more weight to tasks whose groups are one-sided. Sources: GRPO (arXiv:2402.03300), ARPO
    (arXiv:2505.16282).
    """
    scale = statistics.stdev(rewards) + STD_EPSILON
    return [advantage / scale for advantage in centred(rewards)]


def group_advantages(
    rewards: Sequence[float], advantage: Extension[Advantage], negative_advantage_scale: float = 1.0
) -> list[float]:
    """Return the advantage of each trajectory of a group.

    Args:
        rewards: shaped rewards of the group's trajectories, at least two.
        advantage: formula.
        negative_advantage_scale: factor of negative advantages.

    Raises:
        ValueError: the group has fewer than two trajectories.
        UserError: the formula did not return one finite number for each trajectory.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group needs at least two trajectories to have advantages, got {len(rewards)}")
    advantages = _checked(advantage, advantage.implementation(tuple(rewards), advantage.options), len(rewards))
    return [value if value >= 0 else value * negative_advantage_scale for value in advantages]


def _checked(advantage: Extension[Advantage], returned: Any, num_trajectories: int) -> list[float]:
    problem = None
    try:
        values = [float(value) for value in returned]
    except (TypeError, ValueError):
        problem = f"{type(returned).__name__} instead of a sequence of numbers"
    else:
        if len(values) != num_trajectories:
            problem = f"{len(values)} advantages for a group of {num_trajectories} trajectories"
        elif not all(map(math.isfinite, values)):
            problem = f"an advantage that is not finite: {next(it for it in values if not math.isfinite(it))}"
    if problem is not None:
        raise UserError(
            f"{ADVANTAGES.key}: {advantage.name} returned {problem}",
            "correct the function, or set learner.grpo.advantage to centred",
        )
    return values


def has_reward_variance(rewards: Sequence[float]) -> bool:
    """Return whether the rewards of a group differ, so that its advantages are not all 0."""
    return len(rewards) >= 2 and max(rewards) - min(rewards) > MIN_REWARD_RANGE
