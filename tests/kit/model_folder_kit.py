"""Model folders without an engine: the files of a published model, with weights of zeros in sparse files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from deskrl.models.architectures import architecture_of

SIZING = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template of the published models."""
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
UI_TARS_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape of each tensor by name."""


def write_json(path: Path, content: object) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON object in a file; None removes a key."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})


def model_config(architecture: str, text: Mapping[str, int] = TINY, vocab_size: int = 320) -> dict[str, Any]:
    """Return the config.json of a published model: flat, except for Qwen3-VL and GLM-4.1V."""
    if architecture in _NESTED:
        return _nested_config(architecture, text, vocab_size)
    hidden = text["hidden_size"]
    vision = {
        "qwen2_vl": {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "hidden_size": hidden},
        "qwen2_5_vl": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": hidden},
    }[architecture]
    return {
        "model_type": architecture,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "num_key_value_heads": text.get("num_key_value_heads", 2),
        **text,
        "vision_config": {**vision, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2},
        **_token_ids(vocab_size),
    }


_NESTED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "qwen3_vl": ({"head_dim": 16}, {"depth": 3, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 9}),
    "glm4v": ({"attention_bias": True}, {"depth": 2, "image_size": 42}),
}
"""Sizes of language model and vision tower that only this architecture has."""


def _nested_config(architecture: str, text: Mapping[str, int], vocab_size: int) -> dict[str, Any]:
    own_text, own_vision = _NESTED[architecture]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14}
    return {
        "model_type": architecture,
        "tie_word_embeddings": False,
        "text_config": {"num_key_value_heads": 2, **text, **own_text, "vocab_size": vocab_size},
        "vision_config": {**vision, **own_vision, "out_hidden_size": text["hidden_size"]},
        **_token_ids(vocab_size),
    }


def _token_ids(vocab_size: int) -> dict[str, int]:
    ids = {token: vocab_size - len(SPECIAL_TOKENS) + index for index, token in enumerate(SPECIAL_TOKENS)}
    return {
        "image_token_id": ids["<|image_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def write_model_folder(
    folder: Path, architecture: str = "qwen2_5_vl", *, config: Mapping[str, Any] | None = None, num_shards: int = 1
) -> Path:
    """Write a folder in the format of a published model; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(config or model_config(architecture))
    write_json(folder / "config.json", content)
    vocab_size = content.get("text_config", {}).get("vocab_size") or content["vocab_size"]
    words = {f"word{index}": index for index in range(vocab_size - len(SPECIAL_TOKENS))}
    added = [
        {"id": len(words) + index, "content": token, "special": True} for index, token in enumerate(SPECIAL_TOKENS)
    ]
    write_json(folder / "tokenizer.json", {"model": {"type": "BPE", "vocab": words}, "added_tokens": added})
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    write_json(folder / "preprocessor_config.json", SIZING)
    shapes = architecture_of(content, folder).layout(content).tensors
    write_weights(folder, {name: ("BF16", shape) for name, shape in shapes.items()}, num_shards)
    return folder


def write_weights(folder: Path, tensors: Tensors, num_shards: int = 1) -> None:
    """Write weight files of zeros, with an index if there are several."""
    if num_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file of zeros; the file is sparse, so it takes no space on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * _DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    data = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + position)


def change_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Write the single weight file of a folder again with other tensors."""
    content = json.loads((folder / "config.json").read_text())
    shapes = architecture_of(content, folder).layout(content).tensors
    write_safetensors(folder / "model.safetensors", change({name: ("BF16", shape) for name, shape in shapes.items()}))


def without(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """Return the tensors without some of them."""
    left_out = set(names)
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def rename_saved_by_transformers(name: str) -> str:
    """Return the name of a published model's tensor in folders saved by transformers since 4.52."""
    if name.startswith("model."):
        return f"model.language_model.{name.removeprefix('model.')}"
    return f"model.{name}" if name.startswith("visual.") else name
