"""Advantages of a group, on numbers worked out by hand."""

import pytest

from deskrl.learner.advantages import group_advantages, has_spread, learnt_reward


def test_an_advantage_is_the_reward_minus_the_mean_of_the_group() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]


def test_no_standard_deviation_divides_it() -> None:
    """A group that is half solved and one that is hardly solved weigh what they weigh."""
    assert group_advantages([1.0, 0.0]) == [0.5, -0.5]
    assert group_advantages([0.2, 0.0]) == pytest.approx([0.1, -0.1])


def test_standardised_advantages_are_arpos() -> None:
    """Eight rollouts, one success: mean 1/8, sample standard deviation sqrt(7/8 / 7) = 0.353553."""
    advantages = group_advantages([1.0, *[0.0] * 7], kind="standardised")
    assert advantages[0] == pytest.approx(2.4749, abs=5e-5)
    assert advantages[1:] == pytest.approx([-0.3536] * 7, abs=5e-5)
    assert advantages[0] == pytest.approx(0.875 / (0.125**0.5 + 1e-6), rel=1e-12)


def test_two_alike_have_standardised_advantages_of_zero_and_two_different_ones_of_0_7() -> None:
    assert group_advantages([0.3, 0.3], kind="standardised") == [0.0, 0.0]
    assert group_advantages([1.0, 0.0], kind="standardised") == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)


def test_the_format_penalty_is_taken_from_the_reward_of_an_unparsable_end() -> None:
    assert learnt_reward(1.0, True, 0.5) == 1.0
    assert learnt_reward(0.0, False, 0.5) == -0.5
    assert learnt_reward(1.0, False, 1.0) == 0.0


def test_negative_scale_touches_negative_advantages_only() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0], negative_scale=0.4) == pytest.approx([0.75, -0.1, -0.1, -0.1])


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_group_of_fewer_than_two_is_refused(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="two trajectories"):
        group_advantages(rewards)


def test_spread_tells_good_from_bad() -> None:
    assert has_spread([0.0, 1.0])
    assert not has_spread([1.0, 1.0])
    assert not has_spread([0.3, 0.3 + 1e-9])
    assert not has_spread([1.0])
