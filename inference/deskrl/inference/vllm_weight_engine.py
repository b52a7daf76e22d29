"""Weight transfer engine of vLLM's workers: loads a checkpoint from a file or directly from the learner's GPU.

vLLM imports this module in its workers with the worker extension. The import registers the transfer engine, applies
the patches of vLLM, and terminates the worker when the role ends. No module of the role's process imports it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from deskrl.core import process_lifecycle
from deskrl.core.timeouts import WaitFailed
from deskrl.core.weights import gpu_transfer
from deskrl.core.weights.buckets import Bucket, plan_buckets
from deskrl.core.weights.checksums import BucketChecksums
from deskrl.inference.engine_args import TRANSFER_BACKEND
from deskrl.inference.receiver_transports import IpcReceiver, NcclCommunicator, NcclReceiver, ReceiverTransport
from deskrl.inference.vllm_patches import apply_patches
from deskrl.inference.weight_loader import (
    BucketLoader,
    CheckpointTensor,
    begin_reload,
    finish_reload,
    make_bucket_loader,
)


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Communicator to join."""

    communicator_id: str
    """Unique id in hexadecimal digits."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Source of all weights of the model's checkpoint: exactly one of `path`, `socket_path` and `nccl` is set."""

    path: str = ""
    """Safetensors file."""
    socket_path: str = ""
    """Unix socket of the learner, for a transfer over CUDA IPC."""
    nccl: bool = False
    """Whether the weights are broadcast over the communicator."""
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    bucket_bytes: int = 0
    """Capacity of a bucket."""


@dataclass(frozen=True)
class _TransferPlan:
    """Everything that depends only on the announced tensors, and is reused for later updates with the same tensors."""

    tensors: tuple[CheckpointTensor, ...]
    bucket_bytes: int
    buckets: tuple[Bucket, ...]
    loader: BucketLoader
    checksums: BucketChecksums


class CheckpointTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Loads a complete checkpoint per update."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.result: dict[str, Any] = {}
        """Result of the last direct transfer: `num_loaded` buckets, and either `checksums` or the `error`."""
        self._communicator: NcclCommunicator | None = None
        self._slots: list[torch.Tensor] = []
        self._plan: _TransferPlan | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Start to join a new communicator, which replaces the previous one."""
        self.shutdown()
        rank = 1 + self.parallel_config.rank  # the learner has rank 0
        world_size = 1 + self.parallel_config.world_size
        communicator_id = bytes.fromhex(init_info.communicator_id)
        self._communicator = NcclCommunicator(communicator_id, rank, world_size, self.device)

    def start_weight_update(self) -> None:
        """Do nothing: the preparation depends on the source of the weights."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load all tensors; an error of a direct transfer ends the loading and is stored in `result`."""
        if update_info.path:
            self._load_file(update_info.path)
        elif update_info.nccl:
            self._receive(update_info, self._open_nccl)
        else:
            self._receive(update_info, lambda plan: self._open_ipc(update_info.socket_path, plan))

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` is complete in itself."""

    def shutdown(self) -> None:
        """Abort the communicator, if there is one."""
        if self._communicator is not None:
            self._communicator.abort()
            self._communicator = None

    @staticmethod
    def trainer_send_weights(iterator: object, trainer_args: object) -> None:
        """Required by the interface of vLLM 0.26; the learner implements the sender itself."""
        raise NotImplementedError

    def _load_file(self, path: str) -> None:
        from safetensors import safe_open

        begin_reload(self.model)
        with safe_open(path, framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        finish_reload(self.model, self.model_config)

    def _receive(self, update: UpdateInfo, open_transport: Callable[[_TransferPlan], ReceiverTransport]) -> None:
        """Load all buckets from a transport into the model."""
        plan = self._plan_for(update)
        checksums, num_loaded = [], 0
        torch.accelerator.synchronize()  # kernels that still sample with the old weights
        try:
            with contextlib.closing(open_transport(plan)) as transport:
                for index, bucket in enumerate(plan.buckets):
                    buffer = transport.receive(index)
                    num_loaded += 1
                    checksums.append(plan.checksums.compute(index, buffer[: bucket.num_bytes].view(torch.int64)))
                    plan.loader.load(index, buffer)
                    transport.release(index)
        except (WaitFailed, OSError, ValueError, RuntimeError) as error:
            self.result = {"error": f"{type(error).__name__}: {error}", "num_loaded": num_loaded}
            if update.nccl:
                self.shutdown()
            return
        plan.loader.finish()
        self.result = {"checksums": torch.cat(checksums).tolist(), "num_loaded": num_loaded}

    def _open_nccl(self, plan: _TransferPlan) -> ReceiverTransport:
        if self._communicator is None:
            raise WaitFailed("no communicator with the learner")
        size = max(bucket.num_bytes for bucket in plan.buckets)
        if not self._slots or self._slots[0].numel() < size:
            self._slots = [
                torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(gpu_transfer.NUM_SLOTS)
            ]
        return NcclReceiver(self._communicator, plan.buckets, self._slots)

    def _open_ipc(self, socket_path: str, plan: _TransferPlan) -> ReceiverTransport:
        return IpcReceiver(socket_path, len(plan.buckets), self.device)

    def _plan_for(self, update: UpdateInfo) -> _TransferPlan:
        tensors = tuple(
            CheckpointTensor(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update.names, update.dtypes, update.shapes, strict=True)
        )
        known = self._plan
        if known is not None and (known.tensors, known.bucket_bytes) == (tensors, update.bucket_bytes):
            return known
        sizes = [torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in tensors]
        buckets = plan_buckets(sizes, update.bucket_bytes)
        loader = make_bucket_loader(self.model, self.model_config, tensors, buckets)
        words = torch.empty(0, dtype=torch.int64, device=self.device)
        self._plan = _TransferPlan(tensors, update.bucket_bytes, buckets, loader, BucketChecksums(buckets, words))
        return self._plan


class WeightTransferExtension:
    """Mixin of vLLM's workers: makes them import this module, and answers queries about weight transfers."""

    weight_transfer_engine: CheckpointTransferEngine
    device: torch.device

    def deskrl_transfer_result(self) -> dict[str, Any]:
        """Return the result of the last direct transfer to this worker."""
        return self.weight_transfer_engine.result

    def deskrl_gpu_uuid(self) -> str:
        """Return the UUID of this worker's GPU; empty on a CPU."""
        if self.device.type != "cuda":
            return ""
        return str(torch.cuda.get_device_properties(self.device).uuid)


apply_patches()
WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, CheckpointTransferEngine)
# vLLM's engine process waits for requests only, and would outlive a role that is killed.
process_lifecycle.die_with_parent()
