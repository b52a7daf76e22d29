"""How far acting may run ahead of learning. Pure: knows counts, no clock and no store.

The rule of queue "train", in episodes: running + finished-but-unused <= (S + 1 + version) * batch - consumed, where
`version` counts the batches learnt from. Two readings keep it from drifting over a long run:

- A group that is begun or consumed counts as `rollouts` episodes however many it was planned with and whatever became
  of them. A batch is then worth exactly `groups_per_batch` groups, whatever faulted.
- A group is consumed once it is bound to a batch, unless the learner has told that it dropped it: a dropped group
  makes room for its replacement at once, and one that was learnt from only when `version` moves.

The learner takes whole groups, so a limit that no whole group fits into would stall it; with groups of `rollouts`
members the limit is always room for at least one more batch than was learnt from.
"""

from __future__ import annotations

from dataclasses import dataclass

PACED_QUEUE = "train"


@dataclass(frozen=True)
class Pacing:
    """The limits of a run."""

    max_staleness: int
    groups_per_batch: int
    rollouts: int

    def limit(self, num_updates: int, num_consumed_groups: int) -> int:
        """Episodes that may be running or unused at once.

        Args:
            num_updates: batches learnt from.
            num_consumed_groups: groups bound to a batch and not dropped, over the whole run.
        """
        num_groups = (self.max_staleness + 1 + num_updates) * self.groups_per_batch - num_consumed_groups
        return num_groups * self.rollouts

    def allowance(self, num_updates: int, num_consumed_groups: int, num_outstanding: int) -> int:
        """Episodes that may be granted now; 0 where a restored learner has yet to catch up with what it took before.

        Args:
            num_updates: batches learnt from.
            num_consumed_groups: groups bound to a batch and not dropped, over the whole run.
            num_outstanding: members of unused groups that are running, finished or faulted.
        """
        return max(0, self.limit(num_updates, num_consumed_groups) - num_outstanding)
