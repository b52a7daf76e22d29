"""Memory of one GPU, by part: the learner's under ZeRO, and a replica's. Pure arithmetic over a shape and a row.

Counted is what stays while the longest micro-batch goes backward, which is when most is there. A layer keeps for its
backward pass: its input, the normed input, queries, keys, values and result of attention, the residual and the normed
residual (eight hidden widths), and four intermediate widths of its gated MLP. No scores and no masks are kept. Where
`learner.activations` keeps less, it is a layer's input, or that and its attention's result; the rest is there for one
layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from deskrl.core.config import LearnerConfig, RunConfig
from deskrl.core.explain.batches import Rows
from deskrl.core.explain.shape import ModelShape

_HIDDEN_KEPT, _INTERMEDIATE_KEPT = 8, 4
_HIDDEN_KEPT_ONLY = {"attention": 2, "layers": 1}
_LOGITS_AT_ONCE = 1024
"""Action tokens whose distribution is there in float32 at a time: logits, logprobs and gradient."""
_BUCKET_ELEMENTS = 250_000_000
"""Gradients on their way between ranks, or to the host."""
_LIVE_PARAMETERS = 1_000_000_000
"""What DeepSpeed gathers at most of parted weights."""


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


@dataclass(frozen=True)
class MicroBatch:
    """The longest forward and backward pass."""

    tokens: int
    patches: int
    """Of screenshots that the vision tower has to see."""
    targets: int
    """Action tokens."""


def longest_micro_batch(learner: LearnerConfig, rows: Rows) -> MicroBatch:
    """Rows of full length up to the budget; a longer one goes alone."""
    share = max(learner.micro_batch_tokens, rows.tokens_per_row) / rows.tokens_per_row
    return MicroBatch(
        tokens=round(share * rows.tokens_per_row),
        patches=round(share * rows.images_per_row * rows.patches_per_image),
        targets=round(share * min(rows.steps, rows.images_per_row) * rows.action_tokens),
    )


def learner_memory(config: RunConfig, shape: ModelShape, rows: Rows) -> LearnerMemory:
    """Of one rank, in the backward pass of the longest micro-batch."""
    learner = config.learner
    ranks, stage = learner.num_processes, learner.zero_stage
    width = bytes_per_number(learner.dtype)
    trained = shape.num_language_parameters if learner.freeze_vision else shape.num_parameters
    micro = longest_micro_batch(learner, rows)
    # ZeRO keeps master weights of its own, in float32 too; two moments beside them.
    states = 8 if stage == 0 and width == 4 else 12
    optimizer = states * trained // (ranks if stage >= 1 else 1)
    weights = width * shape.num_parameters
    if stage == 3:
        weights = weights // ranks + width * min(_LIVE_PARAMETERS, shape.num_parameters)
    # Whole ones add up in the type of the forward pass, parted ones in float32.
    gradients = 4 * trained // ranks + width * min(_BUCKET_ELEMENTS, trained) if stage >= 2 else width * trained
    if stage >= 2 and learner.offload_optimizer:
        gradients = width * min(_BUCKET_ELEMENTS, trained)
    at_once = min(_LOGITS_AT_ONCE, micro.targets)
    return LearnerMemory(
        weights=weights,
        gradients=gradients,
        optimizer=0 if learner.offload_optimizer else optimizer,
        activations=activation_bytes(learner, shape, micro),
        logits=(2 * width * micro.targets + 3 * 4 * at_once) * shape.vocab,
    )


def activation_bytes(learner: LearnerConfig, shape: ModelShape, micro: MicroBatch) -> int:
    """What language model and vision tower keep of a micro-batch, and what one layer needs to go backward."""
    width = bytes_per_number(learner.dtype)
    language = width * micro.tokens * (_HIDDEN_KEPT * shape.hidden + _INTERMEDIATE_KEPT * shape.intermediate)
    inner = _INTERMEDIATE_KEPT if shape.vision_gated else _INTERMEDIATE_KEPT // 2
    vision = width * micro.patches * (_HIDDEN_KEPT * shape.vision_hidden + inner * shape.vision_intermediate)
    # Gradients of the widest layer's MLP while it goes backward, and a frozen tower's layer, of which nothing stays.
    backward = width * micro.tokens * (3 * shape.intermediate + 2 * shape.hidden)
    language_kept, vision_kept = language, vision
    if learner.activations != "all":
        num_hidden = _HIDDEN_KEPT_ONLY[learner.activations]
        language_kept = width * micro.tokens * num_hidden * shape.hidden
        vision_kept = width * micro.patches * num_hidden * shape.vision_hidden
        backward += language
    kept = shape.num_layers * language_kept + (0 if learner.freeze_vision else shape.vision_layers * vision_kept)
    return kept + max(backward, vision if learner.freeze_vision else 0)


def replica_memory(config: RunConfig, shape: ModelShape, gpu_bytes: int | None) -> ReplicaMemory:
    """Of one GPU of a replica; `gpu_bytes` is its size."""
    inference = config.inference
    width = bytes_per_number(inference.dtype)
    workers = inference.num_workers
    weights = served_weight_bytes(config, shape) // workers
    cache = inference.kv_cache_bytes
    if cache is None and gpu_bytes is not None:
        cache = max(0, int(gpu_bytes * inference.gpu_memory_fraction) - weights)
    per_token = width * shape.key_value_numbers_per_token
    tokens = None if cache is None else cache * workers // per_token
    return ReplicaMemory(weights, cache, tokens)


def served_weight_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Of all weights of a replica; in 4 bits, matrices of the language model's layers have a scale to every 32."""
    width = bytes_per_number(config.inference.dtype)
    if config.inference.quantization is None:
        return width * shape.num_parameters
    matrices = shape.num_layers * shape.layer_matrices
    return width * (shape.num_parameters - matrices) + matrices // 2 + width * matrices // 32


def bytes_per_number(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype == "float32" else 2
