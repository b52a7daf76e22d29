"""Registry of the learner's part of the model architectures."""

from __future__ import annotations

from functools import partial

from deskrl.core.config import ModelConfig
from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.core.registry import Registry, subclass_problem
from deskrl.learner.policy.architectures.glm4v import Glm4VLearner
from deskrl.learner.policy.architectures.learner_architecture import LearnerArchitecture
from deskrl.learner.policy.architectures.qwen2_vl import Qwen2VLLearner, Qwen25VLLearner
from deskrl.learner.policy.architectures.qwen3_vl import Qwen3VLLearner

LEARNER_ARCHITECTURES: Registry[type[LearnerArchitecture]] = Registry(
    "model architecture of the learner",
    "model.architecture",
    "deskrl.learner_architectures",
    partial(subclass_problem, base=LearnerArchitecture),
)
"""Architectures by the names of `deskrl.models.architectures.ARCHITECTURES`."""

for _built_in in (Qwen2VLLearner, Qwen25VLLearner, Qwen3VLLearner, Glm4VLearner):
    LEARNER_ARCHITECTURES.register(_built_in.model_type)(_built_in)


def check_architecture(config: ModelConfig) -> None:
    """Raise UserError if the learner has no part for the architecture of a model, as far as this machine knows it."""
    name = config.architecture
    if name is None and config.path is not None and (config.path / "config.json").is_file():
        content = read_json_object(config.path / "config.json", "copy the file from the original model")
        name = str(content.get("model_type"))
    if name is not None:
        load_learner_architecture(name)


def load_learner_architecture(name: str) -> LearnerArchitecture:
    """Return an architecture by its name or its import path; raises UserError as `Registry.load` does."""
    return LEARNER_ARCHITECTURES.load(name)()


def check_transformers(model_type: str) -> None:
    """Raise UserError if the installed transformers has no model of this type; imports transformers."""
    from transformers import CONFIG_MAPPING, __version__

    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"transformers {__version__} has no models of the type {model_type}", "install a later version of it"
        )
