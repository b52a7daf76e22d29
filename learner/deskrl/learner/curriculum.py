"""Curriculum: which groups are planned, in which order and with which seeds.

A task sampler (see `task_samplers`) chooses the task of each training group. The replay service keeps the first plan of
each group, so planning it twice has no effect, and a resumed run continues with the plan it had.
"""

from __future__ import annotations

from collections.abc import Mapping

from deskrl.core import ids
from deskrl.core.config import RunConfig
from deskrl.learner.task_samplers import SamplerInputs, sample_task, select_task_sampler
from deskrl.proto.v1 import replay_pb2, rollout_pb2

TRAIN = "train"
DEMO = "demo"
HIGH_SUCCESS_RATE = 0.6
"""Success rate from which on a task gets fewer rollouts."""
MIN_MEMBERS = 2
"""Smallest size of a group."""


class Curriculum:
    """Makes the group plans of one run.

    Args:
        config: run configuration.
        tasks: content of the task file by task id, in the order of the task list.

    Raises:
        UserError: the configured task sampler cannot be selected.
    """

    def __init__(self, config: RunConfig, tasks: Mapping[str, bytes]) -> None:
        self._config = config
        self._tasks = tasks
        self._task_ids = tuple(tasks)
        self._sampler = select_task_sampler(config.tasks)

    @property
    def num_tasks(self) -> int:
        """Number of tasks in the task list."""
        return len(self._task_ids)

    def train_group(self, ordinal: int, success_rates: Mapping[str, float] | None = None) -> replay_pb2.GroupPlan:
        """Return one group of the training queue.

        Args:
            ordinal: index of the group in the queue, from 0.
            success_rates: latest success rate of each task that was played; they determine the size of a task's group
                if `learner.grpo.dynamic_rollouts` is set, and possibly the task.

        Raises:
            UserError: the task sampler chose a task that does not exist.
        """
        rates = dict(success_rates or {})
        task_id = sample_task(self._sampler, SamplerInputs(ordinal, self._config.seed, self._task_ids, rates))
        num_members = self._config.tasks.num_rollouts
        if self._config.learner.grpo.dynamic_rollouts and task_id in rates:
            num_members = num_rollouts_at(rates[task_id], num_members)
        return self._group(TRAIN, ordinal, task_id, num_members)

    def demo_groups(self) -> list[replay_pb2.GroupPlan]:
        """Return one group for each task, in which its scripted solution acts, if the warm start imitates them."""
        warm_start = self._config.learner.warm_start
        if warm_start is None or warm_start.demonstrations is not None:
            return []
        num_members = max(MIN_MEMBERS, warm_start.demos_per_task)
        scripted = rollout_pb2.ACTING_POLICY_SCRIPTED
        return [
            self._group(DEMO, ordinal, task_id, num_members, scripted) for ordinal, task_id in enumerate(self._task_ids)
        ]

    def eval_groups(self, when: str) -> list[replay_pb2.GroupPlan]:
        """Return the groups of an evaluation: equally many sampled episodes of each task, tasks taking turns."""
        per_task = -(-self._config.learner.eval.num_episodes // len(self._task_ids))
        sizes = split_evenly(max(MIN_MEMBERS, per_task), self._config.tasks.num_rollouts)
        groups = [(task_id, size) for size in sizes for task_id in self._task_ids]
        return [self._group(eval_queue(when), i, task_id, size) for i, (task_id, size) in enumerate(groups)]

    def _group(
        self,
        queue: str,
        ordinal: int,
        task_id: str,
        num_members: int,
        acting_policy: rollout_pb2.ActingPolicy = rollout_pb2.ACTING_POLICY_SAMPLED,
    ) -> replay_pb2.GroupPlan:
        group_id = ids.group_id(queue, ordinal)
        return replay_pb2.GroupPlan(
            group_id=group_id,
            queue=queue,
            task_id=task_id,
            task_json=self._tasks[task_id],
            seeds=[ids.derive_seed(self._config.seed, group_id, member) for member in range(num_members)],
            max_steps=self._config.tasks.max_steps,
            temperature=self._config.learner.grpo.temperature,
            acting_policy=acting_policy,
        )


def num_rollouts_at(rate: float, num_rollouts: int) -> int:
    """Return the number of rollouts for a task with this success rate: fewer for tasks that nearly always succeed.

        num_rollouts                        if rate < 0.6
        clip(9 / rate - 7, 2, num_rollouts)  otherwise, rounded down

    Source: dynamic rollout of DART.

    Args:
        rate: success rate of the task.
        num_rollouts: configured number of rollouts, at least 2.
    """
    if rate < HIGH_SUCCESS_RATE:
        return num_rollouts
    return min(num_rollouts, max(MIN_MEMBERS, int(9 / rate - 7)))


def eval_queue(when: str) -> str:
    """Return the name of the queue of an evaluation, which is `before` or `after` training."""
    return f"eval/{when}"


def split_evenly(total: int, largest: int) -> list[int]:
    """Split `total` into sizes of about `largest` that differ by at most one; none is below two unless `total` is."""
    num_parts = max(1, min(-(-total // largest), total // MIN_MEMBERS))
    quotient, remainder = divmod(total, num_parts)
    return [quotient + (part < remainder) for part in range(num_parts)]


def num_to_plan(num_in_progress: int, num_needed: int, groups_per_batch: int, max_staleness: int) -> int:
    """Return how many groups to plan now: max(0, min(num_needed, (S + 2) * groups_per_batch) - num_in_progress).

    The rate limiter admits at most S + 1 batches, and one more batch covers dropped groups, so actors never wait for
    the plan. No more groups are planned than the run needs, so the final evaluation does not wait for unused ones.

    Args:
        num_in_progress: planned groups that are neither taken nor closed.
        num_needed: groups that the rest of the run needs, this batch included.
        groups_per_batch: groups in a batch.
        max_staleness: maximum staleness S, in policy versions.
    """
    target = min(num_needed, (max_staleness + 2) * groups_per_batch)
    return max(0, target - num_in_progress)
