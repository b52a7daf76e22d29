"""Memory and disk footprint of a run: GPU memory of learner ranks and replicas by part, and size of checkpoints.

The learner's estimate is the peak: the backward pass of the longest micro-batch. A layer keeps these activations for
its backward pass: the inputs of its norms, the normed inputs of attention and MLP, queries, keys, values and attention
output, and four intermediate widths of its gated MLP. Keys and values are as wide as queries, because each is repeated
for its group of heads. Attention keeps neither scores nor masks. With `learner.activation_checkpointing` a layer keeps
its input (or that and the attention output), and the rest is recomputed for one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deskrl.core.config import LearnerConfig, RunConfig
from deskrl.launch.sizing.batch_sizes import TrajectorySize
from deskrl.launch.sizing.model_shape import ModelShape

_HIDDEN_KEPT, _INTERMEDIATE_KEPT = 8, 4
"""Hidden and intermediate widths that a layer of the vision tower keeps per patch if all activations are kept."""
_HIDDEN_KEPT_ONLY = {"selective": 2, "full": 1}
"""Hidden widths that a layer of the vision tower keeps per patch if the rest is recomputed, by
`learner.activation_checkpointing`."""
_LOGITS_CHUNK = 1024
"""Action tokens whose logits, logprobs and gradient exist in float32 at the same time."""
_BUCKET_ELEMENTS = 250_000_000
"""Elements in the gradient bucket that is reduced between ranks or copied to the host."""
_MAX_LIVE_PARAMETERS = 1_000_000_000
"""Maximum number of gathered parameters under ZeRO 3 (DeepSpeed's default `stage3_max_live_parameters`)."""
_CHECKPOINT_STATE_BYTES = 12
"""Checkpoint bytes per trained parameter: master weight and two moments, in float32."""


@dataclass(frozen=True)
class LearnerMemory:
    """Memory of one learner rank, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reference: int = 0
    """Weights of the reference policy; if they are offloaded, what they exceed activations and logits by, because they
    are needed at other times."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.reference


@dataclass(frozen=True)
class ReplicaMemory:
    """Memory of one replica worker, in bytes."""

    weights: int
    kv_cache: int | None
    """Size of the KV cache; None if it depends on the size of the GPU, which is unknown."""
    kv_tokens: int | None
    """Capacity of the KV cache over all workers of the replica, in tokens."""


@dataclass(frozen=True)
class MicroBatchSize:
    """Size of one forward and backward pass."""

    tokens: int
    patches: int
    """Vision tower patches of its screenshots."""
    targets: int
    """Action tokens, for which logits are computed."""


def longest_micro_batch(learner: LearnerConfig, trajectory: TrajectorySize) -> MicroBatchSize:
    """Return the longest micro-batch: the longest rows up to the token budget, or one row that exceeds it."""
    share = max(learner.micro_batch_tokens, trajectory.tokens_per_row) / trajectory.tokens_per_row
    return MicroBatchSize(
        tokens=round(share * trajectory.tokens_per_row),
        patches=round(share * trajectory.images_per_row * trajectory.patches_per_image),
        targets=round(share * min(trajectory.steps, trajectory.images_per_row) * trajectory.action_tokens),
    )


def learner_memory(config: RunConfig, shape: ModelShape, trajectory: TrajectorySize) -> LearnerMemory:
    """Estimate the memory of one learner rank in the backward pass of the longest micro-batch."""
    learner = config.learner
    ranks, stage = learner.num_ranks, learner.zero_stage
    width = bytes_per_element(learner.dtype)
    trained = num_trained_parameters(learner, shape)
    micro = longest_micro_batch(learner, trajectory)
    # ZeRO keeps its own float32 master weights, even of float32 weights, beside the two moments.
    states = 8 if stage == 0 and width == 4 else 12
    optimizer = states * trained // (ranks if stage >= 1 else 1)
    num_held = shape.num_parameters + (trained if learner.has_lora else 0)
    weights = width * num_held
    if stage == 3:
        weights = weights // ranks + width * min(_MAX_LIVE_PARAMETERS, num_held)
    # Unsharded gradients accumulate in the dtype of the forward pass, sharded ones in float32.
    gradients = 4 * trained // ranks + width * min(_BUCKET_ELEMENTS, trained) if stage >= 2 else width * trained
    if stage >= 2 and learner.offload_optimizer:
        gradients = width * min(_BUCKET_ELEMENTS, trained)
    chunk = min(_LOGITS_CHUNK, micro.targets)
    memory = LearnerMemory(
        weights=weights,
        gradients=gradients,
        optimizer=0 if learner.offload_optimizer else optimizer,
        activations=activation_bytes(learner, shape, micro),
        logits=(2 * width * micro.targets + 3 * 4 * chunk) * shape.vocab,
    )
    return replace(memory, reference=_reference_bytes(learner, shape, memory.activations + memory.logits))


def _reference_bytes(learner: LearnerConfig, shape: ModelShape, room: int) -> int:
    """Return the memory of the reference policy of a KL penalty; with LoRA it is the model without the adapter.

    Args:
        learner: learner configuration.
        shape: shape of the model.
        room: memory that is free while the reference scores tokens, in bytes; offloaded weights fit into it or not.
    """
    if not learner.grpo.kl_coefficient or learner.has_lora:
        return 0
    num_bytes = bytes_per_element(learner.dtype) * shape.num_parameters
    if learner.zero_stage == 3:
        return 0 if learner.offload_reference else num_bytes // learner.num_ranks
    return max(0, num_bytes - room) if learner.offload_reference else num_bytes


def num_trained_parameters(learner: LearnerConfig, shape: ModelShape) -> int:
    """Return the number of trained parameters: of adapters, or of the model without a frozen vision tower.

    Raises:
        UserError: no layer has the name of a target of LoRA.
    """
    if not learner.has_lora:
        return shape.num_language_parameters if learner.freeze_vision else shape.num_parameters
    from deskrl.learner.policy import lora  # loads the learner, which --help does not need

    adapted = lora.select_all(shape.language_matrices, shape.vision_matrices, learner.lora)
    return learner.lora.rank * sum(map(sum, adapted))


def activation_bytes(learner: LearnerConfig, shape: ModelShape, micro: MicroBatchSize) -> int:
    """Estimate the activations of a micro-batch: those kept, and the working set of one layer's backward pass."""
    width = bytes_per_element(learner.dtype)
    per_token = shape.norm_inputs + 2 * shape.hidden + 4 * shape.query_size + _INTERMEDIATE_KEPT * shape.intermediate
    language = width * micro.tokens * per_token
    inner = _INTERMEDIATE_KEPT if shape.vision_gated else _INTERMEDIATE_KEPT // 2
    vision = width * micro.patches * (_HIDDEN_KEPT * shape.vision_hidden + inner * shape.vision_intermediate)
    # The backward pass of an MLP needs its gradients. A frozen vision tower keeps nothing after each layer.
    backward = width * micro.tokens * (3 * shape.intermediate + 2 * shape.hidden)
    language_kept, vision_kept = language, vision
    if learner.activation_checkpointing != "off":
        num_hidden = _HIDDEN_KEPT_ONLY[learner.activation_checkpointing]
        attention_output = shape.query_size if learner.activation_checkpointing == "selective" else 0
        language_kept = width * micro.tokens * (shape.hidden + attention_output)
        vision_kept = width * micro.patches * num_hidden * shape.vision_hidden
        backward += language
    is_frozen = learner.has_frozen_vision
    kept = shape.num_layers * language_kept + (0 if is_frozen else shape.vision_layers * vision_kept)
    return kept + max(backward, vision if is_frozen else 0)


def replica_memory(config: RunConfig, shape: ModelShape, gpu_bytes: int | None) -> ReplicaMemory:
    """Estimate the memory of one replica worker; `gpu_bytes` is the size of its GPU, None if unknown."""
    inference = config.inference
    width = bytes_per_element(inference.dtype)
    workers = inference.num_workers
    weights = served_weight_bytes(config, shape) // workers
    cache = inference.kv_cache_bytes
    if cache is None and gpu_bytes is not None:
        cache = max(0, int(gpu_bytes * inference.gpu_memory_utilization) - weights)
    per_token = width * shape.kv_elements_per_token
    tokens = None if cache is None else cache * workers // per_token
    return ReplicaMemory(weights, cache, tokens)


def served_weight_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Return the size of a replica's weights; with int4, 32 elements of the language layers' matrices share a scale."""
    width = bytes_per_element(config.inference.dtype)
    if config.inference.quantization is None:
        return width * shape.num_parameters
    matrices = shape.num_layers * shape.layer_matrix_parameters
    return width * (shape.num_parameters - matrices) + matrices // 2 + width * matrices // 32


def bytes_per_element(dtype: str) -> int:
    """Return the size of one element of this dtype."""
    return 4 if dtype == "float32" else 2


def checkpoint_bytes(learner: LearnerConfig, shape: ModelShape) -> int:
    """Return the size of one checkpoint: the exported model, and the engine's weights and optimizer states.

    With LoRA, it is the adapter, exported as its master weights, and the optimizer states.
    """
    trained = num_trained_parameters(learner, shape)
    if learner.has_lora:
        return _CHECKPOINT_STATE_BYTES * trained
    return 2 * bytes_per_element(learner.dtype) * shape.num_parameters + _CHECKPOINT_STATE_BYTES * trained


def merged_bytes(learner: LearnerConfig, shape: ModelShape) -> int:
    """Return the size of the merged model by which the last adapter is verified; 0 if there is none."""
    is_needed = learner.has_lora and learner.verify_checkpoint
    return bytes_per_element(learner.dtype) * shape.num_parameters if is_needed else 0


def max_checkpoints(learner: LearnerConfig) -> int:
    """Return the maximum number of checkpoints on disk: those that are kept, and the one being written."""
    return learner.keep_checkpoints + 1
