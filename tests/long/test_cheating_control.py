"""Control experiment: a policy that mixes cheats in place of solutions earns nothing.

Each episode runs several cheats, chosen at random, one after the other: one may prepare what another needs.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

import pytest

from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.provider_registry import make_desktop
from deskrl.actor.tasks.audit import Attempt, attempt_cheats, cheat_names
from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.core.config import DesktopConfig, RunConfig

MISSING = missing_packages(whole_suite=True)
CONFIG = RunConfig(desktop=DesktopConfig(num_envs=3))
NUM_ROUNDS = 4
CHEATS_PER_EPISODE = 3

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"packages missing: {MISSING}")


async def run_cheating_policy(seed: int) -> list[Attempt]:
    """Run one episode of each task in each round, with cheats chosen by the seed."""
    generator = random.Random(seed)
    pending = [
        (task, generator.sample(cheat_names()[1:], CHEATS_PER_EPISODE))
        for _ in range(NUM_ROUNDS)
        for task in load_tasks()
    ]
    attempts: list[Attempt] = []

    async def work(name: str, root: Path) -> None:
        desktop = make_desktop(CONFIG.desktop, name, root)
        try:
            while pending:
                attempts.append(await attempt_cheats(desktop, *pending.pop(), CONFIG))
        finally:
            await desktop.close()

    with tempfile.TemporaryDirectory(prefix="deskrl-test-") as directory:
        async with asyncio.TaskGroup() as group:
            for number in range(CONFIG.desktop.num_envs):
                group.create_task(work(f"d{number}", Path(directory) / "desktops"))
    return attempts


@pytest.mark.timeout(3600)
def test_a_policy_that_mixes_cheats_earns_nothing() -> None:
    attempts = asyncio.run(run_cheating_policy(seed=15))
    assert [attempt for attempt in attempts if attempt.verdict in ("rewarded", "fault")] == []
