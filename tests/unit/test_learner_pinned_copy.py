"""Pinned copies: copies in host memory equal the tensors, for every numeric type, shape and size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deskrl.learner.policy import pinned_copy
from deskrl.learner.policy.pinned_copy import PinnedCopier


def some_tensors() -> list[Tensor]:
    grid = torch.arange(60.0).reshape(6, 10)
    return [
        grid,
        grid.t()[2:],
        torch.tensor(7),
        torch.empty(0, 3),
        torch.arange(33, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.nn.Parameter(torch.ones(3)),
    ]


@pytest.mark.parametrize("chunk_bytes", [16, 1024**2])
def test_a_copy_has_the_values_and_does_not_change_with_the_tensor(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(pinned_copy, "_CHUNK_BYTES", chunk_bytes)
    tensors = some_tensors()
    copies = PinnedCopier().copy(tensors)
    for tensor, again in zip(some_tensors(), copies, strict=True):
        assert (again.dtype, again.shape, again.requires_grad) == (tensor.dtype, tensor.shape, False)
        assert torch.equal(again, tensor)
    tensors[0].zero_()
    assert torch.equal(copies[0], some_tensors()[0])


def test_a_new_set_of_copies_reuses_the_memory_and_frees_what_it_does_not_need() -> None:
    copier = PinnedCopier()
    first = copier.copy([torch.zeros(5), torch.ones(5)]) + copier.copy([torch.ones(9)])
    assert copier.kept_bytes == 0, "all memory is in use"
    copier.begin()
    assert copier.kept_bytes == 4 * 19
    second = copier.copy([torch.full((9,), 2.0), torch.full((5,), 3.0)]) + copier.copy([torch.full((5,), 4.0)])
    assert {copy.data_ptr() for copy in second} == {copy.data_ptr() for copy in first}
    assert [copy.mean().item() for copy in second] == [2, 3, 4]
    copier.begin()
    copier.copy([torch.ones(5)])
    copier.begin()
    assert copier.kept_bytes == 20, "memory that the last set did not use is freed"
