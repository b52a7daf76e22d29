"""Curriculum: which groups are planned, in which order, and how far ahead."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.core.config import RunConfig
from deskrl.learner.curriculum import Curriculum, num_rollouts_at, num_to_plan, split_evenly
from deskrl.learner.train_state import TrainState
from deskrl.proto.v1 import rollout_pb2

TASKS = {name: f'{{"id": "{name}"}}'.encode() for name in ("web", "image", "text")}


def curriculum(seed: int = 0, **learner: Any) -> Curriculum:
    config = RunConfig.model_validate(
        {"runs": Path("/tmp"), "seed": seed, "tasks": {"num_rollouts": 4}, "learner": learner},
    )
    return Curriculum(config, TASKS)


def test_an_epoch_is_one_pass_over_the_task_list() -> None:
    plan = curriculum()
    for epoch in range(4):
        tasks = [plan.train_group(3 * epoch + place).task_id for place in range(3)]
        assert sorted(tasks) == sorted(TASKS)


def test_the_plan_is_determined_by_the_seed() -> None:
    groups = [curriculum().train_group(ordinal) for ordinal in range(30)]
    assert groups == [curriculum().train_group(ordinal) for ordinal in range(30)]
    others = [curriculum(seed=1).train_group(ordinal) for ordinal in range(30)]
    assert [group.task_id for group in groups] != [group.task_id for group in others]
    seeds = [seed for group in groups for seed in group.seeds]
    assert len(set(seeds)) == len(seeds) == 30 * 4


@pytest.mark.parametrize(("rate", "rollouts"), [(0.0, 8), (0.59, 8), (0.6, 8), (0.75, 5), (0.9, 3), (1.0, 2)])
def test_a_task_with_a_high_success_rate_has_fewer_rollouts(rate: float, rollouts: int) -> None:
    """9 / 0.75 - 7 = 5 and 9 / 0.9 - 7 = 3; the minimum is 2."""
    assert num_rollouts_at(rate, 8) == rollouts
    assert num_rollouts_at(1.0, 2) == 2


def test_only_tasks_with_a_known_success_rate_have_fewer_rollouts() -> None:
    plan = curriculum(grpo={"dynamic_rollouts": True})
    groups = [plan.train_group(ordinal, {"web": 1.0}) for ordinal in range(3)]
    assert {group.task_id: len(group.seeds) for group in groups} == {"web": 2, "image": 4, "text": 4}
    (web,) = (group for group in groups if group.task_id == "web")
    full = next(group for group in map(plan.train_group, range(3)) if group.task_id == "web")
    assert web.seeds == full.seeds[:2], "a smaller group has the first seeds of the full one"
    assert all(len(curriculum().train_group(ordinal, {"web": 1.0}).seeds) == 4 for ordinal in range(3))


def test_the_success_rate_of_a_task_is_that_of_the_last_update_with_episodes_of_it() -> None:
    history = [{"per_task": {"web": {"n": 4, "success": 4}}}, {"per_task": {"web": {"n": 4, "success": 1}}}]
    assert TrainState(history=history).last_success_rates() == {"web": 0.25}


def test_a_group_contains_its_task_file() -> None:
    group = curriculum().train_group(0)
    assert group.task_json == TASKS[group.task_id]
    assert group.acting_policy == rollout_pb2.ACTING_POLICY_SAMPLED


def test_each_task_has_a_group_of_demonstrations_by_its_script() -> None:
    groups = curriculum(warm_start={"demos_per_task": 5}).demo_groups()
    assert [group.task_id for group in groups] == list(TASKS)
    assert all(len(group.seeds) == 5 for group in groups)
    assert all(group.acting_policy == rollout_pb2.ACTING_POLICY_SCRIPTED for group in groups)


def test_an_evaluation_has_equally_many_episodes_of_each_task() -> None:
    groups = curriculum(eval={"num_episodes": 32}).eval_groups("before")
    num_episodes = {task: sum(len(group.seeds) for group in groups if group.task_id == task) for task in TASKS}
    assert set(num_episodes.values()) == {11}, "32 episodes of 3 tasks are rounded up to 11 each"
    after = curriculum(eval={"num_episodes": 32}).eval_groups("after")
    assert not {seed for group in groups for seed in group.seeds} & {seed for group in after for seed in group.seeds}


@given(st.integers(2, 200), st.integers(2, 16))
def test_an_even_split_gives_every_group_at_least_two_members(total: int, largest: int) -> None:
    sizes = split_evenly(total, largest)
    assert sum(sizes) == total
    assert min(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(largest, 3)


def test_one_batch_more_than_the_rate_limiter_admits_is_planned() -> None:
    assert num_to_plan(num_in_progress=0, num_needed=400, groups_per_batch=4, max_staleness=1) == 12
    assert num_to_plan(num_in_progress=11, num_needed=400, groups_per_batch=4, max_staleness=1) == 1
    assert num_to_plan(num_in_progress=12, num_needed=400, groups_per_batch=4, max_staleness=1) == 0


def test_no_more_groups_are_planned_than_the_run_needs() -> None:
    assert num_to_plan(num_in_progress=3, num_needed=4, groups_per_batch=4, max_staleness=4) == 1
    assert num_to_plan(num_in_progress=4, num_needed=4, groups_per_batch=4, max_staleness=4) == 0
