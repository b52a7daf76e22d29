"""A whole run: all sections, and what follows from several of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from deskrl.core.config.desktops import DesktopConfig
from deskrl.core.config.learning import LearnerConfig
from deskrl.core.config.playing import ActorConfig, AgentConfig, ModelConfig, TasksConfig
from deskrl.core.config.services import InferenceConfig, ReplayConfig, SecurityConfig
from deskrl.core.presets import PresetName


class RunConfig(BaseSettings):
    """A whole run."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        env_prefix="DESKRL_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        cli_exit_on_error=False,  # an unknown option is one line too, not a page of usage
    )

    preset: PresetName = "deskrl"
    """Where values come from that the run does not state: `deskrl`, the defaults told here, or `arpo`, ARPO's own."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run: its folder is `<runs>/<name>`."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Everything random starts from here."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also write wandb logs (needs the extra `wandb`)."""
    # A factory, because partial updates merge a file's keys with those of a default instance: path beside build.
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(build="tiny"))
    tasks: TasksConfig = TasksConfig()
    desktop: DesktopConfig = DesktopConfig()
    agent: AgentConfig = AgentConfig()
    actor: ActorConfig = ActorConfig()
    replay: ReplayConfig = ReplayConfig()
    inference: InferenceConfig = InferenceConfig()
    learner: LearnerConfig = LearnerConfig()
    security: SecurityConfig = SecurityConfig()

    @field_validator("runs")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs / self.name

    @property
    def num_actors(self) -> int:
        """Actor processes, as they follow from the number of desktops."""
        return -(-self.desktop.num_envs // self.actor.desktops_per_actor)

    @property
    def is_in_float32(self) -> bool:
        """Whether learner and replicas compute in float32 both, so that their logprobs are alike but for rounding."""
        return self.learner.dtype == self.inference.dtype == "float32"

    @property
    def model_folder(self) -> Path:
        """Where the initial model lies."""
        return self.model.path if self.model.path is not None else self.folder / "model"

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of screenshots as the policy sees them."""
        return self.agent.image_width or self.desktop.width, self.agent.image_height or self.desktop.height
