"""Control experiment: the success rate does not rise if the rewards are shuffled within each group.

Everything else is as in the smoke run: tasks, warm start, sampling, replay and optimizer steps. It takes as long as a
smoke run.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ports_kit import free_port

from deskrl.launch.confidence_intervals import newcombe_difference

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"


@pytest.mark.timeout(1800)
def test_the_success_rate_does_not_rise_with_shuffled_rewards(tmp_path: Path) -> None:
    arguments = ["--runs", str(tmp_path), "--name", "control", "--learner.grpo.shuffle_rewards", "true"]
    arguments += ["--replay.address", f"127.0.0.1:{free_port()}", "--inference.address", f"127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "deskrl.cli.main", "up", str(SMOKE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode in (0, 1), done.stdout[-2000:]
    evaluation = json.loads((tmp_path / "control" / "results" / "evaluation.json").read_text())
    before, after = evaluation["before"], evaluation["after"]
    counts = (before["successes"], before["episodes"], after["successes"], after["episodes"])
    _, low, _ = newcombe_difference(*counts)
    assert low <= 0, f"the success rate rose although rewards were shuffled: {counts}"
