"""Advantages of a group, as pure functions of its rewards. Knows no tokens and no model."""

from __future__ import annotations

from collections.abc import Sequence

SPREAD = 1e-6
"""Rewards closer together than this are equal: such a group says nothing."""


def group_advantages(rewards: Sequence[float], negative_scale: float = 1.0) -> list[float]:
    """Reward minus the group's mean, one for each trajectory; each of its action tokens gets the same.

    No division by the standard deviation: it would weigh tasks by how one-sided their groups are.

    Args:
        rewards: of the group's trajectories.
        negative_scale: multiplies negative advantages.

    Raises:
        ValueError: fewer than two trajectories have no mean to stand out from.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)} has no advantage; two trajectories are the least")
    mean = sum(rewards) / len(rewards)
    return [gain if gain >= 0 else gain * negative_scale for gain in (reward - mean for reward in rewards)]


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether the rewards tell good from bad."""
    return len(rewards) >= 2 and max(rewards) - min(rewards) > SPREAD
