"""Evaluations of a training run: which episodes count."""

from deskrl.core.step_codec import Step, VersionSpan
from deskrl.learner.episode_types import TaskGroup, Trajectory
from deskrl.learner.evaluation import exclude_other_versions
from deskrl.learner.metrics.metric_records import evaluation_record
from deskrl.learner.policy_versions import Lineage, LineageTree

TREE = LineageTree((Lineage("first", "", 0), Lineage("second", "first", 3)))
"""Lineages of a learner that resumed from the checkpoint of step 3."""


def episode(reward: float, *spans: VersionSpan) -> Trajectory:
    return Trajectory("e", "a", reward, (Step(0, "seen", ("seen",), "click", spans=spans),))


def staleness_at_3(span: VersionSpan) -> int | None:
    return TREE.distance(span.lineage, span.step, 3)


def test_an_episode_with_a_token_of_another_policy_version_does_not_count() -> None:
    current = [episode(1.0, VersionSpan("second", 3, 0, 4)), episode(0.0, VersionSpan("first", 3, 0, 4))]
    others = [
        episode(1.0, VersionSpan("second", 3, 0, 3), VersionSpan("second", 4, 3, 4)),
        episode(0.0, VersionSpan("first", 2, 0, 4)),
        episode(0.0, VersionSpan("first", 4, 0, 4)),
        episode(1.0, VersionSpan("unknown", 3, 0, 4)),
    ]
    groups, num_other = exclude_other_versions(
        [TaskGroup("g", "a", (*current, *others), num_faulted=1)], staleness_at_3
    )
    assert groups[0].members == tuple(current) and num_other == 4
    record = evaluation_record(groups, num_other, 0.5, (None, None))
    assert record["per_task"] == {"a": {"n": 2, "success": 1}}
    assert (record["episodes"], record["num_faulted"], record["num_other_version"]) == (2, 1, 4)


def test_an_evaluation_without_episodes_that_count_has_no_average_reward() -> None:
    groups, num_other = exclude_other_versions(
        [TaskGroup("g", "a", (episode(1.0, VersionSpan("first", 0, 0, 1)),))], staleness_at_3
    )
    record = evaluation_record(groups, num_other, 0.5, (None, None))
    assert (record["episodes"], record["average_reward"], record["num_other_version"]) == (0, None, 1)
