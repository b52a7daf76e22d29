"""Windowed attention of a vision tower with PyTorch's kernels, batched over windows of equal length.

Most layers of Qwen2.5-VL attend within windows of 64 patches. A screenshot of 1280×720 pixels has 84 windows of three
different lengths, so that three calls per layer suffice; one call per window would launch thousands of small kernels
per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class WindowGroup:
    """Windows of equal length."""

    length: int
    """Number of patches per window."""
    rows: Tensor | None
    """Positions of the patches, window by window; None for all positions in their order."""


_groups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Groups by the tensor of window bounds, which all layers share in a forward pass."""


def window_attention(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the attention of each position to the positions of its window.

    Args:
        q_BSHD: queries (batch, position, head, channel).
        k_BSHD: keys.
        v_BSHD: values.
        scale: factor of the scores; None for 1 / sqrt(channels).
        cu_seqlens: start of each window and end of the last one; None for a single window.
        enable_gqa: whether keys and values have fewer heads than queries.
    """
    batch_size, num_positions = q_BSHD.shape[:2]
    groups = [WindowGroup(num_positions, None)] if cu_seqlens is None else _groups_of(cu_seqlens)
    attended = torch.empty(q_BSHD.shape, dtype=q_BSHD.dtype, device=q_BSHD.device)
    for group in groups:
        picked = [x if group.rows is None else x.index_select(1, group.rows) for x in (q_BSHD, k_BSHD, v_BSHD)]
        # Each window becomes an element of the batch; SDPA expects heads before positions.
        q, k, v = (x.reshape(-1, group.length, *x.shape[2:]).transpose(1, 2) for x in picked)
        part = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=enable_gqa)
        part_BSHD = part.transpose(1, 2).reshape(batch_size, -1, *q_BSHD.shape[2:])
        if group.rows is None:
            return part_BSHD
        attended.index_copy_(1, group.rows, part_BSHD)
    return attended


def _groups_of(cu_seqlens: Tensor) -> list[WindowGroup]:
    if cu_seqlens not in _groups:
        _groups[cu_seqlens] = group_windows(cu_seqlens)
    groups: list[WindowGroup] = _groups[cu_seqlens]
    return groups


def group_windows(cu_seqlens: Tensor) -> list[WindowGroup]:
    """Group windows by length, shortest first; tensors are on the device of `cu_seqlens`."""
    bounds = cu_seqlens.cpu().long()
    starts, lengths = bounds[:-1], bounds.diff()
    distinct = sorted(set(lengths.tolist()) - {0})
    if len(distinct) == 1:
        return [WindowGroup(distinct[0], None)]
    return [
        WindowGroup(length, (starts[lengths == length, None] + torch.arange(length)).flatten().to(cu_seqlens.device))
        for length in distinct
    ]
