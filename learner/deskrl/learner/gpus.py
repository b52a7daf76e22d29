"""The GPUs that PyTorch sees on this machine, and which numeric types they compute in. Knows nothing of their use."""

from __future__ import annotations

from deskrl.core.errors import UserError

_AMPERE = (8, 0)
"""From this compute capability on there are bfloat16 and FlashAttention."""
_HOPPER = (9, 0)
"""The one whose attention cuDNN computes nearly twice as fast as PyTorch's FlashAttention."""


def num_gpus() -> int:
    """0 where there are none, or PyTorch was built without them."""
    import torch

    return torch.cuda.device_count()


def capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU; None without one."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def is_recent(capability: tuple[int, int] | None) -> bool:
    """Whether a GPU is of Ampere's generation or newer."""
    return capability is not None and capability >= _AMPERE


def is_hopper(capability: tuple[int, int]) -> bool:
    """Whether a GPU is of Hopper's generation (H100, H200)."""
    return capability == _HOPPER


def refuse_dtype(dtype: str, capability: tuple[int, int] | None) -> None:
    """Raise UserError for a numeric type in which nothing can be learnt on a GPU of this capability, or without one."""
    if dtype == "float16" and capability is None:
        raise UserError("learner.dtype = float16 is for GPUs, and there is none here", "set it to float32")
    if dtype == "bfloat16" and capability is not None and not is_recent(capability):
        major, minor = capability
        raise UserError(
            f"learner.dtype = bfloat16, which this GPU (compute capability {major}.{minor}) has not",
            "set it to float16 or float32",
        )
