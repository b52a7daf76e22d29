"""What becomes of a group: learnt from, mended by a stored success, or dropped with a cause. Pure functions.

Replay keeps the successes and offers one; the decision is made here. Knows no tokens and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deskrl.core import ids
from deskrl.core.config import GrpoConfig
from deskrl.core.failure import group_failed
from deskrl.core.trajectory import Span
from deskrl.learner.advantages import has_spread, learnt_reward
from deskrl.learner.trajectories import TaskGroup, Trajectory


@dataclass(frozen=True)
class Selection:
    """A group after the decision; `dropped_because` is empty if it is learnt from."""

    group_id: str
    task_id: str
    trajectories: tuple[Trajectory, ...]
    dropped_because: str = ""
    used_candidate: bool = False


def select(
    group: TaskGroup,
    distance: Callable[[Span], int | None],
    success_above: float,
    config: GrpoConfig,
) -> Selection:
    """Decide about one group.

    Args:
        group: complete, as replay gave it.
        distance: optimizer steps between the version of a span and the one that learns; None if unknown.
        success_above: rewards above this are successes.
        config: how stale a group may be, when a stored success is used, and what becomes of groups without spread.
    """
    members = group.members
    if len(members) < 2:
        return _drop(group, "faults")
    if any(staleness is None or staleness > config.max_staleness for staleness in map(distance, _spans(members))):
        return _drop(group, "stale")
    failed = group_failed([member.reward for member in members], config.replay_when, success_above)
    if failed and config.replay_successes and group.candidate is not None:
        place = _place(group, distance, config.replay_place)
        swapped = (*members[:place], group.candidate, *members[place + 1 :])
        return Selection(group.group_id, group.task_id, swapped, used_candidate=True)
    learnt = [learnt_reward(member.reward, member.format_ok, config.format_penalty) for member in members]
    if config.groups_without_spread == "drop" and not has_spread(learnt):
        return _drop(group, "all_failed" if failed else "all_succeeded")
    return Selection(group.group_id, group.task_id, members)


def _place(group: TaskGroup, distance: Callable[[Span], int | None], rule: Literal["first", "random", "oldest"]) -> int:
    """Which member makes room for a stored success; the same for every rank."""
    if rule == "first":
        return 0
    if rule == "random":
        return ids.derive_seed("replay place", group.group_id) % len(group.members)
    ages = [max((distance(span) or 0 for span in _spans((member,))), default=0) for member in group.members]
    return ages.index(max(ages))


def _drop(group: TaskGroup, cause: str) -> Selection:
    return Selection(group.group_id, group.task_id, (), dropped_because=cause)


def _spans(members: tuple[Trajectory, ...]) -> list[Span]:
    return [span for member in members for step in member.steps for span in step.spans]
