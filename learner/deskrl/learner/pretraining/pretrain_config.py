"""Configuration of pretraining: its file, checked like that of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from deskrl.core.config import Section
from deskrl.core.config.toml_file import invalid_keys_error, read_toml
from deskrl.core.config.value_types import LearningRate, PositiveInt, PositiveSeconds, Seed

_HEAD = 64
"""Width of an attention head."""
Width = Annotated[int, Field(ge=_HEAD, le=1024, multiple_of=_HEAD)]
Depth = Annotated[int, Field(ge=2, le=48)]
Share = Annotated[float, Field(gt=0, lt=1)]


class PretrainConfig(Section):
    """Content of a pretraining configuration."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Name of the directory of this training, below `runs`."""
    runs: Path = Path("runs")
    """Directory of all runs."""
    seed: Seed = 0
    """Seed of the weights and of the screens."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of model and drawing."""
    duration_s: PositiveSeconds
    """Training time in seconds, without starting, the points of the curves and the evaluation. Shares of the curriculum
    and of the learning rate refer to it."""
    fonts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files of fonts: paths, or names that are searched in the system's font folders."""
    text_width: Width = 384
    """Width of the language model, in which a head has 64 components."""
    text_layers: Depth = 6
    """Layers of the language model."""
    vision_width: Width = 320
    """Width of the vision tower, in which a head has 64 components."""
    vision_layers: Depth = 6
    """Layers of the vision tower."""
    batch_size: PositiveInt = 256
    """Screens per optimizer step, which each level of the curriculum multiplies by a factor of 0.6 to 2."""
    learning_rate: LearningRate = 1e-3
    """Highest learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Weight decay of matrices."""
    warmup_steps: PositiveInt = 200
    """Optimizer steps over which the learning rate rises."""
    decay_share: Share = 0.3
    """Share of the training, at its end, over which the learning rate falls."""
    report_every_s: PositiveSeconds = 15.0
    """Seconds between points of the curves."""
    num_eval_screens: PositiveInt = 4096
    """Screens of each final evaluation."""

    @field_validator("fonts")
    @classmethod
    def _check_unique(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a font occurs twice")
        return value

    @property
    def run_dir(self) -> Path:
        """Directory of this training."""
        return self.runs.expanduser().absolute() / self.name


def read_pretrain_config(path: Path) -> PretrainConfig:
    """Read a pretraining configuration.

    Raises:
        UserError: the file cannot be read or parsed, or has unknown keys or invalid values.
    """
    values = read_toml(path, "give a configuration such as deploy/pretraining/sight.toml")
    try:
        return PretrainConfig.model_validate(values)
    except ValidationError as error:
        raise invalid_keys_error(error, path) from error
