"""Slurm cluster of one node for tests: Debian's munged, slurmctld and slurmd, with all state in one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
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
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster whose node is configured with 64 processors; yield the environment for Slurm's commands."""
    folder.mkdir(mode=0o755)
    configuration = folder / "slurm.conf"
    configuration.write_text(_configuration(folder))
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
        ["slurmd", "-D", "-N", socket.gethostname()],
    ]
    with ExitStack() as stack, open(folder / "daemons.log", "wb") as log:
        for command in commands:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            if command[0] == "munged":
                _wait_for(paths["socket"].exists, process)
        _wait_for(lambda: "idle" in _states(environment), process)
        yield environment


def _configuration(folder: Path) -> str:
    host = socket.gethostname()
    settings = {
        "ClusterName": "deskrl",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmdPort": free_port(),
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge.socket'},cred_expire={_REQUEUE_DELAY_S}",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "SlurmdParameters": "config_overrides",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "sched_interval=1,batch_sched_delay=0",
        "NodeName": f"{host} CPUs=64 RealMemory=1000 State=UNKNOWN",
        "PartitionName": f"all Nodes={host} Default=YES MaxTime=INFINITE State=UP",
    }
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def _states(environment: dict[str, str]) -> str:
    result = subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True, env=environment)
    return result.stdout


def _wait_for(condition, process: subprocess.Popen[bytes]) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + _START_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, f"{process.args} did not start"
        time.sleep(0.05)
