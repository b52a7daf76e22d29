"""deploy/compose starts, scales, drains and stops a run on a Docker daemon, with certificates for its service names.

The containers use the Python installation of this machine, mounted. The containers of learner and inference exit at
once, so that no engine is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import docker
import pytest
from docker_kit import daemon_unavailable_reason, docker_daemon, import_tree
from ports_kit import free_port
from replay_kit import ReplayClient

import deskrl.core
from deskrl.core import rpc
from deskrl.launch.certificates import make_certificates

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "deploy" / "compose" / "launch.sh"
SOURCES = ("proto", "core", "models", "actor", "inference", "replay", "learner", "launch", "env", "analysis", "cli")
SOURCES += ("testing",)
IMAGE = "deskrl-test-machine"
_TIMEOUT_S = 120.0
pytestmark = pytest.mark.skipif(
    bool(daemon_unavailable_reason()) or shutil.which("docker-compose") is None,
    reason=daemon_unavailable_reason() or "docker-compose is not installed",
)


class Job:
    """Run under compose.

    Args:
        root: folder for the configuration, certificates and the run directory.
        daemon: address of the Docker daemon.
    """

    def __init__(self, root: Path, daemon: str) -> None:
        self.port = free_port()
        self.config = root / "run.toml"
        (root / "model").mkdir()
        make_certificates(root / "certificates", ["replay", "inference"], 1)
        (root / "further.yaml").write_text(json.dumps({"services": self._services()}))
        self._environment = os.environ | {
            "DOCKER_HOST": daemon,
            "COMPOSE_FILE": f"{LAUNCH.parent / 'compose.yaml'}:{root / 'further.yaml'}",
            "COMPOSE_PROJECT_NAME": "deskrltest",
            "CERTIFICATES": str(root / "certificates"),
            "RUNS": str(root / "runs"),
            "DESKRL_USER": "0:0",
        }
        self.set_num_envs(2)

    def _services(self) -> dict[str, object]:
        mounted = sorted({"/usr", sys.prefix, sys.base_prefix, str(Path(deskrl.core.__path__[0]).parents[2])})
        common = {
            "image": IMAGE,
            "entrypoint": [sys.executable, "-m", "deskrl.cli.main"],
            "environment": {
                "PATH": f"{Path(sys.executable).parent}:/usr/bin",
                "PYTHONPATH": ":".join(str(ROOT / source) for source in SOURCES),
                "HOME": "/tmp",
            },
            "volumes": [f"{path}:{path}:ro" for path in mounted],
        }
        exits_at_once = common | {"command": ["size", "/etc/deskrl/run.toml"]}
        return {
            "prepare": common,
            "replay": common | {"ports": [f"127.0.0.1:{self.port}:7411"]},
            "inference": exits_at_once,
            "learner": exits_at_once,
            "actor": common,
        }

    def set_num_envs(self, num_envs: int) -> None:
        """Set `desktop.num_envs` in the configuration file."""
        desktop = f"desktop.provider = 'simulated'\ndesktop.num_envs = {num_envs}\nactor.desktops_per_actor = 1\n"
        self.config.write_text(f"name = 'compose'\nmodel.path = '/runs'\n{desktop}")

    def launch(self, command: str) -> None:
        """Run `launch.sh COMMAND run.toml`."""
        done = subprocess.run(
            ["bash", LAUNCH, command, self.config], capture_output=True, text=True, env=self._environment, timeout=240
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with docker_daemon() as daemon:
        client = docker.DockerClient(daemon)
        import_tree(client, IMAGE)
        client.close()
        job = Job(tmp_path, daemon)
        yield job
        job.launch("stop")
    rpc.set_identity(None)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def test_a_run_is_started_scaled_and_drained(job: Job, tmp_path: Path) -> None:
    job.launch("start")
    rpc.load_own_identity("operator", tmp_path / "certificates")
    address = f"127.0.0.1:{job.port}"
    wait_for(lambda: rpc.check_health(address))
    with closing(ReplayClient(address)) as client:
        wait_for(lambda: client.status().num_actors == 2)
        job.set_num_envs(4)
        job.launch("scale")
        wait_for(lambda: client.status().num_actors == 4)
        job.launch("drain")
        assert rpc.is_healthy(address), "draining the actors must not stop replay"
