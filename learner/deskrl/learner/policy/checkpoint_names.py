"""A model's live tensors by the names that they have in its checkpoint. Knows transformers' conversion of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def checkpoint_tensors(model: Any) -> dict[str, Tensor]:
    """Every tensor of the model's checkpoint, in its order and not copied: shards where a parameter is sharded."""
    from transformers.core_model_loading import revert_weight_conversion

    held = dict(model.state_dict(keep_vars=True))
    if model.config.tie_word_embeddings:
        for name in model.all_tied_weights_keys:
            held.pop(name, None)
    # Only names differ between model and checkpoint, and which is whose is told without the tensors.
    stand_ins = {name: torch.empty(whole_shape(tensor), device="meta") for name, tensor in held.items()}
    names = {id(stand_in): name for name, stand_in in stand_ins.items()}
    reverted: Mapping[str, Tensor] = revert_weight_conversion(model, stand_ins)
    return {name: held[names[id(stand_in)]] for name, stand_in in reverted.items()}


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter when it is whole; DeepSpeed keeps it with those that it has sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
