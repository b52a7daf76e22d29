"""Builds the model that a run asks for with `model.build`, into the run's folder.

Knows which builder makes which; the builders know the models.
"""

from __future__ import annotations

from pathlib import Path

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.families import FAMILIES
from deskrl.learner.policy import shaped_model, tiny_model


def main(config: RunConfig) -> int:
    """Build the model of a run, its tokenizer trained on the corpus that lies in the run's folder."""
    refuse_unfit(config)
    corpus = _read_corpus(config.folder / "corpus.txt")
    if config.model.build in shaped_model.SHAPES:
        shape = shaped_model.SHAPES[config.model.build]
        shaped_model.build_shaped_model(config.model_folder, config.seed, shape, max(config.image_size), corpus)
    else:
        family = FAMILIES[config.agent.family]
        tiny_model.build_tiny_model(
            config.model_folder,
            config.seed,
            config.image_size,
            corpus,
            family.architectures[0],
            max(family.span(*config.image_size)),
        )
    return 0


def refuse_unfit(config: RunConfig) -> None:
    """Raise UserError if the model that is to be built could not see this run's screenshots."""
    if config.model.build != "tiny":
        return
    size, unit = config.image_size, tiny_model.PATCH_PIXELS * tiny_model.MERGE
    if any(side % unit for side in size):
        raise UserError(
            f"the tiny model cannot see screenshots of {size[0]} x {size[1]}",
            f"set agent.image_width and agent.image_height to multiples of {unit}",
        )


def _read_corpus(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\f")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", "start the run with `deskrl up`, or `deskrl prepare` it"
        ) from error
