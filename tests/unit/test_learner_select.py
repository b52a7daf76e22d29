"""What becomes of a group."""

from collections.abc import Sequence
from typing import Any

from deskrl.core.config import GrpoConfig
from deskrl.core.trajectory import Span, Step
from deskrl.learner.select import Selection, select
from deskrl.learner.trajectories import TaskGroup, Trajectory

NOW = 7


def trajectory(
    name: str, reward: float, versions: Sequence[int] = (NOW,), replayed: bool = False, format_ok: bool = True
) -> Trajectory:
    steps = tuple(
        Step(
            index=index,
            screenshot="a",
            images=("a",),
            text="",
            action_ids=(5,),
            logprobs=(-1.0,),
            spans=(Span("here", version, 0, 1),),
        )
        for index, version in enumerate(versions)
    )
    return Trajectory(name, "task", reward, steps, format_ok, replayed)


def choose(members: Sequence[Trajectory], candidate: Trajectory | None = None, **grpo: Any) -> Selection:
    return select(
        TaskGroup("train/0", "task", tuple(members), candidate),
        distance=lambda span: NOW - span.step if span.lineage == "here" else None,
        success_above=0.1,
        config=GrpoConfig(**grpo),
    )


def test_a_group_with_spread_is_learnt_from_as_it_is() -> None:
    members = [trajectory("a", 1.0), trajectory("b", 0.0)]
    chosen = choose(members)
    assert chosen.trajectories == tuple(members)
    assert not chosen.dropped_because
    assert not chosen.used_candidate


def test_groups_without_spread_are_dropped_by_cause() -> None:
    assert choose([trajectory("a", 0.0), trajectory("b", 0.0)]).dropped_because == "all_failed"
    assert choose([trajectory("a", 1.0), trajectory("b", 1.0)]).dropped_because == "all_succeeded"


def test_fewer_than_two_members_make_no_group() -> None:
    assert choose([trajectory("a", 1.0)]).dropped_because == "faults"


def test_where_all_fail_a_stored_success_takes_the_place_of_one_member() -> None:
    members = [trajectory("a", 0.0), trajectory("b", 0.1), trajectory("c", 0.0)]
    success = trajectory("old", 1.0, replayed=True)
    chosen = choose(members, success)
    assert chosen.trajectories == (success, members[1], members[2])
    assert chosen.used_candidate


def test_the_place_that_it_takes_can_be_the_oldest_members_or_one_at_random() -> None:
    members = [trajectory("a", 0.0), trajectory("b", 0.0, [NOW - 2]), trajectory("c", 0.0, [NOW - 1])]
    success = trajectory("old", 1.0, replayed=True)
    assert choose(members, success, replay_place="oldest").trajectories == (members[0], success, members[2])
    places = {
        select(
            TaskGroup(f"train/{number}", "task", tuple(members), success),
            lambda span: NOW - span.step,
            0.1,
            GrpoConfig(replay_place="random"),
        ).trajectories.index(success)
        for number in range(20)
    }
    assert places == {0, 1, 2}


def test_a_stored_success_is_not_used_where_one_member_succeeded_or_replay_is_off() -> None:
    success = trajectory("old", 1.0, replayed=True)
    assert not choose([trajectory("a", 0.5), trajectory("b", 0.0)], success).used_candidate
    failed = [trajectory("a", 0.0), trajectory("b", 0.0)]
    assert choose(failed, success, replay_successes=False).dropped_because == "all_failed"


def test_groups_without_spread_can_be_kept() -> None:
    members = [trajectory("a", 0.0), trajectory("b", 0.0)]
    chosen = choose(members, groups_without_spread="keep")
    assert chosen.trajectories == tuple(members) and not chosen.dropped_because
    success = trajectory("old", 1.0, replayed=True)
    assert choose(members, success, groups_without_spread="keep").trajectories == (success, members[1])
    off = choose(members, success, groups_without_spread="keep", replay_successes=False)
    assert off.trajectories == tuple(members) and not off.used_candidate


def test_a_format_penalty_tells_failures_apart_and_hides_no_failure_from_replay() -> None:
    members = [trajectory("a", 0.0), trajectory("b", 0.0, format_ok=False)]
    assert choose(members).dropped_because == "all_failed"
    assert choose(members, format_penalty=0.5).trajectories == tuple(members)
    assert choose(members, trajectory("old", 1.0, replayed=True), format_penalty=0.5).used_candidate


def test_arpos_rule_looks_at_mean_and_deviation() -> None:
    """Of eight members: mean 0.015 and deviation 0.04 if one has 0.12, mean 0.15 and deviation 0 if all have 0.15."""
    success = trajectory("old", 1.0, replayed=True)
    little = [trajectory("a", 0.12), *(trajectory(str(n), 0.0) for n in range(7))]
    alike = [trajectory(str(n), 0.15) for n in range(8)]
    better = [trajectory(str(n), 0.25) for n in range(8)]
    for members, used in ((little, True), (alike, True), (better, False)):
        assert choose(members, success, replay_when="low_and_alike").used_candidate is used
        assert not choose(members, success).used_candidate


def test_the_oldest_token_of_any_member_decides_whether_a_group_is_stale() -> None:
    fresh = trajectory("a", 1.0)
    assert not choose([fresh, trajectory("b", 0.0, [NOW - 4, NOW])]).dropped_because
    assert choose([fresh, trajectory("b", 0.0, [NOW - 5, NOW])]).dropped_because == "stale"
    assert choose([fresh, trajectory("b", 0.0, [NOW - 1])], max_staleness=0).dropped_because == "stale"


def test_tokens_of_a_version_that_nobody_knows_make_a_group_stale() -> None:
    stranger = Step(index=0, screenshot="a", images=("a",), text="", spans=(Span("elsewhere", NOW, 0, 1),))
    members = [trajectory("a", 1.0), Trajectory("b", "task", 0.0, (stranger,))]
    assert choose(members).dropped_because == "stale"


def test_the_age_of_a_stored_success_is_of_no_account() -> None:
    failed = [trajectory("a", 0.0), trajectory("b", 0.0)]
    assert choose(failed, trajectory("old", 1.0, [0], replayed=True)).used_candidate
