"""Activation checkpointing: selects which activations are kept for the backward pass and which are recomputed."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

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
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, list(varlen_attention.OPERATORS))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    model.train()  # layers checkpoint in training mode only; these models have no dropout
