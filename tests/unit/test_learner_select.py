"""What becomes of a group."""

from collections.abc import Sequence

from deskrl.core.trajectory import Span, Step
from deskrl.learner.select import Selection, select
from deskrl.learner.trajectories import TaskGroup, Trajectory

NOW = 7


def trajectory(name: str, reward: float, versions: Sequence[int] = (NOW,), replayed: bool = False) -> Trajectory:
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
    return Trajectory(name, "task", reward, steps, replayed)


def choose(
    members: Sequence[Trajectory],
    candidate: Trajectory | None = None,
    max_staleness: int = 4,
    replay_successes: bool = True,
) -> Selection:
    return select(
        TaskGroup("train/0", "task", tuple(members), candidate),
        distance=lambda span: NOW - span.step if span.lineage == "here" else None,
        max_staleness=max_staleness,
        success_above=0.1,
        replay_successes=replay_successes,
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


def test_a_stored_success_is_not_used_where_one_member_succeeded_or_replay_is_off() -> None:
    success = trajectory("old", 1.0, replayed=True)
    assert not choose([trajectory("a", 0.5), trajectory("b", 0.0)], success).used_candidate
    failed = [trajectory("a", 0.0), trajectory("b", 0.0)]
    assert choose(failed, success, replay_successes=False).dropped_because == "all_failed"


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
