"""What `deskrl explain` has to find out before it can count: the tasks, the model's shape, the prompt's length.

Reads small files only: no weights, no GPU, no network. What is not on this machine is told, with what is assumed
instead; a run may well be explained elsewhere than it runs.
"""

from __future__ import annotations

import importlib
import json
import textwrap
from dataclasses import dataclass

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.explain.shape import ModelShape, shape_of_config, shape_of_name
from deskrl.core.families import FAMILIES, UI_TARS_SIZING
from deskrl.core.rendering import ImageSizing, image_sizing_of

_CHARACTERS_PER_TOKEN = 4.0
_INSTRUCTION_CHARACTERS = 140
"""Of a typical OSWorld task."""
_REMARK_CHARACTERS = 160


@dataclass(frozen=True)
class Facts:
    """What the arithmetic starts from."""

    model: str
    shape: ModelShape | None
    sizing: ImageSizing
    prompt_tokens: int
    num_tasks: int | None
    remarks: list[str]
    """What is not here, and what is assumed or follows."""


def gather(config: RunConfig) -> Facts:
    """Look at what is here.

    Raises:
        UserError: the model's folder or a task that is here is damaged.
    """
    remarks: list[str] = []
    model, shape, sizing = model_of(config, remarks)
    num_tasks = _count_tasks(config, remarks)
    characters = importlib.import_module("deskrl.actor.agent.conversation").prompt_characters(config.agent)
    prompt_tokens = round((characters + _INSTRUCTION_CHARACTERS) / _CHARACTERS_PER_TOKEN)
    return Facts(model, shape, sizing, prompt_tokens, num_tasks, remarks)


def model_of(config: RunConfig, remarks: list[str]) -> tuple[str, ModelShape | None, ImageSizing]:
    """A run's model: what it is called, its shape, and how its processor scales; adds to `remarks` what is not here."""
    path = config.model.path
    if path is None:
        return _built(config)
    if (path / "config.json").is_file():
        sizing = image_sizing_of(path)
        try:
            content = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return str(path), shape_of_config(content, str(path)), sizing
        except (OSError, ValueError, KeyError, TypeError) as error:
            mend = "name a complete model folder"
            raise UserError(f"{path}: its config.json tells no model's sizes ({error})", mend) from error
    shape = shape_of_name(path.name)
    if shape is None:
        remarks.append(f"the model {path} is not here and its name tells no size: memory and learning time are unknown")
    else:
        remarks.append(f"the model {path} is not here: its sizes are taken to be those of {shape.name}")
    return str(path), shape, UI_TARS_SIZING


def _built(config: RunConfig) -> tuple[str, ModelShape, ImageSizing]:
    tiny = importlib.import_module("deskrl.learner.policy.tiny_model")
    if config.model.build == "tiny":
        vision = tiny.VISION[FAMILIES[config.agent.family].architectures[0]]
        text, tied = {**tiny.TEXT, "vocab_size": tiny.VOCAB_SIZE}, True
        pixels = config.image_size[0] * config.image_size[1]
        sizing = ImageSizing(tiny.PATCH_PIXELS, tiny.MERGE, pixels, pixels)
    else:
        built = importlib.import_module("deskrl.learner.policy.shaped_model").SHAPES[config.model.build]
        text, vision, tied = built.text, built.vision, built.tied
        sizing = ImageSizing(vision["patch_size"], vision["spatial_merge_size"], built.min_pixels, built.max_pixels)
    name = f"built: {config.model.build}"
    content = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    return name, shape_of_config(content, name), sizing


def _count_tasks(config: RunConfig, remarks: list[str]) -> int | None:
    """How many tasks are played; None where the list is not here."""
    source = config.tasks.list or config.tasks.suite
    if source is not None and not source.exists():
        remarks.append(f"{source} is not here: epochs cannot be counted, and `deskrl up` would refuse")
        return None
    prepare = importlib.import_module("deskrl.actor.prepare")
    num_tasks: int = prepare.count(config)
    try:
        prepare.load(config)
    except UserError as error:
        told = textwrap.shorten(error.message, _REMARK_CHARACTERS, placeholder=" …")
        remarks.append(f"on this machine `deskrl up` would refuse: {told}")
    return num_tasks


def sizing_of_screens(config: RunConfig, sizing: ImageSizing) -> tuple[tuple[int, int], int, int]:
    """A screenshot as the vision tower sees it: its size, its patches, and the tokens it costs."""
    size = sizing.scaled(*config.image_size)
    patches = size[0] * size[1] // sizing.patch_size**2
    return size, patches, sizing.num_tokens(*config.image_size)
