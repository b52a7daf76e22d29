"""That it is GRPO that learns: the smoke run again, each group's rewards dealt out at random among its members.

All else is as it was: the same tasks, imitation, sampling, replay and optimizer steps. Takes as long as a smoke run.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ports_kit import free_port

from deskrl.core.stats import newcombe_difference

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"


@pytest.mark.timeout(1800)
def test_with_shuffled_rewards_success_does_not_rise(tmp_path: Path) -> None:
    arguments = ["--runs", str(tmp_path), "--name", "control", "--learner.grpo.shuffle_rewards", "true"]
    arguments += ["--replay.address", f"127.0.0.1:{free_port()}", "--inference.address", f"127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "deskrl.core.cli", "up", str(SMOKE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode in (0, 1), done.stdout[-2000:]
    evaluation = json.loads((tmp_path / "control" / "results" / "evaluation.json").read_text())
    before, after = evaluation["before"], evaluation["after"]
    counts = (before["successes"], before["episodes"], after["successes"], after["episodes"])
    _, low, _ = newcombe_difference(*counts)
    assert low <= 0, f"success rose without knowing what succeeded: {counts}"
