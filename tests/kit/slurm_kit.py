"""Slurm cluster on this machine for tests: Debian's munged, slurmctld and slurmd, with all state in one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ports_kit import free_port

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
_START_S = 60.0
_REQUEUE_DELAY_S = 5
"""Time in seconds for which a requeued job waits before it starts again: the lifetime of its credentials."""


def slurm_unavailable_reason() -> str:
    """Return why Slurm cannot be started on this machine; empty if no obstacle is known."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "slurmd requires root" if os.geteuid() else ""


@contextmanager
def slurm(folder: Path, num_nodes: int = 1) -> Iterator[dict[str, str]]:
    """Start a cluster whose nodes are configured with 64 processors each; yield the environment for Slurm's commands.

    A single node has the name of this machine; several are called node-0, node-1 and so on.
    """
    folder.mkdir(mode=0o755)
    configuration = folder / "slurm.conf"
    nodes = [socket.gethostname()] if num_nodes == 1 else [f"node-{index}" for index in range(num_nodes)]
    configuration.write_text(_configuration(folder, nodes))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    paths = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    paths |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    environment["PATH"] += ":/usr/sbin"
    commands = [
        ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in paths.items())],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in nodes),
    ]
    with ExitStack() as stack, open(folder / "daemons.log", "wb") as log:
        for command in commands:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            if command[0] == "munged":
                _wait_for(paths["socket"].exists, process)
        _wait_for(lambda: _states(environment) == ["idle"] * num_nodes, process)
        yield environment


def _configuration(folder: Path, nodes: Sequence[str]) -> str:
    host = socket.gethostname()
    settings = {
        "ClusterName": "deskrl",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge.socket'},cred_expire={_REQUEUE_DELAY_S}",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "SlurmdParameters": "config_overrides",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "sched_interval=1,batch_sched_delay=0",
        "PartitionName": f"all Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP",
    }
    (folder / "state").mkdir()
    lines = [f"{name}={value}\n" for name, value in settings.items()]
    for node in nodes:
        (folder / f"spool-{node}").mkdir()
        lines.insert(0, f"NodeName={node} NodeHostname={host} Port={free_port()} CPUs=64 RealMemory=1000\n")
    return "".join(lines)


def _states(environment: dict[str, str]) -> list[str]:
    """Return the state of each node."""
    command = ["sinfo", "--noheader", "--Node", "--format=%t"]
    return subprocess.run(command, capture_output=True, text=True, env=environment).stdout.split()


def _wait_for(condition, process: subprocess.Popen[bytes]) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + _START_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, f"{process.args} did not start"
        time.sleep(0.05)
