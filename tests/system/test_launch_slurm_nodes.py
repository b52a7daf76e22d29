"""deploy/slurm starts a learner of two nodes on two slurmd, each with its rank, restarts it and ends it.

A script is in place of deskrl, so that no GPU is needed; test_learner_nodes.py has the nodes themselves.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_kit import slurm, slurm_unavailable_reason

LAUNCH = Path(__file__).parents[2] / "deploy" / "slurm" / "launch.sh"
DESKRL = """#!/bin/sh
case $1 in
size)
    printf '%s\\n' name=nodes folder=RUN replay_folder= num_actors=0 num_replicas=0 num_nodes=2 \\
        replay_host=localhost replay_port=7411 inference_host=localhost inference_port=7421
    ;;
prepare) ;;
learner)
    echo "started $3 $4 at $DESKRL_LEARNER__MASTER_ADDR"
    [ -e RUN/failed-$4 ] || { touch RUN/failed-$4; exit 1; }
    trap 'echo "stopped $4"; exit 143' TERM
    while :; do sleep 0.1; done
    ;;
*) exec sleep 600 ;;
esac
"""
pytestmark = pytest.mark.skipif(bool(slurm_unavailable_reason()), reason=f"no Slurm: {slurm_unavailable_reason()}")
_TIMEOUT_S = 120.0


class NodesJob:
    """Run under Slurm whose learner has two nodes.

    Args:
        root: folder for the run directory and the script.
        environment: environment for Slurm's commands.
    """

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self._config = root / "run.toml"
        self._config.touch()
        self._log = root / "run" / "logs" / "learner.log"
        (programs := root / "programs").mkdir()
        (programs / "deskrl").write_text(DESKRL.replace("RUN", str(root / "run")))
        (programs / "deskrl").chmod(0o755)
        self._environment = environment | {"PATH": f"{programs}:{environment['PATH']}"}

    def run(self, *command: str) -> str:
        """Run a command and return its output."""
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=_TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def launch(self, command: str) -> None:
        """Run `launch.sh COMMAND run.toml`."""
        self.run("bash", str(LAUNCH), command, str(self._config))

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[NodesJob]:
    with slurm(tmp_path / "slurm", num_nodes=2) as environment:
        job = NodesJob(tmp_path, {**os.environ, **environment})
        yield job
        job.launch("stop")


def test_each_node_gets_its_rank_and_the_first_one_as_address_and_all_are_restarted_and_stopped(job: NodesJob) -> None:
    job.launch("start")
    here = job.run("hostname", "-f").strip() or socket.gethostname()
    job.wait_for(lambda: job.log().count("started --node-rank") == 4)
    log = job.log()
    for rank in (0, 1):
        assert log.count(f"started --node-rank {rank} at {here}\n") == 2
    assert "role.sh: learner ended with status 1 and is started again\n" in log
    (job_id,) = job.run("squeue", "--noheader", "--format=%A", "--name=deskrl-nodes-learner").split()
    assert "NumNodes=2" in job.run("scontrol", "show", "job", job_id)
    job.run("scancel", "--signal=TERM", "--batch", job_id)  # to the script, which passes it on to both nodes
    job.wait_for(lambda: job.run("squeue", "--noheader", "--name=deskrl-nodes-learner") == "")
    assert job.log().count("stopped") == 2
    assert "started again" not in job.log().rpartition("stopped")[2]
