"""Qwen2-VL and Qwen2.5-VL: the tensors and sizes of their models.

Names of tensors are those of published models. A test compares them with transformers' own models.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

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


def _text(
    hidden: int, inner: int, layers: int, heads: int, key_value_heads: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    """Return sizes of a published language model by their names in config.json."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def _tower(output: int, inner: int = 3420) -> dict[str, Any]:
    """Return sizes of a published vision tower of Qwen2.5-VL."""
    sizes = {"hidden_size": 1280, "intermediate_size": inner, "out_hidden_size": output}
    return {"vision_config": {**sizes, "fullatt_block_indexes": [7, 15, 23, 31]}}


_TEXT_7B = _text(3584, 18944, 28, 28, 4, 152064)
_TEXT_72B = _text(8192, 29568, 80, 64, 8, 152064)


class _QwenVL(Architecture):
    """Qwen2's language model after a vision tower."""

    def layout(self, config: Mapping[str, Any]) -> TensorLayout:
        text, vision = text_and_vision(config)
        vocab = text.size("vocab_size")
        patch, merge = vision.size("patch_size", 14), vision.size("spatial_merge_size", 2)
        output = self._output_size(vision)
        tensors = language_tensors(text, _language_layer(text), output, is_tied(config))
        width = self._width(vision)
        channels = vision.size("in_channels" if "in_channels" in vision.values else "in_chans", 3)
        temporal = vision.size("temporal_patch_size", 2)
        tensors["visual.patch_embed.proj.weight"] = (width, channels, temporal, patch, patch)
        block = [*_attention(width), *self._rest_of_block(vision, width)]
        for index in range(vision.size("depth", 32, limit=MAX_LAYERS)):
            tensors |= {f"visual.blocks.{index}.{name}": shape for name, shape in block}
        tensors |= {f"visual.merger.ln_q.{name}": (width,) for name in self._norm_tensors()}
        tensors |= {f"visual.merger.{name}": shape for name, shape in _merger(width, merge, output)}
        return TensorLayout(tensors, is_tied(config), vocab, patch, merge, read_token_ids(config))

    @abstractmethod
    def _output_size(self, vision: Sizes) -> int:
        """Return the number of features of an image token."""

    @abstractmethod
    def _width(self, vision: Sizes) -> int:
        """Return the number of features of a patch."""

    @abstractmethod
    def _rest_of_block(self, vision: Sizes, width: int) -> Iterator[tuple[str, Shape]]:
        """Yield the tensors of a block of the vision tower except those of its attention."""

    @abstractmethod
    def _norm_tensors(self) -> tuple[str, ...]:
        """Return the names of the tensors of a norm in the vision tower."""


class Qwen2VL(_QwenVL):
    """Qwen2-VL: plain MLPs and layer norms in the vision tower, attention over the whole screenshot."""

    model_type = "qwen2_vl"
    title = "Qwen2-VL"
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "2b": _text(1536, 8960, 28, 12, 2, 151936, tied=True) | {"vision_config": {"hidden_size": 1536}},
        "7b": _TEXT_7B | {"vision_config": {"hidden_size": 3584}},
        "72b": _TEXT_72B | {"vision_config": {"hidden_size": 8192}},
    }

    def vision_sizes(self, config: Mapping[str, Any]) -> VisionSizes:
        """Return further sizes of the vision tower."""
        _, vision = text_and_vision(config)
        inner = int(self._width(vision) * vision.factor("mlp_ratio", 4))
        return VisionSizes(inner, False, vision.size("depth", 32, limit=MAX_LAYERS), window_patches=64)

    # In Qwen2-VL, embed_dim is the width of the tower and hidden_size the width of its output.

    def _output_size(self, vision: Sizes) -> int:
        return vision.size("hidden_size", 3584)

    def _width(self, vision: Sizes) -> int:
        return vision.size("embed_dim", 1280)

    def _rest_of_block(self, vision: Sizes, width: int) -> Iterator[tuple[str, Shape]]:
        inner = int(width * vision.factor("mlp_ratio", 4))
        yield from linear("mlp.fc1", inner, width)
        yield from linear("mlp.fc2", width, inner)
        for norm in ("norm1", "norm2"):
            for name in self._norm_tensors():
                yield f"{norm}.{name}", (width,)

    def _norm_tensors(self) -> tuple[str, ...]:
        return ("weight", "bias")


class Qwen25VL(_QwenVL):
    """Qwen2.5-VL: gated MLPs and RMS norms in the vision tower, attention within windows in most layers."""

    model_type = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    name_pattern = r"ui-?tars[-_ ]?1[._]5|uitars1[._]5|qwen2[._]5"
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "3b": _text(2048, 11008, 36, 16, 2, 151936, tied=True) | _tower(2048),
        "7b": _TEXT_7B | _tower(3584),
        "32b": _text(5120, 27648, 64, 40, 8, 152064) | _tower(5120, 3456),
        "72b": _TEXT_72B | _tower(8192),
    }

    def vision_sizes(self, config: Mapping[str, Any]) -> VisionSizes:
        """Return further sizes of the vision tower."""
        _, vision = text_and_vision(config)
        window = vision.size("window_size", 112) // vision.size("patch_size", 14)
        full = vision.values.get("fullatt_block_indexes", ())
        return VisionSizes(vision.size("intermediate_size", 3420), True, len(full), window**2)

    def _output_size(self, vision: Sizes) -> int:
        return vision.size("out_hidden_size", 3584)

    def _width(self, vision: Sizes) -> int:
        return vision.size("hidden_size", 3584)

    def _rest_of_block(self, vision: Sizes, width: int) -> Iterator[tuple[str, Shape]]:
        inner = vision.size("intermediate_size", 3420)
        yield from linear("mlp.gate_proj", inner, width)
        yield from linear("mlp.up_proj", inner, width)
        yield from linear("mlp.down_proj", width, inner)
        for norm in ("norm1", "norm2"):
            yield f"{norm}.weight", (width,)

    def _norm_tensors(self) -> tuple[str, ...]:
        return ("weight",)


def _language_layer(text: Sizes) -> Iterator[tuple[str, Shape]]:
    hidden, inner, heads = text.size("hidden_size"), text.size("intermediate_size"), text.size("num_attention_heads")
    key_value_heads = text.size("num_key_value_heads", heads)
    if hidden % heads or heads % key_value_heads:
        raise ConfigError(
            f"hidden_size = {hidden}, num_attention_heads = {heads} and num_key_value_heads = {key_value_heads} "
            "do not divide one another"
        )
    key_value = hidden // heads * key_value_heads
    for name, size in (("q", hidden), ("k", key_value), ("v", key_value)):
        yield f"self_attn.{name}_proj.weight", (size, hidden)
        yield f"self_attn.{name}_proj.bias", (size,)
    yield "self_attn.o_proj.weight", (hidden, hidden)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _attention(width: int) -> Iterator[tuple[str, Shape]]:
    yield from linear("attn.qkv", 3 * width, width)
    yield from linear("attn.proj", width, width)


def _merger(width: int, merge: int, output: int) -> Iterator[tuple[str, Shape]]:
    merged = width * merge**2
    yield from linear("mlp.0", merged, merged)
    yield from linear("mlp.2", output, merged)
