"""Which role runs on which GPU, as the configuration says. Pure; knows numbers and the environment's variable for them.

Each role sees its own GPUs and no others, so within a role they are numbered from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def of_replica(config: RunConfig, index: int) -> Sequence[int]:
    """GPUs of replica number `index`; none: whatever it sees."""
    num = config.inference.num_workers
    return config.inference.devices[index * num : (index + 1) * num]


def visible(devices: Sequence[int], environment: Mapping[str, str]) -> dict[str, str]:
    """What makes a process see these GPUs only, numbered among those that this process may see itself."""
    if not devices:
        return {}
    mine = environment.get(VARIABLE, "")
    names = [name.strip() for name in mine.split(",")] if mine else [str(number) for number in range(max(devices) + 1)]
    return {VARIABLE: ",".join(names[device] for device in devices)}


def contradictions(config: RunConfig) -> Iterator[str]:
    """What cannot be, whatever the machine has."""
    learner, inference = config.learner, config.inference
    if learner.devices and len(learner.devices) != learner.num_processes:
        yield f"learner.devices names {len(learner.devices)} GPUs, and learner.num_processes = {learner.num_processes}"
    num_workers = inference.num_replicas * inference.num_workers
    if inference.devices and len(inference.devices) != num_workers:
        yield (
            f"inference.devices names {len(inference.devices)} GPUs, and inference.num_replicas = "
            f"{inference.num_replicas} take {num_workers}"
        )
    for key, devices in (("learner.devices", learner.devices), ("inference.devices", inference.devices)):
        if len(set(devices)) < len(devices):
            yield f"{key} = {list(devices)} names a GPU twice"
    shared = sorted(set(learner.devices) & set(inference.devices))
    if shared and inference.weight_transfer not in ("auto", "ipc"):
        yield (
            f"learner.devices and inference.devices share GPU {shared[0]}, and "
            f'inference.weight_transfer = "{inference.weight_transfer}", where a shared GPU takes "ipc"'
        )
    if shared and inference.kv_cache_bytes is None:
        yield (
            f"learner.devices and inference.devices share GPU {shared[0]}, and inference.kv_cache_bytes is not set: "
            "what is left for a KV cache changes while both start"
        )
    if (
        inference.weight_transfer == "ipc"
        and learner.devices
        and any(d != learner.devices[0] for d in inference.devices)
    ):
        yield (
            f'inference.weight_transfer = "ipc" has all replicas on GPU {learner.devices[0]}, the first of '
            f"learner.devices, and inference.devices = {list(inference.devices)}"
        )


def refuse_missing(config: RunConfig, num_gpus: int) -> None:
    """Raise UserError unless this machine has every GPU that is named, and one where weights need one."""
    for key, devices in (("learner.devices", config.learner.devices), ("inference.devices", config.inference.devices)):
        if devices and max(devices) >= num_gpus:
            raise UserError(f"{key} = {list(devices)}, and this machine has {_count(num_gpus)}", f"change {key}")
    transfer = config.inference.weight_transfer
    if transfer in ("ipc", "nccl") and num_gpus < (1 if transfer == "ipc" else 2):
        raise UserError(
            f'inference.weight_transfer = "{transfer}", and this machine has {_count(num_gpus)}',
            'set inference.weight_transfer = "auto"',
        )


def num_gpus(config: RunConfig) -> int:
    """How many GPUs a run takes: those that are named, else one for each process of the roles that use them.

    A role that computes in float32 does so without a GPU.
    """
    learner, inference = config.learner, config.inference
    if learner.devices and inference.devices:
        return len({*learner.devices, *inference.devices})
    learning = learner.num_processes if learner.dtype != "float32" else 0
    acting = inference.num_replicas * inference.num_workers if inference.dtype != "float32" else 0
    return learning + acting


def are_named(config: RunConfig) -> bool:
    """Whether the configuration says anything of GPUs that a machine can lack."""
    asks = config.inference.weight_transfer in ("ipc", "nccl")
    return bool(config.learner.devices or config.inference.devices or asks)


def _count(num_gpus: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(num_gpus, f"{num_gpus} GPUs")
