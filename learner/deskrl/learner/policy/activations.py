"""Which activations of the language model are kept for the backward pass, and which are computed anew.

Knows transformers' switch for it and torch's policies; changes no result.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import create_selective_checkpoint_contexts

from deskrl.learner.policy import attention

Kept = Literal["all", "attention", "layers"]


def keep(model: Any, kept: Kept) -> None:
    """Set what a part of a transformers model keeps.

    Args:
        model: its language model, or its vision tower.
        kept: everything; of each layer its input and its attention's result, which costs much and is small; or of each
            layer only its input.
    """
    if kept == "all":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if kept == "attention":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, list(attention.OPERATORS))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    model.train()  # layers check it; there is no dropout that it would switch on
