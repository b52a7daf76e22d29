"""Rewards as they are learnt from, and advantages of a group, as pure functions. Knows no tokens and no model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

SPREAD = 1e-6
"""Rewards closer together than this are equal: such a group says nothing."""
STD_FLOOR = 1e-6
"""Added to the standard deviation, so that a group without spread has advantages of 0."""


def learnt_reward(reward: float, format_ok: bool, format_penalty: float) -> float:
    """The reward that advantages are made of: the evaluator's, less the penalty where an action could not be parsed."""
    return reward if format_ok else reward - format_penalty


def group_advantages(
    rewards: Sequence[float], negative_scale: float = 1.0, kind: Literal["centred", "standardised"] = "centred"
) -> list[float]:
    """One advantage for each trajectory of a group; each of its action tokens gets the same.

    Args:
        rewards: of the group's trajectories.
        negative_scale: multiplies negative advantages.
        kind: `centred`: reward minus the group's mean. `standardised`: that divided by the sample standard deviation
            (n - 1) + 1e-6, as ARPO has it; it weighs tasks by how one-sided their groups are.

    Raises:
        ValueError: fewer than two trajectories have no mean to stand out from.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)} has no advantage; two trajectories are the least")
    mean = sum(rewards) / len(rewards)
    scale = 1.0 if kind == "centred" else statistics.stdev(rewards) + STD_FLOOR
    gains = [(reward - mean) / scale for reward in rewards]
    return [gain if gain >= 0 else gain * negative_scale for gain in gains]


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether the rewards tell good from bad."""
    return len(rewards) >= 2 and max(rewards) - min(rewards) > SPREAD
