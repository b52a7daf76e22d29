"""Specification of deskrl's whole suite on real desktops, original and noisy: solvable and not solved initially."""

from __future__ import annotations

import asyncio

import pytest

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.tasks.noise import NOISE_LEVELS, NoiseLevel
from deskrl.actor.tasks.prove import prove
from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.core.config import DesktopConfig, RunConfig, TasksConfig

MISSING = missing_packages(whole_suite=True)

CONFIG = RunConfig(desktop=DesktopConfig(num_envs=2))

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"packages missing: {MISSING}")


def test_every_task_of_the_suite_is_solvable_and_not_solved_initially() -> None:
    proofs = asyncio.run(prove(load_tasks(), CONFIG, num_repeats=2))
    assert [(proof.task_id, proof.problems) for proof in proofs if not proof.holds] == []


@pytest.mark.parametrize("level", NOISE_LEVELS)
def test_every_solution_succeeds_with_any_noise(level: NoiseLevel) -> None:
    config = CONFIG.model_copy(update={"tasks": TasksConfig(noise=level)})
    proofs = asyncio.run(prove(load_tasks(), config, num_repeats=2))
    assert [(proof.task_id, proof.problems) for proof in proofs if not proof.holds] == []
