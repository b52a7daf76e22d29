"""Decides whether a group is trained on: kept, kept with a member replaced by a success, or dropped."""

from __future__ import annotations

from dataclasses import dataclass

from deskrl.core.config import GrpoConfig
from deskrl.core.group_outcome import group_failed
from deskrl.learner.advantages import has_reward_variance, shaped_reward
from deskrl.learner.episode_types import TaskGroup, Trajectory
from deskrl.learner.policy_versions import StalenessOf
from deskrl.learner.success_replacement import replace_member, version_spans


@dataclass(frozen=True)
class FilteredGroup:
    """A group after filtering."""

    group_id: str
    task_id: str
    trajectories: tuple[Trajectory, ...]
    """Trajectories to train on; none if the group is dropped."""
    dropped_because: str = ""
    """Cause why the group is dropped: `faults`, `stale`, `all_failed` or `all_succeeded`; empty if it is kept."""
    used_success: bool = False
    """Whether a success from the success buffer replaced a member."""

    @property
    def is_kept(self) -> bool:
        """Whether the group is trained on."""
        return not self.dropped_because


def filter_group(
    group: TaskGroup, staleness: StalenessOf, success_threshold: float, config: GrpoConfig
) -> FilteredGroup:
    """Decide whether a group is trained on; a pure function, so that all ranks decide alike.

    A group is dropped if faults left fewer than two members, or if a member is too stale. In a failed group a stored
    success replaces one member (ARPO, arXiv:2505.16282). Any other zero-variance group is dropped (dynamic sampling as
    in DAPO, arXiv:2503.14476), unless `config.zero_variance_groups` is `keep`.

    Args:
        group: complete group.
        staleness: staleness of a span's policy.
        success_threshold: rewards above this are successes.
        config: limit of staleness, use of the success buffer, treatment of zero-variance groups.
    """
    members = group.members
    if len(members) < 2:
        return _drop(group, "faults")
    if any(value is None or value > config.max_staleness for value in map(staleness, version_spans(members))):
        return _drop(group, "stale")
    failed = group_failed([member.reward for member in members], config.replace_when, success_threshold)
    if failed and config.use_success_buffer and group.stored_success is not None:
        trajectories = replace_member(group, staleness, config.replace_slot)
        return FilteredGroup(group.group_id, group.task_id, trajectories, used_success=True)
    rewards = [shaped_reward(member.reward, member.format_ok, config.format_penalty) for member in members]
    if config.zero_variance_groups == "drop" and not has_reward_variance(rewards):
        return _drop(group, "all_failed" if failed else "all_succeeded")
    return FilteredGroup(group.group_id, group.task_id, members)


def _drop(group: TaskGroup, cause: str) -> FilteredGroup:
    return FilteredGroup(group.group_id, group.task_id, (), dropped_because=cause)
