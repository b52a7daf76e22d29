"""Starts the roles of a run under a supervisor and waits until they serve."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch import gpu_assignment
from deskrl.launch.run_state import record_failure
from deskrl.launch.supervisor import USER_ERROR_STATUS, RoleFailed, Supervisor
from deskrl.proto.v1 import replay_pb2_grpc

INFERENCE_START_S = 300.0
_REPLAY_START_S = 30.0


def needs_model(config: RunConfig) -> bool:
    """Return whether the model that `model.build` names is missing or incomplete.

    A complete model has one weight file, or an index file, which is written after all shards.
    """
    weights = ("model.safetensors", "model.safetensors.index.json")
    return config.model.build is not None and not any((config.model_folder / name).exists() for name in weights)


def start_replicas(config: RunConfig, resolved: Path, supervisor: Supervisor) -> list[str]:
    """Start all inference replicas, each on its GPUs; returns their child names in order."""
    names = [f"inference-{index}" for index in range(config.inference.num_replicas)]
    for index, name in enumerate(names):
        start_replica(config, resolved, supervisor, index, name)
    return names


def start_replica(config: RunConfig, resolved: Path, supervisor: Supervisor, index: int, name: str) -> None:
    """Start inference replica number `index` as child `name`."""
    gpus = gpu_assignment.visible(gpu_assignment.of_replica(config, index), os.environ)
    supervisor.start(name, "inference", str(resolved), "--index", str(index), environment=gpus)


def start_actors(config: RunConfig, resolved: Path, supervisor: Supervisor) -> None:
    """Start the actor processes that `desktop.num_envs` desktops need."""
    for index in range(config.num_actors):
        supervisor.start(f"actor-{index}", "actor", str(resolved), "--index", str(index))


def start_replay(config: RunConfig, resolved: Path, supervisor: Supervisor) -> None:
    """Start the replay service and wait until it serves.

    Raises:
        RoleFailed: it exited or did not serve in time.
    """
    supervisor.start("replay", "replay", str(resolved))
    wait_healthy(config.replay.address, supervisor, "replay", _REPLAY_START_S)


def wait_healthy(address: str, supervisor: Supervisor, name: str, timeout_s: float) -> None:
    """Wait until a role's health service answers SERVING.

    Raises:
        RoleFailed: it exited or did not serve within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not rpc.check_health(address, timeout_s=1.0):
        status = supervisor.children[name].process.poll()
        if status is not None:
            raise RoleFailed(name, status, supervisor.last_line(name))
        if time.monotonic() > deadline:
            raise RoleFailed(name, -1, f"not serving within {timeout_s:.0f} s")
        time.sleep(0.05)


@contextmanager
def replay_stub(config: RunConfig) -> Iterator[replay_pb2_grpc.ReplayServiceStub]:
    """Yield a stub of the replay service."""
    with rpc.connect_sync(config.replay.address) as channel:
        yield replay_pb2_grpc.ReplayServiceStub(channel)


def report_role_failure(error: RoleFailed, folder: RunDir) -> int:
    """Print one line on standard error about a failed role and record it; returns the exit status of the command.

    An error that the role itself reported as bad input is passed on with its status.
    """
    with contextlib.suppress(OSError, UserError):  # the disk may be full
        record_failure(folder)
    if error.status == USER_ERROR_STATUS:
        print(f"deskrl: {error.name}: {error.last_line.removeprefix('deskrl: ')}", file=sys.stderr)
        return USER_ERROR_STATUS
    print(f"deskrl: {error} (hint: see {folder.logs / error.name}.log; the same command resumes)", file=sys.stderr)
    return 1
