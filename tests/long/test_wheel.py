"""The wheel: outside of a clone, a run on real desktops trains to its end, and its launchers' commands work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wheel_kit import Installation, build_wheel

from deskrl.core.run_dir import RunDir

NUM_UPDATES = 2
SETTINGS = {
    "name": "installed",
    "tasks.ids": '["write-a-word", "make-a-folder"]',
    "desktop.num_envs": "2",
    "learner.warm_start.demos_per_task": "2",
    "learner.warm_start.max_updates": "4",
    "learner.grpo.num_updates": str(NUM_UPDATES),
    "learner.grpo.groups_per_batch": "1",
    "learner.grpo.zero_variance_groups": "keep",
    "learner.eval.num_episodes": "0",
}


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    return Installation(tmp_path_factory.mktemp("installation"), wheel)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["sweep", "{share}/sweeps/replay.toml", "--dry-run"], "deskrl up"),
        (["size", "{share}/runs/smoke.toml"], "actor"),
        (["prepare", "{share}/runs/simulated.toml"], ""),
    ],
)
def test_a_command_runs_outside_of_the_clone(installation: Installation, arguments: list[str], shown: str) -> None:
    outcome = installation.run("deskrl", *(argument.format(share=installation.share) for argument in arguments))
    assert outcome.returncode == 0, outcome.stdout
    assert shown in outcome.stdout


def test_a_run_trains_on_real_desktops_outside_of_the_clone(installation: Installation) -> None:
    options = [f"--{key}={value}" for key, value in SETTINGS.items()]
    outcome = installation.run("deskrl", "up", str(installation.share / "runs" / "smoke.toml"), *options, timeout_s=800)
    folder = RunDir(installation.work_dir / "runs" / "installed")
    assert [record["update"] for record in folder.read_metrics("update")] == [1, 2], outcome.stdout[-3000:]
    criteria = json.loads(folder.acceptance.read_text(encoding="utf-8"))
    assert folder.report.is_file()
    assert Path(folder.checkpoints / "latest" / "model.safetensors").is_file(), criteria
