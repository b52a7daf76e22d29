"""Sections `model`, `tasks`, `agent` and `actor`: what rollouts consist of and which processes run them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from deskrl.core.config.value_types import MAX_COUNT, Pixels, Port, PositiveInt, PositiveSeconds, Section


class ModelConfig(Section):
    """Model to train. Exactly one of `path` and `build` is set."""

    path: Path | None = None
    """Directory of a model and its processor in Hugging Face layout. Unset: `build` creates one in the run
    directory."""
    build: Literal["tiny", "qwen_3b_shape", "ui_tars_7b_shape"] | None = None
    """Build a model with random weights instead of loading one. `tiny`: a small model of `architecture` that can be
    trained on a CPU; `qwen_3b_shape` and `ui_tars_7b_shape`: models of the size of Qwen2.5-VL-3B and UI-TARS-1.5-7B, to
    measure the speed of a machine."""
    architecture: Annotated[str, Field(min_length=1)] | None = None
    """Model architecture: `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`, `glm4v`, or your own, as `package.module:object` or by
    the name of an installed package's entry point. Unset: with `path`, the `model_type` in its config.json; with
    `build`, that of the published models with the action language `agent.action_language`."""

    @model_validator(mode="after")
    def _check_one_source(self) -> ModelConfig:
        if (self.path is None) == (self.build is None):
            raise ValueError("set exactly one of model.path and model.build")
        return self


class TasksConfig(Section):
    """Tasks to train on: either of a suite (`suite`, `ids`) or of a task list (`list`, `root`, `suffix`)."""

    suite: Path | None = None
    """Root of a task suite, with task files `examples/<domain>/<id>.json` or task bundles `examples/<domain>/<id>/`
    below it; or a folder of task bundles, or one bundle. Unset: deskrl's own suite for the provider's desktops."""
    ids: tuple[str, ...] = ()
    """Ids of the suite's tasks to train on; empty: all tasks of the suite."""
    list: Path | None = None
    """Task list in OSWorld's format ({application: [id, ...]}) to train on, instead of a suite and its ids."""
    root: Path | None = None
    """Directory of the list's task files, `<application>/<id><suffix>.json`; unset: `examples/` next to the list."""
    suffix: str | None = None
    """Suffix of the task files' names after the id, such as `_noise`; unset: detected from the files."""
    noise: Literal["none", "light", "medium", "heavy"] = "none"
    """Noise of training rollouts and demonstrations: unrelated files, windows and messages, drawn anew for each group
    from the seed. All rollouts of a group have the same noise."""
    eval_noise: Literal["none", "light", "medium", "heavy"] = "none"
    """Noise of the evaluations before and after training, and of `deskrl eval`, drawn from the seed."""
    unmet_requirements: Literal["reject", "skip", "run"] = "reject"
    """Tasks with unmet requirements: reject the run, skip them, or run them anyway, so that whatever fails for lack of
    a requirement is a fault."""
    sampler: str = "epochs"
    """Task sampler: which task each training group plays. `epochs`: each epoch plays every task once, in a random
    order; or your own, as `package.module:object` or by the name of an installed package's entry point."""
    sampler_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the task sampler; `epochs` has none."""
    num_rollouts: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 8
    """Number of rollouts in a group; at least 2, because a single rollout has no advantage."""
    max_steps: PositiveInt = 15
    """Maximum number of steps (policy turns) of an episode; at the limit it ends with the termination step_limit."""

    @model_validator(mode="after")
    def _check_one_source(self) -> TasksConfig:
        if self.list is not None and (self.suite is not None or self.ids):
            raise ValueError("set either tasks.list, or tasks.suite and tasks.ids")
        if self.list is None and (self.root is not None or self.suffix is not None):
            raise ValueError("tasks.root and tasks.suffix require tasks.list, which is not set")
        return self


class AgentConfig(Section):
    """Prompt and context of the policy, and parsing of its actions."""

    action_language: Annotated[str, Field(min_length=1)] = "ui_tars_1_5"
    """Action language: prompt, syntax of actions and coordinates, which must be those that the model was trained on.
    `ui_tars_1_0`: Qwen2-VL, coordinates in thousandths of the screenshot; `ui_tars_1_5`: Qwen2.5-VL, coordinates in
    pixels of the resized screenshot; `ui_tars_2`: either architecture, coordinates in thousandths, its own syntax;
    `qwen3_vl` and `qwen2_5_vl`: calls of the tool `computer_use` of these models; `opencua`: pyautogui code;
    `anthropic_computer_use` and `openai_computer_use`: calls of the vendors' tools; or your own, as
    `package.module:object` or by the name of an installed package's entry point."""
    action_language_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the action language. `anthropic_computer_use` has `tool`, the version of the tool;
    `openai_computer_use` has `tool` and `safety_checks`; the other built-in ones have none."""
    prompt: Literal["full", "brief"] = "full"
    """Prompt template. `full`: the one of the action language; `brief`: little more than the instruction, for a policy
    that learns the action language from scratch."""
    prompt_file: Path | None = None
    """Text file with a prompt template that replaces that of the action language; {instruction} and {language} are
    replaced. Models perform best with the exact prompt they were trained on."""
    context: Literal["window", "segment", "episode"] = "window"
    """Screenshots in the context. `window`: the last `window_images`; `segment`: the last ones, within the bounds
    `segment_images`; `episode`: all of the episode."""
    window_images: PositiveInt = 5
    """Number of screenshots kept if `context` is `window`."""
    segment_images: tuple[PositiveInt, PositiveInt] = (3, 5)
    """Fewest and most screenshots kept if `context` is `segment`. When there is one more than the second number, the
    oldest are dropped together, so that the first number remains. Until the next drop each prompt extends the previous
    one: replicas compute only what is new, and the steps share a row of the learner."""
    image_width: Pixels | None = None
    """Width in pixels to which screenshots are resized for the policy; unset: not resized."""
    image_height: Pixels | None = None
    """Height in pixels to which screenshots are resized for the policy; unset: not resized."""
    format_error: Literal["fail", "evaluate"] = "fail"
    """Reward of an episode that ended with an action that cannot be parsed. `fail`: 0; `evaluate`: the evaluator's
    reward for the state reached, less `learner.grpo.format_penalty`."""
    language: str = "English"
    """Language of the thoughts that the prompt asks for."""

    @model_validator(mode="after")
    def _check_one_prompt(self) -> AgentConfig:
        if self.prompt == "brief" and self.prompt_file is not None:
            raise ValueError("prompt = brief and prompt_file exclude each other; set only one")
        return self

    @model_validator(mode="after")
    def _check_segment_bounds(self) -> AgentConfig:
        fewest, most = self.segment_images
        if fewest >= most:
            raise ValueError(
                f"segment_images = [{fewest}, {most}]: the first bound must be less than the second; for a constant "
                "number of screenshots set context = window"
            )
        return self

    def num_dropped_images(self, num_images: int) -> int:
        """Return how many of the episode's oldest screenshots its context lacks after `num_images` screenshots."""
        if self.context == "episode":
            return 0
        fewest, most = self.segment_images if self.context == "segment" else (self.window_images,) * 2
        num_dropped_together = most - fewest + 1
        num_drops = -(-max(0, num_images - most) // num_dropped_together)
        return num_drops * num_dropped_together

    @property
    def max_context_images(self) -> int | None:
        """Maximum number of screenshots in the context, or None if all screenshots of the episode are kept."""
        limits = {"window": self.window_images, "segment": self.segment_images[1], "episode": None}
        return limits[self.context]


class ActorConfig(Section):
    """Actor processes."""

    desktops_per_actor: PositiveInt = 4
    """Number of desktops per actor process. The number of processes is `desktop.num_envs` divided by this, rounded
    up."""
    act_timeout_s: PositiveSeconds = 60.0
    """Timeout of one request for an action; a policy that is unreachable for this long is a fault of the rollout."""
    metrics_port: Port = 0
    """Port of the Prometheus metrics of the first actor; further actors use the following ports. 0 disables them.
    Unset: `deskrl up` and `deskrl eval` choose free ports."""
