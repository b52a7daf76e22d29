"""Shape of a model, read from its configuration or its name: parameter counts and FLOPs.

Tokens belong to the language model, patches to the vision tower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deskrl.models.architectures import ARCHITECTURES, Architecture, Shape, architecture_of, load_architecture

_DEFAULT_ARCHITECTURE = "qwen2_vl"
"""Architecture of models whose name does not say it: UI-TARS 1.0."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes that determine the memory and FLOPs of a model."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    query_size: int
    """Width of one layer's queries."""
    key_value_size: int
    """Width of one layer's keys, and of its values."""
    norm_inputs: int
    """Sum of the widths of the inputs of one layer's norms: those of hidden states, and those of queries and keys."""
    vocab: int
    tied: bool
    num_language_parameters: int
    """Number of parameters of the language model, including embeddings and head."""
    layer_matrix_parameters: int
    """Number of parameters in the matrices of one layer of the language model."""
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_gated: bool
    """Whether the MLPs of the vision tower have gates."""
    vision_full_layers: int
    """Vision layers with attention over the whole screenshot; the others attend within windows."""
    window_patches: int
    """Number of patches of a window."""
    merge: int
    patch_parameters: int
    """Number of parameters of the first layer of the vision tower."""
    vision_block_parameters: int
    """Number of parameters of one block of the vision tower."""
    merger_parameters: int
    """Number of parameters of the rest of the vision tower, most of which merge patches to image tokens."""
    language_matrices: Mapping[str, Shape]
    """Shape of the matrix of each linear layer of the language model, by the name of the layer."""
    vision_matrices: Mapping[str, Shape]
    """Shape of the matrix of each linear layer of the vision tower, by the name of the layer."""

    @property
    def num_vision_parameters(self) -> int:
        """Number of parameters of the vision tower."""
        return self.patch_parameters + self.vision_layers * self.vision_block_parameters + self.merger_parameters

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.num_language_parameters + self.num_vision_parameters

    @property
    def kv_elements_per_token(self) -> int:
        """Number of KV cache elements of one token."""
        return 2 * self.num_layers * self.key_value_size

    def language_flops(self, num_tokens: int, num_targets: int) -> float:
        """Return the FLOPs of a forward pass over one row, with causal attention and logits at the targets only."""
        body = self.num_language_parameters - self.vocab * self.hidden * (1 if self.tied else 2)
        products = 2.0 * body * num_tokens + 2.0 * self.vocab * self.hidden * num_targets
        return products + self.attention_flops(num_tokens)

    def attention_flops(self, num_tokens: int) -> float:
        """Return the FLOPs of causal attention in a forward pass over one row."""
        return 2.0 * self.num_layers * self.query_size * num_tokens**2

    def vision_flops(self, num_patches: int) -> float:
        """Return the FLOPs of a forward pass over one screenshot."""
        products = 2.0 * num_patches * (self.patch_parameters + self.vision_layers * self.vision_block_parameters)
        merging = 2.0 * num_patches / self.merge**2 * self.merger_parameters
        windowed = self.vision_layers - self.vision_full_layers
        pairs = self.vision_full_layers * num_patches**2 + windowed * num_patches * self.window_patches
        return products + merging + 4.0 * self.vision_hidden * pairs


def shape_from_config(config: Mapping[str, Any], name: str, architecture: str | None = None) -> ModelShape:
    """Return the shape in the content of a config.json, nested (`text_config`) or flat.

    Args:
        config: content of the file.
        name: name of the model.
        architecture: value of `model.architecture`; None: the architecture is found by `model_type`.

    Raises:
        UserError: the architecture is unknown.
        ConfigError: a size is missing or invalid.
    """
    return _shape(architecture_of(config, name, architecture), config, name)


def shape_from_name(name: str) -> ModelShape | None:
    """Return the shape of a published model by its name, such as UI-TARS-1.5-7B; None for other names."""
    size = re.search(r"(?<![\d.])(\d+b)(?![a-z])", name.lower())
    if size is None:
        return None
    architecture = architecture_from_name(name)
    published = architecture.published.get(size[1])
    if published is None:
        return None
    return _shape(architecture, published, f"{architecture.model_type} {size[1]}, from the name {name}")


def architecture_from_name(name: str) -> Architecture:
    """Return the architecture of a published model by its name; that of UI-TARS 1.0 for other names."""
    known = [load_architecture(each) for each in ARCHITECTURES.names()]
    matching = [each for each in known if re.search(each.name_pattern, name.lower())]
    return matching[0] if matching else load_architecture(_DEFAULT_ARCHITECTURE)


def _shape(architecture: Architecture, config: Mapping[str, Any], name: str) -> ModelShape:
    layout, vision = architecture.layout(config), architecture.vision_sizes(config)
    tensors = layout.tensors
    layer, block = _below(tensors, "model.layers.0."), _below(tensors, "visual.blocks.0.")
    embedding, patch_embed = tensors["model.embed_tokens.weight"], _below(tensors, "visual.patch_embed.")
    tower, blocks = _below(tensors, "visual."), _below(tensors, "visual.blocks.")
    return ModelShape(
        name=name,
        hidden=embedding[1],
        intermediate=layer["mlp.down_proj.weight"][1],
        num_layers=_num_layers(tensors, "model.layers."),
        query_size=layer["self_attn.q_proj.weight"][0],
        key_value_size=layer["self_attn.k_proj.weight"][0],
        norm_inputs=sum(_norm_input(name, layer) for name in layer if "norm" in name),
        vocab=embedding[0],
        tied=layout.is_tied,
        num_language_parameters=_num_elements(tensors) - _num_elements(tower),
        layer_matrix_parameters=_num_elements({each: shape for each, shape in layer.items() if len(shape) == 2}),
        vision_hidden=patch_embed["proj.weight"][0],
        vision_intermediate=vision.intermediate_size,
        vision_layers=_num_layers(tensors, "visual.blocks."),
        vision_gated=vision.is_gated,
        vision_full_layers=vision.num_full_layers,
        window_patches=vision.window_patches,
        merge=layout.merge_size,
        patch_parameters=_num_elements(patch_embed),
        vision_block_parameters=_num_elements(block),
        merger_parameters=_num_elements(tower) - _num_elements(blocks) - _num_elements(patch_embed),
        language_matrices=_matrices(_below(tensors, "model.layers.")),
        vision_matrices=_matrices(tower),
    )


def _below(tensors: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in tensors.items() if name.startswith(prefix)}


def _norm_input(name: str, layer: Mapping[str, Shape]) -> int:
    """Return the width of the input of a norm; one of queries or keys is as wide as the projection before it."""
    is_of_head = name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    return layer[name.replace("_norm", "_proj") if is_of_head else name][0]


def _matrices(tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    return {
        name.removesuffix(".weight"): shape
        for name, shape in tensors.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def _num_layers(tensors: Mapping[str, Shape], prefix: str) -> int:
    return len({name.partition(".")[0] for name in _below(tensors, prefix)})


def _num_elements(tensors: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())
