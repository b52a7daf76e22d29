"""Losses as pure functions of logprobs. Every tensor is flat over action tokens (suffix N). Knows no model.

Three policies meet in an asynchronous update: the one that acted (behaviour), the one that the update starts from
(prox, short for proximal), and the one being changed (current). The ratio current / prox is clipped as in PPO, token
by token; the weight prox / behaviour corrects for staleness and is truncated, so that no single token outweighs all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The loss, each token's part divided by its denominator and summed, with what a person wants to know of it."""

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
    denominator: float | Tensor,
    clip_low: float,
    clip_high: float,
    importance_cap: float,
    dual_clip: float = 0.0,
) -> PolicyLoss:
    """Token-level clipped policy gradient with a truncated importance weight.

    Args:
        logprobs_N: of the policy being changed; carries the gradient.
        prox_logprobs_N: of the policy that the update started from.
        behaviour_logprobs_N: as sampled.
        advantages_N: of each token's trajectory.
        uncorrected_N: True for tokens weighted from ratio 1 whatever the behaviour (replayed successes).
        denominator: of every token's part of the loss, or of each (see `token_denominators`).
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.
        importance_cap: largest weight prox / behaviour.
        dual_clip: a token of negative advantage costs no more than this many times that advantage; 0: no such limit.
    """
    prox_logprobs_N = prox_logprobs_N.detach()
    importance_N = (prox_logprobs_N - behaviour_logprobs_N).exp().clamp(max=importance_cap)
    importance_N = torch.where(uncorrected_N, torch.ones_like(importance_N), importance_N)
    ratio_N = (logprobs_N - prox_logprobs_N).exp()
    gain_N = ratio_N * advantages_N
    clipped_gain_N = torch.minimum(gain_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N)
    if dual_clip:
        floor_N = torch.where(advantages_N < 0, dual_clip * advantages_N, torch.full_like(advantages_N, -math.inf))
        clipped_gain_N = torch.maximum(clipped_gain_N, floor_N)
    loss = -(importance_N * clipped_gain_N / denominator).sum()
    return PolicyLoss(loss=loss, clipped_N=(clipped_gain_N != gain_N).detach(), importance_N=importance_N)


def token_denominators(
    num_tokens_T: Tensor, num_trajectories: int, kind: Literal["constant", "trajectory_tokens"], scale_tokens: int
) -> Tensor:
    """By what the loss of each token of a trajectory is divided in one optimizer step (suffix T: trajectories).

    Args:
        num_tokens_T: action tokens of each trajectory.
        num_trajectories: of the optimizer step.
        kind: `constant`: a constant of the configuration, so that a long failure is not diluted by its own length.
            `trajectory_tokens`: the trajectory's own tokens, as ARPO has it: the mean of the trajectories' means.
        scale_tokens: the constant.
    """
    tokens_T = num_tokens_T.clamp(min=1) if kind == "trajectory_tokens" else torch.full_like(num_tokens_T, scale_tokens)
    return tokens_T.float() * num_trajectories


def imitation_loss(logprobs_N: Tensor, denominator: float) -> Tensor:
    """Cross-entropy of demonstrated tokens: their negative logprobs, summed, by a constant denominator."""
    return -logprobs_N.sum() / denominator
