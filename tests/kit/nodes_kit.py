"""Nodes of a learner on two hosts (network namespaces), whose ranks only add up numbers with gloo."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import node_program
import torch
from hosts_kit import Host
from safetensors.torch import save_file

from deskrl.core.config import RunConfig, dump_config
from deskrl.core.run_dir import RunDir

DEADLINE_S = 240.0


class Nodes:
    """Nodes on two hosts, which can be started repeatedly.

    Args:
        root: folder for configurations, logs and the run directory.
        hosts: both hosts.
        learner: keys of the section `learner`.
    """

    def __init__(self, root: Path, hosts: list[Host], **learner: Any) -> None:
        self._root, self.hosts = root, hosts
        nodes = {"num_nodes": 2, "master_addr": hosts[0].address, "master_port": 29500, "rendezvous_timeout_s": 120}
        self._config = RunConfig.model_validate({"runs": root, "learner": nodes | learner})
        RunDir(self._config.run_dir).create()
        self._config.model_folder.mkdir()
        save_file({"weight": torch.zeros(1)}, self._config.model_folder / "model.safetensors")
        self._lines = root / "lines"

    def start(self, rank: int, **learner: Any) -> subprocess.Popen[str]:
        """Start a node; keyword arguments override keys of the section `learner`."""
        path, values = self._root / f"node-{rank}.json", self._config.model_dump(mode="json")
        values["learner"] |= learner
        dump_config(RunConfig.model_validate(values), path)
        log = open(self._log_file(rank), "w")  # noqa: SIM115
        command = [sys.executable, node_program.__file__, str(path), str(rank), str(self._lines)]
        return self.hosts[rank].start(command, stderr=log)

    def log(self, rank: int) -> str:
        """Return what a node has logged since its last start."""
        return self._log_file(rank).read_text()

    def sums(self) -> list[str]:
        """Return the sums that the ranks have written."""
        return self._lines.read_text().split() if self._lines.exists() else []

    def await_sums(self) -> None:
        """Wait until the ranks have written more sums."""
        before, deadline_s = len(self.sums()), time.monotonic() + DEADLINE_S
        while len(self.sums()) < before + 4:
            assert time.monotonic() < deadline_s, self.log(0)[-2000:] + self.log(1)[-2000:]
            time.sleep(0.1)

    def finish(self, *nodes: subprocess.Popen[str]) -> list[int]:
        """End the sums and return the exit statuses of the nodes."""
        (self._root / "done").touch()
        return [node.wait(DEADLINE_S) for node in nodes]

    def _log_file(self, rank: int) -> Path:
        return self._root / f"node-{rank}.log"
