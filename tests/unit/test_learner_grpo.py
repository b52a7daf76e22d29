"""From groups to what is learnt: rewards, advantages and the learning rate, on numbers worked out by hand."""

from typing import Any

import pytest

from deskrl.core.config import GrpoConfig
from deskrl.core.presets import PRESETS
from deskrl.core.trajectory import Step
from deskrl.learner.grpo import learning_rate, prepare
from deskrl.learner.select import Selection
from deskrl.learner.trajectories import Trajectory

ARPO = GrpoConfig.model_validate(PRESETS["arpo"]["learner"]["grpo"])


def trajectory(reward: float, num_tokens: int = 1, format_ok: bool = True) -> Trajectory:
    step = Step(0, "a", ("a",), "", (1, 2), tuple(range(num_tokens)), (-1.0,) * num_tokens)
    return Trajectory("e", "task", reward, (step,), format_ok)


def advantages_of(trajectories: list[Trajectory], config: GrpoConfig) -> list[float]:
    selection = Selection("train/0", "task", tuple(trajectories))
    values: list[float] = prepare([selection], lambda span: 0, config).advantages_T.tolist()
    return values


def test_one_success_of_eight_under_arpo() -> None:
    advantages = advantages_of([trajectory(1.0), *[trajectory(0.0) for _ in range(7)]], ARPO)
    assert advantages == pytest.approx([2.4749, *[-0.3536] * 7], abs=5e-5)


def test_one_success_of_eight_under_deskrl() -> None:
    advantages = advantages_of([trajectory(1.0), *[trajectory(0.0) for _ in range(7)]], GrpoConfig())
    assert advantages == pytest.approx([0.875, *[-0.125] * 7])


def test_an_unparsable_action_costs_half_a_reward_under_arpo() -> None:
    """Rewards 1, 0, 0 and -0.5: mean 0.125, sample standard deviation sqrt(1.1875 / 3) = 0.629153."""
    group = [trajectory(1.0), trajectory(0.0), trajectory(0.0), trajectory(0.0, format_ok=False)]
    assert advantages_of(group, ARPO) == pytest.approx([1.39076, -0.19868, -0.19868, -0.99340], abs=1e-4)


def test_the_tokens_of_a_trajectory_are_counted_over_its_rows() -> None:
    group = [trajectory(1.0, num_tokens=3), trajectory(0.0, num_tokens=5)]
    learnable = prepare([Selection("train/0", "task", tuple(group))], lambda span: 0, ARPO)
    assert learnable.num_tokens_T.tolist() == [3, 5]


@pytest.mark.parametrize(
    ("warmup_updates", "rates"),
    [(0, [1e-6, 1e-6, 1e-6]), (2, [0.0, 5e-7, 1e-6, 1e-6]), (4, [0.0, 2.5e-7, 5e-7, 7.5e-7, 1e-6])],
)
def test_the_learning_rate_rises_over_the_warm_up_as_arpos_schedule_does(
    warmup_updates: int, rates: list[float]
) -> None:
    config = GrpoConfig(learning_rate=1e-6, warmup_updates=warmup_updates)
    assert [learning_rate(config, number) for number in range(len(rates))] == pytest.approx(rates)


def test_arpos_batch_is_128_trajectories_in_two_optimizer_steps() -> None:
    preset: dict[str, Any] = dict(PRESETS["arpo"])
    num_trajectories = ARPO.groups_per_batch * preset["tasks"]["rollouts"]
    assert (num_trajectories, num_trajectories // ARPO.minibatches) == (128, 64)
