"""The curriculum: which groups are planned, in which order, with which seeds. Pure: follows from the configuration.

An epoch is one pass over the task list in an order of its own. Because group n of a queue is always the same group,
planning it twice plans it once, and a resumed run goes on with the plan that it had.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from deskrl.core import ids
from deskrl.core.config import RunConfig
from deskrl.proto.v1 import replay_pb2, rollout_pb2

TRAIN = "train"
DEMO = "demo"
OFTEN_SOLVED = 0.6
MIN_MEMBERS = 2
"""Fewer make no group."""


class Curriculum:
    """Plans for one run.

    Args:
        config: of the run.
        tasks: task file of each task id, as bytes, in the order of the task list.
    """

    def __init__(self, config: RunConfig, tasks: Mapping[str, bytes]) -> None:
        self._config = config
        self._tasks = tasks
        self._task_ids = list(tasks)

    @property
    def num_tasks(self) -> int:
        """Length of the task list."""
        return len(self._task_ids)

    def train_group(self, ordinal: int, rates: Mapping[str, float] | None = None) -> replay_pb2.GroupPlan:
        """Group `ordinal` of the reinforcement-learning phase.

        Args:
            ordinal: counts all groups.
            rates: success rates of tasks when they were last played; unset: every group is of full size.
        """
        epoch, place = divmod(ordinal, len(self._task_ids))
        order = list(self._task_ids)
        random.Random(ids.derive_seed(self._config.seed, "epoch", epoch)).shuffle(order)
        task_id, num_members = order[place], self._config.tasks.rollouts
        if rates is not None and task_id in rates:
            num_members = rollouts_at(rates[task_id], num_members)
        return self._group(TRAIN, ordinal, task_id, num_members)

    def demo_groups(self) -> list[replay_pb2.GroupPlan]:
        """Demonstrations by the tasks' scripted solutions: one group for each task."""
        warm_start = self._config.learner.warm_start
        if warm_start is None:
            return []
        num_members = max(MIN_MEMBERS, warm_start.demos_per_task)
        scripted = rollout_pb2.ACTING_POLICY_SCRIPTED
        return [
            self._group(DEMO, ordinal, task_id, num_members, scripted) for ordinal, task_id in enumerate(self._task_ids)
        ]

    def eval_groups(self, when: str) -> list[replay_pb2.GroupPlan]:
        """Fresh sampled episodes, equally many of each task, at least as many as configured, tasks taking turns."""
        per_task = -(-self._config.learner.eval.episodes // len(self._task_ids))
        sizes = split_evenly(max(MIN_MEMBERS, per_task), self._config.tasks.rollouts)
        places = [(task_id, size) for size in sizes for task_id in self._task_ids]
        return [self._group(eval_queue(when), i, task_id, size) for i, (task_id, size) in enumerate(places)]

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


def rollouts_at(rate: float, rollouts: int) -> int:
    """Rollouts of a task with this success rate, DART's rule: fewer where nearly all of them succeed."""
    if rate < OFTEN_SOLVED:
        return rollouts
    return min(rollouts, max(MIN_MEMBERS, int(9 / rate - 7)))


def eval_queue(when: str) -> str:
    """Name of an evaluation's queue."""
    return f"eval/{when}"


def split_evenly(total: int, largest: int) -> list[int]:
    """Sizes that sum to `total`, differ by one at most and keep near `largest`; none below two if `total` is not."""
    num_parts = max(1, min(-(-total // largest), total // MIN_MEMBERS))
    quotient, remainder = divmod(total, num_parts)
    return [quotient + (part < remainder) for part in range(num_parts)]


def num_to_plan(num_on_their_way: int, num_still_needed: int, groups_per_batch: int, max_staleness: int) -> int:
    """How many groups to plan now.

    Enough that acting never waits for the plan (pacing grants at most S + 1 batches; one more covers groups without
    spread), and no more than the run still needs, so that the last evaluation waits for nothing.

    Args:
        num_on_their_way: planned, neither taken nor closed.
        num_still_needed: groups that the rest of the run will learn from, this batch included.
        groups_per_batch: that make a batch.
        max_staleness: S.
    """
    target = min(num_still_needed, (max_staleness + 2) * groups_per_batch)
    return max(0, target - num_on_their_way)
