"""Distance between policy versions across crashes and resumed runs."""

from deskrl.learner.policy_versions import LineageTree

FIRST = LineageTree(()).fork("first", "", 0)
SECOND = FIRST.fork("second", "first", 10)
"""The learner crashed after step 12 and resumed from the checkpoint of step 10."""


def test_within_one_lineage_the_distance_is_the_difference_of_steps() -> None:
    assert FIRST.distance("first", 3, to_step=5) == 2
    assert FIRST.distance("first", 5, to_step=5) == 0


def test_versions_before_the_checkpoint_belong_to_the_new_lineage_too() -> None:
    assert SECOND.distance("first", 8, to_step=11) == 3
    assert SECOND.distance("first", 10, to_step=10) == 0


def test_the_distance_to_a_lost_version_is_the_path_through_the_fork() -> None:
    """first/12 is two steps after the fork at 10, second/11 is one step after it."""
    assert SECOND.distance("first", 12, to_step=11) == 3


def test_two_crashes_without_a_checkpoint_in_between_fork_the_same_lineage_twice() -> None:
    third = SECOND.fork("third", "first", 10)
    assert third.distance("second", 11, to_step=11) == 2
    assert third.distance("second", 10, to_step=10) == 0
    assert third.distance("first", 9, to_step=11) == 2


def test_the_distance_spans_several_forks() -> None:
    tree = SECOND.fork("third", "second", 14).fork("fourth", "first", 6)
    assert tree.distance("third", 15, to_step=7) == 9 + 1
    assert tree.distance("first", 8, to_step=7) == 2 + 1


def test_an_unknown_lineage_has_no_distance() -> None:
    assert FIRST.distance("unknown", 0, to_step=0) is None
    two_roots = FIRST.fork("again", "", 0)
    assert two_roots.distance("first", 0, to_step=0) is None


def test_a_tree_survives_serialisation_to_json() -> None:
    assert LineageTree.from_json(SECOND.to_json()) == SECOND
