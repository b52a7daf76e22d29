"""Success replacement: a stored success takes the place of one member of a failed group (ARPO, arXiv:2505.16282)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from deskrl.core import ids
from deskrl.core.step_codec import VersionSpan
from deskrl.learner.episode_types import TaskGroup, Trajectory
from deskrl.learner.policy_versions import StalenessOf


def replace_member(
    group: TaskGroup, staleness: StalenessOf, rule: Literal["first", "random", "oldest"]
) -> tuple[Trajectory, ...]:
    """Return the members of a group, one of them replaced by the stored success that the replay service offered.

    A pure function, so that all ranks replace the same member.

    Args:
        group: failed group with a stored success.
        staleness: staleness of a span's policy.
        rule: member to replace: the first, a random one, or the one with the stalest token.
    """
    assert group.stored_success is not None
    slot = _slot(group, staleness, rule)
    return (*group.members[:slot], group.stored_success, *group.members[slot + 1 :])


def version_spans(members: Sequence[Trajectory]) -> list[VersionSpan]:
    """Return the version spans of all tokens of these trajectories."""
    return [span for member in members for step in member.steps for span in step.spans]


def _slot(group: TaskGroup, staleness: StalenessOf, rule: Literal["first", "random", "oldest"]) -> int:
    """Return the index of the member to replace."""
    if rule == "first":
        return 0
    if rule == "random":
        # "replay place" is part of the seed: another text would choose other members in resumed and reproduced runs.
        return ids.derive_seed("replay place", group.group_id) % len(group.members)
    ages = [max((staleness(span) or 0 for span in version_spans((member,))), default=0) for member in group.members]
    return ages.index(max(ages))
