"""A vision tower's attention on PyTorch's own kernels: windows of one length go together.

A Qwen2.5-VL attends within windows of 64 patches in most of its layers. A screenshot of 1280 x 720 has 84 of them, of
three lengths, so three calls do where one call for each window is thousands of small kernels an image. Knows tensors;
knows neither vLLM nor the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class WindowGroup:
    """Windows of one length."""

    length: int
    rows: Tensor | None
    """Positions of all their patches, window by window; None: all that there are, as they stand."""


_groups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Groups by the tensor of window bounds, which is the same for all layers of a pass."""


def window_attention(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of each position to those of its window.

    Args:
        q_BSHD: queries; batch, position, head, channel.
        k_BSHD: keys.
        v_BSHD: values.
        scale: of the scores; None: the usual one.
        cu_seqlens: where windows begin, and where the last one ends; None: all positions are one window.
        enable_gqa: keys and values have fewer heads than queries.
    """
    batch_size, num_positions = q_BSHD.shape[:2]
    groups = [WindowGroup(num_positions, None)] if cu_seqlens is None else _groups_of(cu_seqlens)
    attended = torch.empty(q_BSHD.shape, dtype=q_BSHD.dtype, device=q_BSHD.device)
    for group in groups:
        picked = [x if group.rows is None else x.index_select(1, group.rows) for x in (q_BSHD, k_BSHD, v_BSHD)]
        # Every window becomes a row of a batch, and SDPA wants heads before positions.
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
    """Windows by length, shortest first, on the device of their bounds."""
    bounds = cu_seqlens.cpu().long()
    starts, lengths = bounds[:-1], bounds.diff()
    distinct = sorted(set(lengths.tolist()) - {0})
    if len(distinct) == 1:
        return [WindowGroup(distinct[0], None)]
    return [
        WindowGroup(length, (starts[lengths == length, None] + torch.arange(length)).flatten().to(cu_seqlens.device))
        for length in distinct
    ]
