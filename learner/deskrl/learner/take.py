"""Forming a batch: takes groups until enough of them tell good from bad, and keeps work planned ahead.

What is taken depends on nothing but replay's answers, which are the same for whoever asks again, so a batch that is
redelivered is formed anew exactly as it was. Knows the plan, replay and `select`; knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from deskrl.core.config import RunConfig
from deskrl.core.trajectory import Span
from deskrl.learner.plan import TRAIN, Curriculum, num_to_plan
from deskrl.learner.replay_client import ReplayClient
from deskrl.learner.select import Selection, select
from deskrl.learner.state import LearnerState
from deskrl.learner.trajectories import TaskGroup, Trajectory, decode_group

MOST_GROUPS = 3
"""A batch takes no more than this many times its groups: once nearly all succeed, it learns from what there is."""

_log = logging.getLogger("deskrl.learner")


@dataclass
class TakenBatch:
    """A batch with what became of each of its groups."""

    batch_id: str
    groups: list[TaskGroup] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)

    @property
    def kept(self) -> list[Selection]:
        """Groups that are learnt from."""
        return [selection for selection in self.selections if not selection.dropped_because]

    @property
    def dropped(self) -> dict[str, int]:
        """Groups that are not, by cause."""
        counts: dict[str, int] = {}
        for selection in self.selections:
            if selection.dropped_because:
                counts[selection.dropped_because] = counts.get(selection.dropped_because, 0) + 1
        return counts

    @property
    def members(self) -> list[Trajectory]:
        """All fresh episodes, learnt from or not."""
        return [member for group in self.groups for member in group.members]


class BatchTaker:
    """Takes the training queue's batches.

    Args:
        config: of the run.
        curriculum: what is planned.
        replay: where from.
        plans: whether this rank plans (one does).
        processor_hash: of the model; episodes of another are refused.
    """

    def __init__(
        self, config: RunConfig, curriculum: Curriculum, replay: ReplayClient, plans: bool, processor_hash: str
    ) -> None:
        self._config = config
        self._grpo = config.learner.grpo
        self._curriculum = curriculum
        self._replay = replay
        self._plans = plans
        self._processor_hash = processor_hash

    def take(self, state: LearnerState, distance: Callable[[Span], int | None]) -> TakenBatch:
        """The next batch; moves `state.num_planned` and `state.num_taken`."""
        batch = TakenBatch(batch_id=f"{TRAIN}/{state.num_updates + 1:06d}")
        size = self._grpo.groups_per_batch
        while len(batch.kept) < size and len(batch.groups) < MOST_GROUPS * size:
            # So many are needed whatever becomes of them; what is planned by now is enough for as many.
            self._plan_ahead(state, len(batch.kept))
            num_taken = len(batch.groups)
            messages = self._replay.take_groups(
                TRAIN,
                batch.batch_id,
                range(num_taken, min(num_taken + size - len(batch.kept), MOST_GROUPS * size)),
                dropped=lambda: [chosen.group_id for chosen in batch.selections if chosen.dropped_because],
                while_waiting=lambda: self._plan_ahead(state, len(batch.kept)),
            )
            for message in messages:
                state.num_taken += 1
                group = decode_group(message)
                self.check_processor(group)
                batch.groups.append(group)
                batch.selections.append(select(group, distance, self._config.replay.success_above, self._grpo))
        return batch

    def check_processor(self, group: TaskGroup) -> None:
        """Raise RuntimeError for tokens that another processor made: they would mean something else here."""
        candidates = () if group.candidate is None else (group.candidate,)
        for trajectory in (*group.members, *candidates):
            for step in trajectory.steps:
                if step.processor_hash != self._processor_hash:
                    raise RuntimeError(
                        f"episode {trajectory.episode_id} was sampled with processor {step.processor_hash[:12]}, "
                        f"the learner has {self._processor_hash[:12]}"
                    )

    def _plan_ahead(self, state: LearnerState, num_kept: int) -> None:
        if not self._plans:
            return
        size = self._grpo.groups_per_batch
        on_their_way = state.num_planned - state.num_taken - self._replay.num_closed_train_groups()
        still_needed = (self._grpo.num_updates - state.num_updates) * size - num_kept
        num = num_to_plan(on_their_way, still_needed, size, self._grpo.max_staleness)
        ordinals = range(state.num_planned, state.num_planned + num)
        rates = state.last_rates() if num and self._grpo.dynamic_rollouts else None
        self._replay.plan([self._curriculum.train_group(ordinal, rates) for ordinal in ordinals])
        state.num_planned += num
