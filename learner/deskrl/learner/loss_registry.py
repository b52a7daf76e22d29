"""Registry of policy losses: the contract of a loss, and the built-in ones.

A loss is a function `loss(inputs, config, options)` of one micro-batch that returns a `LossResult`. Micro-batches are
cut between any two turns, never within one, and their losses are added up; a turn is one step of an episode, the tokens
of one action. A loss is therefore a sum over tokens in which each token's share is divided by its denominator, depends
on no token of another turn, and is the same for the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from deskrl.core.config import GrpoConfig, Section
from deskrl.core.config.value_types import Fraction, PositiveFactor
from deskrl.core.errors import UserError
from deskrl.core.registry import Extension, Registry, missing_arguments, with_options

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

LOSSES: Registry[Loss] = Registry(
    "policy loss",
    "learner.grpo.loss",
    "deskrl.losses",
    lambda found: missing_arguments(found, "inputs", "config", "options"),
)

Marked = TypeVar("Marked", bound=Callable[..., Any])


def with_entropy_gradient(loss: Marked) -> Marked:
    """Mark a loss whose gradient passes through `LossInputs.entropy_N`, which costs a second pass over the logits."""
    loss.differentiates_entropy = True  # type: ignore[attr-defined]
    return loss


def needs_entropy_gradient(loss: Extension[Loss], config: GrpoConfig) -> bool:
    """Return whether the loss or the entropy bonus needs the gradient of the entropy."""
    return config.entropy_coefficient > 0 or getattr(loss.implementation, "differentiates_entropy", False)


def select_loss(config: GrpoConfig) -> Extension[Loss]:
    """Return the configured loss with its options; raises UserError if it cannot be selected."""
    return LOSSES.select(config.loss, config.loss_options)


def compute_loss(loss: Extension[Loss], inputs: LossInputs, config: GrpoConfig) -> LossResult:
    """Return the loss of a micro-batch.

    Raises:
        UserError: the loss did not return a `LossResult` with the tensors that it describes.
    """
    result = loss.implementation(inputs, config, loss.options)
    if problem := result_problem(result, inputs):
        raise UserError(f"{LOSSES.key}: {loss.name} {problem}", "correct the loss, or set learner.grpo.loss to grpo")
    return result


def result_problem(result: Any, inputs: LossInputs) -> str | None:
    """Return what is wrong with the types and shapes of a loss's result; None if nothing is. Reads no values."""
    if not isinstance(result, LossResult):
        return f"returned {type(result).__name__} instead of a LossResult"
    import torch

    per_token = {"clipped_N": result.clipped_N, "importance_N": result.importance_N}
    tensors = {"loss": result.loss, **per_token, **{f"metrics[{name!r}]": it for name, it in result.metrics.items()}}
    for name, tensor in tensors.items():
        shape = torch.Size() if name == "loss" else inputs.logprobs_N.shape
        if not isinstance(tensor, torch.Tensor):
            return f"returned {type(tensor).__name__} instead of a tensor as {name}"
        if tensor.shape != shape:
            return f"returned {name} of shape {tuple(tensor.shape)} instead of {tuple(shape)}"
    if not result.loss.requires_grad:
        return "returned a loss without a gradient: it does not depend on logprobs_N"
    return None


@LOSSES.register("grpo")
def grpo_loss(inputs: LossInputs, config: GrpoConfig, options: None) -> LossResult:
    """Return the token-level clipped policy gradient with truncated importance weights (see `losses.policy_loss`)."""
    from deskrl.learner.losses import policy_loss, uncorrected_tokens

    return policy_loss(
        inputs.logprobs_N,
        inputs.prox_logprobs_N,
        inputs.behaviour_logprobs_N,
        inputs.advantages_N,
        uncorrected_tokens(inputs.from_buffer_N, config.importance_weighting, config.success_weighting),
        inputs.denominators_N,
        config.clip_low,
        config.clip_high,
        config.importance_cap,
        config.dual_clip,
    )


class GspoOptions(Section):
    """Options of the loss `gspo`. The defaults are those of the paper (arXiv:2507.18071, section 5.1)."""

    clip_low: Fraction = 3e-4
    """The ratio of a turn is clipped below 1 - clip_low."""
    clip_high: PositiveFactor = 4e-4
    """The ratio of a turn is clipped above 1 + clip_high."""


@LOSSES.register("gspo")
@with_options(GspoOptions)
def gspo(inputs: LossInputs, config: GrpoConfig, options: GspoOptions) -> LossResult:
    """Return the loss of GSPO, with the ratio of each turn in place of a sequence's (see `losses.gspo_loss`)."""
    from deskrl.learner.losses import gspo_loss, uncorrected_tokens

    return gspo_loss(
        inputs.logprobs_N,
        inputs.prox_logprobs_N,
        inputs.behaviour_logprobs_N,
        inputs.advantages_N,
        uncorrected_tokens(inputs.from_buffer_N, config.importance_weighting, config.success_weighting),
        inputs.turn_N,
        inputs.denominators_N,
        options.clip_low,
        options.clip_high,
        config.importance_cap,
    )


class CispoOptions(Section):
    """Options of the loss `cispo`."""

    clip_high: PositiveFactor = 3.0
    """The ratio of a token is at most 1 + clip_high. Wider than PPO's range, because the gradient is kept."""


@LOSSES.register("cispo")
@with_options(CispoOptions)
def cispo(inputs: LossInputs, config: GrpoConfig, options: CispoOptions) -> LossResult:
    """Return the loss of CISPO, which keeps the gradients of all tokens (see `losses.cispo_loss`)."""
    from deskrl.learner.losses import cispo_loss, uncorrected_tokens

    return cispo_loss(
        inputs.logprobs_N,
        inputs.prox_logprobs_N,
        inputs.behaviour_logprobs_N,
        inputs.advantages_N,
        uncorrected_tokens(inputs.from_buffer_N, config.importance_weighting, config.success_weighting),
        inputs.denominators_N,
        options.clip_high,
        config.importance_cap,
    )
