"""Builds the model that `model.build` selects, in the run directory."""

from __future__ import annotations

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.learner.policy import random_weight_model, tiny_model
from deskrl.learner.policy.architectures import TINY_MERGE, TINY_PATCH_PIXELS


def main(config: RunConfig) -> int:
    """Build the model of a run with a tokenizer trained on the corpus in the run directory; return the exit status."""
    check_buildable(config)
    corpus = RunDir(config.run_dir).read_corpus()
    if config.model.build in random_weight_model.SHAPES:
        shape = random_weight_model.SHAPES[config.model.build]
        random_weight_model.build_random_weight_model(
            config.model_folder, config.seed, shape, max(config.image_size), corpus
        )
    else:
        architecture, largest_number = RunDir(config.run_dir).read_built_model()
        tiny_model.build_tiny_model(
            config.model_folder, config.seed, config.image_size, corpus, architecture, largest_number
        )
    return 0


def check_buildable(config: RunConfig) -> None:
    """Raise UserError if the model to be built cannot process screenshots of this run's size."""
    if config.model.build != "tiny":
        return
    size, unit = config.image_size, TINY_PATCH_PIXELS * TINY_MERGE
    if any(side % unit for side in size):
        raise UserError(
            f"the tiny model cannot process screenshots of {size[0]} x {size[1]} pixels",
            f"set agent.image_width and agent.image_height to multiples of {unit}",
        )
