"""Merged linear layer: its gradients are those of the unrounded sum, and its outputs those of the merged weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from deskrl.learner.policy.merged_linear import merge, merged_linear

TOKENS, IN, OUT, RANK, SCALE = 7, 6, 5, 3, 1.5


def sample(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return an input, weight and bias of a layer, and both matrices of its adapter."""
    shapes = [(2, TOKENS, IN), (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK)]
    hidden, weight, bias, a, b = (sample(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    return hidden.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("num_zeros", [(0, 0), (2, 0), (0, 3), (2, 3)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_are_those_of_finite_differences(num_zeros: tuple[int, int], has_bias: bool) -> None:
    hidden, weight, bias, a, b = layer(torch.float64)
    padded = pad(hidden.detach(), (0, num_zeros[0])).requires_grad_()

    def output(hidden: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return merged_linear(hidden, weight, bias if has_bias else None, a, b, SCALE, num_zeros)

    assert torch.autograd.gradcheck(output, (padded, a, b))
    result = output(padded, a, b)
    assert result.shape == (2, TOKENS, OUT + num_zeros[1]) and not result[..., OUT:].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_output_and_gradients_are_those_of_the_sum_of_layer_and_adapter(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, bias, a, b = layer(dtype)
    factor = sample(2, TOKENS, OUT, dtype=dtype, seed=9)
    merged = merged_linear(hidden, weight, bias, a, b, SCALE)
    summed = linear(hidden, weight, bias) + linear(linear(hidden, a), b) * SCALE
    torch.testing.assert_close(merged, summed, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(merged, (hidden, a, b), factor)
    expected = torch.autograd.grad(summed, (hidden, a, b), factor)
    for gradient, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_that_of_a_layer_with_the_weight_that_peft_merges(dtype: torch.dtype) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["0"], init_lora_weights=False)
    adapted = inject_adapter_in_model(config, model, "default").to(dtype)[0]
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    base, hidden = adapted.get_base_layer(), sample(9, 64, dtype=dtype, seed=0)
    weight = base.weight.detach().clone()
    output = merged_linear(hidden, weight, base.bias, a, b, 1.5)
    adapted.merge()
    assert torch.equal(merge(weight, a, b, 1.5), base.weight)
    assert torch.equal(output, base(hidden))


def test_the_weight_and_the_matrices_of_the_adapter_are_kept_for_the_backward_pass_but_not_the_merged_weight() -> None:
    hidden, weight, bias, a, b = layer(torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        merged_linear(hidden, weight, bias, a, b, SCALE)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (hidden, weight, a, b)}
