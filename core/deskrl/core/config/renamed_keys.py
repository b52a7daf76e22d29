"""Renamed configuration keys and values: hints for the user, and translation of configurations of earlier runs."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

RENAMED_KEYS: Mapping[str, str] = {
    "tasks.tasks": "tasks.ids",
    "tasks.rollouts": "tasks.num_rollouts",
    "tasks.unplayable": "tasks.unmet_requirements",
    "agent.family": "agent.action_language",
    "desktop.settle_limit_s": "desktop.settle_timeout_s",
    "desktop.osworld.pause": "desktop.osworld.pause_when_idle",
    "desktop.simulated.hang_share": "desktop.simulated.hang_rate",
    "desktop.simulated.luck": "desktop.simulated.random_success_rate",
    "replay.success_above": "replay.success_threshold",
    "replay.success_choice": "replay.success_sampling",
    "inference.max_concurrent": "inference.max_concurrent_requests",
    "inference.gpu_memory_fraction": "inference.gpu_memory_utilization",
    "learner.activations": "learner.activation_checkpointing",
    "learner.prove_checkpoint": "learner.verify_checkpoint",
    "learner.keep_scores": "learner.keep_token_stats",
    "learner.warm_start.batch_episodes": "learner.warm_start.episodes_per_batch",
    "learner.grpo.env_steps": "learner.grpo.max_env_steps",
    "learner.grpo.importance": "learner.grpo.importance_weighting",
    "learner.grpo.groups_without_spread": "learner.grpo.zero_variance_groups",
    "learner.grpo.negative_scale": "learner.grpo.negative_advantage_scale",
    "learner.grpo.minibatches": "learner.grpo.num_minibatches",
    "learner.grpo.loss_scale_tokens": "learner.grpo.loss_denominator_tokens",
    "learner.grpo.replay_successes": "learner.grpo.use_success_buffer",
    "learner.grpo.replay_when": "learner.grpo.replace_when",
    "learner.grpo.replay_place": "learner.grpo.replace_slot",
    "learner.grpo.success_ratio": "learner.grpo.success_weighting",
    "learner.eval.episodes": "learner.eval.num_episodes",
    "security.folder": "security.certificates_dir",
}
"""New name of each renamed key."""

REPLACED_KEYS: Mapping[str, str] = {
    "wandb": 'tracker = ["wandb"], with tracker_options.wandb.mode = "online" or "offline"',
}
"""What replaces each key whose values have another form now."""

RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {
    "tasks.unmet_requirements": {"refuse": "reject", "play": "run"},
    "replay.schedule": {"free": "asynchronous"},
    "learner.activation_checkpointing": {"all": "off", "attention": "selective", "layers": "full"},
    "learner.grpo.replace_when": {"low_and_alike": "low_mean_low_std"},
}
"""New name of each renamed value, by the present name of its key."""


def translate(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration with all renamed keys and values replaced by their present names.

    A key that is present under both its names is left as it is, so that the old one is rejected as unknown.
    """
    translated: dict[str, Any] = {}
    if not prefix:
        values = _with_trackers(values)
    for key, value in values.items():
        new_key = RENAMED_KEYS.get(prefix + key, prefix + key).removeprefix(prefix)
        if new_key in values:
            new_key = key
        if isinstance(value, Mapping):
            value = translate(value, f"{prefix}{key}.")
        translated[new_key] = renamed_value(prefix + new_key, value) or value
    return translated


def _with_trackers(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration with `wandb`, the mode of the only tracker of earlier versions, as `tracker`."""
    if "wandb" not in values or "tracker" in values:
        return values
    others = {key: value for key, value in values.items() if key != "wandb"}
    if values["wandb"] == "off":
        return others
    return {**others, "tracker": ["wandb"], "tracker_options": {"wandb": {"mode": values["wandb"]}}}


def renamed_value(key: str, value: Any) -> str | None:
    """Return the new name of a value of a key, or None if it was not renamed."""
    return RENAMED_VALUES.get(key, {}).get(value) if isinstance(value, str) else None


def hint_for_unknown(key: str, known_keys: Collection[str]) -> str | None:
    """Return a hint for an unknown key: its new name or a similar known key; None if there is neither.

    Similar keys are searched in the same section first, and then under (nearly) the same name in all sections.
    """
    if key in RENAMED_KEYS:
        return f"renamed to {RENAMED_KEYS[key]}"
    if key in REPLACED_KEYS:
        return f"replaced by {REPLACED_KEYS[key]}"
    section, _, name = key.rpartition(".")
    prefix = f"{section}." if section else ""
    siblings = [known.removeprefix(prefix) for known in known_keys if known.rpartition(".")[0] == section]
    similar = [prefix + match for match in difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)]
    if not similar:
        names = difflib.get_close_matches(name, {known.rpartition(".")[2] for known in known_keys}, n=1, cutoff=0.8)
        similar = sorted(known for known in known_keys if known.rpartition(".")[2] in names)
    return f"did you mean {' or '.join(similar)}" if similar else None
