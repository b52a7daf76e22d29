"""DeepSpeed, wrapped: forward, update, gather, what to save, load. The only file that imports it.

Every rank is given the same micro-batches to choose its own from, so ranks always agree on how many there are. Knows
gradients and ranks; knows nothing of rewards or of where batches come from.
"""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
from torch import Tensor

from deskrl.core.config import LearnerConfig
from deskrl.core.weights.buckets import plan_buckets
from deskrl.learner.batches.batch import MicroBatch
from deskrl.learner.policy.checkpoint_names import checkpoint_tensors, whole_shape
from deskrl.learner.policy.host_copy import HostCopier
from deskrl.learner.policy.model import Policy, Scores

Gathered = TypeVar("Gathered")
_GROUP_ELEMENTS = 250_000_000
_WRITING_TIMEOUT = timedelta(hours=2)
"""Ranks may be done with their part of a checkpoint as far apart as this."""


class UpdateOutcome(NamedTuple):
    """What an optimizer step did."""

    applied: bool
    """False: the gradient was not finite, and nothing changed."""
    gradient_norm: float
    """Before clipping, over all ranks."""


class Engine:
    """One policy under DeepSpeed on this rank.

    Args:
        policy: the same on every rank.
        config: ZeRO stage, offload, numeric type, gradient clipping.
    """

    def __init__(self, policy: Policy, config: LearnerConfig) -> None:
        import deepspeed
        import deepspeed.comm

        _join_world()
        # Its shared-memory collectives would be compiled for most of a minute; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(verbose=False)
        # PyTorch's AdamW, not DeepSpeed's fused one: only this one resumes bit-equal, and nothing is to be compiled.
        optimizer = torch.optim.AdamW(
            _parameter_groups(policy),
            lr=config.grpo.learning_rate,
            weight_decay=config.grpo.weight_decay,
            fused=True if torch.cuda.is_available() else None,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=_deepspeed_config(config)
        )
        self._stage = config.zero_stage
        self.shards_parameters = config.zero_stage == 3
        """Whether a rank holds no more than its part of each parameter."""
        self.scales_loss = config.dtype == "float16"
        """Whether a gradient that is not finite may be the loss scale's doing, which is then lowered."""
        self.policy = policy
        self.device = torch.device(self._engine.device)
        self.rank: int = torch.distributed.get_rank()
        self.world_size: int = torch.distributed.get_world_size()
        self.num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        """Ranks on this machine."""
        self._writers = torch.distributed.new_group(backend="gloo", timeout=_WRITING_TIMEOUT)

    def set_optimizer(self, learning_rate: float, weight_decay: float) -> None:
        """The optimizer's settings from the next step on; its moments stay."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = weight_decay

    def score(self, batch: MicroBatch, temperature: float, suppress: bool = True) -> Scores:
        """A forward pass without gradient."""
        with torch.no_grad():
            scores: Scores = self._engine(batch.to(self.device), temperature, suppress)
        return scores

    def update(
        self,
        batches: Iterable[MicroBatch],
        num_batches: int,
        temperature: float,
        loss_of: Callable[[int, MicroBatch, Scores], Tensor],
    ) -> UpdateOutcome:
        """One optimizer step over micro-batches whose losses add up.

        Args:
            batches: this rank's, made as they are needed.
            num_batches: how many; the same on every rank.
            temperature: of the sampling distribution.
            loss_of: index, micro-batch and scores → this rank's part of the loss, already divided by its denominator.
        """
        with self._whole_gradients():
            for index, batch in enumerate(batches):
                self._engine.set_gradient_accumulation_boundary(index == num_batches - 1)
                batch = batch.to(self.device)
                loss = loss_of(index, batch, self._engine(batch, temperature))
                # DeepSpeed averages gradients over ranks; ours are parts of one sum.
                self._engine.backward(loss * self.world_size)
        self._engine.set_gradient_accumulation_boundary(True)
        if self._stage == 0:
            return self._step_without_zero()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        applied = not getattr(self._optimizer, "overflow", False)
        return UpdateOutcome(applied, norm if applied else float("nan"))

    def checkpoint_parameters(self) -> dict[str, Tensor]:
        """The model's live tensors by the names of its checkpoint, in its order; shards of them under ZeRO 3."""
        if self.shards_parameters:
            # A forward pass without a backward one leaves what it fetched ahead on its way, which cannot be gathered.
            self._optimizer.empty_partition_cache()
        return checkpoint_tensors(self.policy.model)

    def gathered(self, parameters: list[Tensor]) -> AbstractContextManager[Any]:
        """Makes parameters whole on every GPU for as long as the context lasts; a collective call under ZeRO 3."""
        import deepspeed

        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            parameters, enabled=self.shards_parameters
        )
        return context

    def _whole_gradients(self) -> AbstractContextManager[None]:
        """ZeRO 1 keeps gradients whole: they add up in place, and ranks exchange them once, at the end."""
        once: AbstractContextManager[None] = self._engine.coalesce_grad_reduction()
        return once if self._stage == 1 else nullcontext()

    def weights(self, copier: HostCopier | None = None) -> dict[str, Tensor]:
        """The model's tensors by the names of its checkpoint, copied to the CPU of rank 0; none on other ranks.

        A collective call under ZeRO 3.

        Args:
            copier: whose memory the copies are to be in; unset: new memory.
        """
        copier = copier or HostCopier()
        parameters = self.checkpoint_parameters()
        sizes_bytes = [math.prod(whole_shape(tensor)) * tensor.element_size() for tensor in parameters.values()]
        tensors, copies = list(parameters.values()), []
        for bucket in plan_buckets(sizes_bytes):
            portion = [tensors[piece.tensor] for piece in bucket.pieces]
            with self.gathered(portion):
                if self.rank == 0:
                    copies += copier.copy(portion)
        return dict(zip(parameters, copies, strict=True)) if self.rank == 0 else {}

    def model_tensors(self, copier: HostCopier) -> dict[str, Tensor]:
        """The model's tensors by the names of its checkpoint, on rank 0: the live ones, or copies of sharded ones.

        A collective call under ZeRO 3.

        Args:
            copier: whose memory copies are to be in.
        """
        if self.shards_parameters:
            return self.weights(copier)
        return self.checkpoint_parameters() if self.rank == 0 else {}

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element by element, over all ranks."""
        return self._reduce(values, torch.distributed.ReduceOp.SUM)

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element by element, over all ranks."""
        return self._reduce(values, torch.distributed.ReduceOp.MAX)

    def from_rank_0(self, value: str) -> str:
        """What rank 0 says."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Gathered) -> list[Gathered]:
        """What each rank says, on rank 0; nothing on the others."""
        boxes: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(value, boxes, dst=0)
        return boxes or []

    def barrier(self) -> None:
        """Wait for all ranks."""
        torch.distributed.barrier()

    def state_files(self, folder: Path) -> dict[Path, Any]:
        """What is to be written below a folder so that `load` restores it, by file; a collective call.

        Each rank has its part of optimizer and master weights; the tensors are the live ones.
        """
        writer = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = collector = _Collector(writer)
        try:
            self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)
        finally:
            self._engine.checkpoint_engine = writer
        return collector.files

    def meet_writers(self) -> None:
        """Wait for the thread of each rank that writes a checkpoint; it disturbs nothing that ranks do meanwhile."""
        torch.distributed.barrier(group=self._writers)

    def load(self, folder: Path) -> None:
        """What `state_files` told, by a world of the same size; raises what DeepSpeed raises if it cannot be read."""
        path, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise FileNotFoundError(f"{folder}: no engine state")

    def close(self) -> None:
        """Leave the world; without this, ranks wait for one another at exit."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, how)
        return [float(value) for value in tensor.tolist()]

    def _step_without_zero(self) -> UpdateOutcome:
        """DeepSpeed's plain optimizer neither looks at the gradient's norm nor tells it."""
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self._engine.zero_grad()
            return UpdateOutcome(False, float("nan"))
        self._engine.step()
        return UpdateOutcome(True, norm)


class _Collector:
    """In the place of DeepSpeed's writer of checkpoint files: keeps what it is given, and writes nothing."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.files: dict[Path, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = state_dict


def _join_world() -> None:
    """A single process is a world of one, without torchrun (DeepSpeed would look for MPI)."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _parameter_groups(policy: Policy) -> list[dict[str, Any]]:
    """What learns, in groups: DeepSpeed's step holds a copy of one group's gradients in float32 at a time."""
    groups: list[dict[str, Any]] = []
    room = 0
    for parameter in policy.parameters():
        if parameter.requires_grad:
            if not groups or parameter.numel() > room:
                groups.append({"params": []})
                room = _GROUP_ELEMENTS
            groups[-1]["params"].append(parameter)
            room -= parameter.numel()
    return groups


def _deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        # Beside whole gradients, a second copy of all of them.
        "contiguous_gradients": config.zero_stage > 1,
        "reduce_bucket_size": _GROUP_ELEMENTS,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grpo.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.dtype == "bfloat16", "check_grad_overflow": True},
        # Losses are scaled so that small gradients are no zeros; one step is skipped where the scale was too large.
        "fp16": {"enabled": config.dtype == "float16"},
        # Gradients that are parted over ranks are small enough to add up in float32.
        "data_types": {"grad_accum_dtype": "fp32" if config.zero_stage > 1 else None},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
