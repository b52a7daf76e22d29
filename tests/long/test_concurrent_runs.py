"""Two runs of one file on one machine: each has its own ports, and one resumes although its ports are taken."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deskrl.core.config import RunConfig, read_resolved
from deskrl.core.run_dir import RunDir
from deskrl.launch.preflight import endpoints

SIMULATED = Path(__file__).parents[2] / "deploy" / "runs" / "simulated.toml"
DEADLINE_S = 300.0


class Runs:
    """`deskrl up` of the same file under several names."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def folder(self, name: str) -> RunDir:
        return RunDir(self._root / name)

    def config(self, name: str) -> RunConfig:
        return read_resolved(self.folder(name).config)

    def start(self, name: str) -> None:
        command = [sys.executable, "-m", "deskrl.cli.main", "up", str(SIMULATED), "--name", name]
        command += [f"--runs={self._root}", "--learner.grpo.num_updates=200", "--desktop.num_envs=4"]
        self._processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait_for(self, name: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            process = self._processes[name]
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline, "the condition did not become true in time"
            time.sleep(0.2)

    def wait_for_updates(self, name: str, num: int) -> None:
        self.wait_for(name, lambda: sum(1 for _ in self.folder(name).read_metrics("update")) >= num)

    def stop(self, name: str) -> str:
        self._processes[name].terminate()
        output, _ = self._processes[name].communicate(timeout=120)
        assert self._processes[name].returncode == 130, output
        return output

    def close(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=120)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    started = Runs(tmp_path)
    yield started
    started.close()


def deskrl(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deskrl.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_two_runs_of_one_file_train_at_once_and_each_command_finds_its_own_run(runs: Runs) -> None:
    for name in ("a", "b"):
        runs.start(name)
    for name in ("a", "b"):
        runs.wait_for_updates(name, 1)
    ports = [endpoint.port for name in ("a", "b") for endpoint in endpoints(runs.config(name))]
    assert len(set(ports)) == len(ports)
    for name in ("a", "b"):
        shown = deskrl("status", runs.folder(name).root)
        assert shown.returncode == 0 and str(runs.config(name).replay.address) in shown.stdout, shown.stdout
        top = deskrl("top", runs.folder(name).root, "--interval", 1)
        assert top.returncode == 0 and "4 of 4 reachable" in top.stdout, top.stdout + top.stderr
    runs.stop("b")
    # Another process takes a port of b; a's server answers at the address that b's directory still names.
    address = runs.config("b").replay.address
    with socket.create_server((address.host, address.port)):
        runs.start("b")
        runs.wait_for("b", lambda: runs.config("b").replay.address != address)
        updates = sum(1 for _ in runs.folder("b").read_metrics("update"))
        runs.wait_for_updates("b", updates + 1)
    assert "resuming" in runs.stop("b")
    assert deskrl("report", runs.folder("b").root).returncode == 0
    values = json.loads(runs.folder("b").config.read_text())
    values["replay"]["address"] = str(runs.config("a").replay.address)
    values["inference"]["address"] = str(runs.config("a").inference.address)
    runs.folder("b").config.write_text(json.dumps(values))
    shown = deskrl("status", runs.folder("b").root)
    assert shown.returncode == 1 and shown.stdout.count("this server belongs to another run: a (") == 2
    for role in ("actor", "replay", "learner"):
        rejected = deskrl(role, runs.folder("b").config)
        assert rejected.returncode == 2, rejected.stderr
        last = rejected.stderr.splitlines()[-1]
        assert "belongs to another run: a (" in last or "cannot listen on" in last, last
