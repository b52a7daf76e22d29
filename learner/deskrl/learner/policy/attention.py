"""Attention over several sequences that lie end to end: nothing is padded, and no mask is ever made.

Registered with transformers, which calls it from the language model and from the vision tower alike. Knows queries,
keys, values and lengths; knows nothing of rows or screenshots.
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

from deskrl.learner.gpus import is_hopper, is_recent

# Transformers tells the lengths of sequences to implementations that have "flash" in their name.
_NAME = "deskrl_flash"

_LONG = 1024
"""Sequences that have this many tokens on average are worth a kernel call each."""
_LENGTH_STEP = 256
"""cuDNN plans anew for each length, which takes it a second; so lengths are made multiples of this."""

OPERATORS = (
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What the work is done by, for whoever wants to keep its results."""


class Lengths(NamedTuple):
    """Lengths of the sequences of a micro-batch, in the form that each kernel wants them."""

    each: tuple[int, ...]
    cumulative: Tensor
    """(sequences + 1,) int32, on the device of the queries."""

    def as_arguments(self) -> dict[str, Any]:
        """By the names under which `attend` takes them; the language model hands them through."""
        return {"cu_seq_lens_q": self.cumulative, "max_length_q": max(self.each), "sequence_lengths": self.each}


def lengths_of(each: tuple[int, ...], device: torch.device) -> Lengths:
    """Of sequences of these lengths."""
    return Lengths(each, torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device))


def install(model: nn.Module) -> None:
    """Let a part of a transformers model (its language model, its vision tower) attend with `attend`."""
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
    """Attention within each sequence, causal if the module is.

    Args:
        module: whose attention this is.
        query: (1, heads, tokens of all sequences, dimensions); keys and values may have fewer heads.
        key: see query.
        value: see query.
        attention_mask: none; the lengths say it all.
        cu_seq_lens_q: (sequences + 1,) where each sequence begins, and the end of the last.
        max_length_q: of the longest sequence.
        scaling: of the scores.
        is_causal: whether tokens see only what is before them; None: as the module says.
        sequence_lengths: each sequence's, where the caller has them at hand.

    Returns:
        (1, tokens, heads, dimensions), and no attention weights.
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
    """cuDNN's causal attention, sequence by sequence: it uses instructions that torch's FlashAttention does not."""

    def attend_padded(*parts: Tensor) -> Tensor:
        length = parts[0].shape[2]
        # What is added comes last, so that no token of the sequence sees it.
        q, k, v = (pad(part, (0, 0, 0, -length % _LENGTH_STEP)) for part in parts)
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)[:, :, :length]

    # The second serves where the first cannot: heads of an odd size, a torch without cuDNN.
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return _one_by_one(query, key, value, each, attend_padded)


def _by_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, cumulative: Tensor, longest: int, scaling: float, causal: bool
) -> Tensor:
    """FlashAttention for sequences of different lengths, as torch brings it: recent GPUs and half precision only."""
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    window = (-1, 0 if causal else -1)
    output = varlen.varlen_attn(
        query, key, value, cumulative, cumulative, longest, longest, scale=scaling, window_size=window
    )
    assert isinstance(output, Tensor)  # and no log-sum-exp, which was not asked for
    return output[None]


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, each: Sequence[int], attend_one: Callable[..., Tensor]
) -> Tensor:
    """Sequence by sequence; `attend_one` takes the queries, keys and values of one."""
    parts = zip(*(torch.split(part, list(each), dim=2) for part in (query, key, value)), strict=True)
    return torch.cat([attend_one(q, k, v) for q, k, v in parts], dim=2).transpose(1, 2)
