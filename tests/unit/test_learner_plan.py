"""The curriculum: what is planned, in which order, and how far ahead."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.core.config import RunConfig
from deskrl.learner.plan import Curriculum, num_to_plan, rollouts_at, split_evenly
from deskrl.learner.state import LearnerState
from deskrl.proto.v1 import rollout_pb2

TASKS = {name: f'{{"id": "{name}"}}'.encode() for name in ("web", "image", "text")}


def curriculum(seed: int = 0, **learner: Any) -> Curriculum:
    config = RunConfig.model_validate(
        {"runs": Path("/tmp"), "seed": seed, "tasks": {"rollouts": 4}, "learner": learner},
    )
    return Curriculum(config, TASKS)


def test_an_epoch_is_one_pass_over_the_task_list() -> None:
    plan = curriculum()
    for epoch in range(4):
        tasks = [plan.train_group(3 * epoch + place).task_id for place in range(3)]
        assert sorted(tasks) == sorted(TASKS)


def test_the_plan_follows_from_the_seed() -> None:
    groups = [curriculum().train_group(ordinal) for ordinal in range(30)]
    assert groups == [curriculum().train_group(ordinal) for ordinal in range(30)]
    others = [curriculum(seed=1).train_group(ordinal) for ordinal in range(30)]
    assert [group.task_id for group in groups] != [group.task_id for group in others]
    seeds = [seed for group in groups for seed in group.seeds]
    assert len(set(seeds)) == len(seeds) == 30 * 4


@pytest.mark.parametrize(("rate", "rollouts"), [(0.0, 8), (0.59, 8), (0.6, 8), (0.75, 5), (0.9, 3), (1.0, 2)])
def test_a_task_that_is_solved_often_can_have_fewer_rollouts(rate: float, rollouts: int) -> None:
    """9 / 0.75 - 7 = 5, 9 / 0.9 - 7 = 3, and never fewer than two."""
    assert rollouts_at(rate, 8) == rollouts
    assert rollouts_at(1.0, 2) == 2


def test_only_tasks_with_a_known_rate_have_fewer() -> None:
    plan = curriculum()
    groups = [plan.train_group(ordinal, {"web": 1.0}) for ordinal in range(3)]
    assert {group.task_id: len(group.seeds) for group in groups} == {"web": 2, "image": 4, "text": 4}
    (web,) = (group for group in groups if group.task_id == "web")
    full = next(group for group in map(plan.train_group, range(3)) if group.task_id == "web")
    assert web.seeds == full.seeds[:2], "the same rollouts, fewer of them"


def test_a_rate_is_that_of_the_update_which_last_played_the_task() -> None:
    history = [{"per_task": {"web": {"n": 4, "success": 4}}}, {"per_task": {"web": {"n": 4, "success": 1}}}]
    assert LearnerState(history=history).last_rates() == {"web": 0.25}


def test_a_group_carries_its_task_file() -> None:
    group = curriculum().train_group(0)
    assert group.task_json == TASKS[group.task_id]
    assert group.acting_policy == rollout_pb2.ACTING_POLICY_SAMPLED


def test_each_task_is_demonstrated_by_its_script() -> None:
    groups = curriculum(warm_start={"demos_per_task": 5}).demo_groups()
    assert [group.task_id for group in groups] == list(TASKS)
    assert all(len(group.seeds) == 5 for group in groups)
    assert all(group.acting_policy == rollout_pb2.ACTING_POLICY_SCRIPTED for group in groups)


def test_an_evaluation_plays_every_task_equally_often() -> None:
    groups = curriculum(eval={"episodes": 32}).eval_groups("before")
    played = {task: sum(len(group.seeds) for group in groups if group.task_id == task) for task in TASKS}
    assert set(played.values()) == {11}, "32 of 3 tasks: 11 each"
    after = curriculum(eval={"episodes": 32}).eval_groups("after")
    assert not {seed for group in groups for seed in group.seeds} & {seed for group in after for seed in group.seeds}


@given(st.integers(2, 200), st.integers(2, 16))
def test_an_even_split_leaves_no_group_without_a_second_member(total: int, largest: int) -> None:
    sizes = split_evenly(total, largest)
    assert sum(sizes) == total
    assert min(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(largest, 3)


def test_the_plan_runs_ahead_of_what_pacing_grants() -> None:
    assert num_to_plan(num_on_their_way=0, num_still_needed=400, groups_per_batch=4, max_staleness=1) == 12
    assert num_to_plan(num_on_their_way=11, num_still_needed=400, groups_per_batch=4, max_staleness=1) == 1
    assert num_to_plan(num_on_their_way=12, num_still_needed=400, groups_per_batch=4, max_staleness=1) == 0


def test_towards_the_end_no_more_is_planned_than_will_be_learnt_from() -> None:
    assert num_to_plan(num_on_their_way=3, num_still_needed=4, groups_per_batch=4, max_staleness=4) == 1
    assert num_to_plan(num_on_their_way=4, num_still_needed=4, groups_per_batch=4, max_staleness=4) == 0
