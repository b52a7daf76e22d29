"""GPUs that PyTorch sees on this machine, and the numeric types that they support."""

from __future__ import annotations

from deskrl.core.errors import UserError

_AMPERE = (8, 0)
"""Lowest compute capability with bfloat16 and FlashAttention."""
_HOPPER = (9, 0)
"""Compute capability on which cuDNN's attention is nearly twice as fast as PyTorch's FlashAttention."""


def num_gpus() -> int:
    """Return the number of GPUs; 0 if there are none or PyTorch was built without GPU support."""
    import torch

    return torch.cuda.device_count()


def capability() -> tuple[int, int] | None:
    """Return the compute capability of this process's GPU; None without a GPU."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def is_recent(capability: tuple[int, int] | None) -> bool:
    """Return whether a GPU has at least the Ampere architecture."""
    return capability is not None and capability >= _AMPERE


def is_hopper(capability: tuple[int, int]) -> bool:
    """Return whether a GPU has the Hopper architecture (H100, H200)."""
    return capability == _HOPPER


def check_dtype(dtype: str, capability: tuple[int, int] | None) -> None:
    """Check that a numeric type is supported for training.

    Args:
        dtype: numeric type, as in `learner.dtype`.
        capability: compute capability of the GPU; None without a GPU.

    Raises:
        UserError: it is not supported.
    """
    if dtype == "float16" and capability is None:
        raise UserError("learner.dtype = float16 needs a GPU, but none was found", "set it to float32")
    if dtype == "bfloat16" and capability is not None and not is_recent(capability):
        major, minor = capability
        raise UserError(
            f"learner.dtype = bfloat16 is not supported by this GPU (compute capability {major}.{minor})",
            "set it to float16 or float32",
        )
