"""Rate limiter: bounds how many rollouts may run ahead of training.

On queue "train", counted in episodes: running + finished but unused <= (S + 1 + version) * batch - consumed, where S is
the maximum staleness and `version` the number of batches trained on. Two conventions prevent drift over a long run:

- A group that has started or is consumed counts as `rollouts_per_group` episodes, however many it was planned with and
  whatever their outcome. A batch is therefore worth exactly `groups_per_batch` groups, regardless of faults.
- A group is consumed once it is bound to a batch, unless the learner has reported that it dropped the group. A dropped
  group makes room for its replacement immediately; a group that was trained on makes room when `version` increases.

The learner takes whole groups, so a limit below one whole group would stall it. With groups of `rollouts_per_group`
members there is always room for at least one batch more than was trained on.

The bound resembles the staleness control of AReaL (https://arxiv.org/abs/2505.24298), counted in whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass

RATE_LIMITED_QUEUE = "train"


@dataclass(frozen=True)
class RateLimiter:
    """Limits of one run."""

    max_staleness: int
    groups_per_batch: int
    rollouts_per_group: int

    def limit(self, num_updates: int, num_consumed_groups: int) -> int:
        """Return the number of episodes that may be running or unused at the same time.

        Args:
            num_updates: number of batches trained on.
            num_consumed_groups: number of groups bound to a batch and not dropped, over the whole run.
        """
        num_groups = (self.max_staleness + 1 + num_updates) * self.groups_per_batch - num_consumed_groups
        return num_groups * self.rollouts_per_group

    def allowance(self, num_updates: int, num_consumed_groups: int, num_outstanding: int) -> int:
        """Return the number of episodes that may be granted now.

        It is 0 while a learner restored from an older checkpoint repeats the batches that it took before.

        Args:
            num_updates: number of batches trained on.
            num_consumed_groups: number of groups bound to a batch and not dropped, over the whole run.
            num_outstanding: number of members of unused groups that are running, finished or faulted.
        """
        return max(0, self.limit(num_updates, num_consumed_groups) - num_outstanding)
