"""Policy losses, their regularisation and the imitation loss, as pure functions of the tokens of a micro-batch.

Every tensor is flat over action tokens (suffix N). A turn is one step of an episode: the tokens of one action.

An asynchronous update involves three policies: the behaviour policy, which sampled the tokens, the proximal policy,
from which the update starts, and the current policy, which is being changed (decoupled PPO, arXiv:2110.00641). The
ratio current / proximal is clipped token by token as in PPO (arXiv:1707.06347). The weight proximal / behaviour
corrects for staleness; it is truncated, so that no single token dominates (truncated importance sampling).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from deskrl.core.config import GrpoConfig, KlEstimator
from deskrl.learner.loss_interface import LossInputs, LossResult

_MAX_LOG_RATIO, _MAX_K3 = 20.0, 10.0
"""Bounds of the estimator k3: of the difference of logprobs, and of the estimate."""


def policy_loss(inputs: LossInputs, config: GrpoConfig) -> LossResult:
    """Return the token-level clipped policy-gradient loss with truncated importance weights.

        w_t    = min(pi_prox / pi_behaviour, importance_cap)      1 for uncorrected tokens
        r_t    = pi / pi_prox
        gain_t = min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
        gain_t = max(gain_t, dual_clip A_t)                       if dual_clip > 0 and A_t < 0
        loss   = -sum_t w_t gain_t / denominator_t

    Sources: PPO (arXiv:1707.06347) for the clipped objective, DAPO (arXiv:2503.14476) for separate lower and upper
    bounds, Ye et al. (arXiv:1912.09729) for the dual clip, decoupled PPO (arXiv:2110.00641) for the proximal policy.

    Args:
        inputs: tokens of a micro-batch.
        config: bounds of the ratio and of the importance weights.
    """
    prox_logprobs_N, advantages_N = inputs.prox_logprobs_N.detach(), inputs.advantages_N
    importance_N = _importance_weights(prox_logprobs_N - inputs.behaviour_logprobs_N, inputs, config)
    ratio_N = (inputs.logprobs_N - prox_logprobs_N).exp()
    gain_N = ratio_N * advantages_N
    clipped_gain_N = torch.minimum(gain_N, ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages_N)
    if config.dual_clip:
        bound_N = config.dual_clip * advantages_N
        floor_N = torch.where(advantages_N < 0, bound_N, torch.full_like(advantages_N, -math.inf))
        clipped_gain_N = torch.maximum(clipped_gain_N, floor_N)
    loss = -(importance_N * clipped_gain_N / inputs.denominators_N).sum()
    return LossResult(loss=loss, clipped_N=(clipped_gain_N != gain_N).detach(), importance_N=importance_N)


def gspo_loss(inputs: LossInputs, config: GrpoConfig, clip_low: float, clip_high: float) -> LossResult:
    """Return the loss of GSPO, whose ratios are those of whole turns, normalised by their lengths.

        w_k    = min(exp(mean_k(log pi_prox - log pi_behaviour)), importance_cap)    1 for uncorrected tokens
        s_k    = exp(mean_k(log pi - log pi_prox))
        gain_k = min(s_k A_k, clip(s_k, 1 - clip_low, 1 + clip_high) A_k)
        loss   = -sum_t w_k gain_k / denominator_t

    mean_k is the mean over the tokens of turn k, and t is a token of turn k. All tokens of a turn have the same
    gradient, and the loss counts a turn as often as it has tokens; `trajectory_tokens` as the denominator therefore
    gives the paper's mean over sequences if an episode has one turn. Source: GSPO (arXiv:2507.18071, section 4.1).

    Args:
        inputs: tokens of a micro-batch.
        config: bound of the importance weights.
        clip_low: the ratio of a turn is clipped below 1 - clip_low.
        clip_high: the ratio of a turn is clipped above 1 + clip_high.
    """
    prox_logprobs_N, advantages_N = inputs.prox_logprobs_N.detach(), inputs.advantages_N
    log_ratio_N = turn_means(prox_logprobs_N - inputs.behaviour_logprobs_N, inputs.turn_N)
    importance_N = _importance_weights(log_ratio_N, inputs, config)
    ratio_N = turn_means(inputs.logprobs_N - prox_logprobs_N, inputs.turn_N).exp()
    gain_N = ratio_N * advantages_N
    clipped_gain_N = torch.minimum(gain_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N)
    loss = -(importance_N * clipped_gain_N / inputs.denominators_N).sum()
    return LossResult(loss, (clipped_gain_N != gain_N).detach(), importance_N, {"turn_ratio": ratio_N.detach()})


def turn_means(values_N: Tensor, turn_N: Tensor) -> Tensor:
    """Return, for each token, the mean of the values of all tokens of its turn."""
    num_turns = int(turn_N.max()) + 1 if len(turn_N) else 0
    sums_K = values_N.new_zeros(num_turns).index_add(0, turn_N, values_N)
    return (sums_K / torch.bincount(turn_N, minlength=num_turns).clamp(min=1))[turn_N]


def cispo_loss(inputs: LossInputs, config: GrpoConfig, clip_high: float) -> LossResult:
    """Return the loss of CISPO, which bounds the ratio of a token without removing the token's gradient.

        w_t  = min(pi_prox / pi_behaviour, importance_cap)      1 for uncorrected tokens
        r_t  = min(pi / pi_prox, 1 + clip_high)                 not differentiated
        loss = -sum_t w_t r_t A_t log pi_t / denominator_t

    Source: CISPO of MiniMax-M1 (arXiv:2506.13585, section 3.1), which has no lower bound either.

    Args:
        inputs: tokens of a micro-batch.
        config: bound of the importance weights.
        clip_high: the ratio is bounded by 1 + clip_high.
    """
    prox_logprobs_N = inputs.prox_logprobs_N.detach()
    importance_N = _importance_weights(prox_logprobs_N - inputs.behaviour_logprobs_N, inputs, config)
    ratio_N = (inputs.logprobs_N.detach() - prox_logprobs_N).exp()
    bounded_N = ratio_N.clamp(max=1 + clip_high)
    loss = -(importance_N * bounded_N * inputs.advantages_N * inputs.logprobs_N / inputs.denominators_N).sum()
    return LossResult(loss, bounded_N < ratio_N, importance_N)


def _importance_weights(log_ratio_N: Tensor, inputs: LossInputs, config: GrpoConfig) -> Tensor:
    """Return the truncated importance weights exp(log_ratio_N), 1 for uncorrected tokens."""
    weights_N = log_ratio_N.exp().clamp(max=config.importance_cap)
    return torch.where(uncorrected_tokens(inputs, config), torch.ones_like(weights_N), weights_N)


def uncorrected_tokens(inputs: LossInputs, config: GrpoConfig) -> Tensor:
    """Return which tokens have importance weight 1, as if the proximal policy had sampled them.

    All have it without `importance_weighting`. Those of stored successes have it unless `success_weighting` is
    `truncated`: their behaviour policy may be so old that their weight would vanish.
    """
    if config.importance_weighting == "off":
        return torch.ones_like(inputs.from_buffer_N)
    return inputs.from_buffer_N if config.success_weighting == "one" else torch.zeros_like(inputs.from_buffer_N)


def kl_divergence(logprobs_N: Tensor, reference_logprobs_N: Tensor, estimator: KlEstimator) -> Tensor:
    """Return an estimate of KL(policy || reference) from each token, in nats.

    With x = log pi_reference - log pi:

        k1   -x                      unbiased; its gradient does not depend on the reference
        k2   x^2 / 2                 its gradient is that of the divergence
        k3   min(exp(x) - 1 - x, 10) unbiased where it is below the bound, and never negative
        abs  |x|

    Sources: J. Schulman, Approximating KL Divergence (joschu.net/blog/kl-approx.html, 2020) for k1 to k3; ARPO's code,
    which calls them kl, mse, low_var_kl and abs, for the bound and for abs.

    Args:
        logprobs_N: logprobs under the policy; may carry a gradient.
        reference_logprobs_N: logprobs under the reference policy.
        estimator: formula, see above.
    """
    difference_N = reference_logprobs_N.detach() - logprobs_N
    if estimator == "k1":
        return -difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    if estimator == "abs":
        return difference_N.abs()
    # Bounded twice: beyond 20 the estimate is above its bound anyway, and exp would overflow.
    difference_N = difference_N.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (difference_N.exp() - 1 - difference_N).clamp(max=_MAX_K3)


def regularised(
    loss: Tensor,
    kl_N: Tensor | None,
    entropy_N: Tensor,
    denominators_N: Tensor,
    kl_coefficient: float,
    entropy_coefficient: float,
) -> Tensor:
    """Return a policy loss plus the KL penalty and minus the entropy bonus.

        loss + sum_t (kl_coefficient kl_t - entropy_coefficient entropy_t) / denominator_t

    A coefficient of 0 leaves the loss as it is. Source of the penalty in the loss: GRPO (arXiv:2402.03300).

    Args:
        loss: policy loss of a micro-batch.
        kl_N: estimated KL divergence of each token (see `kl_divergence`); None if the coefficient is 0.
        entropy_N: entropy of each token's distribution; carries a gradient unless the coefficient is 0.
        denominators_N: what the share of each token is divided by.
        kl_coefficient: weight of the KL penalty.
        entropy_coefficient: weight of the entropy bonus.
    """
    if kl_N is not None and kl_coefficient:
        loss = loss + kl_coefficient * (kl_N / denominators_N).sum()
    if entropy_coefficient:
        loss = loss - entropy_coefficient * (entropy_N / denominators_N).sum()
    return loss


def token_denominators(
    num_tokens_T: Tensor, num_trajectories: int, kind: Literal["constant", "trajectory_tokens"], constant_tokens: int
) -> Tensor:
    """Return what the loss of each token is divided by, for each trajectory of a batch (suffix T: trajectories).

        constant           num_trajectories * constant_tokens            Dr. GRPO (arXiv:2503.20783)
        trajectory_tokens  num_trajectories * num_tokens of the token's trajectory     GRPO, ARPO (arXiv:2505.16282)

    With a constant, a long failure is not diluted by its own length. With the trajectory's tokens, the loss is the mean
    over trajectories of their mean token loss.

    Args:
        num_tokens_T: action tokens of each trajectory.
        num_trajectories: trajectories of the optimizer step.
        kind: formula, see above.
        constant_tokens: the constant, in tokens.
    """
    constant_T = torch.full_like(num_tokens_T, constant_tokens)
    tokens_T = num_tokens_T.clamp(min=1) if kind == "trajectory_tokens" else constant_T
    return tokens_T.float() * num_trajectories


def imitation_loss(logprobs_N: Tensor, denominator: float) -> Tensor:
    """Return the cross-entropy of demonstrated tokens: the sum of -logprobs_N / denominator."""
    return -logprobs_N.sum() / denominator
