"""Registry of policy losses: selects and computes a loss, and has the built-in ones."""

from __future__ import annotations

from typing import Any

from deskrl.core.config import GrpoConfig, Section
from deskrl.core.config.value_types import Fraction, PositiveFactor
from deskrl.core.errors import UserError
from deskrl.core.registry import Extension, Registry, missing_arguments, with_options
from deskrl.learner.loss_interface import Loss, LossInputs, LossResult

LOSSES: Registry[Loss] = Registry(
    "policy loss",
    "learner.grpo.loss",
    "deskrl.losses",
    lambda found: missing_arguments(found, "inputs", "config", "options"),
)


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
def _grpo(inputs: LossInputs, config: GrpoConfig, options: None) -> LossResult:
    from deskrl.learner.losses import policy_loss

    return policy_loss(inputs, config)


class GspoOptions(Section):
    """Options of the loss `gspo`. The defaults are those of the paper (arXiv:2507.18071, section 5.1)."""

    clip_low: Fraction = 3e-4
    """The ratio of a turn is clipped below 1 - clip_low."""
    clip_high: PositiveFactor = 4e-4
    """The ratio of a turn is clipped above 1 + clip_high."""


@LOSSES.register("gspo")
@with_options(GspoOptions)
def _gspo(inputs: LossInputs, config: GrpoConfig, options: GspoOptions) -> LossResult:
    from deskrl.learner.losses import gspo_loss

    return gspo_loss(inputs, config, options.clip_low, options.clip_high)


class CispoOptions(Section):
    """Options of the loss `cispo`."""

    clip_high: PositiveFactor = 3.0
    """The ratio of a token is at most 1 + clip_high. Wider than PPO's range, because the gradient is kept."""


@LOSSES.register("cispo")
@with_options(CispoOptions)
def _cispo(inputs: LossInputs, config: GrpoConfig, options: CispoOptions) -> LossResult:
    from deskrl.learner.losses import cispo_loss

    return cispo_loss(inputs, config, options.clip_high)
