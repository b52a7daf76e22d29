"""Root of the run configuration: all sections, and values derived from several of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from deskrl.core.config.desktop import DesktopConfig
from deskrl.core.config.learner import LearnerConfig
from deskrl.core.config.reward import RewardConfig
from deskrl.core.config.rollout import ActorConfig, AgentConfig, ModelConfig, TasksConfig
from deskrl.core.config.services import InferenceConfig, ReplayConfig, SecurityConfig
from deskrl.core.config.value_types import Seed
from deskrl.core.presets import PresetName


class RunConfig(BaseSettings):
    """Configuration of a run."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        env_prefix="DESKRL_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        cli_exit_on_error=False,  # an unknown option is reported in one line, without a page of usage
    )

    preset: PresetName = "deskrl"
    """Source of the values that are not set. `deskrl`: the defaults documented here; `arpo`: ARPO's values where the
    two differ."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its directory is `<runs>/<name>`."""
    runs: Path = Path("runs")
    """Directory of all runs."""
    seed: Seed = 0
    """Seed of all random number generators."""
    tracker: tuple[str, ...] = ()
    """Experiment trackers that metrics are logged to, in addition to the run directory: `wandb`, `tensorboard` and
    `mlflow`, each of which requires the extra of its name; or your own, as `package.module:object` or by the name of an
    installed package's entry point. They write below the run directory unless `tracker_options` says otherwise."""
    tracker_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of the trackers, one table for each. `wandb`: `mode` (`offline`, `online`) and `project`; `mlflow`:
    `tracking_uri` and `experiment`; `tensorboard` has none."""
    # A default factory, because partial updates merge a file's keys with a default instance: path would join build.
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(build="tiny"))
    tasks: TasksConfig = TasksConfig()
    desktop: DesktopConfig = DesktopConfig()
    agent: AgentConfig = AgentConfig()
    actor: ActorConfig = ActorConfig()
    replay: ReplayConfig = ReplayConfig()
    inference: InferenceConfig = InferenceConfig()
    # A default factory as above: otherwise a file with other terms would keep the default term `task`.
    reward: RewardConfig = Field(default_factory=RewardConfig)
    learner: LearnerConfig = LearnerConfig()
    security: SecurityConfig = SecurityConfig()

    @field_validator("tracker")
    @classmethod
    def _check_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a tracker is named twice")
        return value

    @field_validator("runs")
    @classmethod
    def _make_absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def run_dir(self) -> Path:
        """Run directory."""
        return self.runs / self.name

    @property
    def num_actors(self) -> int:
        """Number of actor processes."""
        return -(-self.desktop.num_envs // self.actor.desktops_per_actor)

    @property
    def is_in_float32(self) -> bool:
        """Whether learner and replicas both compute in float32, so that their logprobs differ by rounding only."""
        return self.learner.dtype == self.inference.dtype == "float32"

    @property
    def model_folder(self) -> Path:
        """Directory of the initial model."""
        return self.model.path if self.model.path is not None else self.run_dir / "model"

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) in pixels of screenshots as the policy sees them."""
        return self.agent.image_width or self.desktop.width, self.agent.image_height or self.desktop.height
