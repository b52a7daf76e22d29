"""Presets: named sets of values that apply to keys that a run does not set.

`deskrl`, corrected asynchronous ARPO, is empty because its values are the defaults of the schema. `arpo` is ARPO as
implemented in its code (github.com/dvlab-research/ARPO at 7489ae3, `examples/osworld_full_arpo.sh`); `deskrl explain`
prints where a run differs from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

PresetName = Literal["deskrl", "arpo"]

PRESETS: Mapping[PresetName, Mapping[str, Any]] = {
    "deskrl": {},
    "arpo": {
        "tasks": {"num_rollouts": 8, "max_steps": 15},
        "agent": {"context": "episode", "format_error": "evaluate"},
        "inference": {"max_images": 15},
        "replay": {
            "schedule": "lock_step",
            "successes_per_task": 8,
            "success_threshold": 0.1,
            "success_sampling": "uniform",
        },
        "learner": {
            "grpo": {
                # A batch of 16 tasks x 8 rollouts = 128 episodes, in optimizer steps of 8 tasks x 8 rollouts.
                "groups_per_batch": 16,
                "num_minibatches": 2,
                "max_staleness": 0,
                "temperature": 1.0,
                "format_penalty": 0.5,
                "advantage": "standardised",
                "negative_advantage_scale": 1.0,
                "zero_variance_groups": "keep",
                "clip_low": 0.2,
                "clip_high": 0.3,
                "dual_clip": 3.0,
                "importance_weighting": "off",
                "loss_denominator": "trajectory_tokens",
                "learning_rate": 1e-6,
                "weight_decay": 0.01,
                "max_grad_norm": 1.0,
                "warmup_updates": 0,
                "use_success_buffer": True,
                "replace_when": "low_mean_low_std",
                "replace_slot": "first",
                "success_weighting": "one",
                "dynamic_rollouts": False,
            }
        },
    },
}
