"""A run on a Gymnasium environment: demonstrations, warm start, GRPO and a verified checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ports_kit import free_port
from target_game import KEY_OF_QUARTER, KEYS, TARGET_ID

from deskrl.core.run_dir import RunDir

NUM_UPDATES = 2
CONFIG = """
name = "target"
[tasks]
num_rollouts = 4
max_steps = 3
[desktop]
provider = "gymnasium"
num_envs = 4
width = 280
height = 224
[agent]
prompt = "brief"
context = "episode"
[actor]
desktops_per_actor = 4
[inference]
dtype = "float32"
max_model_len = 2048
max_images = 8
kv_cache_bytes = 536870912
max_action_tokens = 48
[learner]
dtype = "float32"
[learner.warm_start]
demos_per_task = 2
stop_likelihood = 0.3
[learner.grpo]
groups_per_batch = 2
zero_variance_groups = "keep"
"""


def write_tasks(suite: Path) -> None:
    """Write a task for each quarter, with its solution."""
    folder = suite / "examples" / "game"
    folder.mkdir(parents=True)
    for quarter, key in enumerate(KEY_OF_QUARTER):
        solution = [{"thought": "Press the key.", "action": {"kind": "hotkey", "keys": [key]}}]
        task = {
            "id": f"hit-{key}",
            "instruction": f"Press {key}.",
            "config": [{"type": "environment", "parameters": {"parameters": {"quarter": quarter}}}],
            "evaluator": {"func": "environment_reward", "result": {"type": "environment_outcome"}},
            "deskrl": {"solution": solution},
        }
        (folder / f"hit-{key}.json").write_text(json.dumps(task))


def test_a_policy_is_trained_on_a_gymnasium_environment(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    settings = {
        "runs": tmp_path / "runs",
        "tasks.suite": tmp_path / "tasks",
        "desktop.provider_options": json.dumps({"id": TARGET_ID, "actions": KEYS}),
        "learner.grpo.num_updates": NUM_UPDATES,
        "replay.address": f"127.0.0.1:{free_port()}",
        "inference.address": f"127.0.0.1:{free_port()}",
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    ended = subprocess.run(
        [sys.executable, "-m", "deskrl.cli.main", "up", str(config), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "kit")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )
    folder = RunDir(tmp_path / "runs" / "target")
    assert [record["update"] for record in folder.read_metrics("update")] == [1, 2], ended.stdout[-3000:]
    assert ended.returncode == 0 and "faults 0" in ended.stdout
    assert folder.report.is_file() and (folder.checkpoints / "latest" / "model.safetensors").is_file()
