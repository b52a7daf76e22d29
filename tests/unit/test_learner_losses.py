"""The policy loss, token by token, on numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deskrl.learner.losses import PolicyLoss, imitation_loss, policy_loss, token_denominators


def loss_of(
    current: list[float],
    prox: list[float],
    behaviour: list[float],
    advantages: list[float],
    uncorrected: list[bool] | None = None,
    denominator: float | Tensor = 1.0,
    dual_clip: float = 0.0,
) -> tuple[PolicyLoss, Tensor]:
    logprobs = torch.tensor(current, requires_grad=True)
    result = policy_loss(
        logprobs,
        torch.tensor(prox),
        torch.tensor(behaviour),
        torch.tensor(advantages),
        torch.tensor(uncorrected or [False] * len(current)),
        denominator,
        clip_low=0.2,
        clip_high=0.3,
        importance_cap=2.0,
        dual_clip=dual_clip,
    )
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    return replace(result, loss=result.loss.detach()), gradient


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    result, gradient = loss_of([-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], [0.75, -0.25])
    assert float(result.loss) == pytest.approx(-0.5)
    assert gradient.tolist() == pytest.approx([-0.75, 0.25])


def test_the_denominator_is_a_constant_and_not_the_number_of_tokens() -> None:
    short, _ = loss_of([-1.0], [-1.0], [-1.0], [1.0], denominator=4.0)
    long, _ = loss_of([-1.0] * 3, [-1.0] * 3, [-1.0] * 3, [1.0] * 3, denominator=4.0)
    assert float(short.loss) == pytest.approx(-0.25)
    assert float(long.loss) == pytest.approx(-0.75)


def test_a_good_token_stops_being_pushed_at_ratio_1_3() -> None:
    result, gradient = loss_of([math.log(1.5), math.log(1.2)], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0])
    assert float(result.loss) == pytest.approx(-(1.3 + 1.2))
    assert gradient.tolist() == pytest.approx([0.0, -1.2])
    assert result.clipped_N.tolist() == [True, False]


def test_a_bad_token_stops_being_pushed_at_ratio_0_8() -> None:
    result, gradient = loss_of([math.log(0.5), math.log(0.9)], [0.0, 0.0], [0.0, 0.0], [-1.0, -1.0])
    assert float(result.loss) == pytest.approx(0.8 + 0.9)
    assert gradient.tolist() == pytest.approx([0.0, 0.9])
    assert result.clipped_N.tolist() == [True, False]


def test_a_bad_token_that_became_likelier_is_pushed_back_without_limit() -> None:
    result, gradient = loss_of([math.log(3.0)], [0.0], [0.0], [-1.0])
    assert float(result.loss) == pytest.approx(3.0)
    assert gradient.tolist() == pytest.approx([3.0])


def test_with_a_dual_clip_it_is_pushed_back_up_to_ratio_3_and_no_good_token_is_touched() -> None:
    """Ratios 4, 2 and 4 with advantages -0.5, -0.5 and 1: the losses are 3 * 0.5, 2 * 0.5 and -1.3."""
    ratios = [math.log(4.0), math.log(2.0), math.log(4.0)]
    result, gradient = loss_of(ratios, [0.0] * 3, [0.0] * 3, [-0.5, -0.5, 1.0], dual_clip=3.0)
    assert float(result.loss) == pytest.approx(1.5 + 1.0 - 1.3)
    assert gradient.tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert result.clipped_N.tolist() == [True, False, True]


def test_the_loss_can_be_the_mean_of_the_trajectories_own_means() -> None:
    """Two trajectories of one and three tokens: each token weighs 1/1/2 or 1/3/2."""
    denominators_T = token_denominators(torch.tensor([1, 3]), 2, "trajectory_tokens", 64)
    assert denominators_T.tolist() == [2.0, 6.0]
    denominators_N = denominators_T[torch.tensor([0, 1, 1, 1])]
    result, gradient = loss_of([-1.0] * 4, [-1.0] * 4, [-1.0] * 4, [1.0, -1.0, -1.0, -1.0], denominator=denominators_N)
    assert float(result.loss) == pytest.approx(-0.5 + 0.5, abs=1e-6)
    assert gradient.tolist() == pytest.approx([-1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_a_constant_denominator_knows_the_number_of_trajectories_alone() -> None:
    assert token_denominators(torch.tensor([1, 3, 0]), 2, "constant", 64).tolist() == [128.0] * 3
    assert token_denominators(torch.tensor([0]), 1, "trajectory_tokens", 64).tolist() == [1.0]


def test_stale_tokens_weigh_by_their_importance_truncated_at_2() -> None:
    """prox / behaviour is 1.5, 0.5 and 4."""
    prox = [math.log(0.6), math.log(0.2), math.log(0.8)]
    behaviour = [math.log(0.4), math.log(0.4), math.log(0.2)]
    result, gradient = loss_of(prox, prox, behaviour, [1.0, 1.0, 1.0])
    assert result.importance_N.tolist() == pytest.approx([1.5, 0.5, 2.0])
    assert gradient.tolist() == pytest.approx([-1.5, -0.5, -2.0])


def test_a_replayed_success_may_start_from_ratio_1_whatever_its_stored_logprobs() -> None:
    """Nine nats away, its own weight would be 0.0001: no rescue for a collapsed task."""
    truncated, gradient = loss_of([-9.5], [-9.5], [-0.5], [1.0])
    assert float(truncated.importance_N) == pytest.approx(math.exp(-9))
    uncorrected, gradient = loss_of([-9.5], [-9.5], [-0.5], [1.0], uncorrected=[True])
    assert float(uncorrected.importance_N) == 1.0
    assert gradient.tolist() == pytest.approx([-1.0])


def test_no_gradient_flows_through_the_policy_that_the_update_starts_from() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    result = policy_loss(
        logprobs, logprobs, torch.tensor([-1.5]), torch.tensor([1.0]), torch.tensor([False]), 1.0, 0.2, 0.3, 2.0
    )
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert float(gradient) == pytest.approx(-math.exp(0.5))


def test_imitation_is_cross_entropy_over_a_constant() -> None:
    assert float(imitation_loss(torch.tensor([-1.0, -3.0]), 2.0)) == pytest.approx(2.0)
