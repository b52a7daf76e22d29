"""State dict names: maps a model's live tensors to their names in its checkpoint files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deskrl.learner.policy import lora


def checkpoint_tensors(model: Any) -> dict[str, Tensor]:
    """Return every tensor of the model's checkpoint by name, in checkpoint order and uncopied; shards under ZeRO 3.

    Adapters in the model are left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict(keep_vars=True)
    held = {known: tensor for name, tensor in state.items() if (known := lora.checkpoint_name(name)) is not None}
    if model.config.tie_word_embeddings:
        for name in model.all_tied_weights_keys:
            held.pop(name, None)
    # Model and checkpoint differ in names only, so the conversion is done on meta tensors.
    meta_tensors = {name: torch.empty(unsharded_shape(tensor), device="meta") for name, tensor in held.items()}
    names = {id(meta_tensor): name for name, meta_tensor in meta_tensors.items()}
    reverted: Mapping[str, Tensor] = revert_weight_conversion(model, meta_tensors)
    return {name: held[names[id(meta_tensor)]] for name, meta_tensor in reverted.items()}


def unsharded_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter before sharding, which DeepSpeed stores in `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
