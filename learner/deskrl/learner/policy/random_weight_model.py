"""Random-weight model: writes a Qwen2.5-VL of any shape with random weights, in bfloat16 and shard by shard.

Memory use and speed depend on a model's shape only: such a folder loads and runs like the real model, without a
download, and its policy acts at random. Weights are scaled so that activations stay finite. Transformers'
`save_pretrained` would need the whole model in memory; this holds a few shards at a time.
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
from deskrl.learner.policy.architectures import QWEN_CHAT, load_learner_architecture
from deskrl.learner.policy.tiny_model import build_tokenizer, write_image_processor

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT_STD = 0.02
"""Standard deviation of every matrix, as in transformers; norms before each block limit the growth of activations."""
_MAX_WRITERS = 8
"""Number of files written concurrently; each needs up to 3 GB of memory."""


@dataclass(frozen=True)
class ModelShape:
    """Shape of a Qwen2.5-VL."""

    text: Mapping[str, Any]
    """Settings of the language model that differ from transformers' defaults, by transformers' names."""
    vision: Mapping[str, Any]
    """Settings of the vision tower that differ from transformers' defaults, by transformers' names."""
    min_pixels: int
    max_pixels: int
    shard_bytes: int = 1024**3
    tied: bool = False
    """Whether the output head shares the weights of the embedding."""
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


UI_TARS_7B = ModelShape(
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
"""Shape of UI-TARS-7B: 8.3 billion parameters, 7.6 of them in the language model and 0.7 in the vision tower."""

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
"""Shape of Qwen2.5-VL-3B: 3.8 billion parameters, 3.1 of them in the language model and 0.7 in the vision tower."""

ARCHITECTURE = "qwen2_5_vl"
"""Architecture of all shapes."""
SHAPES = {"ui_tars_7b_shape": UI_TARS_7B, "qwen_3b_shape": QWEN_3B}
"""Shapes by the value of `model.build`."""


def build_random_weight_model(
    folder: Path, seed: int, shape: ModelShape, largest_number: int, corpus: Iterable[str]
) -> None:
    """Write a model folder that transformers and vLLM load like any other Qwen2.5-VL; the weight index comes last.

    Args:
        folder: model folder; created if missing, files of the same names are replaced.
        seed: seed of the random weights.
        shape: shape of the model; vocabulary rows beyond the tokenizer's size are unused.
        largest_number: largest coordinate; each number up to it is one token.
        corpus: texts like those that the policy reads and writes; their words become tokens.
    """
    config = write_config_and_processor(folder, shape, largest_number, corpus)
    _write_weights(folder, seed, config, shape.shard_bytes)


def write_config_and_processor(folder: Path, shape: ModelShape, largest_number: int, corpus: Iterable[str]) -> Any:
    """Write tokenizer, processor and configuration of such a folder; return the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(corpus, largest_number, shape.text["max_position_embeddings"], QWEN_CHAT)
    tokenizer.save_pretrained(folder)
    write_image_processor(
        folder,
        load_learner_architecture(ARCHITECTURE),
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
    config = model_config(shape, {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_CHAT.special_tokens})
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    return config


def model_config(shape: ModelShape, token: Mapping[str, int]) -> Any:
    """Return transformers' configuration of a shape.

    Args:
        shape: shape of the model.
        token: id of each special token.
    """
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
    """Fill a parameter in place with the initial values of an untrained model.

    Args:
        tensor: parameter to fill.
        name: name of the parameter; biases become zero.
        generator: random generator.
    """
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
            # Generated in float32: the random generator is several times slower for bfloat16.
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
    """Return the shapes of a model's tensors by the names in its checkpoint files."""
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
    """Return the names of the tensors of each file; a file exceeds `shard_bytes` only if it holds a single tensor."""
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
