"""Records of updates, evaluations and weight updates, as they are written to metrics.jsonl and results/."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.group_outcome import is_success
from deskrl.core.latency_breakdown import percentiles_by_part
from deskrl.learner.advantages import has_reward_variance
from deskrl.learner.batch_builder import GroupBatch
from deskrl.learner.episode_types import TaskGroup, Trajectory
from deskrl.learner.group_filter import FilteredGroup
from deskrl.learner.grpo import learning_rate
from deskrl.learner.metrics.update_stats import UpdateReport
from deskrl.learner.weights.manifest import PublishOutcome
from deskrl.proto.v1 import replay_pb2


def count_successes(trajectories: Sequence[Trajectory], success_threshold: float) -> dict[str, dict[str, int]]:
    """Return the number of episodes and successes of each task: {task: {"n": …, "success": …}}."""
    counts: dict[str, dict[str, int]] = {}
    for trajectory in trajectories:
        count = counts.setdefault(trajectory.task_id, {"n": 0, "success": 0})
        count["n"] += 1
        count["success"] += is_success(trajectory.reward, success_threshold)
    return counts


def mean_reward_terms(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return the mean of each term of the reward over the episodes for which it was computed.

    Empty if the task's own evaluator is the only term. Episodes that were not evaluated have no terms.
    """
    names = dict.fromkeys(name for trajectory in trajectories for name in trajectory.reward_terms)
    return {
        name: fmean(trajectory.reward_terms[name] for trajectory in trajectories if name in trajectory.reward_terms)
        for name in names
    }


def update_record(
    batch: GroupBatch,
    report: UpdateReport | None,
    num_updates: int,
    config: RunConfig,
    num_tasks: int,
    status: replay_pb2.GetReplayStatusResponse | None,
) -> dict[str, Any]:
    """Return the record of an update.

    Args:
        batch: groups of the batch.
        report: statistics of the update; None if there was nothing to train on.
        num_updates: number of updates, this one included.
        config: run configuration.
        num_tasks: number of tasks in the task list.
        status: counters of the replay service; None on ranks other than 0.
    """
    grpo = config.learner.grpo
    episodes = batch.fresh_episodes
    threshold = config.replay.success_threshold
    per_task = count_successes(episodes, threshold)
    return {
        "update": num_updates,
        "epoch": num_updates * grpo.groups_per_batch // num_tasks,
        "version": num_updates,
        "loss": report.loss if report else 0.0,
        "policy_loss": report.policy_loss if report else 0.0,
        "gradient_norm": report.gradient_norm if report and report.applied else None,
        "applied": bool(report and report.applied),
        "learning_rate": learning_rate(grpo, num_updates - 1),
        # Over all fresh episodes, those of dropped groups included: the kept groups are a biased sample.
        "success_rate": _mean([is_success(episode.reward, threshold) for episode in episodes]),
        "average_reward": _mean([episode.reward for episode in episodes]),
        "reward_terms": mean_reward_terms(episodes),
        "num_episodes": len(episodes),
        "num_env_steps": sum(len(episode.steps) for episode in episodes),
        "per_task": per_task,
        "timings_ms": percentiles_by_part(step.timings_ms for episode in episodes for step in episode.steps),
        "dropped": batch.dropped,
        "groups": [
            _group_record(group, filtered) for group, filtered in zip(batch.groups, batch.filtered, strict=True)
        ],
        # Before stored successes replaced members: zero-variance groups among the fresh episodes.
        "without_spread": sum(
            not has_reward_variance([member.reward for member in group.members]) for group in batch.groups
        ),
        "replayed": sum(group.used_success for group in batch.kept),
        "num_trajectories": report.num_trajectories if report else 0,
        "num_rows": report.num_rows if report else 0,
        "num_tokens": report.num_tokens if report else 0,
        "staleness_mean": report.staleness_mean if report else None,
        "staleness_max": report.staleness_max if report else None,
        "clip_fraction": report.clip_fraction if report else None,
        "importance_mean": report.importance_mean if report else None,
        "loss_metrics": dict(report.loss_metrics) if report else {},
        "entropy": report.entropy if report else None,
        "kl": report.kl if report else None,
        "mismatch_mean": report.mismatch_mean if report else None,
        "mismatch_max": report.mismatch_max if report else None,
        "lagged_difference_mean": report.lagged_difference_mean if report else None,
        "replay_buffer_size": sum(success.num_stored for success in status.successes) if status else 0,
    }


def evaluation_record(
    groups: Sequence[TaskGroup],
    num_other_version: int,
    success_threshold: float,
    mismatch: tuple[float | None, float | None],
) -> dict[str, Any]:
    """Return the record of an evaluation.

    Args:
        groups: groups of the evaluation, with the episodes that count.
        num_other_version: number of episodes that do not count because another policy version acted in them.
        success_threshold: rewards above this are successes.
        mismatch: mean and maximum of |behaviour logprob - learner's logprob|.
    """
    episodes = [member for group in groups for member in group.members]
    counts = count_successes(episodes, success_threshold)
    return {
        "episodes": len(episodes),
        "successes": sum(count["success"] for count in counts.values()),
        "average_reward": _mean([episode.reward for episode in episodes]),
        "reward_terms": mean_reward_terms(episodes),
        "per_task": counts,
        "num_faulted": sum(group.num_faulted for group in groups),
        "num_other_version": num_other_version,
        "mismatch_mean": mismatch[0],
        "mismatch_max": mismatch[1],
    }


def weights_record(outcome: PublishOutcome) -> dict[str, Any]:
    """Return the record of a weight update of one replica."""
    return {
        "update": outcome.version.step,
        "version": outcome.version.step,
        "lineage": outcome.version.lineage,
        "replica": outcome.replica,
        "ok": outcome.ok,
        "error": outcome.error,
        "canary_max_difference": outcome.canary_max_difference,
        "transfer": outcome.transfer,
        "receive_ms": outcome.receive_ms,
        "total_ms": outcome.total_ms,
        "phases_ms": dict(outcome.phases_ms),
        "num_requests_kept": outcome.num_requests_kept,
        "late": outcome.late,
    }


def _group_record(group: TaskGroup, filtered: FilteredGroup) -> dict[str, Any]:
    """Return the rewards of a group's fresh episodes and the outcome of filtering it."""
    return {
        "task_id": group.task_id,
        "rewards": [member.reward for member in group.members],
        "dropped_because": filtered.dropped_because,
        "used_candidate": filtered.used_success,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
