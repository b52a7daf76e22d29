"""What deskrl puts into vLLM's worker processes: how new weights get in, and that none outlives the role.

vLLM imports this module there because the engine names `TransferExtension` as its worker extension. Importing it
registers the transfer engine and follows the role's process; nothing else imports it. The transfer engine takes
weights from a file or from a link to the learner's GPU, and knows nothing of gRPC, versions or caches.
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

from deskrl.core import lifetime
from deskrl.core.bounds import GaveUp
from deskrl.core.weights import direct
from deskrl.core.weights.buckets import Bucket, plan_buckets
from deskrl.core.weights.sums import BucketSums
from deskrl.inference import engine_mends as engine_mends  # mends as it is imported
from deskrl.inference.engine_settings import TRANSFER_BACKEND
from deskrl.inference.links import IpcLink, Link, NcclCommunicator, NcclLink
from deskrl.inference.placement import Placement, TensorShape, begin_reload, finish_reload, make_placement


@dataclass
class Init(WeightTransferInitInfo):  # type: ignore[misc]
    """The communicator to join: its id in hexadecimal digits."""

    communicator_id: str


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
    """All weights of the model's checkpoint, in a safetensors file or directly: one of the three."""

    path: str = ""
    socket_path: str = ""
    nccl: bool = False
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    bucket_bytes: int = 0


@dataclass(frozen=True)
class _Plan:
    """What follows from an announcement, and holds for all later ones that are like it."""

    tensors: tuple[TensorShape, ...]
    bucket_bytes: int
    buckets: tuple[Bucket, ...]
    placement: Placement
    sums: BucketSums


class CheckpointTransferEngine(WeightTransferEngine[Init, Update]):  # type: ignore[misc]
    """Loads a whole checkpoint at a time."""

    init_info_cls = Init
    update_info_cls = Update

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.received: dict[str, Any] = {}
        """Of the last direct update: `checksums` if all came, else `error` and how many buckets were `placed`."""
        self._communicator: NcclCommunicator | None = None
        self._slots: list[torch.Tensor] = []
        self._plan: _Plan | None = None

    def init_transfer_engine(self, init_info: Init) -> None:
        """Begin to join a new communicator, which takes the place of the last."""
        self.shutdown()
        rank = 1 + self.parallel_config.rank  # the learner's is 0
        world_size = 1 + self.parallel_config.world_size
        communicator_id = bytes.fromhex(init_info.communicator_id)
        self._communicator = NcclCommunicator(communicator_id, rank, world_size, self.device)

    def start_weight_update(self) -> None:
        """Whatever has to be made ready depends on how the weights come."""

    def receive_weights(self, update_info: Update) -> None:
        """Load every tensor; what goes wrong with a link is noted in `received`, and nothing is placed after that."""
        if update_info.path:
            self._load_file(update_info.path)
        elif update_info.nccl:
            self._receive(update_info, self._open_nccl)
        else:
            self._receive(update_info, lambda plan: self._open_ipc(update_info.socket_path, plan))

    def finish_weight_update(self) -> None:
        """All has been done as it came."""

    def shutdown(self) -> None:
        """Leave the communicator, if there is one."""
        if self._communicator is not None:
            self._communicator.abort()
            self._communicator = None

    @staticmethod
    def trainer_send_weights(iterator: object, trainer_args: object) -> None:
        """The trainer's half, which vLLM 0.26 wants declared: the learner has its own."""
        raise NotImplementedError

    def _load_file(self, path: str) -> None:
        from safetensors import safe_open

        begin_reload(self.model)
        with safe_open(path, framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        finish_reload(self.model, self.model_config)

    def _receive(self, update: Update, open_link: Callable[[_Plan], Link]) -> None:
        """Take bucket after bucket from a link into the model."""
        plan = self._plan_for(update)
        sums, num_placed = [], 0
        torch.accelerator.synchronize()  # what still samples under the old weights
        try:
            with contextlib.closing(open_link(plan)) as link:
                for index, bucket in enumerate(plan.buckets):
                    buffer = link.receive(index)
                    num_placed += 1
                    sums.append(plan.sums.of(index, buffer[: bucket.num_bytes].view(torch.int64)))
                    plan.placement.place(index, buffer)
                    link.release(index)
        except (GaveUp, OSError, ValueError, RuntimeError) as error:
            self.received = {"error": f"{type(error).__name__}: {error}", "placed": num_placed}
            if update.nccl:
                self.shutdown()
            return
        plan.placement.finish()
        self.received = {"checksums": torch.cat(sums).tolist(), "placed": num_placed}

    def _open_nccl(self, plan: _Plan) -> Link:
        if self._communicator is None:
            raise GaveUp("there is no communicator with the learner")
        size = max(bucket.num_bytes for bucket in plan.buckets)
        if not self._slots or self._slots[0].numel() < size:
            self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(direct.NUM_SLOTS)]
        return NcclLink(self._communicator, plan.buckets, self._slots)

    def _open_ipc(self, socket_path: str, plan: _Plan) -> Link:
        return IpcLink(socket_path, len(plan.buckets), self.device)

    def _plan_for(self, update: Update) -> _Plan:
        tensors = tuple(
            TensorShape(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update.names, update.dtypes, update.shapes, strict=True)
        )
        known = self._plan
        if known is not None and (known.tensors, known.bucket_bytes) == (tensors, update.bucket_bytes):
            return known
        sizes = [torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in tensors]
        buckets = plan_buckets(sizes, update.bucket_bytes)
        placement = make_placement(self.model, self.model_config, tensors, buckets)
        words = torch.empty(0, dtype=torch.int64, device=self.device)
        self._plan = _Plan(tensors, update.bucket_bytes, buckets, placement, BucketSums(buckets, words))
        return self._plan


class TransferExtension:
    """Mixed into vLLM's workers so that they import this module, and to answer what vLLM's interface does not ask."""

    weight_transfer_engine: CheckpointTransferEngine
    device: torch.device

    def deskrl_received(self) -> dict[str, Any]:
        """What became of the last direct update here."""
        return self.weight_transfer_engine.received

    def deskrl_gpu_uuid(self) -> str:
        """The GPU of this worker; empty: it has none."""
        if self.device.type != "cuda":
            return ""
        return str(torch.cuda.get_device_properties(self.device).uuid)


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, CheckpointTransferEngine)
# vLLM's processes would go on for ever if the role's were killed: its engine process waits for requests, not for us.
lifetime.die_with_parent()
