"""Qwen3-VL (dense): the tensors and sizes of its models.

Names of tensors are those of `TensorLayout`. A test compares them with transformers' own models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from deskrl.core.prompt_rendering import ImageSizing
from deskrl.models.architectures.model_architecture import (
    MAX_LAYERS,
    Architecture,
    ConfigError,
    Shape,
    Sizes,
    TensorLayout,
    VisionSizes,
    is_tied,
    language_tensors,
    linear,
    read_token_ids,
    text_and_vision,
)

_DEFAULT_LEVELS = [8, 16, 24]


def _published(
    hidden: int, inner: int, layers: int, heads: int, vision: Mapping[str, Any], tied: bool = False
) -> dict[str, Any]:
    """Return sizes of a published model by their names in config.json."""
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    return {"text_config": text, "vision_config": {**vision, "out_hidden_size": hidden}, "tie_word_embeddings": tied}


_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


class Qwen3VL(Architecture):
    """Qwen3's language model with norms of queries and keys, after a vision tower of which it reads several levels.

    Beside its output, the vision tower has outputs after some of its blocks (DeepStack). They are added to the hidden
    states of image tokens after the first decoder layers.
    """

    model_type = "qwen3_vl"
    title = "Qwen3-VL"
    name_pattern = r"qwen3[-_ ]?vl"
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "2b": _published(2048, 6144, 28, 16, _SMALL_TOWER, tied=True),
        "4b": _published(2560, 9728, 36, 32, _SMALL_TOWER, tied=True),
        "8b": _published(4096, 12288, 36, 32, _LARGE_TOWER),
    }
    published_sizing = ImageSizing(patch_size=16, merge_size=2, min_pixels=65536, max_pixels=16777216)

    def layout(self, config: Mapping[str, Any]) -> TensorLayout:
        """Return the tensors of a model by the content of its config.json."""
        text, vision = text_and_vision(config)
        vocab = text.size("vocab_size")
        patch, merge = vision.size("patch_size", 16), vision.size("spatial_merge_size", 2)
        output = vision.size("out_hidden_size", 3584)
        tensors = language_tensors(text, _language_layer(text), output, is_tied(config))
        tensors |= {f"visual.{name}": shape for name, shape in _vision_tower(vision, patch, merge, output)}
        return TensorLayout(tensors, is_tied(config), vocab, patch, merge, read_token_ids(config))

    def vision_sizes(self, config: Mapping[str, Any]) -> VisionSizes:
        """Return further sizes of the vision tower: each layer attends to the whole screenshot."""
        _, vision = text_and_vision(config)
        depth = vision.size("depth", 27, limit=MAX_LAYERS)
        return VisionSizes(vision.size("intermediate_size", 4304), False, depth, window_patches=1)


def _language_layer(text: Sizes) -> Iterator[tuple[str, Shape]]:
    hidden, inner, heads = text.size("hidden_size"), text.size("intermediate_size"), text.size("num_attention_heads")
    key_value_heads, width = text.size("num_key_value_heads", 32), text.size("head_dim", 128)
    if heads % key_value_heads:
        raise ConfigError(
            f"num_attention_heads = {heads} and num_key_value_heads = {key_value_heads} do not divide one another"
        )
    has_bias = text.values.get("attention_bias", False)
    sizes = {"q": heads * width, "k": key_value_heads * width, "v": key_value_heads * width}
    projections = {name: (size, hidden) for name, size in sizes.items()} | {"o": (hidden, heads * width)}
    for name, (outputs, inputs) in projections.items():
        yield f"self_attn.{name}_proj.weight", (outputs, inputs)
        if has_bias:
            yield f"self_attn.{name}_proj.bias", (outputs,)
    yield "self_attn.q_norm.weight", (width,)
    yield "self_attn.k_norm.weight", (width,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _vision_tower(vision: Sizes, patch: int, merge: int, output: int) -> Iterator[tuple[str, Shape]]:
    width, merged = vision.size("hidden_size", 1152), vision.size("hidden_size", 1152) * merge**2
    channels, temporal = vision.size("in_channels", 3), vision.size("temporal_patch_size", 2)
    yield "patch_embed.proj.weight", (width, channels, temporal, patch, patch)
    yield "patch_embed.proj.bias", (width,)
    num_positions = vision.size("num_position_embeddings", 2304)
    if math.isqrt(num_positions) ** 2 != num_positions:
        raise ConfigError(f"vision_config.num_position_embeddings = {num_positions} is not a square")
    yield "pos_embed.weight", (num_positions, width)
    block = list(_vision_block(width, vision.size("intermediate_size", 4304)))
    for index in range(vision.size("depth", 27, limit=MAX_LAYERS)):
        yield from ((f"blocks.{index}.{name}", shape) for name, shape in block)
    yield from _merger("merger", width, merged, output)
    for index in range(len(_levels(vision))):
        yield from _merger(f"deepstack_merger_list.{index}", merged, merged, output)


def _levels(vision: Sizes) -> list[int]:
    """Return the indices of the blocks after which the language model reads the vision tower."""
    levels, depth = vision.values.get("deepstack_visual_indexes", _DEFAULT_LEVELS), vision.size("depth", 27)
    is_valid = isinstance(levels, list) and all(isinstance(it, int) and 0 <= it < depth for it in levels)
    if not is_valid or len(set(levels)) != len(levels):
        raise ConfigError(f"vision_config.deepstack_visual_indexes is not a list of different numbers below {depth}")
    return list(levels)


def _vision_block(width: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield from linear("attn.qkv", 3 * width, width)
    yield from linear("attn.proj", width, width)
    yield from linear("mlp.linear_fc1", inner, width)
    yield from linear("mlp.linear_fc2", width, inner)
    for norm in ("norm1", "norm2"):
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)


def _merger(name: str, normed: int, merged: int, output: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.norm.weight", (normed,)
    yield f"{name}.norm.bias", (normed,)
    yield from linear(f"{name}.linear_fc1", merged, merged)
    yield from linear(f"{name}.linear_fc2", output, merged)
