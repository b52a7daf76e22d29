"""Memory of one GPU, by part: the learner's under ZeRO, and a replica's. Pure arithmetic over a shape and a row.

Mixed precision as DeepSpeed has it: weights and gradients in two bytes, master weights and AdamW's two moments in
float32. Activations assume fused attention, which keeps no matrix of scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from deskrl.core.config import RunConfig
from deskrl.core.explain.batches import Rows
from deskrl.core.explain.shape import ModelShape

_OPTIMIZER_BYTES = 12
"""Master weight and two moments, four bytes each."""
_BLOCK_WIDTHS = 10
"""Numbers a token of a layer keeps for the backward pass, in hidden widths: norms, projections, residuals."""
_LOGIT_COPIES = 3
"""Float32 logits, their logprobs and the gradient."""


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes on one GPU of the learner."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class ReplicaMemory:
    """Bytes on one GPU of a replica."""

    weights: int
    kv_cache: int | None
    """None: what the share of the GPU leaves, and the GPU's size is not known."""
    kv_tokens: int | None
    """What the cache holds, over all GPUs of the replica."""


def learner_memory(config: RunConfig, shape: ModelShape, rows: Rows, *, checkpointing: bool = False) -> LearnerMemory:
    """Of one rank, at its fullest: the backward pass of the longest micro-batch.

    Args:
        config: ranks, ZeRO stage, numeric type, frozen tower, size of a micro-batch.
        shape: of the model.
        rows: the longest of them is a micro-batch if it is longer than the budget.
        checkpointing: activations inside a layer are computed again in the backward pass.
    """
    learner = config.learner
    ranks, stage = learner.num_processes, learner.zero_stage
    width = 2 if learner.dtype == "bfloat16" else 4
    trained = shape.num_language_parameters if learner.freeze_vision else shape.num_parameters
    # In float32 the weights are the master weights.
    per_parameter = _OPTIMIZER_BYTES if width == 2 else _OPTIMIZER_BYTES - 4
    tokens = max(learner.micro_batch_tokens, rows.tokens_per_row)
    images = tokens // rows.tokens_per_row * rows.images_per_row
    targets = tokens // rows.tokens_per_row * rows.steps * rows.action_tokens
    return LearnerMemory(
        weights=width * shape.num_parameters // (ranks if stage == 3 else 1),
        gradients=width * trained // (ranks if stage >= 2 else 1),
        optimizer=per_parameter * trained // (ranks if stage >= 1 else 1),
        activations=_activations(
            shape, tokens, images * rows.patches_per_image, width, learner.freeze_vision, checkpointing
        ),
        logits=_LOGIT_COPIES * 4 * targets * shape.vocab,
    )


def replica_memory(config: RunConfig, shape: ModelShape, gpu_bytes: int | None) -> ReplicaMemory:
    """Of one GPU of a replica; `gpu_bytes` is its size."""
    inference = config.inference
    workers = int(inference.engine_args.get("tensor_parallel_size", 1))
    width = 4 if inference.dtype == "float32" else 2
    weights = width * shape.num_parameters // workers
    cache = inference.kv_cache_bytes
    if cache is None and gpu_bytes is not None:
        cache = max(0, int(gpu_bytes * inference.gpu_memory_fraction) - weights)
    per_token = shape.key_value_bytes_per_token * width // 2
    return ReplicaMemory(weights, cache, None if cache is None else cache * workers // per_token)


def _activations(
    shape: ModelShape, num_tokens: int, num_patches: int, width: int, freeze_vision: bool, checkpointing: bool
) -> int:
    """Kept between the forward and the backward pass of one micro-batch."""
    language = _layer_bytes(shape.hidden, shape.intermediate, shape.key_value_width, num_tokens, width)
    vision = _layer_bytes(shape.vision_hidden, shape.vision_intermediate, shape.vision_hidden, num_patches, width)
    between = width * shape.hidden * num_tokens
    between_vision = width * shape.vision_hidden * num_patches
    if not checkpointing:
        tower = vision if freeze_vision else shape.vision_layers * vision
        return shape.num_layers * language + tower
    # One tensor a layer stays, and one layer is there whole.
    tower = 0 if freeze_vision else shape.vision_layers * between_vision
    return shape.num_layers * between + tower + max(language, vision)


def _layer_bytes(hidden: int, intermediate: int, key_value_width: int, num_tokens: int, width: int) -> int:
    return width * num_tokens * (_BLOCK_WIDTHS * hidden + 4 * intermediate + 2 * key_value_width)
