"""Window attention: batched windows yield the same results as separate windows."""

from __future__ import annotations

import itertools

import pytest
import torch

from deskrl.inference.window_attention import group_windows, window_attention


def attend_separately(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    parts = []
    for start, end in itertools.pairwise(bounds):
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, start:end], k[:, start:end]) / q.shape[-1] ** 0.5
        parts.append(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, start:end]))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    "bounds",
    [[0, 12], [0, 4, 8, 12], [0, 4, 6, 10, 12], [0, 1, 5, 5, 8, 12]],
    ids=["one", "equal", "two lengths", "an empty one"],
)
def test_each_position_attends_to_its_own_window_only(bounds: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, 3, 8, generator=generator) for _ in range(3))
    batched = window_attention(q, k, v, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    torch.testing.assert_close(batched, attend_separately(q, k, v, bounds))


def test_without_bounds_all_positions_form_one_window() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    torch.testing.assert_close(window_attention(q, k, v), attend_separately(q, k, v, [0, 6]))


def test_windows_of_equal_length_form_one_group() -> None:
    short, long = group_windows(torch.tensor([0, 4, 6, 10, 12], dtype=torch.int32))
    assert (short.length, long.length) == (2, 4)
    assert short.rows is not None and long.rows is not None
    assert (short.rows.tolist(), long.rows.tolist()) == ([4, 5, 10, 11], [0, 1, 2, 3, 6, 7, 8, 9])
