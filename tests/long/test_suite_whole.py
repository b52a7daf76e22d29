"""All of deskrl's own suite on real desktops: every task can be solved, and none is solved already."""

from __future__ import annotations

import asyncio

import pytest

from deskrl.actor.desktops.packages import missing_packages
from deskrl.actor.prove import prove
from deskrl.actor.tasks import load_tasks
from deskrl.core.config import DesktopConfig, RunConfig

MISSING = missing_packages(whole_suite=True)


@pytest.mark.skipif(bool(MISSING), reason=f"packages missing: {MISSING}")
def test_every_task_of_the_suite_can_be_solved_and_is_not_solved_already() -> None:
    config = RunConfig(desktop=DesktopConfig(num_envs=2))
    proofs = asyncio.run(prove(load_tasks(), config, num_times=2))
    assert [(proof.task_id, proof.problems) for proof in proofs if not proof.holds] == []
