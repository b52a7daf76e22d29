"""Translation of ARPO's keys into those of a run. All keys that cannot be translated are collected, with hints."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deskrl.core.config import value_problem
from deskrl.core.prompt_rendering import ImageSizing
from deskrl.launch.arpo.keys import KEYS, Copied, Derived, Rule, Unused, rule_of

_PATCH, _MERGE = 14, 2
_MAX_SHOWN_CHARACTERS = 120
_CPU_KV_CACHE_BYTES = 4 * 1024**3
_ALL_CHECKPOINTS = 1_000_000
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DTYPES |= {name: name for name in _DTYPES.values()}
_KL_ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3"}
_PROVIDERS = {"docker": "osworld"}
"""ARPO's `docker` is OSWorld's provider of that name: the official virtual machine in a container."""


@dataclass(frozen=True)
class Note:
    """Outcome of a key that a file or an override sets."""

    key: str
    value: Any
    outcome: str
    """Key of the run that it sets, or the reason why it has no effect."""


@dataclass(frozen=True)
class Problem:
    """A key that cannot be translated."""

    key: str
    value: Any
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"{self.key} = {_as_yaml(self.value)}: {self.reason}"


@dataclass
class Translation:
    """Result of the translation."""

    values: dict[str, Any] = field(default_factory=dict)
    """Values by dotted key of the run."""
    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def tree(self) -> dict[str, Any]:
        """Return the values as nested tables."""
        root: dict[str, Any] = {}
        for key, value in self.values.items():
            *parents, last = key.split(".")
            table = root
            for parent in parents:
                table = table.setdefault(parent, {})
            table[last] = value
        return root


class ArpoValues:
    """ARPO's values by dotted key, including defaults, converted to their types.

    Args:
        stated: values of the file and the overrides, by dotted key.
    """

    def __init__(self, stated: Mapping[str, Any]) -> None:
        self._values: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.stated = stated
        for key, rule in KEYS.items():
            if isinstance(rule, Derived | Copied):
                self._values[key] = self._of_kind(key, rule) if stated.get(key) is not None else rule.default

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def _of_kind(self, key: str, rule: Derived | Copied) -> Any:
        """Return the value of a key in its type, or ARPO's default, with a problem, if it is not valid."""
        value = self.stated[key]
        # YAML reads 1e-6 as text, and a name that consists of digits as a number.
        convertible = {float: int | float | str, str: str | int | float, int: int, list: list | tuple, bool: bool}
        is_bool_for_number = isinstance(value, bool) and rule.kind is not bool
        kind = {float: "a number", int: "a whole number", str: "text", list: "a list", bool: "true or false"}[rule.kind]
        reason: str | None = f"must be {kind}"
        if isinstance(value, convertible[rule.kind]) and not is_bool_for_number:
            try:
                converted = rule.kind(value)
            except (ValueError, OverflowError):
                pass
            else:
                reason = _bounds_problem(key, converted, rule)
                if reason is None:
                    return converted
        assert reason is not None
        self.problems.append(Problem(key, value, reason, _default_hint(key, rule.default)))
        return rule.default


def _default_hint(key: str, default: Any) -> str:
    return f"correct or remove {key}" if default is None else f"set {key}={_as_yaml(default)}"


def _bounds_problem(key: str, value: Any, rule: Derived | Copied) -> str | None:
    """Return why a value of the right type is out of bounds; None if it is not."""
    if key == "env.screen_size":
        return _screen_problem(value)
    if isinstance(rule, Copied):
        return value_problem(rule.target, value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert rule.bounds is not None, key
        low, high = rule.bounds
        if not low <= value <= high:  # also false for nan
            return f"must be from {low} to {high}"
    return None


def _screen_problem(size: list[Any]) -> str | None:
    """Return why a screen size is not valid; None if it is."""
    sides = dict(zip(("desktop.width", "desktop.height"), size, strict=False))
    if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in size):
        return "must be a list of two whole numbers, width and height"
    return next((problem for key, side in sides.items() if (problem := value_problem(key, side))), None)


def translate(stated: Mapping[str, Any], origin: Path, overridden: Collection[str]) -> Translation:
    """Translate all that does not depend on the number of tasks.

    Args:
        stated: values of the file and the overrides, by dotted key of ARPO.
        origin: path of the file; relative paths are also looked up in its parent directories.
        overridden: keys of the run set by the environment or by options; ARPO's values for these are not checked.
    """
    values = ArpoValues(stated)
    result = Translation({"preset": "arpo"}, problems=list(values.problems))
    for key, value in stated.items():
        _translate_key(key, value, rule_of(key), result)
    for key, rule in KEYS.items():
        if isinstance(rule, Copied) and values[key] is not None:
            result.values[rule.target] = values[key]
    if values["wandb.enabled"] is not None or "wandb" in values["trainer.logger"]:
        # Never online, so that a run does not fail for lack of a login. `wandb sync` uploads the logs later.
        result.values["tracker"] = [] if values["wandb.enabled"] is False else ["wandb"]
    _batches(values, result, overridden)
    _kl(values, result, overridden)
    _screens(values, result)
    _policy(values, result, overridden)
    _tasks(values, result, origin, overridden)
    _machine(values, result)
    return result


def schedule(stated: Mapping[str, Any], num_tasks: int, overridden: Collection[str]) -> Translation:
    """Translate what depends on the number of tasks: updates, warm-up and the size of an evaluation."""
    values = ArpoValues(stated)
    result = Translation()
    batch = values["data.rollout_batch_size"]
    if batch > num_tasks and "learner.grpo.groups_per_batch" not in overridden:
        hint = f"set data.rollout_batch_size={num_tasks} worker.actor.global_batch_size={num_tasks}"
        reason = f"more than the {num_tasks} tasks of the list, and a batch of ARPO does not exceed an epoch"
        result.problems.append(Problem("data.rollout_batch_size", batch, reason, hint))
        return result
    num_updates = values["trainer.total_episodes"] * (num_tasks // batch)
    if values["trainer.max_steps"] is not None:
        num_updates = values["trainer.max_steps"]
    result.values["learner.grpo.num_updates"] = num_updates
    result.values["learner.grpo.warmup_updates"] = int(values["worker.actor.optim.lr_warmup_ratio"] * num_updates)
    result.values["learner.eval.num_episodes"] = num_tasks if values["trainer.val_before_train"] else 0
    return result


def _translate_key(key: str, value: Any, rule: Rule | None, result: Translation) -> None:
    """Add a note on the outcome of a key, or a problem."""
    if rule is None:
        near = difflib.get_close_matches(key, KEYS, n=1)
        result.problems.append(
            Problem(key, value, "ARPO has no such key", f"did you mean {near[0]}" if near else f"remove {key}")
        )
    elif isinstance(rule, Unused):
        result.notes.append(Note(key, value, f"unused: {rule.reason}"))
    elif isinstance(rule, Copied):
        result.notes.append(Note(key, value, rule.target))
    elif isinstance(rule, Derived):
        if rule.target:
            result.notes.append(Note(key, value, rule.target))
    elif any(_same(value, accepted) for accepted in rule.accepted):
        result.notes.append(Note(key, value, f"no choice: {rule.reason}"))
    else:
        result.problems.append(Problem(key, value, rule.reason, f"set {key}={_as_yaml(rule.accepted[0])}"))


def _batches(values: ArpoValues, result: Translation, overridden: Collection[str]) -> None:
    """Translate the sizes of batches and optimizer steps; ARPO's global batch is counted in tasks too."""
    rollouts, tasks = values["worker.rollout.n"], values["data.rollout_batch_size"]
    step_tasks = values["worker.actor.global_batch_size"]
    if rollouts < 2 and "tasks.num_rollouts" not in overridden:
        reason = "a single rollout in a group has no advantage"
        result.problems.append(Problem("worker.rollout.n", rollouts, reason, "set worker.rollout.n=2"))
    elif rollouts >= 2:
        result.values["tasks.num_rollouts"] = rollouts
    result.values["learner.grpo.groups_per_batch"] = tasks
    if step_tasks < 1 or tasks % step_tasks:
        if "learner.grpo.num_minibatches" not in overridden:
            reason = f"does not divide data.rollout_batch_size = {tasks} into optimizer steps"
            hint = f"set worker.actor.global_batch_size={tasks}"
            result.problems.append(Problem("worker.actor.global_batch_size", step_tasks, reason, hint))
        return
    result.values["learner.grpo.num_minibatches"] = tasks // step_tasks


def _kl(values: ArpoValues, result: Translation, overridden: Collection[str]) -> None:
    """Translate the KL penalty. ARPO adapts its weight, if that is asked for, only for a penalty in the reward."""
    if values["algorithm.disable_kl"]:
        result.values["learner.grpo.kl_coefficient"] = 0.0
        return
    result.values["learner.grpo.kl_coefficient"] = values["algorithm.kl_coef"]
    result.values["learner.grpo.kl_applied_to"] = "loss" if values["algorithm.use_kl_loss"] else "reward"
    if values["worker.ref.fsdp.enable_cpu_offload"] or values["worker.ref.offload.offload_params"]:
        result.values["learner.offload_reference"] = True
    name = values["algorithm.kl_penalty"]
    if name in _KL_ESTIMATORS:
        result.values["learner.grpo.kl_estimator"] = _KL_ESTIMATORS[name]
    elif "learner.grpo.kl_estimator" not in overridden:
        reason = f"the KL divergence is estimated by one of {', '.join(_KL_ESTIMATORS)}"
        result.problems.append(Problem("algorithm.kl_penalty", name, reason, "set algorithm.kl_penalty=kl"))
    kind = values["algorithm.kl_type"]
    if kind != "fixed" and not values["algorithm.use_kl_loss"] and "learner.grpo.kl_coefficient" not in overridden:
        reason = "the weight of the KL penalty is constant"
        result.problems.append(Problem("algorithm.kl_type", kind, reason, "set algorithm.kl_type=fixed"))


def _screens(values: ArpoValues, result: Translation) -> None:
    """Translate the screen size, the size of screenshots for the policy, and their number in the context."""
    width, height = values["env.screen_size"]
    result.values["desktop.width"], result.values["desktop.height"] = width, height
    smallest, largest = values["data.min_pixels"], values["data.max_pixels"]
    if smallest > largest:
        reason, hint = f"more than data.max_pixels = {largest}", f"set data.min_pixels={largest}"
        result.problems.append(Problem("data.min_pixels", smallest, reason, hint))
    sizing = ImageSizing(_PATCH, _MERGE, smallest, largest)
    scaled_size = sizing.scaled_size(width, height)
    if scaled_size[0] * scaled_size[1] < width * height:  # otherwise the model's processor rounds the size
        result.values["agent.image_width"], result.values["agent.image_height"] = scaled_size
    max_steps, limit = values["env.max_steps"], values["worker.rollout.limit_images"]
    shown = min(limit, max_steps) if limit > 0 else max_steps
    result.values["inference.max_images"] = shown
    if shown < max_steps:
        # ARPO's code keeps all screenshots in the context, and fails at the first one beyond the limit.
        result.values["agent.context"] = "window"
        result.values["agent.window_images"] = shown


def _policy(values: ArpoValues, result: Translation, overridden: Collection[str]) -> None:
    """Translate the model and the settings of its server."""
    path = values["worker.actor.model.model_path"]
    if not {"model.path", "model.build"} & set(overridden):
        if path is None:
            reason, hint = "no model is set", "set worker.actor.model.model_path=DIRECTORY or --model.build tiny"
            result.problems.append(Problem("worker.actor.model.model_path", path, reason, hint))
        result.values["model.path"] = path
    lengths = values["data.max_prompt_length"], values["data.max_response_length"]
    result.values["inference.max_model_len"] = sum(lengths)
    dtype = values["worker.rollout.dtype"]
    if dtype not in _DTYPES and "inference.dtype" not in overridden:
        reason, hint = "not a numeric type of deskrl", "set worker.rollout.dtype=bf16"
        result.problems.append(Problem("worker.rollout.dtype", dtype, reason, hint))
    result.values["inference.dtype"] = _DTYPES.get(dtype, "bfloat16")
    if values["worker.rollout.enforce_eager"]:  # false, the default, cannot be enforced: a CPU is always eager
        result.values["inference.engine_args.enforce_eager"] = True


def _tasks(values: ArpoValues, result: Translation, origin: Path, overridden: Collection[str]) -> None:
    """Translate the task list, which is looked up from here and from each parent directory of the file."""
    if {"tasks.list", "tasks.suite", "tasks.ids"} & set(overridden):
        return
    named = Path(values["data.train_files"]).expanduser()
    places = [named, *(parent / named for parent in origin.absolute().parents)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        reason = "not found here or in a parent directory of the file" if named.name else "no task list is set"
        hint = "set data.train_files=FILE, a task list such as OSWorld's test_all.json"
        result.problems.append(Problem("data.train_files", values["data.train_files"], reason, hint))
    else:
        result.values["tasks.list"] = found


def _machine(values: ArpoValues, result: Translation) -> None:
    """Translate the provider of desktops, GPUs, sharding and checkpoints."""
    provider = values["env.provider"]
    result.values["desktop.provider"] = _PROVIDERS.get(provider, provider)
    num_gpus = 0 if values["trainer.use_cpu"] else values["trainer.n_gpus_per_node"]
    _devices(num_gpus, values["trainer.nnodes"], values["worker.rollout.tensor_parallel_size"], result)
    # FSDP shards parameters, gradients and optimizer states, or only the latter two.
    result.values["learner.zero_stage"] = 3 if values["worker.actor.fsdp.enable_full_shard"] else 2
    if values["worker.actor.model.enable_gradient_checkpointing"]:
        result.values["learner.activation_checkpointing"] = "full"
    if values["worker.actor.offload.offload_optimizer"] or values["worker.actor.fsdp.enable_cpu_offload"]:
        result.values["learner.offload_optimizer"] = True
    if num_gpus == 0:
        result.values |= {"learner.dtype": "float32", "inference.dtype": "float32"}
        result.values["inference.kv_cache_bytes"] = _CPU_KV_CACHE_BYTES
    else:
        result.values["inference.gpu_memory_utilization"] = values["worker.rollout.gpu_memory_utilization"]
    if values["trainer.save_freq"] > 0:
        result.values["learner.checkpoint_every"] = values["trainer.save_freq"]
    if (limit := values["trainer.save_limit"]) is not None:
        result.values["learner.keep_checkpoints"] = limit if limit > 0 else _ALL_CHECKPOINTS


def _devices(num_gpus: int, num_nodes: int, workers: int | None, result: Translation) -> None:
    """Divide each node's GPUs, which ARPO uses alternately: half train and the others serve; a single GPU does both.

    On several nodes, the launcher assigns GPUs to learner and replicas.
    """
    workers = workers or 1
    if workers > 1:
        result.values["inference.engine_args.tensor_parallel_size"] = workers
    if num_gpus < 2:
        return
    num_replicas = max(1, num_gpus // 2 // workers)
    num_ranks = max(1, num_gpus - num_replicas * workers)
    result.values["learner.num_processes"] = num_ranks
    result.values["inference.num_replicas"] = num_nodes * num_replicas
    if num_nodes == 1:
        result.values["learner.devices"] = tuple(range(num_ranks))
        result.values["inference.devices"] = tuple(range(num_ranks, num_ranks + num_replicas * workers))


def _same(value: Any, accepted: Any) -> bool:
    if isinstance(accepted, bool) or isinstance(value, bool):
        return value is accepted
    return bool((list(value) if isinstance(value, tuple) else value) == accepted)


def _as_yaml(value: Any) -> str:
    """Return a value in YAML, on one line."""
    plain = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return plain[value]
    try:
        text = re.sub(r"\s+", " ", str(value))
    except ValueError:  # a number with more digits than Python prints
        return "a number with too many digits"
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}…"
