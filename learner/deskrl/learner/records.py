"""What is written down of an update and of a weight update. Pure; knows the metrics' names, not the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.core.timings import spread_by_part
from deskrl.learner.advantages import has_spread
from deskrl.learner.evaluation import count_successes
from deskrl.learner.grpo import UpdateReport, learning_rate
from deskrl.learner.state import LearnerState, PendingCommit
from deskrl.learner.take import TakenBatch
from deskrl.learner.weights.announcements import Outcome
from deskrl.proto.v1 import replay_pb2


def update_record(
    batch: TakenBatch,
    report: UpdateReport | None,
    num_updates: int,
    config: RunConfig,
    num_tasks: int,
    status: replay_pb2.GetReplayStatusResponse | None,
) -> dict[str, Any]:
    """One update; of a batch that nothing was learnt from, what there is.

    Args:
        batch: as taken.
        report: of the optimizer step.
        num_updates: this one counted.
        config: of the run.
        num_tasks: length of the task list.
        status: replay's counters; None on ranks that write nothing.
    """
    grpo = config.learner.grpo
    members = batch.members
    per_task = count_successes(members, config.replay.success_above)
    return {
        "update": num_updates,
        "epoch": num_updates * grpo.groups_per_batch // num_tasks,
        "version": num_updates,
        "loss": report.loss if report else 0.0,
        "policy_loss": report.loss if report else 0.0,
        "gradient_norm": report.gradient_norm if report and report.applied else None,
        "applied": bool(report and report.applied),
        "learning_rate": learning_rate(grpo, num_updates - 1),
        # Over all fresh episodes of the batch, dropped groups too: what is kept is a biased sample.
        "success_rate": _mean([member.reward > config.replay.success_above for member in members]),
        "average_reward": _mean([member.reward for member in members]),
        "num_episodes": len(members),
        "num_env_steps": sum(len(member.steps) for member in members),
        "per_task": per_task,
        "timings_ms": spread_by_part(step.timings_ms for member in members for step in member.steps),
        "dropped": batch.dropped,
        # As they were played: a stored success that took a member's place hides none of them.
        "without_spread": sum(not has_spread([member.reward for member in group.members]) for group in batch.groups),
        "replayed": sum(selection.used_candidate for selection in batch.kept),
        "num_trajectories": report.num_trajectories if report else 0,
        "num_rows": report.num_rows if report else 0,
        "num_tokens": report.num_tokens if report else 0,
        "staleness_mean": report.staleness_mean if report else None,
        "staleness_max": report.staleness_max if report else None,
        "clip_fraction": report.clip_fraction if report else None,
        "importance_mean": report.importance_mean if report else None,
        "entropy": report.entropy if report else None,
        "mismatch_mean": report.mismatch_mean if report else None,
        "mismatch_max": report.mismatch_max if report else None,
        "lagged_difference_mean": report.lagged_difference_mean if report else None,
        "replay_buffer_size": sum(success.num_stored for success in status.successes) if status else 0,
    }


def weights_record(outcome: Outcome) -> dict[str, Any]:
    """One weight update of one replica."""
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


def pending_commit(queue: str, batch: TakenBatch) -> PendingCommit:
    """What replay is told of a batch once its checkpoint is on disk."""
    verdicts = [
        {
            "group_id": selection.group_id,
            "dropped_because": selection.dropped_because,
            "used_candidate": selection.used_candidate,
        }
        for selection in batch.selections
    ]
    return PendingCommit(queue, batch.batch_id, verdicts)


def add_counts(state: LearnerState, per_task: dict[str, dict[str, int]]) -> None:
    """Add an update's episodes to the totals of the run."""
    for task_id, count in per_task.items():
        total = state.per_task.setdefault(task_id, {"n": 0, "success": 0})
        for key, value in count.items():
            total[key] += value


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
