"""Policy loss of single tokens, with hand-computed numbers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deskrl.core.config import GrpoConfig, KlEstimator
from deskrl.learner.loss_interface import LossInputs, LossResult
from deskrl.learner.losses import (
    cispo_loss,
    gspo_loss,
    imitation_loss,
    kl_divergence,
    policy_loss,
    regularised,
    token_denominators,
    turn_means,
)

CONFIG = GrpoConfig(clip_low=0.2, clip_high=0.3, importance_cap=2.0)


def inputs_of(
    logprobs_N: Tensor,
    prox_logprobs_N: Tensor,
    behaviour_logprobs_N: Tensor,
    advantages: list[float],
    from_buffer: list[bool] | None = None,
    turns: list[int] | None = None,
    denominator: float | Tensor = 1.0,
) -> LossInputs:
    return LossInputs(
        logprobs_N=logprobs_N,
        prox_logprobs_N=prox_logprobs_N,
        behaviour_logprobs_N=behaviour_logprobs_N,
        advantages_N=torch.tensor(advantages),
        entropy_N=torch.zeros(len(advantages)),
        from_buffer_N=torch.tensor(from_buffer or [False] * len(advantages)),
        turn_N=torch.tensor(turns or [0] * len(advantages)),
        denominators_N=torch.as_tensor(denominator).expand(len(advantages)),
    )


def differentiate(result: LossResult, logprobs_N: Tensor) -> tuple[LossResult, Tensor]:
    """Return a result without gradient, and its gradient."""
    (gradient,) = torch.autograd.grad(result.loss, logprobs_N)
    return replace(result, loss=result.loss.detach()), gradient


def loss_of(
    current: list[float],
    prox: list[float],
    behaviour: list[float],
    advantages: list[float],
    from_buffer: list[bool] | None = None,
    denominator: float | Tensor = 1.0,
    config: GrpoConfig = CONFIG,
) -> tuple[LossResult, Tensor]:
    logprobs = torch.tensor(current, requires_grad=True)
    sampled = torch.tensor(prox), torch.tensor(behaviour)
    inputs = inputs_of(logprobs, *sampled, advantages, from_buffer, denominator=denominator)
    return differentiate(policy_loss(inputs, config), logprobs)


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    result, gradient = loss_of([-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], [0.75, -0.25])
    assert float(result.loss) == pytest.approx(-0.5)
    assert gradient.tolist() == pytest.approx([-0.75, 0.25])


def test_the_loss_is_divided_by_the_denominator_whatever_the_number_of_tokens() -> None:
    short, _ = loss_of([-1.0], [-1.0], [-1.0], [1.0], denominator=4.0)
    long, _ = loss_of([-1.0] * 3, [-1.0] * 3, [-1.0] * 3, [1.0] * 3, denominator=4.0)
    assert float(short.loss) == pytest.approx(-0.25)
    assert float(long.loss) == pytest.approx(-0.75)


def test_a_token_of_positive_advantage_has_no_gradient_above_ratio_1_3() -> None:
    result, gradient = loss_of([math.log(1.5), math.log(1.2)], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0])
    assert float(result.loss) == pytest.approx(-(1.3 + 1.2))
    assert gradient.tolist() == pytest.approx([0.0, -1.2])
    assert result.clipped_N.tolist() == [True, False]


def test_a_token_of_negative_advantage_has_no_gradient_below_ratio_0_8() -> None:
    result, gradient = loss_of([math.log(0.5), math.log(0.9)], [0.0, 0.0], [0.0, 0.0], [-1.0, -1.0])
    assert float(result.loss) == pytest.approx(0.8 + 0.9)
    assert gradient.tolist() == pytest.approx([0.0, 0.9])
    assert result.clipped_N.tolist() == [True, False]


def test_the_gradient_of_a_token_of_negative_advantage_is_unbounded_without_a_dual_clip() -> None:
    result, gradient = loss_of([math.log(3.0)], [0.0], [0.0], [-1.0])
    assert float(result.loss) == pytest.approx(3.0)
    assert gradient.tolist() == pytest.approx([3.0])


def test_a_dual_clip_bounds_only_tokens_of_negative_advantage_above_ratio_3() -> None:
    """Ratios 4, 2 and 4 with advantages -0.5, -0.5 and 1: the losses are 3 * 0.5, 2 * 0.5 and -1.3."""
    ratios = [math.log(4.0), math.log(2.0), math.log(4.0)]
    clipped = CONFIG.model_copy(update={"dual_clip": 3.0})
    result, gradient = loss_of(ratios, [0.0] * 3, [0.0] * 3, [-0.5, -0.5, 1.0], config=clipped)
    assert float(result.loss) == pytest.approx(1.5 + 1.0 - 1.3)
    assert gradient.tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert result.clipped_N.tolist() == [True, False, True]


def test_with_trajectory_tokens_the_loss_is_the_mean_of_the_trajectory_means() -> None:
    """Two trajectories of one and three tokens: the weight of a token is 1/1/2 or 1/3/2."""
    denominators_T = token_denominators(torch.tensor([1, 3]), 2, "trajectory_tokens", 64)
    assert denominators_T.tolist() == [2.0, 6.0]
    denominators_N = denominators_T[torch.tensor([0, 1, 1, 1])]
    result, gradient = loss_of([-1.0] * 4, [-1.0] * 4, [-1.0] * 4, [1.0, -1.0, -1.0, -1.0], denominator=denominators_N)
    assert float(result.loss) == pytest.approx(-0.5 + 0.5, abs=1e-6)
    assert gradient.tolist() == pytest.approx([-1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_a_constant_denominator_depends_only_on_the_number_of_trajectories() -> None:
    assert token_denominators(torch.tensor([1, 3, 0]), 2, "constant", 64).tolist() == [128.0] * 3
    assert token_denominators(torch.tensor([0]), 1, "trajectory_tokens", 64).tolist() == [1.0]


def test_stale_tokens_have_importance_weights_truncated_at_2() -> None:
    """prox / behaviour is 1.5, 0.5 and 4."""
    prox = [math.log(0.6), math.log(0.2), math.log(0.8)]
    behaviour = [math.log(0.4), math.log(0.4), math.log(0.2)]
    result, gradient = loss_of(prox, prox, behaviour, [1.0, 1.0, 1.0])
    assert result.importance_N.tolist() == pytest.approx([1.5, 0.5, 2.0])
    assert gradient.tolist() == pytest.approx([-1.5, -0.5, -2.0])


def test_a_token_of_a_stored_success_has_importance_weight_1_whatever_its_behaviour_logprob() -> None:
    """At a difference of nine nats, the importance weight would be 0.0001."""
    truncated, _ = loss_of([-9.5], [-9.5], [-0.5], [1.0])
    assert float(truncated.importance_N) == pytest.approx(math.exp(-9))
    stored, gradient = loss_of([-9.5], [-9.5], [-0.5], [1.0], from_buffer=[True])
    assert float(stored.importance_N) == 1.0
    assert gradient.tolist() == pytest.approx([-1.0])


def test_success_weighting_decides_whether_a_stored_success_has_its_truncated_importance_weight() -> None:
    """One fresh token with prox / behaviour = 1.5, then tokens of a stored success with 0.5 and 4, truncated at 2."""
    prox = [math.log(0.6), math.log(0.2), math.log(0.8)]
    behaviour = [math.log(0.4), math.log(0.4), math.log(0.2)]
    expected = {"one": [1.5, 1.0, 1.0], "truncated": [1.5, 0.5, 2.0]}
    for weighting, weights in expected.items():
        config = CONFIG.model_copy(update={"success_weighting": weighting})
        result, gradient = loss_of(prox, prox, behaviour, [1.0] * 3, [False, True, True], config=config)
        assert result.importance_N.tolist() == pytest.approx(weights)
        assert gradient.tolist() == pytest.approx([-weight for weight in weights])
        uniform = config.model_copy(update={"importance_weighting": "off"})
        result, _ = loss_of(prox, prox, behaviour, [1.0] * 3, [False, True, True], config=uniform)
        assert result.importance_N.tolist() == [1.0] * 3


def test_no_gradient_flows_through_the_proximal_policy() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    inputs = inputs_of(logprobs, logprobs, torch.tensor([-1.5]), [1.0])
    _, gradient = differentiate(policy_loss(inputs, CONFIG), logprobs)
    assert float(gradient) == pytest.approx(-math.exp(0.5))


def test_the_imitation_loss_is_cross_entropy_divided_by_the_denominator() -> None:
    assert float(imitation_loss(torch.tensor([-1.0, -3.0]), 2.0)) == pytest.approx(2.0)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([math.log(value) for value in probabilities])


def gspo_of(
    ratios: list[float],
    turns: list[int],
    advantages: list[float],
    behaviour_logprobs_N: Tensor | None = None,
    from_buffer: list[bool] | None = None,
    denominator: float | Tensor = 2.0,
) -> tuple[LossResult, Tensor]:
    """Return the loss of tokens with these ratios pi / pi_prox, clipped at 0.8 and 1.3."""
    logprobs, prox_N = logs(*ratios).requires_grad_(), torch.zeros(len(ratios))
    behaviour_N = prox_N if behaviour_logprobs_N is None else behaviour_logprobs_N
    inputs = inputs_of(logprobs, prox_N, behaviour_N, advantages, from_buffer, turns, denominator)
    return differentiate(gspo_loss(inputs, CONFIG, clip_low=0.2, clip_high=0.3), logprobs)


def test_the_ratio_of_gspo_is_the_geometric_mean_over_the_tokens_of_a_turn() -> None:
    """Turn 0 has the ratio sqrt(2 * 0.5) = 1, turn 1 the ratio 1.2; the single-token ratios 2 and 0.5 do not clip."""
    result, gradient = gspo_of([2.0, 0.5, 1.2], [0, 0, 1], [1.0, 1.0, 0.5])
    assert result.metrics["turn_ratio"].tolist() == pytest.approx([1.0, 1.0, 1.2])
    assert float(result.loss) == pytest.approx(-(1.0 + 1.0 + 0.6) / 2)
    assert gradient.tolist() == pytest.approx([-0.5, -0.5, -0.3]), "s_k A / denominator for each token of the turn"
    assert result.clipped_N.tolist() == [False, False, False]


def test_gspo_clips_all_tokens_of_a_turn_together() -> None:
    """Ratios sqrt(4 * 1) = 2 with A = 1, clipped at 1.3; sqrt(0.25 * 1) = 0.5 with A = -1, clipped at 0.8."""
    result, gradient = gspo_of([4.0, 1.0, 0.25, 1.0], [0, 0, 1, 1], [1.0, 1.0, -1.0, -1.0])
    assert float(result.loss) == pytest.approx((-1.3 * 2 + 0.8 * 2) / 2)
    assert gradient.tolist() == [0.0] * 4
    assert result.clipped_N.tolist() == [True] * 4


def test_gspo_of_one_turn_per_episode_is_the_mean_of_the_papers_sequence_objectives() -> None:
    """Episodes of 1 and 3 tokens with ratios 1.1 and 0.9: -(1.1 * 1 + 0.9 * -1) / 2, with their own denominators."""
    denominators_N = token_denominators(torch.tensor([1, 3]), 2, "trajectory_tokens", 64)[torch.tensor([0, 1, 1, 1])]
    result, gradient = gspo_of([1.1, 0.9, 0.9, 0.9], [0, 1, 1, 1], [1.0, -1.0, -1.0, -1.0], denominator=denominators_N)
    assert float(result.loss) == pytest.approx(-(1.1 - 0.9) / 2)
    assert gradient.tolist() == pytest.approx([-1.1 / 2, *[0.9 / 2 / 3] * 3])


def test_gspo_corrects_stale_turns_by_a_truncated_weight_of_the_whole_turn() -> None:
    """prox / behaviour of the turns: sqrt(1 * 2.25) = 1.5; 4, truncated at 2; 4, but from the success buffer."""
    result, gradient = gspo_of(
        [1.0] * 4,
        [0, 0, 1, 2],
        [1.0] * 4,
        behaviour_logprobs_N=logs(1.0, 1 / 2.25, 0.25, 0.25),
        from_buffer=[False, False, False, True],
    )
    assert result.importance_N.tolist() == pytest.approx([1.5, 1.5, 2.0, 1.0])
    assert gradient.tolist() == pytest.approx([-0.75, -0.75, -1.0, -0.5])


def test_turn_means_accept_turns_in_any_order_and_no_tokens() -> None:
    assert turn_means(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([1, 0, 1])).tolist() == [2.0, 5.0, 2.0]
    assert turn_means(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_cispo_bounds_the_ratio_and_keeps_the_gradient() -> None:
    """Ratios 1, 5 and 0.1 at logprob -1, bounded above by 4 and not below; importance 1, 1 and 2; denominator 2."""
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    prox = torch.tensor([-1.0, -1.0 - math.log(5.0), -1.0 - math.log(0.1)])
    behaviour = prox - torch.tensor([0.0, 0.0, math.log(3.0)])
    inputs = inputs_of(logprobs, prox, behaviour, [0.5, 0.5, -1.0], [False, True, False], denominator=2.0)
    result, gradient = differentiate(cispo_loss(inputs, CONFIG, clip_high=3.0), logprobs)
    assert result.importance_N.tolist() == pytest.approx([1.0, 1.0, 2.0])
    assert gradient.tolist() == pytest.approx([-0.25, -1.0, 0.1])
    assert float(result.loss) == pytest.approx(0.25 + 1.0 - 0.1)
    assert result.clipped_N.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("estimator", "values", "slopes"),
    [
        # x = log pi_ref - log pi is ln 2, -ln 4 and 0; the slope is the derivative by log pi.
        ("k1", [-math.log(2), math.log(4), 0.0], [1.0, 1.0, 1.0]),
        ("k2", [math.log(2) ** 2 / 2, math.log(4) ** 2 / 2, 0.0], [-math.log(2), math.log(4), 0.0]),
        ("k3", [1 - math.log(2), 0.25 - 1 + math.log(4), 0.0], [-1.0, 0.75, 0.0]),
        ("abs", [math.log(2), math.log(4), 0.0], [-1.0, 1.0, 0.0]),
    ],
)
def test_estimators_of_the_kl_divergence(estimator: KlEstimator, values: list[float], slopes: list[float]) -> None:
    logprobs, reference = logs(0.25, 0.8, 0.5).requires_grad_(), logs(0.5, 0.2, 0.5)
    kl_N = kl_divergence(logprobs, reference, estimator)
    (gradient,) = torch.autograd.grad(kl_N.sum(), logprobs)
    assert kl_N.tolist() == pytest.approx(values, abs=1e-6)
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-6)


def test_k3_is_at_most_10_and_has_a_finite_gradient_however_far_the_reference_is() -> None:
    logprobs = torch.tensor([-200.0, -1.0, -3.0], requires_grad=True)
    kl_N = kl_divergence(logprobs, torch.tensor([-1.0, -200.0, -1.0]), "k3")
    (gradient,) = torch.autograd.grad(kl_N.sum(), logprobs)
    assert kl_N.tolist() == pytest.approx([10.0, 10.0, math.exp(2) - 3])
    assert gradient.tolist() == pytest.approx([0.0, 0.0, 1 - math.exp(2)])


def test_k1_and_k3_are_unbiased_estimates_of_the_divergence() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    divergence = float((policy * (policy / reference).log()).sum())
    for estimator in ("k1", "k3"):
        assert float((policy * kl_divergence(policy.log(), reference.log(), estimator)).sum()) == pytest.approx(
            divergence, abs=1e-6
        )


def test_kl_penalty_and_entropy_bonus_are_divided_by_the_denominator_of_each_token() -> None:
    """-1 + 0.1 * (2 / 4 + 6 / 2) - 0.2 * (1 / 4 + 3 / 2)"""
    kl_N, entropy_N = torch.tensor([2.0, 6.0]), torch.tensor([1.0, 3.0])
    loss = regularised(torch.tensor(-1.0), kl_N, entropy_N, torch.tensor([4.0, 2.0]), 0.1, 0.2)
    assert float(loss) == pytest.approx(-1 + 0.35 - 0.35)


def test_coefficients_of_0_leave_the_loss_as_it_is() -> None:
    loss = torch.tensor(-1.0)
    assert regularised(loss, torch.ones(2), torch.ones(2), torch.ones(2), 0.0, 0.0) is loss
    assert regularised(loss, None, torch.ones(2), torch.ones(2), 0.1, 0.0) is loss
