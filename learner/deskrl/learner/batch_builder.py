"""Builds training batches: takes groups until enough of them are kept, and plans the groups that follow.

The content of a batch depends only on the replay service's responses, which are the same for every rank and for every
repetition of a request, so a batch that is delivered again is built exactly as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from deskrl.core.config import RunConfig
from deskrl.learner.curriculum import TRAIN, Curriculum, num_to_plan
from deskrl.learner.episode_types import TaskGroup, Trajectory, decode_group
from deskrl.learner.group_filter import FilteredGroup, filter_group
from deskrl.learner.policy_versions import StalenessOf
from deskrl.learner.replay_client import ReplayClient
from deskrl.learner.train_state import PendingCommit, TrainState
from deskrl.proto.v1 import replay_pb2

MAX_GROUPS_FACTOR = 3
"""Cap on groups examined per batch, as a multiple of groups_per_batch; a batch that reaches it is smaller."""


@dataclass
class GroupBatch:
    """Groups of a batch, with the outcome of filtering."""

    batch_id: str
    groups: list[TaskGroup] = field(default_factory=list)
    """All groups that were examined."""
    filtered: list[FilteredGroup] = field(default_factory=list)
    """Outcome of filtering each of `groups`."""

    @property
    def kept(self) -> list[FilteredGroup]:
        """Groups to train on."""
        return [group for group in self.filtered if group.is_kept]

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped groups by cause."""
        return dict(Counter(group.dropped_because for group in self.filtered if not group.is_kept))

    @property
    def fresh_episodes(self) -> list[Trajectory]:
        """Members of all examined groups, dropped groups included and stored successes excluded."""
        return [member for group in self.groups for member in group.members]

    def pending_commit(self) -> PendingCommit:
        """Return the commit that the replay service gets once a checkpoint contains this batch."""
        verdicts = [
            {
                "group_id": group.group_id,
                "dropped_because": group.dropped_because,
                "used_candidate": group.used_success,
            }
            for group in self.filtered
        ]
        return PendingCommit(TRAIN, self.batch_id, verdicts)


class BatchBuilder:
    """Builds batches from the training queue.

    Args:
        config: run configuration.
        curriculum: provides the groups to plan.
        replay: client of the replay service.
        is_planner: whether this rank plans groups; true on exactly one rank.
        processor_hash: hash of the model's processor; episodes sampled with another processor are an error.
    """

    def __init__(
        self, config: RunConfig, curriculum: Curriculum, replay: ReplayClient, is_planner: bool, processor_hash: str
    ) -> None:
        self._config = config
        self._grpo = config.learner.grpo
        self._curriculum = curriculum
        self._replay = replay
        self._is_planner = is_planner
        self._processor_hash = processor_hash

    def build(self, state: TrainState, staleness: StalenessOf) -> GroupBatch:
        """Build the next batch; advances `state.num_planned` and `state.num_taken`.

        Args:
            state: training state.
            staleness: staleness of a span's policy.
        """
        batch = GroupBatch(batch_id=f"{TRAIN}/{state.num_updates + 1:06d}")
        size = self._grpo.groups_per_batch
        max_groups = MAX_GROUPS_FACTOR * size
        while len(batch.kept) < size and len(batch.groups) < max_groups:
            # All of these groups are needed even if each of them is kept, and all of them are planned by now.
            self._plan_ahead(state, len(batch.kept))
            num_taken = len(batch.groups)
            messages = self._replay.take_groups(
                TRAIN,
                batch.batch_id,
                range(num_taken, min(num_taken + size - len(batch.kept), max_groups)),
                dropped=lambda: [group.group_id for group in batch.filtered if not group.is_kept],
                while_waiting=lambda: self._plan_ahead(state, len(batch.kept)),
            )
            for message in messages:
                state.num_taken += 1
                group = decode_group(message)
                check_processor(group, self._processor_hash)
                batch.groups.append(group)
                threshold = self._config.replay.success_threshold
                batch.filtered.append(filter_group(group, staleness, threshold, self._grpo))
        return batch

    def _plan_ahead(self, state: TrainState, num_kept: int) -> None:
        """Plan as many groups as the actors need to stay busy."""
        if not self._is_planner:
            return
        size = self._grpo.groups_per_batch
        num_in_progress = state.num_planned - state.num_taken - self._replay.num_closed_train_groups()
        num_needed = (self._grpo.num_updates - state.num_updates) * size - num_kept
        num = num_to_plan(num_in_progress, num_needed, size, self._grpo.max_staleness)
        ordinals = range(state.num_planned, state.num_planned + num)
        rates = state.last_success_rates() if num else {}
        self._replay.plan([self._curriculum.train_group(ordinal, rates) for ordinal in ordinals])
        state.num_planned += num


def collect_groups(
    replay: ReplayClient, queue: str, plans: Sequence[replay_pb2.GroupPlan], is_planner: bool, processor_hash: str = ""
) -> list[TaskGroup]:
    """Plan groups on a queue of their own and wait for all of them.

    Args:
        replay: client of the replay service.
        queue: name of the queue, which is also the id of its only batch.
        plans: groups to plan.
        is_planner: whether this rank plans groups.
        processor_hash: hash of the model's processor; if set, see `check_processor`.
    """
    if is_planner:
        replay.plan(plans)
    messages = replay.take_groups(queue, queue, range(len(plans)), dropped=list, while_waiting=lambda: None)
    groups = [decode_group(message) for message in messages]
    for group in groups if processor_hash else ():
        check_processor(group, processor_hash)
    return groups


def check_processor(group: TaskGroup, processor_hash: str) -> None:
    """Check that the episodes of a group were sampled with the processor of this hash.

    Raises:
        RuntimeError: they were sampled with another one, so their token ids mean something else.
    """
    stored = () if group.stored_success is None else (group.stored_success,)
    for trajectory in (*group.members, *stored):
        for step in trajectory.steps:
            if step.processor_hash != processor_hash:
                raise RuntimeError(
                    f"episode {trajectory.episode_id} was sampled with processor {step.processor_hash[:12]}, "
                    f"but the learner has {processor_hash[:12]}"
                )
