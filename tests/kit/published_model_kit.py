"""Converts a model folder written by the current transformers to the format of published models (2025).

The rotary settings are called `rope_scaling`, the limits on pixels are in `size`, and the chat template is a string in
the tokenizer's configuration. The configuration of UI-TARS is flat (no `text_config`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NEW_KEYS = {"model_type", "rope_parameters", "layer_types", "dtype", "_name_or_path"}
_NEW_VISION_KEYS = {"dtype", "rope_parameters", "initializer_range", "in_channels", "model_type"}


def to_published_format(folder: Path) -> Path:
    """Convert the folder of a tiny model in place; return it."""
    config = _read(folder / "config.json")
    convert = {"qwen3_vl": _convert_qwen3_vl, "glm4v": _convert_glm4v}.get(config["model_type"], _convert_ui_tars)
    convert(folder, config)
    template = folder / "chat_template.jinja"
    tokenizer = _read(folder / "tokenizer_config.json")
    _write(folder / "tokenizer_config.json", tokenizer | {"chat_template": template.read_text(encoding="utf-8")})
    template.unlink()
    return folder


def _convert_ui_tars(folder: Path, config: dict[str, Any]) -> None:
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text["rope_parameters"]
    flat = {key: value for key, value in text.items() if key not in _NEW_KEYS} | config
    flat |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    flat["vision_config"] = {key: value for key, value in vision.items() if key not in _NEW_VISION_KEYS}
    flat["vision_config"] |= {"in_chans": 3, "spatial_patch_size": vision["patch_size"]}
    flat["torch_dtype"] = flat.pop("dtype")
    _write(folder / "config.json", flat)

    image = _read(folder / "preprocessor_config.json")
    image["size"] = {key: image[key] for key in ("max_pixels", "min_pixels")}
    _write(folder / "preprocessor_config.json", image)


def _convert_qwen3_vl(folder: Path, config: dict[str, Any]) -> None:
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    vision |= {"model_type": "qwen3_vl"}
    for table, names in ((vision, ("rope_parameters", "dtype")), (config, ("dtype", "pad_token_id", "bos_token_id"))):
        for name in names:
            table.pop(name)
    _write(folder / "config.json", config)
    image = _read(folder / "preprocessor_config.json")
    names = ("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "processor_class")
    image = {name: image[name] for name in names} | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    _write(folder / "preprocessor_config.json", image)
    video = image | {"video_processor_type": "Qwen3VLVideoProcessor", "temporal_patch_size": 2}
    del video["image_processor_type"]
    _write(folder / "video_preprocessor_config.json", video)


def _convert_glm4v(folder: Path, config: dict[str, Any]) -> None:
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": {"type": "default", "mrope_section": rope["mrope_section"]},
    }
    del config["vision_config"]["rope_parameters"]
    _write(folder / "config.json", config)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
