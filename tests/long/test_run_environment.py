"""A whole run on IPv6 addresses, in the environment of a company network and of a pod: it is as if nothing were set."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ports_kit import free_port

from deskrl.core.run_dir import RunDir

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"
PROXY = "http://127.0.0.1:1"
ENVIRONMENT = {
    **{
        name: PROXY
        for scheme in ("http", "https", "all", "grpc")
        for name in (f"{scheme}_proxy", f"{scheme}_PROXY".upper())
    },
    # A Service of Kubernetes named vllm, and a job of Kubeflow.
    **{"VLLM_PORT": "tcp://10.96.3.7:8000", "VLLM_SERVICE_HOST": "10.96.3.7", "VLLM_SERVICE_PORT": "8000"},
    **{"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "PET_NNODES": "4"},
}
SHORT = {
    "tasks.num_rollouts": 2,
    "tasks.max_steps": 2,
    "desktop.num_envs": 2,
    "learner.warm_start": "null",
    "learner.grpo.num_updates": 1,
    "learner.grpo.groups_per_batch": 2,
    "learner.grpo.num_minibatches": 1,
    "learner.grpo.zero_variance_groups": "keep",
    "learner.eval.num_episodes": 0,
    "learner.eval.min_gain": "null",
    "learner.verify_checkpoint": "false",
}


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")
def test_a_run_uses_no_proxy_and_no_variable_of_another_system(tmp_path: Path) -> None:
    addresses = {key: f"[::1]:{free_port()}" for key in ("replay.address", "inference.address")}
    options = [f"--{key}={value}" for key, value in (SHORT | addresses | {"runs": tmp_path}).items()]
    command = [sys.executable, "-m", "deskrl.cli.main", "up", str(SMOKE), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=600)
    assert done.returncode in (0, 1), done.stderr  # 1: a policy that was updated once need not have changed
    assert "training finished" in done.stdout, done.stdout + done.stderr
    folder = RunDir(tmp_path / "smoke")
    assert len(list(folder.read_metrics("update"))) == 1
    assert not list(folder.read_metrics("restart"))
