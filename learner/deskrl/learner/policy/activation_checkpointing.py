"""Activation checkpointing: selects which activations are kept for the backward pass and which are recomputed."""

from __future__ import annotations

from typing import Any, Literal

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from deskrl.learner.policy import varlen_attention

Mode = Literal["off", "selective", "full"]


def enable(model: Any, mode: Mode) -> None:
    """Enable activation checkpointing in a part of a transformers model; results do not change.

    Args:
        model: language model or vision tower.
        mode: `off` keeps all activations; `selective` keeps each layer's input and the output of its attention, which
            is expensive to recompute and small; `full` keeps each layer's input only.
    """
    if mode == "off":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        settings["context_fn"] = _keep_attention
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    model.train()  # layers checkpoint in training mode only; these models have no dropout


class _AttentionOnly(TorchDispatchMode):
    """Passes attention operators to another mode, and executes all others.

    PyTorch's modes of selective checkpointing require that a layer is recomputed with exactly the operators of its
    forward pass. ZeRO 3 gathers parameters within layers, with other operators each time: some were prefetched.

    Args:
        mode: mode that keeps the results of operators, or returns the kept ones.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in varlen_attention.OPERATORS:
            return self._mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs or {})


def _keep_attention() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts of a layer's forward pass, which keeps attention outputs, and of its recomputation."""
    create: Any = create_selective_checkpoint_contexts  # has no type annotations
    keeping, returning = create(list(varlen_attention.OPERATORS))
    return _AttentionOnly(keeping), _AttentionOnly(returning)
