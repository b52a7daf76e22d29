"""The sizes of a Qwen2-VL or Qwen2.5-VL, from its configuration or its name, and what follows: parameters and work.

Pure arithmetic; loads no model. Tokens are of the language model, patches are what the vision tower sees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PUBLISHED: Mapping[str, tuple[int, int, int, int, int, int, bool]] = {
    # name: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "qwen2_vl 2b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2_vl 7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2_vl 72b": (8192, 29568, 80, 64, 8, 152064, False),
    "qwen2_5_vl 3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2_5_vl 7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2_5_vl 32b": (5120, 27648, 64, 40, 8, 152064, False),
    "qwen2_5_vl 72b": (8192, 29568, 80, 64, 8, 152064, False),
}
"""Sizes of the families that UI-TARS is made of."""


@dataclass(frozen=True)
class ModelShape:
    """What memory and work depend on."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab: int
    tied: bool
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_gated: bool
    """Qwen2.5-VL's vision tower has gated MLPs and root-mean-square norms, Qwen2-VL's has neither."""
    vision_full_layers: int
    """Layers whose attention sees the whole screenshot; that of the others stays within windows."""
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    window_patches: int = 64

    @property
    def key_value_width(self) -> int:
        """Of one layer's keys, and of its values."""
        return self.hidden // self.num_heads * self.num_key_value_heads

    @property
    def num_language_parameters(self) -> int:
        """Embeddings and head counted."""
        biases_and_norms = self.hidden + 2 * self.key_value_width + 2 * self.hidden
        layer = self.layer_matrices + biases_and_norms
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.num_layers * layer + self.hidden + embeddings

    @property
    def layer_matrices(self) -> int:
        """Numbers in the matrices of one layer of the language model."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.key_value_width
        return attention + 3 * self.hidden * self.intermediate

    @property
    def num_vision_parameters(self) -> int:
        """Patch embedding, blocks and merger."""
        return self._patch_weights + self.vision_layers * self._vision_block + self._merger

    @property
    def _patch_weights(self) -> int:
        return 3 * self.temporal_patch * self.patch**2 * self.vision_hidden

    @property
    def _vision_block(self) -> int:
        width, inner = self.vision_hidden, self.vision_intermediate
        attention = 4 * width**2 + 4 * width
        if self.vision_gated:
            return attention + 3 * width * inner + 2 * inner + width + 2 * width
        return attention + 2 * width * inner + inner + width + 4 * width

    @property
    def _merger(self) -> int:
        norm = self.vision_hidden * (1 if self.vision_gated else 2)
        merged = self.vision_hidden * self.merge**2
        return norm + merged**2 + merged + merged * self.hidden + self.hidden

    @property
    def num_parameters(self) -> int:
        """All."""
        return self.num_language_parameters + self.num_vision_parameters

    @property
    def key_value_numbers_per_token(self) -> int:
        """Of the KV cache."""
        return 2 * self.num_layers * self.key_value_width

    def language_flops(self, num_tokens: int, num_targets: int) -> float:
        """Of one forward pass over a row, attention causal, logits at the targets alone."""
        body = self.num_language_parameters - self.vocab * self.hidden * (1 if self.tied else 2)
        attention = 2 * self.num_layers * self.hidden * num_tokens**2
        return 2.0 * body * num_tokens + attention + 2.0 * self.vocab * self.hidden * num_targets

    def vision_flops(self, num_patches: int) -> float:
        """Of one forward pass over one screenshot."""
        products = 2.0 * num_patches * (self._patch_weights + self.vision_layers * self._vision_block)
        merging = 2.0 * num_patches / self.merge**2 * self._merger
        windowed = self.vision_layers - self.vision_full_layers
        pairs = self.vision_full_layers * num_patches**2 + windowed * num_patches * self.window_patches
        return products + merging + 4.0 * self.vision_hidden * pairs


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a config.json tells, nested (`text_config`) or flat."""
    text = {**config, **config.get("text_config", {})}
    vision = config.get("vision_config", {})
    gated = "intermediate_size" in vision
    # Qwen2-VL calls its width embed_dim, and hidden_size what comes out.
    width = vision.get("hidden_size", 1280) if gated else vision.get("embed_dim", 1280)
    return ModelShape(
        name=name,
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_key_value_heads=text.get("num_key_value_heads", text["num_attention_heads"]),
        vocab=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        vision_hidden=width,
        vision_intermediate=vision["intermediate_size"] if gated else int(width * vision.get("mlp_ratio", 4)),
        vision_layers=vision.get("depth", 32),
        vision_gated=gated,
        vision_full_layers=len(vision.get("fullatt_block_indexes", ())) if gated else vision.get("depth", 32),
        window_patches=(vision.get("window_size", 112) // vision.get("patch_size", 14)) ** 2,
        patch=vision.get("patch_size", 14),
        temporal_patch=vision.get("temporal_patch_size", 2),
        merge=vision.get("spatial_merge_size", 2),
    )


def shape_of_name(name: str) -> ModelShape | None:
    """The shape of a published model by its name, as UI-TARS-1.5-7B; None for a name that tells none."""
    size = re.search(r"(?<![\d.])(2|3|7|32|72)b(?![a-z])", name.lower())
    if size is None:
        return None
    newer = re.search(r"ui-?tars[-_ ]?1[._]5|uitars1[._]5|qwen2[._]5", name.lower()) is not None
    family = "qwen2_5_vl" if newer else "qwen2_vl"
    published = _PUBLISHED.get(f"{family} {size[1]}b")
    if published is None:
        return None
    hidden, intermediate, layers, heads, key_value_heads, vocab, tied = published
    vision_intermediate = (3456 if size[1] == "32" else 3420) if newer else 5120
    return ModelShape(
        name=f"{family} {size[1]}b, by the name {name}",
        hidden=hidden,
        intermediate=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab=vocab,
        tied=tied,
        vision_hidden=1280,
        vision_intermediate=vision_intermediate,
        vision_layers=32,
        vision_gated=newer,
        vision_full_layers=4 if newer else 32,
    )
