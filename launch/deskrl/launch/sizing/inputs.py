"""Inputs of the sizing computations: number of tasks, model shape and prompt length, read from small local files.

A run may be explained on another machine than the one that runs it, so missing files are reported as remarks together
with the assumption made instead.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.prompt_rendering import ImageSizing, read_image_sizing
from deskrl.launch.sizing.model_shape import (
    ModelShape,
    architecture_from_name,
    shape_from_config,
    shape_from_name,
)
from deskrl.models.architectures import load_architecture

_CHARACTERS_PER_TOKEN = 4.0
_INSTRUCTION_CHARACTERS = 140
"""Length of a typical OSWorld instruction."""
_MAX_REMARK_CHARACTERS = 160


@dataclass(frozen=True)
class ModelInfo:
    """Model of a run, as far as this machine knows it."""

    name: str
    shape: ModelShape | None
    """Shape of the model; None if neither its folder nor its name gives one."""
    image_sizing: ImageSizing
    remark: str = ""
    """Assumption about a model folder that is missing on this machine."""


@dataclass(frozen=True)
class SizingInputs:
    """Inputs of all sizing computations."""

    model: ModelInfo
    prompt_tokens: int
    """Prompt tokens before the first screenshot."""
    num_tasks: int | None
    """Number of tasks; None if the task list is missing on this machine."""
    remarks: list[str]
    """Files that are missing on this machine, and what is assumed instead."""


def read_inputs(config: RunConfig) -> SizingInputs:
    """Read the inputs from the files on this machine.

    Raises:
        UserError: the model folder or a task file is damaged.
    """
    from deskrl.actor.agent import conversation

    model = read_model(config)
    remarks = [model.remark] if model.remark else []
    num_tasks = _count_tasks(config, remarks)
    characters = conversation.num_prompt_characters(config.agent)
    prompt_tokens = round((characters + _INSTRUCTION_CHARACTERS) / _CHARACTERS_PER_TOKEN)
    return SizingInputs(model, prompt_tokens, num_tasks, remarks)


def read_model(config: RunConfig) -> ModelInfo:
    """Return name, shape and image sizing of the run's model.

    Raises:
        UserError: the config.json of the model folder has no model shape.
    """
    path = config.model.path
    if path is None:
        return _built_model(config)
    if (path / "config.json").is_file():
        image_sizing = read_image_sizing(path)
        try:
            content = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return ModelInfo(str(path), shape_from_config(content, str(path), config.model.architecture), image_sizing)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{path / 'config.json'}: missing or invalid model sizes ({error!r})"
            raise UserError(reason, "set model.path to a complete model folder") from error
    shape = shape_from_name(path.name)
    if shape is None:
        remark = f"{path}: not found, and the name contains no known size: memory and training time are unknown"
    else:
        remark = f"{path}: not found; its sizes are assumed to be those of {shape.name}"
    return ModelInfo(str(path), shape, architecture_from_name(path.name).published_sizing, remark)


def _built_model(config: RunConfig) -> ModelInfo:
    """Return the model that the run builds itself (`model.build`)."""
    from deskrl.actor.agent.model_fit import built_architecture

    architecture = built_architecture(config)
    if config.model.build == "tiny":
        from deskrl.learner.policy import architectures, tiny_model

        sizes = architectures.load_learner_architecture(architecture).tiny_config()
        vision = sizes["vision_config"]
        text: Mapping[str, Any] = {**sizes["text_config"], "vocab_size": tiny_model.VOCAB_SIZE}
        tied = True
        pixels = config.image_size[0] * config.image_size[1]
        image_sizing = ImageSizing(architectures.TINY_PATCH_PIXELS, architectures.TINY_MERGE, pixels, pixels)
    else:
        from deskrl.learner.policy import random_weight_model

        assert config.model.build is not None
        built = random_weight_model.SHAPES[config.model.build]
        text, tied = built.text, built.tied
        vision = {**built.vision, "out_hidden_size": text["hidden_size"]}
        image_sizing = ImageSizing(
            vision["patch_size"], vision["spatial_merge_size"], built.min_pixels, built.max_pixels
        )
    name = f"built: {config.model.build}"
    content = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    model_type = load_architecture(architecture).model_type
    return ModelInfo(name, shape_from_config({**content, "model_type": model_type}, name, architecture), image_sizing)


def _count_tasks(config: RunConfig, remarks: list[str]) -> int | None:
    """Return the number of tasks; None, with a remark, if the task list is missing on this machine."""
    source = config.tasks.list or config.tasks.suite
    if source is not None and not source.exists():
        remarks.append(f"{source}: not found, so the number of epochs is unknown, and `deskrl up` would fail here")
        return None
    from deskrl.actor import materialize_tasks

    num_tasks: int = materialize_tasks.count(config)
    try:
        materialize_tasks.load(config)
    except UserError as error:
        reason = textwrap.shorten(error.message, _MAX_REMARK_CHARACTERS, placeholder=" …")
        remarks.append(f"`deskrl up` would fail on this machine: {reason}")
    return num_tasks


def screenshot_size(config: RunConfig, image_sizing: ImageSizing) -> tuple[tuple[int, int], int, int]:
    """Return (width, height) of a scaled screenshot, its number of patches and its number of tokens."""
    size = image_sizing.scaled_size(*config.image_size)
    patches = size[0] * size[1] // image_sizing.patch_size**2
    return size, patches, image_sizing.num_tokens(*config.image_size)
