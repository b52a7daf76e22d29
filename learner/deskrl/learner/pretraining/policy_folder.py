"""Model folder of the pretrained policy: shape, tokenizer, prompts, and weights with their checksum.

Texts are tokenised by character, so that a name on the screen and in an instruction has the same parts; every number is
one token, and so is each fixed part of prompts and actions.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.learner.policy.architectures import QWEN_CHAT, load_learner_architecture
from deskrl.learner.policy.random_weight_model import ARCHITECTURE, ModelShape, model_config
from deskrl.learner.policy.tiny_model import build_tokenizer, write_image_processor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGEST_NUMBER = 1279
"""Largest coordinate; each number up to it is one token."""
SYSTEM_PROMPT = "Use the computer."
ANSWER_OPENING = ("Thought: ", "\nAction: ", "click(start_box='(")
ANSWER_SEPARATOR = ","
ANSWER_CLOSING = ")')"
_FIXED_PARTS = (
    SYSTEM_PROMPT,
    "system\n",
    "user\n",
    "assistant\n",
    *ANSWER_OPENING,
    ANSWER_CLOSING,
    *(f"{name}(start_box='(" for name in ("left_double", "right_single", "hover", "drag", "scroll")),
    ")', end_box='(",
    *(f")', direction='{name}')" for name in ("up", "down", "left", "right")),
    "hotkey(key='",
    "type(content='",
    "finished(content='",
    "finished()",
    "wait()",
    "call_user()",
    "')",
)
_MAX_LENGTH = 8192
_VOCAB_MULTIPLE = 64

_HEAD_WIDTH = 64
_SHARD_SIZE = "15MB"
_CHECKSUMS = "SHA256SUMS"


def policy_shape(text_width: int, text_layers: int, vision_width: int, vision_layers: int) -> ModelShape:
    """Return the shape of a policy; widths are multiples of 64, the width of an attention head."""
    text_heads = text_width // _HEAD_WIDTH
    return ModelShape(
        text={
            "hidden_size": text_width,
            "intermediate_size": _mlp_width(text_width),
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads,
            "num_key_value_heads": text_heads,
            "max_position_embeddings": _MAX_LENGTH,
            "rms_norm_eps": 1e-6,
            # The positions of columns use the last section, which has the lowest frequencies. With the usual base of
            # 1e6, neighbouring columns would have nearly equal angles.
            "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 14, 14]},
        },
        vision={
            "depth": vision_layers,
            "hidden_size": vision_width,
            "intermediate_size": _mlp_width(vision_width),
            "num_heads": vision_width // _HEAD_WIDTH,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(vision_layers)),
        },
        min_pixels=28 * 28,
        max_pixels=1280 * 28 * 28,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


def _mlp_width(width: int) -> int:
    """Return the width of a gated MLP with about as many parameters as one of four times `width` without a gate."""
    return round(2.7 * width / 32) * 32


def build_character_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: characters, numbers, fixed parts and special tokens."""
    from tokenizers import AddedToken

    tokenizer = build_tokenizer([], LARGEST_NUMBER, _MAX_LENGTH, QWEN_CHAT)
    tokenizer.add_tokens([AddedToken(part, normalized=False, special=False) for part in _FIXED_PARTS])
    return tokenizer


def policy_config(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return transformers' configuration of the policy; the vocabulary is padded to a multiple of 64."""
    vocab_size = -(-len(tokenizer) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    tokens = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_CHAT.special_tokens}
    config = model_config(replace(shape, text={**shape.text, "vocab_size": vocab_size}), tokens)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def write_policy_folder(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, shape: ModelShape) -> None:
    """Write a model folder that transformers and vLLM load, with weights in bfloat16 and their checksums.

    Args:
        folder: model folder; created if missing, files of the same names are replaced.
        model: trained model; it is not changed.
        tokenizer: tokenizer of the policy.
        shape: shape of the model.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    settings = {
        "image_mean": list(shape.image_mean),
        "image_std": list(shape.image_std),
        "patch_size": shape.vision["patch_size"],
        "temporal_patch_size": shape.vision["temporal_patch_size"],
        "merge_size": shape.vision["spatial_merge_size"],
    }
    architecture = load_learner_architecture(ARCHITECTURE)
    write_image_processor(folder, architecture, settings, shape.min_pixels, shape.max_pixels)
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    sums = [f"{digest}  {name}\n" for name, digest in weight_checksums(folder).items()]
    (folder / _CHECKSUMS).write_text("".join(sums), encoding="utf-8")


def weight_checksums(folder: Path) -> dict[str, str]:
    """Return the hex SHA-256 of each weight file of a model folder, by name."""
    files = sorted(folder.glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
