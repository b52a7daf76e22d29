"""From ARPO's keys to those of a run: pure functions of the values, but for looking whether files are there.

What cannot be carried over is refused by key, all of it at once, each with its mend.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deskrl.core.arpo.keys import KEYS, Carried, Fixed, Read, Rule, Unused, rule_of
from deskrl.core.rendering import ImageSizing

_PATCH, _MERGE = 14, 2
_CPU_KV_CACHE_BYTES = 4 * 1024**3
_ALL_CHECKPOINTS = 1_000_000
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DTYPES |= {name: name for name in _DTYPES.values()}
_PROVIDERS = {"docker": "osworld"}
"""ARPO's `docker` is OSWorld's provider of that name: its official virtual machine in a container."""


@dataclass(frozen=True)
class Note:
    """What became of a key that a file or an override names."""

    key: str
    value: Any
    became: str


@dataclass(frozen=True)
class Refusal:
    """A value that no run can have."""

    key: str
    value: Any
    why: str
    mend: str

    def __str__(self) -> str:
        return f"{self.key} = {_told(self.value)}: {self.why} (mend: {self.mend})"


@dataclass
class Translation:
    """A run's values so far."""

    values: dict[str, Any] = field(default_factory=dict)
    """By dotted key of the run."""
    notes: list[Note] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def tree(self) -> dict[str, Any]:
        """The values as nested tables."""
        root: dict[str, Any] = {}
        for key, value in self.values.items():
            *parents, last = key.split(".")
            table = root
            for parent in parents:
                table = table.setdefault(parent, {})
            table[last] = value
        return root


class ArpoValues:
    """ARPO's values by dotted key, with its defaults, each of its kind.

    Args:
        stated: what files and overrides say, flat.
    """

    def __init__(self, stated: Mapping[str, Any]) -> None:
        self._values: dict[str, Any] = {}
        self.refusals: list[Refusal] = []
        self.stated = stated
        for key, rule in KEYS.items():
            if isinstance(rule, Read | Carried):
                self._values[key] = self._of_kind(key, rule) if stated.get(key) is not None else rule.default

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def _of_kind(self, key: str, rule: Read | Carried) -> Any:
        value = self.stated[key]
        # YAML takes 1e-6 for text, and a number for itself where a name is meant.
        convertible = {float: int | float | str, str: str | int | float, int: int, list: list | tuple, bool: bool}
        is_bool_for_number = isinstance(value, bool) and rule.kind is not bool
        if isinstance(value, convertible[rule.kind]) and not is_bool_for_number:
            try:
                return rule.kind(value)
            except ValueError:
                pass
        kind = {float: "a number", int: "a whole number", str: "text", list: "a list", bool: "true or false"}[rule.kind]
        self.refusals.append(Refusal(key, value, f"is not {kind}", f"{key}={_told(rule.default)}"))
        return rule.default


def translate(stated: Mapping[str, Any], origin: Path, overridden: Collection[str]) -> Translation:
    """Everything that can be told without the number of tasks.

    Args:
        stated: ARPO's keys, flat.
        origin: the file that names them; relative paths are also looked for in the folders above it.
        overridden: keys of a run that are set above all this, so that what would set them is not looked at.
    """
    values = ArpoValues(stated)
    result = Translation({"preset": "arpo"}, refusals=list(values.refusals))
    unstated = {
        key: rule.otherwise for key, rule in KEYS.items() if isinstance(rule, Fixed) and rule.otherwise is not None
    }
    for key, value in {**unstated, **stated}.items():
        _translate_key(key, value, rule_of(key), result)
    for key, rule in KEYS.items():
        if isinstance(rule, Carried) and values[key] is not None:
            result.values[rule.to] = values[key]
    if values["wandb.enabled"] is not None or "wandb" in values["trainer.logger"]:
        # Never online by itself: a run should not end over a login. `wandb sync` brings it up.
        result.values["wandb"] = "off" if values["wandb.enabled"] is False else "offline"
    _batches(values, result, overridden)
    _screens(values, result)
    _policy(values, result, overridden)
    _tasks(values, result, origin, overridden)
    _machine(values, result)
    return result


def schedule(stated: Mapping[str, Any], num_tasks: int, overridden: Collection[str]) -> Translation:
    """What follows from the number of tasks: updates, warm-up and the size of an evaluation."""
    values = ArpoValues(stated)
    result = Translation()
    batch = values["data.rollout_batch_size"]
    if batch > num_tasks and "learner.grpo.groups_per_batch" not in overridden:
        mend = f"data.rollout_batch_size={num_tasks} worker.actor.global_batch_size={num_tasks}"
        why = f"more than the {num_tasks} tasks of the list, and ARPO fills a batch within an epoch"
        result.refusals.append(Refusal("data.rollout_batch_size", batch, why, mend))
        return result
    num_updates = values["trainer.total_episodes"] * (num_tasks // batch)
    if values["trainer.max_steps"] is not None:
        num_updates = values["trainer.max_steps"]
    result.values["learner.grpo.num_updates"] = num_updates
    result.values["learner.grpo.warmup_updates"] = int(values["worker.actor.optim.lr_warmup_ratio"] * num_updates)
    result.values["learner.eval.episodes"] = num_tasks if values["trainer.val_before_train"] else 0
    return result


def _translate_key(key: str, value: Any, rule: Rule | None, result: Translation) -> None:
    """Note what becomes of a stated key, or refuse it."""
    if rule is None:
        near = difflib.get_close_matches(key, KEYS, n=1)
        result.refusals.append(Refusal(key, value, "ARPO has no such key", f"{near[0]}=…" if near else "remove it"))
    elif isinstance(rule, Unused):
        result.notes.append(Note(key, value, f"unused: {rule.why}"))
    elif isinstance(rule, Carried):
        result.notes.append(Note(key, value, rule.to))
    elif isinstance(rule, Read):
        if rule.sets:
            result.notes.append(Note(key, value, rule.sets))
    elif any(_same(value, accepted) for accepted in rule.accepted):
        result.notes.append(Note(key, value, f"as it is: {rule.why}"))
    else:
        result.refusals.append(Refusal(key, value, rule.why, f"{key}={_told(rule.accepted[0])}"))


def _batches(values: ArpoValues, result: Translation, overridden: Collection[str]) -> None:
    """Tasks and rollouts of a batch, and its optimizer steps: ARPO's global batch counts tasks too."""
    rollouts, tasks = values["worker.rollout.n"], values["data.rollout_batch_size"]
    step_tasks = values["worker.actor.global_batch_size"]
    if rollouts < 2 and "tasks.rollouts" not in overridden:
        why = "one rollout a group has no advantage"
        result.refusals.append(Refusal("worker.rollout.n", rollouts, why, "worker.rollout.n=2"))
    elif rollouts >= 2:
        result.values["tasks.rollouts"] = rollouts
    result.values["learner.grpo.groups_per_batch"] = tasks
    if step_tasks < 1 or tasks % step_tasks:
        if "learner.grpo.minibatches" not in overridden:
            why = f"does not divide data.rollout_batch_size = {tasks} into optimizer steps"
            mend = f"worker.actor.global_batch_size={tasks}"
            result.refusals.append(Refusal("worker.actor.global_batch_size", step_tasks, why, mend))
        return
    result.values["learner.grpo.minibatches"] = tasks // step_tasks


def _screens(values: ArpoValues, result: Translation) -> None:
    """Screens, their size before the policy, and how many of them it sees."""
    width, height = (int(side) for side in values["env.screen_size"][:2])
    result.values["desktop.width"], result.values["desktop.height"] = width, height
    sizing = ImageSizing(_PATCH, _MERGE, values["data.min_pixels"], values["data.max_pixels"])
    scaled = sizing.scaled(width, height)
    if scaled[0] * scaled[1] < width * height:  # larger ones the model's processor rounds by itself
        result.values["agent.image_width"], result.values["agent.image_height"] = scaled
    max_steps, limit = values["env.max_steps"], values["worker.rollout.limit_images"]
    shown = min(limit, max_steps) if limit > 0 else max_steps
    result.values["inference.max_images"] = shown
    if shown < max_steps:
        # ARPO's code shows all, and fails at the first screenshot beyond the limit.
        result.values["agent.context"] = "window"
        result.values["agent.window_images"] = shown


def _policy(values: ArpoValues, result: Translation, overridden: Collection[str]) -> None:
    """The model, and lengths and numbers of its server."""
    path = values["worker.actor.model.model_path"]
    if not {"model.path", "model.build"} & set(overridden):
        if path is None:
            why, mend = "no model is named", "worker.actor.model.model_path=FOLDER, or --model.build tiny"
            result.refusals.append(Refusal("worker.actor.model.model_path", path, why, mend))
        result.values["model.path"] = path
    lengths = values["data.max_prompt_length"], values["data.max_response_length"]
    result.values["inference.max_model_len"] = sum(lengths)
    dtype = values["worker.rollout.dtype"]
    if dtype not in _DTYPES and "inference.dtype" not in overridden:
        why, mend = "is no numeric type of deskrl", "worker.rollout.dtype=bf16"
        result.refusals.append(Refusal("worker.rollout.dtype", dtype, why, mend))
    result.values["inference.dtype"] = _DTYPES.get(dtype, "bfloat16")
    if values["worker.rollout.enforce_eager"]:  # false is no wish: without a GPU there is no other way
        result.values["inference.engine_args.enforce_eager"] = True


def _tasks(values: ArpoValues, result: Translation, origin: Path, overridden: Collection[str]) -> None:
    """The task list, looked for from here and from each folder above the file that names it."""
    if {"tasks.list", "tasks.suite", "tasks.tasks"} & set(overridden):
        return
    named = Path(values["data.train_files"]).expanduser()
    places = [named, *(parent / named for parent in origin.absolute().parents)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        why = "no such file here, nor in a folder above the configuration" if named.name else "no task list is named"
        mend = "data.train_files=FILE, a list as OSWorld's test_all.json"
        result.refusals.append(Refusal("data.train_files", values["data.train_files"], why, mend))
    else:
        result.values["tasks.list"] = found


def _machine(values: ArpoValues, result: Translation) -> None:
    """Desktops' provider, GPUs, sharding and checkpoints."""
    provider = values["env.provider"]
    result.values["desktop.provider"] = _PROVIDERS.get(provider, provider)
    num_gpus = 0 if values["trainer.use_cpu"] else values["trainer.n_gpus_per_node"]
    _devices(num_gpus, values["worker.rollout.tensor_parallel_size"], result)
    # FSDP shards parameters too, or gradients and optimizer states alone.
    result.values["learner.zero_stage"] = 3 if values["worker.actor.fsdp.enable_full_shard"] else 2
    if values["worker.actor.model.enable_gradient_checkpointing"]:
        result.values["learner.activations"] = "layers"
    if values["worker.actor.offload.offload_optimizer"] or values["worker.actor.fsdp.enable_cpu_offload"]:
        result.values["learner.offload_optimizer"] = True
    if num_gpus == 0:
        result.values |= {"learner.dtype": "float32", "inference.dtype": "float32"}
        result.values["inference.kv_cache_bytes"] = _CPU_KV_CACHE_BYTES
    else:
        result.values["inference.gpu_memory_fraction"] = values["worker.rollout.gpu_memory_utilization"]
    if values["trainer.save_freq"] > 0:
        result.values["learner.checkpoint_every"] = values["trainer.save_freq"]
    if (limit := values["trainer.save_limit"]) is not None:
        result.values["learner.keep_checkpoints"] = limit if limit > 0 else _ALL_CHECKPOINTS


def _devices(num_gpus: int, workers: int | None, result: Translation) -> None:
    """ARPO's GPUs learn and serve by turns; here one half learns while the other serves, and a single one does both."""
    workers = workers or 1
    if workers > 1:
        result.values["inference.engine_args.tensor_parallel_size"] = workers
    if num_gpus < 2:
        return
    num_replicas = max(1, num_gpus // 2 // workers)
    num_learning = max(1, num_gpus - num_replicas * workers)
    result.values["learner.num_processes"] = num_learning
    result.values["learner.devices"] = tuple(range(num_learning))
    result.values["inference.num_replicas"] = num_replicas
    result.values["inference.devices"] = tuple(range(num_learning, num_learning + num_replicas * workers))


def _same(value: Any, accepted: Any) -> bool:
    if isinstance(accepted, bool) or isinstance(value, bool):
        return value is accepted
    return bool((list(value) if isinstance(value, tuple) else value) == accepted)


def _told(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    plain = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return plain[value]
    return re.sub(r"\s+", " ", str(value))
