"""Explanation of a run: predictions of all parts, put together with remarks on what they imply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from deskrl.analysis.explain.arpo_diff import ArpoDifference, diff_from_arpo
from deskrl.analysis.explain.cost import RunCost, estimate_run_cost
from deskrl.analysis.explain.update_time import (
    Assumptions,
    UpdateTiming,
    estimate_update_time,
    min_useful_staleness,
)
from deskrl.core.config import RunConfig
from deskrl.launch.arpo.translate import Note
from deskrl.launch.preflight import check_consistency
from deskrl.launch.sizing.batch_sizes import (
    BatchSizes,
    TrajectorySize,
    batch_sizes,
    check_limits,
    trajectory_mix,
    trajectory_size,
)
from deskrl.launch.sizing.footprint import (
    LearnerMemory,
    ReplicaMemory,
    checkpoint_bytes,
    learner_memory,
    replica_memory,
)
from deskrl.launch.sizing.inputs import read_inputs, screenshot_size
from deskrl.models.model_checks import check_model_not_quantized

_NOTABLE_SHARE = 0.15
"""Share of training time from which on moving sharded weights is worth a remark."""


@dataclass(frozen=True)
class Explanation:
    """All predictions for a run. Unknown values are None, and `remarks` says why."""

    name: str
    preset: str
    model: str
    num_parameters: int | None
    batches: BatchSizes
    rows: TrajectorySize
    """Size of a trajectory with the maximum number of steps."""
    learner_memory: LearnerMemory | None
    replica_memory: ReplicaMemory | None
    checkpoint_bytes: int | None
    timing: UpdateTiming | None
    whole: RunCost | None
    """Duration and cost of the whole run."""
    max_staleness: int
    assumptions: dict[str, Any]
    differences: list[ArpoDifference]
    arpo_keys: list[Note]
    remarks: list[str]


def build_explanation(config: RunConfig, notes: Sequence[Note], assumed: Assumptions) -> Explanation:
    """Compute the explanation of a run; arguments as in `main.explain`.

    Raises:
        UserError: the configuration contradicts itself, or the model cannot be trained.
    """
    check_model_not_quantized(config)
    check_consistency(config)
    inputs = read_inputs(config)
    size, patches, tokens = screenshot_size(config, inputs.model.image_sizing)
    check_limits(config, tokens)
    action_tokens = min(assumed.action_tokens, config.inference.max_action_tokens)
    batches = batch_sizes(config, inputs.num_tasks)
    size_of = partial(trajectory_size, config, size, patches, tokens, inputs.prompt_tokens, action_tokens)
    longest = size_of()
    mix = [(1.0, longest)] if assumed.steps is None else trajectory_mix(size_of, assumed.steps)
    shape = inputs.model.shape
    learner = replica = None
    if shape is not None:
        learner = learner_memory(config, shape, longest)
        replica = replica_memory(config, shape, int(assumed.gpu_memory_gib * 1024**3))
    timing = estimate_update_time(config, batches, mix, shape, assumed)
    remarks = [*inputs.remarks, *_length_remarks(config, longest), *_timing_remarks(config, batches, timing)]
    remarks += _regularisation_remarks(config)
    if learner is not None and replica is not None:
        remarks += _memory_remarks(config, learner, replica, assumed.gpu_memory_gib)
        remarks += _kv_cache_remarks(config, longest, replica, timing)
    return Explanation(
        name=config.name,
        preset=config.preset,
        model=inputs.model.name,
        num_parameters=None if shape is None else shape.num_parameters,
        batches=batches,
        rows=longest,
        learner_memory=learner,
        replica_memory=replica,
        checkpoint_bytes=None if shape is None else checkpoint_bytes(config.learner, shape),
        timing=timing,
        whole=None if timing is None else estimate_run_cost(config, batches, timing, assumed),
        max_staleness=config.learner.grpo.max_staleness,
        assumptions=assumed.model_dump(),
        differences=diff_from_arpo(config),
        arpo_keys=list(notes),
        remarks=remarks,
    )


def _length_remarks(config: RunConfig, longest: TrajectorySize) -> Iterator[str]:
    """Remarks on rows that exceed a limit of tokens."""
    if longest.tokens_per_row > config.inference.max_model_len:
        yield (
            f"an episode of maximum length has about {longest.tokens_per_row} tokens, more than "
            f"inference.max_model_len = {config.inference.max_model_len}: the longest episodes will end in faults"
        )
    if longest.tokens_per_row > config.learner.micro_batch_tokens:
        yield (
            f"a row of {longest.tokens_per_row} tokens is longer than learner.micro_batch_tokens = "
            f"{config.learner.micro_batch_tokens}: it is a micro-batch of its own, and the memory estimate is for it"
        )


def _timing_remarks(config: RunConfig, batches: BatchSizes, timing: UpdateTiming | None) -> Iterator[str]:
    """Remarks on what is slower or staler than it has to be."""
    if timing is not None and timing.desktops_allowed < timing.desktops:
        yield (
            f"the rate limiter keeps {timing.desktops_allowed} of {timing.desktops} desktops busy: the others wait for "
            "updates (raise learner.grpo.max_staleness or groups_per_batch, or lower desktop.num_envs)"
        )
    if timing is not None and timing.gathering_s > _NOTABLE_SHARE * timing.learning_s:
        yield (
            f"{timing.gathering_s:.1f} s of the {timing.learning_s:.1f} s of training move sharded weights: a larger "
            "learner.micro_batch_tokens moves them less often, and zero_stage 1 does not shard them"
        )
    staleness = config.learner.grpo.max_staleness
    if timing is not None and (enough := min_useful_staleness(batches, timing)) < staleness:
        yield (
            f"training takes longer than acting, so episodes wait until they are {staleness} updates old: "
            f"learner.grpo.max_staleness = {enough} trains on fresher ones in the same time"
        )
    if batches.num_tasks and config.learner.grpo.groups_per_batch > batches.num_tasks:
        yield "a batch has more groups than the task list has tasks: tasks occur in it more than once"


def _regularisation_remarks(config: RunConfig) -> Iterator[str]:
    """Remarks on a KL penalty that does not do what one would expect of it."""
    grpo = config.learner.grpo
    if grpo.kl_coefficient and (grpo.kl_applied_to, grpo.kl_estimator) == ("loss", "k1"):
        yield (
            "learner.grpo.kl_estimator = k1 in the loss does not pull the policy towards the reference, because its "
            "gradient does not depend on the reference: k2 and k3 do"
        )
    if grpo.kl_coefficient and config.learner.warm_start is not None:
        yield (
            "the reference policy is the model before the warm start, so the KL penalty works against the warm start: "
            "train the warm start in a run of its own, and set model.path to its checkpoint"
        )


def _memory_remarks(config: RunConfig, learner: LearnerMemory, replica: ReplicaMemory, gpu_gib: float) -> Iterator[str]:
    """Remark on a learner that does not fit on its GPU, by itself or together with a replica."""
    if config.learner.dtype == "float32":  # runs on the CPU
        return
    needed = learner.total
    needs = f"a rank of the learner needs about {needed / 1024**3:.0f} GiB"
    if set(config.learner.devices) & set(config.inference.devices):
        needed += replica.weights + (replica.kv_cache or 0)
        needs += f" ({needed / 1024**3:.0f} GiB together with the replica on the same GPU)"
    if needed > gpu_gib * 1024**3:
        yield f"{needs}, but a GPU has {gpu_gib:g} GiB (--gpu-memory-gib)"


def _kv_cache_remarks(
    config: RunConfig, longest: TrajectorySize, replica: ReplicaMemory, timing: UpdateTiming | None
) -> Iterator[str]:
    """Remark on KV caches that are too small for all desktops at once."""
    if replica.kv_tokens is None:
        return
    num_prompts = replica.kv_tokens * config.inference.num_replicas // max(1, longest.tokens_per_row)
    num_desktops = config.desktop.num_envs if timing is None else timing.desktops_allowed
    if num_prompts < num_desktops:
        yield f"the KV caches hold {num_prompts} prompts of maximum length, but {num_desktops} desktops may act at once"
