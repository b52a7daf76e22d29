"""All of deskrl's own suite on real desktops, plain and noisy: every task can be solved, and none is solved already."""

from __future__ import annotations

import asyncio

import pytest

from deskrl.actor.desktops.packages import missing_packages
from deskrl.actor.tasks.files import load_tasks, parse_task
from deskrl.actor.tasks.noise import LEVELS, Level, make_noisy
from deskrl.actor.tasks.prove import prove
from deskrl.core.config import DesktopConfig, RunConfig

MISSING = missing_packages(whole_suite=True)


CONFIG = RunConfig(desktop=DesktopConfig(num_envs=2))

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"packages missing: {MISSING}")


def test_every_task_of_the_suite_can_be_solved_and_is_not_solved_already() -> None:
    proofs = asyncio.run(prove(load_tasks(), CONFIG, num_times=2))
    assert [(proof.task_id, proof.problems) for proof in proofs if not proof.holds] == []


@pytest.mark.parametrize("level", LEVELS)
def test_every_solution_holds_under_noise(level: Level) -> None:
    noisy = [parse_task(make_noisy(task, level), task.id) for task in load_tasks()]
    proofs = asyncio.run(prove(noisy, CONFIG, num_times=0))
    assert [(proof.task_id, proof.problems) for proof in proofs if not proof.holds] == []
