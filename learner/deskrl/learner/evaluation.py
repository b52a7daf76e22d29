"""What an evaluation found, from its episodes. Pure; knows nothing of how they were played.

An evaluation is of one policy version. The learner waits while it is played, so that no other one should act; an
episode in which one did all the same, if for a single token, tells nothing of the policy and is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from deskrl.core.trajectory import Span
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.trajectories import TaskGroup, Trajectory

COMPARED_PER_GROUP = 1
"""Episodes of each group whose behaviour logprobs are compared with the learner's own."""


def count_successes(trajectories: Sequence[Trajectory], success_above: float) -> dict[str, dict[str, int]]:
    """Episodes and successes of each task: {task: {"n": …, "success": …}}."""
    counts: dict[str, dict[str, int]] = {}
    for trajectory in trajectories:
        count = counts.setdefault(trajectory.task_id, {"n": 0, "success": 0})
        count["n"] += 1
        count["success"] += trajectory.reward > success_above
    return counts


def of_one_version(groups: Sequence[TaskGroup], distance: Callable[[Span], int | None]) -> tuple[list[TaskGroup], int]:
    """The groups without those episodes in which another version than the evaluated one acted, and their number.

    Args:
        groups: all of them.
        distance: versions between a span's policy and the one that is evaluated; None: not even of its lineage.
    """

    def is_pinned(episode: Trajectory) -> bool:
        return all(distance(span) == 0 for step in episode.steps for span in step.spans)

    kept = [replace(group, members=tuple(filter(is_pinned, group.members))) for group in groups]
    return kept, sum(len(group.members) for group in groups) - sum(len(group.members) for group in kept)


def evaluation_record(
    groups: Sequence[TaskGroup],
    num_other_version: int,
    success_above: float,
    mismatch: tuple[float | None, float | None],
) -> dict[str, Any]:
    """One evaluation as it is kept.

    Args:
        groups: all of them, with the episodes that count.
        num_other_version: episodes that do not, because another version acted in them.
        success_above: rewards above this are successes.
        mismatch: mean and maximum of |behaviour logprob - the learner's|.
    """
    episodes = [member for group in groups for member in group.members]
    counts = count_successes(episodes, success_above)
    return {
        "episodes": len(episodes),
        "successes": sum(count["success"] for count in counts.values()),
        "average_reward": sum(episode.reward for episode in episodes) / len(episodes) if episodes else None,
        "per_task": counts,
        "num_faulted": sum(group.num_faulted for group in groups),
        "num_other_version": num_other_version,
        "mismatch_mean": mismatch[0],
        "mismatch_max": mismatch[1],
    }


def mismatch_rows(groups: Sequence[TaskGroup]) -> list[Row]:
    """Rows of the episodes that are compared with the learner's forward pass."""
    episodes = [member for group in groups for member in group.members[:COMPARED_PER_GROUP]]
    return [
        row
        for index, episode in enumerate(episodes)
        for row in pack(index, episode.steps, [[0] * len(step.action_ids) for step in episode.steps])
    ]
