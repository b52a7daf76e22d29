"""Copies of a GPU's tensors hold what the GPU held when they were asked for, and stay as they are."""

from __future__ import annotations

import pytest
import torch

from deskrl.learner.policy.host_copy import HostCopier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


def test_copies_hold_the_moment_though_the_gpu_goes_on() -> None:
    copier = HostCopier()
    tensors = [torch.randn(50_000_000, device="cuda"), torch.randn(7, 1000, 5000, device="cuda").bfloat16()]
    for _ in range(3):
        copier.begin()
        for tensor in tensors:
            tensor.mul_(1.5)  # still under way when the copies are asked for
        copies = copier.copy([*tensors, torch.tensor(3, device="cuda")])
        held = [tensor.cpu() for tensor in tensors]
        for tensor in tensors:
            tensor.add_(1)
        torch.cuda.synchronize()
        assert copies[0].is_pinned() is False and copies[2].item() == 3
        assert all(torch.equal(copy, was) for copy, was in zip(copies, held, strict=False))
