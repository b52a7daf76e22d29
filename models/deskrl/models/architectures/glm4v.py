"""GLM-4.1V: the tensors and sizes of its models.

Names of tensors are those of `TensorLayout`. A test compares them with transformers' own models.
"""

from __future__ import annotations

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

_TEXT_9B = {
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "vocab_size": 151552,
    "attention_bias": True,
}
_VISION_9B = {
    "depth": 24,
    "hidden_size": 1536,
    "intermediate_size": 13696,
    "out_hidden_size": 4096,
    "image_size": 336,
}
_IMAGE_TOKEN = "<|image|>"
_TOKENS = {
    _IMAGE_TOKEN: ("image_token_id", 151343),
    "<|begin_of_image|>": ("image_start_token_id", 151339),
    "<|end_of_image|>": ("image_end_token_id", 151340),
}


class Glm4V(Architecture):
    """GLM-4.1V: gate and input of an MLP in one matrix, four norms in a layer, gated MLPs in the vision tower."""

    model_type = "glm4v"
    title = "GLM-4.1V"
    name_pattern = r"glm[-_ ]?4[._]1v"
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "9b": {"text_config": _TEXT_9B, "vision_config": _VISION_9B, "tie_word_embeddings": False}
    }
    # The processor's limits count each pixel of a still image twice, because it is two frames.
    published_sizing = ImageSizing(patch_size=14, merge_size=2, min_pixels=12544 // 2, max_pixels=9633792 // 2)

    def layout(self, config: Mapping[str, Any]) -> TensorLayout:
        """Return the tensors of a model by the content of its config.json."""
        text, vision = text_and_vision(config)
        vocab = text.size("vocab_size")
        patch, merge = vision.size("patch_size", 14), vision.size("spatial_merge_size", 2)
        output = vision.size("out_hidden_size", 4096)
        tensors = language_tensors(text, _language_layer(text), output, is_tied(config))
        tensors |= {f"visual.{name}": shape for name, shape in _vision_tower(vision, patch, merge, output)}
        ids = read_token_ids(config, _TOKENS)
        return TensorLayout(tensors, is_tied(config), vocab, patch, merge, ids, _IMAGE_TOKEN)

    def vision_sizes(self, config: Mapping[str, Any]) -> VisionSizes:
        """Return further sizes of the vision tower: each layer attends to the whole screenshot."""
        _, vision = text_and_vision(config)
        depth = vision.size("depth", 24, limit=MAX_LAYERS)
        # The MLPs of the blocks are as wide as the output; intermediate_size is the width of the merger.
        return VisionSizes(vision.size("out_hidden_size", 4096), True, depth, window_patches=1)


def _language_layer(text: Sizes) -> Iterator[tuple[str, Shape]]:
    hidden, inner, heads = text.size("hidden_size"), text.size("intermediate_size"), text.size("num_attention_heads")
    key_value_heads = text.size("num_key_value_heads", 2)
    if hidden % heads or heads % key_value_heads:
        raise ConfigError(
            f"hidden_size = {hidden}, num_attention_heads = {heads} and num_key_value_heads = {key_value_heads} "
            "do not divide one another"
        )
    if text.values.get("attention_bias") is not True:  # vLLM would ignore the biases without an error
        raise ConfigError("text_config.attention_bias is not true, but queries, keys and values have biases")
    key_value = hidden // heads * key_value_heads
    yield from linear("self_attn.q_proj", hidden, hidden)
    yield from linear("self_attn.k_proj", key_value, hidden)
    yield from linear("self_attn.v_proj", key_value, hidden)
    yield "self_attn.o_proj.weight", (hidden, hidden)
    yield "mlp.gate_up_proj.weight", (2 * inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)
    for norm in ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"):
        yield f"{norm}.weight", (hidden,)


def _vision_tower(vision: Sizes, patch: int, merge: int, output: int) -> Iterator[tuple[str, Shape]]:
    width, inner = vision.size("hidden_size", 1536), vision.size("intermediate_size", 13696)
    channels, temporal = vision.size("in_channels", 3), vision.size("temporal_patch_size", 2)
    yield "patch_embed.proj.weight", (width, channels, temporal, patch, patch)
    yield "patch_embed.proj.bias", (width,)
    yield "embeddings.position_embedding.weight", ((vision.size("image_size", 336) // patch) ** 2, width)
    block = list(_vision_block(width, output, bool(vision.values.get("attention_bias", False))))
    for index in range(vision.size("depth", 24, limit=MAX_LAYERS)):
        yield from ((f"blocks.{index}.{name}", shape) for name, shape in block)
    for norm in ("post_conv_layernorm", "post_layernorm"):
        yield f"{norm}.weight", (width,)
    yield "downsample.weight", (output, width, merge, merge)
    yield "downsample.bias", (output,)
    yield "merger.proj.weight", (output, output)
    for name in ("weight", "bias"):
        yield f"merger.post_projection_norm.{name}", (output,)
    yield from _gated_mlp("merger", output, inner)


def _vision_block(width: int, inner: int, has_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield "attn.qkv.weight", (3 * width, width)
    if has_bias:
        yield "attn.qkv.bias", (3 * width,)
    yield "attn.proj.weight", (width, width)
    yield from _gated_mlp("mlp", width, inner)
    for norm in ("norm1", "norm2"):
        yield f"{norm}.weight", (width,)


def _gated_mlp(name: str, width: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate_proj.weight", (inner, width)
    yield f"{name}.up_proj.weight", (inner, width)
    yield f"{name}.down_proj.weight", (width, inner)
