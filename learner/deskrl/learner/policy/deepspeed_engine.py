"""DeepSpeed engine: trains one policy over all ranks, and gathers, saves and restores its state.

Only this module and reference_policy.py import DeepSpeed.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import pad

from deskrl.core.config import LearnerConfig
from deskrl.core.weights.buckets import plan_buckets
from deskrl.learner.batches.collator import MicroBatch
from deskrl.learner.policy.lora import Adapter
from deskrl.learner.policy.pinned_copy import PinnedCopier
from deskrl.learner.policy.policy_model import Policy, Scores
from deskrl.learner.policy.resharding import Sharding, num_shards, write_resharded
from deskrl.learner.policy.state_dict_names import checkpoint_tensors, unsharded_shape

Gathered = TypeVar("Gathered")
_GROUP_ELEMENTS = 250_000_000
"""Size of an optimizer parameter group and of a gradient reduction bucket, in elements."""
_TAG = "engine"
"""Name of the folder that DeepSpeed creates for its files."""
_WRITING_TIMEOUT = timedelta(hours=2)
"""Limit on the time between the first and the last rank that finishes writing its part of a checkpoint."""


class StepOutcome(NamedTuple):
    """Outcome of an optimizer step."""

    applied: bool
    """Whether the weights changed; False if the gradient was not finite."""
    gradient_norm: float
    """Norm of the gradient over all ranks, before clipping; NaN if it was not finite."""


class DeepSpeedEngine:
    """Policy under DeepSpeed on this rank.

    Args:
        policy: policy with the same weights on every rank.
        config: learner configuration: ZeRO stage, offload, numeric type, gradient clipping.
    """

    def __init__(self, policy: Policy, config: LearnerConfig) -> None:
        import deepspeed
        import deepspeed.comm

        _set_single_rank_environment()
        # DeepSpeed's shared-memory collectives take most of a minute to compile; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(verbose=False)
        # PyTorch's AdamW instead of DeepSpeed's: it resumes with bit-equal results and needs no compilation.
        optimizer = torch.optim.AdamW(
            _parameter_groups(policy),
            lr=config.grpo.learning_rate,
            weight_decay=config.grpo.weight_decay,
            fused=True if torch.cuda.is_available() else None,
        )
        if config.zero_stage == 3 and policy.adapter is not None:
            # Such a layer reads the parameters of its modules itself, so that their own hooks do not gather them.
            for layer in policy.adapter.layers():
                for parameter in layer.parameters():
                    deepspeed.zero.register_external_parameter(layer, parameter)
        self._sharding = _sharding(optimizer, config.zero_stage)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=_deepspeed_config(config)
        )
        self._stage = config.zero_stage
        self.shards_parameters = config.zero_stage == 3
        """Whether each rank holds only a shard of each parameter (ZeRO 3)."""
        self.scales_loss = config.dtype == "float16"
        """Whether the loss is scaled; a step whose gradient overflows is then skipped and the scale lowered."""
        self.policy = policy
        self.device = torch.device(self._engine.device)
        self.rank: int = torch.distributed.get_rank()
        self.world_size: int = torch.distributed.get_world_size()
        self.num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        """Number of ranks on this machine."""
        self._num_micro_batches_left = 0
        self._writers = torch.distributed.new_group(backend="gloo", timeout=_WRITING_TIMEOUT)

    def set_optimizer(self, learning_rate: float, weight_decay: float) -> None:
        """Change the optimizer's settings from the next step on; its moments are kept."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = weight_decay

    def score(self, batch: MicroBatch, temperature: float, suppress: bool = True) -> Scores:
        """Return scores of the action tokens of a micro-batch, without gradient.

        Args:
            batch: one micro-batch, on any device.
            temperature: temperature of the sampling distribution; divides the logits.
            suppress: whether to mask the tokens that are never sampled.
        """
        with torch.no_grad():
            scores: Scores = self._engine(batch.to(self.device), temperature, suppress)
        return scores

    @contextmanager
    def accumulate_gradients(self, num_micro_batches: int) -> Iterator[None]:
        """Add up the gradients of the micro-batches that go through `forward` and `backward` within the context.

        Args:
            num_micro_batches: micro-batches of this rank until `step`; equally many on every rank, as each of them
                makes collective calls.
        """
        self._num_micro_batches_left = num_micro_batches
        with self._single_gradient_reduction():
            yield
        self._engine.set_gradient_accumulation_boundary(True)

    def forward(self, batch: MicroBatch, temperature: float, entropy_gradient: bool = False) -> Scores:
        """Return logprobs and entropies of the action tokens, with gradient; within `accumulate_gradients`.

        Args:
            batch: one micro-batch, on any device.
            temperature: temperature of the sampling distribution; divides the logits.
            entropy_gradient: whether the entropies carry a gradient too; otherwise only the logprobs do.
        """
        self._num_micro_batches_left -= 1
        self._engine.set_gradient_accumulation_boundary(self._num_micro_batches_left == 0)
        scores: Scores = self._engine(batch.to(self.device), temperature, entropy_gradient=entropy_gradient)
        return scores

    def backward(self, loss: Tensor) -> None:
        """Backpropagate this rank's part of the loss of the micro-batch that `forward` was called with."""
        # DeepSpeed averages gradients over ranks, whereas these losses are parts of one sum.
        self._engine.backward(loss * self.world_size)

    def step(self) -> StepOutcome:
        """Clip the accumulated gradient and take one optimizer step; a gradient that is not finite skips it."""
        if self._stage == 0:
            return self._step_without_zero()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        applied = not getattr(self._optimizer, "overflow", False)
        return StepOutcome(applied, norm if applied else float("nan"))

    def checkpoint_parameters(self) -> dict[str, Tensor]:
        """Return the live tensors by checkpoint name, in checkpoint order; under ZeRO 3 they are shards."""
        if self.shards_parameters:
            # After a forward pass without backward pass, prefetched parameters are in flight and cannot be gathered.
            self._optimizer.empty_partition_cache()
        return checkpoint_tensors(self.policy.model)

    @contextmanager
    def gathered(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Gather parameters on every rank while the context is open; a collective call under ZeRO 3.

        Its value are the whole parameters on rank 0, with the adapter merged into those that have one.
        """
        import deepspeed

        adapter = self.policy.adapter
        needed = [*parameters, *(adapter.needed_for(parameters) if adapter is not None else ())]
        with deepspeed.zero.GatheredParameters(needed, enabled=self.shards_parameters):
            if adapter is None or self.rank != 0:
                yield parameters
            else:
                yield list(map(adapter.merged, parameters))

    def _single_gradient_reduction(self) -> AbstractContextManager[None]:
        """Return the context of the backward passes: under ZeRO 1, ranks exchange gradients once, after the last one.

        ZeRO 1 keeps whole gradients, which add up in place; ZeRO 2 and 3 exchange them with every micro-batch.
        """
        once: AbstractContextManager[None] = self._engine.coalesce_grad_reduction()
        return once if self._stage == 1 else nullcontext()

    def weights(self, copier: PinnedCopier | None = None) -> dict[str, Tensor]:
        """Return copies of the model's tensors by checkpoint name, in host memory of rank 0; empty on other ranks.

        A collective call under ZeRO 3.

        Args:
            copier: copier whose memory holds the copies; None allocates new memory.
        """
        copier = copier or PinnedCopier()
        parameters = self.checkpoint_parameters()
        sizes_bytes = [math.prod(unsharded_shape(tensor)) * tensor.element_size() for tensor in parameters.values()]
        tensors, copies = list(parameters.values()), []
        for bucket in plan_buckets(sizes_bytes):
            portion = [tensors[piece.tensor] for piece in bucket.pieces]
            with self.gathered(portion) as whole:
                if self.rank == 0:
                    copies += copier.copy(whole)
        return dict(zip(parameters, copies, strict=True)) if self.rank == 0 else {}

    def trained_tensors(self, copier: PinnedCopier) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint on rank 0, by name: of the adapter if there is one, else of the model.

        Those of an adapter are copies of its master weights in float32; those of a model are live tensors, or copies if
        they are sharded. A collective call; empty on other ranks.

        Args:
            copier: copier whose memory holds the copies.
        """
        adapter = self.policy.adapter
        if adapter is None and self.shards_parameters:
            return self.weights(copier)
        if adapter is None:
            return self.checkpoint_parameters() if self.rank == 0 else {}
        from deepspeed.utils import safe_get_full_fp32_param

        masters = {name: safe_get_full_fp32_param(tensor) for name, tensor in adapter.tensors().items()}
        return masters if self.rank == 0 else {}

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the elementwise sum over all ranks."""
        return self._reduce(values, torch.distributed.ReduceOp.SUM)

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the elementwise maximum over all ranks."""
        return self._reduce(values, torch.distributed.ReduceOp.MAX)

    def broadcast_from_rank_0(self, value: str) -> str:
        """Return the value that rank 0 passes."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Gathered) -> list[Gathered]:
        """Return the values of all ranks on rank 0, and an empty list on the others."""
        boxes: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(value, boxes, dst=0)
        return boxes or []

    def barrier(self) -> None:
        """Wait for all ranks."""
        torch.distributed.barrier()

    def state_files(self, folder: Path) -> dict[Path, Any]:
        """Return the contents of this rank's state files by path, for `load` to restore; a collective call.

        Optimizer state and master weights are partitioned over ranks. The tensors are live ones. With an adapter,
        there is only the optimizer state, because the master weights are in the file of the adapter.

        Args:
            folder: folder that the files are to be written to.
        """
        writer = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = collector = _Collector(writer)
        has_adapter = self.policy.adapter is not None
        try:
            self._engine.save_checkpoint(
                str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=has_adapter
            )
        finally:
            self._engine.checkpoint_engine = writer
        if has_adapter:
            _drop_weights(collector.files.values())
        return collector.files

    def checkpoint_barrier(self) -> None:
        """Wait until every rank's checkpoint thread has called this; training on the ranks continues meanwhile."""
        torch.distributed.barrier(group=self._writers)

    def load(self, folder: Path) -> None:
        """Restore the state written from `state_files`, by any number of ranks; a collective call.

        Args:
            folder: folder of the state files.

        Raises:
            FileNotFoundError: the folder holds no engine state; DeepSpeed raises further errors for damaged files.
        """
        adapter = self.policy.adapter
        with self._own_shards(folder) as own:
            path, _ = self._engine.load_checkpoint(str(own), tag=_TAG, load_module_strict=adapter is None)
        if path is None:
            raise FileNotFoundError(f"{folder}: no engine state found")
        if adapter is not None:
            self._load_adapter(adapter, folder.parent)

    @contextmanager
    def _own_shards(self, folder: Path) -> Iterator[Path]:
        """Yield a folder with the state of as many ranks as there are now; a collective call."""
        if num_shards(folder / _TAG) in (0, self.world_size):
            yield folder
            return
        resharded = folder.parent.with_name(f".{folder.parent.name}.resharded.partial")
        if self.rank == 0:
            shutil.rmtree(resharded, ignore_errors=True)  # of a learner that was killed
            (resharded / _TAG).mkdir(parents=True)
        self.barrier()
        write_resharded(folder / _TAG, resharded / _TAG, self.rank, self.world_size, self._sharding)
        self.barrier()
        yield resharded
        self.barrier()
        if self.rank == 0:
            shutil.rmtree(resharded)

    def close(self) -> None:
        """Destroy the process group; otherwise ranks wait for one another at exit."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _load_adapter(self, adapter: Adapter, folder: Path) -> None:
        """Restore the master weights of the adapter, and the weights that follow from them."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for tensor, master in adapter.read(folder):
            if self.shards_parameters:
                # The last shard is padded, which DeepSpeed's function for a whole parameter does not do.
                shard_size = tensor.ds_tensor.numel()
                padded = pad(master.flatten(), (0, shard_size * self.world_size - master.numel()))
                safe_set_local_fp32_param(tensor, torch.split(padded, shard_size)[self.rank])
            else:
                safe_set_full_fp32_param(tensor, master)
            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=self.shards_parameters):
                tensor.data.copy_(master)

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, operation)
        return [float(value) for value in tensor.tolist()]

    def _step_without_zero(self) -> StepOutcome:
        """Take a step under ZeRO 0, where DeepSpeed neither checks nor reports the norm of the gradient."""
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self._engine.zero_grad()
            return StepOutcome(False, float("nan"))
        self._engine.step()
        return StepOutcome(True, norm)


class _Collector:
    """Checkpoint engine that collects the files DeepSpeed would write instead of writing them."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.files: dict[Path, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = state_dict


def _drop_weights(contents: Iterable[Any]) -> None:
    """Remove the model's weights and their master weights from the contents of DeepSpeed's files."""
    for content in contents:
        if "module" in content:
            content["module"] = {}
        for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):  # of ZeRO 1 and 2, and of ZeRO 3
            if key in content.get("optimizer_state_dict", {}):
                content["optimizer_state_dict"][key] = []


def _set_single_rank_environment() -> None:
    """Set torchrun's environment variables for a world of one rank if they are unset; DeepSpeed would look for MPI."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _parameter_groups(policy: Policy) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups; DeepSpeed's step copies the gradients of one group to float32."""
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


def _sharding(optimizer: torch.optim.Optimizer, zero_stage: int) -> Sharding:
    """Return how DeepSpeed will divide the optimizer's tensors; to be called before it divides the parameters."""
    groups = [[parameter.numel() for parameter in group["params"]] for group in optimizer.param_groups]
    return Sharding(groups, 1) if zero_stage == 3 else Sharding([[sum(sizes)] for sizes in groups], 2)


def _deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        # With unpartitioned gradients this would keep a second copy of all of them.
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
        # Dynamic loss scaling prevents underflow of small gradients; a step that overflows is skipped.
        "fp16": {"enabled": config.dtype == "float16"},
        # Partitioned gradients are small enough to be accumulated in float32.
        "data_types": {"grad_accum_dtype": "fp32" if config.zero_stage > 1 else None},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
