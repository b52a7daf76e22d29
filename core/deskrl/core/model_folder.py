"""What a model folder must hold to be served and trained, and whether it is of the family that a run prompts it as.

Reads small files only, so that a person hears of it within a second. Whether the weights are whole, their loaders tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.families import FAMILIES, Architecture, FamilyName
from deskrl.core.rendering import image_sizing_of

_FILES = {
    "config.json": ("config.json",),
    "weights": ("*.safetensors",),
    "an image processor": ("preprocessor_config.json", "processor_config.json"),
    "a tokenizer": ("tokenizer.json",),
}
_TITLES: Mapping[Architecture, str] = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL"}


def refuse_incomplete(folder: Path) -> None:
    """Raise UserError unless the folder holds a model of a known architecture, its processor and its chat template."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", "set model.path, or let `deskrl up` build the model")
    for what, names in _FILES.items():
        if not any(path.is_file() for name in names for path in folder.glob(name)):
            raise UserError(f"{folder} lacks {what} ({' or '.join(names)})", "copy it from the original model")
    architecture = _read(folder / "config.json").get("model_type")
    if architecture not in _TITLES:
        known = " and ".join(_TITLES.values())
        raise UserError(f"{folder} holds a {architecture} model, and deskrl knows {known}", "choose one of these")
    if not (folder / "chat_template.jinja").is_file() and not _tokenizer_config(folder).get("chat_template"):
        raise UserError(
            f"{folder} lacks a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
            "copy it from the original model",
        )


def refuse_other_family(config: RunConfig) -> None:
    """Raise UserError if the model of a run is of another family than `agent.family`, or shows it other sizes.

    A model that is to be built is known by its name; one in a folder that is not on this machine is not judged.
    """
    folder, name = config.model.path, config.agent.family
    if folder is None:
        if config.model.build != "tiny" and "qwen2_5_vl" not in FAMILIES[name].architectures:
            raise _other_family(f"model.build = {config.model.build}", "qwen2_5_vl", name)
        return
    if not (folder / "config.json").is_file():
        return
    architecture: Any = _read(folder / "config.json").get("model_type")
    if architecture not in _TITLES:  # `refuse_incomplete` has something to say about that
        return
    if architecture not in FAMILIES[name].architectures:
        raise _other_family(str(folder), architecture, name)
    seen, span = image_sizing_of(folder).scaled(*config.image_size), FAMILIES[name].span(*config.image_size)
    if not FAMILIES[name].relative and seen != span:
        shown, counted, sent = (f"{width} x {height}" for width, height in (seen, span, config.image_size))
        raise UserError(
            f"{folder}: its image processor shows screenshots of {sent} as {shown}, and coordinates of "
            f"{FAMILIES[name].title} count in {counted}",
            f"set agent.image_width and agent.image_height to {seen[0]} and {seen[1]}",
        )


def refuse_quantized(config: RunConfig) -> None:
    """Raise UserError for a run that would learn with weights in fewer bits than it learns in: its updates could be
    neither loaded nor proven."""
    folder = config.model.path
    if folder is not None and (folder / "config.json").is_file():
        kept = _read(folder / "config.json").get("quantization_config")
    else:
        kept = None
    if kept is not None:
        method = kept.get("quant_method", "some method")
        raise UserError(f"{folder} holds weights quantised by {method}, which cannot learn", "name the original model")
    asked = {
        "inference.quantization": config.inference.quantization,
        "inference.engine_args.quantization": config.inference.engine_args.get("quantization"),
    }
    for key, value in asked.items():
        if value is not None:
            raise UserError(
                f"{key} = {value} serves other weights than those that learn, and no update could be proven",
                "unset it; `deskrl eval` takes it",
            )


def _other_family(model: str, architecture: Architecture, name: FamilyName) -> UserError:
    wanted = " or ".join(_TITLES[one] for one in FAMILIES[name].architectures)
    fitting = [other for other, family in FAMILIES.items() if architecture in family.architectures]
    return UserError(
        f"{model} is a {_TITLES[architecture]}, and agent.family = {name} speaks to a {wanted}",
        f"set agent.family to {' or '.join(fitting)}",
    )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}", "copy the file from the original model") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object", "copy the file from the original model")
    return value
