"""Specification of the rewards of deskrl's suite: no scripted cheat is rewarded or ends an episode with a fault."""

from __future__ import annotations

import asyncio

import pytest

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.tasks.audit import audit
from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.core.config import DesktopConfig, RunConfig

MISSING = missing_packages(whole_suite=True)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"packages missing: {MISSING}")


@pytest.mark.timeout(7200)
def test_no_cheat_is_rewarded_by_any_task() -> None:
    attempts = asyncio.run(audit(load_tasks(), RunConfig(desktop=DesktopConfig(num_envs=4))))
    assert [attempt for attempt in attempts if attempt.verdict in ("rewarded", "fault")] == []
