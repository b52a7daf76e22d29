"""Variable-length attention: attention over several concatenated sequences without padding or masks.

It is registered with transformers, which calls it in the language model and in the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.functional import pad, scaled_dot_product_attention

from deskrl.learner.accelerator import is_hopper, is_recent

# Transformers passes sequence lengths only to implementations whose name contains "flash".
_NAME = "deskrl_flash"

_LONG = 1024
"""Mean number of tokens per sequence from which one kernel call per sequence is fastest."""
_LENGTH_STEP = 256
"""Lengths are padded to multiples of this: cuDNN takes about a second to plan the kernel for each new length."""

OPERATORS = (
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""Operators that compute the attention; selective activation checkpointing keeps their results."""


class Lengths(NamedTuple):
    """Lengths of the sequences of a micro-batch, in the forms that the kernels require."""

    each: tuple[int, ...]
    """Length of each sequence."""
    cumulative: Tensor
    """Start of each sequence and end of the last; int32 of shape (sequences + 1,), on the device of the queries."""

    def as_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `attend`, which the language model passes through."""
        return {"cu_seq_lens_q": self.cumulative, "max_length_q": max(self.each), "sequence_lengths": self.each}


def make_lengths(each: tuple[int, ...], device: torch.device) -> Lengths:
    """Return the lengths of sequences for kernels on a device."""
    return Lengths(each, torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device))


def install(model: nn.Module) -> None:
    """Make a part of a transformers model, its language model or vision tower, use `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, attend)
    config: Any = model.config
    config._attn_implementation = _NAME


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    is_causal: bool | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention within each sequence, in the signature of transformers' attention functions.

    Args:
        module: attention module; its `is_causal` is the default of the argument of that name.
        query: queries of shape (1, heads, tokens of all sequences, dimensions).
        key: keys of the same shape, possibly with fewer heads.
        value: values of the same shape as the keys.
        attention_mask: always None; the lengths separate the sequences.
        cu_seq_lens_q: start of each sequence and end of the last, of shape (sequences + 1,).
        max_length_q: length of the longest sequence.
        scaling: factor applied to the attention scores.
        is_causal: whether tokens attend only to earlier ones; None uses the module's setting.
        sequence_lengths: length of each sequence, if the caller has them on the host.

    Returns:
        The output of shape (1, tokens, heads, dimensions), and None for the attention weights.
    """
    causal = bool(module.is_causal) if is_causal is None else is_causal
    num_repeats = query.shape[1] // key.shape[1]
    if num_repeats > 1:
        key, value = (part.repeat_interleave(num_repeats, dim=1) for part in (key, value))
    if query.dtype != torch.float32 and _is(is_hopper, query.device) and causal and _are_long(sequence_lengths):
        return _one_by_one_on_hopper(query, key, value, sequence_lengths, scaling), None
    if query.dtype != torch.float32 and _is(is_recent, query.device):
        return _by_one_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, causal), None
    each = sequence_lengths or tuple((cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist())
    attend_one = partial(scaled_dot_product_attention, is_causal=causal, scale=scaling)  # any device and precision
    return _one_by_one(query, key, value, each, attend_one), None


@cache
def _is(kind: Callable[[tuple[int, int]], bool], device: torch.device) -> bool:
    return device.type == "cuda" and kind(torch.cuda.get_device_capability(device))


def _are_long(each: tuple[int, ...] | None) -> TypeGuard[tuple[int, ...]]:
    return each is not None and sum(each) >= _LONG * len(each)


def _one_by_one_on_hopper(query: Tensor, key: Tensor, value: Tensor, each: Sequence[int], scaling: float) -> Tensor:
    """Compute causal attention per sequence with cuDNN, which uses Hopper instructions that FlashAttention does not."""

    def attend_padded(*parts: Tensor) -> Tensor:
        length = parts[0].shape[2]
        # The padding comes last, so that no token of the sequence attends to it.
        q, k, v = (pad(part, (0, 0, 0, -length % _LENGTH_STEP)) for part in parts)
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)[:, :, :length]

    # FlashAttention is the fallback for head sizes that cuDNN does not support and for builds without cuDNN.
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return _one_by_one(query, key, value, each, attend_padded)


def _by_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, cumulative: Tensor, longest: int, scaling: float, causal: bool
) -> Tensor:
    """Compute attention with PyTorch's variable-length FlashAttention, which needs a recent GPU and half precision."""
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    window = (-1, 0 if causal else -1)
    output = varlen.varlen_attn(
        query, key, value, cumulative, cumulative, longest, longest, scale=scaling, window_size=window
    )
    assert isinstance(output, Tensor)  # the log-sum-exp is returned only on request
    return output[None]


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, each: Sequence[int], attend_one: Callable[..., Tensor]
) -> Tensor:
    """Compute attention per sequence; `attend_one` takes the queries, keys and values of one sequence."""
    parts = zip(*(torch.split(part, list(each), dim=2) for part in (query, key, value)), strict=True)
    return torch.cat([attend_one(q, k, v) for q, k, v in parts], dim=2).transpose(1, 2)
