"""Presets: named sets of values below everything that a run states itself. Plain data; knows no meaning.

`deskrl`, the corrected asynchronous trainer, is what the schema's defaults are, so it is empty here. `arpo` is ARPO as
its code does it (github.com/dvlab-research/ARPO at 7489ae3, `examples/osworld_full_arpo.sh`): `deskrl explain` prints
where a run departs from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

PresetName = Literal["deskrl", "arpo"]

PRESETS: Mapping[PresetName, Mapping[str, Any]] = {
    "deskrl": {},
    "arpo": {
        "tasks": {"rollouts": 8, "max_steps": 15},
        "agent": {"context": "episode", "format_error": "evaluate"},
        "inference": {"max_images": 15},
        "replay": {"schedule": "lock_step", "successes_per_task": 8, "success_above": 0.1, "success_choice": "uniform"},
        "learner": {
            "grpo": {
                # 16 tasks x 8 rollouts are a batch of 128; optimizer steps are of 8 tasks x 8 rollouts.
                "groups_per_batch": 16,
                "minibatches": 2,
                "max_staleness": 0,
                "temperature": 1.0,
                "format_penalty": 0.5,
                "advantage": "standardised",
                "negative_scale": 1.0,
                "groups_without_spread": "keep",
                "clip_low": 0.2,
                "clip_high": 0.3,
                "dual_clip": 3.0,
                "importance": "off",
                "loss_denominator": "trajectory_tokens",
                "learning_rate": 1e-6,
                "weight_decay": 0.01,
                "max_grad_norm": 1.0,
                "warmup_updates": 0,
                "replay_successes": True,
                "replay_when": "low_and_alike",
                "replay_place": "first",
                "success_ratio": "one",
                "dynamic_rollouts": False,
            }
        },
    },
}
