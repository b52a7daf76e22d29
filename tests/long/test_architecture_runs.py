"""Tiny models of further architectures learn in a shorter smoke run: real desktops, vLLM and DeepSpeed on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ports_kit import free_port

from deskrl.core.run_dir import RunDir

ROOT = Path(__file__).parents[2]
NUM_UPDATES, NUM_EPISODES = 8, 48
MAX_MISMATCH = 1e-4


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ["qwen3_vl", "glm4v"])
def test_a_tiny_model_of_an_architecture_learns(architecture: str, tmp_path: Path) -> None:
    settings = {
        "runs": str(tmp_path),
        "name": architecture,
        "model.architecture": architecture,
        "agent.action_language": "any_model_language:AnyModelLanguage",
        "replay.address": f"127.0.0.1:{free_port()}",
        "inference.address": f"127.0.0.1:{free_port()}",
        "learner.grpo.num_updates": str(NUM_UPDATES),
        "learner.eval.num_episodes": str(NUM_EPISODES),
        "learner.eval.min_gain": "null",
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "deskrl.cli.main", "up", str(ROOT / "deploy" / "runs" / "smoke.toml"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "kit")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, env=environment)
    folder = RunDir(tmp_path / architecture)
    updates = list(folder.read_metrics("update"))
    assert len(updates) == NUM_UPDATES, done.stdout[-3000:]
    assert json.loads((folder.checkpoints / "latest" / "config.json").read_text())["model_type"] == architecture
    mismatches = [update["mismatch_mean"] for update in updates if update["mismatch_mean"] is not None]
    assert mismatches and max(mismatches) < MAX_MISMATCH, "engine and learner differ for tokens of the same version"
    assert done.returncode == 0, done.stdout[-3000:]
    evaluation = json.loads((folder.root / "results" / "evaluation.json").read_text())
    assert evaluation["after"]["successes"] > NUM_EPISODES / 4, "a model that has learned nothing solves no task"
