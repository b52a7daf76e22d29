"""Evaluates the policy before and after training on fresh sampled episodes.

An evaluation concerns one policy version, as the learner does not train meanwhile. An episode in which another version
sampled even one token says nothing about the evaluated policy and is counted separately.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from deskrl.core.config import RunConfig
from deskrl.learner.batch_builder import collect_groups
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.checkpoint.checkpoint_commit import CheckpointCommitter
from deskrl.learner.components import Components
from deskrl.learner.curriculum import eval_queue
from deskrl.learner.episode_types import TaskGroup, Trajectory
from deskrl.learner.grpo import measure_mismatch
from deskrl.learner.metrics.metric_records import evaluation_record
from deskrl.learner.policy_versions import StalenessOf
from deskrl.proto.v1 import common_pb2

NUM_COMPARED_PER_GROUP = 1
"""Episodes of each group whose behaviour logprobs are compared with the learner's logprobs."""

_log = logging.getLogger(__name__)


class Evaluator:
    """Runs the evaluations of a training run on one rank.

    Args:
        config: run configuration.
        components: components of this rank.
        committer: waits for the checkpoint that a resumed learner would continue from.
    """

    def __init__(self, config: RunConfig, components: Components, committer: CheckpointCommitter) -> None:
        self._config = config
        self._components = components
        self._committer = committer

    def evaluate(self, when: str, version: common_pb2.PolicyVersion, staleness: StalenessOf) -> None:
        """Evaluate the published policy and write the result; an evaluation that is complete is not repeated.

        Args:
            when: `before` or `after` training.
            version: published policy version.
            staleness: staleness of a span's policy.
        """
        if self._config.learner.eval.num_episodes == 0:
            return
        queue = eval_queue(when)
        if when not in self._components.results.evaluations():
            self._run(when, queue, version.step, staleness)
        if self._components.is_rank_0:
            self._components.replay.commit(queue, queue, [], version)

    def _run(self, when: str, queue: str, version_step: int, staleness: StalenessOf) -> None:
        components = self._components
        components.metrics.write_phase(queue)
        plans = components.curriculum.eval_groups(when)
        collected = collect_groups(components.replay, queue, plans, components.is_rank_0, components.processor_hash)
        groups, num_other = exclude_other_versions(collected, staleness)
        if num_other:
            _log.error("%s: %d episodes do not count because another policy version acted in them", queue, num_other)
        temperature = self._config.learner.grpo.temperature
        mismatch = measure_mismatch(components.engine, components.loader, mismatch_rows(groups), temperature)
        record = evaluation_record(groups, num_other, self._config.replay.success_threshold, mismatch)
        # A learner that resumes must continue from the policy that was evaluated.
        self._committer.poll(wait=True)
        components.metrics.write_evaluation(when, version_step, record)


def exclude_other_versions(groups: Sequence[TaskGroup], staleness: StalenessOf) -> tuple[list[TaskGroup], int]:
    """Return the groups without episodes in which another policy version acted, and the number of these episodes.

    Args:
        groups: groups of the evaluation.
        staleness: staleness of a span's policy; 0 for the evaluated version.
    """

    def is_current(episode: Trajectory) -> bool:
        return all(staleness(span) == 0 for step in episode.steps for span in step.spans)

    kept = [replace(group, members=tuple(filter(is_current, group.members))) for group in groups]
    return kept, sum(len(group.members) for group in groups) - sum(len(group.members) for group in kept)


def mismatch_rows(groups: Sequence[TaskGroup]) -> list[Row]:
    """Return the rows of the episodes whose behaviour logprobs are compared with the learner's logprobs."""
    episodes = [member for group in groups for member in group.members[:NUM_COMPARED_PER_GROUP]]
    return [
        row
        for index, episode in enumerate(episodes)
        for row in pack(index, episode.steps, [[0] * len(step.action_ids) for step in episode.steps])
    ]
