"""Losses as pure functions of logprobs. Every tensor is flat over action tokens (suffix N). Knows no model.

Three policies meet in an asynchronous update: the one that acted (behaviour), the one that the update starts from
(prox, short for proximal), and the one being changed (current). The ratio current / prox is clipped as in PPO, token
by token; the weight prox / behaviour corrects for staleness and is truncated, so that no single token outweighs all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The loss, summed over tokens and divided by the constant denominator, with what a person wants to know of it."""

    loss: Tensor
    clipped_N: Tensor
    """Where the clip took the gradient away."""
    importance_N: Tensor
    """The truncated weight of each token."""


def policy_loss(
    logprobs_N: Tensor,
    prox_logprobs_N: Tensor,
    behaviour_logprobs_N: Tensor,
    advantages_N: Tensor,
    uncorrected_N: Tensor,
    denominator: float,
    clip_low: float,
    clip_high: float,
    importance_cap: float,
) -> PolicyLoss:
    """Token-level clipped policy gradient with a truncated importance weight.

    Args:
        logprobs_N: of the policy being changed; carries the gradient.
        prox_logprobs_N: of the policy that the update started from.
        behaviour_logprobs_N: as sampled.
        advantages_N: of each token's trajectory.
        uncorrected_N: True for tokens weighted from ratio 1 whatever the behaviour (replayed successes).
        denominator: a constant of the configuration times the number of trajectories, not the number of tokens:
            a long failure is not diluted by its own length.
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.
        importance_cap: largest weight prox / behaviour.
    """
    prox_logprobs_N = prox_logprobs_N.detach()
    importance_N = (prox_logprobs_N - behaviour_logprobs_N).exp().clamp(max=importance_cap)
    importance_N = torch.where(uncorrected_N, torch.ones_like(importance_N), importance_N)
    ratio_N = (logprobs_N - prox_logprobs_N).exp()
    gain_N = ratio_N * advantages_N
    clipped_gain_N = ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N
    loss = -(importance_N * torch.minimum(gain_N, clipped_gain_N)).sum() / denominator
    return PolicyLoss(loss=loss, clipped_N=(clipped_gain_N < gain_N).detach(), importance_N=importance_N)


def imitation_loss(logprobs_N: Tensor, denominator: float) -> Tensor:
    """Cross-entropy of demonstrated tokens: their negative logprobs, summed, by a constant denominator."""
    return -logprobs_N.sum() / denominator
