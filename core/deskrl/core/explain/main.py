"""All that `deskrl explain` tells of a run, put together. Starts nothing.

Knows the order of things; the numbers come from pure functions beside it, and the layout from `show`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from deskrl.core.arpo.translate import Note
from deskrl.core.config import RunConfig
from deskrl.core.explain.batches import Batches, Rows, count_batches, count_rows, usual_rows
from deskrl.core.explain.differences import differences
from deskrl.core.explain.explanation import Explanation
from deskrl.core.explain.facts import gather, sizing_of_screens
from deskrl.core.explain.fitting import refuse_what_does_not_fit
from deskrl.core.explain.memory import LearnerMemory, ReplicaMemory, learner_memory, replica_memory
from deskrl.core.explain.show import show
from deskrl.core.explain.storage import checkpoint_bytes
from deskrl.core.explain.timing import Assumptions, Timing, least_staleness, predict
from deskrl.core.explain.whole import add_up
from deskrl.core.running.preflight import refuse_contradictions

_NOTABLE_SHARE = 0.15


def explain(config: RunConfig, notes: Sequence[Note], assumed: Assumptions, *, as_document: bool) -> int:
    """Print the explanation; the exit status.

    Args:
        config: of the run.
        notes: what became of ARPO's keys.
        assumed: what predictions rest on.
        as_document: print one JSON document.

    Raises:
        UserError: the configuration contradicts itself.
    """
    explanation = explain_run(config, notes, assumed)
    if as_document:
        print(json.dumps(asdict(explanation), indent=2, default=str))
        return 0
    show(explanation, config)
    return 0


def explain_run(config: RunConfig, notes: Sequence[Note], assumed: Assumptions) -> Explanation:
    """Everything that is told; raises UserError for a contradiction."""
    refuse_contradictions(config)
    facts = gather(config)
    size, patches, tokens = sizing_of_screens(config, facts.sizing)
    refuse_what_does_not_fit(config, tokens)
    action_tokens = min(assumed.action_tokens, config.inference.max_action_tokens)
    batches = count_batches(config, facts.num_tasks)
    rows_of = partial(count_rows, config, size, patches, tokens, facts.prompt_tokens, action_tokens)
    rows = rows_of()
    usual = [(1.0, rows)] if assumed.steps is None else usual_rows(rows_of, assumed.steps)
    shape = facts.shape
    learner = replica = None
    if shape is not None:
        learner = learner_memory(config, shape, rows)
        replica = replica_memory(config, shape, int(assumed.gpu_memory_gib * 1024**3))
    timing = predict(config, batches, usual, shape, assumed)
    remarks = [*facts.remarks, *_remarks(config, batches, rows, replica, timing)]
    if learner is not None and replica is not None:
        remarks += _remarks_on_memory(config, learner, replica, assumed.gpu_memory_gib)
    return Explanation(
        name=config.name,
        preset=config.preset,
        model=facts.model,
        num_parameters=None if shape is None else shape.num_parameters,
        batches=batches,
        rows=rows,
        learner_memory=learner,
        replica_memory=replica,
        checkpoint_bytes=None if shape is None else checkpoint_bytes(config.learner, shape),
        timing=timing,
        whole=None if timing is None else add_up(config, batches, timing, assumed),
        max_staleness=config.learner.grpo.max_staleness,
        assumptions=assumed.model_dump(),
        differences=differences(config),
        arpo_keys=list(notes),
        remarks=remarks,
    )


def _remarks_on_memory(config: RunConfig, learner: LearnerMemory, replica: ReplicaMemory, gpu_gib: float) -> list[str]:
    """What does not fit on a GPU, alone or beside each other."""
    if config.learner.dtype == "float32":  # without a GPU
        return []
    needed = learner.total
    told = f"a rank of the learner needs about {needed / 1024**3:.0f} GiB"
    if set(config.learner.devices) & set(config.inference.devices):
        needed += replica.weights + (replica.kv_cache or 0)
        told += f", {needed / 1024**3:.0f} with the replica on the same GPU"
    limit = f"{gpu_gib:g} GiB are there (--gpu-memory-gib)"
    return [f"{told}, and {limit}"] if needed > gpu_gib * 1024**3 else []


def _remarks(
    config: RunConfig, batches: Batches, rows: Rows, replica: ReplicaMemory | None, timing: Timing | None
) -> list[str]:
    """What a person should know who reads the numbers."""
    remarks = []
    if rows.tokens_per_row > config.inference.max_model_len:
        remarks.append(
            f"an episode of full length comes to about {rows.tokens_per_row} tokens, more than "
            f"inference.max_model_len = {config.inference.max_model_len}: the longest would be faults"
        )
    if rows.tokens_per_row > config.learner.micro_batch_tokens:
        remarks.append(
            f"a row of {rows.tokens_per_row} tokens is longer than learner.micro_batch_tokens = "
            f"{config.learner.micro_batch_tokens}: it goes through the model alone, and memory is counted for it"
        )
    if timing is not None and timing.desktops_allowed < timing.desktops:
        remarks.append(
            f"pacing keeps {timing.desktops_allowed} of {timing.desktops} desktops busy: the others wait for updates "
            "(raise learner.grpo.max_staleness or groups_per_batch, or lower desktop.num_envs)"
        )
    if timing is not None and timing.gathering_s > _NOTABLE_SHARE * timing.learning_s:
        remarks.append(
            f"{timing.gathering_s:.1f} of the {timing.learning_s:.1f} s of learning move sharded weights: larger "
            "learner.micro_batch_tokens move them less often, and zero_stage 1 leaves them where they are"
        )
    staleness = config.learner.grpo.max_staleness
    if timing is not None and (enough := least_staleness(batches, timing)) < staleness:
        remarks.append(
            f"learning takes longer than acting, so episodes wait until they are {staleness} updates old: "
            f"learner.grpo.max_staleness = {enough} learns from fresher ones in the same time"
        )
    if replica is not None and replica.kv_tokens is not None:
        held = replica.kv_tokens * config.inference.num_replicas // max(1, rows.tokens_per_row)
        busy = config.desktop.num_envs if timing is None else timing.desktops_allowed
        if held < busy:
            remarks.append(f"the KV caches hold {held} prompts of full length, and {busy} desktops may ask at once")
    if batches.num_tasks and config.learner.grpo.groups_per_batch > batches.num_tasks:
        remarks.append("a batch is larger than the task list: a task comes up in it more than once")
    return remarks
