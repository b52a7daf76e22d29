"""Roles of one machine, brought up by a supervisor and waited for; the one line that tells why one ended for good."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deskrl.core import devices, rpc
from deskrl.core.config import RunConfig, SecurityConfig
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.supervisor import USER_ERROR_STATUS, RoleFailed, Supervisor
from deskrl.proto.v1 import replay_pb2_grpc

INFERENCE_START_S = 300.0
_REPLAY_START_S = 30.0


def at_home(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The same run where its folder lies now, with servers on loopback."""
    replay, inference = config.replay, config.inference
    local = {"listen_host": None, "metrics_port": 0}
    return config.model_copy(
        update={
            "runs": folder.root.parent,
            "name": folder.root.name,
            "security": SecurityConfig(),
            "replay": replay.model_copy(update={"address": f"127.0.0.1:{replay.address.rpartition(':')[2]}", **local}),
            "inference": inference.model_copy(update={"address": "127.0.0.1:1", "num_replicas": 0, **local}),
        }
    )


def needs_model(config: RunConfig) -> bool:
    """Whether the model that the configuration asks for is still to be built, or to be built to its end.

    Its weights are whole as one file, or as several with the index, which is written last.
    """
    weights = ("model.safetensors", "model.safetensors.index.json")
    return config.model.build is not None and not any((config.model_folder / name).exists() for name in weights)


def start_replicas(config: RunConfig, resolved: Path, supervisor: Supervisor) -> list[str]:
    """Start the inference replicas, each on its GPUs; returns their names, in order."""
    names = [f"inference-{index}" for index in range(config.inference.num_replicas)]
    for index, name in enumerate(names):
        start_replica(config, resolved, supervisor, index, name)
    return names


def start_replica(config: RunConfig, resolved: Path, supervisor: Supervisor, index: int, name: str) -> None:
    """Start one replica of that number under a name."""
    gpus = devices.visible(devices.of_replica(config, index), os.environ)
    supervisor.start(name, "inference", str(resolved), "--index", str(index), environment=gpus)


def start_actors(config: RunConfig, resolved: Path, supervisor: Supervisor) -> None:
    """Start as many actors as the number of desktops asks for."""
    for index in range(config.num_actors):
        supervisor.start(f"actor-{index}", "actor", str(resolved), "--index", str(index))


def start_replay(config: RunConfig, resolved: Path, supervisor: Supervisor) -> None:
    """Start the replay service and wait until it serves; raises RoleFailed if it does not get there."""
    supervisor.start("replay", "replay", str(resolved))
    wait_healthy(config.replay.address, supervisor, "replay", _REPLAY_START_S)


def wait_healthy(address: str, supervisor: Supervisor, name: str, timeout_s: float) -> None:
    """Wait for a role to answer SERVING; raises RoleFailed if it ends, or does not get there in time."""
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
    """Calls of the replay service."""
    with rpc.connect_sync(config.replay.address) as channel:
        yield replay_pb2_grpc.ReplayServiceStub(channel)


def tell_failure(error: RoleFailed, folder: RunFolder) -> int:
    """One line on standard error for a role that ended for good; a role's own refusal is passed on, with its status."""
    if error.status == USER_ERROR_STATUS:
        print(f"deskrl: {error.name}: {error.last_line.removeprefix('deskrl: ')}", file=sys.stderr)
        return USER_ERROR_STATUS
    print(f"deskrl: {error}; see {folder.logs / error.name}.log, the same command resumes", file=sys.stderr)
    return 1
