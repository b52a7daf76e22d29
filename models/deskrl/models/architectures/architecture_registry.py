"""Registry of the model architectures, and the architecture of a model by its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deskrl.core.errors import UserError
from deskrl.core.registry import Registry, subclass_problem
from deskrl.models.architectures.glm4v import Glm4V
from deskrl.models.architectures.model_architecture import Architecture
from deskrl.models.architectures.qwen2_vl import Qwen2VL, Qwen25VL
from deskrl.models.architectures.qwen3_vl import Qwen3VL


def _find_problem(found: Any) -> str | None:
    if problem := subclass_problem(found, Architecture):
        return problem
    missing = [name for name in ("model_type", "title") if not isinstance(getattr(found, name, None), str)]
    return f"it has no {' and no '.join(missing)}" if missing else None


ARCHITECTURES: Registry[type[Architecture]] = Registry(
    "model architecture", "model.architecture", "deskrl.architectures", _find_problem
)
"""Architectures by `model_type`; the learner has a registry of its own with the same names."""

for _built_in in (Qwen2VL, Qwen25VL, Qwen3VL, Glm4V):
    ARCHITECTURES.register(_built_in.model_type)(_built_in)


def load_architecture(name: str) -> Architecture:
    """Return an architecture by its name or its import path; raises UserError as `Registry.load` does."""
    return ARCHITECTURES.load(name)()


def architecture_of(config: Mapping[str, Any], origin: object, selected: str | None = None) -> Architecture:
    """Return the architecture of a model.

    Args:
        config: content of its config.json.
        origin: model folder, for errors.
        selected: value of `model.architecture`; None: the architecture is found by `model_type`.

    Raises:
        UserError: the architecture is unknown, or it is not the one that is selected.
    """
    model_type = str(config.get("model_type"))
    if selected is None:
        if model_type not in (known := ARCHITECTURES.names()):
            raise UserError(
                f"{origin}: architecture {model_type} is not supported",
                f"use a model of {' or '.join(known)}, or add the architecture (docs/extending.md)",
            )
        return load_architecture(model_type)
    architecture = load_architecture(selected)
    if architecture.model_type != model_type:
        raise UserError(
            f"{origin}: model.architecture = {selected} is for models of {architecture.model_type}, but model_type in "
            f"config.json is {model_type}",
            "unset model.architecture, or set model.path to another model",
        )
    return architecture
