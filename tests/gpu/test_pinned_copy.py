"""Pinned copies of GPU tensors contain the values at the time of the call and do not change afterwards."""

from __future__ import annotations

import pytest
import torch

from deskrl.learner.policy.pinned_copy import PinnedCopier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU available"),
]


def test_copies_contain_the_values_at_the_call_although_the_gpu_continues() -> None:
    copier = PinnedCopier()
    tensors = [torch.randn(50_000_000, device="cuda"), torch.randn(7, 1000, 5000, device="cuda").bfloat16()]
    for _ in range(3):
        copier.begin()
        for tensor in tensors:
            tensor.mul_(1.5)  # still in progress when the copies are requested
        copies = copier.copy([*tensors, torch.tensor(3, device="cuda")])
        held = [tensor.cpu() for tensor in tensors]
        for tensor in tensors:
            tensor.add_(1)
        torch.cuda.synchronize()
        assert copies[0].is_pinned() is False and copies[2].item() == 3
        assert all(torch.equal(copy, was) for copy, was in zip(copies, held, strict=False))
