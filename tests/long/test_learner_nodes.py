"""A learner on two hosts (network namespaces), each with its own address, certificates, model and configuration.

The hosts share the run directory. Replay, replica and actor are on this machine, which the hosts reach over a bridge.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts_kit import HERE, Host, connected_hosts, hosts_unavailable_reason
from learner_kit import TASKS, build_model
from learner_peers_kit import ToyActor, ToyReplica
from ports_kit import free_port
from replay_kit import ReplayProcess

from deskrl.cli.main import main
from deskrl.core import rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.run_dir import RunDir
from deskrl.core.security.peer_identity import IdentityFiles, load_identity
from deskrl.launch.certificates import make_certificates

pytestmark = pytest.mark.skipif(bool(hosts_unavailable_reason()), reason=hosts_unavailable_reason())
_DEADLINE_S = 1500.0
_NODE_TIMEOUT_S = 60.0
_GRPO = {"num_updates": 3, "groups_per_batch": 2, "learning_rate": 1e-3, "max_staleness": 1}


class NodesRun:
    """One run whose learner has two nodes, on two hosts; it can be started repeatedly.

    Args:
        root: folder of the run and of what the hosts have.
        hosts: both hosts.
        learner: keys of the section `learner`.
    """

    def __init__(self, root: Path, hosts: list[Host], **learner: Any) -> None:
        self.root, self.hosts = root, hosts
        make_certificates(root / "here", [HERE], 1)
        rpc.set_identity(load_identity(root / "here", "actor"))
        self.config = RunConfig.model_validate(
            {
                "runs": root / "shared",
                "name": "nodes",
                "tasks": {"num_rollouts": 4, "max_steps": 3},
                "agent": {"image_width": 112, "image_height": 112},
                "security": {"certificates_dir": root / "here"},
                "replay": {"address": f"{HERE}:{free_port()}"},
                "inference": {"address": f"{HERE}:{free_port()}", "dtype": "float32", "num_replicas": 1},
                "learner": {
                    "dtype": "float32",
                    "grpo": _GRPO,
                    "num_nodes": 2,
                    "master_addr": hosts[0].address,
                    "master_port": 29500,
                    "rendezvous_timeout_s": 1200,
                    "node_timeout_s": _NODE_TIMEOUT_S,
                    **learner,
                },
            }
        )
        self.folder = RunDir(self.config.run_dir)
        self.replay = ReplayProcess(self.config)
        build_model(self.config.model_folder)
        self.folder.tasks.write_text(json.dumps(TASKS))
        for host in hosts:
            self._set_up(host)
        identity = load_identity(root / "here", "inference")
        self.replica = ToyReplica(self.config.inference.address, self.config.model_folder, root, identity)
        self.actor: ToyActor | None = ToyActor(
            self.replay.client(), self.replica, reward_of=lambda rollout: float(rollout.seed % 2)
        )

    def _set_up(self, host: Host) -> None:
        """Give a host its own certificates and model, and its own path to the run directory."""
        own = self.root / host.name
        (own / "certificates").mkdir(parents=True, mode=0o700)
        files = IdentityFiles(self.root / "here", "learner")
        for file in (files.ca, files.certificate, files.key, files.token):
            shutil.copy(file, own / "certificates")
        shutil.copytree(self.config.model_folder, own / "model")
        (own / "runs").symlink_to(self.root / "shared")

    def start(self, host: Host, node_rank: int, **learner: Any) -> subprocess.Popen[str]:
        """Start the learner of a host; keyword arguments override keys of the section `learner`."""
        own = self.root / host.name
        values = self.config.model_dump(mode="json")
        values |= {"runs": str(own / "runs"), "security": {"certificates_dir": str(own / "certificates")}}
        values["model"] = {"path": str(own / "model")}
        values["learner"] |= learner
        path = own / "config.json"
        dump_config(RunConfig.model_validate(values), path)
        command = [sys.executable, "-m", "deskrl.cli.main", "learner", str(path), "--node-rank", str(node_rank)]
        log = open(own / f"learner-{node_rank}.log", "w+")  # noqa: SIM115  # a pipe that is not read would block it
        return host.start(command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def start_all(self, **learner: Any) -> list[subprocess.Popen[str]]:
        """Start the learner on all hosts."""
        return [self.start(host, rank, **learner) for rank, host in enumerate(self.hosts)]

    def log(self, rank: int) -> str:
        """Return what the node of a rank has logged since its last start."""
        return (self.root / self.hosts[rank].name / f"learner-{rank}.log").read_text()

    def finish(self, nodes: list[subprocess.Popen[str]], status: int = 0) -> float:
        """Wait until all nodes have ended with an exit status; return the time that took in seconds."""
        started_s = time.monotonic()
        for rank, node in enumerate(nodes):
            node.wait(_DEADLINE_S)
            assert node.returncode == status, self.log(rank)[-3000:]
        return time.monotonic() - started_s

    def updates(self) -> list[dict[str, Any]]:
        return list(self.folder.read_metrics("update"))

    def wait_for(self, condition: Callable[[], bool], nodes: list[subprocess.Popen[str]]) -> None:
        """Wait for a condition; fail if a node ends before it is true."""
        deadline = time.monotonic() + _DEADLINE_S
        while not condition():
            for rank, node in enumerate(nodes):
                assert node.poll() is None, self.log(rank)[-3000:]
            assert time.monotonic() < deadline, self.log(0)[-3000:]
            time.sleep(0.02)

    def stop_peers(self) -> None:
        """Stop actor, replica and replay service."""
        if self.actor is not None:
            self.actor.close()
            self.actor = None
            self.replica.close()
            self.replay.close()

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
        self.stop_peers()
        rpc.set_identity(None)


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[Callable[..., NodesRun]]:
    """Function that prepares a run with keys of the section `learner`."""
    runs: list[NodesRun] = []
    with connected_hosts(2) as hosts:

        def make(**learner: Any) -> NodesRun:
            runs.append(NodesRun(tmp_path, hosts, **learner))
            return runs[-1]

        yield make
        for run in runs:
            run.close()


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_run_on_two_hosts_survives_the_death_of_one_and_equals_one_host(
    start_run: Callable[..., NodesRun],
    zero_stage: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = start_run(zero_stage=zero_stage)
    nodes = run.start_all()
    run.wait_for(lambda: len(run.updates()) == 1, nodes)
    run.hosts[1].kill()
    nodes[0].wait(_DEADLINE_S)
    assert nodes[0].returncode == 1, run.log(0)[-3000:]
    run.finish(run.start_all())
    last = {update["update"]: update["loss"] for update in run.updates()}
    assert list(last) == [1, 2, 3]
    # The update whose checkpoint the kill came before is repeated on the same batch.
    assert [update["loss"] for update in run.updates()] == [pytest.approx(last[u["update"]]) for u in run.updates()]
    assert {version for _, version in run.replica.versions} == {0, 1, 2, 3}
    run.stop_peers()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the nodes had: the number of threads changes the order of sums
    monkeypatch.setenv("COLUMNS", "250")
    status = main(["reproduce", str(run.folder.root)])
    assert status == 0, capsys.readouterr().out
