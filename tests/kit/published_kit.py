"""Makes of a folder that today's transformers wrote what the published UI-TARS folders look like, written in 2025.

Their configuration is flat (no `text_config`), positions are called `rope_scaling`, bounds of pixels stand beside each
other in `size`, and the chat template is a string in the tokenizer's configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NEWER = {"model_type", "rope_parameters", "layer_types", "dtype", "_name_or_path"}
_NEWER_OF_VISION = {"dtype", "rope_parameters", "initializer_range", "in_channels", "model_type"}


def as_published(folder: Path) -> Path:
    """Rewrite a tiny model's folder in place."""
    config = _read(folder / "config.json")
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text["rope_parameters"]
    flat = {key: value for key, value in text.items() if key not in _NEWER} | config
    flat |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    flat["vision_config"] = {key: value for key, value in vision.items() if key not in _NEWER_OF_VISION}
    flat["vision_config"] |= {"in_chans": 3, "spatial_patch_size": vision["patch_size"]}
    flat["torch_dtype"] = flat.pop("dtype")
    _write(folder / "config.json", flat)

    image = _read(folder / "preprocessor_config.json")
    image["size"] = {key: image[key] for key in ("max_pixels", "min_pixels")}
    _write(folder / "preprocessor_config.json", image)

    template = folder / "chat_template.jinja"
    tokenizer = _read(folder / "tokenizer_config.json")
    _write(folder / "tokenizer_config.json", tokenizer | {"chat_template": template.read_text(encoding="utf-8")})
    template.unlink()
    return folder


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
