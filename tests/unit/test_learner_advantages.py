"""Advantages of a group, on numbers worked out by hand."""

import pytest

from deskrl.learner.advantages import group_advantages, has_spread


def test_an_advantage_is_the_reward_minus_the_mean_of_the_group() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]


def test_no_standard_deviation_divides_it() -> None:
    """A group that is half solved and one that is hardly solved weigh what they weigh."""
    assert group_advantages([1.0, 0.0]) == [0.5, -0.5]
    assert group_advantages([0.2, 0.0]) == pytest.approx([0.1, -0.1])


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
