"""Contract suite of advantages (`learner.grpo.advantage`).

Derive from `AdvantageSuite` in a test module, and run it with pytest:

    from deskrl.testing.advantages import AdvantageSuite

    class TestMine(AdvantageSuite):
        selection = "my_advantages:mine"
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from deskrl.core.registry import Extension
from deskrl.learner.advantages import ADVANTAGES, Advantage, group_advantages

GROUPS = (
    (1.0, 0.0),
    (0.0, 0.0),
    (1.0, 1.0, 1.0),
    (0.25, 0.5, 0.0),
    (1.0, 0.0, -0.5, 0.0),
    (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.9, 1.0, 0.1, 0.3, 0.3, 0.6, 0.0, 1.0),
)
"""Shaped rewards of groups: failures, successes, partial rewards and penalties."""


class AdvantageSuite:
    """Checks of one advantage."""

    selection: str
    """Value of `learner.grpo.advantage`."""
    options: Mapping[str, Any] = {}
    """Value of `learner.grpo.advantage_options`."""

    @pytest.fixture
    def advantage(self) -> Extension[Advantage]:
        """Provide the selected advantage."""
        return ADVANTAGES.select(self.selection, self.options)

    @pytest.mark.parametrize("rewards", GROUPS)
    def test_each_trajectory_has_one_finite_advantage(
        self, advantage: Extension[Advantage], rewards: Sequence[float]
    ) -> None:
        group_advantages(rewards, advantage)  # raises UserError

    @pytest.mark.parametrize("rewards", GROUPS)
    def test_the_advantages_are_the_same_for_the_same_rewards(
        self, advantage: Extension[Advantage], rewards: Sequence[float]
    ) -> None:
        first = group_advantages(rewards, advantage)
        group_advantages((0.5, 0.1, 0.7), advantage)
        assert group_advantages(rewards, advantage) == first, "a second call returned other advantages"

    @pytest.mark.parametrize("rewards", GROUPS)
    def test_the_order_of_the_trajectories_does_not_matter(
        self, advantage: Extension[Advantage], rewards: Sequence[float]
    ) -> None:
        expected = group_advantages(rewards, advantage)[::-1]
        reversed_group = group_advantages(rewards[::-1], advantage)
        assert reversed_group == pytest.approx(expected, abs=1e-9), "an advantage depends on the place in the group"

    @pytest.mark.parametrize("rewards", GROUPS)
    def test_a_higher_reward_never_has_a_lower_advantage(
        self, advantage: Extension[Advantage], rewards: Sequence[float]
    ) -> None:
        pairs = sorted(zip(rewards, group_advantages(rewards, advantage), strict=True))
        advantages = [value for _, value in pairs]
        falls = [(low, high) for low, high in itertools.pairwise(pairs) if high[1] < low[1] - 1e-9]
        assert not falls, f"(reward, advantage) falls from one trajectory to the next better one: {falls}"
        if len(set(rewards)) > 1:
            assert advantages[0] < advantages[-1], "the best and the worst trajectory have the same advantage"
