"""Data from a run to the next one: export, import, a warm start from the demonstrations, and a run from its model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deskrl.core.run_dir import RunDir

SIMULATED = Path(__file__).parents[2] / "deploy" / "runs" / "simulated.toml"
DEADLINE_S = 600.0


def deskrl(*arguments: str | Path) -> str:
    """Run a command and return its output."""
    command = [sys.executable, "-m", "deskrl.cli.main", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def up(root: Path, name: str, *overrides: str) -> RunDir:
    deskrl("up", SIMULATED, f"--runs={root}", f"--name={name}", "--learner.verify_checkpoint=false", *overrides)
    return RunDir(root / name)


@pytest.mark.timeout(1800)
def test_a_policy_learns_from_the_episodes_of_another_run(tmp_path: Path) -> None:
    first = up(tmp_path, "first", "--learner.grpo.num_updates=0")
    deskrl("data", "export", first.root, tmp_path / "dataset", "--min-reward=1")
    deskrl("data", "import", tmp_path / "dataset", tmp_path / "demonstrations")
    options = (
        f"--learner.warm_start.demonstrations={tmp_path / 'demonstrations'}",
        "--learner.warm_start.num_epochs=120",
    )
    warm = up(tmp_path, "warm", "--learner.grpo.num_updates=0", *options)
    losses = [line["loss"] for line in warm.read_metrics("imitation")]
    assert losses[-1] < 0.1 * losses[0]
    model = ("--model.build=null", f"--model.path={warm.checkpoints / 'latest'}", "--learner.warm_start=null")
    no_luck = "--desktop.simulated.random_success_rate=0"
    second = up(tmp_path, "second", "--learner.grpo.num_updates=2", no_luck, *model)
    first_update, _ = second.read_metrics("update")
    assert first_update["success_rate"] > 0
