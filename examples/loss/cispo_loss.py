"""CISPO (MiniMax-M1, arXiv:2506.13585): clips the weight of a token instead of removing its gradient.

With PPO's clipping, a token whose ratio has left the range has no gradient. Rare tokens that start a new line of
thought leave it first. CISPO keeps the gradient of all tokens and bounds only its weight:

    r_t  = pi / pi_prox                                               not differentiated
    w_t  = min(pi_prox / pi_behaviour, importance_cap)                1 for tokens from the success buffer
    loss = -sum_t w_t min(r_t, 1 + clip_high) A_t log pi_t / denominator_t

The built-in loss `cispo` is the same with the default importance weighting. Use this one with
`learner.grpo.loss = "cispo_loss:cispo"` and this folder on PYTHONPATH.
"""

from __future__ import annotations

import torch
from pydantic import Field

from deskrl.core.config import GrpoConfig, Section
from deskrl.core.registry import with_options
from deskrl.learner.loss_interface import LossInputs, LossResult


class CispoOptions(Section):
    """Options of the loss (`learner.grpo.loss_options`)."""

    clip_high: float = Field(default=3.0, gt=0)
    """The weight of a token is at most 1 + clip_high. Wider than PPO's range, because the gradient is kept."""


@with_options(CispoOptions)
def cispo(inputs: LossInputs, config: GrpoConfig, options: CispoOptions) -> LossResult:
    """Return the loss of CISPO; `pi_weight` is the mean weight of pi / pi_prox after clipping."""
    with torch.no_grad():
        importance_N = (inputs.prox_logprobs_N - inputs.behaviour_logprobs_N).exp().clamp(max=config.importance_cap)
        importance_N = torch.where(inputs.from_buffer_N, torch.ones_like(importance_N), importance_N)
        ratio_N = (inputs.logprobs_N - inputs.prox_logprobs_N).exp()
        weight_N = ratio_N.clamp(max=1 + options.clip_high)
    gain_N = importance_N * weight_N * inputs.advantages_N * inputs.logprobs_N
    return LossResult(
        loss=-(gain_N / inputs.denominators_N).sum(),
        clipped_N=weight_N < ratio_N,
        importance_N=importance_N,
        metrics={"pi_weight": weight_N},
    )
