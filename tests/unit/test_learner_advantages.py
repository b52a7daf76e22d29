"""Advantages of a group and shaped rewards, with hand-computed numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from deskrl.core.errors import UserError
from deskrl.core.registry import Extension
from deskrl.learner.advantages import ADVANTAGES, group_advantages, has_reward_variance, shaped_reward

CENTRED, STANDARDISED = ADVANTAGES.select("centred"), ADVANTAGES.select("standardised")


def test_an_advantage_is_the_reward_minus_the_mean_of_the_group() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0], CENTRED) == [0.75, -0.25, -0.25, -0.25]


def test_a_centred_advantage_is_not_divided_by_the_standard_deviation() -> None:
    assert group_advantages([1.0, 0.0], CENTRED) == [0.5, -0.5]
    assert group_advantages([0.2, 0.0], CENTRED) == pytest.approx([0.1, -0.1])


def test_standardised_advantages_equal_those_of_arpo() -> None:
    """Eight rollouts, one success: mean 1/8, sample standard deviation sqrt(7/8 / 7) = 0.353553."""
    advantages = group_advantages([1.0, *[0.0] * 7], STANDARDISED)
    assert advantages[0] == pytest.approx(2.4749, abs=5e-5)
    assert advantages[1:] == pytest.approx([-0.3536] * 7, abs=5e-5)
    assert advantages[0] == pytest.approx(0.875 / (0.125**0.5 + 1e-6), rel=1e-12)


def test_standardised_advantages_are_0_for_two_equal_rewards_and_0_7_for_two_different_ones() -> None:
    assert group_advantages([0.3, 0.3], STANDARDISED) == [0.0, 0.0]
    assert group_advantages([1.0, 0.0], STANDARDISED) == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)


def test_the_format_penalty_is_subtracted_if_an_action_could_not_be_parsed() -> None:
    assert shaped_reward(1.0, True, 0.5) == 1.0
    assert shaped_reward(0.0, False, 0.5) == -0.5
    assert shaped_reward(1.0, False, 1.0) == 0.0


def test_the_negative_advantage_scale_multiplies_only_negative_advantages() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0], CENTRED, negative_advantage_scale=0.4) == pytest.approx(
        [0.75, -0.1, -0.1, -0.1]
    )


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_group_of_fewer_than_two_trajectories_is_rejected(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two trajectories"):
        group_advantages(rewards, CENTRED)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda rewards, options: [0.0], "returned 1 advantages for a group of 3 trajectories"),
        (lambda rewards, options: [0.0, math.nan, 1.0], "returned an advantage that is not finite: nan"),
        (lambda rewards, options: [math.inf] * 3, "returned an advantage that is not finite: inf"),
        (lambda rewards, options: None, "returned NoneType instead of a sequence of numbers"),
        (lambda rewards, options: ["high", "low", "low"], "returned list instead of a sequence of numbers"),
    ],
)
def test_advantages_that_cannot_be_trained_on_are_an_error_that_names_the_function(
    function: Callable[[Sequence[float], Any], Any], problem: str
) -> None:
    with pytest.raises(UserError, match=r"^learner\.grpo\.advantage: own:function " + problem):
        group_advantages([1.0, 0.0, 0.0], Extension("own:function", function, None))


def test_a_group_has_reward_variance_if_its_rewards_differ() -> None:
    assert has_reward_variance([0.0, 1.0])
    assert not has_reward_variance([1.0, 1.0])
    assert not has_reward_variance([0.3, 0.3 + 1e-9])
    assert not has_reward_variance([1.0])
