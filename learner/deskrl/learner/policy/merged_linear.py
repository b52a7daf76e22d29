"""Merged linear layer: computes a linear layer with a LoRA adapter by the merged weight, rounded as replicas serve it.

Shapes: I input features, O output features, R rank of the adapter, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad


@torch.no_grad()
def merge(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Return `weight + scale * b @ a` as a new tensor in the numeric type of the weight, bit for bit as peft merges."""
    if weight_OI.device.type == "cpu" and weight_OI.itemsize == 2:  # 16-bit types, which CPUs may multiply slowly
        a_RI, b_OR = a_RI.float(), b_OR.float()
    return (b_OR @ a_RI).mul_(scale).to(weight_OI.dtype).add_(weight_OI)


class _MergedLinear(torch.autograd.Function):
    """`hidden @ merge(...).T + bias`, whose gradient treats the rounding of the merged weight as the identity.

    The merged weight is computed again in the backward pass: this costs little, and keeping it would take the memory of
    a second model. Tensors are used as saved, because ZeRO 3 may have released the layer's own ones again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        num_zeros: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight_OI, a_RI, b_OR)
        ctx.scale, ctx.num_zeros = scale, num_zeros
        bias = bias_O if bias_O is None or not num_zeros[1] else pad(bias_O, (0, num_zeros[1]))
        return linear(hidden, _padded(merge(weight_OI, a_RI, b_OR, scale), num_zeros), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_OI, a_RI, b_OR = ctx.saved_tensors
        (num_out, num_in), scale = weight_OI.shape, ctx.scale
        of_hidden = None
        if ctx.needs_input_grad[0]:
            of_hidden = gradient @ _padded(merge(weight_OI, a_RI, b_OR, scale), ctx.num_zeros)
        gradient_NO = gradient.reshape(-1, gradient.shape[-1])[:, :num_out]
        hidden_NI = hidden.reshape(-1, hidden.shape[-1])[:, :num_in]
        of_a_RI = ((gradient_NO @ b_OR).T @ hidden_NI).mul_(scale)
        of_b_OR = (gradient_NO.T @ (hidden_NI @ a_RI.T)).mul_(scale)
        return of_hidden, None, None, of_a_RI, of_b_OR, None, None


def merged_linear(
    hidden: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    num_zeros: tuple[int, int] = (0, 0),
) -> Tensor:
    """Apply a linear layer with a LoRA adapter; gradients are those of the input and of the adapter.

    Args:
        hidden: input of shape (..., I + zeros).
        weight_OI: weight of the layer, which is not trained.
        bias_O: bias of the layer, which is not trained; None if it has none.
        a_RI: first matrix of the adapter.
        b_OR: second matrix of the adapter.
        scale: factor of the adapter's product.
        num_zeros: number of zeros at the end of the input, and number of zeros to append to the output.

    Returns:
        Output of shape (..., O + zeros).
    """
    function: Any = _MergedLinear  # `apply` has no type annotations
    output: Tensor = function.apply(hidden, weight_OI, bias_O, a_RI, b_OR, scale, num_zeros)
    return output


def _padded(weight_OI: Tensor, num_zeros: tuple[int, int]) -> Tensor:
    num_in, num_out = num_zeros
    return pad(weight_OI, (0, num_in, 0, num_out)) if num_in or num_out else weight_OI
