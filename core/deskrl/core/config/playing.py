"""What is played and by whom: sections `model`, `tasks`, `agent` and `actor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from deskrl.core.config.values import PositiveInt, PositiveSeconds, Section
from deskrl.core.families import FamilyName


class ModelConfig(Section):
    """Which policy is trained."""

    path: Path | None = None
    """Folder of a model with its processor (Hugging Face layout). Unset: `build` makes one in the run folder."""
    build: Literal["tiny", "qwen_3b_shape", "ui_tars_7b_shape"] | None = None
    """Build a model with random weights instead of loading one: `tiny` learns on a CPU and has the architecture of
    `agent.family`; `ui_tars_7b_shape` has the size of UI-TARS-1.5-7B, `qwen_3b_shape` that of Qwen2.5-VL-3B, and show
    how fast a machine is."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.build is None):
            raise ValueError("set exactly one of model.path and model.build")
        return self


class TasksConfig(Section):
    """What is learnt."""

    suite: Path | None = None
    """Root of a task suite (`examples/<domain>/<id>.json` below it). Unset: deskrl's own suite for the desktops."""
    tasks: tuple[str, ...] = ()
    """Task ids to train on; empty: all tasks of the suite."""
    list: Path | None = None
    """Task list in OSWorld's format ({application: [id, ...]}) to train on, in place of a suite and its ids."""
    root: Path | None = None
    """Folder with the list's task files, `<application>/<id><suffix>.json`; unset: `examples/` beside the list."""
    suffix: str | None = None
    """What the file names add to the list's ids, as `_noise`; unset: found out."""
    unplayable: Literal["refuse", "skip", "play"] = "refuse"
    """What becomes of tasks that need what is known to be absent: the run is refused, they are left out, or they are
    played all the same (what is absent is then a fault)."""
    rollouts: Annotated[int, Field(ge=2)] = 8
    """Rollouts in a group. One rollout has no advantage, so two is the least."""
    max_steps: PositiveInt = 15
    """Turns of the policy before an episode ends with the termination step_limit."""

    @model_validator(mode="after")
    def _one_source(self) -> TasksConfig:
        if self.list is not None and (self.suite is not None or self.tasks):
            raise ValueError("set either tasks.list, or tasks.suite and tasks.tasks")
        if self.list is None and (self.root is not None or self.suffix is not None):
            raise ValueError("tasks.root and tasks.suffix say where the tasks of a tasks.list are, and there is none")
        return self


class AgentConfig(Section):
    """How the policy is prompted."""

    family: FamilyName = "ui_tars_1_5"
    """Prompt, action grammar and coordinates, which must be those that the model has learnt: `ui_tars_1_0` (Qwen2-VL;
    thousandths of the screenshot), `ui_tars_1_5` (Qwen2.5-VL; pixels of the screenshot as the model sees it) or
    `ui_tars_2` (either; thousandths, and a form of its own)."""
    prompt: Literal["full", "brief"] = "full"
    """`full`: the family's; `brief`: the instruction and little else, for a policy that learns the grammar anew."""
    prompt_file: Path | None = None
    """Text file in place of the family's prompt, with {instruction} and {language} where they belong: models answer
    best to the very words that they were trained with."""
    context: Literal["window", "episode"] = "window"
    """`window`: the last `window_images` screenshots; `episode`: all of them."""
    window_images: PositiveInt = 5
    """Screenshots kept in the context `window`."""
    image_width: PositiveInt | None = None
    """Width to which screenshots are scaled before the policy sees them; unset: as they are."""
    image_height: PositiveInt | None = None
    """Height to which screenshots are scaled before the policy sees them; unset: as they are."""
    format_error: Literal["fail", "evaluate"] = "fail"
    """What an action that cannot be parsed is worth, which always ends the episode: `fail`: 0, whatever was reached, so
    that format matters; `evaluate`: what the evaluator says of the state (`learner.grpo.format_penalty` comes off)."""
    language: str = "English"
    """Language of the thoughts, as the prompt asks for it."""

    @model_validator(mode="after")
    def _one_prompt(self) -> AgentConfig:
        if self.prompt == "brief" and self.prompt_file is not None:
            raise ValueError("prompt = brief says what the policy is told, and so does prompt_file")
        return self


class ActorConfig(Section):
    """Actor processes."""

    desktops_per_actor: PositiveInt = 4
    """Desktops of one process; `num_envs` divided by this, rounded up, is the number of processes."""
    act_timeout_s: PositiveSeconds = 60.0
    """Deadline of one `Act`; a policy that cannot be reached for this long is a fault of the infrastructure."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Prometheus port of the first actor, counting up; 0: none."""
