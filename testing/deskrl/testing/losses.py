"""Contract suite of policy losses (`learner.grpo.loss`).

Derive from `LossSuite` in a test module, and run it with pytest:

    from deskrl.testing.losses import LossSuite

    class TestMine(LossSuite):
        selection = "my_losses:mine"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch

from deskrl.core.config import GrpoConfig
from deskrl.core.registry import Extension
from deskrl.learner.loss_interface import Loss, LossInputs, LossResult
from deskrl.learner.loss_registry import LOSSES, compute_loss

_RELATIVE, _ABSOLUTE = 1e-4, 1e-6
_TRAJECTORY_STARTS, _ADVANTAGES = [0, 3, 7, 10], [0.9, -0.6, 0.4, -0.25]
_TURN_STARTS = [0, 1, 3, 5, 7, 8, 10]
"""Index of the first token of each trajectory and of each turn of the inputs."""


class LossSuite:
    """Checks of one loss."""

    selection: str
    """Value of `learner.grpo.loss`."""
    options: Mapping[str, Any] = {}
    """Value of `learner.grpo.loss_options`."""
    grpo: Mapping[str, Any] = {}
    """Further keys of `learner.grpo` that the loss is checked with."""

    @pytest.fixture
    def loss(self) -> Extension[Loss]:
        """Provide the selected loss."""
        return LOSSES.select(self.selection, self.options)

    def result(self, loss: Extension[Loss], inputs: LossInputs) -> LossResult:
        """Return the loss of a micro-batch; raises UserError if types or shapes are wrong."""
        return compute_loss(loss, inputs, GrpoConfig.model_validate(dict(self.grpo)))

    def test_statistics_are_values_of_single_tokens_without_gradient(self, loss: Extension[Loss]) -> None:
        result = self.result(loss, make_inputs(12))
        assert result.clipped_N.dtype == torch.bool, f"clipped_N has type {result.clipped_N.dtype} instead of bool"
        for name, values_N in {"importance_N": result.importance_N, **result.metrics}.items():
            assert not values_N.requires_grad, f"{name} carries a gradient; detach it"
            assert values_N.isfinite().all(), f"{name} is not finite: {values_N.tolist()}"
            assert bool((values_N >= 0).all()) or name != "importance_N", "an importance weight is negative"

    def test_loss_and_gradient_are_finite(self, loss: Extension[Loss]) -> None:
        loss_value, gradient_N = self._differentiate(loss, make_inputs(12))
        assert loss_value == loss_value and abs(loss_value) != float("inf"), f"the loss is {loss_value}"
        assert gradient_N.isfinite().all(), f"the gradient is not finite: {gradient_N.tolist()}"
        assert bool(gradient_N.any()), "the gradient is 0 for all tokens"

    @pytest.mark.parametrize("difference", [-20.0, 20.0])
    def test_a_policy_far_from_the_others_leaves_loss_and_gradient_finite(
        self, loss: Extension[Loss], difference: float
    ) -> None:
        inputs = make_inputs(12)
        for changed in ("prox_logprobs_N", "behaviour_logprobs_N"):
            far = change(inputs, **{changed: getattr(inputs, changed) + difference})
            loss_value, gradient_N = self._differentiate(loss, far)
            assert abs(loss_value) < float("inf"), f"the loss is {loss_value} if {changed} differs by {difference} nats"
            assert gradient_N.isfinite().all(), f"the gradient is not finite if {changed} differs by {difference} nats"

    def test_the_first_optimizer_step_follows_the_advantage(self, loss: Extension[Loss]) -> None:
        """On policy, descending the gradient raises the logprobs of tokens with a positive advantage."""
        inputs = make_inputs(12)
        logprobs_N = inputs.logprobs_N.detach()
        _, gradient_N = self._differentiate(
            loss, change(inputs, prox_logprobs_N=logprobs_N, behaviour_logprobs_N=logprobs_N)
        )
        wrong = gradient_N * inputs.advantages_N >= 0
        assert not bool(wrong.any()), "the gradient has the sign of the advantage, or is 0, for some tokens"

    def test_the_result_is_the_same_for_the_same_tokens(self, loss: Extension[Loss]) -> None:
        first = self._differentiate(loss, make_inputs(12))
        self._differentiate(loss, make_inputs(5, seed=1))
        again = self._differentiate(loss, make_inputs(12))
        assert first[0] == again[0] and bool((first[1] == again[1]).all()), "a second call returned another result"

    def test_the_inputs_are_not_changed(self, loss: Extension[Loss]) -> None:
        inputs, reference = make_inputs(12), make_inputs(12)
        self._differentiate(loss, inputs)
        for item in fields(inputs):
            same = bool((getattr(inputs, item.name) == getattr(reference, item.name)).all())
            assert same, f"the loss changed {item.name}"

    def test_the_order_of_the_tokens_does_not_matter(self, loss: Extension[Loss]) -> None:
        inputs = make_inputs(12)
        reversed_inputs = take(inputs, torch.arange(11, -1, -1))
        (expected, expected_N), (loss_value, gradient_N) = (
            self._differentiate(loss, it) for it in (inputs, reversed_inputs)
        )
        assert loss_value == pytest.approx(expected, rel=_RELATIVE, abs=_ABSOLUTE), (
            "the loss depends on the order of the tokens"
        )
        assert gradient_N.tolist() == pytest.approx(expected_N.flip(0).tolist(), rel=_RELATIVE, abs=_ABSOLUTE)

    def test_the_losses_of_micro_batches_add_up(self, loss: Extension[Loss]) -> None:
        """Micro-batches are cut between turns; a mean over the tokens of a micro-batch would not add up."""
        inputs = make_inputs(12)
        whole, whole_N = self._differentiate(loss, inputs)
        parts = [self._differentiate(loss, take(inputs, torch.arange(*it))) for it in ((0, 1), (1, 7), (7, 12))]
        total = sum(value for value, _ in parts)
        assert total == pytest.approx(whole, rel=_RELATIVE, abs=_ABSOLUTE), (
            "the losses of three micro-batches are not that of one"
        )
        gradients = torch.cat([gradient_N for _, gradient_N in parts]).tolist()
        assert gradients == pytest.approx(whole_N.tolist(), rel=_RELATIVE, abs=_ABSOLUTE)

    def test_a_micro_batch_without_tokens_has_a_loss_of_0(self, loss: Extension[Loss]) -> None:
        """Ranks with fewer rows than others compute such micro-batches."""
        loss_value, _ = self._differentiate(loss, make_inputs(0))
        assert loss_value == 0, f"the loss of no tokens is {loss_value}"

    def test_the_loss_of_each_token_is_divided_by_its_denominator(self, loss: Extension[Loss]) -> None:
        inputs = make_inputs(12)
        expected, expected_N = self._differentiate(loss, inputs)
        halved, halved_N = self._differentiate(loss, change(inputs, denominators_N=2 * inputs.denominators_N))
        assert 2 * halved == pytest.approx(expected, rel=_RELATIVE, abs=_ABSOLUTE), (
            "twice the denominators do not halve the loss"
        )
        assert (2 * halved_N).tolist() == pytest.approx(expected_N.tolist(), rel=_RELATIVE, abs=_ABSOLUTE)

    def _differentiate(self, loss: Extension[Loss], inputs: LossInputs) -> tuple[float, torch.Tensor]:
        """Return the loss and its gradient with respect to the logprobs."""
        value = self.result(loss, inputs).loss
        (gradient_N,) = torch.autograd.grad(value, inputs.logprobs_N)
        return float(value.detach()), gradient_N


def make_inputs(num_tokens: int, seed: int = 0) -> LossInputs:
    """Return tokens of a slightly stale batch.

    Twelve tokens are seven turns of four trajectories with advantages of alternate signs. The third trajectory is from
    the success buffer.
    """
    generator = torch.Generator().manual_seed(seed)

    def random_N(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(num_tokens, generator=generator)

    logprobs_N = random_N(-3.0, -0.1)
    index_N = torch.arange(num_tokens)
    trajectory_N = torch.bucketize(index_N, torch.tensor(_TRAJECTORY_STARTS), right=True) - 1
    return LossInputs(
        logprobs_N=logprobs_N.clone().requires_grad_(),
        prox_logprobs_N=logprobs_N + random_N(-0.4, 0.4),
        behaviour_logprobs_N=logprobs_N + random_N(-0.8, 0.8),
        advantages_N=torch.tensor(_ADVANTAGES)[trajectory_N],
        entropy_N=random_N(0.0, 2.0),
        from_buffer_N=trajectory_N == 2,
        turn_N=torch.bucketize(index_N, torch.tensor(_TURN_STARTS), right=True) - 1,
        denominators_N=torch.where(trajectory_N < 2, 64.0, 24.0),
    )


def change(inputs: LossInputs, **changed: torch.Tensor) -> LossInputs:
    """Return inputs with some tensors replaced and logprobs of their own."""
    values = {item.name: getattr(inputs, item.name) for item in fields(inputs)} | changed
    return LossInputs(**{**values, "logprobs_N": values["logprobs_N"].detach().clone().requires_grad_()})


def take(inputs: LossInputs, index_M: torch.Tensor) -> LossInputs:
    """Return the tokens with these indices, in this order; turns are counted from 0 again."""
    taken = change(inputs, **{item.name: getattr(inputs, item.name)[index_M] for item in fields(inputs)})
    _, turn_N = torch.unique(taken.turn_N, return_inverse=True)
    return change(taken, turn_N=turn_N)
