"""Distance between policy versions, through crashes and resumptions."""

from deskrl.learner.lineage import VersionTree

FIRST = VersionTree(()).branch_off("first", "", 0)
SECOND = FIRST.branch_off("second", "first", 10)
"""The learner crashed after step 12 and was restored to its checkpoint of step 10."""


def test_within_one_lineage_the_distance_is_the_difference_of_steps() -> None:
    assert FIRST.distance("first", 3, to_step=5) == 2
    assert FIRST.distance("first", 5, to_step=5) == 0


def test_what_acted_before_the_restored_step_is_of_the_same_line() -> None:
    assert SECOND.distance("first", 8, to_step=11) == 3
    assert SECOND.distance("first", 10, to_step=10) == 0


def test_what_acted_under_lost_steps_is_as_far_as_the_way_back_and_forth() -> None:
    """first/12 is two steps off the fork at 10, second/11 one."""
    assert SECOND.distance("first", 12, to_step=11) == 3


def test_two_crashes_without_a_checkpoint_between_them_are_two_branches_of_one_lineage() -> None:
    third = SECOND.branch_off("third", "first", 10)
    assert third.distance("second", 11, to_step=11) == 2
    assert third.distance("second", 10, to_step=10) == 0
    assert third.distance("first", 9, to_step=11) == 2


def test_a_restoration_to_before_an_earlier_fork_is_followed_all_the_way() -> None:
    tree = SECOND.branch_off("third", "second", 14).branch_off("fourth", "first", 6)
    assert tree.distance("third", 15, to_step=7) == 9 + 1
    assert tree.distance("first", 8, to_step=7) == 2 + 1


def test_an_unknown_lineage_has_no_distance() -> None:
    assert FIRST.distance("stranger", 0, to_step=0) is None
    two_roots = FIRST.branch_off("again", "", 0)
    assert two_roots.distance("first", 0, to_step=0) is None


def test_it_survives_json() -> None:
    assert VersionTree.from_json(SECOND.to_json()) == SECOND
