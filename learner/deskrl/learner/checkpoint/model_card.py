"""Model cards: README.md of each checkpoint, with the metadata that the Hugging Face Hub reads.

A card has no path, address or free text of the configuration, so that the folder can be published as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deskrl.core.config import AgentConfig, LearnerConfig, RunConfig, TasksConfig, dotted
from deskrl.core.rpc import VERSION
from deskrl.learner.metrics.result_files import ResultFiles

CARD = "README.md"
IGNORED = ".gitignore"
"""File by which `hf upload` leaves out the state that only training needs."""
_IGNORED_FILES = "engine/\nlearner.json\n"
_TAG = "deskrl"
_TASK_KEYS = ("suite", "num_rollouts", "max_steps")
_LEARNER_KEYS = ("dtype", "freeze_vision", "grpo", "lora", "warm_start")
_MAX_VALUE_CHARACTERS = 60
_USES = {
    False: "It is used as its initial model is: with transformers (`AutoModelForImageTextToText`) or vLLM.",
    True: "It is a LoRA adapter of its initial model, for peft (`PeftModel`) or vLLM.",
}
"""How the model is used, without and with LoRA."""


@dataclass(frozen=True)
class BaseModel:
    """Model that a run trains, as far as its folder says what it is."""

    name: str
    """Name of the folder."""
    hub_id: str | None = None
    """Name on the Hugging Face Hub, such as ByteDance-Seed/UI-TARS-1.5-7B; None if unknown."""
    license: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the licence, such as {"license": "apache-2.0"}; empty if unknown."""


class ModelCardWriter:
    """Writes the model cards of one run.

    Args:
        config: run configuration.
        num_tasks: length of the task list.
        results: result files of the run, which have the evaluations.
    """

    def __init__(self, config: RunConfig, num_tasks: int, results: ResultFiles) -> None:
        self._config = config
        self._num_tasks = num_tasks
        self._results = results
        self._base = BaseModel("built by the run") if config.model.path is None else read_base_model(config.model.path)

    def write(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Write the card of a checkpoint.

        Args:
            folder: folder of the checkpoint.
            state: training state of the checkpoint, as JSON.
        """
        text = model_card(self._config, self._base, self._num_tasks, state, self._results.evaluations())
        (folder / CARD).write_text(text, encoding="utf-8")
        (folder / IGNORED).write_text(_IGNORED_FILES, encoding="utf-8")


def model_card(
    config: RunConfig,
    base: BaseModel,
    num_tasks: int,
    state: Mapping[str, Any],
    evaluations: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the text of a model card: metadata in YAML, facts of the training, and the configuration.

    Args:
        config: run configuration.
        base: model that is trained.
        num_tasks: length of the task list.
        state: training state of the checkpoint, as JSON.
        evaluations: records of the evaluations `before` and `after` training, as far as they are complete.
    """
    from huggingface_hub import ModelCardData

    has_lora = config.learner.has_lora
    licence: dict[str, Any] = dict(base.license)
    data = ModelCardData(
        base_model=base.hub_id,
        base_model_relation=None if base.hub_id is None else "adapter" if has_lora else "finetune",
        library_name="peft" if has_lora else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[_TAG, "reinforcement-learning", "grpo", "gui-agent", "computer-use", *(["lora"] if has_lora else [])],
        **licence,
    )
    facts = [("initial model", base.hub_id or base.name), *_facts(num_tasks, state, evaluations), ("deskrl", VERSION)]
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts)
    settings = "".join(f"{key} = {value}\n" for key, value in _settings(config))
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {config.name}\n\n"
        f"A vision-language agent for desktops, trained by reinforcement learning with deskrl. {_USES[has_lora]}\n\n"
        f"| | |\n| --- | --- |\n{rows}\n"
        f"## Configuration\n\nKeys whose values are not the defaults:\n\n```toml\n{settings}```\n"
    )


def read_base_model(folder: Path) -> BaseModel:
    """Return what a model folder says about its model: by its place in the cache of the Hub, and by its own card."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{folder.resolve()}/")
    name = cached[2] if cached else folder.resolve().name
    text, metadata = _read_card(folder / CARD)
    hub_id = f"{cached[1]}/{cached[2]}" if cached else None
    if hub_id is None and _TAG in (metadata.get("tags") or []):  # a checkpoint, whose card names the model it is from
        hub_id = metadata.get("base_model")
    elif hub_id is None and (named := re.search(rf"\b([A-Za-z][\w-]*/{re.escape(name)})(?![\w.-]*\w)", text)):
        hub_id = named[1]
    licence = {key: metadata.get(key) for key in ("license", "license_name", "license_link")}
    return BaseModel(
        name,
        hub_id if isinstance(hub_id, str) else None,
        {key: value for key, value in licence.items() if isinstance(value, str)},
    )


def _read_card(path: Path) -> tuple[str, dict[str, Any]]:
    """Return text and metadata of a card; nothing if there is none or it is damaged."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        return text, dict(vars(ModelCard(text, ignore_metadata_errors=True).data))
    except (OSError, ValueError, TypeError, YAMLError):
        return "", {}


def _facts(
    num_tasks: int, state: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Yield the facts of the training, by name."""
    history = state.get("history") or []
    yield "policy updates", str(state.get("num_updates", 0))
    yield "tasks", str(num_tasks)
    yield "episodes", str(sum(record["num_episodes"] for record in history))
    yield "environment steps", str(sum(record["num_env_steps"] for record in history))
    for when in ("before", "after"):
        if evaluation := evaluations.get(when):
            successes, episodes = evaluation["successes"], evaluation["episodes"]
            share = f" ({successes / episodes:.0%})" if episodes else ""
            yield f"success {when} training", f"{successes} of {episodes} episodes{share}"
    rates = [record["success_rate"] for record in history if record["success_rate"] is not None]
    if rates:
        yield "success of the last update's episodes", f"{rates[-1]:.0%}"


def _settings(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys of the method whose values are not the defaults, as TOML.

    Paths, long texts and the texts among the options of extensions are left out.
    """
    yield "preset", json.dumps(config.preset)
    yield "seed", json.dumps(config.seed)
    for name, section, default, keys in (
        ("tasks", config.tasks, TasksConfig(), _TASK_KEYS),
        ("agent", config.agent, AgentConfig(), tuple(AgentConfig.model_fields)),
        ("learner", config.learner, LearnerConfig(), _LEARNER_KEYS),
    ):
        known = dict(dotted(default.model_dump(mode="json")))
        for key, value in dotted(section.model_dump(mode="json")):
            is_free_text = "_options." in key and isinstance(value, str)
            if key.split(".")[0] in keys and value != known.get(key) and _is_plain(value) and not is_free_text:
                yield f"{name}.{key}", json.dumps(value)


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a switch, a name, or a list of these."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return len(value) <= _MAX_VALUE_CHARACTERS and re.fullmatch(r"[\w.: -]*", value) is not None
    return isinstance(value, bool | int | float)
