"""Writes a Qwen2.5-VL of any shape with made-up weights, in bfloat16 and shard by shard.

What a machine can do with a model depends on its shape, not on what its numbers say: a folder written here loads and
runs as the real one, offline, and its policy acts at random. Weights are drawn so that activations stay finite. Knows
shapes; never holds more of the model than a few shards.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core import ids
from deskrl.learner.policy.tiny_model import SPECIAL_TOKENS, build_tokenizer, write_image_processor

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT_STD = 0.02
"""Of every matrix, as transformers draws them: with a norm before each block, activations grow by the block only."""
_MAX_WRITERS = 8
"""Files drawn at a time: each takes up to 3 GB of memory while it is made."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2.5-VL; `text` and `vision` hold what differs from transformers' defaults, by its names."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    min_pixels: int
    max_pixels: int
    shard_bytes: int = 1024**3
    tied: bool = False
    """Whether the embedding is also the head."""
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


UI_TARS_7B = Shape(
    text={
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    },
    vision={
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    min_pixels=3136,
    max_pixels=12845056,
)
"""8.3 billion parameters: 7.6 of language, 0.7 of vision."""

QWEN_3B = replace(
    UI_TARS_7B,
    text={
        **UI_TARS_7B.text,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    tied=True,
)
"""3.8 billion parameters: 3.1 of language, 0.7 of vision; Qwen2.5-VL-3B's."""

SHAPES = {"ui_tars_7b_shape": UI_TARS_7B, "qwen_3b_shape": QWEN_3B}
"""By the name that `model.build` gives them."""


def build_shaped_model(folder: Path, seed: int, shape: Shape, largest_number: int, corpus: Iterable[str]) -> None:
    """Write a model folder that transformers and vLLM load as any other Qwen2.5-VL; its weights' index comes last.

    Args:
        folder: made if absent; files of the same names are replaced.
        seed: of the weights.
        shape: sizes; the tokenizer fills the first rows of the vocabulary, the others stand for nothing.
        largest_number: the largest coordinate, which is one token.
        corpus: texts of the kind that the policy reads and writes; their words become tokens.
    """
    config = write_all_but_weights(folder, shape, largest_number, corpus)
    _write_weights(folder, seed, config, shape.shard_bytes)


def write_all_but_weights(folder: Path, shape: Shape, largest_number: int, corpus: Iterable[str]) -> Any:
    """The tokenizer, the processor and the configuration of such a folder; returns the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(corpus, largest_number, shape.text["max_position_embeddings"])
    tokenizer.save_pretrained(folder)
    write_image_processor(
        folder,
        "qwen2_5_vl",
        {
            "image_mean": list(shape.image_mean),
            "image_std": list(shape.image_std),
            "patch_size": shape.vision["patch_size"],
            "temporal_patch_size": shape.vision["temporal_patch_size"],
            "merge_size": shape.vision["spatial_merge_size"],
        },
        shape.min_pixels,
        shape.max_pixels,
    )
    config = model_config(shape, {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS})
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    return config


def model_config(shape: Shape, token: Mapping[str, int]) -> Any:
    """The configuration of a shape; `token` gives the id of each special token."""
    from transformers import Qwen2_5_VLConfig

    ends = {
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
    }
    return Qwen2_5_VLConfig(
        text_config={**shape.text, **ends, "tie_word_embeddings": shape.tied, "dtype": "bfloat16"},
        vision_config={**shape.vision, "out_hidden_size": shape.text["hidden_size"]},
        tie_word_embeddings=shape.tied,
        dtype="bfloat16",
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        **ends,
    )


def draw_(tensor: Tensor, name: str, generator: Any) -> Tensor:
    """Fill a parameter with what an untrained model would have there."""
    if tensor.ndim > 1:
        return tensor.normal_(0.0, _WEIGHT_STD, generator=generator)
    return tensor.fill_(0.0 if name.endswith("bias") else 1.0)


def _write_weights(folder: Path, seed: int, config: Any, shard_bytes: int) -> None:
    shapes = _tensor_shapes(config)
    shards = _shards(shapes, shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]

    def write(name: str, shard: list[str]) -> None:
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(ids.derive_seed(seed, name) % 2**63)
        tensors = {
            # Drawn in float32: the generator is several times slower for bfloat16.
            key: draw_(torch.empty(shapes[key]), key, generator).to(torch.bfloat16)
            for key in shard
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})

    with ThreadPoolExecutor(min(_MAX_WRITERS, os.cpu_count() or 1)) as pool:
        list(pool.map(write, names, shards))
    index = {
        "metadata": {"total_size": 2 * sum(math.prod(size) for size in shapes.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors by the names of its files."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        for name in model.all_tied_weights_keys:
            tensors.pop(name, None)
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, tensors).items()}


def _shards(shapes: Mapping[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    """Names of tensors, file by file: no file larger than `shard_bytes`, unless it holds a single tensor."""
    shards: list[list[str]] = []
    room = 0
    for name, size in shapes.items():
        num_bytes = 2 * math.prod(size)
        if not shards or num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= num_bytes
    return shards
