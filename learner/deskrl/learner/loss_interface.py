"""Interface of policy losses: what a loss gets of a micro-batch, and what it returns.

A loss is a function `loss(inputs, config, options)` of one micro-batch that returns a `LossResult`. Micro-batches are
cut between any two turns, never within one, and their losses are added up; a turn is one step of an episode, the tokens
of one action. A loss is therefore a sum over tokens in which each token's share is divided by its denominator, depends
on no token of another turn, and is the same for the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from deskrl.core.config import GrpoConfig

if TYPE_CHECKING:  # the preflight checks select a loss without loading an engine
    from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """Action tokens of a micro-batch (suffix N); there may be none. All tensors are on one device."""

    logprobs_N: Tensor
    """Logprobs under the current policy, in float32; with gradient."""
    prox_logprobs_N: Tensor
    """Logprobs under the proximal policy, the one before the update."""
    behaviour_logprobs_N: Tensor
    """Logprobs recorded when the tokens were sampled."""
    advantages_N: Tensor
    """Advantage of each token's trajectory."""
    entropy_N: Tensor
    """Entropy of the distribution that each token was taken from, in nats; with gradient only for a loss marked by
    `with_entropy_gradient`, or with an entropy bonus (`learner.grpo.entropy_coefficient`)."""
    from_buffer_N: Tensor
    """Whether a token belongs to a success from the success buffer."""
    turn_N: Tensor
    """Index of each token's turn, counted from 0 in the micro-batch, which has all tokens of the turn."""
    denominators_N: Tensor
    """What the loss of each token is divided by (`learner.grpo.loss_denominator`)."""


@dataclass(frozen=True)
class LossResult:
    """Loss of a micro-batch, with statistics of its tokens; only the loss carries a gradient."""

    loss: Tensor
    """Scalar: sum of the tokens' losses, each divided by its denominator."""
    clipped_N: Tensor
    """Whether clipping removed the gradient of each token; booleans."""
    importance_N: Tensor
    """Importance weight of each token; 1 without importance weighting."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Further values of each token by name, of shape (N,). Their means over the tokens of an update are its record's
    `loss_metrics`."""


Loss = Callable[[LossInputs, GrpoConfig, Any], LossResult]
"""Function of a micro-batch's tokens, the configuration of GRPO, and an instance of its own `Options` or None."""

Marked = TypeVar("Marked", bound=Callable[..., Any])


def with_entropy_gradient(loss: Marked) -> Marked:
    """Mark a loss whose gradient passes through `LossInputs.entropy_N`, which costs a second pass over the logits."""
    loss.differentiates_entropy = True  # type: ignore[attr-defined]
    return loss
