"""How many GPUs PyTorch sees on this machine. Knows nothing of what they are for."""

from __future__ import annotations


def num_gpus() -> int:
    """0 where there are none, or PyTorch was built without them."""
    import torch

    return torch.cuda.device_count()
