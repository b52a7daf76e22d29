"""A whole run whose learner and replica share one GPU, in the numeric types for GPUs without bfloat16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports_kit import free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU available"),
]

SIMULATED = Path(__file__).parents[2] / "deploy" / "runs" / "simulated.toml"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_run_with_a_shared_gpu_finishes(tmp_path: Path, dtype: str) -> None:
    settings = {
        "runs": str(tmp_path),
        "name": "shared",
        "replay.address": f"127.0.0.1:{free_port()}",
        "inference.address": f"127.0.0.1:{free_port()}",
        "inference.dtype": dtype,
        "inference.engine_args": os.environ.get("DESKRL_TEST_ENGINE_ARGS", "{}"),
        "learner.dtype": dtype,
        "learner.grpo.num_updates": "2",
    }
    arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-m", "deskrl.cli.main", "up", str(SIMULATED), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    lines = (tmp_path / "shared" / "metrics.jsonl").read_text().splitlines()
    weights = [line for line in map(json.loads, lines) if line["kind"] == "weights"]
    assert len(weights) == 3, "one update of the weights after the warm start and two after optimizer updates"
