"""Evaluations of a training run: which episodes count, and as what."""

from deskrl.core.trajectory import Span, Step
from deskrl.learner.evaluation import evaluation_record, of_one_version
from deskrl.learner.lineage import Branch, VersionTree
from deskrl.learner.trajectories import TaskGroup, Trajectory

TREE = VersionTree((Branch("first", "", 0), Branch("second", "first", 3)))
"""A learner that was restored to step 3."""


def episode(reward: float, *spans: Span) -> Trajectory:
    return Trajectory("e", "a", reward, (Step(0, "seen", ("seen",), "click", spans=spans),))


def distance_at_3(span: Span) -> int | None:
    return TREE.distance(span.lineage, span.step, 3)


def test_one_token_of_another_version_and_an_episode_is_neither_success_nor_failure() -> None:
    pinned = [episode(1.0, Span("second", 3, 0, 4)), episode(0.0, Span("first", 3, 0, 4))]
    others = [
        episode(1.0, Span("second", 3, 0, 3), Span("second", 4, 3, 4)),
        episode(0.0, Span("first", 2, 0, 4)),
        episode(0.0, Span("first", 4, 0, 4)),
        episode(1.0, Span("nobody's", 3, 0, 4)),
    ]
    groups, num_other = of_one_version([TaskGroup("g", "a", (*pinned, *others), num_faulted=1)], distance_at_3)
    assert groups[0].members == tuple(pinned) and num_other == 4
    record = evaluation_record(groups, num_other, 0.5, (None, None))
    assert record["per_task"] == {"a": {"n": 2, "success": 1}}
    assert (record["episodes"], record["num_faulted"], record["num_other_version"]) == (2, 1, 4)


def test_an_evaluation_that_another_version_played_whole_has_no_average() -> None:
    groups, num_other = of_one_version([TaskGroup("g", "a", (episode(1.0, Span("first", 0, 0, 1)),))], distance_at_3)
    record = evaluation_record(groups, num_other, 0.5, (None, None))
    assert (record["episodes"], record["average_reward"], record["num_other_version"]) == (0, None, 1)
