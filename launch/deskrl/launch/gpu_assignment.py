"""Assignment of GPUs to roles, as pure functions of the configuration.

Each role sees only its own GPUs (CUDA_VISIBLE_DEVICES), numbered from 0 within the role.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def of_replica(config: RunConfig, index: int) -> Sequence[int]:
    """Return the GPUs of replica number `index`; empty: all that the process sees."""
    num = config.inference.num_workers
    return config.inference.devices[index * num : (index + 1) * num]


def visible(devices: Sequence[int], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that restrict a child to these GPUs, numbered among those visible here."""
    if not devices:
        return {}
    mine = environment.get(VARIABLE, "")
    names = [name.strip() for name in mine.split(",")] if mine else [str(number) for number in range(max(devices) + 1)]
    return {VARIABLE: ",".join(names[device] for device in devices)}


def contradictions(config: RunConfig) -> Iterator[str]:
    """Yield the contradictions between GPU settings that no machine can satisfy."""
    learner, inference = config.learner, config.inference
    if learner.devices and len(learner.devices) != learner.num_processes:
        yield f"learner.devices names {len(learner.devices)} GPUs, but learner.num_processes = {learner.num_processes}"
    num_workers = inference.num_replicas * inference.num_workers
    if inference.devices and len(inference.devices) != num_workers:
        yield (
            f"inference.devices names {len(inference.devices)} GPUs, but inference.num_replicas = "
            f"{inference.num_replicas} needs {num_workers}"
        )
    for key, devices in (("learner.devices", learner.devices), ("inference.devices", inference.devices)):
        if len(set(devices)) < len(devices):
            yield f"{key} = {list(devices)} names a GPU twice"
    shared = sorted(set(learner.devices) & set(inference.devices))
    if shared and inference.weight_transfer not in ("auto", "ipc"):
        yield (
            f"learner.devices and inference.devices share GPU {shared[0]}, which needs "
            f'inference.weight_transfer = "ipc" or "auto", not "{inference.weight_transfer}"'
        )
    if shared and inference.kv_cache_bytes is None:
        yield (
            f"learner.devices and inference.devices share GPU {shared[0]}, which needs inference.kv_cache_bytes: "
            "the free memory that would otherwise size the KV cache changes while both start"
        )
    if (
        inference.weight_transfer == "ipc"
        and learner.devices
        and any(d != learner.devices[0] for d in inference.devices)
    ):
        yield (
            f'inference.weight_transfer = "ipc" needs all replicas on GPU {learner.devices[0]}, the first of '
            f"learner.devices, but inference.devices = {list(inference.devices)}"
        )


def check_gpus_exist(config: RunConfig, num_gpus: int) -> None:
    """Check that this machine has all GPUs that the configuration names or that the weight transfer needs.

    Raises:
        UserError: a GPU is missing.
    """
    for key, devices in (("learner.devices", config.learner.devices), ("inference.devices", config.inference.devices)):
        if devices and max(devices) >= num_gpus:
            raise UserError(f"{key} = {list(devices)}, but this machine has {_count(num_gpus)}", f"change {key}")
    transfer = config.inference.weight_transfer
    if transfer in ("ipc", "nccl") and num_gpus < (1 if transfer == "ipc" else 2):
        raise UserError(
            f'inference.weight_transfer = "{transfer}", but this machine has {_count(num_gpus)}',
            'set inference.weight_transfer = "auto"',
        )


def num_gpus(config: RunConfig) -> int:
    """Return the number of GPUs that a run uses on all machines: one per process of learner and inference.

    On one machine, the two may share GPUs that the configuration names. A role with dtype float32 is assumed to run on
    the CPU.
    """
    learner, inference = config.learner, config.inference
    if learner.devices and inference.devices and learner.num_nodes == 1:
        return len({*learner.devices, *inference.devices})
    learning = learner.num_ranks if learner.dtype != "float32" else 0
    acting = inference.num_replicas * inference.num_workers if inference.dtype != "float32" else 0
    return learning + acting


def needs_gpus(config: RunConfig) -> bool:
    """Return whether the configuration names GPUs or a weight transfer between GPUs."""
    asks = config.inference.weight_transfer in ("ipc", "nccl")
    return bool(config.learner.devices or config.inference.devices or asks)


def _count(num_gpus: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(num_gpus, f"{num_gpus} GPUs")
