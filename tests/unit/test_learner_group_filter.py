"""Group filter: which groups are kept, get a stored success, or are dropped, and why."""

from collections.abc import Sequence
from typing import Any

from deskrl.core.config import GrpoConfig
from deskrl.core.step_codec import Step, VersionSpan
from deskrl.learner.episode_types import TaskGroup, Trajectory
from deskrl.learner.group_filter import FilteredGroup, filter_group

CURRENT = 7


def trajectory(
    name: str,
    reward: float,
    versions: Sequence[int] = (CURRENT,),
    from_success_buffer: bool = False,
    format_ok: bool = True,
) -> Trajectory:
    steps = tuple(
        Step(
            index=index,
            screenshot="a",
            images=("a",),
            text="",
            action_ids=(5,),
            logprobs=(-1.0,),
            spans=(VersionSpan("here", version, 0, 1),),
        )
        for index, version in enumerate(versions)
    )
    return Trajectory(name, "task", reward, steps, format_ok, from_success_buffer)


def filtered(members: Sequence[Trajectory], stored_success: Trajectory | None = None, **grpo: Any) -> FilteredGroup:
    return filter_group(
        TaskGroup("train/0", "task", tuple(members), stored_success),
        staleness=lambda span: CURRENT - span.step if span.lineage == "here" else None,
        success_threshold=0.1,
        config=GrpoConfig(**grpo),
    )


def test_a_group_with_reward_variance_is_kept_unchanged() -> None:
    members = [trajectory("a", 1.0), trajectory("b", 0.0)]
    result = filtered(members)
    assert result.trajectories == tuple(members)
    assert not result.dropped_because
    assert not result.used_success


def test_zero_variance_groups_are_dropped_with_their_cause() -> None:
    assert filtered([trajectory("a", 0.0), trajectory("b", 0.0)]).dropped_because == "all_failed"
    assert filtered([trajectory("a", 1.0), trajectory("b", 1.0)]).dropped_because == "all_succeeded"


def test_a_group_of_fewer_than_two_members_is_dropped() -> None:
    assert filtered([trajectory("a", 1.0)]).dropped_because == "faults"


def test_a_stored_success_replaces_one_member_of_a_failed_group() -> None:
    members = [trajectory("a", 0.0), trajectory("b", 0.1), trajectory("c", 0.0)]
    success = trajectory("old", 1.0, from_success_buffer=True)
    result = filtered(members, success)
    assert result.trajectories == (success, members[1], members[2])
    assert result.used_success


def test_the_replaced_member_can_be_the_oldest_or_a_random_one() -> None:
    members = [trajectory("a", 0.0), trajectory("b", 0.0, [CURRENT - 2]), trajectory("c", 0.0, [CURRENT - 1])]
    success = trajectory("old", 1.0, from_success_buffer=True)
    assert filtered(members, success, replace_slot="oldest").trajectories == (members[0], success, members[2])
    slots = {
        filter_group(
            TaskGroup(f"train/{number}", "task", tuple(members), success),
            lambda span: CURRENT - span.step,
            0.1,
            GrpoConfig(replace_slot="random"),
        ).trajectories.index(success)
        for number in range(20)
    }
    assert slots == {0, 1, 2}


def test_a_stored_success_is_not_used_if_a_member_succeeded_or_the_success_buffer_is_off() -> None:
    success = trajectory("old", 1.0, from_success_buffer=True)
    assert not filtered([trajectory("a", 0.5), trajectory("b", 0.0)], success).used_success
    failed = [trajectory("a", 0.0), trajectory("b", 0.0)]
    assert filtered(failed, success, use_success_buffer=False).dropped_because == "all_failed"


def test_zero_variance_groups_can_be_kept() -> None:
    members = [trajectory("a", 0.0), trajectory("b", 0.0)]
    result = filtered(members, zero_variance_groups="keep")
    assert result.trajectories == tuple(members) and not result.dropped_because
    success = trajectory("old", 1.0, from_success_buffer=True)
    assert filtered(members, success, zero_variance_groups="keep").trajectories == (success, members[1])
    off = filtered(members, success, zero_variance_groups="keep", use_success_buffer=False)
    assert off.trajectories == tuple(members) and not off.used_success


def test_a_format_penalty_gives_failures_different_rewards_and_does_not_hide_that_a_group_failed() -> None:
    members = [trajectory("a", 0.0), trajectory("b", 0.0, format_ok=False)]
    assert filtered(members).dropped_because == "all_failed"
    assert filtered(members, format_penalty=0.5).trajectories == tuple(members)
    """Groups of eight: one 0.12 gives mean 0.015, deviation 0.04; eight times 0.15 give mean 0.15, deviation 0."""


def test_the_rule_of_arpo_considers_mean_and_standard_deviation() -> None:
    """Groups of eight: one 0.12 gives mean 0.015, deviation 0.04; eight times 0.15 give mean 0.15, deviation 0."""
    success = trajectory("old", 1.0, from_success_buffer=True)
    one_small = [trajectory("a", 0.12), *(trajectory(str(n), 0.0) for n in range(7))]
    all_small = [trajectory(str(n), 0.15) for n in range(8)]
    all_larger = [trajectory(str(n), 0.25) for n in range(8)]
    for members, is_used in ((one_small, True), (all_small, True), (all_larger, False)):
        assert filtered(members, success, replace_when="low_mean_low_std").used_success is is_used
        assert not filtered(members, success).used_success


def test_the_staleness_of_a_group_is_that_of_its_oldest_token() -> None:
    fresh = trajectory("a", 1.0)
    assert not filtered([fresh, trajectory("b", 0.0, [CURRENT - 4, CURRENT])]).dropped_because
    assert filtered([fresh, trajectory("b", 0.0, [CURRENT - 5, CURRENT])]).dropped_because == "stale"
    assert filtered([fresh, trajectory("b", 0.0, [CURRENT - 1])], max_staleness=0).dropped_because == "stale"


def test_a_group_with_tokens_of_an_unknown_policy_version_is_stale() -> None:
    unknown = Step(index=0, screenshot="a", images=("a",), text="", spans=(VersionSpan("elsewhere", CURRENT, 0, 1),))
    members = [trajectory("a", 1.0), Trajectory("b", "task", 0.0, (unknown,))]
    assert filtered(members).dropped_because == "stale"


def test_the_age_of_a_stored_success_does_not_matter() -> None:
    failed = [trajectory("a", 0.0), trajectory("b", 0.0)]
    assert filtered(failed, trajectory("old", 1.0, [0], from_success_buffer=True)).used_success
